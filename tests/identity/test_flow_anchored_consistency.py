import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))


def row(v, t=0.7):
    return mfx.Row(jnp.array([0.3, -1.2, 0.5]), jnp.asarray(v), 0.0, t)


@pytest.mark.parametrize("v", [[1.1, 0.4, -0.6], [30.0, -20.0, 0.1]], ids=["short", "clipped"])
def test_target_is_a_clipped_part_of_the_way(v):
    at, method = row(v), mfx.FlowAnchoredConsistency()
    residual, loss = method.residual_and_loss(FIELD, at)
    np.testing.assert_array_equal(residual, mfx.MeanFlow().residual(FIELD, at))
    way = (1 - np.sqrt(0.3)) * np.clip(residual, -1, 1)
    error, weight = np.mean(way**2), np.sin(np.pi / 2 * 0.7)
    np.testing.assert_allclose(loss, weight * error / np.sqrt(error + 1e-3), rtol=1e-12)
    gradient = jax.grad(lambda field: method.residual_and_loss(field, at)[1])(FIELD).factor
    by_factor = np.asarray(FIELD(at.z, at.r, at.t)) / 0.8
    expected = weight * 2 * np.mean(way * by_factor) / np.sqrt(error + 1e-3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_rows_at_both_ends_of_time_have_finite_losses_and_gradients():
    for t in (0.0, 1.0):
        loss, gradient = jax.value_and_grad(
            lambda field, t=t: mfx.FlowAnchoredConsistency().residual_and_loss(field, row([1.0, 0.0, 0.0], t))[1]
        )(FIELD)
        assert np.isfinite([loss, gradient.factor]).all()


def test_a_power_without_meaning_is_refused():
    with pytest.raises(ValueError, match="power must"):
        mfx.FlowAnchoredConsistency(0.0)


def test_logit_normal_times_come_near_to_those_of_the_paper():
    times = mfx.FlowAnchoredConsistency().facts.paper_settings["time_pairs"].times
    n = np.linspace(-10.0, 10.0, 2001)
    t = 2 / np.pi * np.arctan(np.exp(n))
    ours = scipy.stats.norm.cdf(np.log(t / (1 - t)), times.mean, times.std)
    np.testing.assert_allclose(ours, scipy.stats.norm.cdf(n, -0.8, 1.6), rtol=0, atol=0.03)
