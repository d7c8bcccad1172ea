import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import AbstractField, AbstractTimes, Row, Shortcut, SplitMeanFlow

pytestmark = pytest.mark.usefixtures("x64")


class Fixed(AbstractTimes):
    """Always the same time."""

    time: float

    def __call__(self, *, key):
        return jnp.asarray(self.time)


class Curved(AbstractField):
    """Nonlinear in everything."""

    matrix: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.tanh(self.matrix @ z + jnp.sin(3 * r)) + t**2 * z


def curved():
    return Curved(jnp.asarray(np.random.default_rng(0).normal(size=(3, 3))))


def point():
    return jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), jnp.asarray(0.2), jnp.asarray(0.7)


def test_one_step_is_compared_with_two_half_steps():
    field, (z, v, r, t) = curved(), point()
    middle = (r + t) / 2
    halfway = z - (t - r) / 2 * field(z, middle, t)
    twice = halfway - (t - r) / 2 * field(halfway, r, middle)
    once = z - (t - r) * field(z, r, t)
    found = Shortcut().residual(field, Row(z, v, r, t))
    np.testing.assert_allclose((t - r) * found, twice - once, rtol=0, atol=1e-15)


def test_shortcut_is_split_mean_flow_at_the_midpoint():
    expected = SplitMeanFlow(Fixed(0.5)).residual(curved(), Row(*point(), key=jr.key(0)))
    found = Shortcut().residual(curved(), Row(*point(), key=jr.key(1)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
