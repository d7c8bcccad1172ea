import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import AdaptiveWeight, LinearInterpolant, TrigonometricInterpolant
from mf_eqx.exact import AverageVelocity, GaussianMixture, MarginalVelocity, WeightedVelocity

PATHS = (LinearInterpolant(), TrigonometricInterpolant())
PLANE = (
    np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]]),
    np.array([0.3, 0.5, 0.4]),
    np.array([0.5, 0.2, 0.3]),
    np.array([7, 4, 7]),
)
Z, T, OFFSET = np.array([0.4, -0.7]), 0.6, 4.0

pytestmark = pytest.mark.usefixtures("x64")


@eqx.filter_jit
def compiled(velocity, z, t, condition):
    return velocity(z, t, condition)


def call(velocity, z, t, condition=None):
    return compiled(velocity, jnp.asarray(z), jnp.asarray(t), None if condition is None else jnp.asarray(condition))


def weighted(mixture, power, z, t=T, condition=None, *, offset=OFFSET, path=PATHS[0]):
    velocity = WeightedVelocity(mixture, AdaptiveWeight(power, offset), path)
    return np.asarray(call(velocity, z, t, condition))


def marginal(mixture, z, t=T, condition=None, *, path=PATHS[0]):
    return np.asarray(call(MarginalVelocity(mixture, path), z, t, condition))


def bias(mixture, power, z, **options):
    return weighted(mixture, power, z, **options) - marginal(mixture, z)


def drawn(rng, number, path, z, t, label=None):
    """Conditional velocities given z: a component, data given component and state, and the noise that is left."""
    alpha, sigma, alpha_rate, sigma_rate = (float(rate) for rate in path.rates(jnp.asarray(t)))
    mean, std, weight, labels = PLANE
    variance = alpha**2 * std**2 + sigma**2
    square = np.sum((z - alpha * mean) ** 2, axis=1)
    mass = weight * np.exp(-square / (2 * variance)) / variance * (True if label is None else labels == label)
    k = rng.choice(3, number, p=mass / mass.sum())
    center = mean + (alpha * std**2 / variance)[:, None] * (z - alpha * mean)
    x = center[k] + (std * sigma / np.sqrt(variance))[k, None] * rng.standard_normal((number, 2))
    return alpha_rate * x + sigma_rate * (z - alpha * x) / sigma


def standard_errors(u, v, power):
    """By how many standard errors the mean of w(|u - v|^2) (u - v) differs from zero, for each coordinate."""
    terms = (u - v) * (np.sum((u - v) ** 2, axis=1, keepdims=True) + OFFSET) ** -power
    return np.abs(terms.mean(0)) / (terms.std(0) / np.sqrt(len(v)))


@pytest.mark.parametrize("path", PATHS)
def test_power_zero_gives_the_marginal_velocity(path):
    mixture = GaussianMixture(*PLANE)
    for t in (0.0, 0.1, 0.6, 1.0):
        found = call(WeightedVelocity(mixture, AdaptiveWeight(power=0), path), Z, t)
        np.testing.assert_allclose(found, marginal(mixture, Z, t, path=path), 0, 1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("power", "label"), [(0.5, None), (1.0, 7)])
@pytest.mark.parametrize(("z", "t"), [((0.4, -0.7), 0.6), ((-0.3, 0.1), 0.8), ((0.1, -0.2), 0.45)])
def test_weighted_errors_of_draws_from_the_posterior_have_mean_zero(path, power, label, z, t):
    mixture, z = GaussianMixture(*PLANE), np.array(z)
    v = drawn(np.random.default_rng(0), 200_000, path, z, t, label)
    u = weighted(mixture, power, z, t, label, path=path)
    # Right ones exceed 4.5 once in 6000 seeds, 12 cases of 2 numbers.
    assert standard_errors(u, v, power).max() < 5
    # The same draws tell it from the marginal velocity, whose unweighted errors are the ones with mean zero.
    v_mean = marginal(mixture, z, t, label, path=path)
    assert standard_errors(v_mean, v, 0).max() < 5 < standard_errors(v_mean, v, power).max()


@pytest.mark.parametrize(("power", "offset"), [(0.5, 1e-3), (1.0, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize("t", [0.0, 0.6])
def test_one_gaussian_has_no_bias_because_its_posterior_is_symmetric(power, offset, t):
    mixture = GaussianMixture(np.array([[0.5, -0.2]]), 0.7)
    found = call(WeightedVelocity(mixture, AdaptiveWeight(power, offset)), Z, t)
    np.testing.assert_allclose(found, marginal(mixture, Z, t), 0, 1e-12)


def modes(share=0.5):
    """Two equal modes at either side of the plane x = 0, which is where the left one's posterior mass is its share."""
    return GaussianMixture(np.array([[-1.0, 0.0], [1.0, 0.0]]), 0.3, np.array([share, 1 - share]))


def towards(mode, z, power, share=0.5):
    """The bias along the way to the velocity of one mode, 0 the left one and 1 the right one."""
    part = GaussianMixture(np.asarray(modes().mean)[mode : mode + 1], 0.3)
    way = marginal(part, z) - marginal(modes(share), z)
    return bias(modes(share), power, z) @ way / np.linalg.norm(way)


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("height", [0.0, 0.4])
def test_state_equally_far_from_two_equal_modes_has_no_bias(power, height):
    np.testing.assert_allclose(bias(modes(), power, np.array([0.0, height])), 0, atol=1e-12)


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0])
def test_bias_is_towards_the_nearer_mode(power):
    assert towards(0, np.array([-0.15, 0.4]), power) > 0.03
    assert towards(1, np.array([0.15, 0.4]), power) > 0.03


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0])
def test_bias_is_towards_the_heavier_mode(power):
    assert towards(0, np.array([0.0, 0.4]), power, share=0.7) > 0.03
    assert towards(1, np.array([0.0, 0.4]), power, share=0.3) > 0.03


def test_bias_grows_with_the_power():
    sizes = [np.linalg.norm(bias(modes(), power, np.array([0.15, 0.4]))) for power in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(sizes) > 0.02).all()


def test_bias_shrinks_with_the_offset():
    z = np.array([0.15, 0.4])
    sizes = [np.linalg.norm(bias(modes(), 0.5, z, offset=offset)) for offset in (1.0, 4.0, 16.0, 64.0)]
    assert (np.diff(sizes) < 0).all() and sizes[-1] < 0.1 * sizes[0]


def test_condition_selects_the_components_that_carry_the_label():
    part = GaussianMixture(*(values[[0, 2]] for values in PLANE[:3]))
    found = weighted(GaussianMixture(*PLANE), 1.0, Z, condition=7)
    np.testing.assert_allclose(found, weighted(part, 1.0, Z), 1e-12)


def test_derivatives_equal_finite_differences():
    velocity, step = WeightedVelocity(GaussianMixture(*PLANE), AdaptiveWeight(1.0, 1.0)), 1e-5

    @jax.jit
    def both():
        def along(s):
            return velocity(Z + s * jnp.array([0.3, 1.0]), T + s)

        tangent = jax.jvp(along, (jnp.asarray(0.0),), (jnp.asarray(1.0),))[1]
        return tangent, (along(jnp.asarray(step)) - along(jnp.asarray(-step))) / (2 * step)

    np.testing.assert_allclose(*both(), rtol=1e-6)


def test_average_velocity_takes_it_for_a_velocity():
    velocity = WeightedVelocity(GaussianMixture(*PLANE), AdaptiveWeight(0.5, OFFSET))
    average = AverageVelocity(velocity, rtol=1e-6, atol=1e-6)
    z, t = jnp.asarray(Z), jnp.asarray(T)
    found = eqx.filter_jit(average)(z, t, t)
    np.testing.assert_allclose(found, call(velocity, Z, T), 1e-12)


@pytest.mark.parametrize(("power", "offset"), [(0.25, 0.01), (0.5, 0.01), (1.0, 0.01), (1.0, 1.0), (1.5, 0.1)])
def test_sum_of_exponentials_is_the_weight(power, offset):
    velocity = WeightedVelocity(GaussianMixture(*PLANE), AdaptiveWeight(power, offset))
    s, factor = velocity._exponentials()
    error = np.geomspace(1e-3, 30, 20)
    ratio = np.exp(-error[:, None] * s) @ factor / (error + offset) ** -power
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_data_of_other_dimensions_are_weighted_too():
    mixture = GaussianMixture(np.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 0.3)
    flat = GaussianMixture(np.array([[-1.0], [1.0]]), 0.3)
    z = np.array([0.1, 0.3, -0.2])
    assert weighted(mixture, 0.5, z)[0] < marginal(mixture, z)[0]  # v points away from the data
    assert weighted(flat, 0.5, z[:1])[0] < marginal(flat, z[:1])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 1}, "nodes must be >= 2, got 1"),
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"mixture": GaussianMixture(np.zeros((4, 1, 2), np.float32), 1.0)}, r"mixture .* vectors, .* got \(4, 1, 2\)"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightedVelocity(**{"mixture": GaussianMixture(*PLANE), "weight": AdaptiveWeight(), **options})
