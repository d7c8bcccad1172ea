r"""Types shared by the whole package, and its symbols.

Time runs from data (t = 0) to noise (t = 1); always r <= t. Everything is per example: `*data` never has a batch axis.

| code | paper | meaning |
|---|---|---|
| `x` | $x$ | data |
| `eps` | $\epsilon$ | noise, standard normal |
| `z` | $z_t$ | state on the path, $z_t = \alpha_t x + \sigma_t \epsilon$ (the paper's $a_t$, $b_t$) |
| `r`, `t` | $r$, $t$ | start and end of the interval over which the velocity is averaged |
| `v` | $v$ | instantaneous velocity; conditional ($\dot\alpha_t x + \dot\sigma_t \epsilon$) unless stated otherwise |
| `u` | $u$ | average velocity over [r, t] |
| `dudt` | $du/dt$ | total derivative of u along the trajectory |
| `condition` | $c$ | what the field is conditioned on: a PyTree, often a label |
| `scale`, `mix` | $\omega$, $\kappa$ | guidance |
| `power`, `offset` | $p$, $c$ | adaptive weight |

Source: Mean Flows for One-step Generative Modeling, Geng, Deng, Bai, Kolter, He, 2025, arXiv 2505.13447. In the whole
package, numbers of equations, tables and sections without a source are those of this paper.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Integer, PyTree, Real

Scalar: TypeAlias = Float[Array, ""]
Time: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = Real[ArrayLike, ""]
TimeLike: TypeAlias = Real[ArrayLike, ""]
"""A time as public functions accept it: an array of shape (), or a Python or NumPy number."""
Label: TypeAlias = Integer[ArrayLike, ""]
Condition: TypeAlias = PyTree[Any]
"""A PyTree of arrays without batch axis (an integer label, an embedding), or None."""


def at_least_float32(x: Inexact[Array, "*any"] | Inexact[np.ndarray, "*any"]) -> Inexact[Array, "*any"]:
    """`x` in float32 or better. Times, targets, losses and averages never go below: in bfloat16, 1 + 1e-3 == 1."""
    return jnp.asarray(x, np.promote_types(x.dtype, np.float32))


def as_floats(name: str, values: Any) -> Inexact[Array, "*any"]:
    """`values` as a floating-point array: integers and bools become JAX's default float, other dtypes stay.

    **Raises:** `ValueError` with the `name` of the argument unless they are numbers.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.dtype.itemsize > 4:
        values = values.astype(np.float64)  # JAX would take it for an int32 first
    try:
        array = jnp.asarray(values)
        return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(float)
    except (TypeError, ValueError, NotImplementedError) as error:  # the last one for keys
        raise ValueError(f"{name} must be an array of numbers, got {values!r:.100}") from error


def as_scalar(
    name: str, number: ScalarLike, like: Inexact[Array | np.ndarray, "..."] | None = None
) -> Float[Array, ""]:
    """`number` as a floating-point array of shape (), by JAX's promotion rules: an array keeps its precision; a Python
    number takes the precision of `like` or, without `like`, stays weakly typed and takes that of the arrays it is
    combined with.

    **Arguments:** `name` of the argument, for the message; `number`; `like` an array that the result is used with,
    whose precision counts as at least float32.

    **Raises:** `ValueError` unless its shape is ().
    """
    if np.shape(number) != ():
        raise ValueError(
            f"{name} must be one number of shape (), got shape {np.shape(number)} (functions are per example: jax.vmap "
            "makes batches)"
        )
    if isinstance(number, jax.Array) and jnp.issubdtype(number.dtype, jnp.floating) and not number.weak_type:
        return number
    if like is None:
        array = jnp.asarray(number)
        return array if jnp.issubdtype(array.dtype, jnp.floating) else array + 0.0
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(number, jnp.result_type(number, like, jnp.float32))


def as_times(r: TimeLike, t: TimeLike, like: Inexact[Array | np.ndarray, "..."] | None = None) -> tuple[Time, Time]:
    """The pair `(r, t)` as floating-point arrays, see `as_scalar`."""
    return as_scalar("r", r, like), as_scalar("t", t, like)
