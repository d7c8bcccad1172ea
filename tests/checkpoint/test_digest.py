"""A digest sees every bit and every place of an array, and not how the array lies on devices."""

import itertools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from devices import run_on_devices

from mf_eqx.checkpoint import digests

DTYPES = [np.float32, jnp.bfloat16, np.float64, np.float16, np.int8, np.int32, np.uint32, np.int64, np.complex64]
KINDS = [np.dtype(dtype).name for dtype in DTYPES]


def digest(array):
    (found,) = digests({"a": array}).values()
    return found


def filled(dtype, shape=(3, 4)):
    """Any bits, some of which are no numbers."""
    content = np.random.default_rng(0).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(content, dtype).reshape(shape)


def flipped(array, bit):
    content = bytearray(array.tobytes())
    content[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(content), array.dtype).reshape(array.shape)


def at_place(array, change, place):
    changed = array.copy()
    changed[place] = change(array)
    return changed


# What is seen


@pytest.mark.parametrize("dtype", DTYPES, ids=KINDS)
def test_every_flipped_bit_is_seen(x64, dtype):
    array = filled(dtype)
    before = digest(jnp.asarray(array))
    assert digest(jnp.asarray(array)) == before
    unseen = [bit for bit in range(8 * array.nbytes) if digest(jnp.asarray(flipped(array, bit))) == before]
    assert unseen == []


@pytest.mark.parametrize("dtype", DTYPES, ids=KINDS)
def test_two_elements_that_change_places_are_seen(x64, dtype):
    array = filled(dtype)
    before, unseen = digest(jnp.asarray(array)), []
    for first, second in itertools.combinations(range(array.size), 2):
        swapped = array.flatten()
        swapped[[first, second]] = swapped[[second, first]]
        swapped = swapped.reshape(array.shape)
        if swapped.tobytes() != array.tobytes() and digest(jnp.asarray(swapped)) == before:
            unseen.append((first, second))
    assert unseen == []


def test_any_two_signs_that_flip_are_seen():
    """Highest bits of two words: factors that depend on the place, and no more, would let them cancel."""
    array = filled(np.float32)
    before, unseen = digest(jnp.asarray(array)), []
    for first, second in itertools.combinations(range(array.size), 2):
        if digest(jnp.asarray(flipped(flipped(array, 32 * first + 31), 32 * second + 31))) == before:
            unseen.append((first, second))
    assert unseen == []


def test_halves_of_a_long_element_that_change_places_are_seen(x64):
    array = filled(np.float64, (1,))
    assert digest(jnp.asarray(array)) != digest(jnp.asarray(array.view(np.uint32)[::-1].copy().view(np.float64)))


def test_every_flipped_bool_is_seen():
    array = np.random.default_rng(0).random((3, 4)) < 0.5
    changed = [digest(jnp.asarray(at_place(array, lambda a, p=p: ~a[p], p))) for p in np.ndindex(array.shape)]
    assert digest(jnp.asarray(array)) not in changed


def test_every_flipped_bit_of_random_keys_is_seen():
    keys = jr.split(jr.key(0), 2)
    data = np.asarray(jr.key_data(keys))
    changed = [digest(jr.wrap_key_data(jnp.asarray(flipped(data, bit)))) for bit in range(8 * data.nbytes)]
    assert digest(keys) not in changed


def test_zero_and_minus_zero_differ():
    assert digest(jnp.zeros(())) != digest(-jnp.zeros(()))


def test_nan_has_a_digest():
    assert digest(jnp.array([jnp.nan])) == digest(jnp.array([jnp.nan])) != digest(jnp.array([jnp.inf]))


def test_whole_zeroed_array_is_seen():
    array = filled(np.float32, (64, 64))
    assert digest(jnp.asarray(array)) != digest(jnp.zeros((64, 64)))


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.bool_], ids=["float32", "int8", "bool"])
def test_scalar_has_the_digest_of_its_value(dtype):
    zero, one = (jnp.asarray(value, dtype) for value in (0, 1))
    assert digest(zero) == digest(jnp.asarray(0, dtype)) != digest(one)


def test_empty_array_has_a_digest():
    assert digest(jnp.zeros((0, 3))) == 0


# Of what


def test_digests_go_by_the_paths_of_arrays_alone():
    tree = {"a": [jnp.ones(2), "text"], "b": (None, 3.0), "c": jr.key(0)}
    assert list(digests(tree)) == ["['a'][0]", "['c']"]


def test_digest_of_a_leaf_does_not_depend_on_other_leaves():
    a, b = jnp.arange(3.0), jnp.arange(4.0)
    assert digests({"a": a, "b": b})["['a']"] == digests({"a": a})["['a']"]


def test_digest_fits_32_bits():
    assert all(0 <= digest(jnp.full((n,), -1.0)) < 2**32 for n in range(1, 9))


# Where it lies


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("checkpoint/digest_on_devices.py")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns", "both", "copies"])
def test_digests_are_those_of_one_device(on_devices, layout):
    assert on_devices[layout] == on_devices["one"]


@pytest.mark.slow
def test_digests_are_equal_in_another_process(on_devices, x64):
    """And the arrays differ, or equal digests would say nothing."""
    assert len(set(on_devices["one"].values())) == len(on_devices["one"])
    assert on_devices["one"]["['zeros']"] == digest(jnp.zeros((8, 8)))
    assert on_devices["one"]["['keys']"] == digest(jr.split(jr.key(0), (8, 4)))
    assert on_devices["one"]["['scalar']"] == digest(jnp.asarray(3.0))
