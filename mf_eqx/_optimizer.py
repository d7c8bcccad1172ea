"""The interface to optax: which optimisers a training step supports, how their state is made, how they are called."""

from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ._custom_types import Scalar

_EVERY_STEP = (
    "optimizer must make an update in every step, since averages and faults are updated in every step "
    "(TrainStep's accumulation is for gradients of more rows)"
)
_NO_FUNCTION = (
    "optimizer must need only the loss and its gradient, since a step does not evaluate the loss at other parameters"
)
_NO_PAIRS = "optimizer must take the field's parameters as they are, not pairs of fast and slow ones"
_REFUSED = {
    optax.MultiStepsState: _EVERY_STEP,
    optax.ApplyEvery: _EVERY_STEP,
    optax.contrib.SAMState: _EVERY_STEP,
    optax.LookaheadState: _NO_PAIRS,
    optax.ScaleByZoomLinesearchState: _NO_FUNCTION,
    optax.ScaleByBacktrackingLinesearchState: _NO_FUNCTION,
    optax.contrib.HutchinsonState: _NO_FUNCTION,
}
"""Types of states of the optimisers that a step does not support, with the rule that each breaks."""


def check_optimizer(optimizer: Any) -> None:
    """Raises a `ValueError` unless `optimizer` is an optax transformation that makes an update in every step."""
    if isinstance(optimizer, optax.MultiSteps):
        raise ValueError(f"{_EVERY_STEP}, got optax.MultiSteps")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")


def init_optimizer(optimizer: optax.GradientTransformation, parameters: PyTree[Any]) -> PyTree[Any]:
    """The optimiser's state before the first step, with all arrays copied.

    Python numbers become arrays: as constants of the compiled step they would never be updated.

    **Raises:** `ValueError` if a step does not support the optimiser.
    """
    check_optimizer(optimizer)
    with standard_promotion():
        opt_state = optimizer.init(parameters)
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: type(node) in _REFUSED):
        if type(node) in _REFUSED:
            raise ValueError(f"{_REFUSED[type(node)]}, got one whose state has {type(node).__name__}")
    return jax.tree.map(lambda leaf: copy(jnp.asarray(leaf) if is_number(leaf) else leaf), opt_state)


def update_optimizer(
    optimizer: optax.GradientTransformation,
    loss: Scalar,
    gradients: PyTree[Any],
    opt_state: PyTree[Any],
    parameters: PyTree[Any],
) -> tuple[PyTree[Any], PyTree[Any]]:
    """The updates of the parameters, and the optimiser's next state."""
    update = optax.with_extra_args_support(optimizer).update
    with standard_promotion():
        return update(gradients, opt_state, parameters, value=loss, grad=gradients)


def standard_promotion() -> AbstractContextManager[None]:
    """The context for calls of optax, which mixes dtypes: needed if `jax_numpy_dtype_promotion` is set to strict."""
    return jax.numpy_dtype_promotion("standard")


def is_number(leaf: Any) -> bool:
    """Whether `leaf` is a Python number."""
    return isinstance(leaf, int | float | complex)


def copy(leaf: Any) -> Any:
    """A copy of an array; any other leaf unchanged.

    The copy is never weakly typed. A leaf that is restored or set by hand is not weakly typed either, and the step
    would be compiled again if this differed.
    """
    return jnp.array(leaf, leaf.dtype, copy=True) if eqx.is_array(leaf) else leaf
