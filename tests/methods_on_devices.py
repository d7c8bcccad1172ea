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
        (mfx.FrechetLoss(np.ones(2), np.eye(2), population=mfx.QueuedPopulation(100), refresh=2), mfx.Drifting())
    ),
    # Each device has 8 rows, so that a group lies on two.
    "RewardObjective": lambda: mfx.RewardObjective(
        lambda x, condition: x[0] - x[1] ** 2,
        group=16,
        reference=mfx.MLP(2, width=16, depth=1, key=jr.key(2)),
        anchor=0.5,
    ),
    "InductiveMomentMatching": lambda: mfx.Objective(mfx.InductiveMomentMatching(), **PAIRS),
    "TerminalVelocityMatching": lambda: mfx.Objective(mfx.TerminalVelocityMatching(), **PAIRS),
}


def with_network_of_features(parallelism):
    """As post_train.py makes it: arrays of a network, on all devices."""
    network = mfx.nn.cast(eqx.nn.MLP(2, 3, 8, 1, key=jr.key(5)), jnp.float32)
    moments = np.ones(3, np.float32), np.eye(3, dtype=np.float32)
    loss = mfx.FrechetLoss(*moments, network, mfx.RunningPopulation(0.5), refresh=2)
    return mfx.SampleObjective(loss if parallelism is None else parallelism.replicate(loss))


def train(make_objective, devices, fsdp, dtype=jnp.float64):
    """All numbers of a state after three steps."""
    averages = [mfx.ExponentialAverage(0.5)]
    parallelism = None
    if devices > 1:
        parallelism = mfx.Parallelism(devices // fsdp, fsdp, least_size=64, devices=jax.devices()[:devices])
    objective = make_objective(parallelism)
    step = mfx.TrainStep(objective, optax.sgd(0.1), averages, parallelism=parallelism, teacher=0)

    def make():
        field = mfx.nn.cast(mfx.MLP(2, width=16, depth=1, key=jr.key(0)), dtype)
        return mfx.init_state(field, step.optimizer, averages, objective, key=jr.key(1))

    state = make() if parallelism is None else parallelism.make(make)
    for seed in range(3):
        batch = mfx.Batch(np.random.default_rng(seed).standard_normal((64, 2)).astype(dtype))
        state, _ = step(state, batch if parallelism is None else parallelism.place(batch))
    numbers = eqx.filter((state.field, state.averages, state.objective), eqx.is_inexact_array)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(numbers)]


def difference(runs):
    """The largest of two runs, relative in arrays with numbers above 1."""
    return max(float(np.max(np.abs(a - b)) / max(1, np.abs(a).max())) for a, b in zip(*runs, strict=True))


def main():
    found = {}
    with jax.enable_x64(True):
        for name, make in OBJECTIVES.items():
            found[name] = difference(train(lambda _, make=make: make(), *devices) for devices in ((1, 1), (8, 4)))
    with jax.enable_x64(False):
        runs = (train(with_network_of_features, *devices, jnp.float32) for devices in ((1, 1), (8, 4)))
        found["float32"] = difference(runs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
