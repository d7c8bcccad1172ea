"""Losses on samples, from a briefly trained MeanFlow to a better generator of points whose density is known."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import exact, metrics

pytestmark = pytest.mark.slow
MIXTURE = exact.eight_gaussians()
AVERAGES = [mfx.ExponentialAverage(0.99)]
COUNT = 10_000


def draw(key):
    return mfx.Batch(exact.draw(MIXTURE, 256, key))


def trained(objective, field, optimizer, steps=300):
    """The average after so many steps."""
    step = mfx.TrainStep(objective, optimizer, AVERAGES)
    state = mfx.init_state(field, optimizer, AVERAGES, objective, key=jr.key(1))
    if isinstance(objective, mfx.SampleObjective):
        batches = map(draw, jr.split(jr.key(2), objective.batches_to_fill(256)))
        state = dataclasses.replace(state, objective=objective.fill(field, batches, key=jr.key(3)))
    return mfx.scan_steps(step, state, draw, steps)[0].averages[0]


def judged(field):
    """Total variation to the density, sliced W2 and Frechet distance to the data, of samples in one step."""
    x = jax.vmap(lambda eps: mfx.sample(field, eps))(jr.normal(jr.key(5), (COUNT, 2)))
    data = exact.draw(MIXTURE, COUNT, jr.key(6))
    limit = 1.05 * float(jnp.max(jnp.abs(MIXTURE.mean)) + 3 * jnp.max(MIXTURE.std))
    variation = metrics.total_variation(x, MIXTURE.log_density, low=(-limit, -limit), high=(limit, limit))
    distance = metrics.frechet_distance(np.asarray(x), np.asarray(data))
    return float(variation), float(metrics.sliced_wasserstein(x, data, key=jr.key(7))), distance


@pytest.fixture(scope="module")
def start():
    objective = mfx.Objective(
        time_pairs=mfx.TimePairs(mfx.UniformTimes()), identity_share=0.5, weight=mfx.ConstantWeight()
    )
    return trained(objective, mfx.MLP(2, width=64, depth=3, key=jr.key(0)), optax.adam(3e-3))


def post_trained(loss, start, rate):
    schedule = optax.warmup_cosine_decay_schedule(0, rate, 50, 300, 0)
    return judged(trained(mfx.SampleObjective(loss), start, optax.adam(schedule)))


def test_frechet_loss_of_points_lowers_the_distance_of_moments_and_leaves_the_modes_as_they_were(start):
    points = np.asarray(exact.draw(MIXTURE, 200_000, jr.key(8)), np.float64)
    loss = mfx.FrechetLoss(points.mean(axis=0), np.cov(points.T), population=mfx.RunningPopulation(0.9))
    before, after = judged(start), post_trained(loss, start, 3e-4)
    assert after[2] < before[2] / 100, (before, after)
    for old, new in zip(before[:2], after[:2], strict=True):  # total variation and sliced W2 see more than moments
        assert abs(new - old) < 0.1 * old, (before, after)


def test_drifting_of_points_halves_a_distance_of_distributions_and_lowers_the_total_variation(start):
    before, after = judged(start), post_trained(mfx.Drifting(), start, 1e-3)
    assert after[0] < 0.75 * before[0] and after[1] < before[1] / 2, (before, after)
