"""The arrays of one step, written and read by Orbax. What is read is not yet verified."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._files import irregular_files
from .._leaves import leaves, listed, without_key_dtype
from .._quiet import collect_tasks, quiet
from .._sharding import Parallelism
from ._agreement import Damage, raising_everywhere
from ._record import short_text


def with_arrays_of_jax(state: PyTree[Any]) -> PyTree[Any]:
    """A state with arrays of JAX in place of those of NumPy.

    **Raises:** `ValueError` that names an array of NumPy whose dtype JAX does not keep.
    """
    return jax.tree.map_with_path(_as_jax, state)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> Any:
    """Start writing arrays into a new folder. Returns when they may be donated; `result()` of what is returned waits
    until the folder is complete."""
    from orbax.checkpoint import v1 as ocp

    return ocp.save_async(str(path), {name: without_key_dtype(leaf) for name, leaf in arrays.items()})


def load_arrays(path: Path, wanted: PyTree[Any], parallelism: Parallelism | None, *, partial: bool) -> dict[str, Any]:
    """The arrays of a folder by their paths in a state, placed as `parallelism` says.

    **Arguments:** `path` of the folder; `wanted` the state, or its shapes; `partial` whether the folder may have other
    arrays besides, which are not read.

    **Raises:** `Damage` in all processes if they cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    targets = {name: _target(without_key_dtype(leaf), parallelism) for name, leaf in leaves(wanted).items()}
    arrays, reason = {}, None
    with raising_everywhere():
        if irregular := irregular_files(path):
            raise Damage(f"it contains other things than ordinary files: {listed(irregular)}")
        with quiet():
            loading = ocp.options.PyTreeOptions.Loading(partial_load=partial)
            try:
                with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                    arrays = ocp.load(str(path), targets)
            except Exception as error:  # damaged files make the reader raise errors of many types
                reason = f"it cannot be read: {short_text(error)}"
            if reason is not None:
                collect_tasks()
        if reason is not None:
            raise Damage(reason)
    return arrays


def _as_jax(path: Any, leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    native = leaf.dtype.newbyteorder("=")
    try:
        dtype = jax.dtypes.canonicalize_dtype(native)
    except TypeError:
        dtype = None
    if dtype != native:
        name = jax.tree_util.keystr(path)
        raise ValueError(f"{name} must have a dtype that JAX keeps, got {leaf.dtype}")
    return jnp.asarray(leaf.astype(native))


def _target(leaf: jax.ShapeDtypeStruct, parallelism: Parallelism | None) -> Any:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = one_device if parallelism is None else parallelism.of_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
