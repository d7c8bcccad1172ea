import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.linalg

from mf_eqx.metrics import frechet_distance, frechet_distance_of_moments


def normal(seed: int, *shape: int):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, dim: int, rank: int):
    factor = normal(seed, dim, rank)
    return factor @ factor.T


def rotation(seed: int, dim: int):
    return np.linalg.qr(normal(seed, dim, dim))[0]


def test_moments_of_regular_gaussians_agree_with_sqrtm():
    mean_a, mean_b = normal(1, 6), normal(2, 6)
    cov_a, cov_b = covariance(3, 6, 10), covariance(4, 6, 8)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    np.testing.assert_allclose(frechet_distance_of_moments(mean_a, cov_a, mean_b, cov_b), expected, rtol=1e-11)


def test_moments_agree_with_the_squared_bures_wasserstein_distance_of_pot():
    mean_a, mean_b = normal(1, 6), normal(2, 6)
    cov_a, cov_b = covariance(3, 6, 10), covariance(4, 6, 8)
    expected = ot.gaussian.bures_wasserstein_distance(mean_a, mean_b, cov_a, cov_b) ** 2
    np.testing.assert_allclose(frechet_distance_of_moments(mean_a, cov_a, mean_b, cov_b), expected, rtol=1e-9)


def test_commuting_covariances_give_the_distance_of_their_standard_deviations():
    turn = rotation(5, 4)
    std_a, std_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 0.1, 1.0])
    cov_a, cov_b = (turn * std_a**2) @ turn.T, (turn * std_b**2) @ turn.T
    value = frechet_distance_of_moments(np.zeros(4), cov_a, np.ones(4), cov_b)
    np.testing.assert_allclose(value, 4 + np.sum((std_a - std_b) ** 2), rtol=1e-12)


def test_means_alone_give_their_squared_distance():
    cov = covariance(3, 5, 9)
    value = frechet_distance_of_moments(np.zeros(5), cov, np.array([1.0, 2.0, 0.0, 0.0, -2.0]), cov)
    np.testing.assert_allclose(value, 9, rtol=1e-11)


def test_gaussian_lines_at_an_angle_have_the_closed_form():
    # C = s s^T is singular; the root of the product has the trace |s_a . s_b|, and sqrtm has no answer here.
    a, b = np.array([1.0, 0.0, 2.0]), np.array([0.5, 3.0, -1.0])
    value = frechet_distance_of_moments(np.zeros(3), np.outer(a, a), np.zeros(3), np.outer(b, b))
    np.testing.assert_allclose(value, a @ a + b @ b - 2 * abs(a @ b), atol=1e-12)


def test_covariances_on_orthogonal_subspaces_give_the_sum_of_their_traces():
    cov_a, cov_b = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 4.0])
    np.testing.assert_allclose(frechet_distance_of_moments(np.zeros(4), cov_a, np.zeros(4), cov_b), 10, rtol=1e-12)


def test_zero_covariances_are_accepted():
    zero = np.zeros((2, 2))
    assert frechet_distance_of_moments(np.zeros(2), zero, np.array([3.0, 4.0]), zero) == 25
    np.testing.assert_allclose(frechet_distance_of_moments(np.zeros(2), zero, np.zeros(2), np.eye(2)), 2, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 25), (2, 30)])
def test_sample_distance_uses_means_and_unbiased_covariances(n, m):
    a, b = normal(1, n, 3), 0.5 * normal(2, m, 3) + 1
    moments = (a.mean(0), np.cov(a, rowvar=False, ddof=1), b.mean(0), np.cov(b, rowvar=False, ddof=1))
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance_of_moments(*moments), rtol=1e-7)


def test_single_feature_has_the_closed_form():
    a, b = normal(1, 15, 1), 3 * normal(2, 20, 1) + 1
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [100, 8], ids=["regular", "fewer points than features"])
def test_frechet_distance_of_a_sample_to_itself_is_zero(n):
    # 8 points in 20 features leave 13 null directions; the root of a rounded zero would be 1e-8 in each.
    a = normal(1, n, 20)
    assert abs(frechet_distance(a, a)) < 1e-13 * np.trace(np.cov(a, rowvar=False))


@pytest.mark.parametrize("n", [100, 8], ids=["regular", "fewer points than features"])
def test_frechet_distance_of_a_shift_is_its_squared_length(n):
    a, shift = normal(1, n, 20), normal(2, 20)
    np.testing.assert_allclose(frechet_distance(a, a + shift), np.sum(shift**2), rtol=1e-12)


def test_singular_covariance_against_a_regular_one_needs_the_roots_of_its_own_rank_alone():
    # With C_a = F F^T the other eigenvalues of C_a C_b are those of F^T C_b F. (sqrtm and POT give NaN here.)
    factor, cov_b = normal(3, 30, 5), covariance(4, 30, 40)
    cov_a = factor @ factor.T
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.linalg.eigvalsh(factor.T @ cov_b @ factor)).sum()
    value = frechet_distance_of_moments(np.zeros(30), cov_a, np.zeros(30), cov_b)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_small_eigenvalues_are_no_rounding():
    # The smallest, 1e-11 of the largest, contributes (1 - 1e-5.5)^2.
    scale, turn = np.logspace(0, -11, 6), rotation(5, 6)
    value = frechet_distance_of_moments(np.zeros(6), (turn * scale) @ turn.T, np.zeros(6), np.eye(6))
    np.testing.assert_allclose(value, np.sum((np.sqrt(scale) - 1) ** 2), rtol=1e-10)


def test_frechet_distance_is_symmetric():
    a, b = normal(1, 40, 3), 0.5 * normal(2, 25, 3) + 1
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-11)


def test_order_of_the_points_does_not_change_the_frechet_distance():
    a, b = normal(1, 40, 3), 0.5 * normal(2, 25, 3) + 1
    shuffled = frechet_distance(np.random.default_rng(3).permutation(a), b[::-1])
    np.testing.assert_allclose(shuffled, frechet_distance(a, b), rtol=1e-11)


def test_rotating_both_samples_does_not_change_the_frechet_distance():
    a, b, turn = normal(1, 40, 3), 0.5 * normal(2, 25, 3) + 1, rotation(5, 3)
    np.testing.assert_allclose(frechet_distance(a @ turn, b @ turn), frechet_distance(a, b), rtol=1e-11)


def test_float32_features_are_compared_in_float64():
    # The spread is 1e-4 of the mean: moments in float32 would leave nothing of it.
    a, b = 1 + 1e-4 * normal(1, 50, 3), 1 + 2e-4 * normal(2, 50, 3)
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = frechet_distance(a.astype(np.float64), b.astype(np.float64))
    assert frechet_distance(jnp.asarray(a), jnp.asarray(b)) == expected
    assert isinstance(expected, float)


def test_float32_moments_are_accepted():
    a = normal(1, 8, 20)
    mean, cov = a.mean(0).astype(np.float32), np.cov(a, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(cov.astype(np.float64)).min() < 0
    value = frechet_distance_of_moments(mean, cov, mean, cov)
    # Rounding a covariance to float32 moves its null eigenvalues by about 1e-7 of the largest; they enter linearly.
    assert abs(value) < 1e-4 * np.trace(cov)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5,), (5, 2), r"`a` must have shape \(sample, dim\).*got shape \(5,\)"),
        ((5, 2), (1, 2), r"`b` must have .*sample >= 2.*got shape \(1, 2\)"),
        ((5, 2), (6, 3), r"`a` and `b` must have the same dim, got shapes \(5, 2\) and \(6, 3\)"),
    ],
)
def test_wrong_feature_shapes_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(a), np.zeros(b))


def test_features_that_are_not_finite_are_refused():
    b = np.zeros((5, 2))
    b[1, 1], b[2, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="`b` must be finite, got 2 values"):
        frechet_distance(np.zeros((5, 2)), b)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_a": np.zeros((2, 1))}, r"`mean_a` must have shape \(dim,\).*got shape \(2, 1\)"),
        ({"cov_a": np.eye(3)}, r"`cov_a` must have shape \(2, 2\).*got \(3, 3\)"),
        ({"cov_b": np.ones(2)}, r"`cov_b` must have shape \(2, 2\).*got \(2,\)"),
        ({"mean_b": np.zeros(3), "cov_b": np.eye(3)}, r"`mean_a` and `mean_b` must .* \(2,\) and \(3,\)"),
        ({"mean_b": np.array([0, np.inf])}, "`mean_b` must be finite, got 1 value"),
        ({"cov_a": np.diag([1, np.nan])}, "`cov_a` must be finite, got 1 value"),
        ({"cov_b": np.array([[1, 0.5], [0, 1]])}, "`cov_b` must be symmetric, got entries that differ by 0.5"),
        ({"cov_a": np.diag([1, -0.1])}, "`cov_a` must be positive semi-definite, got the eigenvalue -0.1"),
        ({"cov_b": np.diag([-0.1, 1])}, "`cov_b` must be positive semi-definite, got the eigenvalue -0.1"),
    ],
)
def test_wrong_moments_are_refused(change, message):
    moments = {"mean_a": np.zeros(2), "cov_a": np.eye(2), "mean_b": np.zeros(2), "cov_b": np.eye(2)}
    with pytest.raises(ValueError, match=message):
        frechet_distance_of_moments(**(moments | change))
