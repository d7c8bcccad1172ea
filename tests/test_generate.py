"""Many samples: each follows from the key and its number alone, on any devices."""

import concurrent.futures
import contextlib
import functools
import socket

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from devices import run_on_devices
from fields import filled

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


def guided_samples():
    """Of a network, guided, in one batch of eight."""
    field = filled(lambda: mfx.DiT((3, 8, 8), mfx.DiTSize(1, 8, 2, 4), labels=LABELS, key=jr.key(0)))
    guided = mfx.GuidedField(field, 2, jnp.asarray(LABELS))
    (samples,) = mfx.Generator(guided, jr.key(4), (3, 8, 8), labels=LABELS).batches(8, 8, mfx.Parallelism())
    return np.asarray(samples)


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


def test_new_noise_of_a_sample_follows_from_key_and_number():
    generator = make_generator(labels=None, method=mfx.sample_consistency)
    found = generator([0, 1, 2])

    def with_key(number):
        key = jr.split(jr.fold_in(jr.key(4), number), 3)[2]
        return by_hand(number, functools.partial(mfx.sample_consistency, key=key))

    np.testing.assert_allclose(found, [with_key(number) for number in range(3)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(generator([2]), found[2:], rtol=1e-6)  # XLA joins products and sums as rows allow
    eps = jax.vmap(lambda number: generator.inputs(number)[0])(jnp.arange(3))
    np.testing.assert_array_equal(generator.from_noise(eps), found)


def test_samples_do_not_depend_on_the_batch():
    np.testing.assert_allclose(first_samples(14), first_samples(4), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("generate_on_devices.py")


@pytest.mark.rehearsal
def test_samples_are_the_same_on_one_and_on_eight_devices(on_devices):
    assert on_devices["devices"] == 8 and on_devices["spread"]
    np.testing.assert_allclose(on_devices["samples"], guided_samples().ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.rehearsal
def test_each_of_two_processes_has_its_part_of_a_batch():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda number: run_on_devices("generate_on_devices.py", address, number), range(2)))
    np.testing.assert_allclose(np.concatenate(found), first_samples(16, count=16).ravel(), rtol=1e-5, atol=1e-6)


def test_samples_do_not_depend_on_whether_float64_is_allowed(network):
    expected = mfx.Generator(network, jr.key(4), (2,), labels=LABELS)(range(9))
    with jax.enable_x64(True):
        found = mfx.Generator(network, jr.key(4), (2,), labels=LABELS)(range(9))
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_noise_of_a_field_in_float64_is_in_float64(x64):
    assert make_generator().field.weight.dtype == make_generator().inputs(0)[0].dtype == jnp.float64


@pytest.mark.parametrize(
    ("count", "batch", "message"),
    [(4, 0, "batch must be an integer >= 1, got 0"), (-1, 4, "count must be an integer >= 0, got -1")],
)
def test_numbers_that_make_no_batches_are_refused_at_once(count, batch, message):
    with pytest.raises(ValueError, match=message):
        make_generator().batches(count, batch, mfx.Parallelism())


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


def test_given_noise_labels_and_numbers_may_be_lists():
    eps = np.asarray(jr.normal(jr.key(2), (2, *SHAPE)))
    generator = make_generator()
    expected = generator.from_noise(jnp.asarray(eps), jnp.asarray([2, 0]))
    np.testing.assert_array_equal(generator.from_noise(eps.tolist(), [2, 0]), expected)
    np.testing.assert_array_equal(generator.from_noise(eps, np.asarray([2, 0])), expected)
    np.testing.assert_array_equal(generator([3, 1]), generator(jnp.asarray([3, 1])))
    np.testing.assert_allclose(jax.jit(lambda i: generator([3, i]))(1), generator([3, 1]), rtol=1e-6)


def test_number_of_labels_may_be_numpys():
    assert type(make_generator(labels=np.int64(LABELS)).labels) is int


def test_inputs_of_a_number_of_python_are_those_of_an_array():
    for found, expected in zip(make_generator().inputs(5), make_generator().inputs(jnp.asarray(5)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0}, "labels must be an integer >= 1, got 0"),
        ({"labels": None, "balanced": True}, "labels must be given if balanced is True, got None"),
        ({"times": (0, 1)}, "times must be a strictly decreasing sequence"),
        ({"data_shape": (2, -1)}, r"data_shape must be of integers >= 1, got \(2, -1\)"),
    ],
)
def test_what_makes_no_samples_is_refused_at_once(options, message):
    options = {"data_shape": SHAPE, "labels": LABELS, **options}
    with pytest.raises(ValueError, match=message):
        mfx.Generator(make_field(), jr.key(4), **options)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1.7, 1.2], r"numbers must be integers with one axis, got float64 of shape \(2,\)"),
        (3, r"numbers must be integers with one axis, got int64 of shape \(\)"),
        (np.array([5, 2**32 + 5]), r"numbers must be in \[0, 2\^31\), got 5 to 4294967301"),
        ([-1], r"numbers must be in \[0, 2\^31\), got -1 to -1"),
    ],
)
def test_numbers_that_are_none_of_samples_are_refused(unchecked, numbers, message):
    with pytest.raises(ValueError, match=message):
        make_generator()(numbers)


@pytest.mark.parametrize("options", [{}, {"labels": None, "condition": np.ones(3)}])
def test_condition_is_given_where_there_is_one(options):
    with pytest.raises(
        ValueError, match="condition must be given for a generator with labels or a condition, got None"
    ):
        make_generator(**options).from_noise(jnp.zeros((1, *SHAPE)))


# Labels that the network lacks


@pytest.fixture(scope="module")
def network():
    return filled(lambda: mfx.MLP(2, width=8, depth=1, labels=LABELS, key=jr.key(0)))


@pytest.mark.parametrize(
    ("options", "name", "got"),
    [
        ({"labels": 4}, "labels", 4),
        ({"condition": np.array([0, 99])}, "condition", 99),
        ({"condition": np.array([-1, 2])}, "condition", -1),
    ],
    ids=range(3),
)
@pytest.mark.parametrize("guided", [False, True])
def test_labels_that_the_network_lacks_are_refused(network, options, name, got, guided):
    field = mfx.GuidedField(network, 2, LABELS) if guided else network
    message = rf"{name} must lie in \[0, 3\] for a network with 3 labels, got {got}"
    with pytest.raises(ValueError, match=message):
        mfx.Generator(field, jr.key(0), (2,), **options)


def test_labels_beside_noise_that_the_network_lacks_are_refused(network):
    generator = mfx.Generator(network, jr.key(0), (2,))
    with pytest.raises(ValueError, match=r"condition must lie in \[0, 3\] for a network with 3 labels, got 4"):
        generator.from_noise(jnp.zeros((2, 2)), np.array([0, 4]))


def test_labels_of_a_unet_are_seen_in_its_condition():
    field = filled(lambda: mfx.UNet((1, 4, 4), mfx.UNetSize(4, (1,), 1, ()), labels=LABELS, key=jr.key(0)))
    condition = mfx.UNetCondition(np.array([0, 4]))
    with pytest.raises(ValueError, match=r"condition must lie in \[0, 3\] for a network with 3 labels, got 4"):
        mfx.Generator(field, jr.key(0), (1, 4, 4), condition=condition)


def test_no_label_and_fewer_labels_than_the_network_has_are_accepted(network):
    assert mfx.Generator(network, jr.key(0), (2,), labels=2).labels == 2
    samples = mfx.Generator(network, jr.key(0), (2,), condition=np.array([LABELS, 0]))([0, 1])
    assert np.isfinite(samples).all()


def test_no_label_beside_noise_is_that_of_a_network_with_more_labels(network):
    eps = jr.normal(jr.key(1), (3, 2))
    found = mfx.Generator(network, jr.key(0), (2,), labels=2).from_noise(eps, [0, 1, 2])
    expected = mfx.Generator(network, jr.key(0), (2,)).from_noise(eps, np.array([0, 1, LABELS]))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("null", [4, -1, np.int32(4), np.asarray(4)])
def test_null_that_the_network_lacks_is_refused(network, null):
    with pytest.raises(ValueError, match=r"null must lie in \[0, 3\] for a network with 3 labels, got"):
        mfx.GuidedField(network, 2, null)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_numbers_of_few_bits_have_the_conditions_of_others(dtype, unchecked):
    condition = jnp.arange(300.0)
    generator = mfx.Generator(make_field(), jr.key(4), SHAPE, condition=condition)
    assert generator.inputs(jnp.asarray(100, dtype))[1] == 100
    np.testing.assert_array_equal(generator(jnp.asarray([100], dtype)), generator([100]))


@pytest.mark.parametrize(("name", "value"), [("times", (1.0, 0.5, 0.0)), ("unroll", True), ("key", 0)])
def test_a_method_with_what_the_generator_gives_is_refused(name, value):
    with pytest.raises(ValueError, match=f"method must leave {name} to the generator, got functools.partial"):
        make_generator(labels=None, method=functools.partial(mfx.sample_consistency, **{name: value}))


def test_a_method_that_is_no_function_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"method must be a function such as mfx\.sample, got 'heun'"):
        mfx.Generator(make_field(), jr.key(4), SHAPE, method="heun")
