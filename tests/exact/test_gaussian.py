import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import LinearInterpolant
from mf_eqx.exact import GaussianAverageVelocity, GaussianMixture

MEAN, STD = np.array([0.7, -1.2, 0.1]), 0.4
Z = np.array([0.3, 0.9, -0.5])

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.9), (0.0, 0.05), (0.95, 1.0)])
def test_field_equals_the_displacement_of_the_flow(r, t):
    scale_r, scale_t = (np.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (r, t))
    flow = (1 - r) * MEAN + scale_r / scale_t * (Z - (1 - t) * MEAN)
    u = GaussianAverageVelocity(MEAN, STD)(jnp.asarray(Z), jnp.asarray(r), jnp.asarray(t))
    np.testing.assert_allclose(u, (Z - flow) / (t - r), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_field_at_equal_times_is_the_marginal_velocity(t):
    z, t = jnp.asarray(Z), jnp.asarray(t)
    v = GaussianMixture(MEAN[None], STD).velocity(LinearInterpolant(), z, t)
    np.testing.assert_allclose(GaussianAverageVelocity(MEAN, STD)(z, t, t), v, rtol=1e-13)


@pytest.mark.parametrize("direction", [(0.0, 1.0), (1.0, 0.0)])
def test_jvp_equals_finite_differences_also_at_equal_times(direction):
    field, step = GaussianAverageVelocity(MEAN, STD), 1e-5

    @jax.jit
    @jax.vmap
    def both(r, t):
        def along(s):
            return field(Z + s * jnp.ones(3), r + s * direction[0], t + s * direction[1])

        _, tangent = jax.jvp(along, (jnp.asarray(0.0),), (jnp.asarray(1.0),))
        return tangent, (along(jnp.asarray(step)) - along(jnp.asarray(-step))) / (2 * step)

    tangent, difference = both(jnp.array([0.0, 0.5, 1.0, 0.1]), jnp.array([0.0, 0.5, 1.0, 0.8]))
    np.testing.assert_allclose(tangent, difference, rtol=1e-7, atol=1e-8)


def test_std_must_be_positive():
    with pytest.raises(ValueError, match=r"std must be > 0 and finite, got 0\.0"):
        GaussianAverageVelocity(MEAN, 0.0)
