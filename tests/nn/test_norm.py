import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import nn


def test_layer_norm_is_that_of_numpy(x64):
    x = 3 * jr.normal(jr.key(0), (4, 7)) + 2
    expected = (x - np.mean(x, 1, keepdims=True)) / np.sqrt(np.var(x, 1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(nn.layer_norm(x), expected, rtol=1e-12)


def test_layer_norm_of_a_constant_is_zero_not_nan():
    np.testing.assert_array_equal(nn.layer_norm(jnp.full((2, 5), 3.0)), jnp.zeros((2, 5)))


def test_statistics_of_bfloat16_rows_are_taken_in_float32():
    # In bfloat16 the mean of 1000 ones and a 257 would be lost: 8 bits do not hold it.
    x = jnp.ones(1000).at[0].set(257).astype(jnp.bfloat16)
    normalised = nn.layer_norm(x)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_allclose(normalised[0], np.sqrt(999), rtol=4e-3)  # half a bfloat16 step
    np.testing.assert_allclose(normalised[1], -1 / np.sqrt(999), rtol=4e-3)


def test_modulate_scales_around_one_and_shifts():
    x, shift, scale = jnp.ones((3, 2)), jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    np.testing.assert_array_equal(nn.modulate(x, shift, scale), [[2, 3]] * 3)


def test_modulated_norm_is_both_and_keeps_only_its_arguments():
    x, shift, scale = jr.normal(jr.key(0), (3, 4)), jr.normal(jr.key(1), (4,)), jr.normal(jr.key(2), (4,))
    value, backward = jax.vjp(nn.modulated_norm, x, shift, scale)
    np.testing.assert_array_equal(value, nn.modulate(nn.layer_norm(x), shift, scale))
    assert sum(leaf.size for leaf in jax.tree.leaves(backward)) <= x.size + shift.size + scale.size


# Root mean square


def test_rms_norm_is_that_of_numpy_times_its_scale_and_keeps_only_its_arguments(x64):
    x, weight = 3 * jr.normal(jr.key(0), (2, 3, 4)) + 2, jr.normal(jr.key(1), (4,))
    layer = eqx.tree_at(lambda layer: layer.weight, nn.RMSNorm(4, epsilon=0.1), weight)  # large enough to be seen
    value, backward = jax.vjp(lambda layer, x: layer(x), layer, x)
    np.testing.assert_allclose(value, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * weight, rtol=1e-12)
    assert sum(leaf.size for leaf in jax.tree.leaves(backward)) <= x.size + weight.size


def test_fresh_rms_norm_of_bfloat16_has_the_mean_square_of_float32():
    # In bfloat16 the sum of 1000 ones and 257^2 would be lost.
    x = jnp.ones(1000).at[0].set(257).astype(jnp.bfloat16)
    normalised = nn.RMSNorm(1000)(x)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_allclose(normalised[1], ((999 + 256**2) / 1000) ** -0.5, rtol=0.008)  # x[0] is rounded to 256


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"size": 0}, "size must be an integer >= 1"), ({"size": 2, "epsilon": 0}, "epsilon must be > 0")],
    ids=["size", "epsilon"],
)
def test_rms_norm_of_no_size_or_no_epsilon_is_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        nn.RMSNorm(**options)


# Groups of channels


def group_norm(groups, x, *, epsilon):
    """A layer whose scales and shifts are drawn, too, in float64."""
    drawn = np.random.default_rng(1).standard_normal((2, len(x)))
    layer = nn.GroupNorm(groups, len(x), epsilon=epsilon)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(map(jnp.asarray, drawn)))


GROUPS = [1, 2, 3, 6]


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5)])
@pytest.mark.parametrize("groups", GROUPS)
def test_group_norm_is_that_of_equinox(x64, groups, shape):
    x = 3 * np.random.default_rng(0).standard_normal(shape) + 2
    layer = group_norm(groups, x, epsilon=0.1)  # large enough to be seen
    reference = eqx.nn.GroupNorm(groups, 6, eps=0.1)
    reference = eqx.tree_at(lambda layer: (layer.weight, layer.bias), reference, (layer.weight, layer.bias))
    found, expected = jax.jit(lambda x: (layer(x), reference(x)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("groups", GROUPS)
def test_group_norm_is_that_of_torch(x64, groups):
    torch = pytest.importorskip("torch")
    x = 3 * jr.normal(jr.key(0), (6, 5, 4), jnp.float64) + 2
    layer = group_norm(groups, x, epsilon=0.1)
    given, weight, bias = (torch.tensor(np.asarray(array)) for array in (x, layer.weight, layer.bias))
    expected = torch.nn.functional.group_norm(given[None], groups, weight, bias, eps=0.1)[0]
    np.testing.assert_allclose(layer(x), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_derivative_of_group_norm_is_that_of_equinox(x64):
    x, dx = 3 * jr.normal(jr.key(0), (2, 6, 5, 4), jnp.float64) + 2
    layer, reference = nn.cast(nn.GroupNorm(3, 6), jnp.float64), eqx.nn.GroupNorm(3, 6, eps=1e-6)
    found, expected = (jax.jit(lambda *d, f=f: jax.jvp(f, *d))((x,), (dx,))[1] for f in (layer, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_fresh_group_norm_has_groups_of_mean_zero_and_variance_one():
    x = nn.GroupNorm(2, 6)(3 * jr.normal(jr.key(0), (6, 5, 4)) + 2).reshape(2, -1)
    np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(x.var(axis=1), 1, rtol=1e-5)


def test_group_norm_of_a_constant_is_its_bias_not_nan():
    np.testing.assert_array_equal(nn.GroupNorm(2, 4)(jnp.full((4, 3, 3), 3.0)), jnp.zeros((4, 3, 3)))


def test_statistics_of_bfloat16_groups_are_taken_in_float32():
    # As above, now over the pixels of two channels.
    x = jnp.ones((2, 20, 25)).at[0, 0, 0].set(257).astype(jnp.bfloat16)
    normalised = nn.GroupNorm(1, 2)(x)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_allclose(normalised[0, 0, 0], np.sqrt(999), rtol=4e-3)
    np.testing.assert_allclose(normalised[1], -1 / np.sqrt(999), rtol=4e-3)


@pytest.mark.parametrize(("groups", "channels"), [(4, 6), (0, 6), (-1, 6)])
def test_groups_that_do_not_divide_the_channels_are_refused(groups, channels):
    message = f"channels must be a multiple of groups, got {channels} channels and {groups} groups"
    with pytest.raises(ValueError, match=message):
        nn.GroupNorm(groups, channels)
