r"""Attention, as an object of the network, in forms that support forward mode.

Fused kernels (cuDNN, Pallas) are `jax.custom_vjp` functions: they are fast and never hold the matrix of weights, but do
not support forward mode. MeanFlow needs forward mode, but only for du/dt, through which no gradient passes. So a field
holds its attention as an object, and an engine of `mf_eqx` replaces it by `attention.forward_mode()` while it
differentiates:

    softmax attention in XLA    itself
    PallasAttention             kernels of its own for value and tangent
    another fused kernel        its value and backward pass by the kernel, its tangent by the formula

with $S = s q k^\top$, $P = \mathrm{softmax}(S)$, $o = P v$:

$$\dot S = s (\dot q k^\top + q \dot k^\top), \qquad \dot P = P \odot (\dot S - (P \odot \dot S) 1 1^\top), \qquad
\dot o = \dot P v + P \dot v.$$

All other evaluations of the field keep the plain kernel.
"""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._validate import check_counts
from ._linear import Linear
from ._norm import RMSNorm


class AbstractAttention(eqx.Module):
    r"""softmax(q k^T / sqrt(size)) v in every head. It has no parameters. Subclass it to use a kernel of your own."""

    @abc.abstractmethod
    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        """The weighted means of the values, in the dtype of `value`."""

    @abc.abstractmethod
    def forward_mode(self) -> "AbstractAttention":
        """The same attention in a form that supports forward mode: itself, a form of its own (`PallasAttention`), or,
        for any other kernel that is a `jax.custom_vjp`, a `StoppedTangent` of itself."""


class XLAAttention(AbstractAttention):
    """Two products and a softmax, compiled by XLA: any precision, any device, forward and reverse mode.

    (`jax.nn.dot_product_attention` compiles to the same, but computes the softmax in float32 for all inputs, so that a
    float64 field would have derivatives of float32 accuracy.)
    """

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        return _mix(_weights(query, key), value)

    def forward_mode(self) -> AbstractAttention:
        return self


class CudnnAttention(AbstractAttention):
    """cuDNN's fused attention, forwards and backwards, for bfloat16 (or float16) on NVIDIA GPUs.

    On an H200, in bfloat16 at batch 256, a Flow Matching step of a DiT with 256 tokens takes 0.77 of the time (B/2) or
    0.88 (XL/2); with 64 tokens (B/4) it takes 0.96, and a MeanFlow step as long as with `XLAAttention`. The tangent of
    this attention is XLA's, which holds the matrix of weights.

    Whether a program can have it depends on the platform that it is lowered for, not on the device of this machine: JAX
    lowers it for CUDA alone.

    **Raises** (when called): `ValueError` for another dtype, or if JAX finds no cuDNN, whose version it asks for while
    tracing.
    """

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        if value.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"cuDNN attention must be given bfloat16 or float16 (dtype of the field), got {value.dtype}"
            )
        try:
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        except RuntimeError as error:
            if "cuDNN is not detected" not in str(error):
                raise
            backend = jax.default_backend()
            raise ValueError(f"cuDNN attention must run on an NVIDIA GPU, got {backend}: use XLAAttention") from error

    def forward_mode(self) -> AbstractAttention:
        return StoppedTangent(self)


class StoppedTangent(AbstractAttention):
    """Attention with value and gradient by `kernel`, and with a tangent by the formula of the module's docstring, in
    which queries, keys and values are constants.

    So a gradient through the tangent would be incomplete. Engines, which use this class, ensure that a gradient through
    du/dt raises instead. (If queries, keys and values do not depend on the variables of the JVP, reverse mode
    transposes the formula instead of using the kernel's backward pass. That gradient is complete.)

    **Arguments:** `kernel` an attention that does not support forward mode.
    """

    kernel: AbstractAttention

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        attention = jax.custom_jvp(self.kernel)
        attention.defjvp(lambda primals, tangents: (self.kernel(*primals), _tangent(primals, tangents)))
        return attention(query, key, value)

    def forward_mode(self) -> AbstractAttention:
        return self


def _logits(
    query: Float[Array, "queries heads size"], key: Float[Array, "keys heads size"]
) -> Float[Array, "heads queries keys"]:
    wide = np.promote_types(query.dtype, np.float32)
    return jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=wide) * query.shape[-1] ** -0.5


def _weights(
    query: Float[Array, "queries heads size"], key: Float[Array, "keys heads size"]
) -> Float[Array, "heads queries keys"]:
    return _softmax(_logits(query, key)).astype(query.dtype)


@jax.custom_jvp
def _softmax(logits: Float[Array, "heads queries keys"]) -> Float[Array, "heads queries keys"]:
    """Softmax over the keys. Its rule keeps only the result for the backward pass; JAX's own rule also keeps the
    exponentials and their sums."""
    return jax.nn.softmax(logits, axis=-1)


@_softmax.defjvp
def _softmax_jvp(
    primals: tuple[Float[Array, "heads queries keys"]], tangents: tuple[Float[Array, "heads queries keys"]]
) -> tuple[Float[Array, "heads queries keys"], Float[Array, "heads queries keys"]]:
    weights = _softmax(*primals)
    change = weights * tangents[0]
    return weights, change - weights * jnp.sum(change, axis=-1, keepdims=True)


def _mix(
    weights: Float[Array, "heads queries keys"], value: Float[Array, "keys heads size"]
) -> Float[Array, "queries heads size"]:
    return jnp.einsum("hqk,khd->qhd", weights, value)


def _tangent(
    primals: Sequence[Float[Array, "tokens heads size"]], tangents: Sequence[Float[Array, "tokens heads size"]]
) -> Float[Array, "tokens heads size"]:
    """The tangent by the formula of the module's docstring, with constant primals."""
    query, key, value = map(jax.lax.stop_gradient, primals)
    dquery, dkey, dvalue = tangents
    weights = jax.nn.softmax(_logits(query, key), axis=-1)
    dlogits = _logits(dquery, key) + _logits(query, dkey)
    dweights = weights * (dlogits - jnp.sum(weights * dlogits, axis=-1, keepdims=True))
    return _mix(dweights.astype(value.dtype), value) + _mix(weights.astype(value.dtype), dvalue)


class SelfAttention(eqx.Module):
    """Multi-head self-attention with one joint qkv matrix and a bias. Its output is multiplied by a `gate`, if given.

    **Arguments:** `width` of the tokens, a multiple of `heads`; `qk_norm` whether queries and keys of every head are
    normalised by an `RMSNorm` each, which bounds the logits (Scaling Vision Transformers to 22 Billion Parameters,
    Dehghani et al., 2023, arXiv 2302.05442); `attention` an `AbstractAttention`; `key`.

    **Raises:** `ValueError` unless `width` and `heads` are >= 1 and `heads` divides `width`.
    """

    qkv: Linear
    out: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    attention: AbstractAttention
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        attention: AbstractAttention = XLAAttention(),
        key: Key[Array, ""],
    ):
        size = head_size(width, heads)
        qkv_key, out_key = jr.split(key)
        self.qkv = Linear(width, 3 * width, key=qkv_key)
        self.out = Linear(width, width, key=out_key)
        self.query_norm, self.key_norm = (RMSNorm(size) if qk_norm else None for _ in range(2))
        self.attention = attention
        self.heads = heads

    def __call__(
        self, x: Float[Array, "tokens width"], gate: Float[Array, " width"] | None = None
    ) -> Float[Array, "tokens width"]:
        tokens, width = x.shape
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        query, key, value = (part.reshape(tokens, self.heads, width // self.heads) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return self.out(self.attention(query, key, value).reshape(tokens, width), gate)


def head_size(width: int, heads: int) -> int:
    """The size of each of `heads` heads over `width`. **Raises:** `ValueError` unless `width` and `heads` are >= 1 and
    `heads` divides `width`."""
    check_counts(width=width)
    if heads < 1 or width % heads:
        raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
    return width // heads
