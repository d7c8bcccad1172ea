import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from jaxtyping import TypeCheckError

from mf_eqx import exact, LinearInterpolant, TrigonometricInterpolant
from mf_eqx.exact import GaussianMixture, PointSet

PATHS = (LinearInterpolant(), TrigonometricInterpolant())
Z, T = np.array([0.4, -0.7]), np.array(0.6)
LINE = (np.array([[-1.5], [0.2], [1.0]]), np.array([0.3, 0.5, 0.2]), np.array([0.5, 0.2, 0.3]), np.array([0, 1, 0]))
PLANE = (
    np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]]),
    np.array([0.3, 0.5, 0.4]),
    np.array([0.5, 0.2, 0.3]),
    np.array([7, 4, 7]),
)

pytestmark = pytest.mark.usefixtures("x64")


@eqx.filter_jit
def velocity(mixture, path, z, t, condition=None):
    return mixture.velocity(path, jnp.asarray(z), jnp.asarray(t), condition)


@eqx.filter_jit
def log_density(mixture, x, condition=None):
    return mixture.log_density(jnp.asarray(x), condition)


@eqx.filter_jit
def sample(mixture, key):
    return mixture.sample(key=key)


@eqx.filter_jit
def labelled_samples(mixture, seed, number, condition=None):
    keys = jr.split(jr.key(seed), number)
    return jax.vmap(lambda key: mixture.labelled_sample(key=key, condition=condition))(keys)


def test_arrays_stay_float64():
    assert GaussianMixture(*PLANE).mean.dtype == jnp.float64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.95])
def test_velocity_equals_the_quadrature_of_the_conditional_velocity(path, label, t):
    mixture = GaussianMixture(*LINE)
    x = np.linspace(-12, 12, 40_001)
    alpha, sigma, alpha_rate, sigma_rate = (float(rate) for rate in path.rates(jnp.asarray(t)))
    own = [k for k in range(3) if label in (None, LINE[3][k])]
    density = sum(LINE[2][k] * scipy.stats.norm.pdf(x, LINE[0][k, 0], LINE[1][k]) for k in own)
    for z in (-1.4, 0.3, 2.0):
        eps = (z - alpha * x) / sigma
        likelihood = density * scipy.stats.norm.pdf(eps)
        expected = np.sum(likelihood * (alpha_rate * x + sigma_rate * eps)) / np.sum(likelihood)
        np.testing.assert_allclose(velocity(mixture, path, np.array([z]), np.array(t), label)[0], expected, 1e-9)


def test_velocity_at_time_0_is_minus_the_state_on_the_straight_path():
    np.testing.assert_allclose(velocity(GaussianMixture(*PLANE), PATHS[0], Z, np.array(0.0)), -Z, 1e-14)


def test_velocity_at_time_1_is_the_state_minus_the_mean_on_the_straight_path():
    expected = Z - PLANE[2] @ PLANE[0]
    np.testing.assert_allclose(velocity(GaussianMixture(*PLANE), PATHS[0], Z, np.array(1.0)), expected, 1e-14)


@eqx.filter_jit
def compiled_posterior(mixture, path, z, t, condition):
    return mixture.posterior(path, z, t, condition)


def posterior(mixture, path, z, t, label=None):
    condition = None if label is None else jnp.asarray(label)  # an array: one program for all labels
    return compiled_posterior(mixture, path, jnp.asarray(z), jnp.asarray(t), condition)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_posterior_of_one_gaussian_is_the_conditional_of_the_joint_gaussian(path, t):
    center, scale = np.array([0.5, -0.2]), 0.7
    mean, std, mass = posterior(GaussianMixture(center[None], scale), path, Z, t)
    # One coordinate of (v, z) is Gaussian with these rows on (x, eps); conditioned by the Schur complement.
    alpha, sigma, alpha_rate, sigma_rate = (float(rate) for rate in path.rates(jnp.asarray(t)))
    rows = np.array([[alpha_rate, sigma_rate], [alpha, sigma]])
    covariance = rows @ np.diag([scale**2, 1.0]) @ rows.T
    gain = covariance[0, 1] / covariance[1, 1]
    np.testing.assert_allclose(mean[0], alpha_rate * center + gain * (Z - alpha * center), 1e-13)
    np.testing.assert_allclose(std[0] ** 2, covariance[0, 0] - gain * covariance[0, 1], 1e-13)
    assert mass == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("label", [None, 7])
@pytest.mark.parametrize("t", [0.3, 0.8])
def test_posterior_has_the_mean_and_covariance_of_a_quadrature_over_the_data(path, label, t):
    # Data from -4 to 4 hold all but 1e-9 of it, and the sum over a smooth density converges exponentially.
    x = np.stack(np.meshgrid(*[np.linspace(-4, 4, 321)] * 2), axis=-1).reshape(-1, 2)
    own = [k for k in range(3) if label in (None, PLANE[3][k])]
    density = sum(PLANE[2][k] * scipy.stats.multivariate_normal.pdf(x, PLANE[0][k], PLANE[1][k] ** 2) for k in own)
    alpha, sigma, alpha_rate, sigma_rate = (float(rate) for rate in path.rates(jnp.asarray(t)))
    eps = (Z - alpha * x) / sigma
    share = density * np.exp(-np.sum(eps**2, axis=1) / 2)
    share /= share.sum()
    v = alpha_rate * x + sigma_rate * eps
    mean, std, mass = posterior(GaussianMixture(*PLANE), path, Z, t, label)
    second = np.einsum("k,ki,kj->ij", mass, mean, mean) + mass @ std**2 * np.eye(2)
    np.testing.assert_allclose(mass @ mean, share @ v, 1e-8)
    np.testing.assert_allclose(second, np.einsum("n,ni,nj->ij", share, v, v), 1e-8)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("label", [None, 4, 7])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_masses_of_the_posterior_sum_to_one_over_the_components_of_the_condition(path, label, t):
    mass = posterior(GaussianMixture(*PLANE), path, Z, t, label)[2]
    np.testing.assert_allclose(mass.sum(), 1, 1e-14)
    np.testing.assert_array_equal(mass > 0, [label in (None, own) for own in PLANE[3]])


def test_mean_of_the_posterior_is_the_velocity():
    *center, z = np.random.default_rng(0).standard_normal((4, 1, 3, 4))
    mixture = GaussianMixture(np.stack(center), PLANE[1], PLANE[2])
    mean, _, mass = posterior(mixture, PATHS[1], z, T)
    np.testing.assert_allclose(np.tensordot(mass, mean, 1), velocity(mixture, PATHS[1], z, T), 1e-13)


def test_posterior_knows_the_data_at_time_0_and_the_noise_at_time_1():
    mixture = GaussianMixture(*PLANE)
    np.testing.assert_allclose(posterior(mixture, PATHS[0], Z, 0.0)[1], np.ones(3), 1e-14)
    np.testing.assert_allclose(posterior(mixture, PATHS[0], Z, 1.0)[1], PLANE[1], 1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_jvp_of_the_velocity_equals_finite_differences(path):
    mixture, step = GaussianMixture(*PLANE), 1e-5

    @jax.jit
    @jax.vmap
    def both(t):
        def along(s):
            return mixture.velocity(path, Z + s * jnp.array([0.3, 1.0]), t + s)

        _, tangent = jax.jvp(along, (jnp.asarray(0.0),), (jnp.asarray(1.0),))
        return tangent, (along(jnp.asarray(step)) - along(jnp.asarray(-step))) / (2 * step)

    tangent, difference = both(jnp.array([0.0, 1e-3, 0.4, 1.0]))
    np.testing.assert_allclose(tangent, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_narrow_components_stay_finite_in_float32_far_from_the_data(path):
    with jax.enable_x64(False):
        mixture = GaussianMixture(PLANE[0].astype(np.float32), 0.01)
        z, t = jnp.array([40.0, -30.0]), jnp.array([0.0, 1e-6, 1.0])
        along = jax.vmap(lambda t: jax.jvp(lambda z, t: mixture.velocity(path, z, t), (z, t), (z, jnp.ones_like(t))))
        v, dv = jax.jit(along)(t)
    assert v.dtype == jnp.float32
    assert np.isfinite(v).all() and np.isfinite(dv).all()


def test_condition_selects_the_components_that_carry_the_label():
    mixture = GaussianMixture(*PLANE)
    part = GaussianMixture(*(values[[0, 2]] for values in PLANE[:3]))
    label = jnp.asarray(7)  # traced inside
    np.testing.assert_allclose(velocity(mixture, PATHS[0], Z, T, label), velocity(part, PATHS[0], Z, T), 1e-14)
    np.testing.assert_allclose(log_density(mixture, Z, label), log_density(part, Z), 1e-14)


def test_condition_that_no_component_carries_gives_nan():
    assert np.isnan(velocity(GaussianMixture(*PLANE), PATHS[0], Z, T, jnp.asarray(5))).all()


def test_image_shaped_data_equal_the_flattened_data():
    mean = np.random.default_rng(0).standard_normal((4, 12))
    flat, image = GaussianMixture(mean, 0.5), GaussianMixture(mean.reshape(4, 1, 3, 4), 0.5)
    z, key = np.linspace(-1.0, 1.0, 12), jr.key(0)
    image_z = z.reshape(1, 3, 4)
    image_v = velocity(image, PATHS[1], image_z, T)
    np.testing.assert_allclose(image_v, velocity(flat, PATHS[1], z, T).reshape(1, 3, 4), 1e-13)
    np.testing.assert_allclose(log_density(image, image_z), log_density(flat, z), 1e-14)
    np.testing.assert_array_equal(sample(image, key).ravel(), sample(flat, key))


def test_scalar_std_and_missing_weight_mean_equal_components():
    short, long = GaussianMixture(PLANE[0], 0.3), GaussianMixture(PLANE[0], np.full(3, 0.3), np.full(3, 5.0))
    np.testing.assert_allclose(velocity(short, PATHS[0], Z, T), velocity(long, PATHS[0], Z, T), 1e-14)
    np.testing.assert_allclose(log_density(short, Z), log_density(long, Z), 1e-14)


@pytest.mark.parametrize("label", [None, 4, 7])
def test_samples_have_the_moments_of_the_mixture(label):
    number = 100_000
    x, _ = labelled_samples(GaussianMixture(*PLANE), 1, number, None if label is None else jnp.asarray(label))
    own = [k for k in range(3) if label in (None, PLANE[3][k])]
    mean, std, weight = PLANE[0][own], PLANE[1][own], PLANE[2][own] / PLANE[2][own].sum()
    first = weight @ mean
    second = np.einsum("k,ki,kj->ij", weight, mean, mean) + weight @ std**2 * np.eye(2)
    # Standard errors are below 1.4 / sqrt(100000) = 0.0045 for the mean and 0.007 for the second moments.
    np.testing.assert_allclose(x.mean(0), first, atol=0.02)
    np.testing.assert_allclose(x.T @ x / number, second, atol=0.03)


def test_label_of_a_sample_is_that_of_its_component():
    x, label = labelled_samples(GaussianMixture(PLANE[0], 1e-3, PLANE[2], PLANE[3]), 2, 10_000)
    nearest = np.argmin(np.linalg.norm(np.asarray(x)[:, None] - PLANE[0], axis=2), axis=1)
    np.testing.assert_array_equal(label, PLANE[3][nearest])
    np.testing.assert_allclose(np.bincount(nearest) / 10_000, PLANE[2], atol=0.025)  # 5 standard errors


def many(dtype=np.float64):
    """256 components of unequal weight, with labels 0 to 7 in no order except that 0 comes first and 7 last."""
    rng = np.random.default_rng(0)
    label = np.concatenate([[0], rng.integers(0, 8, 254), [7]])
    mean, weight = np.arange(256)[:, None].astype(dtype), rng.uniform(0.1, 2.0, 256).astype(dtype)
    return GaussianMixture(mean, 1e-3, weight, label)


def test_components_are_drawn_by_their_weights_whatever_their_sum():
    number, mixture = 100_000, many()
    x, _ = labelled_samples(mixture, 4, number)
    counts = np.bincount(np.rint(x[:, 0]).astype(int), minlength=256)
    expected = number * np.asarray(mixture.weight / mixture.weight.sum())
    # 255 degrees of freedom; the right weights exceed this with probability 1e-3. The smallest expected count is 40.
    assert np.sum((counts - expected) ** 2 / expected) < scipy.stats.chi2(255).isf(1e-3)


@pytest.mark.parametrize("label", [0, 3, 7])
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
def test_condition_never_draws_a_component_of_another_label(label, x64):
    with jax.enable_x64(x64):
        mixture = many(np.float64 if x64 else np.float32)
        x, found = labelled_samples(mixture, 5, 20_000, jnp.asarray(label))
    drawn = np.unique(np.rint(x[:, 0]).astype(int))
    assert (np.asarray(found) == label).all()
    np.testing.assert_array_equal(drawn, np.flatnonzero(np.asarray(mixture.label) == label))  # nor misses one


@pytest.mark.parametrize("uniform", [0.0, 1 - np.finfo(np.float64).eps], ids=["least", "greatest"])
def test_extreme_draws_stay_within_the_components_of_the_condition(uniform, monkeypatch):
    monkeypatch.setattr(jr, "uniform", lambda key, shape, dtype: jnp.full(shape, uniform, dtype))
    for label in range(8):
        assert many().labelled_sample(key=jr.key(0), condition=jnp.asarray(label))[1] == label


def test_conditions_of_a_single_component_at_either_end_draw_that_component():
    mixture = GaussianMixture(np.arange(3.0)[:, None], 1e-3, np.array([1.0, 5.0, 2.0]), np.arange(3))
    for label in range(3):
        x, _ = labelled_samples(mixture, 6, 1000, jnp.asarray(label))
        np.testing.assert_array_equal(np.rint(x), np.full((1000, 1), label))


def test_labelled_and_plain_samples_of_one_key_agree():
    mixture, key = GaussianMixture(*PLANE), jr.key(3)
    np.testing.assert_array_equal(sample(mixture, key), eqx.filter_jit(mixture.labelled_sample)(key=key)[0])


def test_log_density_equals_that_of_scipy():
    each = [scipy.stats.multivariate_normal.pdf(Z, m, s**2) for m, s in zip(PLANE[0], PLANE[1], strict=True)]
    np.testing.assert_allclose(log_density(GaussianMixture(*PLANE), Z), np.log(PLANE[2] @ each), 1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PLANE[0], 0.0), "std must be > 0"),
        ((PLANE[0], np.array([0.1, np.nan, 0.1])), "std must be > 0"),
        ((PLANE[0], 0.1, np.array([1.0, 0.0, 1.0])), "weight must be > 0"),
        ((PLANE[0], 0.1, -np.ones(3)), "weight must be > 0"),
        ((PLANE[0][:0], 0.1), "mean must have at least one component"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


@pytest.mark.parametrize("arguments", [(np.full(2, 0.1),), (0.1, np.ones(2)), (0.1, None, np.arange(4))])
def test_arrays_that_do_not_fit_the_means_are_refused(arguments):
    with pytest.raises((ValueError, TypeCheckError)):  # the latter from jaxtyping, where runtime checks are on
        GaussianMixture(PLANE[0], *arguments)


def test_means_may_be_integers():
    mixture = GaussianMixture(np.array([[0, 1], [2, 3]]), 0.1)
    assert jnp.issubdtype(mixture.mean.dtype, jnp.floating) and float(mixture.std[0]) == pytest.approx(0.1)
    points = PointSet(np.array([[0, 1], [2, 3]]), np.array([0.25, 0.75]))
    assert float(points.weight[1]) == 0.75


def test_condition_without_labels_is_refused():
    with pytest.raises(ValueError, match="label must be given"):
        velocity(GaussianMixture(PLANE[0], 0.1), PATHS[0], Z, T, jnp.asarray(1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(5, 2), (1,), (3,), ()])
@pytest.mark.parametrize(
    "value",
    [
        lambda mixture, z: mixture.velocity(LinearInterpolant(), z, 0.5),
        lambda mixture, z: mixture.log_density(z),
        lambda mixture, z: exact.StackedMixture(mixture, 3).log_density(z),
        lambda mixture, z: exact.StackedMixture(mixture, 3).velocity(LinearInterpolant(), z, 0.5),
        lambda mixture, z: exact.PointSet(mixture.mean).velocity(LinearInterpolant(), z, 0.5),
        lambda mixture, z: exact.GaussianAverageVelocity(mixture.mean[0], 0.3)(z, 0.0, 1.0),
        lambda mixture, z: exact.PointMassAverageVelocity(mixture.mean[0])(z, 0.0, 1.0),
    ],
    ids=["velocity", "density", "stacked density", "stacked velocity", "points", "Gaussian", "point"],
)
def test_what_is_no_point_of_the_data_is_refused_and_not_broadcast(value, shape):
    with pytest.raises(ValueError, match=r"must have the shape of one data point, .* jax\.vmap makes batches"):
        value(exact.GaussianMixture(jnp.arange(10.0).reshape(5, 2), 1.0), jnp.ones(shape))


def test_weights_may_have_a_sum_that_is_not_finite():
    mixture = exact.GaussianMixture(jnp.array([[0.0], [100.0]], jnp.float32), 1.0, np.array([3e38, 3e38]))
    share = jnp.mean(exact.draw(mixture, 1000, jr.key(0)) > 50)
    assert 0.44 < share < 0.56  # the standard error is 0.016


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.array([0, 2**40]), "label must be representable in int32, got 1099511627776"),
        (np.array([0.0, 1.0]), "label must be integers, got float"),
    ],
)
def test_labels_that_jax_would_change_are_refused(label, message):
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        exact.GaussianMixture(np.zeros((2, 2), np.float32), 1.0, label=label)


@pytest.mark.parametrize("std", [1e-25, 1e25])
def test_deviations_whose_squares_are_not_numbers_are_refused(std):
    with jax.enable_x64(False), pytest.raises(ValueError, match="square of std in float32 must be > 0 and finite"):
        exact.GaussianMixture(np.zeros((1, 2), np.float32), std)
