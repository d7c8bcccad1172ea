"""Run by `test_train.py` in a process of its own, which sees eight forced CPU devices; prints what it measures."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from fields import refilled

import mf_eqx as mfx

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
OPTIMIZER = optax.sgd(0.1)  # not Adam, which would hide a wrong scale of the gradients
AVERAGES = (mfx.ExponentialAverage(0.9),)
ROWS = 32


def make(make_field, devices, fsdp=1):
    """Step, state on every device, and a function that spreads the rows of a batch over the devices."""
    parallelism = mfx.Parallelism(devices // fsdp, fsdp, least_size=64, devices=jax.devices()[:devices])
    objective = mfx.Objective(guidance=mfx.Guidance(2.0, 0.5), label_dropout=mfx.LabelDropout(0.1, 4))
    state = parallelism.make(lambda: mfx.init_state(make_field(), OPTIMIZER, AVERAGES, key=jr.key(1)))

    def spread(x):
        return parallelism.place(mfx.Batch(x, np.arange(ROWS) % 4))

    return mfx.TrainStep(objective, OPTIMIZER, AVERAGES, parallelism=parallelism), state, spread


def train(devices, dtype, steps=5, fsdp=1):
    field = mfx.nn.cast(refilled(mfx.MLP(2, width=32, depth=2, labels=4, key=jr.key(0))), dtype)
    step, state, spread = make(lambda: field, devices, fsdp)
    for i in range(steps):
        state, metrics = step(state, spread(np.random.default_rng(i).standard_normal((ROWS, 2)).astype(dtype)))
    values = (state.field, state.averages, {name: mean.value for name, mean in metrics.items()})
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(values, eqx.is_inexact_array))]


def difference(dtype):
    """The largest relative difference between training on one device and on eight."""
    pairs = zip(train(1, dtype), train(8, dtype), strict=True)
    return max(float(np.nanmax(np.abs(one - eight)) / np.nanmax(np.abs(one))) for one, eight in pairs)


def collectives(fsdp=1, **options):
    """How often each collective stands in the compiled step."""
    size = mfx.DiTSize(depth=2, width=16, heads=2, patch=2)
    step, state, spread = make(lambda: mfx.DiT((1, 4, 4), size, labels=4, **options, key=jr.key(0)), 8, fsdp)
    compiled = eqx.filter_jit(step).lower(state, spread(np.zeros((ROWS, 1, 4, 4), np.float32))).compile()
    text = compiled.compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


if __name__ == "__main__":
    assert jax.device_count() == 8
    result = {"scanned": collectives(), "unrolled": collectives(unroll=True), "float32": difference(jnp.float32)}
    with jax.enable_x64(True):
        result["float64"] = difference(jnp.float64)
    print(json.dumps(result))
