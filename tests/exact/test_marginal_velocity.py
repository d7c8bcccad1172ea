import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import LinearInterpolant, TrigonometricInterpolant
from mf_eqx.exact import GaussianMixture, MarginalVelocity

pytestmark = pytest.mark.usefixtures("x64")
MEAN, LABEL = np.array([[-1.0, 0.5], [0.5, 1.0]]), np.array([0, 1])


@pytest.mark.parametrize("path", [LinearInterpolant(), TrigonometricInterpolant()])
@pytest.mark.parametrize("label", [None, 1])
def test_call_is_the_velocity_of_the_distribution_on_the_path(path, label):
    mixture, z, t = GaussianMixture(MEAN, 0.3, label=LABEL), jnp.array([0.1, 0.2]), jnp.asarray(0.6)
    velocity = MarginalVelocity(mixture, path)
    np.testing.assert_array_equal(velocity(z, t, label), mixture.velocity(path, z, t, label))


def test_straight_path_is_the_default():
    mixture, z, t = GaussianMixture(MEAN, 0.3), jnp.array([0.1, 0.2]), jnp.asarray(0.6)
    np.testing.assert_array_equal(MarginalVelocity(mixture)(z, t), mixture.velocity(LinearInterpolant(), z, t))
