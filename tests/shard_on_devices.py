"""Run by `test_sharding.py` in a process of its own, which sees eight forced CPU devices; prints what it sees."""

import contextlib
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx

SHAPES = (
    (),
    (3,),
    (64,),
    (60,),
    (8, 8),
    (8, 12),
    (12, 8),
    (16, 4, 4),
    (7, 64),
    (64, 7),
    (66, 33),
    (2, 2, 16),
    (0, 64),
    (7, 16, 8),
    (7, 12, 8),
)
OPTIMIZER = optax.adam(0.1)
AVERAGES = (mfx.ExponentialAverage(0.9),)


class Field(mfx.AbstractField):
    """A large leaf, a large one that four does not divide, small ones, and one that is no array."""

    large: jax.Array
    odd: jax.Array
    small: jax.Array
    name: str

    def __init__(self, *, key):
        keys = jr.split(key, 3)
        self.large = jr.normal(keys[0], (2048, 48))
        self.odd = jr.normal(keys[1], (67, 31))
        self.small = jr.normal(keys[2], (8,), jnp.bfloat16)
        self.name = "odd"

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z


def make_state():
    return mfx.init_state(Field(key=jr.key(0)), OPTIMIZER, AVERAGES, key=jr.key(1))


def arrays(tree):
    leaves = jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def bits(leaf):
    plain = jr.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(plain).tobytes()


@contextlib.contextmanager
def programs():
    """What `jax.jit` compiles meanwhile: the bytes that one device needs beside its arguments."""
    jit, needed = jax.jit, []

    def watched(function, **options):
        program = jit(function, **options)

        def call(*arguments):
            memory = program.lower(*arguments).compile().memory_analysis()
            needed.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
            return program(*arguments)

        return call

    jax.jit = watched
    try:
        yield needed
    finally:
        jax.jit = jit


def rules():
    """The mesh axis of each array axis, by shape, on several meshes."""
    meshes = {
        "shared by 4": mfx.Parallelism(fsdp=4, least_size=64),
        "shared by 8": mfx.Parallelism(fsdp=8, least_size=64),
        "shared if large": mfx.Parallelism(fsdp=4),
        "data parallel": mfx.Parallelism(least_size=1),
    }
    return {name: [[*shape, list(mesh.of_shape(shape).spec)] for shape in SHAPES] for name, mesh in meshes.items()}


def made():
    """A state made in parts, and the same on one device."""
    one, many = mfx.Parallelism(devices=jax.devices()[:1]), mfx.Parallelism(fsdp=4, least_size=1000)
    whole = arrays(one.make(make_state))
    with programs() as needed:
        state = many.make(make_state)
    parts = arrays(state)
    shards = [shard for leaf in parts.values() for shard in leaf.addressable_shards]
    held = [sum(shard.data.nbytes for shard in shards if shard.device == device) for device in jax.devices()]
    table = many.table(eqx.filter_eval_shape(make_state))
    return {
        "parts": {name: sorted({s.data.shape for s in leaf.addressable_shards}) for name, leaf in parts.items()},
        "as_the_rule_says": all(leaf.sharding == many.of_shape(leaf.shape) for leaf in parts.values()),
        "same_bits": sorted(parts) == sorted(whole) and all(bits(parts[n]) == bits(whole[n]) for n in whole),
        "static": state.field.name,
        "held": held,
        "needed": needed,
        "whole": parts[".field.large"].nbytes,
        "table": [list(row) for row in table],
        "same_table": many.table(state) == table,
    }


def placed():
    """Which rows each device has, of a batch of 16."""
    parallelism = mfx.Parallelism(fsdp=4)
    batch = mfx.Batch(np.arange(48.0).reshape(16, 3), {"label": np.arange(16)})
    spread = parallelism.place(batch)
    rows = {s.device.id: np.asarray(s.data).tolist() for s in spread.index.addressable_shards}
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), spread, batch)
    try:
        parallelism.positions(12)
    except ValueError as error:
        refused = str(error)
    return {
        "rows": [rows[device.id] for device in jax.devices()],
        "positions": parallelism.positions(16).tolist(),
        "equal": all(jax.tree.leaves(equal)),
        "leaves": len(jax.tree.leaves(equal)),
        "shards": parallelism.shards,
        "refused": refused,
    }


def replicated():
    """Whether a replicated state is whole on every device, and the same."""
    state = make_state()
    copy = mfx.Parallelism(fsdp=4).replicate(state)
    before, after = arrays(state), arrays(copy)
    return {
        "whole": all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in after.values()),
        "same_bits": sorted(before) == sorted(after) and all(bits(before[n]) == bits(after[n]) for n in before),
        "static": copy.field.name,
    }


def refused(**arguments):
    try:
        mfx.Parallelism(**arguments)
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    assert jax.device_count() == 8
    result = {
        "rules": rules(),
        "made": made(),
        "placed": placed(),
        "replicated": replicated(),
        "mesh": [[device.id for device in row] for row in mfx.Parallelism(fsdp=4).mesh.devices],
        "refused": [refused(fsdp=3), refused(fsdp=0), refused(data=4, fsdp=4)],
    }
    print(json.dumps(result))
