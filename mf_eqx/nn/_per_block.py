r"""Functions with which optimisers treat stacked blocks correctly.

A `Stack` holds one array for each parameter of its blocks: biases of shape (depth, outputs), weights of shape (depth,
inputs, outputs). A rule that depends on the rank of an array takes such biases for a matrix, and a rule that uses the
norm of an array mixes the blocks. With these functions, optax treats a stack as it would treat its blocks one by one:

    # weight decay for weights only, not for biases and norms
    optax.adamw(1e-4, weight_decay=0.1, mask=nn.weight_mask)

    # Muon, with the weight of each block as a matrix
    optax.contrib.muon(1e-3, muon_weight_dimension_numbers=nn.muon_dimension_numbers)

    # rules that use the norm of each array: LARS, LAMB, adaptive clipping
    optax.chain(nn.per_block(optax.adaptive_grad_clip(0.1)), nn.per_block(optax.lamb(1e-3)))

Rules that treat every number separately (SGD, Adam, Lion) need none of this. Rules that need all parameters together,
such as `optax.clip_by_global_norm`, must be outside of `per_block`, because inside they would get one block at a time.
Rules that draw random numbers must be outside, too, because inside they would draw the same numbers for every block.

`weight_mask` can also be used as a label function: `optax.partition({True: ..., False: ...}, nn.weight_mask)`.

Muon's authors leave the first and the last layer and embeddings to Adam. In a `DiT`, with `equinox` as `eqx`:

    def hidden(parameters):
        numbers = nn.muon_dimension_numbers(parameters)
        return eqx.tree_at(lambda field: (field.patches, field.embedding, field.out), numbers, (None, None, None))

    optax.contrib.muon(1e-3, muon_weight_dimension_numbers=hidden)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from ._stack import Stack

_OUTPUTS_FIRST = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)
_NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm)


def weight_mask(parameters: PyTree[Any]) -> PyTree[bool]:
    """True for weights, False for biases and for the scales and shifts of norms: the `mask` of `optax.adamw`.

    A weight is an array of rank 2 or more, without the axes that stack blocks. In Equinox's own layers it is the field
    `weight` of linear layers and convolutions, because their convolutions have biases of rank 2 or more, too.

    **Arguments:** `parameters` of a field, or a tree of their structure.
    """

    def is_weight(leaf: Any, blocks: int, layer: eqx.Module | None) -> bool:
        return leaf.ndim - blocks > 1 if layer is None else _is_kernel(leaf, layer)

    return _map(is_weight, parameters)


def muon_dimension_numbers(parameters: PyTree[Any]) -> PyTree[optax.contrib.MuonDimensionNumbers | None]:
    """The input axes and output axes of each matrix; None for other arrays, which Muon leaves to Adam. This is the
    argument `muon_weight_dimension_numbers` of `optax.contrib.muon`.

    A matrix is an array of rank 2, without the axes that stack blocks, whose inputs come first as in `Linear`. The
    weights of Equinox's linear layers and convolutions are matrices whose outputs come first. The inputs of a
    convolution are the channels at all positions of its kernel, as in the authors' code.

    **Arguments:** `parameters` of a field, or a tree of their structure.

    **Reference:** Muon: an optimizer for hidden layers in neural networks, Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon.
    """

    def numbers(leaf: Any, blocks: int, layer: eqx.Module | None) -> optax.contrib.MuonDimensionNumbers | None:
        if layer is None:
            return optax.contrib.MuonDimensionNumbers(blocks, blocks + 1) if leaf.ndim - blocks == 2 else None
        inputs = tuple(range(blocks + 1, leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(inputs, blocks) if _is_kernel(leaf, layer) else None

    return _map(numbers, parameters)


def per_block(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies `rule` to every block of a `Stack` separately, and to all parameters outside of
    stacks.

    The rule gets the parameters outside of stacks, then the parameters of one block at a time, at the position of the
    stack in the field. For each stack, the rule's state has one more leading axis, that of the blocks.

    **Arguments:** `rule` an optax transformation that treats every array separately.
    """
    update_rule = optax.with_extra_args_support(rule).update

    def init(params: Any) -> Any:
        rest, stacks = _split(params)
        return _State(rule.init(rest), tuple(jax.vmap(per_block(rule).init)(stack) for stack in stacks))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def update_blocks(*arguments: Any) -> tuple[Any, Any]:
            return per_block(rule).update(*arguments, **extra)

        rest, stacks = _split(updates)
        rest_params, stack_params = (None, [None] * len(stacks)) if params is None else _split(params)
        rest, rest_state = update_rule(rest, state.rest, rest_params, **extra)
        arguments = zip(stacks, state.stacks, stack_params, strict=True)
        updated = [jax.vmap(update_blocks)(*stack_arguments) for stack_arguments in arguments]
        updates = _joined(updates, rest, [stack for stack, _ in updated])
        return updates, _State(rest_state, tuple(stack_state for _, stack_state in updated))

    return optax.GradientTransformationExtraArgs(init, update)


class _State(NamedTuple):
    """The state of `per_block`: the rule's state for the parameters outside of stacks, and for each stack."""

    rest: PyTree[Any]
    stacks: tuple[PyTree[Any], ...]


def _is_kernel(leaf: Any, layer: eqx.Module) -> bool:
    return isinstance(layer, _OUTPUTS_FIRST) and leaf is layer.weight


def _map(
    function: Callable[[Any, int, eqx.Module | None], Any], parameters: PyTree[Any], blocks: int = 0
) -> PyTree[Any]:
    """`function(leaf, blocks, layer)` of every leaf: `blocks` is the number of its leading axes that stack blocks, one
    for each stack around it, and `layer` the Equinox layer to which it belongs, or None."""

    def visit(node: Any) -> Any:
        if isinstance(node, Stack):
            (inside,), structure = eqx.tree_flatten_one_level(node)
            return structure.unflatten([_map(function, inside, blocks + 1)])
        if isinstance(node, _OUTPUTS_FIRST + _NORMS):
            return jax.tree.map(lambda leaf: function(leaf, blocks, node), node)
        return function(node, blocks, None)

    return jax.tree.map(visit, parameters, is_leaf=lambda node: isinstance(node, (Stack, *_OUTPUTS_FIRST, *_NORMS)))


def _is_stack(node: Any) -> bool:
    """Whether `node` is a stack that has parameters."""
    return isinstance(node, Stack) and bool(jax.tree.leaves(node))


def _split(tree: PyTree[Any]) -> tuple[PyTree[Any], list[PyTree[Any]]]:
    """The tree without its stacks, and for each stack the tree with only the blocks of this stack."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_stack)
    positions = [position for position, node in enumerate(nodes) if _is_stack(node)]
    rest = structure.unflatten([None if _is_stack(node) else node for node in nodes])
    stacks = [[nodes[i].blocks if i == position else None for i in range(len(nodes))] for position in positions]
    return rest, [structure.unflatten(stack) for stack in stacks]


def _joined(tree: PyTree[Any], rest: PyTree[Any], stacks: list[PyTree[Any]]) -> PyTree[Any]:
    """The inverse of `_split`, with the structure of `tree`."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_stack)
    joined, remaining = structure.flatten_up_to(rest), iter(stacks)
    for position, node in enumerate(nodes):
        if _is_stack(node):
            blocks = structure.flatten_up_to(next(remaining))[position]
            joined[position] = eqx.tree_flatten_one_level(node)[1].unflatten([blocks])
    return structure.unflatten(joined)
