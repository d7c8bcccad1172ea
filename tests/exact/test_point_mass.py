import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import LinearInterpolant
from mf_eqx.exact import PointMassAverageVelocity, PointSet

POINT = np.array([0.7, -1.2])

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.9), (0.6, 0.6)])
def test_field_is_the_velocity_of_the_point_whatever_r(r, t):
    z, r, t = jnp.array([0.3, 0.9]), jnp.asarray(r), jnp.asarray(t)
    v = PointSet(POINT[None]).velocity(LinearInterpolant(), z, t)
    np.testing.assert_allclose(PointMassAverageVelocity(POINT)(z, r, t), v, rtol=1e-14)


def test_one_step_from_noise_ends_in_the_point():
    eps = jnp.array([0.3, 0.9])
    u = PointMassAverageVelocity(POINT)(eps, jnp.asarray(0.0), jnp.asarray(1.0))
    np.testing.assert_allclose(eps - u, POINT, rtol=1e-14)
