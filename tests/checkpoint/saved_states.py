"""A state with something of every kind, checkpoints of it, and damage to them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mf_eqx as mfx
from mf_eqx.checkpoint import Checkpoints


class State(mfx.AbstractField):
    """Something of every kind. All bits are drawn, so that nothing is compressed, and some are no numbers. The larger
    arrays are longer than what Orbax stores among its tables, under checksums of its own."""

    weight: jax.Array
    half: jax.Array
    flags: jax.Array
    key: jax.Array
    step: jax.Array
    name: str
    nothing: None = None

    def __init__(self, step=0, *, width=128, dtype=jnp.float32, name="first"):
        draws = np.random.default_rng(step)
        self.weight = jnp.asarray(np.frombuffer(draws.bytes(4 * width * 4), np.float32).reshape(width, 4), dtype)
        self.half = jax.device_put(np.frombuffer(draws.bytes(2 * 600), jnp.bfloat16))
        self.flags = jnp.asarray(draws.random(7) < 0.5)
        self.key = jr.key(step)
        self.step = jnp.asarray(step, jnp.int32)
        self.name = name

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z


def plain(leaf):
    return np.asarray(jr.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def bits(tree):
    """Dtype, shape and bytes of each array."""
    leaves = jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): (str(x.dtype), x.shape, plain(x).tobytes()) for path, x in leaves}


def saved(directory, *steps, **options):
    """Checkpoints of the state of each step."""
    checkpoints = Checkpoints(directory, **{"keep_last": 9, **options})
    for step in steps:
        checkpoints.save(step, State(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def files(checkpoints, step):
    """All files of a step: those of its directory, and its record."""
    found = [path for path in checkpoints.path(step).rglob("*") if path.is_file()]
    return sorted([*found, checkpoints.path(step).with_suffix(".json")])


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def data_file(checkpoints, step, leaf):
    """The file that has the bytes of an array, and where in it they begin."""
    content = plain(leaf).tobytes()
    ((path, place),) = [
        (path, place) for path in files(checkpoints, step) if (place := path.read_bytes().find(content)) >= 0
    ]
    return path, place


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def damage(checkpoints, step):
    """One flipped bit in the weights of a step."""
    flip(*data_file(checkpoints, step, State(step).weight))
