"""Normalisation without parameters, and its modulation by a condition (adaLN)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import at_least_float32


def layer_norm(x: Float[Array, "*rows width"], *, epsilon: float = 1e-6) -> Float[Array, "*rows width"]:
    """Layer normalisation over the last axis, without scale and shift; statistics in float32 or better."""
    wide = at_least_float32(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def modulate(
    x: Float[Array, "*rows width"], shift: Float[Array, " width"], scale: Float[Array, " width"]
) -> Float[Array, "*rows width"]:
    """Adaptive layer norm's second half, (1 + scale) x + shift (Peebles and Xie 2023, arXiv 2212.09748)."""
    return (1 + scale) * x + shift


@jax.checkpoint
def modulated_norm(
    x: Float[Array, "*rows width"], shift: Float[Array, " width"], scale: Float[Array, " width"]
) -> Float[Array, "*rows width"]:
    """`modulate(layer_norm(x), shift, scale)`, of which the backward pass keeps nothing but the arguments.

    Writing and reading what lies between takes longer than computing it again.
    """
    return modulate(layer_norm(x), shift, scale)
