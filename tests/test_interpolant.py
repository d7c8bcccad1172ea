import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import AbstractInterpolant, LinearInterpolant, TrigonometricInterpolant

pytestmark = pytest.mark.usefixtures("x64")


class CubicInterpolant(AbstractInterpolant):
    """A user's path: two functions of time and nothing else."""

    def alpha(self, t):
        return 1 - t**3

    def sigma(self, t):
        return t**2


INTERPOLANTS = [LinearInterpolant(), TrigonometricInterpolant(), CubicInterpolant()]
TIMES = [0.0, 0.1, 0.5, 0.93, 1.0]


def data_and_noise():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(rng.normal(size=(2, 3)))


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_path_starts_at_the_data(interpolant):
    x, eps = data_and_noise()
    z, _ = interpolant.state_and_velocity(x, eps, jnp.asarray(0.0))
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_path_ends_at_the_noise(interpolant):
    x, eps = data_and_noise()
    z, _ = interpolant.state_and_velocity(x, eps, jnp.asarray(1.0))
    np.testing.assert_allclose(z, eps, rtol=0, atol=1e-15)


@pytest.mark.parametrize("t", TIMES)
def test_linear_state_and_velocity_are_the_papers(t):
    x, eps = data_and_noise()
    z, v = LinearInterpolant().state_and_velocity(x, eps, jnp.asarray(t))
    np.testing.assert_allclose(z, (1 - t) * x + t * eps, rtol=1e-15)
    np.testing.assert_array_equal(v, eps - x)


@pytest.mark.parametrize("t", TIMES)
def test_trigonometric_velocity_is_the_analytic_one(t):
    x, eps = data_and_noise()
    _, v = TrigonometricInterpolant().state_and_velocity(x, eps, jnp.asarray(t))
    expected = np.pi / 2 * (np.cos(np.pi / 2 * t) * eps - np.sin(np.pi / 2 * t) * x)
    np.testing.assert_allclose(v, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("t", TIMES)
def test_velocity_of_a_users_path_is_the_analytic_one(t):
    x, eps = data_and_noise()
    _, v = CubicInterpolant().state_and_velocity(x, eps, jnp.asarray(t))
    np.testing.assert_allclose(v, -3 * t**2 * x + 2 * t * eps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.93])
def test_velocity_is_the_finite_difference_of_the_state(interpolant, t):
    x, eps = data_and_noise()
    step = 1e-5
    (after, _), (before, _) = (
        interpolant.state_and_velocity(x, eps, jnp.asarray(time)) for time in (t + step, t - step)
    )
    _, v = interpolant.state_and_velocity(x, eps, jnp.asarray(t))
    # Truncation: step^2 / 6 times the third derivative (at most 12 here), and rounding near 1e-16 / step.
    np.testing.assert_allclose(v, (after - before) / (2 * step), rtol=0, atol=5e-10)


@pytest.mark.parametrize("t", TIMES)
def test_trigonometric_path_keeps_unit_variance(t):
    alpha, sigma, _, _ = TrigonometricInterpolant().rates(jnp.asarray(t))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_rates_are_both_shares_and_both_derivatives(interpolant):
    t = jnp.asarray(0.3)
    expected = [
        interpolant.alpha(t),
        interpolant.sigma(t),
        jax.grad(interpolant.alpha)(t),
        jax.grad(interpolant.sigma)(t),
    ]
    np.testing.assert_allclose(interpolant.rates(t), expected, rtol=1e-15)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_float32_in_float32_out(interpolant):
    x = jnp.ones((2,), jnp.float32)
    z, v = interpolant.state_and_velocity(x, x, jnp.asarray(0.3, jnp.float32))
    assert (z.dtype, v.dtype) == (jnp.float32, jnp.float32)


def test_path_without_sigma_cannot_be_made():
    class Half(AbstractInterpolant):
        def alpha(self, t):
            return 1 - t

    with pytest.raises(TypeError, match="sigma"):
        Half()
