"""Files of torch with several sets of weights, for example the trained weights and their average, each with its own
prefix."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .._foreign import read_torch
from .._leaves import listed


def read_state_dicts(path: str | Path, anchor: str) -> dict[str, dict[str, Shaped[np.ndarray, "..."]]]:
    """The sets of weights in a file of `torch.save`, by the prefix of their names.

    A file `{"model": {"net.a": ..., "net_ema.a": ...}}` holds the sets `model.net` and `model.net_ema`, each {"a":
    ...}. If a file is itself a set, the prefix is "".

    **Arguments:** `path` of the file; `anchor` a name that every set has, such as `map_layer0.weight` of the CIFAR-10
    network and `x_embedder.proj.weight` of DiT and SiT.

    **Raises:** `MissingDependency` without torch, which only files since torch 1.6 need; `OSError` if the file cannot
    be read; `ValueError` that names the file if it is not a file of `torch.save`, would execute code, has no set, or
    has a set with anything but tensors.
    """
    values = dict(_flattened(read_torch(path)))
    prefixes = [name.removesuffix(anchor) for name in values if f".{name}".endswith(f".{anchor}")]
    if not prefixes:
        found = listed(sorted(values)) or "nothing"
        raise ValueError(f"{path}: must hold {anchor}, alone or with a prefix, got {found}")
    return {prefix.removesuffix("."): _with_prefix(prefix, values, path) for prefix in prefixes}


def _flattened(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, by their keys joined with dots."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _with_prefix(prefix: str, values: Mapping[str, Any], path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    tensors = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if others := sorted(name for name, value in tensors.items() if not isinstance(value, np.ndarray)):
        raise ValueError(f"{path}: must hold only tensors under {prefix!r}, got others in {listed(others)}")
    return tensors
