"""Checks of the engines: gradients that would silently be zero, and fields that an engine cannot differentiate."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree


@jax.custom_vjp
def refuse_gradient(dudt: PyTree[Array], inputs: PyTree[Array]) -> PyTree[Array]:
    """`dudt` unchanged, with a backward pass that raises: `dudt` was computed without a gradient path to `inputs`.

    JAX runs the backward pass only for gradients with respect to arguments of this function. Therefore `inputs`, the
    arrays on which `dudt` depends, are arguments too. Behind `stop_gradient` the backward pass is never run.
    """
    return dudt


def _refuse(_: None, __: Any) -> Any:
    raise ValueError(
        "du/dt must be behind stop_gradient here: this engine, or the field's attention, blocks its gradient, which "
        "would be zero. To learn through du/dt use FusedJVP and XLAAttention, ChunkedAttention or PallasAttention"
    )


refuse_gradient.defvjp(lambda dudt, inputs: (dudt, None), _refuse)


def trace_and_check(
    function: Callable[..., Any], check: Callable[[Iterable[Any]], None], *inputs: Any
) -> Callable[..., Any]:
    """`function`, traced once for all calls, after `check` has seen the equations of its program."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    check(_equations(program.jaxpr))

    def run(*inputs: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(inputs)))

    return run


def refuse_custom_vjp(equations: Iterable[Any]) -> None:
    """Raises while tracing, with a remedy in the message; JAX itself would raise only when lowering."""
    if any(equation.primitive.name == "custom_lin" for equation in equations):
        raise ValueError(
            "field must be differentiable in forward mode, got a jax.custom_vjp function between (z, r, t) and u. A "
            "fused attention kernel must be an mf_eqx.nn.AbstractAttention, which engines replace; the du/dt of "
            "anything else needs CentralDifference"
        )


def refuse_low_precision(equations: Iterable[Any]) -> None:
    """Refuses a program that computes below float32 anywhere: a finite difference would consist of rounding errors."""
    dtypes = {variable.aval.dtype for equation in equations for variable in equation.outvars}
    low_dtypes = [d.name for d in dtypes if jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits < 32]
    if low_dtypes:
        names = ", ".join(sorted(low_dtypes))
        raise ValueError(f"field must compute in float32 or better for a finite difference, got {names}")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, including those of its loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
