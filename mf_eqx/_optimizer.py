"""How a step meets optax: which optimisers it can serve, what their state is made of, and what it hands them."""

from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ._custom_types import Scalar

_EVERY_STEP = (
    "optimizer must make an update of every step, since averages and faults follow each "
    "(TrainStep's accumulation takes the gradients of more rows)"
)
_NO_FUNCTION = (
    "optimizer must make its update of the loss and its gradient, since a step has no loss at other parameters"
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
"""States of optimisers that a step cannot serve, and the rule."""


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no optax transformation: `ValueError`."""
    if isinstance(optimizer, optax.MultiSteps):
        raise ValueError(f"{_EVERY_STEP}, got optax.MultiSteps")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")


def init_optimizer(optimizer: optax.GradientTransformation, parameters: PyTree[Any]) -> PyTree[Any]:
    """The optimiser's state before the first step, all of it in arrays of its own.

    Numbers of Python become arrays: as constants of the compiled step no update would change them.

    **Raises:** `ValueError` if a step cannot serve the optimiser.
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
    """For optax, whose functions mix dtypes, also where the caller has set `jax_numpy_dtype_promotion` to strict."""
    return jax.numpy_dtype_promotion("standard")


def is_number(leaf: Any) -> bool:
    """Whether it is one of Python's numbers."""
    return isinstance(leaf, int | float | complex)


def copy(leaf: Any) -> Any:
    """A copy of an array; anything else as it is.

    Never weakly typed: a number that is set by hand or restored is not, and the step would be compiled anew for it.
    """
    return jnp.array(leaf, leaf.dtype, copy=True) if eqx.is_array(leaf) else leaf
