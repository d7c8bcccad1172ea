import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from fields import filled, refilled
from jax.nn.initializers import normal

from mf_eqx import nn


def test_linear_is_x_w_plus_b_on_any_leading_axes():
    layer = nn.Linear(3, 5, key=jr.key(0))
    weight, bias = np.asarray(layer.weight), np.arange(5.0)
    layer = jax.tree.unflatten(jax.tree.structure(layer), [weight, bias])
    for shape in ((3,), (4, 3), (2, 4, 3)):
        x = jr.normal(jr.key(1), shape)
        np.testing.assert_allclose(layer(x), np.asarray(x) @ weight + bias, rtol=1e-6)


def test_gate_multiplies_each_output_and_has_its_gradient(x64):
    layer = nn.cast(refilled(nn.Linear(3, 5, key=jr.key(0))), jnp.float64)
    x, gate = jr.normal(jr.key(1), (4, 3), jnp.float64), jr.normal(jr.key(2), (5,), jnp.float64)
    np.testing.assert_allclose(layer(x, gate), gate * layer(x), rtol=1e-12)

    def gradients(apply):
        return jax.tree.leaves(jax.grad(lambda *inputs: jnp.sum(jnp.sin(apply(*inputs))), (0, 1, 2))(layer, x, gate))

    pairs = zip(gradients(nn.Linear.__call__), gradients(lambda layer, x, gate: gate * layer(x)), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_weights_are_xavier_uniform_and_the_bias_is_zero():
    layer = nn.Linear(300, 500, key=jr.key(0))
    bound = np.sqrt(6 / 800)
    assert layer.weight.shape == (300, 500)
    assert abs(layer.weight).max() <= bound
    np.testing.assert_allclose(layer.weight.std(), bound / np.sqrt(3), rtol=0.01)  # 150000 draws
    np.testing.assert_array_equal(layer.bias, jnp.zeros(500))


def test_another_initialisation_is_used_for_the_weight():
    layer = nn.Linear(300, 500, init=normal(0.02), key=jr.key(0))
    np.testing.assert_allclose(layer.weight.std(), 0.02, rtol=0.01)


def test_parameters_are_float32_also_where_float64_is_enabled(x64):
    layer = nn.Linear(3, 5, key=jr.key(0))
    assert layer.weight.dtype == layer.bias.dtype == jnp.float32


def test_linear_without_bias_is_the_product_alone():
    layer = filled(lambda: nn.Linear(3, 5, bias=False, key=jr.key(0)))
    x, gate = jnp.arange(6.0).reshape(2, 3), jnp.arange(5.0)
    np.testing.assert_allclose(layer(x), x @ layer.weight, rtol=1e-6)
    np.testing.assert_allclose(layer(x, gate), gate * (x @ layer.weight), rtol=1e-6)
    assert layer.bias is None


def test_swiglu_is_gated_by_silu_and_keeps_only_the_factors_of_products(x64):
    layer = nn.cast(filled(lambda: nn.SwiGLU(3, 7, key=jr.key(0))), jnp.float64)
    x, gate = jr.normal(jr.key(1), (4, 3)), jnp.arange(3.0)
    first, hidden = x @ layer.gate.weight, x @ layer.hidden.weight
    value, backward = jax.vjp(lambda x: layer(x, gate), x)
    np.testing.assert_allclose(value, gate * ((first / (1 + jnp.exp(-first)) * hidden) @ layer.out.weight), rtol=1e-10)
    # Of the hidden layer: what is gated by what, and no intermediate result of silu.
    assert sum(leaf.shape == (4, 7) for leaf in jax.tree.leaves(backward)) == 2
