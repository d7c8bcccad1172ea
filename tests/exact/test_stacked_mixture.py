import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import LinearInterpolant, TrigonometricInterpolant
from mf_eqx.exact import AverageVelocity, GaussianMixture, MarginalVelocity, StackedMixture

PATHS = (LinearInterpolant(), TrigonometricInterpolant())
COPIES, DIM = 3, 2
CONDITIONS = pytest.mark.parametrize("label", [None, 4, 7])

pytestmark = pytest.mark.usefixtures("x64")


def mixture():
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    return GaussianMixture(mean, np.array([0.3, 0.5, 0.4]), np.array([0.5, 0.2, 0.3]), np.array([7, 4, 7]))


def stacked(copies=COPIES):
    return StackedMixture(mixture(), copies)


def state():
    return np.random.default_rng(0).standard_normal(COPIES * DIM)


def condition(label):
    return None if label is None else np.array(label)


@eqx.filter_jit
def samples(distribution, number, condition=None):
    return jax.vmap(lambda key: distribution.sample(key=key, condition=condition))(jr.split(jr.key(1), number))


@eqx.filter_jit
def velocity(distribution, path, z, t, condition=None):
    return distribution.velocity(path, z, t, condition)


@eqx.filter_jit
def log_density(distribution, x, condition=None):
    return distribution.log_density(x, condition)


@eqx.filter_jit
def average_velocity(distribution, z, r, t, condition):
    return AverageVelocity(MarginalVelocity(distribution), rtol=1e-8, atol=1e-8)(z, r, t, condition)


# Velocity


@CONDITIONS
@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_that_of_one_copy_part_by_part(path, label):
    z, t = state(), np.array(0.6)
    expected = [velocity(mixture(), path, part, t, condition(label)) for part in z.reshape(COPIES, DIM)]
    np.testing.assert_allclose(velocity(stacked(), path, z, t, condition(label)), np.concatenate(expected), rtol=1e-13)


def test_velocity_of_two_copies_is_that_of_the_product_mixture():
    mean, weight = np.asarray(mixture().mean), np.asarray(mixture().weight)
    one = GaussianMixture(mean, 0.4, weight)  # of equal std, so that products are isotropic
    i, j = (index.ravel() for index in np.meshgrid(range(3), range(3)))
    product = GaussianMixture(np.concatenate([mean[i], mean[j]], axis=1), 0.4, weight[i] * weight[j])
    z, t = state()[:4], np.array(0.3)
    expected = velocity(product, PATHS[0], z, t)
    np.testing.assert_allclose(velocity(StackedMixture(one, 2), PATHS[0], z, t), expected, rtol=1e-12)


@CONDITIONS
def test_average_velocity_is_that_of_one_copy_part_by_part(label):
    z, r, t, label = state(), np.array(0.1), np.array(0.9), condition(label)
    expected = [average_velocity(mixture(), part, r, t, label) for part in z.reshape(COPIES, DIM)]
    # Each solve chooses steps of its own, and 1e-8 per step leaves some 1e-7.
    np.testing.assert_allclose(average_velocity(stacked(), z, r, t, label), np.concatenate(expected), atol=1e-6)


# Samples


@CONDITIONS
def test_every_copy_has_the_moments_of_the_mixture(label):
    number = 20_000
    x = samples(stacked(), number, condition(label)).reshape(number, COPIES, DIM)
    own = [k for k in range(3) if label in (None, mixture().label[k])]
    mean, std, weight = (np.asarray(leaf)[own] for leaf in (mixture().mean, mixture().std, mixture().weight))
    weight = weight / weight.sum()
    second = np.einsum("k,ki,kj->ij", weight, mean, mean) + weight @ std**2 * np.eye(DIM)
    for copy in range(COPIES):
        # Standard errors are below 1.4 / sqrt(20000) = 0.010 for the mean and 0.016 for the second moments.
        np.testing.assert_allclose(x[:, copy].mean(0), weight @ mean, atol=0.04)
        np.testing.assert_allclose(x[:, copy].T @ x[:, copy] / number, second, atol=0.06)


def test_copies_are_uncorrelated_in_value_and_in_square():
    number = 20_000
    x = samples(stacked(), number)
    for values in (x, x**2):
        blocks = np.corrcoef(values.T).reshape(COPIES, DIM, COPIES, DIM).transpose(0, 2, 1, 3)
        apart = blocks[~np.eye(COPIES, dtype=bool)]
        assert np.abs(apart).max() < 5 / np.sqrt(number)


# Density


@CONDITIONS
def test_log_density_is_the_sum_over_the_copies(label):
    x = state()
    expected = sum(log_density(mixture(), part, condition(label)) for part in x.reshape(COPIES, DIM))
    np.testing.assert_allclose(log_density(stacked(), x, condition(label)), expected, rtol=1e-13)


def test_condition_that_no_component_carries_gives_nan():
    assert np.isnan(velocity(stacked(), PATHS[0], state(), np.array(0.5), condition(5))).all()


# Errors


@pytest.mark.parametrize("copies", [0, -2])
def test_fewer_than_one_copy_is_refused(copies):
    with pytest.raises(ValueError, match=f"copies must be >= 1, got {copies}"):
        stacked(copies)


def test_mixture_of_images_is_refused():
    images = GaussianMixture(np.zeros((4, 1, 2, 2)), 0.5)
    message = r"mixture must be of vectors, with a mean of shape \(component, dim\), got \(4, 1, 2, 2\)"
    with pytest.raises(ValueError, match=message):
        StackedMixture(images, 2)
