"""Run by `test_fsdp.py` in a process of its own, which sees eight forced CPU devices; prints what it measures."""

import json
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from fields import refilled

import mf_eqx as mfx
from mf_eqx import measure

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
LABELS, AVERAGES = 4, [mfx.ExponentialAverage(0.9)]
DROPOUT = mfx.LabelDropout(0.1, LABELS)
OBJECTIVES = {
    "Flow Matching": mfx.Objective(identity=None, identity_share=0, label_dropout=DROPOUT),
    "MeanFlow": mfx.Objective(label_dropout=DROPOUT),
    "guided": mfx.Objective(guidance=mfx.Guidance(2.0, 0.5), label_dropout=DROPOUT),
    "improved": mfx.Objective(
        mfx.ImprovedMeanFlow(), identity_share=0.5, guidance=mfx.Guidance(2.0, 0.5), label_dropout=DROPOUT
    ),
}
DEPTH, WIDTH, SIZE = 24, 128, 16  # of a deep and narrow network


def deep(key):
    return mfx.MLP(SIZE, width=WIDTH, depth=DEPTH, labels=LABELS, key=key)


def parameters(tree):
    return eqx.filter(tree, lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))


def size(tree):
    """Bytes of all parameters."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters(tree)))


def cost(objective, make_field, shape, rows, fsdp):
    """The bytes that one device holds in a step with Adam and an average on a batch of so many rows, and those of parts
    of the state; for each weight of the blocks, whether the device ever has it of all blocks, and of one."""
    parallelism = mfx.Parallelism(fsdp=fsdp, least_size=1)
    step = mfx.TrainStep(OBJECTIVES[objective], optax.adam(1e-4), AVERAGES, parallelism=parallelism)

    def make_state(key):
        return mfx.init_state(make_field(key), step.optimizer, AVERAGES, key=key)

    state = eqx.filter_eval_shape(make_state, jr.key(0))
    arrays, rest = eqx.partition(state, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed_state = eqx.combine(jax.tree.map(placed, arrays, parallelism.of_tree(arrays)), rest)
    x, label = (placed(jax.ShapeDtypeStruct((rows, *s), t), parallelism.rows) for s, t in ((shape, "f4"), ((), "i4")))
    program = measure.compile_program(step, placed_state, mfx.Batch(x, label), donate=(0,))
    used, field = program.cost, state.field
    shapes = [leaf.shape for leaf in jax.tree.leaves(parameters(field.stack)) if len(leaf.shape) > 2]
    return {
        "held": used.argument_bytes + used.output_bytes - used.donated_bytes + used.temporary_bytes,
        "parameters": size(field),
        "state": size((field, state.opt_state, state.averages)),
        "block": size(field.stack) // field.stack.depth,
        "outside": size(field) - size(field.stack),
        "whole": [[has(program, shape), has(program, shape[1:])] for shape in shapes],
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", program.text)) for name in COLLECTIVES},
    }


def has(program, shape):
    """Whether a device has an array of this shape at any time."""
    return f"[{','.join(map(str, shape))}]" in program.text


def narrow(objective, fsdp):
    """The cost of a network of many small blocks, whose state is large beside what a row needs."""
    rows = 8 if objective == "Flow Matching" else 32
    found = cost(objective, deep, (SIZE,), rows, fsdp)
    vectors = 8  # of this width, which a row needs at most from each block in the backward pass
    return {**found, "rows": rows // 8 * DEPTH * vectors * WIDTH * 4}


def largest():
    """The cost of the paper's largest network, on images of four tokens: what a row needs is then small."""
    shape, tokens, rows = (4, 4, 4), 4, 32
    depth, width, _, _ = mfx.DIT_XL2
    found = cost("guided", lambda key: mfx.DiT(shape, mfx.DIT_XL2, labels=1000, remat=True, key=key), shape, rows, 8)
    # The input of each block; within one block, at most 100 times its input.
    return {**found, "rows": rows // 8 * (depth + 100) * tokens * width * 4}


SIZES = {"depth": 3, "width": 32, "heads": 2, "patch": 4}
IMAGE = (2, 8, 8)
NETWORKS = {
    "DiT": lambda **o: mfx.DiT(IMAGE, mfx.DiTSize(**SIZES), labels=LABELS, **o, key=jr.key(0)),
    "in-context DiT": lambda **o: mfx.InContextDiT(
        IMAGE, mfx.InContextDiTSize(**SIZES, head_depth=1), labels=LABELS, velocity_head=True, **o, key=jr.key(0)
    ),
    "U-Net": lambda **o: mfx.UNet(
        IMAGE, mfx.UNetSize(width=16, multipliers=(1, 2), blocks=2, attention=()), labels=LABELS, **o, key=jr.key(0)
    ),
}
REMAT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
TRAININGS = {
    "DiT": ("guided", {"remat": True}, {"data": 2, "fsdp": 4, "accumulation": 2}),
    "DiT without a loop": ("MeanFlow", {"unroll": True, "remat": REMAT}, {"data": 1, "fsdp": 8}),
    "in-context DiT": ("improved", {}, {"data": 1, "fsdp": 8}),
    "U-Net": ("Flow Matching", {}, {"data": 1, "fsdp": 8}),
}


def trained(objective, field, data=1, fsdp=1, accumulation=1, steps=5):
    """The losses of a few steps, and the parameters and averages after them."""
    parallelism = mfx.Parallelism(data, fsdp, least_size=64, devices=jax.devices()[: data * fsdp])
    step = mfx.TrainStep(
        OBJECTIVES[objective], optax.sgd(0.01), AVERAGES, accumulation=accumulation, parallelism=parallelism
    )
    state = parallelism.make(lambda: mfx.init_state(field, step.optimizer, AVERAGES, key=jr.key(1)))
    losses = []
    for seed in range(steps):
        x = np.random.default_rng(seed).standard_normal((64, *IMAGE)).astype(np.float32)
        state, metrics = step(state, parallelism.place(mfx.Batch(x, np.arange(64) % LABELS)))
        losses.append(float(metrics["loss"].value))
    return [np.asarray(losses), *map(np.asarray, jax.tree.leaves(parameters((state.field, state.averages))))]


def difference(name):
    """The largest relative difference of losses and parameters between a mesh and one device."""
    objective, options, layout = TRAININGS[name]
    field = refilled(NETWORKS[name.removesuffix(" without a loop")](**options))
    pairs = zip(trained(objective, field), trained(objective, field, **layout), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in pairs)


def main(names):
    """What slow tests measure, if there are names: the trainings of these; what all others do, if there are none."""
    assert jax.device_count() == 8
    if not names:
        return {"Flow Matching by 8": narrow("Flow Matching", 8), "guided by 8": narrow("guided", 8)}
    costs = {"Flow Matching by 2": narrow("Flow Matching", 2), "guided XL/2 by 8": largest()}
    return costs | {"differences": {name: difference(name) for name in names}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
