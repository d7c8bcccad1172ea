import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))
T = 0.7


def row(path=None, step=None, t=T):
    context = None if step is None else mfx.Context(jnp.asarray(step))
    return mfx.Row(jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), 0.0, t, context=context, path=path)


@pytest.mark.parametrize(
    ("path", "factor"),
    [
        (mfx.LinearInterpolant(), 0.3 / np.hypot(0.3, 0.7)),
        (None, 0.3 / np.hypot(0.3, 0.7)),
        (mfx.TrigonometricInterpolant(), np.cos(np.pi / 2 * T)),
    ],
)
def test_gradient_is_that_of_a_step_along_the_normalised_tangent(path, factor):
    at, method = row(path), mfx.ContinuousConsistency(0.5, offset=0.3)
    by_z, _, by_t = FIELD.slopes(at.z, 0.0, T)
    expected = FIELD(at.z, 0.0, T) - at.v + 0.5 * T * 0.8 * (by_z * at.v + by_t)
    np.testing.assert_allclose(method.residual(FIELD, at), expected, rtol=1e-12)
    g = factor * expected
    step = g / (np.sqrt(np.mean(g**2)) + 0.3)
    gradient = jax.grad(lambda field: method.residual_and_loss(field, at)[1])(FIELD).factor
    by_factor = np.asarray(FIELD(at.z, 0.0, T)) / 0.8
    np.testing.assert_allclose(gradient, 2 * np.mean(step * by_factor), rtol=1e-12)


def test_the_derivative_comes_in_over_a_tenth_of_the_training():
    method, without, whole = mfx.ContinuousConsistency.for_training(1000), *map(mfx.ContinuousConsistency, (0.0, 1.0))
    found = [method.residual(FIELD, row(step=step)) for step in (0, 50, 100, 999)]
    first, last = (each.residual(FIELD, row()) for each in (without, whole))
    np.testing.assert_allclose(found, [first, (first + last) / 2, last, last], rtol=1e-6)
    assert whole.facts.exact and not method.facts.exact


def test_rows_at_both_ends_of_time_have_finite_losses_and_gradients():
    for t in (0.0, 1.0):
        loss, gradient = jax.value_and_grad(
            lambda field, t=t: mfx.ContinuousConsistency().residual_and_loss(field, row(t=t))[1]
        )(FIELD)
        assert np.isfinite([loss, gradient.factor]).all()


@pytest.mark.parametrize(("rho", "offset", "name"), [(1.1, 0.1, "warm_up"), (0.5, 0.0, "offset")])
def test_values_without_meaning_are_refused(rho, offset, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        mfx.ContinuousConsistency(rho, offset)
