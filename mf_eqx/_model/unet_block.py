"""The residual block of a U-Net, and the layers of which it is made.

    h   = conv(silu(norm(x)))                 resampled before conv if the resolution changes
    h   = conv(dropout(silu(norm(h + linear(c)))))
    x   = (skip(x) + h) / sqrt(2)
    x   = (x + attention(norm(x))) / sqrt(2)  in blocks with attention

Here c is the embedding on which the block is conditioned. The skip is a convolution of one position where channels or
resolution change, else the identity.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import Initializer, variance_scaling
from jaxtyping import Array, Float, Key

from ..nn import AbstractAttention, downsample, GroupNorm, Linear, SelfAttention, upsample
from ..nn._norm import per_channel
from .unet_size import BlockPlan


def xavier_uniform(scale: float = 1.0, *, out_axis: int = -1, in_axis: int = -2) -> Initializer:
    """Xavier-uniform numbers times `scale`."""
    return variance_scaling(scale**2, "fan_avg", "uniform", in_axis=in_axis, out_axis=out_axis)


def make_convolution(
    sides: int, inputs: int, outputs: int, kernel: int, *, scale: float = 1.0, key: Key[Array, ""]
) -> eqx.nn.Conv:
    """A convolution over `sides` axes that keeps their sizes. Fan-in and fan-out include the kernel's positions; the
    bias is zero."""
    # Only its shapes, since the numbers that it would draw itself are not used.
    convolution = eqx.filter_eval_shape(eqx.nn.Conv, sides, inputs, outputs, kernel, padding=kernel // 2, key=key)
    weight = xavier_uniform(scale, in_axis=1, out_axis=0)(key, (outputs, inputs, *[kernel] * sides), jnp.float32)
    bias = jnp.zeros((outputs, *[1] * sides), jnp.float32)
    return eqx.tree_at(lambda c: (c.weight, c.bias), convolution, (weight, bias))


def make_group_norm(channels: int) -> GroupNorm:
    """Groups of at least four channels, at most 32 of them; statistics in float32."""
    groups = min(32, channels // 4)
    if channels % groups:
        raise ValueError(f"width must give channels that are multiples of {groups} (group norm), got {channels}")
    return GroupNorm(groups, channels)


ALMOST_ZERO = 1e-5
"""Factor on the initial weights of the last layer of every branch, so that a fresh block hardly changes its input."""
_ROOT_HALF = 0.5**0.5
"""Factor that keeps the variance of a sum of two terms."""


class ResidualAttention(eqx.Module):
    """(x + attention(norm(x))) / sqrt(2), with one head over all channels of every pixel or step."""

    norm: GroupNorm
    attention: SelfAttention

    def __init__(self, channels: int, attention: AbstractAttention, *, key: Key[Array, ""]):
        self.norm = make_group_norm(channels)
        qkv_key, out_key = jr.split(key)
        self.attention = eqx.tree_at(
            lambda attention: (attention.qkv.weight, attention.out.weight),
            SelfAttention(channels, 1, attention=attention, key=key),
            (
                xavier_uniform(0.2**0.5)(qkv_key, (channels, 3 * channels), jnp.float32),
                xavier_uniform(ALMOST_ZERO)(out_key, (channels, channels), jnp.float32),
            ),
        )

    def __call__(self, x: Float[Array, "channels *sides"]) -> Float[Array, "channels *sides"]:
        tokens = self.norm(x).reshape(x.shape[0], -1).T
        return (x + self.attention(tokens).T.reshape(x.shape)) * _ROOT_HALF


class UNetBlock(eqx.Module):
    """A residual block. Its equations are in the module's docstring."""

    norm_1: GroupNorm
    conv_1: eqx.nn.Conv
    condition: Linear
    norm_2: GroupNorm
    conv_2: eqx.nn.Conv
    skip: eqx.nn.Conv | None
    attention: ResidualAttention | None
    plan: BlockPlan = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        plan: BlockPlan,
        sides: int,
        embedded: int,
        dropout: float,
        attention: AbstractAttention,
        *,
        key: Key[Array, ""],
    ):
        inputs, outputs = plan.inputs + plan.down_channels, plan.outputs
        conv_1_key, condition_key, conv_2_key, skip_key, attention_key = jr.split(key, 5)
        self.norm_1 = make_group_norm(inputs)
        self.conv_1 = make_convolution(sides, inputs, outputs, 3, key=conv_1_key)
        self.condition = Linear(embedded, outputs, key=condition_key)
        self.norm_2 = make_group_norm(outputs)
        self.conv_2 = make_convolution(sides, outputs, outputs, 3, scale=ALMOST_ZERO, key=conv_2_key)
        same = inputs == outputs and plan.factor == 1
        self.skip = None if same else make_convolution(sides, inputs, outputs, 1, key=skip_key)
        self.attention = ResidualAttention(outputs, attention, key=attention_key) if plan.attention else None
        self.plan = plan
        self.dropout = float(dropout)

    def __call__(
        self,
        x: Float[Array, "channels *sides"],
        c: Float[Array, " embedded"],
        key: Key[Array, ""] | None,
        from_down: Float[Array, "channels3 *sides"] | None = None,
    ) -> Float[Array, "channels2 *sides2"]:
        x = x if from_down is None else jnp.concatenate([x, from_down])
        h = self.conv_1(self._resampled(jax.nn.silu(self.norm_1(x))))
        h = jax.nn.silu(self.norm_2(h + per_channel(self.condition(c), h)))
        h = self.conv_2(eqx.nn.Dropout(self.dropout)(h, key=key, inference=key is None))
        skip = x if self.skip is None else self.skip(self._resampled(x))
        x = (skip + h) * _ROOT_HALF
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Float[Array, "channels *sides"]) -> Float[Array, "channels *sides2"]:
        return x if self.plan.factor == 1 else downsample(x) if self.plan.factor < 1 else upsample(x)
