import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.spatial
import scipy.stats

from mf_eqx.metrics import energy_distance, maximum_mean_discrepancy, sliced_wasserstein
from mf_eqx.metrics._distance import _directions, _distance, _mean_of_pairs


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


KEY = jax.random.key(0)
SIZES = [(7, 7), (6, 9), (40, 25), (1, 5), (8, 4)]


# Sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sliced_wasserstein_in_one_dimension_is_the_exact_wasserstein_distance(n, m):
    a, b = normal(1, n, 1), 2 * normal(2, m, 1) + 0.3
    exact = ot.wasserstein_1d(np.asarray(a[:, 0]), np.asarray(b[:, 0]), p=2)
    np.testing.assert_allclose(sliced_wasserstein(a, b, projections=3, key=KEY) ** 2, exact, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 25)])
def test_sliced_wasserstein_agrees_with_pot_along_the_same_directions(n, m):
    a, b = normal(1, n, 3), 0.5 * normal(2, m, 3) + 1
    directions = np.asarray(_directions(50, 3, jnp.float64, key=KEY))
    expected = ot.sliced_wasserstein_distance(np.asarray(a), np.asarray(b), projections=directions.T, p=2)
    np.testing.assert_allclose(sliced_wasserstein(a, b, projections=50, key=KEY), expected, rtol=1e-12)


def test_directions_have_unit_length_and_no_preferred_axis():
    directions = np.asarray(_directions(20_000, 3, jnp.float64, key=KEY))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-12)
    # Entries of the mean outer product have a standard deviation of at most 0.3 / sqrt(20000) = 0.0021.
    np.testing.assert_allclose(directions.T @ directions / 20_000, np.eye(3) / 3, atol=0.009)
    np.testing.assert_allclose(directions.mean(axis=0), 0, atol=0.017)


def test_repeating_every_point_changes_no_sliced_wasserstein_distance():
    a, b = normal(1, 12, 2), normal(2, 9, 2)
    repeated = sliced_wasserstein(np.repeat(a, 3, axis=0), b, key=KEY)
    np.testing.assert_allclose(repeated, sliced_wasserstein(a, b, key=KEY), rtol=1e-12)


def test_squared_sliced_wasserstein_of_a_shift_is_its_squared_length_over_dim():
    a, shift = normal(1, 30, 4), np.array([1.0, -2.0, 0.5, 3.0])
    squared = sliced_wasserstein(a, a + shift, projections=20_000, key=KEY) ** 2
    # The mean of 20000 squared cosines in four dimensions has a relative standard deviation of 0.7%.
    np.testing.assert_allclose(squared, np.sum(shift**2) / 4, rtol=0.03)


def test_squared_sliced_wasserstein_of_a_scaling_is_the_projected_variance():
    a = normal(1, 30, 2)
    directions = _directions(16, 2, jnp.float64, key=KEY)
    expected = np.mean((a @ np.asarray(directions).T) ** 2)
    np.testing.assert_allclose(sliced_wasserstein(a, 2 * a, projections=16, key=KEY) ** 2, expected, rtol=1e-12)


def test_sliced_wasserstein_depends_on_the_key_alone_among_equal_samples():
    a, b = normal(1, 20, 3), normal(2, 20, 3)
    first, again = (sliced_wasserstein(a, b, projections=4, key=KEY) for _ in range(2))
    assert first == again
    assert first != sliced_wasserstein(a, b, projections=4, key=jax.random.key(1))


# Energy distance


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_energy_distance_in_one_dimension_is_the_square_of_scipy(n, m):
    a, b = normal(1, n, 1), 2 * normal(2, m, 1) + 0.3
    root = scipy.stats.energy_distance(np.asarray(a[:, 0]), np.asarray(b[:, 0]))
    np.testing.assert_allclose(energy_distance(a, b), root**2, rtol=1e-11)


def test_energy_distance_is_the_v_statistic_over_all_pairs():
    a, b = normal(1, 23, 3), normal(2, 31, 3) + 0.2
    x, y = np.asarray(a), np.asarray(b)
    expected = 2 * ot.dist(x, y, "euclidean").mean()
    expected -= ot.dist(x, x, "euclidean").mean() + ot.dist(y, y, "euclidean").mean()
    # POT expands the square, which costs half the digits for the zero distances of a point to itself.
    np.testing.assert_allclose(energy_distance(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(23, 31), (60, 20_000), (3, 600_000)], ids=["one block", "rest", "single rows"])
def test_mean_distance_over_blocks_of_rows_is_that_of_the_full_matrix(n, m):
    a, b = normal(1, n, 2), normal(2, m, 2)
    expected = scipy.spatial.distance.cdist(np.asarray(a), np.asarray(b)).mean()
    np.testing.assert_allclose(_mean_of_pairs(_distance, a, b), expected, rtol=1e-12)


def test_energy_distance_of_two_points_is_twice_their_distance():
    np.testing.assert_allclose(energy_distance(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]])), 10, rtol=1e-15)


def test_energy_distance_of_shifted_gaussians_approaches_the_closed_form():
    shift = 1.5
    # X - Y is N(-shift, 2) and X - X' is N(0, 2); the mean of |N(m, s^2)| is that of a folded normal.
    cross = scipy.stats.foldnorm.mean(shift / np.sqrt(2), scale=np.sqrt(2))
    within = scipy.stats.foldnorm.mean(0, scale=np.sqrt(2))
    # Equal masses at the midpoints of 2000 quantiles stand for the Gaussian; what they miss is of order 1/2000.
    quantiles = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    a = quantiles[:, None]
    np.testing.assert_allclose(energy_distance(a, a + shift), 2 * (cross - within), rtol=2e-3)


def test_energy_distance_of_ten_thousand_points_holds_no_matrix_of_pairs():
    points = jax.ShapeDtypeStruct((10_000, 2), jnp.float32)
    memory = jax.jit(energy_distance).lower(points, points).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 50e6


def test_energy_distance_in_float32_keeps_six_digits_of_the_mean_distance():
    a, b = normal(1, 3000, 2), normal(2, 2000, 2) + 5
    exact = energy_distance(a, b)
    single = energy_distance(a.astype(np.float32), b.astype(np.float32))
    assert single.dtype == jnp.float32
    assert abs(single - exact) < 1e-6 * 5


# Maximum mean discrepancy


def kernel(squared_distance, bandwidth=1.0, halvings=3):
    widths = bandwidth / 2.0 ** np.arange(halvings + 1)
    return np.mean([np.exp(-squared_distance / (2 * width**2)) for width in widths], axis=0)


def mean_kernel_of_gaussians(shift, variance, bandwidth=1.0, halvings=3):
    """E k(x, y) in one dimension where x - y is N(shift, variance)."""
    total = variance + (bandwidth / 2.0 ** np.arange(halvings + 1)) ** 2
    return np.mean(np.sqrt((total - variance) / total) * np.exp(-(shift**2) / (2 * total)))


@pytest.mark.parametrize(("bandwidth", "halvings"), [(1.0, 0), (1.0, 3), (0.3, 1), (5.0, 4)])
def test_maximum_mean_discrepancy_is_the_v_statistic_over_all_pairs(bandwidth, halvings):
    a, b = normal(1, 23, 3), normal(2, 31, 3) + 0.2

    def mean(x, y):
        return kernel(scipy.spatial.distance.cdist(x, y, "sqeuclidean"), bandwidth, halvings).mean()

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    found = maximum_mean_discrepancy(a, b, bandwidth=bandwidth, halvings=halvings)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_default_kernels_of_maximum_mean_discrepancy_go_from_1_to_an_eighth():
    a, b = normal(1, 23, 3), normal(2, 31, 3)
    expected = maximum_mean_discrepancy(a, b, bandwidth=1.0, halvings=3)
    np.testing.assert_array_equal(maximum_mean_discrepancy(a, b), expected)


@pytest.mark.parametrize("halvings", [0, 3])
def test_maximum_mean_discrepancy_of_two_gaussians_approaches_the_closed_form(halvings):
    shift, std = 0.5, 2.0
    within = [mean_kernel_of_gaussians(0.0, 2 * s**2, halvings=halvings) for s in (1.0, std)]
    expected = sum(within) - 2 * mean_kernel_of_gaussians(shift, 1 + std**2, halvings=halvings)
    # Equal masses at the midpoints of 2000 quantiles stand for the Gaussian; what they miss is of order 1/2000.
    a = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    np.testing.assert_allclose(maximum_mean_discrepancy(a, shift + std * a, halvings=halvings), expected, rtol=2e-3)


def test_maximum_mean_discrepancy_of_samples_of_one_gaussian_is_on_average_that_of_its_docstring():
    n, m, runs = 40, 60, 400
    found = jax.vmap(maximum_mean_discrepancy)(normal(1, runs, n, 1), normal(2, runs, m, 1))
    expected = (1 / n + 1 / m) * (1 - mean_kernel_of_gaussians(0.0, 2.0))
    np.testing.assert_allclose(found.mean(), expected, atol=4 * found.std() / np.sqrt(runs))
    assert found.std() / np.sqrt(runs) < 0.03 * expected


def test_maximum_mean_discrepancy_of_two_distant_points_is_two():
    a, b = jnp.zeros((3, 2)), jnp.full((5, 2), 50.0)
    np.testing.assert_allclose(maximum_mean_discrepancy(a, b), 2, rtol=1e-15)


def test_bandwidth_of_maximum_mean_discrepancy_scales_with_the_points():
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    expected = maximum_mean_discrepancy(a, b, bandwidth=0.7)
    np.testing.assert_allclose(maximum_mean_discrepancy(3 * a, 3 * b, bandwidth=2.1), expected, rtol=1e-12)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, np.nan])
def test_bandwidth_that_is_not_positive_is_refused(bandwidth):
    with pytest.raises(ValueError, match=f"bandwidth must be > 0 and finite, got {bandwidth}"):
        maximum_mean_discrepancy(jnp.zeros((4, 2)), jnp.zeros((4, 2)), bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("halvings", "message"),
    [(-1, "an integer >= 0, got -1"), (2.5, "an integer >= 0, got 2.5"), (64, "at most 63, got 64")],
)
def test_halvings_out_of_range_are_refused(unchecked, halvings, message):
    with pytest.raises(ValueError, match=f"halvings must be {message}"):
        maximum_mean_discrepancy(jnp.zeros((4, 2)), jnp.zeros((4, 2)), halvings=halvings)


def test_maximum_mean_discrepancy_of_the_most_halvings_is_finite():
    assert np.isfinite(maximum_mean_discrepancy(jnp.zeros((4, 2)), jnp.ones((4, 2)), halvings=63))


# All


def sliced(a, b):
    return sliced_wasserstein(a, b, projections=16, key=KEY)


every = pytest.mark.parametrize(
    "distance", [sliced, energy_distance, maximum_mean_discrepancy], ids=["sliced", "energy", "kernel"]
)


@every
def test_distance_of_a_sample_to_itself_is_zero(distance):
    a = normal(1, 50, 3)
    assert abs(distance(a, a)) < 1e-14


@every
def test_distance_of_different_samples_is_positive(distance):
    assert distance(normal(1, 50, 3), normal(2, 50, 3)) > 1e-3


@every
def test_distance_is_symmetric(distance):
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-12)


@every
def test_order_of_the_points_does_not_matter(distance):
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    shuffled = distance(a[np.random.default_rng(3).permutation(20)], b[::-1])
    np.testing.assert_allclose(shuffled, distance(a, b), rtol=1e-12)


@every
def test_moving_both_samples_together_does_not_matter(distance):
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    np.testing.assert_allclose(distance(a + 7, b + 7), distance(a, b), rtol=1e-11)


@pytest.mark.parametrize("distance", [sliced, energy_distance], ids=["sliced", "energy"])
def test_distances_scale_with_the_points(distance):
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    np.testing.assert_allclose(distance(3 * a, 3 * b), 3 * distance(a, b), rtol=1e-12)


@every
def test_large_integers_are_not_folded_into_small_ones(unchecked, distance):
    a, b = np.array([[0], [10**10]]), np.array([[0], [5 * 10**9]])
    with jax.enable_x64(False):
        assert distance(a, b) == distance(a.astype(np.float32), b.astype(np.float32))


@every
def test_jit_and_eager_agree(distance):
    a, b = normal(1, 20, 3), normal(2, 33, 3)
    np.testing.assert_allclose(jax.jit(distance)(a, b), distance(a, b), rtol=1e-12)


@every
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_half_precision_points_are_compared_in_float32(distance, promotion):
    a, b = normal(1, 20, 3).astype(jnp.bfloat16), normal(2, 33, 3).astype(np.float32)
    expected = distance(a.astype(np.float32), b)
    with jax.numpy_dtype_promotion(promotion):
        value = distance(a, b)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@every
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5,), (5, 2), r"`a` must have shape \(sample, dim\).*got shape \(5,\)"),
        ((5, 2), (5, 2, 1), r"`b` must have shape \(sample, dim\).*got shape \(5, 2, 1\)"),
        ((0, 2), (5, 2), r"`a` must have .*sample >= 1.*got shape \(0, 2\)"),
        ((5, 2), (5, 0), r"`b` must have .*dim >= 1.*got shape \(5, 0\)"),
        ((5, 2), (6, 3), r"`a` and `b` must have the same dim, got shapes \(5, 2\) and \(6, 3\)"),
    ],
)
def test_wrong_shapes_are_refused(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(jnp.zeros(a), jnp.zeros(b))


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_samples_that_are_not_finite_are_refused_by_name(distance, name, value):
    samples = {"a": normal(1, 20, 3), "b": normal(2, 33, 3)}
    samples[name][4, 1:] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got 2 values that are not"):
        distance(**samples)


@every
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_distance_of_what_is_not_finite_is_nan_under_jit(distance, value):
    a, b = normal(1, 20, 3), normal(2, 20, 3)
    b[4, 1] = value
    assert jnp.isnan(jax.jit(distance)(a, b)) and jnp.isnan(jax.jit(distance)(b, a))


@every
def test_values_that_float32_does_not_hold_are_refused(distance):
    with jax.enable_x64(False), pytest.raises(ValueError, match="`a` must be finite, got 1 values that are not"):
        distance(np.array([[0.0], [1e300]]), np.zeros((2, 1)))


@pytest.mark.parametrize("projections", [0, -3, 2.5, True])
def test_projections_that_are_no_count_are_refused(unchecked, projections):
    with pytest.raises(ValueError, match=f"projections must be an integer >= 1, got {projections}"):
        sliced_wasserstein(jnp.zeros((4, 2)), jnp.zeros((4, 2)), projections=projections, key=KEY)
