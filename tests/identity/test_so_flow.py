import functools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def field():
    return mfx.nn.cast(filled(lambda: mfx.MLP(3, width=8, depth=1, key=jr.key(0))), jnp.float64)


def row(step=None):
    context = None if step is None else mfx.Context(jnp.asarray(step))
    return mfx.Row(jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), 0.2, 0.7, context=context)


def ends_apart(u, at, k):
    """The difference of both ends over the step between their starts."""
    r, t = 0.2, 0.7
    moved = t - k * (t - r)
    z = at.z - (t - moved) * at.v
    return ((z - (moved - r) * u(z, r, moved)) - (at.z - (t - r) * u(at.z, r, t))) / (t - moved)


@pytest.mark.parametrize("k", [0.002, 0.1, 1.0])
def test_residual_is_the_difference_of_both_ends(k):
    np.testing.assert_allclose(mfx.SoFlow(k).residual(field(), row()), ends_apart(field(), row(), k), rtol=1e-9)


def test_steps_become_shorter_as_in_the_paper():
    method = mfx.SoFlow.for_training(1000)
    for step, k in ((0, 0.1), (500, 0.1 * 0.02**0.5), (1000, 0.002), (5000, 0.002)):
        np.testing.assert_allclose(method.residual(field(), row(step)), ends_apart(field(), row(), k), rtol=1e-6)
    np.testing.assert_allclose(method.residual(field(), row()), ends_apart(field(), row(), 0.002), rtol=1e-6)


@pytest.mark.parametrize("step", [0.0, -0.1, 1.5, float("nan")])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(ValueError, match="step must"):
        mfx.SoFlow(step)
