r"""A number for the contents of an array, the same however it lies on devices.

    digest = sum over i of mix(bits_i xor mix(i)) mod 2^32

over the array's elements, in words of up to 32 bits at positions i. `mix` maps 32 bits one to one, so that a change of
one word always changes the digest; other changes go unnoticed with probability 2^-32. Sums of integers do not depend on
their order, hence not on the sharding.
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
    """The digest of each array of a tree, by its path. All processes must call it together.

    Each device sums over what it holds, and the sums meet on the host: devices exchange nothing.
    """
    arrays = leaves(tree)
    parts = jax.device_get({name: _parts(without_key_dtype(leaf)) for name, leaf in arrays.items()})
    sums = np.array([sum(map(int, parts[name])) % 2**32 for name in arrays], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    return dict(zip(arrays, map(int, sums), strict=True))


def _parts(leaf: Shaped[Array, "..."]) -> list[UInt32[Array, ""]]:
    """The sums over those parts of an array that this process answers for: copies count once among all processes."""
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
    """The sum over a part that starts at these places of an array of that shape."""
    words = _words(part)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < len(shape):  # not the words of one element
            here, length = here + starts[axis], shape[axis]
        position = position * jnp.uint32(length % 2**32) + here
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def _words(leaf: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of each element, as integers of 32 bits; of longer elements, as a last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _words(jnp.stack([leaf.real, leaf.imag], axis=-1))
    width = min(leaf.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    return bits.astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 bits to 32 bits, one to one, every bit of the result depending on every bit of x: shifts and odd factors as in
    the "lowbias32" of C. Wellons' hash prospector (2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
