"""The blocks of an in-context DiT, and the head in which they end.

A block has no modulation: the condition and the times are tokens among the others.

    x = x + gate_1 * attention(norm_1(x))     rotary positions over the whole sequence; normalised queries and keys
    x = x + gate_2 * mlp(norm_2(x))           SwiGLU

The gates and the last layer of a head start at zero.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import variance_scaling, zeros
from jaxtyping import Array, Float, Key

from ..nn import AbstractAttention, Linear, Remat, RMSNorm, RotarySelfAttention, Stack, SwiGLU
from .in_context_size import InContextDiTSize

_INIT = variance_scaling(0.32**2, "fan_in", "normal")
"""How the matrices of blocks start: normal with standard deviation 0.32 / sqrt(fan in)."""


class InContextBlock(eqx.Module):
    """A block without modulation. Its equations are in the module's docstring."""

    norm_1: RMSNorm
    attention: RotarySelfAttention
    gate_1: Float[Array, " width"]
    norm_2: RMSNorm
    mlp: SwiGLU
    gate_2: Float[Array, " width"]

    def __init__(self, size: InContextDiTSize, attention: AbstractAttention, *, key: Key[Array, ""]):
        attention_key, mlp_key = jr.split(key)
        width = size.width
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.attention = RotarySelfAttention(width, size.heads, init=_INIT, attention=attention, key=attention_key)
        self.mlp = SwiGLU(width, 8 * width // 3 if size.mlp is None else size.mlp, init=_INIT, key=mlp_key)
        self.gate_1, self.gate_2 = jnp.zeros(width, jnp.float32), jnp.zeros(width, jnp.float32)

    def __call__(
        self, x: Float[Array, "tokens width"], angles: Float[np.ndarray, "tokens pairs"]
    ) -> Float[Array, "tokens width"]:
        x = x + self.attention(self.norm_1(x), angles, self.gate_1)
        return x + self.mlp(self.norm_2(x), self.gate_2)


class InContextHead(eqx.Module):
    """The blocks and the layer that turn the tokens of the trunk into the `values` of each patch.

    `make_stack(depth, key=key)` makes blocks.
    """

    stack: Stack[InContextBlock]
    norm: RMSNorm
    out: Linear

    def __init__(
        self,
        size: InContextDiTSize,
        values: int,
        make_stack: Callable[..., Stack[InContextBlock]],
        *,
        key: Key[Array, ""],
    ):
        self.stack = make_stack(size.head_depth, key=key)
        self.norm, self.out = RMSNorm(size.width), Linear(size.width, values, init=zeros, key=key)


def stack_blocks(
    depth: int,
    *,
    size: InContextDiTSize,
    attention: AbstractAttention,
    remat: Remat,
    unroll: int | bool,
    key: Key[Array, ""],
) -> Stack[InContextBlock]:
    """`depth` blocks of one size, as the trunk and the heads have them."""

    def block(key: Key[Array, ""]) -> InContextBlock:
        return InContextBlock(size, attention, key=key)

    return Stack(block, depth, remat=remat, unroll=unroll, key=key)
