"""Run by `test_train_on_devices.py` in a process of its own, which sees eight forced CPU devices; prints what it
measures."""

import json
import re
import sys
from typing import NamedTuple

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
ROWS, STEPS = 64, 20


class Layout(NamedTuple):
    """How the rows of one batch are spread."""

    devices: int
    fsdp: int = 1
    accumulation: int = 1


ONE = Layout(1)
LAYOUTS = {
    "2 devices": Layout(2),
    "4 devices": Layout(4),
    "8 devices": Layout(8),
    "2 x fsdp 4": Layout(8, fsdp=4),
    "1 x fsdp 2": Layout(2, fsdp=2),
    "4 x 16 rows in turn": Layout(1, accumulation=4),
    "2 devices, 2 x 16 rows in turn": Layout(2, accumulation=2),
}

QUICK = ("8 devices", "2 x fsdp 4")

RULES = {
    "per block": optax.chain(
        mfx.nn.per_block(optax.adaptive_grad_clip(0.1)),
        optax.contrib.muon(0.01, muon_weight_dimension_numbers=mfx.nn.muon_dimension_numbers),
    ),
    "holds the parameters": optax.contrib.dog(),
}


def make(make_field, layout, optimizer=OPTIMIZER):
    """Step, state where it belongs, and a function that spreads the rows of a batch over the devices."""
    devices, fsdp, accumulation = layout
    parallelism = mfx.Parallelism(devices // fsdp, fsdp, least_size=64, devices=jax.devices()[:devices])
    objective = mfx.Objective(guidance=mfx.Guidance(2.0, 0.5), label_dropout=mfx.LabelDropout(0.1, 4))
    state = parallelism.make(lambda: mfx.init_state(make_field(), optimizer, AVERAGES, key=jr.key(1)))
    step = mfx.TrainStep(objective, optimizer, AVERAGES, accumulation=accumulation, parallelism=parallelism)

    def spread(x):
        return parallelism.place(mfx.Batch(x, np.arange(len(x)) % 4))

    return step, state, spread


def make_small(layout, dtype, optimizer=OPTIMIZER):
    field = mfx.nn.cast(refilled(mfx.MLP(2, width=32, depth=2, labels=4, key=jr.key(0))), dtype)
    return make(lambda: field, layout, optimizer)


def rows(seed, dtype, number=ROWS):
    return np.random.default_rng(seed).standard_normal((number, 2)).astype(dtype)


def arrays(tree):
    return jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array))


def on_host(state):
    """Bits of everything that a bad step must leave alone."""
    return [np.asarray(leaf).tobytes() for _, leaf in arrays((state.field, state.opt_state, state.averages))]


def train(layout, dtype, optimizer=OPTIMIZER):
    """The numbers after all steps, leaves that were not donated or not where they had been, and what a bad row did."""
    step, state, spread = make_small(layout, dtype, optimizer)
    strayed, kept = set(), 0
    for seed in range(STEPS):
        before, (state, metrics) = state, step(state, spread(rows(seed, dtype)))
        kept += sum(not leaf.is_deleted() for _, leaf in arrays(before))
        for (path, old), (_, new) in zip(arrays(before), arrays(state), strict=True):
            if not new.sharding.is_equivalent_to(old.sharding, old.ndim):
                strayed.add(jax.tree_util.keystr(path))
    values = (state.field, state.averages, {name: mean.value for name, mean in metrics.items()})
    numbers = [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(values, eqx.is_inexact_array))]

    good, bad = on_host(state), rows(0, dtype)
    bad[ROWS // 2 + 1] = np.nan
    state, _ = step(state, spread(bad))
    counted = [int(state.faults.total), int(state.faults.in_row), int(state.faults.last), int(state.step)]
    found = {"kept": kept, "strayed": sorted(strayed), "unchanged": on_host(state) == good, "counted": counted}
    return numbers, found


def difference(numbers, others):
    """The largest relative difference between the numbers of two trainings, each array by its largest number."""
    pairs = list(zip(numbers, others, strict=True))
    if any(np.any(np.isnan(a) != np.isnan(b)) for a, b in pairs):  # NaN where nothing was counted
        return float("inf")
    return max(float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(a))) for a, b in pairs)


def layouts(names, dtype):
    """How training in each layout differs from training on one device."""
    expected, result = train(ONE, dtype)[0], {}
    for name in names:
        numbers, found = train(LAYOUTS[name], dtype)
        result[name] = {**found, "difference": difference(expected, numbers)}
    return result


def rules():
    """How optimisers train with their state spread, each against one device, in float64."""
    result = {}
    for name, rule in RULES.items():
        expected, _ = train(ONE, jnp.float64, rule)
        numbers, found = train(LAYOUTS["2 x fsdp 4"], jnp.float64, rule)
        result[name] = {**found, "difference": difference(expected, numbers)}
    return result


def make_dit(layout, **options):
    size = mfx.DiTSize(depth=2, width=16, heads=2, patch=2)
    return make(lambda: mfx.DiT((1, 4, 4), size, labels=4, **options, key=jr.key(0)), layout)


def collectives(made, data_shape):
    """How often each collective stands in the compiled step."""
    step, state, spread = made
    compiled = eqx.filter_jit(step).lower(state, spread(np.zeros((ROWS, *data_shape), np.float32))).compile()
    text = compiled.compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


class Images(mfx.AbstractField):
    """A field of images of one channel."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight[0] * z * jnp.cos(t + r) + self.weight[1] * t


def train_perceptually(layout):
    """The numbers after three steps with a term in the features of a network, that term's loss, and whether the network
    is still as it was."""
    parallelism = mfx.Parallelism(layout.devices, devices=jax.devices()[: layout.devices])
    features = parallelism.replicate(eqx.nn.Conv2d(1, 2, 3, key=jr.key(5)))
    before = np.asarray(features.weight)
    term = mfx.PerceptualTerm(features, (5, 5), 10.0)
    objective = mfx.Objective(mfx.ImprovedMeanFlow(), identity_share=0.5, perceptual=[term])
    state = parallelism.make(lambda: mfx.init_state(Images(jnp.array([0.7, -0.3])), OPTIMIZER, AVERAGES, key=jr.key(1)))
    step = mfx.TrainStep(objective, OPTIMIZER, AVERAGES, accumulation=layout.accumulation, parallelism=parallelism)
    x = np.random.default_rng(3).standard_normal((ROWS, 1, 6, 6)).astype(np.float32)
    for _ in range(3):
        state, metrics = step(state, parallelism.place(mfx.Batch(x)))
    loss = float(metrics["perceptual_loss"].value)
    numbers = [np.asarray(state.field.weight), np.asarray(state.averages[0].weight), np.asarray(loss)]
    return numbers, loss, bool((np.asarray(features.weight) == before).all())


def perceptual():
    """How training with such a term differs from that on one device, with all rows at once."""
    expected, loss, is_same = train_perceptually(ONE)
    result = {"loss": loss, "one device": {"difference": 0.0, "unchanged": is_same}}
    for name, layout in {"8 devices": Layout(8), "2 x 32 rows in turn": Layout(1, accumulation=2)}.items():
        numbers, _, is_same = train_perceptually(layout)
        result[name] = {"difference": difference(expected, numbers), "unchanged": is_same}
    return result


class Pointwise(mfx.AbstractField):
    """A field of images whose channels are mixed by convolutions of one pixel."""

    wide: eqx.nn.Conv2d
    narrow: eqx.nn.Conv2d

    def __init__(self, channels, *, key):
        wide_key, narrow_key = jr.split(key)
        self.wide = eqx.nn.Conv2d(channels, 2 * channels, 1, key=wide_key)
        self.narrow = eqx.nn.Conv2d(2 * channels, channels, 1, key=narrow_key)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.narrow(jnp.tanh(self.wide(z) * jnp.cos(t + r)))


def convolved(devices):
    """How the parameters of a field with convolutions differ from those of one device after three steps."""
    trained = []
    for number in (1, devices):
        parallelism = mfx.Parallelism(number, devices=jax.devices()[:number])
        field = Pointwise(devices, key=jr.key(7))
        state = parallelism.make(lambda field=field: mfx.init_state(field, OPTIMIZER, key=jr.key(1)))
        step = mfx.TrainStep(mfx.Objective(), OPTIMIZER, parallelism=parallelism)
        x = np.random.default_rng(4).standard_normal((ROWS, devices, 6, 6)).astype(np.float32)
        for _ in range(3):
            state, _ = step(state, parallelism.place(mfx.Batch(x)))
        trained.append([np.asarray(leaf) for _, leaf in arrays(state.field)])
    return difference(*trained)


def refusal(number):
    """What is said about a batch of so many rows."""
    step, state, spread = make_small(Layout(8, fsdp=4), jnp.float32)
    try:
        step(state, spread(rows(0, np.float32, number)))
    except ValueError as error:
        return str(error)
    return "none"


def main(names):
    """What slow tests measure: the layouts of these names, optimisers and other forms of the step; without names, what
    all others do."""
    assert jax.device_count() == 8
    if names:
        found = {
            "layouts": layouts(names, jnp.float32),
            "unrolled": collectives(make_dit(Layout(8), unroll=True), (1, 4, 4)),
            "in turn": collectives(make_small(Layout(8, accumulation=2), jnp.float32), (2,)),
        }
        with jax.enable_x64(True):
            return found | {"rules": rules()}
    result = {
        "scanned": collectives(make_dit(Layout(8)), (1, 4, 4)),
        "shared": collectives(make_dit(Layout(8, fsdp=4)), (1, 4, 4)),
        "perceptual": perceptual(),
        "convolved": convolved(8),
        "refused": {number: refusal(number) for number in (40, 20)},
    }
    with jax.enable_x64(True):
        return result | {"layouts": layouts(QUICK, jnp.float64)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
