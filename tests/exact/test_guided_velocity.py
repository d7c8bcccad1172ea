import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx.exact import GaussianMixture, GuidedVelocity, MarginalVelocity

pytestmark = pytest.mark.usefixtures("x64")


def velocity():
    return MarginalVelocity(GaussianMixture(np.array([[-1.0, 0.5], [0.5, 1.0]]), 0.3, label=np.array([0, 1])))


Z, T = np.array([0.1, 0.2]), np.array(0.6)


def test_scale_extrapolates_from_the_unconditional_to_the_conditional_velocity():
    v, z, t = velocity(), jnp.asarray(Z), jnp.asarray(T)
    expected = v(z, t) + 2.5 * (v(z, t, 1) - v(z, t))
    np.testing.assert_allclose(GuidedVelocity(v, 2.5)(z, t, 1), expected, rtol=1e-13)


def test_scale_1_is_no_guidance():
    v, z, t = velocity(), jnp.asarray(Z), jnp.asarray(T)
    np.testing.assert_array_equal(GuidedVelocity(v, 1.0)(z, t, 1), v(z, t, 1))


def test_without_condition_it_is_the_unconditional_velocity():
    v, z, t = velocity(), jnp.asarray(Z), jnp.asarray(T)
    np.testing.assert_allclose(GuidedVelocity(v, 2.5)(z, t), v(z, t), rtol=1e-14)
