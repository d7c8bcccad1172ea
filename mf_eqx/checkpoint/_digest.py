r"""A digest of an array's contents, which does not depend on the sharding of the array.

    digest = sum over i of mix(bits_i xor mix(i)) mod 2^32

over the array's elements, as words of up to 32 bits at positions i. `mix` is a one-to-one map of 32 bits, so that a
change of one word always changes the digest; other changes are missed with probability 2^-32. A sum of integers does
not depend on the order of its terms, and so not on the sharding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, Shaped, UInt32

from .._leaves import leaves, without_key_dtype


def digests(tree: PyTree[Any]) -> dict[str, int]:
    """The digest of each array of a tree, by the array's path. All processes must call it together.

    Each device sums over its own part of the array, and the host adds these sums: devices exchange no data.
    """
    arrays = leaves(tree)
    parts = jax.device_get({name: _local_sums(without_key_dtype(leaf)) for name, leaf in arrays.items()})
    sums = np.array([sum(map(int, parts[name])) % 2**32 for name in arrays], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    return dict(zip(arrays, map(int, sums), strict=True))


def _local_sums(leaf: Shaped[Array, "..."]) -> list[UInt32[Array, ""]]:
    """The sums over the parts of an array on this process's devices. Of several copies of a part on the devices of all
    processes, only one is counted."""
    parts = []
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            starts = [index.indices(length)[0] for index, length in zip(shard.index, leaf.shape, strict=True)]
            parts.append(_sum(shard.data, np.array(starts, np.uint32), leaf.shape))
    return parts


@functools.partial(jax.jit, static_argnums=2)
def _sum(
    part: Shaped[Array, "*part"], starts: UInt32[Array | np.ndarray, " axes"], shape: tuple[int, ...]
) -> UInt32[Array, ""]:
    """The sum over a part of an array with this `shape`; `starts` are the part's first indices along each axis."""
    words = _words(part)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < len(shape):  # the axis after those of the array is that of the words of one element
            index, length = index + starts[axis], shape[axis]
        position = position * jnp.uint32(length % 2**32) + index
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def _words(leaf: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of each element as uint32. Elements of more than 32 bits give several words, along a new last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _words(jnp.stack([leaf.real, leaf.imag], axis=-1))
    if jnp.issubdtype(leaf.dtype, jnp.integer) and jnp.iinfo(leaf.dtype).bits < 8:
        leaf = leaf.astype(jnp.int8)  # one element of int4 has half a byte
    width = min(leaf.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    return bits.astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A one-to-one map from 32 bits to 32 bits, in which every bit of the result depends on every bit of x: the shifts
    and odd factors are those of "lowbias32" from C. Wellons' hash prospector (2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
