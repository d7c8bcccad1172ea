r"""How one training is spread over devices: a mesh of two axes, and one rule that depends on shapes alone.

    parallelism = Parallelism(fsdp=4)                       8 devices: 2 x 4
    state = parallelism.make(make_state)                    made in place, never whole on one device
    step = TrainStep(..., parallelism=parallelism)
    state, metrics = step(state, parallelism.place(batch))

Rows are spread over all devices, over both axes. Parameters, optimiser state and averages are replicated along the axis
`data`; along the axis `fsdp` each large leaf is divided, and every device keeps only one part of it: "fully sharded
data parallelism" (Zhao et al., 2023, arXiv 2304.11277). With fsdp = 1 it is plain data parallelism.

During a step, too, the parameters of a `nn.Stack` are never all on one device. Its blocks become whole one at a time,
forward and again backward, and the gradient of a block is summed over devices and divided before the next one's
(`_fsdp.py`). So a device needs

    (parameters + optimiser + averages + gradients) / fsdp + two whole blocks + what its own rows need

where gradients count twice if they are summed over several copies of the parameters or, for parameters outside of loops
over blocks or of less than float32, over kinds of rows or micro-batches. Gathered for the whole step are parameters
outside of stacks, stacked leaves of which `fsdp` divides no axis but the first, and all parameters for an objective
that is no mean over rows (`AbstractObjective.divisor`). This was checked on simulated CPU devices, and for XL/2 by the
memory analysis of XLA's compilers for CPUs, GPUs and TPUs; no GPU or TPU has run it yet.

No result depends on the mesh, up to the order of sums: every random number depends on the row's index in the global
batch.
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

from ._leaves import by_name
from ._validate import as_count

_Tree = TypeVar("_Tree")


class Parallelism(eqx.Module):
    """A mesh of `data` x `fsdp` devices, and the placement of arrays on it.

    **Arguments:**

    - `data`: number of copies of the parameters, by default the number of devices divided by `fsdp`.
    - `fsdp`: number of devices over which one copy of the parameters is divided.
    - `least_size`: smallest number of elements of a leaf that is divided; to divide a smaller leaf costs more in
      communication than it saves in memory.
    - `devices`: by default all devices of all processes. Neighbours in this sequence hold parts of the same copy.

    **Raises:** `ValueError` unless data x fsdp is the number of devices, which is at least one, or if one of the
    numbers is no integer in its range.
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
        if len(devices) < 1:
            raise ValueError("devices must be at least one, got none")
        fsdp, least_size = as_count("fsdp", fsdp), as_count("least_size", least_size, 0)
        if len(devices) % fsdp:
            raise ValueError(f"fsdp must divide the number of devices, {len(devices)}, got {fsdp}")
        data = len(devices) // fsdp if data is None else as_count("data", data)
        if data * fsdp != len(devices):
            raise ValueError(f"data x fsdp must be the number of devices, {len(devices)}, got {data} x {fsdp}")
        auto = (AxisType.Auto, AxisType.Auto)
        self.mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=auto, devices=devices)
        self.least_size = least_size

    @property
    def shards(self) -> int:
        """The number of devices, and so of the parts into which the rows of a batch are divided."""
        return self.mesh.size

    @property
    def divides(self) -> bool:
        """Whether large leaves are divided between devices."""
        return self.mesh.shape["fsdp"] > 1

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays of which every device has a copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """The sharding of arrays with a leading batch axis."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    def of_shape(self, shape: tuple[int, ...]) -> NamedSharding:
        """The rule: a large leaf is divided along its largest axis that `fsdp` divides (of equal axes, the first), and
        along the first axis, which may stack blocks, only if `fsdp` divides no other."""
        fsdp = self.mesh.shape["fsdp"]
        divisible = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
        if fsdp == 1 or math.prod(shape) < self.least_size or not divisible:
            return self.replicated
        shared = max(divisible, key=lambda axis: (axis > 0, shape[axis]))
        return NamedSharding(self.mesh, PartitionSpec(*[None] * shared, "fsdp"))

    def of_tree(self, tree: PyTree[Any]) -> PyTree[Any]:
        """The sharding of each leaf of a state, arrays or `jax.ShapeDtypeStruct`; None for other leaves."""
        return jax.tree.map(lambda leaf: self.of_shape(leaf.shape), arrays_of(tree))

    def spread(self, tree: _Tree) -> _Tree:
        """The same arrays, placed as the rule says. For use inside a jitted function."""
        arrays, others = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, self.of_tree(arrays)), others)

    def gather(self, tree: _Tree) -> _Tree:
        """The same arrays, whole on every device. For use inside a jitted function."""
        arrays, others = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, self.replicated), others)

    def replicate(self, tree: _Tree) -> _Tree:
        """The same arrays, whole on every device. For use outside of jitted functions (inside, use `gather`).

        **Arguments:** `tree` of arrays that are the same on all processes. Where an array already lies on a device, its
        memory is shared with the result: a replicated state must not be donated while the result is in use.
        """

        def put(leaf: Any) -> Any:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # JAX can put keys on the devices of one process only
                return jr.wrap_key_data(put(jr.key_data(leaf)), impl=jr.key_impl(leaf))
            return jax.device_put(leaf, self.replicated)

        return jax.tree.map(lambda leaf: put(leaf) if eqx.is_array(leaf) else leaf, tree)

    def make(self, function: Callable[[], _Tree]) -> _Tree:
        """The state that `function()` returns, made by one jitted program that makes every part on its own device.

        **Arguments:** `function` must not close over large arrays, since they would become constants of the program. An
        `eqx.Partial` may have large arguments, such as weights to start from.
        """
        shapes = eqx.filter_eval_shape(function)
        _, others = eqx.partition(shapes, _is_shape)
        inputs, rest = eqx.partition(function, eqx.is_array)

        def make_arrays(inputs: PyTree[Any]) -> PyTree[Any]:
            return eqx.filter(eqx.combine(inputs, rest)(), eqx.is_array)

        return eqx.combine(jax.jit(make_arrays, out_shardings=self.of_tree(shapes))(inputs), others)

    def positions(self, rows: int) -> Int[np.ndarray, " local"]:
        """The positions in a global batch of the rows that this process needs, in ascending order.

        **Raises:** `ValueError` unless `rows` is a multiple of the number of devices.
        """
        if rows % self.shards:
            raise ValueError(f"batch must be a multiple of the {self.shards} devices that share it, got {rows}")
        slices = self.rows.addressable_devices_indices_map((rows,)).values()
        return np.unique(np.concatenate([np.arange(rows, dtype=np.int64)[index] for index in slices]))

    def place(self, tree: _Tree, rows: int | None = None) -> _Tree:
        """Arrays that are spread over the devices of all processes, of which this process provides its own rows.

        **Arguments:** `tree` of arrays on the host, whose leading axis has the rows at `positions(rows)` in this order;
        `rows` number of rows of the global batch, by default the number in `tree`, which is right for a single process.

        **Raises:** `ValueError` if `tree` has no arrays, or if an array has another number of rows than that of
        `positions(rows)`; as `positions`.
        """
        if not (named := by_name("tree", tree)):
            raise ValueError("tree must have at least one array, got none")
        if scalars := [name for name, leaf in named.items() if np.ndim(leaf) == 0]:
            raise ValueError(f"{scalars[0]} must have a leading axis of rows, got a scalar")
        rows = len(next(iter(named.values()))) if rows is None else rows
        local_positions = self.positions(rows)
        for name, leaf in named.items():
            if len(leaf) != len(local_positions):
                raise ValueError(f"{name} must have {len(local_positions)} rows, got {len(leaf)}")

        def put(leaf: Any) -> jax.Array:
            def part(index: Any) -> Any:
                start, stop, _ = index[0].indices(rows)
                first = np.searchsorted(local_positions, start)
                return leaf[first : first + stop - start]

            return jax.make_array_from_callback((rows, *leaf.shape[1:]), self.rows, part)

        return jax.tree.map(put, tree)

    def table(self, tree: PyTree[Any]) -> "list[Placement]":
        """The placement of each leaf of a state, or of its shapes."""
        return [
            Placement(
                jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(sharding.spec), _bytes(leaf, sharding)
            )
            for path, leaf in jax.tree.leaves_with_path(arrays_of(tree))
            for sharding in [self.of_shape(leaf.shape)]
        ]


class Placement(NamedTuple):
    """The placement of one leaf on the mesh.

    **Arguments:** `leaf` its path; `shape`; `dtype`; `spec` the mesh axis of each array axis; `bytes_per_device`.
    """

    leaf: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def arrays_of(tree: _Tree) -> _Tree:
    """The tree with arrays and `jax.ShapeDtypeStruct`s alone, and None in place of other leaves."""
    return eqx.filter(tree, lambda leaf: eqx.is_array(leaf) or _is_shape(leaf))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
