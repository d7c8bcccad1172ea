import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))


def row(step=None, r=0.2):
    context = None if step is None else mfx.Context(jnp.asarray(step))
    return mfx.Row(jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), r, 0.7, context=context)


def direction(at, rho):
    """g of the paper."""
    by_z, _, by_t = FIELD.slopes(at.z, at.r, at.t)
    return at.v - FIELD(at.z, at.r, at.t) - rho * (at.t - at.r) * FIELD.factor * (by_z * at.v + by_t)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.99])
def test_residual_is_the_direction_and_the_gradient_that_of_a_step_of_bounded_length(rho):
    at, method = row(), mfx.AlignYourFlow(rho, offset=0.3)
    g = direction(at, rho)
    residual, loss = method.residual_and_loss(FIELD, at)
    np.testing.assert_allclose(residual, -g, rtol=1e-12)
    np.testing.assert_allclose(loss, np.sum(g**2) / (np.linalg.norm(g) + 0.3), rtol=1e-12)
    step, by_factor = g / (np.linalg.norm(g) + 0.3), FIELD(at.z, at.r, at.t) / FIELD.factor
    gradient = jax.grad(lambda field: method.residual_and_loss(field, at)[1])(FIELD).factor
    np.testing.assert_allclose(gradient, -2 * np.sum(step * by_factor), rtol=1e-12)


def test_regularisation_ends_at_one_percent_after_a_tenth_of_the_training():
    method = mfx.AlignYourFlow.for_training(1000)
    for step, rho in ((0, 0.0), (50, 0.495), (100, 0.99), (1000, 0.99)):
        np.testing.assert_allclose(method.residual(FIELD, row(step)), -direction(row(), rho), rtol=1e-6)
    assert not method.facts.exact and not mfx.AlignYourFlow().facts.exact and mfx.AlignYourFlow(1.0).facts.exact


@pytest.mark.parametrize(("rho", "offset", "name"), [(1.1, 0.1, "rho"), (-0.1, 0.1, "rho"), (0.5, 0.0, "offset")])
def test_values_without_meaning_are_refused(rho, offset, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        mfx.AlignYourFlow(rho, offset)
