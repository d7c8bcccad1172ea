"""Run by `test_lowering.py` in a process of its own, which sees eight forced CPU devices; prints what it sees.

A step is lowered for CUDA and TPU, and what was lowered for CUDA is compiled here: XLA divides a program between
devices before it is made for one kind of them, so that the collectives are those that GPUs would run.
"""

import collections
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from test_lowering import BOTH, dit, has_shape, LATENT, OBJECTIVES, runs_by_itself

import mf_eqx as mfx

ROWS = 32
SIZE = mfx.DiTSize(depth=2, width=64, heads=2, patch=8)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def lowered(parallelism, size, platforms):
    step = mfx.TrainStep(
        OBJECTIVES["guided"], optax.adam(1e-4), [mfx.ExponentialAverage(0.99)], parallelism=parallelism
    )
    make = dit(size)[1]
    state = eqx.filter_eval_shape(
        lambda key: mfx.init_state(make(key), step.optimizer, step.averages, key=key), jr.key(0)
    )
    arrays, rest = eqx.partition(state, has_shape)

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arrays = jax.tree.map(lambda leaf: placed(leaf, parallelism.of_shape(leaf.shape)), arrays)
    rows = [placed(jax.ShapeDtypeStruct((ROWS, *LATENT), jnp.float32), parallelism.rows)]
    rows.append(placed(jax.ShapeDtypeStruct((ROWS,), jnp.int32), parallelism.rows))

    def take(arrays, x, label):
        return eqx.filter(step(eqx.combine(arrays, rest), mfx.Batch(x, label)), eqx.is_array)

    inputs, here = (arrays, *rows), [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(take), platforms=platforms, disabled_checks=here)(*inputs), inputs


def seen(parallelism):
    large, _ = lowered(parallelism, mfx.DIT_XL2, BOTH)
    small, inputs = lowered(parallelism, SIZE, ["cuda"])
    text = jax.jit(small.call).lower(*inputs).compile().as_text()
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return {
        "devices": large.nr_devices,
        "runs_by_itself": runs_by_itself(large.mlir_module(), {"Sharding"}),
        "collectives": collections.Counter(found),
    }


if __name__ == "__main__":
    meshes = {"data parallel": mfx.Parallelism(), "FSDP": mfx.Parallelism(fsdp=8, least_size=1024)}
    print(json.dumps({name: seen(parallelism) for name, parallelism in meshes.items()}))
