"""Self-attention that forward mode can pass.

Fused kernels (cuDNN, Pallas) are `jax.custom_vjp` functions and refuse a JVP when lowered, so attention here is XLA's
own: two products and a softmax. (`jax.nn.dot_product_attention` compiles to the same, but takes the softmax in float32
whatever the inputs, which would leave a float64 field with float32 derivatives.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from ._linear import Linear


class SelfAttention(eqx.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v, with one joint qkv matrix and a bias.

    **Arguments:** `width` of the tokens, a multiple of `heads`; `key`.
    """

    qkv: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: Key[Array, ""]):
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        qkv_key, out_key = jr.split(key)
        self.qkv = Linear(width, 3 * width, key=qkv_key)
        self.out = Linear(width, width, key=out_key)
        self.heads = heads

    def __call__(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        tokens, width = x.shape
        query, key, value = (
            part.reshape(tokens, self.heads, width // self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=wide)
        weights = jax.nn.softmax(logits * (width // self.heads) ** -0.5, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("hqk,khd->qhd", weights, value)
        return self.out(mixed.reshape(tokens, width))
