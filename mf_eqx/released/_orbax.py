"""Folders that `flax.training.checkpoints` writes through Orbax, which is its way for large states: one folder for each
step, such as `checkpoint_800640`, with the arrays in the format of Orbax."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._files import irregular_files
from .._leaves import listed
from .._quiet import collect_tasks, quiet


def read_orbax(path: str | Path, part: str | None) -> dict[str, Any]:
    """The content of a folder of Orbax, or only its `part`, in a dictionary: the values of arrays on the host.

    **Raises:** `ValueError` that names the folder if it is none of Orbax, or cannot be read.
    """
    from orbax.checkpoint import v1 as ocp  # slow to import

    folder = str(Path(path).absolute())
    if irregular := irregular_files(Path(path)):
        raise ValueError(f"{path}: must contain ordinary files only, got {listed(irregular)}")
    if not ocp.is_orbax_checkpoint(folder):
        found = listed(sorted(os.listdir(path))) or "nothing"
        raise ValueError(f"{path}: must be a folder that Orbax wrote, such as checkpoint_800640, got one with {found}")
    loading, content, reason = ocp.options.PyTreeOptions.Loading(partial_load=True), {}, None
    with quiet():
        try:
            with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                held = ocp.metadata(folder).metadata
                wanted = held if part is None else {part: held[part]} if part in held else {}
                content = ocp.load(folder, jax.tree.map(_target, wanted)) if wanted else dict.fromkeys(held)
        except Exception as error:  # damaged files make the reader raise errors of many types
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if reason is not None:
            collect_tasks()
    if reason is not None:
        raise ValueError(f"{path}: must be a folder that Orbax wrote, but it cannot be read: {reason}")
    return jax.tree.map(_value, content)


def _target(leaf: Any) -> Any:
    """For an array, another one of the same shape and dtype that takes no memory: it makes Orbax restore the array to
    the host, whatever devices it was saved from."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if hasattr(leaf, "shape") else leaf


def _value(leaf: Any) -> Any:
    return leaf.astype(np.float32) if isinstance(leaf, np.ndarray) and leaf.dtype == jnp.bfloat16 else leaf
