"""What engines refuse: gradients that would be silently zero, and fields whose derivative they cannot take."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree


@jax.custom_vjp
def refuse_gradient(dudt: PyTree[Array], origins: PyTree[Array]) -> PyTree[Array]:
    """`dudt`, which was computed without a way back to its origins: an error if its gradient is asked for.

    JAX asks only for gradients with respect to arguments of this function. Therefore `origins`, the arrays that `dudt`
    in fact depends on, are arguments too. Behind `stop_gradient` nothing is asked for.
    """
    return dudt


def _refuse(_: None, __: Any) -> Any:
    raise ValueError(
        "du/dt must be behind stop_gradient here: this engine, or its attention, stops it, and its gradient would be "
        "zero. To learn through du/dt use FusedJVP and XLAAttention"
    )


refuse_gradient.defvjp(lambda dudt, origins: (dudt, None), _refuse)


def traced(function: Callable[..., Any], check: Callable[[Iterable[Any]], None], *inputs: Any) -> Callable[..., Any]:
    """`function`, after a look at the equations of its program; traced once, however often it is called."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    check(_equations(program.jaxpr))

    def run(*inputs: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(inputs)))

    return run


def refuse_custom_vjp(equations: Iterable[Any]) -> None:
    """Say it while tracing, with the remedy: JAX would say it when lowering."""
    if any(equation.primitive.name == "custom_lin" for equation in equations):
        raise ValueError(
            "field must be differentiable in forward mode, got a jax.custom_vjp function between (z, r, t) and u. A "
            "fused attention kernel must be an mf_eqx.nn.AbstractAttention, which engines replace; for anything else "
            "there is CentralDifference"
        )


def refuse_low_precision(equations: Iterable[Any]) -> None:
    """Refuses a program that computes in less than float32 anywhere: a finite difference would be rounding."""
    dtypes = {variable.aval.dtype for equation in equations for variable in equation.outvars}
    low = [d.name for d in dtypes if jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits < 32]
    if low:
        raise ValueError(
            f"field must compute in float32 or better for a finite difference, got {', '.join(sorted(low))}"
        )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
