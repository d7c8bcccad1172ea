r"""How one training is spread over devices: a mesh of two axes, and one rule that follows from shapes alone.

    parallelism = Parallelism(fsdp=4)                       8 devices: 2 x 4
    state = parallelism.make(make_state)                    made in place, never whole on one device
    step = TrainStep(..., parallelism=parallelism)
    state, metrics = step(state, parallelism.place(batch))

Rows are spread over all devices, over both axes. Parameters, optimiser state and averages are equal on all devices of
the axis `data`, and of a large leaf every device of the axis `fsdp` keeps one part only: "fully sharded data
parallelism" (Zhao et al., 2023, arXiv 2304.11277). With fsdp = 1 it is plain data parallelism. What is shared is what
lasts from step to step: `TrainStep` gathers the parameters whole at the start of a step, not layer by layer, so that
while it computes each device holds a copy of the parameters and one of their gradients.

Nothing that is computed depends on the mesh, up to the order of sums: every random number follows from the row's index
in the global batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

_Tree = TypeVar("_Tree")


class Parallelism(eqx.Module):
    """A mesh of `data` x `fsdp` devices, and what lies where on it.

    **Arguments:**

    - `data`: devices that keep the same parameters, by default all divided by `fsdp`.
    - `fsdp`: devices that share one copy of the parameters.
    - `least_size`: elements that a leaf must have to be shared at all; a smaller one costs more in messages than in
      memory.
    - `devices`: by default all of all processes. Neighbours share a copy of the parameters.

    **Raises:** `ValueError` unless data x fsdp is the number of devices.
    """

    mesh: Mesh = eqx.field(static=True)
    least_size: int = eqx.field(static=True)

    def __init__(
        self,
        data: int | None = None,
        fsdp: int = 1,
        *,
        least_size: int = 2**16,
        devices: Sequence[Any] | None = None,
    ):
        devices = jax.devices() if devices is None else devices
        if fsdp < 1 or len(devices) % fsdp:
            raise ValueError(f"fsdp must divide the number of devices, {len(devices)}, got {fsdp}")
        data = len(devices) // fsdp if data is None else data
        if data * fsdp != len(devices):
            raise ValueError(f"data x fsdp must be the number of devices, {len(devices)}, got {data} x {fsdp}")
        auto = (AxisType.Auto, AxisType.Auto)
        self.mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=auto, devices=devices)
        self.least_size = least_size

    @property
    def shards(self) -> int:
        """The number of devices, each of which has rows of its own."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """Of what every device has a copy of."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Of arrays with a leading batch axis."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    def of_shape(self, shape: tuple[int, ...]) -> NamedSharding:
        """The rule: the largest axis that `fsdp` divides is shared (of equal ones the first), if the leaf is large."""
        fsdp = self.mesh.shape["fsdp"]
        divisible = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
        if fsdp == 1 or math.prod(shape) < self.least_size or not divisible:
            return self.replicated
        shared = max(divisible, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * shared, "fsdp"))

    def of_tree(self, tree: PyTree[Any]) -> PyTree[Any]:
        """The sharding of each leaf of a state, arrays or `jax.ShapeDtypeStruct`; None for other leaves."""
        return jax.tree.map(lambda leaf: self.of_shape(leaf.shape), arrays_of(tree))

    def spread(self, tree: _Tree) -> _Tree:
        """The same arrays inside a jitted function, told to lie where the rule says."""
        arrays, others = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, self.of_tree(arrays)), others)

    def gather(self, tree: _Tree) -> _Tree:
        """The same arrays inside a jitted function, whole on every device."""
        arrays, others = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, self.replicated), others)

    def replicate(self, tree: _Tree) -> _Tree:
        """A tree whose arrays are whole on every device, outside of jitted functions (`gather` is for inside).

        **Arguments:** `tree` of arrays, of which all processes have the same. Where an array already lies on a device
        its memory is shared: a state that is replicated must not be donated while the result is in use.
        """

        def put(leaf: Any) -> Any:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # which JAX puts on one process's devices only
                return jr.wrap_key_data(put(jr.key_data(leaf)), impl=jr.key_impl(leaf))
            return jax.device_put(leaf, self.replicated)

        return jax.tree.map(lambda leaf: put(leaf) if eqx.is_array(leaf) else leaf, tree)

    def make(self, function: Callable[[], _Tree]) -> _Tree:
        """What `function()` returns, a state, as one jitted program that makes every part where it belongs.

        **Arguments:** `function` closes over nothing large, since that would become part of the program. An
        `eqx.Partial` may have large arguments, such as weights to start from.
        """
        shapes = eqx.filter_eval_shape(function)
        _, others = eqx.partition(shapes, _is_shape)
        given, rest = eqx.partition(function, eqx.is_array)

        def arrays(given: PyTree[Any]) -> PyTree[Any]:
            return eqx.filter(eqx.combine(given, rest)(), eqx.is_array)

        return eqx.combine(jax.jit(arrays, out_shardings=self.of_tree(shapes))(given), others)

    def positions(self, rows: int) -> Int[np.ndarray, " local"]:
        """Which rows of a global batch this process needs, in ascending order.

        **Raises:** `ValueError` unless every device gets as many rows.
        """
        if rows % self.shards:
            raise ValueError(f"batch must be a multiple of the {self.shards} devices that share it, got {rows}")
        slices = self.rows.addressable_devices_indices_map((rows,)).values()
        return np.unique(np.concatenate([np.arange(rows, dtype=np.int64)[index] for index in slices]))

    def place(self, tree: _Tree, rows: int | None = None) -> _Tree:
        """The rows of this process, as part of arrays that are spread over the devices of all processes.

        **Arguments:** `tree` of arrays on the host, whose leading axis has the rows at `positions(rows)` in this order;
        `rows` of the global batch, by default those of `tree`: right for a single process.
        """
        whole = len(jax.tree.leaves(tree)[0]) if rows is None else rows
        here = self.positions(whole)

        def put(leaf: Any) -> jax.Array:
            def part(index: Any) -> Any:
                start, stop, _ = index[0].indices(whole)
                first = np.searchsorted(here, start)
                return leaf[first : first + stop - start]

            return jax.make_array_from_callback((whole, *leaf.shape[1:]), self.rows, part)

        return jax.tree.map(put, tree)

    def table(self, tree: PyTree[Any]) -> "list[Placement]":
        """What lies where, leaf by leaf: of a state, or of its shapes."""
        return [
            Placement(
                jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(sharding.spec), _bytes(leaf, sharding)
            )
            for path, leaf in jax.tree.leaves_with_path(arrays_of(tree))
            for sharding in [self.of_shape(leaf.shape)]
        ]


class Placement(NamedTuple):
    """How one leaf lies on the mesh.

    **Arguments:** `leaf` its path; `shape`; `dtype`; `spec` the mesh axis of each array axis; `bytes_per_device`.
    """

    leaf: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def arrays_of(tree: _Tree) -> _Tree:
    """Arrays and shapes of arrays alone, None elsewhere."""
    return eqx.filter(tree, lambda leaf: eqx.is_array(leaf) or _is_shape(leaf))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
