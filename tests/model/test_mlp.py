import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled, refilled

import mf_eqx as mfx
from mf_eqx import nn


@functools.cache
def small(*, labels=3, **options):
    with jax.enable_x64(False):
        return filled(lambda: mfx.MLP(2, width=16, depth=2, labels=labels, **options, key=jr.key(0)))


@functools.cache
def small64(**options):
    """To be built inside float64."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float64)), small(**options))


def inputs():
    return jnp.array([0.5, -1.0]), jnp.asarray(0.3), jnp.asarray(0.8), jnp.asarray(1)


@eqx.filter_jit
def evaluate(field, *inputs):
    return field(*inputs)


@eqx.filter_jit
def derivatives(field, v, z, r, t, label):
    """u and its derivative along (v, 0, 1), and the same from values nearby."""
    step = 1e-5
    near = jax.lax.map(lambda step: field(z + step * v, r, t + step, label), jnp.asarray([0, -step, step]))
    return mfx.total_derivative(field, z, v, r, t, label), (near[0], (near[2] - near[1]) / (2 * step))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(layer, x):
    return x @ np.asarray(layer.weight) + np.asarray(layer.bias)


def test_forward_pass_equals_an_independent_one(x64):
    field = small64()
    z, r, t, label = map(np.asarray, inputs())
    c = np.asarray(field.embedding.label.table)[label]
    for value, hidden, out in zip((t, t - r), field.embedding.times.hidden, field.embedding.times.out, strict=True):
        angles = 10 * value * 10_000.0 ** (-np.arange(16) / 16)
        c = c + linear(out, silu(linear(hidden, np.concatenate([np.cos(angles), np.sin(angles)]))))
    c, x = silu(c), linear(field.first, z)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], field.stack.blocks)
        x = x + linear(block.out, silu(linear(block.hidden, x) + linear(block.condition, c)))
    np.testing.assert_allclose(evaluate(field, *inputs()), linear(field.out, x), rtol=1e-12)


def test_fresh_field_outputs_zero():
    field = eqx.filter_jit(lambda key: mfx.MLP(2, width=4, depth=1, labels=3, key=key))(jr.key(0))
    np.testing.assert_array_equal(evaluate(field, *inputs()), np.zeros(2))


def test_total_derivative_equals_central_finite_differences(x64):
    (u, dudt), (value, difference) = derivatives(small64(), jnp.array([1.0, 2.0]), *inputs())
    np.testing.assert_allclose(dudt, difference, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(u, value, rtol=1e-12)
    assert np.abs(dudt).max() > 0.01


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(x64):
    field = small64()
    batch = mfx.Batch(jnp.asarray(np.random.default_rng(2).standard_normal((16, 2))), jnp.asarray(np.arange(16) % 3))
    objective = mfx.Objective(identity_share=1, label_dropout=mfx.LabelDropout(0.4, field.null_label))
    found = eqx.filter_jit(eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(3))[0]))(field)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        leaf = np.asarray(leaf)
        assert (np.isfinite(leaf) & (leaf != 0)).all(), jax.tree_util.keystr(path)


def test_float32_field_stays_float32_where_float64_is_enabled(x64):
    z, r, t, label = inputs()
    narrow = (jnp.asarray(np.asarray(x, np.float32)) for x in (z, r, t))
    assert eqx.filter_eval_shape(small(), *narrow, label).dtype == jnp.float32


@pytest.mark.parametrize("variables", [nn.end_start, nn.duration])
def test_embeddings_of_table_1c_can_be_chosen(variables):
    field = small(time_variables=variables)
    z, r, t, label = inputs()
    found = [np.asarray(evaluate(field, z, jnp.asarray(start), t, label)) for start in (0.3, 0.4)]
    assert (found[0] != found[1]).any()
    assert len(field.embedding.times.hidden) == len(variables(r, t))


def test_label_and_null_label_change_the_output():
    field = small()
    z, r, t, _ = inputs()
    outputs = [np.asarray(evaluate(field, z, r, t, jnp.asarray(label))) for label in (0, 2, field.null_label)]
    assert field.null_label == 3
    for i in range(3):
        assert (outputs[i] != outputs[i - 1]).any()


def test_label_missing_or_given_in_vain_is_refused():
    z, r, t, label = inputs()
    with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
        small()(z, r, t)
    with pytest.raises(ValueError, match="condition must be None for a field made without labels and condition, got 1"):
        small(labels=None)(z, r, t, label)


# Fourier features


def test_features_are_cosines_and_sines_beside_z(x64):
    field = small64(fourier_features=4, fourier_scale=2.0)
    z, *rest = inputs()
    angles = 2 * np.pi * np.asarray(z) @ np.asarray(field.frequencies)
    features = np.concatenate([z, np.cos(angles), np.sin(angles)])
    assert field.first.weight.shape == (10, 16)

    # A field without features whose first layer, a bias alone, gives the same.
    hidden = linear(field.first, features)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), field.first, (np.zeros((2, 16)), hidden))
    constant = eqx.tree_at(lambda field: (field.first, field.frequencies), field, (layer, None))
    np.testing.assert_allclose(evaluate(field, z, *rest), evaluate(constant, z, *rest), rtol=1e-12)


def test_frequencies_start_with_the_asked_deviation():
    field = mfx.MLP(3, width=4, depth=1, fourier_features=2000, fourier_scale=0.5, key=jr.key(0))
    assert field.frequencies.shape == (3, 2000)
    assert abs(float(jnp.std(field.frequencies)) - 0.5) < 0.02


def test_derivative_through_features_equals_central_finite_differences(x64):
    field = small64(fourier_features=4, condition_width=5)
    (_, dudt), (_, difference) = derivatives(field, jnp.array([1.0, 2.0]), *inputs())
    np.testing.assert_allclose(dudt, difference, rtol=1e-6, atol=1e-8)


@eqx.filter_jit
def derivatives_in_bfloat16(field):
    """u, du/dt, and the gradient of a function of u."""
    z, r, t, label = inputs()
    gradients = jax.grad(lambda field: jnp.sum(field(z, r, t, label) ** 2))(field)
    return *mfx.total_derivative(field, z, z, r, t, label), gradients


def test_features_and_narrow_condition_get_gradients_and_stay_float32_under_bfloat16():
    field = small(fourier_features=4, condition_width=5, dtype=jnp.bfloat16)
    u, _, gradients = derivatives_in_bfloat16(field)
    assert np.abs(gradients.frequencies).min() > 0
    assert field.stack.blocks.condition.weight.shape == (2, 5, 16)
    for leaf in jax.tree.leaves((u, gradients)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_without_features_nothing_is_added_and_the_condition_is_as_wide_as_the_field():
    plain, wide = small(), small(condition_width=16)
    assert plain.frequencies is None
    assert all(map(np.array_equal, jax.tree.leaves(plain), jax.tree.leaves(wide)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fourier_features": -1}, "fourier_features must be an integer >= 0, got -1"),
        ({"fourier_scale": 0.0}, "fourier_scale must be > 0 and finite, got 0.0"),
        ({"condition_width": 0}, "condition_width must be an integer >= 1, got 0"),
    ],
)
def test_features_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Precision


def test_bfloat16_compute_leaves_parameters_output_derivative_and_gradients_in_float32():
    field = small(dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves((field, derivatives_in_bfloat16(field))):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_bfloat16_compute_computes_its_products_in_bfloat16_and_the_times_in_float32():
    products = str(jax.make_jaxpr(lambda *inputs: small(dtype=jnp.bfloat16)(*inputs))(*inputs())).split("\n")
    results = [line.split(":")[1].split("[")[0] for line in products if "dot_general" in line]
    # Two for each of the two time variables; then the first layer, three of a block and the last.
    assert sorted(results) == ["bf16"] * 5 + ["f32"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)], ids=["float32", "bfloat16"])
def test_output_and_derivative_in_low_precision_are_near_those_in_float64(x64, dtype, bound):
    def both(compute, parameters):
        field = nn.cast(refilled(mfx.MLP(2, width=64, depth=3, dtype=compute, key=jr.key(0))), parameters)
        z, v = jr.normal(jr.key(2), (2, 64, 2), jnp.float32).astype(parameters)
        r, t = jnp.sort(jr.uniform(jr.key(3), (2, 64), jnp.float32), axis=0).astype(parameters)
        found = jax.jit(jax.vmap(lambda z, v, r, t: mfx.total_derivative(field, z, v, r, t)))(z, v, r, t)
        return np.asarray(found, np.float64)

    exact = both(None, jnp.float64)
    error = np.linalg.norm(both(dtype, jnp.float32) - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert (np.median(error, axis=1) <= bound).all()


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_float64_data_give_float64_whatever_the_compute_precision(x64, dtype):
    z, r, t, label = inputs()
    assert z.dtype == jnp.float64
    assert eqx.filter_eval_shape(small(dtype=dtype), z, r, t, label).dtype == jnp.float64


def test_field_cast_to_bfloat16_as_a_whole_still_gives_float32():
    z, r, t, label = inputs()
    u = evaluate(nn.cast(small(), jnp.bfloat16), z.astype(jnp.bfloat16), r, t, label)
    assert u.dtype == jnp.float32
    np.testing.assert_allclose(u, evaluate(small(), z, r, t, label), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_dtype_that_is_not_floating_point_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be floating point, got "):
        small(dtype=dtype)
