import jax.numpy as jnp
import numpy as np
import pytest
from fields import PointMassField
from points import linear, point

from mf_eqx import AbstractDerivative, AbstractField, MeanFlow, Row

pytestmark = pytest.mark.usefixtures("x64")

# The parts (dr, dt) of the tangents of Tab. 1b.
TANGENTS = [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]


def test_residual_of_a_linear_field_is_the_one_by_hand():
    field, (z, v, r, t) = linear(), point()
    expected = field(z, r, t) - v + (t - r) * (field.matrix @ v + field.t_rate)
    np.testing.assert_allclose(MeanFlow().residual(field, Row(z, v, r, t)), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("dr", "dt"), TANGENTS)
def test_residual_with_a_tangent_of_table_1b_is_the_one_by_hand(dr, dt):
    field, (z, v, r, t) = linear(), point()
    expected = field(z, r, t) - v + (t - r) * (field.matrix @ v + dr * field.r_rate + dt * field.t_rate)
    found = MeanFlow(dr, dt).residual(field, Row(z, v, r, t))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_data_at_one_point_leave_no_residual():
    z, _, r, t = point()
    field = PointMassField(jnp.array([2.0, -1.0, 0.5]))
    np.testing.assert_allclose(MeanFlow().residual(field, Row(z, field(z, t, t), r, t)), 0, atol=1e-14)


def test_residual_uses_the_engine_it_is_given():
    class CentralDifference(AbstractDerivative):
        step: float
        passes = None

        def __call__(self, field, z, r, t, condition, *, tangent, key):
            dz, dr, dt = tangent

            def moved(step):
                return field(z + step * dz, r + step * dr, t + step * dt, condition, key=key)

            return moved(0), (moved(self.step) - moved(-self.step)) / (2 * self.step)

    class Square(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return t**3 * z

    z, _, r, t = point()
    step = 0.1  # so large that its error shows: d(t^3)/dt becomes 3 t^2 + step^2, with v = 0
    identity = MeanFlow(derivative=CentralDifference(step))
    found = identity.residual(Square(), Row(z, jnp.zeros(3), r, t))
    np.testing.assert_allclose(found, t**3 * z + (t - r) * (3 * t**2 + step**2) * z, rtol=1e-13)
