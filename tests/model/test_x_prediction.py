import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import checkpoint
from mf_eqx._model import check_labels_fit
from mf_eqx.exact import GaussianAverageVelocity, PointMassAverageVelocity

POINT, MEAN, STD = np.array([0.7, -1.2]), np.array([0.4, 0.9]), 0.6
Z = np.array([0.3, -0.8])


class PointOfData(mfx.AbstractField):
    """The posterior mean of data at one point."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.asarray(POINT)


class GaussianPosteriorMean(mfx.AbstractFieldWithVelocity):
    """E[x | z] of data N(m, s^2 I), by Bayes' rule for (1 - t) x + t eps, as both outputs; u is then v for r = t."""

    has_velocity_head = True

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.velocity(z, t) + (t - r)

    def velocity(self, z, t, condition=None, *, key=None):
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        return MEAN + gain * (z - (1 - t) * MEAN)

    def with_velocity(self, z, r, t, condition=None, *, key=None):
        return self(z, r, t), self.velocity(z, t)


@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.9), (0.0, 0.05), (0.6, 0.6)])
def test_one_point_of_data_becomes_its_average_velocity(r, t, x64):
    u = mfx.XPrediction(PointOfData())(jnp.asarray(Z), r, t)
    np.testing.assert_allclose(u, PointMassAverageVelocity(POINT)(jnp.asarray(Z), r, t), rtol=1e-14)


@pytest.mark.parametrize("t", [1.0, 0.4, 0.05])
def test_exact_posterior_mean_becomes_the_exact_velocity(t, x64):
    z, t, field = jnp.asarray(Z), jnp.asarray(t), mfx.XPrediction(GaussianPosteriorMean())
    v = GaussianAverageVelocity(MEAN, STD)(z, t, t)
    both = field.with_velocity(z, t, t)
    for found in (field(z, t, t), field.velocity(z, t), *both, mfx.instantaneous_velocity(field, z, t)):
        np.testing.assert_allclose(found, v, rtol=1e-12)


def test_division_is_bounded_below_the_smallest_time(x64):
    z, x = jnp.asarray(Z), GaussianPosteriorMean()
    for t in (0.0, 0.1):
        np.testing.assert_allclose(mfx.XPrediction(x, 0.2)(z, t, t), (z - x(z, t, t)) / 0.2, rtol=1e-14)


@pytest.mark.parametrize("t", [0.8, 0.03])
def test_total_derivative_is_that_of_finite_differences(t, x64):
    field, z, r, v = (
        mfx.XPrediction(GaussianPosteriorMean()),
        jnp.asarray(Z),
        jnp.asarray(0.01),
        jnp.asarray([1.1, -0.3]),
    )
    found = mfx.total_derivative(field, z, v, r, jnp.asarray(t))[1]
    step = 1e-5
    later, earlier = (field(z + s * v, r, t + s) for s in (step, -step))
    np.testing.assert_allclose(found, (later - earlier) / (2 * step), rtol=1e-7)


def test_result_is_float32_in_bfloat16():
    make = lambda: mfx.XPrediction(mfx.MLP(2, width=8, depth=1, dtype=jnp.bfloat16, key=jr.key(0)))  # noqa: E731
    z = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert (
        eqx.filter_eval_shape(lambda field, z: field(z, 0.2, 0.7), eqx.filter_eval_shape(make), z).dtype == jnp.float32
    )


def network():
    size = mfx.InContextDiTSize(2, 8, 2, 2, 1, bottleneck=3, learned_positions=True, grid=True)
    return mfx.InContextDiT((1, 4, 4), size, labels=3, velocity_head=True, key=jr.key(0))


def test_saved_weights_of_a_network_that_predicts_data_make_it_again(tmp_path):
    pytest.importorskip("safetensors")
    field = filled(lambda: mfx.XPrediction(network(), 0.1))
    checkpoint.save_weights(tmp_path / "x.safetensors", field)
    weights = checkpoint.read_weights(tmp_path / "x.safetensors")
    made = weights.fill(weights.make_network)
    assert jax.tree.structure(made) == jax.tree.structure(field)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(field), strict=True):
        np.testing.assert_array_equal(a, b)


def test_field_has_the_shape_labels_and_velocity_head_of_its_network():
    field = eqx.filter_eval_shape(lambda: mfx.XPrediction(network()))
    assert (field.data_shape, field.null_label, field.has_velocity_head) == ((1, 4, 4), 3, True)
    assert not mfx.has_velocity_head(mfx.XPrediction(PointOfData()))
    with pytest.raises(ValueError, match=r"condition must lie in \[0, 3\] for a network with 3 labels, got 4"):
        check_labels_fit("condition", np.asarray([0, 4]), field)


REFUSED = {
    "smallest_time must be > 0 and finite, got 0.0": lambda: mfx.XPrediction(PointOfData(), 0),
    "field must be a network whose outputs are data, got an XPrediction": lambda: mfx.XPrediction(
        mfx.XPrediction(PointOfData())
    ),
    "field must have a velocity head for a field that is asked for its velocity, got PointOfData": lambda: (
        mfx.XPrediction(PointOfData()).velocity(jnp.asarray(Z), 0.5)
    ),
    "x_prediction must be a number, got 'a'": lambda: mfx.make_network(
        {"network": "MLP", "size": 2, "x_prediction": "a"}, key=jr.key(0)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
