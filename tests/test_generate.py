"""Many samples: each follows from the key and its number alone, on any devices."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from devices import run_on_devices

import mf_eqx as mfx

LABELS, SHAPE, TIMES = 3, (2, 4), (1.0, 0.5, 0.0)


class Field(mfx.AbstractField):
    """Depends on everything, and is not linear."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        assert key is None  # a sampler must not switch dropout on
        label = -1.0 if condition is None else condition
        return jnp.sin(z @ self.weight + 2 * r - t) + 0.1 * label


def make_field():
    return Field(jr.normal(jr.key(1), (4, 4)))


def make_generator(field=None, **options):
    options = {"times": TIMES, "labels": LABELS, **options}
    return mfx.Generator(make_field() if field is None else field, jr.key(4), SHAPE, **options)


def first_samples(batch, count=14, **options):
    devices = mfx.Parallelism()
    generator = make_generator(devices.replicate(make_field()), **options)
    return np.concatenate([np.asarray(x) for x in generator.batches(count, batch, devices)])[:count]


def by_hand(number, method=mfx.sample, label=None):
    """One sample, with a label that is given."""
    eps = jr.normal(jr.split(jr.fold_in(jr.key(4), number))[0], SHAPE)
    return method(make_field(), eps, label, times=TIMES)


def test_sample_follows_from_key_and_number():
    found = first_samples(5, count=5, labels=None)
    np.testing.assert_allclose(found, [by_hand(i) for i in range(5)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [mfx.sample_euler, mfx.sample_heun])
def test_methods_along_the_velocity_are_its_solvers(method):
    found = first_samples(3, count=3, balanced=True, method=method)
    np.testing.assert_allclose(found, [by_hand(i, method, i) for i in range(3)], rtol=1e-5, atol=1e-6)


def test_samples_do_not_depend_on_the_batch():
    np.testing.assert_allclose(first_samples(14), first_samples(4), rtol=1e-6, atol=1e-6)


def test_samples_are_the_same_on_one_and_on_eight_devices():
    found = run_on_devices("generate_on_devices.py")
    assert found["devices"] == 8 and found["spread"]
    np.testing.assert_allclose(found["samples"], first_samples(8).ravel(), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        next(make_generator().batches(4, 0, mfx.Parallelism()))


def test_last_batch_is_whole():
    assert [len(x) for x in make_generator().batches(5, 4, mfx.Parallelism())] == [4, 4]


def labels_of(numbers, **options):
    generator = make_generator(**options)
    return jax.jit(jax.vmap(lambda i: generator.inputs(i)[1]))(numbers)


def test_random_labels_are_uniform():
    assert np.abs(np.bincount(labels_of(jnp.arange(3000)), minlength=3) - 1000).max() < 100  # 4 standard deviations


def test_balanced_labels_take_turns():
    np.testing.assert_array_equal(labels_of(jnp.arange(7), balanced=True), [0, 1, 2, 0, 1, 2, 0])


def test_given_noise_is_used():
    eps = jr.normal(jr.key(2), (2, *SHAPE))
    found = make_generator(times=(1, 0)).from_noise(eps, jnp.asarray([2, 0]))
    one, zero = jnp.ones(()), jnp.zeros(())
    expected = [eps[i] - make_field()(eps[i], zero, one, label) for i, label in enumerate((2, 0))]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0}, "labels must be >= 1 or None, got 0"),
        ({"labels": None, "balanced": True}, "labels must be given to be balanced, got None"),
    ],
)
def test_labels_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_generator(**options)
