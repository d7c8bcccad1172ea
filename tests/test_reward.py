"""Sampling towards a reward: against linear maps by hand, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import exact

pytestmark = pytest.mark.usefixtures("x64")

MEAN, STD = np.array([1.0, -0.5, 0.3]), 0.4
OPERATOR, OBSERVED = np.array([[1.0, 0.5, 0.0], [0.0, -0.3, 0.8]]), np.array([0.2, -1.0])
GRIDS = [(1.0, 0.0), (1.0, 0.4), (0.7, 0.2), (0.7, 0.0)]


def gaussian():
    return exact.GaussianAverageVelocity(jnp.asarray(MEAN), STD)


def squared_error(x):
    return -jnp.sum((OBSERVED - OPERATOR @ x) ** 2) / 2


def noise(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape or (3,)))


def guided(eps, field=None, **options):
    options = {"reward": squared_error, "scale": 0.7, **options}
    return mfx.sample_with_reward(gaussian() if field is None else field, eps, **options)


def rewards(x):
    return np.asarray(jax.vmap(squared_error)(x))


# By hand: the flow of N(m, s^2 I), and gradient steps of a squared error, are linear


def sigma(t):
    return np.sqrt((1 - t) ** 2 * STD**2 + t**2)


def flow(z, r, t):
    return (1 - r) * MEAN + sigma(r) / sigma(t) * (z - (1 - t) * MEAN)


def climbed(start, slope, offset, scale, iterations):
    """Gradient steps of -|y - A (slope z + offset)|^2 / 2 by z."""
    for _ in range(iterations):
        start = start + scale * slope * OPERATOR.T @ (OBSERVED - OPERATOR @ (slope * start + offset))
    return start


@pytest.mark.parametrize("times", GRIDS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_step_changes_the_look_ahead_by_gradients_of_the_reward(times, iterations):
    (t, r), z = times, np.asarray(noise())
    ahead = flow(z, 0, t)
    change = climbed(ahead, 1, 0, 0.7, iterations) - ahead
    found = guided(z, times=times, iterations=iterations)
    np.testing.assert_allclose(found, flow(z, r, t) + t * (1 - r) * change, rtol=1e-12)


@pytest.mark.parametrize("times", GRIDS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_step_through_the_field_changes_the_state_by_gradients_of_the_reward_of_the_look_ahead(times, iterations):
    (t, r), z = times, np.asarray(noise())
    slope, offset = STD / sigma(t), MEAN - STD / sigma(t) * (1 - t) * MEAN
    change = climbed(z, slope, offset, 0.7, iterations) - z
    found = guided(z, times=times, iterations=iterations, through_field=True)
    np.testing.assert_allclose(found, flow(z, r, t) + (t - r) * change, rtol=1e-12)


def test_a_straight_step_leads_towards_the_look_ahead():
    t, r, z = 0.9, 0.3, np.asarray(noise())
    ahead = flow(z, 0, t)
    change = climbed(ahead, 1, 0, 0.7, 1) - ahead
    expected = r / t * z + (1 - r / t) * ahead + t * (1 - r) * change
    np.testing.assert_allclose(guided(z, times=(t, r), straight=True), expected, rtol=1e-12)


def test_many_iterations_in_one_step_fit_the_observation():
    """The nearest of all points that do so."""
    x = flow(np.asarray(noise()), 0, 1)
    expected = x + np.linalg.pinv(OPERATOR) @ (OBSERVED - OPERATOR @ x)
    np.testing.assert_allclose(guided(noise(), iterations=200), expected, rtol=1e-10)


def test_samples_with_the_mean_of_the_posterior_have_less_than_its_variance():
    variance, observed = 0.09, 1.5
    gain = STD**2 / (STD**2 + variance)
    field, eps = exact.GaussianAverageVelocity(jnp.zeros(1), STD), noise(20_000, 1)

    def reward(x):
        return -jnp.sum((observed - x) ** 2) / 2

    x = jax.vmap(lambda eps: mfx.sample_with_reward(field, eps, reward=reward, scale=gain))(eps)
    np.testing.assert_allclose(x.mean(), gain * observed, atol=0.004)
    np.testing.assert_allclose(x.var(), (1 - gain) ** 2 * STD**2, rtol=0.05)  # the posterior: (1 - gain) STD^2


# Any field


@pytest.mark.parametrize("through_field", [False, True])
@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.6, 0.3, 0.0), (0.8, 0.1)])
def test_scale_zero_is_sampling_without_reward(times, through_field):
    found = guided(noise(), scale=0, times=times, through_field=through_field)
    np.testing.assert_allclose(found, mfx.sample(gaussian(), noise(), times=times), rtol=1e-14)


def with_reward(field, eps, **options):
    return guided(eps, field, **options)


@functools.cache
def found_by(draw, **options):
    """Rewards of twenty samples of a network in four steps."""
    field, times = filled(lambda: mfx.MLP(3, width=8, depth=1, key=jr.key(1))), mfx.uniform_times(4)
    return np.asarray(
        jax.jit(jax.vmap(lambda eps: squared_error(draw(field, eps, times=times, **options))))(noise(20, 3))
    )


@pytest.mark.parametrize("options", [{}, {"through_field": True}, {"straight": True}, {"iterations": 4}], ids=str)
def test_more_of_a_reward_is_found_with_guidance(options):
    plain, found = found_by(mfx.sample), found_by(with_reward, **options)
    assert (found > plain).all() and found.mean() > plain.mean() / 2


class Counted(mfx.AbstractField):
    """Evaluations, as they are seen while a program runs."""

    seen: list

    def __call__(self, z, r, t, condition=None, *, key=None):
        assert key is None  # a sampler must not switch dropout on
        jax.debug.callback(lambda r, t: self.seen.append((float(r), float(t))), r, t)
        return gaussian()(z, r, t)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 1), (0.5, 1), (0, 0.5)]),
        ({"iterations": 5}, [(0, 1), (0.5, 1), (0, 0.5)]),
        ({"straight": True}, [(0, 1), (0, 0.5)]),
        ({"straight": True, "through_field": True}, [(0, 1), (0, 0.5)]),
        ({"through_field": True, "iterations": 3}, [*[(0, 1)] * 3, (0.5, 1), *[(0, 0.5)] * 3]),
    ],
    ids=str,
)
def test_a_step_takes_as_many_evaluations_as_it_says(options, expected):
    seen = []
    guided(noise(), Counted(seen), times=(1.0, 0.5, 0.0), **options)
    jax.effects_barrier()
    assert sorted(seen) == sorted(expected)


class Labelled(mfx.AbstractField):
    def __call__(self, z, r, t, condition=None, *, key=None):
        return (z - condition) / t


def test_condition_reaches_the_field():
    x = guided(noise(), Labelled(), condition=jnp.array([3.0, 2.0, 1.0]), scale=0)
    np.testing.assert_allclose(x, [3, 2, 1], rtol=1e-14)


def test_a_generator_takes_it_as_its_method():
    method = functools.partial(mfx.sample_with_reward, reward=squared_error, scale=0.7)
    generator = mfx.Generator(gaussian(), jr.key(1), (3,), mfx.uniform_times(2), method=method)
    eps = jax.vmap(lambda number: generator.inputs(number)[0])(jnp.arange(4))
    expected = jax.vmap(lambda eps: guided(eps, times=mfx.uniform_times(2)))(eps)
    np.testing.assert_allclose(generator(range(4)), expected, rtol=1e-12)


@pytest.mark.parametrize("through_field", [False, True])
def test_a_reward_may_depend_on_the_example_and_the_scale_be_traced(through_field):
    @jax.jit
    def each(eps, observed, scale):
        def one(eps, observed):
            return guided(
                eps,
                reward=lambda x: -jnp.sum((x - observed) ** 2),
                scale=scale,
                through_field=through_field,
                times=mfx.uniform_times(3),
                iterations=2,
            )

        return jax.vmap(one)(eps, observed)

    eps, observed = noise(5, 3), jr.normal(jr.key(3), (5, 3))
    found = each(eps, observed, 0.3)
    for i in range(5):
        options = {"through_field": through_field, "times": mfx.uniform_times(3), "iterations": 2, "scale": 0.3}
        expected = guided(eps[i], reward=lambda x, i=i: -jnp.sum((x - observed[i]) ** 2), **options)
        np.testing.assert_allclose(found[i], expected, rtol=1e-12)


@pytest.mark.parametrize("through_field", [False, True])
def test_samples_keep_the_precision_of_the_noise_under_strict_promotion(through_field):
    field = exact.GaussianAverageVelocity(jnp.zeros(2, jnp.float32), 0.5)
    options = {"reward": lambda x: jnp.sum(x), "through_field": through_field, "iterations": 2}
    with jax.numpy_dtype_promotion("strict"):
        for eps, scale in ((jnp.ones(2, jnp.float32), 0.5), (jnp.ones(2, jnp.bfloat16), 1), ([0, 1], np.float64(0.5))):
            with jax.enable_x64(False):
                x = guided(eps, field, scale=scale, times=(1.0, 0.5, 0.0), **options)
            assert x.dtype == jnp.float32


@pytest.mark.parametrize("through_field", [False, True])
def test_unrolled_steps_are_the_same(through_field):
    options = {"times": mfx.uniform_times(4), "through_field": through_field}
    np.testing.assert_allclose(guided(noise(), unroll=True, **options), guided(noise(), **options), rtol=1e-14)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": 3.0}, "reward must be a function of one example, got 3.0"),
        ({"reward": lambda x: x}, r"reward must be a real floating-point scalar, got float64 of shape \(3,\)"),
        ({"reward": lambda x: jnp.sum(x > 0)}, "reward must be a real floating-point scalar, got"),
        ({"scale": -1.0}, "scale must be >= 0 and finite, got -1.0"),
        ({"scale": float("inf")}, "scale must be >= 0 and finite, got inf"),
        ({"scale": np.ones(2)}, r"scale must be one number of shape \(\), got shape \(2,\)"),
        ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
        ({"iterations": 1.5}, "iterations must be an integer >= 1, got 1.5"),
        ({"times": (0.0, 1.0)}, "times must be a strictly decreasing sequence"),
    ],
)
@pytest.mark.parametrize("through_field", [False, True])
def test_wrong_arguments_are_refused(unchecked, options, message, through_field):
    with pytest.raises(ValueError, match=message):
        guided(noise(), through_field=through_field, **options)


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_a_field_of_forward_mode_alone_is_guided_but_not_through_itself(wrap):
    mixture = exact.GaussianMixture(jnp.asarray(MEAN)[None], STD)
    field = exact.AverageVelocity(exact.MarginalVelocity(mixture))
    found = wrap(lambda eps: guided(eps, field))(noise())
    np.testing.assert_allclose(found, guided(noise()), rtol=1e-8)
    with pytest.raises(ValueError, match="through_field must be False for a field that reverse mode cannot different"):
        wrap(lambda eps: guided(eps, field, through_field=True))(noise())
