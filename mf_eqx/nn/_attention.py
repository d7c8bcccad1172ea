r"""Attention, as an object of the network, in forms that a JVP passes.

Fused kernels (cuDNN, Pallas) are `jax.custom_vjp` functions: fast, never holding the matrix of weights, and refusing
forward mode. MeanFlow needs forward mode, but only for du/dt, which nothing learns through. So a field carries its
attention as an object, and an engine of `mf_eqx` puts `attention.forward_mode()` in its place while it differentiates:

    softmax attention in XLA    itself
    a fused kernel              a pair: the value by the kernel, with the kernel's backward pass; the tangent by formula

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

from .._validate import check_sizes
from ._linear import Linear


class AbstractAttention(eqx.Module):
    r"""softmax(q k^T / sqrt(size)) v in every head. Has no parameters; subclass it to bring a kernel of your own."""

    @abc.abstractmethod
    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        """The mixed values, of the dtype of `value`."""

    @abc.abstractmethod
    def forward_mode(self) -> "AbstractAttention":
        """The same attention in a form that a JVP passes: itself, or a `StoppedTangent` of itself for a kernel that is
        a `jax.custom_vjp`."""


class XLAAttention(AbstractAttention):
    """Two products and a softmax, as XLA compiles them: any precision, any device, forward and reverse mode.

    (`jax.nn.dot_product_attention` compiles to the same, but takes the softmax in float32 whatever the inputs, which
    would leave a float64 field with float32 derivatives.)
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

    **Raises** (when called): `ValueError` for another precision, or on a machine without such a GPU.
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
        if jax.default_backend() != "gpu":
            raise ValueError(
                f"cuDNN attention must run on an NVIDIA GPU, got {jax.default_backend()}: use XLAAttention"
            )
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")

    def forward_mode(self) -> AbstractAttention:
        return StoppedTangent(self)


class StoppedTangent(AbstractAttention):
    """A pair: value and gradient by `kernel`, tangent by formula, in which queries, keys and values are constants.

    So a gradient through the tangent would be incomplete. Engines use the pair, and see to it that a gradient through
    du/dt raises instead. (Where nothing that forward mode moves reaches it, its gradient is the formula's transpose.)

    **Arguments:** `kernel` the attention that forward mode cannot pass.
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
    """Over the keys. The rule keeps only the result for the backward pass; JAX's own default keeps the exponentials
    and their sums too."""
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
    """The formula of the module's docstring, at constant primals."""
    query, key, value = map(jax.lax.stop_gradient, primals)
    dquery, dkey, dvalue = tangents
    weights = jax.nn.softmax(_logits(query, key), axis=-1)
    dlogits = _logits(dquery, key) + _logits(query, dkey)
    dweights = weights * (dlogits - jnp.sum(weights * dlogits, axis=-1, keepdims=True))
    return _mix(dweights.astype(value.dtype), value) + _mix(weights.astype(value.dtype), dvalue)


class SelfAttention(eqx.Module):
    """Multi-head self-attention with one joint qkv matrix and a bias; its output times a `gate`, if one is given.

    **Arguments:** `width` of the tokens, a multiple of `heads`; `attention` how queries meet keys; `key`.

    **Raises:** `ValueError` unless both are >= 1 and `width` is such a multiple.
    """

    qkv: Linear
    out: Linear
    attention: AbstractAttention
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, attention: AbstractAttention = XLAAttention(), key: Key[Array, ""]):
        check_sizes(width=width)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        qkv_key, out_key = jr.split(key)
        self.qkv = Linear(width, 3 * width, key=qkv_key)
        self.out = Linear(width, width, key=out_key)
        self.attention = attention
        self.heads = heads

    def __call__(
        self, x: Float[Array, "tokens width"], gate: Float[Array, " width"] | None = None
    ) -> Float[Array, "tokens width"]:
        tokens, width = x.shape
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        mixed = self.attention(*(part.reshape(tokens, self.heads, width // self.heads) for part in parts))
        return self.out(mixed.reshape(tokens, width), gate)
