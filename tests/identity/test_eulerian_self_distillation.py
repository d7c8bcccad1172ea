import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))
Z, R, T = np.array([0.3, -1.2, 0.5]), 0.2, 0.7


@pytest.mark.parametrize("stop_advection", [False, True])
def test_residual_is_the_equation_of_the_flow_map_and_what_is_asked_for_learns(stop_advection):
    at, h = mfx.Row(jnp.asarray(Z), jnp.full(3, jnp.nan), R, T), T - R
    by_z, _, by_t = FIELD.slopes(Z, R, T)
    u, v = np.asarray(FIELD(Z, R, T)), np.asarray(FIELD(Z, T, T))
    expected = u + h * 0.8 * (by_t + by_z * v) - v
    method = mfx.EulerianSelfDistillation(stop_advection)
    np.testing.assert_allclose(method.residual(FIELD, at), expected, rtol=1e-12)
    gradient = jax.grad(lambda field: jnp.sum(method.residual(field, at) ** 2))(FIELD).factor
    # The derivative by the factor of u + h (d_t u + J_z u v), where v is behind stop-gradient.
    learning = u / 0.8 + h * (by_t + (0 if stop_advection else by_z * v))
    np.testing.assert_allclose(gradient, 2 * np.sum(expected * learning), rtol=1e-12)
