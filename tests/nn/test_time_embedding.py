import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import nn

R, T = 0.25, 0.75


def silu(x):
    return x / (1 + np.exp(-x))


def reference_sinusoid(value, size):
    half = size // 2
    angles = [value * 10_000 ** (-k / half) for k in range(half)]
    return np.array([np.cos(a) for a in angles] + [np.sin(a) for a in angles])


def test_sinusoidal_embedding_is_cosines_then_sines(x64):
    value = jnp.asarray(0.7)
    np.testing.assert_allclose(nn.sinusoidal_embedding(value, 256), reference_sinusoid(0.7, 256), rtol=1e-13)


def test_sinusoidal_embedding_of_zero_is_ones_then_zeros():
    np.testing.assert_array_equal(nn.sinusoidal_embedding(jnp.asarray(0.0), 6), [1, 1, 1, 0, 0, 0])


def test_highest_frequency_is_one_and_the_lowest_nearly_one_over_the_period(x64):
    angles = jnp.arcsin(nn.sinusoidal_embedding(jnp.asarray(1.0), 8, max_period=100.0)[4:])
    np.testing.assert_allclose(angles, 100.0 ** -np.array([0, 0.25, 0.5, 0.75]), rtol=1e-12)


@pytest.mark.parametrize("size", [4, 256])
def test_last_frequency_with_an_endpoint_is_one_over_the_period(x64, size):
    half, value = size // 2, 0.7
    angles = value / 10_000 ** (np.arange(half) / (half - 1))
    found = nn.sinusoidal_embedding(jnp.asarray(value), size, endpoint=True)
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)]), rtol=1e-12)
    np.testing.assert_allclose(np.arcsin(found[-1]), value / 10_000, rtol=1e-12)


def test_only_frequency_with_an_endpoint_is_one(x64):
    found = nn.sinusoidal_embedding(jnp.asarray(0.7), 2, endpoint=True)
    np.testing.assert_allclose(found, [np.cos(0.7), np.sin(0.7)], rtol=1e-12)


def test_angles_of_a_bfloat16_time_are_float32():
    embedded = nn.sinusoidal_embedding(jnp.asarray(0.5, jnp.bfloat16), 8)
    assert embedded.dtype == jnp.float32
    np.testing.assert_allclose(embedded, reference_sinusoid(0.5, 8), rtol=1e-6)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (nn.end_start, (T, R)),
        (nn.end_duration, (T, T - R)),
        (nn.end_start_duration, (T, R, T - R)),
        (nn.duration, (T - R,)),
    ],
)
def test_embedding_variables_are_those_of_table_1c(x64, variables, expected):
    r, t = jnp.asarray(R), jnp.asarray(T)
    np.testing.assert_array_equal(variables(r, t), expected)
    layer = nn.cast(nn.TimePairEmbedding(6, variables=variables, size=8, time_scale=3.0, key=jr.key(0)), jnp.float64)
    assert len(layer.hidden) == len(layer.out) == len(expected)
    total = np.zeros(6)
    for value, hidden, out in zip(expected, layer.hidden, layer.out, strict=True):
        total += silu(reference_sinusoid(3 * value, 8) @ hidden.weight + hidden.bias) @ out.weight + out.bias
    np.testing.assert_allclose(layer(r, t), total, rtol=1e-12)


def test_duration_embedding_cannot_tell_intervals_of_one_length_apart():
    layer = nn.TimePairEmbedding(4, variables=nn.duration, key=jr.key(0))
    first, second = (layer(jnp.asarray(r), jnp.asarray(r + 0.5)) for r in (0.0, 0.25))
    np.testing.assert_array_equal(first, second)


def test_variables_may_be_a_function_of_ones_own():
    layer = nn.TimePairEmbedding(4, variables=lambda r, t: (r * t,), key=jr.key(0))
    first, second = (layer(jnp.asarray(r), jnp.asarray(t)) for r, t in ((0.25, 1.0), (0.5, 0.5)))
    np.testing.assert_array_equal(first, second)


def test_time_weights_have_standard_deviation_two_hundredths():
    layer = nn.TimePairEmbedding(300, key=jr.key(0))
    for part in (*layer.hidden, *layer.out):
        np.testing.assert_allclose(part.weight.std(), 0.02, rtol=0.02)
        assert not part.bias.any()


@pytest.mark.parametrize("size", [7, 0])
def test_sizes_that_do_not_split_into_cosines_and_sines_are_refused(size):
    with pytest.raises(ValueError, match=f"size must be even and positive, got {size}"):
        nn.TimePairEmbedding(4, size=size, key=jr.key(0))
    with pytest.raises(ValueError, match=f"size must be even and positive, got {size}"):
        nn.sinusoidal_embedding(jnp.asarray(0.5), size)


def test_times_embedding_keeps_its_derivative_at_r_equal_to_t():
    layer = nn.TimePairEmbedding(4, key=jr.key(0))
    time = jnp.asarray(0.5)
    _, derivative = jax.jvp(lambda t: layer(time, t), (time,), (jnp.ones(()),))
    assert bool(jnp.isfinite(derivative).all()) and bool((derivative != 0).any())
