r"""Halving and doubling images with the low-pass (1, 3, 3, 1).

The separable filter of the DDPM++ network: depthwise, the outer product of (1, 3, 3, 1) / 8 with itself, zeros outside
of the image. Written as sums of strided slices, which XLA fuses with the surrounding operations.

Source: Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021, arXiv 2011.13456.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def downsample(x: Float[Array, "channels height width"]) -> Float[Array, "channels height/2 width/2"]:
    r"""The image at half of its size: along each axis $y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8$.

    **Raises:** `ValueError` unless height and width are even.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"height and width must be even, got {x.shape[1]} and {x.shape[2]}")
    return _halved(_halved(x.mT).mT)


def upsample(x: Float[Array, "channels height width"]) -> Float[Array, "channels 2*height 2*width"]:
    r"""The image at twice its size, the transpose of `downsample` times 4: along each axis
    $y_{2i} = (3 x_i + x_{i-1}) / 4$ and $y_{2i+1} = (3 x_i + x_{i+1}) / 4$."""
    return _doubled(_doubled(x.mT).mT)


def _halved(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows columns/2"]:
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1)))
    odd, even = padded[..., ::2], padded[..., 1::2]
    return (odd[..., :-1] + 3 * (even[..., :-1] + odd[..., 1:]) + even[..., 1:]) / 8


def _doubled(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows 2*columns"]:
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1)))
    pairs = jnp.stack([3 * x + padded[..., :-2], 3 * x + padded[..., 2:]], axis=-1) / 4
    return pairs.reshape(*x.shape[:-1], 2 * x.shape[-1])
