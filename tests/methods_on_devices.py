"""Run by `test_sample_objective.py` in a process of its own that sees eight forced CPU devices; prints its results."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx

PAIRS = {"identity_share": 0.5, "time_pairs": mfx.TimePairs(mfx.UniformTimes())}
OBJECTIVES = {
    "SampleObjective": lambda: mfx.SampleObjective(
        (mfx.FrechetLoss(np.ones(2), np.eye(2), population=mfx.QueuedPopulation(100)), mfx.Drifting())
    ),
    "InductiveMomentMatching": lambda: mfx.Objective(mfx.InductiveMomentMatching(), **PAIRS),
    "TerminalVelocityMatching": lambda: mfx.Objective(mfx.TerminalVelocityMatching(), **PAIRS),
}


def train(objective, devices, fsdp):
    """All numbers of a state after three steps."""
    averages = [mfx.ExponentialAverage(0.5)]
    parallelism = None
    if devices > 1:
        parallelism = mfx.Parallelism(devices // fsdp, fsdp, least_size=64, devices=jax.devices()[:devices])
    step = mfx.TrainStep(objective, optax.sgd(0.1), averages, parallelism=parallelism, teacher=0)

    def make():
        field = mfx.nn.cast(mfx.MLP(2, width=16, depth=1, key=jr.key(0)), jnp.float64)
        return mfx.init_state(field, step.optimizer, averages, objective, key=jr.key(1))

    state = make() if parallelism is None else parallelism.make(make)
    for seed in range(3):
        batch = mfx.Batch(np.random.default_rng(seed).standard_normal((64, 2)))
        state, _ = step(state, batch if parallelism is None else parallelism.place(batch))
    numbers = eqx.filter((state.field, state.averages, state.objective), eqx.is_inexact_array)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(numbers)]


def main():
    found = {}
    with jax.enable_x64(True):
        for name, make in OBJECTIVES.items():
            pairs = zip(train(make(), 1, 1), train(make(), 8, 4), strict=True)
            found[name] = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
