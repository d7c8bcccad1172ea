import jax.random as jr
import numpy as np
import pytest
from points import curved, Fixed, point

from mf_eqx import Row, Shortcut, SplitMeanFlow

pytestmark = pytest.mark.usefixtures("x64")


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
