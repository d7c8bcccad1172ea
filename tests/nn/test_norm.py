import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

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
