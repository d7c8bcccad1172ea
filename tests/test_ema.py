import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx


class Pair(mfx.AbstractField):
    weight: jax.Array
    count: jax.Array  # not a parameter
    name: str = "pair"

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight * z


def pair(weight, dtype=jnp.float32):
    return Pair(jnp.asarray(weight, dtype), jnp.asarray(3))


def test_average_starts_as_a_copy_in_buffers_of_its_own():
    field = pair([1.0, 2.0])
    average = mfx.ExponentialAverage(0.9).init(field)
    for copy, leaf in ((average.weight, field.weight), (average.count, field.count)):
        np.testing.assert_array_equal(copy, leaf)
        assert copy.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
    assert average.name == "pair"


def test_update_is_a_weighted_mean_of_average_and_parameters(x64):
    rule = mfx.ExponentialAverage(0.9)
    average = rule.update(pair([1.0, 2.0], jnp.float64), pair([3.0, -2.0], jnp.float64), jnp.asarray(1))
    np.testing.assert_allclose(average.weight, [0.9 * 1 + 0.1 * 3, 0.9 * 2 - 0.1 * 2], rtol=1e-14)
    assert average.count == 3


def test_many_updates_have_the_closed_form(x64):
    rule, average = mfx.ExponentialAverage(0.8), pair([5.0], jnp.float64)
    values = np.random.default_rng(0).standard_normal(20)
    for step, value in enumerate(values, start=1):
        average = rule.update(average, pair([value], jnp.float64), jnp.asarray(step))
    expected = 0.8**20 * 5 + 0.2 * sum(0.8 ** (20 - n) * value for n, value in enumerate(values, start=1))
    np.testing.assert_allclose(average.weight, [expected], rtol=1e-12)


def test_interval_updates_every_kth_step_with_the_kth_power_of_the_decay(x64):
    rule, average = mfx.ExponentialAverage(0.9, interval=4), pair([1.0], jnp.float64)
    for step in (1, 2, 3, 5, 7):
        assert rule.update(average, pair([2.0], jnp.float64), jnp.asarray(step)).weight == 1
    for step in (4, 8):
        moved = rule.update(average, pair([2.0], jnp.float64), jnp.asarray(step)).weight
        np.testing.assert_allclose(moved, [0.9**4 * 1 + (1 - 0.9**4) * 2], rtol=1e-14)


def test_average_of_equal_parameters_does_not_move():
    field = pair([0.1, 0.7])
    average = mfx.ExponentialAverage(0.9999).update(field, field, jnp.asarray(1))
    np.testing.assert_array_equal(average.weight, field.weight)


def test_decay_of_zero_is_the_last_parameters():
    average = mfx.ExponentialAverage(0.0).update(pair([1.0]), pair([3.0]), jnp.asarray(1))
    np.testing.assert_array_equal(average.weight, [3])


def test_average_of_bfloat16_parameters_is_kept_in_float32():
    rule = mfx.ExponentialAverage(0.999)
    field = pair([1.0], jnp.bfloat16)
    average = rule.update(rule.init(field), pair([2.0], jnp.bfloat16), jnp.asarray(1))
    assert average.weight.dtype == jnp.float32
    np.testing.assert_allclose(average.weight, [1.001], rtol=1e-6)  # in bfloat16 it would stay at 1


def test_average_of_low_precision_parameters_needs_no_implicit_promotion():
    rule, field = mfx.ExponentialAverage(0.5), pair([1.0], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        average = rule.update(rule.init(field), pair([2.0], jnp.bfloat16), jnp.asarray(1))
    np.testing.assert_array_equal(average.weight, [1.5])


def test_average_is_a_complete_field():
    average = mfx.ExponentialAverage(0.5).init(pair([2.0]))
    assert average(jnp.ones(1), jnp.zeros(()), jnp.ones(())) == 2


def test_the_slowest_decay_in_use_still_moves_in_float32():
    rule, average = mfx.ExponentialAverage(0.99995), pair([1.0])
    for step in range(1, 101):
        average = rule.update(average, pair([2.0]), jnp.asarray(step))
    np.testing.assert_allclose(average.weight, [2 - 0.99995**100], rtol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_outside_of_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        mfx.ExponentialAverage(decay)


def test_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="interval must be an integer >= 1, got 0"):
        mfx.ExponentialAverage(0.9, interval=0)


# Half-lives


def test_half_life_is_that_of_karras_et_al_and_rises_with_the_images_seen(x64):
    rule, batch = mfx.HalfLife(2000, 16), 16
    for step in (1, 2, 10, 2501, 2502, 10**6):
        seen = (step - 1) * batch  # their code averages before it counts the images of the step
        expected = 0.5 ** (batch / max(min(2000, 0.05 * seen), 1e-8))
        np.testing.assert_allclose(rule(jnp.asarray(step)), expected, rtol=1e-12)


def test_half_life_without_ramp_up_halves_the_weight_over_its_images(x64):
    rule, average = mfx.ExponentialAverage(mfx.HalfLife(80, 10, rampup=None)), pair([1.0], jnp.float64)
    for step in range(1, 9):
        average = rule.update(average, pair([3.0], jnp.float64), jnp.asarray(step))
    np.testing.assert_allclose(average.weight, [2.0], rtol=1e-12)


def test_average_with_a_half_life_begins_as_the_parameters_of_the_first_step():
    rule, average = mfx.ExponentialAverage(mfx.HalfLife(500_000, 1024)), pair([1.0])
    for step, value in enumerate([3.0, 7.0], start=1):
        average = rule.update(average, pair([value]), jnp.asarray(step))
    np.testing.assert_allclose(average.weight, [3 * 2**-20 + 7 * (1 - 2**-20)], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 8), "images must be > 0 and finite, got 0.0"),
        ((10.0, 0), "batch must be an integer >= 1, got 0"),
        ((10.0, 8, 0.0), "rampup must be > 0 and finite, got 0.0"),
        ((10.0, 8, float("inf")), "rampup must be > 0 and finite, got inf"),
    ],
)
def test_half_life_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mfx.HalfLife(*arguments)


@pytest.mark.parametrize(("images", "batch", "interval"), [(2e6, 1, 1), (2e6, 16, 3), (1e8, 1, 1)])
def test_a_long_half_life_keeps_the_digits_of_its_share(images, batch, interval):
    """1 - d in float32 would be 3% too large for the first, and 0 for the last."""
    average = mfx.ExponentialAverage(mfx.HalfLife(images, batch, rampup=None), interval)
    found = average.update(pair([0.0], jnp.float32), pair([1.0], jnp.float32), jnp.asarray(interval)).weight
    np.testing.assert_allclose(found, [-np.expm1(-interval * batch / images * np.log(2))], rtol=1e-6)
