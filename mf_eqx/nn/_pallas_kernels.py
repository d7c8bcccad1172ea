r"""Kernels of softmax attention in Pallas, in the dialect of Triton: value, value with tangent, and backward pass.

A program of a kernel takes a tile of queries (in the backward pass of keys and values: a tile of keys) in one head, and
goes through all keys (queries), a few at a time. What it sums stays in registers, in float32 or better; factors of
products are in the dtype of the inputs, which tensor cores take. With the notation of `_chunked_attention.py`:

**Value.** One pass with the running maximum. The kernel returns o and the logarithm of Z with its shift, $\ell_i = M_i
+ \log Z_i$, so that the backward pass has the weights as $P_{ij} = e^{S_{ij} - \ell_i}$.

**Value and tangent.** One pass for both, which stores nothing else. The tangents of the weights, $P \odot (\dot S - c
1^\top)$ with $c_i = \sum_j P_{ij} \dot S_{ij}$, need a mean that is known only at the end. The pass keeps the mean over
the keys so far, beside Z and N, and the change of N relative to it:

$$c' = \frac{\alpha Z c + \sum_j E_{ij} \dot S_{ij}}{Z'}, \qquad \dot N' = \alpha\, (\dot N + (c - c')\, N) + \sum_j
(E_{ij} (\dot S_{ij} - c') v_j + E_{ij} \dot v_j),$$

with primes for after a tile of keys and $\alpha = e^{M - M'}$. At the end $\dot o = \dot N / Z$, and no difference of
large numbers is left: a motion that all keys have in common changes c alone, and so does that of a key which has all
the weight. Six products of the size of the weights.

**Backward pass of the value**, for a cotangent g of o, with $\delta_i = g_i \cdot o_i$: one kernel sums $\bar q_i = s
\sum_j \bar S_{ij} k_j$ over keys, with $\bar S_{ij} = P_{ij} (g_i \cdot v_j - \delta_i)$, another one $\bar k_j = s
\sum_i \bar S_{ij} q_i$ and $\bar v_j = \sum_i P_{ij} g_i$ over queries. Seven products.

Triton wants tiles whose sides are powers of two: what is beyond an array is read as zeros, has no weight, and is not
written.

Sources: FlashAttention-2, Dao, 2023, arXiv 2307.08691 (value and backward pass). The running mean is the update of
means of Note on a method for calculating corrected sums of squares and products, Welford, 1962, with weights.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from ._pallas_attention import Launch

STAGES = 2
"""Tiles of the rows that a program goes through: one in use, the others on their way."""
SHARED_BYTES = 64 * 1024
"""The shared memory of a multiprocessor that these tiles may use. With the program's own rows Triton takes up to 100 KB
in bfloat16 and 116 KB in float32; an A100 has 163 KB, an H100 227 KB, consumer cards have 99 KB."""


class _Extent(NamedTuple):
    """The sizes of the arrays before they are padded to whole tiles, as a kernel sees them."""

    queries: int
    keys: int
    size: int


_Rows = Float[Array, "tokens heads size"]


def attend(launch: Launch, query: _Rows, key: _Rows, value: _Rows) -> tuple[_Rows, Float[Array, "heads queries"]]:
    """The value, and the logarithm of each query's sum."""
    heads, (wide, shape) = query.shape[1], (_wide(value), query.shape)
    outputs = jax.ShapeDtypeStruct(shape, value.dtype), jax.ShapeDtypeStruct((heads, shape[0]), wide)
    return _call(_value, launch, query.shape[0], (query, key, value), outputs)


def attend_along(
    launch: Launch, primals: Sequence[_Rows], tangents: Sequence[_Rows]
) -> tuple[_Rows, Float[Array, "heads queries"], _Rows]:
    """As `attend`, and the tangent of the value."""
    (query, key, value), heads = primals, primals[0].shape[1]
    out = jax.ShapeDtypeStruct(query.shape, value.dtype)
    outputs = out, jax.ShapeDtypeStruct((heads, query.shape[0]), _wide(value)), out
    return _call(_value_and_tangent, launch, query.shape[0], (query, key, value, *tangents), outputs)


def pull_back(
    launch: Launch, inputs: Sequence[_Rows], out: _Rows, log_total: Float[Array, "heads queries"], cotangent: _Rows
) -> tuple[_Rows, _Rows, _Rows]:
    """The cotangents of query, key and value for one of the value."""
    query, key, value = inputs
    delta = jnp.einsum("qhd,qhd->hq", out, cotangent, preferred_element_type=log_total.dtype)
    arrays = query, key, value, cotangent, log_total, delta
    (dquery,) = _call(_query_cotangent, launch, query.shape[0], arrays, (_like(query),))
    return dquery, *_call(_key_cotangents, launch, key.shape[0], arrays, (_like(key), _like(value)))


# The kernels. Their arguments are references to arrays of one head: (rows, size) or (rows,).


def _value(extent: _Extent, own: int, step: int, query: Any, key: Any, value: Any, out: Any, log_total: Any) -> None:
    mine = _first(own)
    q = _load(query, mine, own, extent.queries, extent.size)

    def add(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        shift, total, mixed = sums
        k, v = (_load(rows, number * step, step, extent.keys, extent.size) for rows in (key, value))
        shift, before, weights = _weigh(shift, _logits(q, k, number * step, extent))
        total = before * total + jnp.sum(weights, axis=1)
        return shift, total, before[:, None] * mixed + _product(weights, v)

    zeros, matrix = _zeros(own, q, value)
    sums = zeros - jnp.inf, zeros, matrix
    shift, total, mixed = jax.lax.fori_loop(0, pl.cdiv(extent.keys, step), add, sums)
    _store(out, mine, mixed / total[:, None], extent.queries, extent.size)
    _store(log_total, mine, shift + jnp.log(total), extent.queries)


def _value_and_tangent(extent: _Extent, own: int, step: int, *refs: Any) -> None:
    query, key, value, dquery, dkey, dvalue, out, log_total, dout = refs
    mine, scale = _first(own), extent.size**-0.5
    q, dq = (_load(rows, mine, own, extent.queries, extent.size) for rows in (query, dquery))

    def add(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        shift, total, mean, mixed, change = sums
        rows = (_load(rows, number * step, step, extent.keys, extent.size) for rows in (key, value, dkey, dvalue))
        k, v, dk, dv = rows
        shift, before, weights = _weigh(shift, _logits(q, k, number * step, extent))
        dlogits = scale * (_product(dq, k, transposed=True) + _product(q, dk, transposed=True))
        earlier, total = before * total, before * total + jnp.sum(weights, axis=1)
        moved = (jnp.sum(weights * dlogits, axis=1) + earlier * mean) / total
        change = before[:, None] * (change + (mean - moved)[:, None] * mixed)
        change += _product(weights * (dlogits - moved[:, None]), v) + _product(weights, dv)
        return shift, total, moved, before[:, None] * mixed + _product(weights, v), change

    zeros, matrix = _zeros(own, q, value)
    sums = zeros - jnp.inf, zeros, zeros, matrix, matrix
    shift, total, _, mixed, change = jax.lax.fori_loop(0, pl.cdiv(extent.keys, step), add, sums)
    _store(out, mine, mixed / total[:, None], extent.queries, extent.size)
    _store(dout, mine, change / total[:, None], extent.queries, extent.size)
    _store(log_total, mine, shift + jnp.log(total), extent.queries)


def _query_cotangent(extent: _Extent, own: int, step: int, *refs: Any) -> None:
    query, key, value, cotangent, log_total, delta, dquery = refs
    mine, scale = _first(own), extent.size**-0.5
    q, g = (_load(rows, mine, own, extent.queries, extent.size) for rows in (query, cotangent))
    log, product = (_load(numbers, mine, own, extent.queries)[:, None] for numbers in (log_total, delta))

    def add(number: Array, sums: Array) -> Array:
        k, v = (_load(rows, number * step, step, extent.keys, extent.size) for rows in (key, value))
        weights = jnp.exp(_logits(q, k, number * step, extent) - log)
        return sums + _product(weights * (_product(g, v, transposed=True) - product), k)

    sums = jax.lax.fori_loop(0, pl.cdiv(extent.keys, step), add, _zeros(own, q, value)[1])
    _store(dquery, mine, scale * sums, extent.queries, extent.size)


def _key_cotangents(extent: _Extent, own: int, step: int, *refs: Any) -> None:
    query, key, value, cotangent, log_total, delta, dkey, dvalue = refs
    mine, scale = _first(own), extent.size**-0.5
    k, v = (_load(rows, mine, own, extent.keys, extent.size) for rows in (key, value))

    def add(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        q, g = (_load(rows, number * step, step, extent.queries, extent.size) for rows in (query, cotangent))
        log, product = (_load(numbers, number * step, step, extent.queries) for numbers in (log_total, delta))
        # Keys in rows. Beyond the last query the cotangent is zero, and beyond the last key nothing is written.
        weights = jnp.exp(scale * _product(k, q, transposed=True) - log[None, :])
        change = weights * (_product(v, g, transposed=True) - product[None, :])
        return sums[0] + _product(change, q), sums[1] + _product(weights, g)

    matrix = _zeros(own, k, value)[1]
    dk, dv = jax.lax.fori_loop(0, pl.cdiv(extent.queries, step), add, (matrix, matrix))
    _store(dkey, mine, scale * dk, extent.keys, extent.size)
    _store(dvalue, mine, dv, extent.keys, extent.size)


# What kernels have in common


def _first(own: int) -> Array:
    """The first row of this program, in the dtype that JAX gives to Python's integers."""
    return pl.program_id(0).astype(int) * own


def _logits(query: Array, key: Array, first: Array, extent: _Extent) -> Array:
    """The logits of a tile of keys that begins with the key `first`; minus infinity beyond the last key."""
    logits = extent.size**-0.5 * _product(query, key, transposed=True)
    if extent.keys % key.shape[0] == 0:
        return logits
    return jnp.where((first + jnp.arange(key.shape[0]) < extent.keys)[None, :], logits, -jnp.inf)


def _weigh(shift: Array, logits: Array) -> tuple[Array, Array, Array]:
    """The new maximum, the factor of earlier sums, and the weights relative to that maximum."""
    largest = jnp.maximum(shift, jnp.max(logits, axis=1))
    return largest, jnp.exp(shift - largest), jnp.exp(logits - largest[:, None])


def _product(left: Array, right: Array, *, transposed: bool = False) -> Array:
    """The product of two tiles, in float32 or better. `left` is cast to the dtype of `right`, which is transposed if
    `transposed`."""
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left.astype(right.dtype), right, axes, preferred_element_type=_wide(right))


def _load(ref: Any, first: Array | int, rows: int, *extent: int) -> Array:
    """Some rows of an array that has this extent, and zeros beyond."""
    here = (pl.ds(first, rows), slice(None))[: len(extent)]
    mask = _inside(ref, first, rows, extent)
    return triton.load(ref.at[here], mask=mask, other=None if mask is None else 0.0)


def _store(ref: Any, first: Array | int, rows: Array, *extent: int) -> None:
    """Those of `rows` that are within this extent, at their place, in the dtype of the array."""
    here = (pl.ds(first, rows.shape[0]), slice(None))[: len(extent)]
    triton.store(ref.at[here], rows.astype(ref.dtype), mask=_inside(ref, first, rows.shape[0], extent))


def _inside(ref: Any, first: Array | int, rows: int, extent: tuple[int, ...]) -> Array | None:
    if tuple(ref.shape) == extent:
        return None
    inside = first + jnp.arange(rows) < extent[0]
    return inside if len(extent) == 1 else inside[:, None] & (jnp.arange(ref.shape[1]) < extent[1])[None, :]


def _zeros(rows: int, like: Array, value: Any) -> tuple[Array, Array]:
    """Sums over nothing: a number and a vector for each row."""
    wide = _wide(value)
    return jnp.zeros(rows, wide), jnp.zeros((rows, like.shape[1]), wide)


def _wide(array: Any) -> np.dtype[Any]:
    return np.promote_types(array.dtype, np.float32)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


# Launching the kernels


def _call(
    kernel: Callable[..., None],
    launch: Launch,
    rows: int,
    inputs: Sequence[Array],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """What a kernel returns, with a program for each tile of `rows` in every head. Arrays are (rows, heads, size) or
    (heads, rows): a program sees all rows of its head."""
    (queries, heads, size), keys = inputs[0].shape, inputs[1].shape[0]
    columns = max(16, pl.next_power_of_2(size))
    step = rows_at_a_time(launch.rows, columns, max(array.dtype.itemsize for array in inputs[:3]))

    def of_one_head(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if array.ndim == 2:
            return pl.BlockSpec((None, _filled(array.shape[1], launch.rows)), lambda _, head: (head, 0))
        return pl.BlockSpec((_filled(array.shape[0], launch.rows), None, columns), lambda _, head: (0, head, 0))

    return pl.pallas_call(
        functools.partial(kernel, _Extent(queries, keys, size), launch.rows, step),
        grid=(pl.cdiv(rows, launch.rows), heads),
        in_specs=[of_one_head(array) for array in inputs],
        out_specs=[of_one_head(array) for array in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=4 if columns <= 64 else 8, num_stages=STAGES),
        interpret=launch.interpret,
        name=f"attention{kernel.__name__}",
    )(*inputs)


def rows_at_a_time(most: int, columns: int, item_bytes: int) -> int:
    """The number of rows of keys, values and their tangents that are loaded at a time: as many as shared memory has
    room for in all stages, from 16 to `most`."""
    bytes_of_a_row = 4 * STAGES * columns * item_bytes
    return min(most, max(16, 2 ** int(np.log2(max(1, SHARED_BYTES // bytes_of_a_row)))))


def _filled(number: int, rows: int) -> int:
    return rows * pl.cdiv(number, rows)
