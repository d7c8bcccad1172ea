"""Normalisation layers: layer norm without parameters, alone or modulated by a condition (adaLN); RMS norm with a
learned scale; group norm."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import at_least_float32
from .._validate import check_counts, check_positive


def layer_norm(x: Float[Array, "*rows width"], *, epsilon: float = 1e-6) -> Float[Array, "*rows width"]:
    """Layer normalisation over the last axis, without scale and shift; statistics in float32 or better."""
    wide = at_least_float32(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def modulate(
    x: Float[Array, "*rows width"], shift: Float[Array, " width"], scale: Float[Array, " width"]
) -> Float[Array, "*rows width"]:
    """The second half of adaptive layer norm, (1 + scale) x + shift (Peebles and Xie 2023, arXiv 2212.09748)."""
    return (1 + scale) * x + shift


@jax.checkpoint
def modulated_norm(
    x: Float[Array, "*rows width"], shift: Float[Array, " width"], scale: Float[Array, " width"]
) -> Float[Array, "*rows width"]:
    """`modulate(layer_norm(x), shift, scale)`, of which only the arguments are kept for the backward pass.

    To write and read the intermediate results takes longer than to compute them again.
    """
    return modulate(layer_norm(x), shift, scale)


@functools.partial(jax.checkpoint, static_argnums=2)
def _rms_norm(
    x: Float[Array, "*rows size"], weight: Float[Array, " size"], epsilon: float
) -> Float[Array, "*rows size"]:
    """As in `RMSNorm`. For the backward pass only the arguments are kept."""
    wide = at_least_float32(x)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * at_least_float32(weight)).astype(x.dtype)


class RMSNorm(eqx.Module):
    r"""Normalisation by the root mean square over the last axis, $w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$, in
    float32 or better. The scale w starts at one.

    It is `eqx.nn.RMSNorm(size, eps=epsilon, use_bias=False)` for any number of leading axes.

    **Arguments:** `size` of the last axis; `epsilon`.

    **Raises:** `ValueError` unless `size` is >= 1, and `epsilon` > 0 and finite.

    **Reference:** Root Mean Square Layer Normalization, Zhang, Sennrich, 2019, arXiv 1910.07467.
    """

    weight: Float[Array, " size"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, size: int, *, epsilon: float = 1e-6):
        check_counts(size=size)
        check_positive("epsilon", epsilon)
        self.weight = jnp.ones(size, jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return _rms_norm(x, self.weight, self.epsilon)


def per_channel(
    values: Float[Array, " channels"], x: Float[Array, "channels *sides"]
) -> Float[Array, "channels *ones"]:
    """One value for each channel of an image or sequence, as it broadcasts over the sides."""
    return jnp.expand_dims(values, range(1, x.ndim))


class GroupNorm(eqx.Module):
    r"""Group normalisation of an image or sequence, $w_c (x - \mu_g) / \sqrt{\sigma_g^2 + \epsilon} + b_c$, with mean
    and variance over all places of a group of channels; statistics in float32 or better.

    It computes the same as `eqx.nn.GroupNorm(groups, channels, eps=epsilon)`, with half of its operations and half of
    its compile time.

    **Arguments:** `groups` number of groups; `channels` number of channels, a multiple of `groups`; `epsilon`.

    **Raises:** `ValueError` unless both are >= 1 and `channels` is a multiple of `groups`.

    **Reference:** Group Normalization, Wu, He, 2018, arXiv 1803.08494.
    """

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, groups: int, channels: int, *, epsilon: float = 1e-6):
        check_counts(channels=channels)
        check_positive("epsilon", epsilon)
        if groups < 1 or channels % groups:
            raise ValueError(f"channels must be a multiple of groups, got {channels} channels and {groups} groups")
        self.weight, self.bias = jnp.ones(channels, jnp.float32), jnp.zeros(channels, jnp.float32)
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: Float[Array, "channels *sides"]) -> Float[Array, "channels *sides"]:
        wide = at_least_float32(x).reshape(self.groups, -1)
        normal = layer_norm(wide, epsilon=self.epsilon).reshape(x.shape)
        weight, bias = (per_channel(at_least_float32(leaf), x) for leaf in (self.weight, self.bias))
        return (normal * weight + bias).astype(x.dtype)
