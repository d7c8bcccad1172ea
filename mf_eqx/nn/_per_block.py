r"""What optimisers must know of stacked blocks.

A `Stack` holds one array for each parameter of its blocks: biases of shape (depth, outputs), weights of shape (depth,
inputs, outputs). A rule that looks at the rank of an array takes such biases for a matrix, and one that takes the norm
of an array mixes the blocks. With what is here, optax treats a stack as it would treat its blocks one by one:

    # decay of weights alone, not of biases and norms
    optax.adamw(1e-4, weight_decay=0.1, mask=nn.weight_mask)

    # Muon, to which every block's weight is a matrix
    optax.contrib.muon(1e-3, muon_weight_dimension_numbers=nn.muon_dimension_numbers)

    # rules with a norm of every array: LARS, LAMB, adaptive clipping
    optax.chain(nn.per_block(optax.adaptive_grad_clip(0.1)), nn.per_block(optax.lamb(1e-3)))

Rules that treat every number by itself (SGD, Adam, Lion) need nothing. What looks at all parameters together, such as
`optax.clip_by_global_norm`, must stand outside of `per_block`, where it would see one block at a time; so must what
draws random numbers, which would be the same in every block.

`weight_mask` is a label function, too: `optax.partition({True: ..., False: ...}, nn.weight_mask)`.

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
    """True for weights, False for biases and what scales or shifts a norm: the `mask` of `optax.adamw`.

    A weight is an array of rank 2 or more without the axes that count blocks; of Equinox's own layers, whose
    convolutions have biases of such a rank, it is what they call so.

    **Arguments:** `parameters` of a field, or a tree of their structure.
    """

    def is_weight(leaf: Any, blocks: int, layer: eqx.Module | None) -> bool:
        return leaf.ndim - blocks > 1 if layer is None else _is_kernel(leaf, layer)

    return _map(is_weight, parameters)


def muon_dimension_numbers(parameters: PyTree[Any]) -> PyTree[optax.contrib.MuonDimensionNumbers | None]:
    """Of every matrix of a layer its axes of inputs and of outputs; None for other arrays, which Muon leaves to Adam:
    the `muon_weight_dimension_numbers` of `optax.contrib.muon`.

    A matrix is an array of rank 2 without the axes that count blocks, inputs first as in `Linear`; besides that,
    weights of Equinox's linear layers and convolutions, outputs first. A convolution's inputs are the channels of all
    places of its kernel, as in the authors' code.

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
    """A transformation that does to every block of a `Stack` what `rule` does, and `rule` itself to all else.

    The rule sees the parameters outside of stacks, then those of one block at a time, in the place where the field has
    the stack. Its state has one more leading axis for a stack's blocks.

    **Arguments:** `rule` an optax transformation that treats every array by itself.
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
        found = [jax.vmap(update_blocks)(*each) for each in zip(stacks, state.stacks, stack_params, strict=True)]
        updates = _joined(updates, rest, [stack for stack, _ in found])
        return updates, _State(rest_state, tuple(stack_state for _, stack_state in found))

    return optax.GradientTransformationExtraArgs(init, update)


class _State(NamedTuple):
    """Of `per_block`: the rule's state for what is in no stack, and for each stack."""

    rest: PyTree[Any]
    stacks: tuple[PyTree[Any], ...]


def _is_kernel(leaf: Any, layer: eqx.Module) -> bool:
    return isinstance(layer, _OUTPUTS_FIRST) and leaf is layer.weight


def _map(
    function: Callable[[Any, int, eqx.Module | None], Any], parameters: PyTree[Any], blocks: int = 0
) -> PyTree[Any]:
    """`function(leaf, blocks, layer)` of every leaf: how many leading axes count blocks, one for each stack around it,
    and the layer of Equinox that it belongs to."""

    def visit(node: Any) -> Any:
        if isinstance(node, Stack):
            (inside,), structure = eqx.tree_flatten_one_level(node)
            return structure.unflatten([_map(function, inside, blocks + 1)])
        if isinstance(node, _OUTPUTS_FIRST + _NORMS):
            return jax.tree.map(lambda leaf: function(leaf, blocks, node), node)
        return function(node, blocks, None)

    return jax.tree.map(visit, parameters, is_leaf=lambda node: isinstance(node, (Stack, *_OUTPUTS_FIRST, *_NORMS)))


def _is_stack(node: Any) -> bool:
    """Whether it is a stack that has parameters."""
    return isinstance(node, Stack) and bool(jax.tree.leaves(node))


def _split(tree: PyTree[Any]) -> tuple[PyTree[Any], list[PyTree[Any]]]:
    """The tree without its stacks, and for each of them the tree with nothing but its blocks."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_stack)
    places = [place for place, node in enumerate(nodes) if _is_stack(node)]
    rest = structure.unflatten([None if _is_stack(node) else node for node in nodes])
    alone = [[nodes[place].blocks if each == place else None for each in range(len(nodes))] for place in places]
    return rest, [structure.unflatten(each) for each in alone]


def _joined(tree: PyTree[Any], rest: PyTree[Any], stacks: list[PyTree[Any]]) -> PyTree[Any]:
    """Of the structure of `tree`, what `_split` took apart."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_stack)
    found, left = structure.flatten_up_to(rest), iter(stacks)
    for place, node in enumerate(nodes):
        if _is_stack(node):
            blocks = structure.flatten_up_to(next(left))[place]
            found[place] = eqx.tree_flatten_one_level(node)[1].unflatten([blocks])
    return structure.unflatten(found)
