import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from mf_eqx.metrics import _precision_recall, precision_recall


def points(rows, dim=4, seed=0, scale=1.0, shift=0.0):
    return (scale * np.random.default_rng(seed).standard_normal((rows, dim)) + shift).astype(np.float32)


def share_on_manifold(queries, sample, neighbours):
    """By scikit-learn, and one comparison at a time."""
    distances, _ = NearestNeighbors(n_neighbors=neighbours + 1).fit(sample).kneighbors(sample)
    radii = distances[:, -1]
    inside = [any(np.linalg.norm(q - p) <= radius for p, radius in zip(sample, radii, strict=True)) for q in queries]
    return np.mean(inside)


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["near zero", "far from zero"])
def test_shares_are_those_of_scikit_learn(neighbours, shift):
    generated, real = points(70, seed=1, scale=0.7, shift=shift), points(50, shift=shift)
    ours = precision_recall(generated, real, neighbours=neighbours)
    expected = share_on_manifold(generated, real, neighbours), share_on_manifold(real, generated, neighbours)
    assert min(expected) > 0.1 and max(expected) < 1
    np.testing.assert_allclose(ours, expected, rtol=1e-15)


def exact_shares(generated, real, neighbours=3):
    """By differences in float64."""
    distances = [cdist(a, b, "sqeuclidean") for a, b in [(generated, real), (real, real), (generated, generated)]]
    across, *within = (np.round(found, 12) for found in distances)
    real_radii, generated_radii = (np.sort(found, axis=1)[:, neighbours] for found in within)
    return (across <= real_radii).any(axis=1).mean(), (generated_radii >= across.T).any(axis=1).mean()


@pytest.mark.parametrize("dim", [20, 100], ids=["differences", "products"])
def test_ties_of_points_with_few_values_are_not_decided_by_rounding(dim):
    random = np.random.default_rng(0)
    generated, real = ((random.random((count, dim)) < 0.35).astype(np.float32) for count in (300, 260))
    expected = exact_shares(generated, real)
    assert max(expected) < 1
    np.testing.assert_allclose(precision_recall(generated, real), expected, rtol=1e-15)


def test_clusters_far_apart_and_narrow_have_the_shares_of_float64():
    centres = 100 * np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    generated, real = (
        np.concatenate([points(40, 2, seed + i, 1e-3) + c for i, c in enumerate(centres)]) for seed in (0, 5)
    )
    expected = exact_shares(generated.astype(np.float32), real.astype(np.float32))
    assert max(expected) < 1
    # One point of 120 may lie on the rim of a ball to within the rounding of float32.
    np.testing.assert_allclose(precision_recall(generated, real), expected, atol=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_mean_costs_no_more_digits_than_the_dtype_loses(dtype):
    generated, real = points(300, 100, seed=1).astype(dtype), points(260, 100).astype(dtype)
    moved = [points + dtype(2**30 if dtype is np.float64 else 2**5) for points in (generated, real)]
    # The sum with the mean rounds the points: two of 260 may leave or enter a ball.
    np.testing.assert_allclose(precision_recall(*moved), precision_recall(generated, real), atol=0.01)


def test_blocks_of_rows_do_not_change_the_shares(monkeypatch):
    generated, real = points(70, seed=1), points(50)
    whole = precision_recall(generated, real)
    monkeypatch.setattr(_precision_recall, "_DISTANCES_PER_BLOCK", 400)
    # Another shape, so that nothing compiled before is used again: one point is left out of neither's neighbourhood.
    blocked = precision_recall(np.pad(generated, ((0, 0), (0, 1))), np.pad(real, ((0, 0), (0, 1))))
    assert blocked == whole


def test_sample_is_on_its_own_manifold():
    real = points(40)
    assert precision_recall(real, real) == (1, 1)


def test_narrow_samples_are_precise_and_recall_little():
    precision, recall = precision_recall(points(100, scale=0.1), points(100, seed=1))
    assert precision == 1 and recall < 0.2


def test_distant_samples_have_neither():
    assert precision_recall(points(30, shift=50), points(30)) == (0, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rows", "neighbours", "message"),
    [
        (20, 0, "an integer >= 1, got 0"),
        (20, 3.0, "an integer >= 1, got 3.0"),
        (3, 3, "below the numbers of points, 3 and 20, got 3"),
    ],
)
def test_wrong_numbers_of_neighbours_are_refused(rows, neighbours, message):
    with pytest.raises(ValueError, match=f"neighbours must be {message}"):
        precision_recall(points(rows), points(20), neighbours=neighbours)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["generated", "real"])
def test_features_that_are_not_finite_are_refused_by_name(name, value):
    samples = {"generated": points(30, seed=1), "real": points(30)}
    samples[name][:5, 3] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got 5 values that are not"):
        precision_recall(**samples)


@pytest.mark.parametrize("value", [1e20, 1e300], ids=["its square", "itself"])
@pytest.mark.parametrize("name", ["generated", "real"])
def test_features_whose_distances_float32_does_not_hold_are_refused(name, value):
    samples = {"generated": points(30, seed=1).astype(np.float64), "real": points(30).astype(np.float64)}
    samples[name][3, 3] = value
    with pytest.raises(ValueError, match=r"squares of `\w+` in float32 must be finite, got \d+ values that are not"):
        precision_recall(**samples)


@pytest.mark.parity
@pytest.mark.parametrize("neighbours", [3, 5])
def test_shares_are_those_of_torch_fidelity(neighbours):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    generated, real = points(90, dim=20, seed=1, scale=0.8), points(60, dim=20)
    expected = theirs.calculate_precision_recall_full(torch.from_numpy(generated), torch.from_numpy(real), neighbours)
    np.testing.assert_allclose(precision_recall(generated, real, neighbours=neighbours), expected, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 100])
def test_shares_do_not_depend_on_the_unit(dim):
    generated, real = points(90, dim=dim, seed=1, scale=0.8), points(60, dim=dim)
    expected = precision_recall(generated, real)
    assert 0.1 < expected.precision < 1 or dim == 100
    for unit in (2.0**-80, 2.0**30):
        assert precision_recall(generated * np.float32(unit), real * np.float32(unit)) == expected
