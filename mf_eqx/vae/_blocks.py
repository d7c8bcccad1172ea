"""Parts of the encoder and decoder: residual blocks, attention over all positions, levels of one resolution.

Convolutions are initialized as Equinox does it by default, which is also the default of torch and of the paper's code.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from ..nn import SelfAttention

# As in diffusers; the default of Equinox is 1e-5.
_EPSILON = 1e-6


def conv(in_width: int, width: int, kernel: int = 3, *, key: Key[Array, ""]) -> eqx.nn.Conv2d:
    """A convolution that keeps height and width; `kernel` must be odd."""
    return eqx.nn.Conv2d(in_width, width, kernel, padding=kernel // 2, dtype=jnp.float32, key=key)


def norm(width: int, groups: int) -> eqx.nn.GroupNorm:
    """Group normalisation, with statistics in float32 or better for every dtype of the input."""
    return eqx.nn.GroupNorm(groups, width, eps=_EPSILON, dtype=jnp.float32)


class ResidualBlock(eqx.Module):
    """Norm, SiLU and 3x3 convolution, applied twice and added to the input. If the width changes, the input first goes
    through a 1x1 convolution."""

    norm1: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d | None

    def __init__(self, in_width: int, width: int, groups: int, *, key: Key[Array, ""]):
        key1, key2, shortcut_key = jr.split(key, 3)
        self.norm1 = norm(in_width, groups)
        self.conv1 = conv(in_width, width, key=key1)
        self.norm2 = norm(width, groups)
        self.conv2 = conv(width, width, key=key2)
        self.shortcut = None if in_width == width else conv(in_width, width, kernel=1, key=shortcut_key)

    def __call__(self, x: Float[Array, "in_width height width"]) -> Float[Array, "out_width height width"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(eqx.Module):
    """Norm and self-attention with one head over all positions, added to the input. The matrix of attention weights has
    (height x width)^2 entries: 4 MB in float32 for 1024 positions, as for an image of 256 x 256 pixels."""

    group_norm: eqx.nn.GroupNorm
    attention: SelfAttention

    def __init__(self, width: int, groups: int, *, key: Key[Array, ""]):
        self.group_norm = norm(width, groups)
        self.attention = SelfAttention(width, 1, key=key)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1).T
        return x + self.attention(tokens).T.reshape(x.shape)


class Middle(eqx.Module):
    """The lowest resolution of encoder and decoder: a residual block, attention, a residual block."""

    blocks: tuple[ResidualBlock, ResidualBlock]
    mixer: AttentionBlock

    def __init__(self, width: int, groups: int, *, key: Key[Array, ""]):
        before, mixer, after = jr.split(key, 3)
        self.blocks = (ResidualBlock(width, width, groups, key=before), ResidualBlock(width, width, groups, key=after))
        self.mixer = AttentionBlock(width, groups, key=mixer)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        before, after = self.blocks
        return after(self.mixer(before(x)))


class DownLevel(eqx.Module):
    """Residual blocks at one resolution and, with `shrink`, a convolution of stride 2 to the next lower resolution.

    The input of this convolution is padded with one row and one column of zeros, only after the last row and column.
    """

    blocks: tuple[ResidualBlock, ...]
    shrink: eqx.nn.Conv2d | None

    def __init__(self, in_width: int, width: int, count: int, groups: int, *, shrink: bool, key: Key[Array, ""]):
        blocks_key, shrink_key = jr.split(key)
        self.blocks = residual_blocks(in_width, width, count, groups, key=blocks_key)
        after = ((0, 1), (0, 1))
        self.shrink = (
            eqx.nn.Conv2d(width, width, 3, stride=2, padding=after, dtype=jnp.float32, key=shrink_key)
            if shrink
            else None
        )

    def __call__(self, x: Float[Array, "in_width height width"]) -> Float[Array, "out_width lower narrower"]:
        for block in self.blocks:
            x = block(x)
        return x if self.shrink is None else self.shrink(x)


class UpLevel(eqx.Module):
    """Residual blocks at one resolution and, with `enlarge`, a convolution after every pixel is repeated to 2 x 2."""

    blocks: tuple[ResidualBlock, ...]
    enlarge: eqx.nn.Conv2d | None

    def __init__(self, in_width: int, width: int, count: int, groups: int, *, enlarge: bool, key: Key[Array, ""]):
        blocks_key, enlarge_key = jr.split(key)
        self.blocks = residual_blocks(in_width, width, count, groups, key=blocks_key)
        self.enlarge = conv(width, width, key=enlarge_key) if enlarge else None

    def __call__(self, x: Float[Array, "in_width height width"]) -> Float[Array, "out_width higher wider"]:
        for block in self.blocks:
            x = block(x)
        return x if self.enlarge is None else self.enlarge(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def residual_blocks(
    in_width: int, width: int, count: int, groups: int, *, key: Key[Array, ""]
) -> tuple[ResidualBlock, ...]:
    """`count` residual blocks, of which the first changes the width."""
    widths = (in_width, *(count - 1) * (width,))
    return tuple(
        ResidualBlock(before, width, groups, key=key) for before, key in zip(widths, jr.split(key, count), strict=True)
    )
