r"""Parameters that are never whole on one device: "fully sharded data parallelism" inside a training step.

Every device holds one part of each large parameter (`Parallelism`), and runs the same program on its own rows:

    parameters outside of stacks    are gathered at the start; their gradients are summed and divided at the end
    each block of a `nn.Stack`      is gathered when the loop over blocks comes to it, and again in the backward pass;
                                    its gradient is summed over devices and divided before the loop goes on

So a device holds its part of all parameters and of all gradients, and beside them no more than one whole block and one
gradient of it. The transpose of "gather" (`jax.lax.all_gather`) is "sum over devices, and keep one's own part"
(`jax.lax.psum_scatter`), so that differentiation alone puts the sums of gradients where they belong. A JVP in times
and states gathers nothing more, because parameters have no tangents in it.

All this needs a loop: of a stack without one (`unroll=True`) the compiler may gather several blocks early.

Source: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, Rajbhandari, Rasley, Ruwase, He, 2020,
arXiv 1910.02054 (its third stage); PyTorch FSDP, Zhao et al., 2023, arXiv 2304.11277.
"""

from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from .nn import Stack

_Tree = TypeVar("_Tree")


class GatherBlock(NamedTuple):
    """Makes one block of a stack whole.

    **Arguments:** `axes` for each array of a block the axis along which it is divided, counted from the last, or None
    if it is not divided.
    """

    axes: tuple[int | None, ...]

    def __call__(self, block: _Tree) -> _Tree:
        leaves, structure = jax.tree.flatten(block)
        return structure.unflatten([_gathered(*each) for each in zip(leaves, self.axes, strict=True)])


def gathered_in_turn(tree: _Tree, specs: PyTree[PartitionSpec]) -> _Tree:
    """The same tree with whole arrays, where those of a `Stack` become whole one block at a time.

    An array that is divided along the axis that stacks the blocks is gathered at once. For use inside `jax.shard_map`.

    **Arguments:** `tree` of the parts that this device holds; `specs` of its arrays.
    """

    def visit(node: Any, spec: Any) -> Any:
        if isinstance(node, Stack):
            return _in_turn(node, spec)
        return node if spec is None else _gathered(node, _axis(node, spec))

    return jax.tree.map(visit, tree, specs, is_leaf=lambda node: isinstance(node, Stack))


def summed(gradients: _Tree, specs: PyTree[PartitionSpec]) -> _Tree:
    """Gradients summed over all devices, where those of divided arrays have been summed along `fsdp`."""

    def visit(leaf: Array, spec: PartitionSpec) -> Array:
        axes = ("data", "fsdp") if _axis(leaf, spec) is None else ("data",)
        axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)  # XLA:CPU copies to "sum" over one device
        return jax.lax.psum(leaf, axes) if axes else leaf

    return jax.tree.map(visit, gradients, specs)


def _in_turn(stack: Stack[Any], specs: Stack[Any]) -> Stack[Any]:
    arrays, rest = eqx.partition(stack.blocks, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    axes = [_axis(*each) for each in zip(leaves, jax.tree.leaves(specs.blocks), strict=True)]
    for i, leaf in enumerate(leaves):
        if axes[i] == -leaf.ndim:
            leaves[i], axes[i] = _gathered(leaf, axes[i]), None
    blocks = eqx.combine(structure.unflatten(leaves), rest)
    return eqx.tree_at(lambda node: node.blocks, stack, blocks).gathering(GatherBlock(tuple(axes)))


def _axis(leaf: Array, spec: PartitionSpec) -> int | None:
    """The axis that is divided, counted from the last."""
    return list(spec).index("fsdp") - leaf.ndim if "fsdp" in spec else None


def _gathered(leaf: Array, axis: int | None) -> Array:
    return leaf if axis is None else jax.lax.all_gather(leaf, "fsdp", axis=leaf.ndim + axis, tiled=True)
