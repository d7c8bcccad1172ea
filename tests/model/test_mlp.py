import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import refilled

import mf_eqx as mfx
from mf_eqx import nn


@functools.cache
def small(*, labels=3, **options):
    with jax.enable_x64(False):
        return refilled(mfx.MLP(2, width=16, depth=2, labels=labels, **options, key=jr.key(0)))


def inputs():
    return jnp.array([0.5, -1.0]), jnp.asarray(0.3), jnp.asarray(0.8), jnp.asarray(1)


def silu(x):
    return x / (1 + np.exp(-x))


def linear(layer, x):
    return x @ np.asarray(layer.weight) + np.asarray(layer.bias)


def test_forward_pass_equals_an_independent_one(x64):
    field = nn.cast(small(), jnp.float64)
    z, r, t, label = map(np.asarray, inputs())
    c = np.asarray(field.embedding.label.table)[label]
    for value, hidden, out in zip((t, t - r), field.embedding.times.hidden, field.embedding.times.out, strict=True):
        angles = 10 * value * 10_000.0 ** (-np.arange(16) / 16)
        c = c + linear(out, silu(linear(hidden, np.concatenate([np.cos(angles), np.sin(angles)]))))
    c, x = silu(c), linear(field.first, z)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], field.stack.blocks)
        x = x + linear(block.out, silu(linear(block.hidden, x) + linear(block.condition, c)))
    np.testing.assert_allclose(field(*inputs()), linear(field.out, x), rtol=1e-12)


def test_fresh_field_outputs_zero():
    field = mfx.MLP(2, labels=3, key=jr.key(0))
    np.testing.assert_array_equal(field(*inputs()), np.zeros(2))


def test_total_derivative_equals_central_finite_differences(x64):
    field = nn.cast(small(), jnp.float64)
    z, r, t, label = inputs()
    v = jnp.array([1.0, 2.0])
    u, dudt = mfx.total_derivative(field, z, v, r, t, label)
    step = 1e-5
    difference = (field(z + step * v, r, t + step, label) - field(z - step * v, r, t - step, label)) / (2 * step)
    np.testing.assert_allclose(dudt, difference, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(u, field(z, r, t, label), rtol=1e-12)
    assert float(jnp.abs(dudt).max()) > 0.01


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(x64):
    field = nn.cast(small(), jnp.float64)
    batch = mfx.Batch(jr.normal(jr.key(2), (16, 2)), jnp.arange(16) % 3)
    objective = mfx.Objective(label_dropout=mfx.LabelDropout(0.4, field.null_label))
    found = eqx.filter_jit(eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(3))[0]))(field)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert bool(jnp.isfinite(leaf).all() & (leaf != 0).all()), jax.tree_util.keystr(path)


def test_float32_field_stays_float32_where_float64_is_enabled(x64):
    z, r, t, label = inputs()
    assert small()(z.astype(jnp.float32), r.astype(jnp.float32), t.astype(jnp.float32), label).dtype == jnp.float32


@pytest.mark.parametrize("variables", [nn.end_start, nn.end_duration, nn.end_start_duration, nn.duration])
def test_every_embedding_of_table_1c_can_be_chosen(variables):
    field = small(time_variables=variables)
    z, r, t, label = inputs()
    assert bool((field(z, r, t, label) != field(z, r + 0.1, t, label)).any())
    assert len(field.embedding.times.hidden) == len(variables(r, t))


def test_label_and_null_label_change_the_output():
    field = small()
    z, r, t, _ = inputs()
    outputs = [field(z, r, t, jnp.asarray(label)) for label in (0, 2, field.null_label)]
    assert field.null_label == 3
    for i in range(3):
        assert bool((outputs[i] != outputs[i - 1]).any())


def test_label_missing_or_given_in_vain_is_refused():
    z, r, t, label = inputs()
    with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
        small()(z, r, t)
    with pytest.raises(ValueError, match="condition must be None for a field without labels, got 1"):
        small(labels=None)(z, r, t, label)
