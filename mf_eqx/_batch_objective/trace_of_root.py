r"""The trace of the root of a product of covariances, differentiable, in float64 where the device has it.

With a factor $\Sigma_* = F F^T$,

$$\mathrm{tr}\,(\Sigma \Sigma_*)^{1/2} = \sum_k \sqrt{\lambda_k}, \qquad
\frac{d}{d\Sigma} = \tfrac12 F\, V \lambda^{-1/2} V^T F^T, \qquad F^T \Sigma F = V \lambda V^T.$$

The eigenvalues are those of a product of two covariances, so that small ones need twice the digits: they are computed
in float64 even where all else is in float32 (but on TPUs, which have none).
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .population import product

_WITHOUT_FLOAT64 = ("tpu",)
"""Backends that cannot compute eigenvalues in float64."""


@jax.custom_vjp
def trace_of_root(
    covariance: Float[Array, "features features"], factor: Float[Array, "features rank"]
) -> Float[Array, ""]:
    r"""$\mathrm{tr}\,(\Sigma F F^T)^{1/2}$, with a gradient with respect to $\Sigma$ alone.

    Eigenvalues that are not above the rounding error of the largest count as 0, in the value and in the gradient: the
    root has an infinite slope there.

    **Arguments:** `covariance` $\Sigma$, symmetric; `factor` F.
    """
    return root_and_slope(covariance, factor)[0]


def root_and_slope(
    covariance: Float[Array, "features features"], factor: Float[Array, "features rank"]
) -> tuple[Float[Array, ""], Float[Array, "features features"]]:
    """The value of `trace_of_root`, and its gradient with respect to the covariance."""
    dtype, has_float64 = covariance.dtype, jax.default_backend() not in _WITHOUT_FLOAT64
    with jax.enable_x64(True) if has_float64 else contextlib.nullcontext():
        wide = jnp.float64 if has_float64 else dtype
        wide_factor = factor.astype(wide)
        values, vectors = jnp.linalg.eigh(product(wide_factor.T, product(covariance.astype(wide), wide_factor)))
        is_positive = ~(values <= len(values) * jnp.finfo(wide).eps * values[-1])  # NaN counts, and is seen
        root = jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, values, 1)), 0)
        inverse = jnp.where(is_positive, 1 / jnp.where(is_positive, root, 1), 0)
        half = product(wide_factor, vectors)
        return jnp.sum(root).astype(dtype), (product(half * inverse, half.T) / 2).astype(dtype)


def _backward(
    gradient: Float[Array, "features features"], cotangent: Float[Array, ""]
) -> tuple[Float[Array, "features features"], None]:
    return cotangent * gradient, None


trace_of_root.defvjp(root_and_slope, _backward)
