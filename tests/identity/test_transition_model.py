import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import Cubic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

FIELD = Cubic(np.float64(0.8))


def test_loss_weighs_by_the_length_of_the_transition():
    at = mfx.Row(jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), 0.2, 0.7)
    method = mfx.TransitionModel(sigma=2.0, offset=0.1)
    residual, loss = method.residual_and_loss(FIELD, at)
    np.testing.assert_array_equal(residual, mfx.MeanFlow().residual(FIELD, at))
    weight, error = 1 / np.sqrt(np.tan(0.7) - np.tan(0.2) + 2.0), np.mean(residual**2)
    np.testing.assert_allclose(loss, weight * error / (error + 0.1), rtol=1e-12)
    gradient = jax.grad(lambda field: method.residual_and_loss(field, at)[1])(FIELD).factor
    by_factor = np.asarray(FIELD(at.z, at.r, at.t)) / 0.8
    expected = weight * 2 * np.mean(residual * by_factor) / (error + 0.1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@pytest.mark.parametrize(("values", "name"), [({"sigma": 0.0}, "sigma"), ({"offset": -1.0}, "offset")])
def test_values_without_meaning_are_refused(values, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        mfx.TransitionModel(**values)
