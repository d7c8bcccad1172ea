import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))
Z, R, T = np.array([0.3, -1.2, 0.5]), 0.2, 0.7


def test_residual_is_the_equation_of_the_flow_map_and_half_of_it_learns():
    at, h = mfx.Row(jnp.asarray(Z), jnp.full(3, jnp.nan), R, T), T - R
    by_z, _, by_t = FIELD.slopes(Z, R, T)
    u, v = np.asarray(FIELD(Z, R, T)), np.asarray(FIELD(Z, T, T))
    expected = u + h * 0.8 * (by_t + by_z * v) - v
    method = mfx.EulerianSelfDistillation()
    np.testing.assert_allclose(method.residual(FIELD, at), expected, rtol=1e-12)
    gradient = jax.grad(lambda field: jnp.sum(method.residual(field, at) ** 2))(FIELD).factor
    learning = u / 0.8 + h * by_t  # the derivative of u + h du/dt by the factor; the rest is behind stop-gradient
    np.testing.assert_allclose(gradient, 2 * np.sum(expected * learning), rtol=1e-12)
