"""Files of torch in which several sets of weights lie: an average beside the trained ones, each with its own prefix."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .._foreign import read_torch
from .._leaves import listed


def read_state_dicts(path: str | Path, anchor: str) -> dict[str, dict[str, Shaped[np.ndarray, "..."]]]:
    """The sets of weights in a file of `torch.save`, by what stands before their names.

    A file `{"model": {"net.a": ..., "net_ema.a": ...}}` holds the sets `model.net` and `model.net_ema`, each {"a":
    ...}. A file that is a set itself gives it the name "".

    **Arguments:** `path` of the file; `anchor`: a name that every set has, such as `map_layer0.weight` of the CIFAR-10
    network and `x_embedder.proj.weight` of DiT and SiT.

    **Raises:** `MissingDependency` without torch; `OSError` if it cannot be read; `ValueError` that names it if it is
    no such file, would execute anything, has no set, or has anything but tensors in one.
    """
    held = dict(_named(read_torch(path)))
    before = [name.removesuffix(anchor) for name in held if f".{name}".endswith(f".{anchor}")]
    if not before:
        raise ValueError(f"{path}: must hold {anchor}, alone or with a prefix, got {listed(sorted(held)) or 'nothing'}")
    return {prefix.removesuffix("."): _beneath(prefix, held, path) for prefix in before}


def _named(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by names joined with dots."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _beneath(prefix: str, held: Mapping[str, Any], path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    found = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
    if others := sorted(name for name, value in found.items() if not isinstance(value, np.ndarray)):
        raise ValueError(f"{path}: must hold tensors alone beneath {prefix!r}, got others in {listed(others)}")
    return found
