"""MeanFlow learns the true average velocity of a mixture of three Gaussians, and it is its identity that does it."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import exact, metrics

PATH = mfx.LinearInterpolant()
PAIRS = mfx.TimePairs(mfx.UniformTimes())
MIXTURE = functools.cache(
    lambda: exact.GaussianMixture(
        jnp.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]]), jnp.array([0.3, 0.5, 0.2]), jnp.array([0.5, 0.2, 0.3])
    )
)


@functools.cache
def fresh():
    return mfx.MLP(2, width=64, depth=2, key=jr.key(0))


@functools.cache
def trained(share):
    """The averaged field after 1,500 steps of batch 256."""
    objective = mfx.Objective(
        mfx.MeanFlow() if share else None, time_pairs=PAIRS, identity_share=share, weight=mfx.ConstantWeight()
    )
    step = mfx.TrainStep(objective, optax.adam(2e-3), [mfx.ExponentialAverage(0.99)])
    state = mfx.init_state(mfx.MLP(2, width=64, depth=2, key=jr.key(0)), step.optimizer, step.averages, key=jr.key(1))
    mixture = MIXTURE()  # made here, since a cache must not keep what a jitted function makes
    draw = jax.jit(jax.vmap(lambda key: mixture.sample(key=key)))
    for i in range(1500):
        state, _ = step(state, mfx.Batch(draw(jr.split(jr.fold_in(jr.key(2), i), 256))))
    return state.averages[0]


@functools.cache
def sinusoids():
    """Sequences of 16 steps: one period of a sine at 16 phases, with a little noise."""
    place = 2 * jnp.pi * jnp.arange(16) / 16
    return exact.GaussianMixture(jnp.sin(place[:, None, None] + place), 0.2)


@functools.cache
def trained_on_sequences():
    """The averaged U-Net after 800 steps of batch 64."""
    size = mfx.UNetSize(width=16, multipliers=(1, 2), blocks=1, attention=(8,))
    objective = mfx.Objective(time_pairs=PAIRS, weight=mfx.ConstantWeight())
    step = mfx.TrainStep(objective, optax.adam(2e-3), [mfx.ExponentialAverage(0.99)])
    field = mfx.UNet((1, 16), size, key=jr.key(0))
    state, mixture = mfx.init_state(field, step.optimizer, step.averages, key=jr.key(1)), sinusoids()
    draw = jax.jit(jax.vmap(lambda key: mixture.sample(key=key)))
    for i in range(800):
        state, _ = step(state, mfx.Batch(draw(jr.split(jr.fold_in(jr.key(2), i), 64))))
    return field, state.averages[0]


def errors(field):
    truth = exact.AverageVelocity(exact.MarginalVelocity(MIXTURE(), PATH), rtol=1e-5, atol=1e-5)
    known = metrics.field_truth(truth, MIXTURE().sample, PATH, PAIRS, 1000, key=jr.key(3))
    return metrics.field_errors(field, known)


def one_step_energy_distance(field):
    x = jax.vmap(lambda eps: mfx.sample(field, eps))(jr.normal(jr.key(4), (4000, 2)))
    data = jax.vmap(lambda key: MIXTURE().sample(key=key))(jr.split(jr.key(5), 4000))
    return metrics.energy_distance(x, data)


@pytest.mark.slow
def test_training_lowers_the_error_against_the_truth():
    before, after = errors(fresh()), errors(trained(0.25))
    assert after.overall.value < before.overall.value / 20  # seen: a 27th
    assert after.one_step.value < before.one_step.value / 5  # seen: 7; the cell that training visits least


@pytest.mark.slow
def test_flow_matching_alone_misses_one_step_sampling():
    without, with_identity = one_step_energy_distance(trained(0)), one_step_energy_distance(trained(0.25))
    assert without > 3 * with_identity  # seen: 78 times


@pytest.mark.slow
def test_u_net_over_sequences_learns_the_average_velocity_of_sinusoids():
    truth = exact.AverageVelocity(exact.MarginalVelocity(sinusoids(), PATH), rtol=1e-5, atol=1e-5)
    known = metrics.field_truth(truth, sinusoids().sample, PATH, PAIRS, 500, key=jr.key(3))
    before, after = (metrics.field_errors(field, known) for field in trained_on_sequences())
    assert after.overall.value < before.overall.value / 10  # seen: a 21st
    assert after.one_step.value < before.one_step.value / 7  # seen: a 12th


@pytest.mark.slow
def test_u_net_over_sequences_makes_sinusoids_of_all_phases_in_one_step():
    x = jax.vmap(lambda eps: mfx.sample(trained_on_sequences()[1], eps))(jr.normal(jr.key(4), (500, 1, 16)))[:, 0]
    waves = jnp.fft.rfft(x) / 8  # the amplitude and phase of each frequency; of noise, 1.3
    assert abs(jnp.abs(waves[:, 1]).mean() - 1) < 0.1  # seen: 0.99
    assert jnp.abs(waves[:, 1].mean()) < 0.15  # seen: 0.03; of one phase, 1
    assert jnp.sum(jnp.abs(waves[:, 2:]) ** 2, axis=1).mean() < 0.2  # seen: 0.087; of the data 0.07, of noise 1.7
