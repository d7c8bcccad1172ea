"""Losses whose steps have bounded length ("tangent normalisation" in arXiv 2410.11081)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar, ScalarLike


def unit_step_loss(
    residual: Float[Array, "*data"], offset: float, *, factor: ScalarLike = 1.0, root_mean_square: bool = False
) -> Scalar:
    r"""The loss $\mathrm{sg}(s / (|s \Delta| + c))\, |\Delta|^2$ of a residual $\Delta$.

    With $g = s \Delta$, its gradient is $2 g / (|g| + c)$, so that a step of gradient descent on u has a bounded
    length.

    **Arguments:** `residual`; `offset` c; `factor` s; `root_mean_square` whether $|\cdot|^2$ is the mean of squares
    over dimensions rather than their sum, in the norm and in the loss.
    """
    error = jnp.mean(residual**2) if root_mean_square else jnp.sum(residual**2)
    scale = jnp.asarray(factor, error.dtype)
    return jax.lax.stop_gradient(scale / (scale * jnp.sqrt(error) + offset)) * error


def root_loss(u: Float[Array, "*data"], way: Float[Array, "*data"], offset: float) -> Scalar:
    r"""The loss $e / \sqrt{\mathrm{sg}(e) + c}$ with e the mean of squares over dimensions of `way`.

    **Arguments:** `u` the only value through which a gradient passes; `way` from its target to it; `offset` c.
    """
    error = jnp.mean((u - jax.lax.stop_gradient(u - way)) ** 2)
    return error / jnp.sqrt(jax.lax.stop_gradient(error) + offset)
