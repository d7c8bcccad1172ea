import jax.numpy as jnp
import numpy as np
import pytest
from points import linear, point

from mf_eqx import ImprovedMeanFlow, MeanFlow, Row

pytestmark = pytest.mark.usefixtures("x64")


def residual(identity, v):
    z, _, r, t = point()
    return identity.residual(linear(), Row(z, v, r, t))


def test_tangent_is_the_predicted_velocity():
    field, (z, v, r, t) = linear(), point()
    predicted = field.matrix @ z + t * (field.r_rate + field.t_rate)
    expected = field(z, r, t) - v + (t - r) * (field.matrix @ predicted + field.t_rate)
    np.testing.assert_allclose(residual(ImprovedMeanFlow(), v), expected, rtol=0, atol=1e-15)


def test_regression_target_is_the_given_velocity():
    v, change = point()[1], jnp.array([0.5, -2.0, 1.0])
    moved = residual(ImprovedMeanFlow(), v + change) - residual(ImprovedMeanFlow(), v)
    np.testing.assert_allclose(moved, -change, rtol=0, atol=1e-15)


def test_where_the_field_predicts_the_given_velocity_it_is_mean_flow():
    z, _, _, t = point()
    v = linear()(z, t, t)
    np.testing.assert_allclose(residual(ImprovedMeanFlow(), v), residual(MeanFlow(), v), rtol=0, atol=1e-15)
