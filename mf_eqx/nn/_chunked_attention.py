r"""Softmax attention over blocks of keys, in memory linear in the number of tokens.

With logits $S_{ij} = s\, q_i \cdot k_j$ and any shift $M_i$ of the logits of query i,

$$E_{ij} = e^{S_{ij} - M_i}, \qquad Z_i = \sum_j E_{ij}, \qquad N_i = \sum_j E_{ij} v_j, \qquad o_i = N_i / Z_i.$$

**Value.** One pass over the blocks of keys. M is the largest logit so far; where a block has a larger one, the sums so
far are multiplied by $e^{M_\mathrm{old} - M_\mathrm{new}}$.

**Tangent.** o does not depend on M, so that any tangent of M gives the same $\dot o$; here it is that of the query's
mean logit, which is linear in the tangents. With keys centred by their mean, $k^c = k - \bar k$, one more pass, in
which M is known, gives

$$\dot S^c = s\, (\dot q\, {k^c}^\top + q\, {\dot k}^{c\top}), \qquad \dot M = s\, (\dot q \cdot \bar k + q \cdot
\dot{\bar k}), \qquad \dot Z_i = \sum_j E_{ij} \dot S^c_{ij}, \qquad \dot N_i = \sum_j E_{ij} (\dot S^c_{ij} v_j + \dot
v_j),$$

and $\dot o = (\dot N - o \dot Z) / Z$. (Without centring, and with a constant M, a tangent that all keys share would
make $\dot S$ large although o does not change, and the last difference would lose digits. Centring prevents this in the
first tangent and its gradient alone: a second tangent differentiates E through S - M with keys that are not centred.)

**Reverse mode**, of the value and through the tangent. The terms of this second pass depend on q, M, one block of k and
v, and the tangents of these. `jax.checkpoint` keeps for each term only what it depends on, of which all but the block
is the same for all terms, and computes E again. JAX transposes the sum of these terms, which gives the backward pass of
FlashAttention, and differentiates it, which gives reverse mode through the tangent: neither is written here. Value and
tangent are separate passes, so that a gradient of the value alone never runs through the tangent.

Nothing of the size queries x keys is ever stored, only queries x block. In products of matrices of that size, the value
costs 2 and its tangent 5 more (without blocks both together 6); the backward pass of the value costs 5 (without blocks
4), that of value and tangent 18 (without blocks 12).

Sources: the running maximum is from Online normalizer calculation for softmax, Milakov, Gimelshein, 2018, arXiv
1805.02867; blocks of keys from Self-attention does not need O(n^2) memory, Rabe, Staats, 2021, arXiv 2112.05682; the
backward pass from FlashAttention, Dao et al., 2022, arXiv 2205.14135.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._validate import as_count
from ._attention import AbstractAttention

_Sums = TypeVar("_Sums")


class ChunkedAttention(AbstractAttention):
    """Softmax attention that never holds the matrix of weights: forward mode, reverse mode, and reverse mode through
    the tangent, in memory linear in the number of tokens, in any precision and on any device.

    Use it in training from about 1,000 tokens on, or where the weights do not fit into memory: on a CPU, gradients then
    take as long as with `XLAAttention` or less, but values and tangents alone take 1.2 to 1.4 times as long.

    **Arguments:** `block` the number of keys that are taken at a time, from 1 on; the last block may be shorter. Memory
    beside the inputs grows with it, by heads x tokens x block.

    **Raises:** `ValueError` unless block is an integer >= 1.
    """

    block: int = eqx.field(default=128, static=True)

    def __check_init__(self):
        as_count("block", self.block)

    def __call__(
        self,
        query: Float[Array, "tokens heads size"],
        key: Float[Array, "tokens heads size"],
        value: Float[Array, "tokens heads size"],
    ) -> Float[Array, "tokens heads size"]:
        attend = functools.partial(_attend, self.block)
        return jax.vmap(attend, in_axes=1, out_axes=1)(query, key, value)

    def forward_mode(self) -> AbstractAttention:
        return self


def _attend(
    block: int,
    query: Float[Array, "queries size"],
    key: Float[Array, "keys size"],
    value: Float[Array, "keys size"],
) -> Float[Array, "queries size"]:
    """Attention in one head."""
    _, total, mixed = _sums(block, query, key, value)
    return (mixed / total[:, None]).astype(value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(
    block: int,
    query: Float[Array, "queries size"],
    key: Float[Array, "keys size"],
    value: Float[Array, "keys size"],
) -> tuple[Float[Array, " queries"], Float[Array, " queries"], Float[Array, "queries size"]]:
    """M, Z and N of the module's docstring, in float32 or better."""

    def add(sums: tuple[Array, Array, Array], key: Array, value: Array) -> tuple[Array, Array, Array]:
        shift, total, mixed = sums
        logits = _product(query, key.T) * query.shape[-1] ** -0.5
        largest = jnp.maximum(shift, jnp.max(logits, axis=-1))
        before, weights = jnp.exp(shift - largest), jnp.exp(logits - largest[:, None])
        return largest, before * total + jnp.sum(weights, axis=-1), before[:, None] * mixed + _product(weights, value)

    zeros = _zeros(query, value)
    return _over_blocks(add, (zeros[0] - jnp.inf, *zeros), (key, value), block)


@_sums.defjvp
def _sums_jvp(
    block: int, primals: Sequence[Float[Array, "tokens size"]], tangents: Sequence[Float[Array, "tokens size"]]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    (query, key, value), (dquery, dkey, dvalue) = primals, tangents
    shift, total, mixed = _sums(block, *primals)
    (mean, centred), (dmean, dcentred) = _centred(key), _centred(dkey)
    wide = shift.dtype
    dshift = (dquery.astype(wide) @ mean + query.astype(wide) @ dmean) * query.shape[-1] ** -0.5

    def add(changes: tuple[Array, Array], *blocks: Array) -> tuple[Array, Array]:
        terms = _change_by_block(query, dquery, shift, *blocks)
        return changes[0] + terms[0], changes[1] + terms[1]

    changes = _over_blocks(add, _zeros(query, value), (key, value, centred, dcentred, dvalue), block)
    return (shift, total, mixed), (dshift, *changes)


@jax.checkpoint
def _change_by_block(
    query: Float[Array, "queries size"],
    dquery: Float[Array, "queries size"],
    shift: Float[Array, " queries"],
    key: Float[Array, "block size"],
    value: Float[Array, "block size"],
    centred: Float[Array, "block size"],
    dcentred: Float[Array, "block size"],
    dvalue: Float[Array, "block size"],
) -> tuple[Float[Array, " queries"], Float[Array, "queries size"]]:
    """The terms of one block in the tangents of Z and N. The weights' tangents nearly cancel in the sums, so they are
    not rounded to the dtype of the values."""
    scale = query.shape[-1] ** -0.5
    weights = jnp.exp(scale * _product(query, key.T) - shift[:, None])
    dweights = weights * scale * (_product(dquery, centred.T) + _product(query, dcentred.T))
    return jnp.sum(dweights, axis=-1), _product(dweights, value.astype(shift.dtype)) + _product(weights, dvalue)


def _centred(rows: Float[Array, "keys size"]) -> tuple[Float[Array, " size"], Float[Array, "keys size"]]:
    """Their mean, in float32 or better, and the rows without it."""
    mean = jnp.mean(rows, axis=0, dtype=np.promote_types(rows.dtype, np.float32))
    return mean, (rows.astype(mean.dtype) - mean).astype(rows.dtype)


def _product(left: Float[Array, "rows inner"], right: Float[Array, "inner columns"]) -> Float[Array, "rows columns"]:
    """Their product in float32 or better, of factors in the dtype of `right`."""
    wide = np.promote_types(right.dtype, np.float32)
    return jnp.matmul(left.astype(right.dtype), right, preferred_element_type=wide)


def _zeros(
    query: Float[Array, "queries size"], value: Float[Array, "keys size"]
) -> tuple[Float[Array, " queries"], Float[Array, "queries size"]]:
    """Sums over no keys, in float32 or better."""
    wide = np.promote_types(value.dtype, np.float32)
    return jnp.zeros(query.shape[0], wide), jnp.zeros((query.shape[0], value.shape[-1]), wide)


def _over_blocks(
    add: Callable[..., _Sums], start: _Sums, rows: Sequence[Float[Array, "keys size"]], block: int
) -> _Sums:
    """`add(sums, *rows)` applied to each block of `rows` in turn, the last of which may be shorter."""
    number, rest = divmod(rows[0].shape[0], block)
    if number:
        blocks = [array[: number * block].reshape(number, block, -1) for array in rows]
        start, _ = jax.lax.scan(lambda sums, blocks: (add(sums, *blocks), None), start, blocks)
    return add(start, *(array[number * block :] for array in rows)) if rest else start
