import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx

DRAWS = np.random.default_rng(0)
BATCHES = [DRAWS.standard_normal((8, 3)).astype(np.float32) + shift for shift in range(4)]


def added(population, batches=BATCHES):
    state, moments = population.init(jnp.zeros(3)), None
    for y in batches:
        moments, state = population.add(state, jnp.asarray(y))
    return moments, state


def assert_are(moments, y, weight):
    """Whether they are the moments of these features with these weights."""
    weight = weight / weight.sum()
    np.testing.assert_allclose(moments.mean, weight @ y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.product, (y.T * weight) @ y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999])
def test_running_moments_are_averages_over_steps(decay):
    moments, state = added(mfx.RunningPopulation(decay))
    assert_are(moments, np.concatenate(BATCHES), np.repeat(decay ** np.arange(3.0, -1, -1), 8))
    np.testing.assert_allclose(state.weight, 1 - decay**4, rtol=1e-4)


@pytest.mark.parametrize("size", [8, 10, 16, 31, 32, 100])
def test_queued_moments_are_those_of_the_last_samples(size):
    moments, state = added(mfx.QueuedPopulation(size))
    newest_first = np.concatenate(BATCHES[::-1])[:size]
    assert_are(moments, newest_first, np.ones(len(newest_first)))
    assert state.count == len(newest_first)
    np.testing.assert_array_equal(state.features[: len(newest_first)], newest_first)


def test_a_queue_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="size must be at least the 8 rows of a batch, got 7"):
        added(mfx.QueuedPopulation(7))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        mfx.RunningPopulation(decay)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        mfx.QueuedPopulation(0)


@pytest.mark.parametrize(
    ("population", "count"),
    [
        (mfx.RunningPopulation(0.0), 0),
        (mfx.RunningPopulation(0.9), 30),
        (mfx.QueuedPopulation(8), 1),
        (mfx.QueuedPopulation(17), 3),
    ],
)
def test_a_filled_population_gives_a_batch_the_weight_that_it_will_always_have(population, count):
    assert population.batches_to_fill(8) == count
    y = np.ones((8, 3), np.float32)

    def share(before):
        """Of ones among zeros."""
        return added(population, [*[np.zeros_like(y)] * before, y])[0].mean[0]

    np.testing.assert_allclose(share(count), share(count + 200), rtol=0.06)
