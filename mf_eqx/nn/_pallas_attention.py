"""Softmax attention in kernels for NVIDIA GPUs that forward mode can differentiate.

A kernel has no transpose that JAX knows. So there are two forms, as for other fused kernels:

    the attention itself          value and backward pass by kernels, a `jax.custom_vjp`
    its form for forward mode     value and tangent by one kernel, a `jax.custom_jvp` whose value and tangent have
                                  backward passes of their own

In the second form, the gradient of the value is that of the first one. The gradient through the tangent is computed
again from the inputs, by the rules of `ChunkedAttention` in XLA. As the two are separate, a gradient that stops at the
tangent neither stores nor computes anything for it.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._attention import AbstractAttention
from ._chunked_attention import ChunkedAttention

_Rows = Float[Array, "tokens heads size"]
_Logarithms = Float[Array, "heads tokens"]


class Launch(NamedTuple):
    """How kernels are run: the rows of a program, and whether JAX interprets them on any device."""

    rows: int
    interpret: bool


class PallasAttention(AbstractAttention):
    """Softmax attention in Pallas kernels for NVIDIA GPUs: never holds the matrix of weights, in value, tangent,
    gradient, and gradient through the tangent, which is that of `ChunkedAttention`.

    **No GPU has timed it yet**, so that nothing chooses it by default: choose it where you have measured it to be
    faster (`benchmarks/jvp_overhead.py --attention xla cudnn chunked pallas`). It is tested in JAX's interpreter of
    kernels, lowers for CUDA, and was compiled on an H200 as a part of training steps.

    Forward mode works only in the engines of `mf_eqx`, which replace this attention by its `forward_mode()`. JAX
    refuses a gradient of that form if its inputs do not depend on the variables of the JVP.

    The kernels are in Pallas's dialect of Triton (A100 and later), of which JAX 0.12 warns that a future JAX will not
    have it. XLA does not divide them between devices: it gathers the rows of a batch that is spread over several.

    **Arguments:** `block` the number of queries of a program, a power of two from 16 on; keys are taken as many at a
    time as there is shared memory for; `interpret` whether JAX interprets the kernels, on any device and slowly.
    Without it, a program with this attention lowers for CUDA alone.

    **Raises:** `ValueError` unless block is a power of two >= 16; when called, for float64, which Triton does not
    multiply, unless `interpret` is True.
    """

    block: int = eqx.field(default=64, static=True)
    interpret: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if not isinstance(self.block, int) or self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two >= 16, got {self.block}")

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        return _attend(self.launch(value), query, key, value)

    def forward_mode(self) -> AbstractAttention:
        return _InForwardMode(self)

    def launch(self, value: _Rows) -> Launch:
        """How kernels run for inputs like `value`."""
        if value.dtype == jnp.float64 and not self.interpret:
            raise ValueError("PallasAttention must be given bfloat16, float16 or float32, got float64")
        return Launch(self.block, self.interpret)


class _InForwardMode(AbstractAttention):
    """The form of `PallasAttention` for forward mode."""

    attention: PallasAttention

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        return _attend_forward(self.attention.launch(value), query, key, value)

    def forward_mode(self) -> AbstractAttention:
        return self


_Residuals = tuple[_Rows, _Rows, _Rows, _Rows, _Logarithms]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(launch: Launch, query: _Rows, key: _Rows, value: _Rows) -> _Rows:
    from . import _pallas_kernels  # only where it is used, since a future JAX may lack Pallas on Triton

    return _pallas_kernels.attend(launch, query, key, value)[0]


def _attend_and_keep(launch: Launch, query: _Rows, key: _Rows, value: _Rows) -> tuple[_Rows, _Residuals]:
    from . import _pallas_kernels

    out, log_total = _pallas_kernels.attend(launch, query, key, value)
    return out, (query, key, value, out, log_total)


def _pull_back(launch: Launch, kept: _Residuals, cotangent: _Rows) -> tuple[_Rows, _Rows, _Rows]:
    from . import _pallas_kernels

    query, key, value, out, log_total = kept
    return _pallas_kernels.pull_back(launch, (query, key, value), out, log_total, cotangent)


_attend.defvjp(_attend_and_keep, _pull_back)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_forward(launch: Launch, query: _Rows, key: _Rows, value: _Rows) -> _Rows:
    return _attend(launch, query, key, value)


@_attend_forward.defjvp
def _attend_forward_jvp(
    launch: Launch, primals: tuple[_Rows, _Rows, _Rows], tangents: tuple[_Rows, _Rows, _Rows]
) -> tuple[_Rows, _Rows]:
    from . import _pallas_kernels

    out, log_total, dout = _pallas_kernels.attend_along(launch, *jax.lax.stop_gradient((primals, tangents)))
    return _value_of(launch, *primals, out, log_total), _tangent_of(primals, tangents, dout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_of(launch: Launch, query: _Rows, key: _Rows, value: _Rows, out: _Rows, log_total: _Logarithms) -> _Rows:
    """`out`, which is the value of these inputs, with their gradient."""
    return out


_value_of.defvjp(
    lambda launch, *arguments: (arguments[3], arguments),
    lambda launch, kept, cotangent: (*_pull_back(launch, kept, cotangent), None, None),
)


@jax.custom_vjp
def _tangent_of(primals: tuple[_Rows, ...], tangents: tuple[_Rows, ...], dout: _Rows) -> _Rows:
    """`dout`, which is the tangent of the value at these inputs, with their gradient."""
    return dout


def _pull_tangent_back(
    inputs: tuple[tuple[_Rows, ...], tuple[_Rows, ...]], cotangent: _Rows
) -> tuple[tuple[_Rows, ...], tuple[_Rows, ...], None]:
    pull = jax.vjp(lambda *inputs: jax.jvp(ChunkedAttention(), *inputs)[1], *inputs)[1]
    return *pull(cotangent), None


_tangent_of.defvjp(lambda primals, tangents, dout: (dout, (primals, tangents)), _pull_tangent_back)
