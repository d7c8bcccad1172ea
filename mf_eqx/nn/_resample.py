r"""Halving and doubling images or sequences with the low-pass (1, 3, 3, 1).

The separable filter of the DDPM++ network: depthwise, (1, 3, 3, 1) / 8 along each side, zeros outside. Written as sums
of strided slices, which XLA fuses with the surrounding operations.

Source: Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021, arXiv 2011.13456.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def downsample(x: Float[Array, "channels *sides"]) -> Float[Array, "channels *halves"]:
    r"""The image, or sequence, at half of its size: along each side
    $y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8$.

    **Raises:** `ValueError` unless all sides are even.
    """
    if any(side % 2 for side in x.shape[1:]):
        raise ValueError(f"sides must be even, got {x.shape[1:]}")
    return _along_each_side(_halved, x)


def upsample(x: Float[Array, "channels *sides"]) -> Float[Array, "channels *doubles"]:
    r"""The image, or sequence, at twice its size, the transpose of `downsample` times 2 for each side: along each side
    $y_{2i} = (3 x_i + x_{i-1}) / 4$ and $y_{2i+1} = (3 x_i + x_{i+1}) / 4$."""
    return _along_each_side(_doubled, x)


def _along_each_side(function: Callable[[Array], Array], x: Float[Array, "channels *sides"]) -> Array:
    """`function`, which acts on the last axis, along one side after the other."""
    for axis in range(1, x.ndim):
        x = jnp.swapaxes(function(jnp.swapaxes(x, axis, -1)), axis, -1)
    return x


def _padded(x: Float[Array, "*rows side"]) -> Float[Array, "*rows side+2"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)])


def _halved(x: Float[Array, "*rows side"]) -> Float[Array, "*rows side/2"]:
    padded = _padded(x)
    odd, even = padded[..., ::2], padded[..., 1::2]
    return (odd[..., :-1] + 3 * (even[..., :-1] + odd[..., 1:]) + even[..., 1:]) / 8


def _doubled(x: Float[Array, "*rows side"]) -> Float[Array, "*rows 2*side"]:
    padded = _padded(x)
    pairs = jnp.stack([3 * x + padded[..., :-2], 3 * x + padded[..., 2:]], axis=-1) / 4
    return pairs.reshape(*x.shape[:-1], 2 * x.shape[-1])
