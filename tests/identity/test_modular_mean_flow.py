import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic, GaussianField

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))
Z, V, R, T = np.array([0.3, -1.2, 0.5]), np.array([1.1, 0.4, -0.6]), 0.2, 0.7


def row(step=None):
    context = None if step is None else mfx.Context(jnp.asarray(step))
    return mfx.Row(jnp.asarray(Z), jnp.asarray(V), R, T, context=context)


def factor_gradient(method, at):
    return jax.grad(lambda field: jnp.sum(method.residual(field, at) ** 2))(FIELD).factor


def expected(share):
    """The residual, and the derivative of its squared length by the factor of u."""
    by_z, _, by_t = FIELD.slopes(Z, R, T)
    u, dudt = Z * T**2 + R * Z**2, by_z * V + by_t  # of factor 1
    residual = 0.8 * (u + (T - R) * dudt) - V
    return residual, 2 * np.sum(residual * (u + share * (T - R) * dudt))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_residual_is_that_of_mean_flow_and_a_share_of_the_gradient_passes_through_the_derivative(share):
    residual, gradient = expected(share)
    method = mfx.ModularMeanFlow(share)
    np.testing.assert_allclose(method.residual(FIELD, row()), residual, rtol=1e-12)
    np.testing.assert_allclose(method.residual(FIELD, row()), mfx.MeanFlow().residual(FIELD, row()), rtol=1e-12)
    np.testing.assert_allclose(factor_gradient(method, row()), gradient, rtol=1e-12)
    if share == 0:
        np.testing.assert_allclose(gradient, factor_gradient(mfx.MeanFlow(), row()), rtol=1e-12)


def test_share_rises_from_0_to_1_over_the_first_half_of_a_training():
    method = mfx.ModularMeanFlow.for_training(1000)
    for step, share in ((0, 0.0), (250, 0.5), (500, 1.0), (1000, 1.0), (None, 1.0)):
        np.testing.assert_allclose(factor_gradient(method, row(step)), expected(share)[1], rtol=1e-6)


class Bent(mfx.AbstractField):
    """The exact field of Gaussian data plus `bend` z^3, which is wrong unless `bend` is 0."""

    bend: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return GaussianField(jnp.zeros(()), 0.5)(z, r, t) + self.bend * z**3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mean_gradient_at_the_exact_field_under_a_conditional_velocity_is_what_the_docstring_says(share):
    field, z, deviation = Bent(jnp.zeros(())), jnp.asarray(np.float64(0.8)), 0.7
    v = field(z, T, T)

    def loss(field):  # two equally likely velocities, whose mean is the marginal one
        rows = [mfx.Row(z, v + sign * deviation, R, T) for sign in (-1, 1)]
        return sum(mfx.ModularMeanFlow(share).residual(field, row) ** 2 for row in rows) / 2

    slope = jax.grad(lambda z: field(z, R, T))(z)
    bias = 2 * share * (T - R) * 3 * z**2 * ((T - R) * slope - 1) * deviation**2
    np.testing.assert_allclose(jax.grad(loss)(field).bend, bias, rtol=1e-9, atol=1e-12)
    assert share == 0 or abs(bias) > 0.1


def test_share_outside_of_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"gradient_share must lie in \[0, 1\]"):
        mfx.ModularMeanFlow(1.1)
