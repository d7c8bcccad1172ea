import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import LinearInterpolant, TrigonometricInterpolant
from mf_eqx.exact import GaussianMixture, PointSet

PATHS = (LinearInterpolant(), TrigonometricInterpolant())
POINTS = np.random.default_rng(0).standard_normal((6, 2))
WEIGHT = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 1.0]) / 10

pytestmark = pytest.mark.usefixtures("x64")


@eqx.filter_jit
def velocity(distribution, path, z, t):
    return distribution.velocity(path, jnp.asarray(z), jnp.asarray(t))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [PointSet.earliest, 0.1, 0.5, 1.0])
def test_velocity_is_the_limit_of_narrow_gaussians(path, t):
    alpha, sigma, *_ = path.rates(jnp.asarray(t))
    z, t = alpha * POINTS[2] + sigma * np.array([0.8, -0.3]), np.array(t)
    # The width 1e-9 changes variances by at most (1e-9 / 1e-3)^2; what is left is rounding of z divided by 1e-3.
    narrow = velocity(GaussianMixture(POINTS, 1e-9, WEIGHT), path, z, t)
    np.testing.assert_allclose(velocity(PointSet(POINTS, WEIGHT), path, z, t), narrow, rtol=1e-10, atol=1e-11)


def test_velocity_and_jvp_are_accurate_at_the_earliest_time():
    points, eps, t = PointSet(POINTS), jnp.array([0.8, -0.3]), jnp.asarray(PointSet.earliest)
    z, v = PATHS[0].state_and_velocity(jnp.asarray(POINTS[2]), eps, t)
    # The other points are hundreds of standard deviations away: the posterior is one point, and v is constant.
    velocity, rate = jax.jvp(lambda z, t: points.velocity(PATHS[0], z, t), (z, t), (v, jnp.ones_like(t)))
    np.testing.assert_allclose(velocity, v, atol=1e-12)
    np.testing.assert_allclose(rate, 0, atol=1e-9)


def test_image_shaped_points_equal_the_flattened_points():
    flat, image = PointSet(POINTS.reshape(3, 4)), PointSet(POINTS.reshape(3, 1, 2, 2))
    z, t = np.linspace(-1.0, 1.0, 4), np.array(0.7)
    expected = velocity(flat, PATHS[0], z, t).reshape(1, 2, 2)
    np.testing.assert_allclose(velocity(image, PATHS[0], z.reshape(1, 2, 2), t), expected, 1e-13)


def test_samples_are_points_with_the_frequency_of_their_masses():
    points = PointSet(POINTS, 10 * WEIGHT)
    x = np.asarray(jax.vmap(lambda key: points.sample(key=key))(jr.split(jr.key(0), 20_000)))
    matches = (x[:, None] == POINTS).all(axis=2)
    assert (matches.sum(axis=1) == 1).all()
    np.testing.assert_allclose(matches.mean(axis=0), WEIGHT, atol=0.017)  # 5 standard errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((POINTS[:0],), "points must hold at least one point"),
        ((POINTS, -WEIGHT), "weight must be > 0"),
        ((POINTS, np.full(6, np.inf)), "weight must be > 0"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        PointSet(*arguments)


def test_condition_is_refused():
    with pytest.raises(ValueError, match="condition must be None"):
        PointSet(POINTS).velocity(PATHS[0], jnp.zeros(2), jnp.asarray(0.5), 1)
    with pytest.raises(ValueError, match="condition must be None"):
        PointSet(POINTS).sample(key=jr.key(0), condition=1)
