import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from mf_eqx.metrics import kernel_inception_distance


def points(rows, dim=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((rows, dim)) + shift


def by_definition(a, b):
    def kernel(x, y):
        return polynomial_kernel(x[None], y[None], degree=3, gamma=1 / len(x), coef0=1)[0, 0]

    within = [np.mean([kernel(x, y) for x, y in itertools.permutations(points, 2)]) for points in (a, b)]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_distance_of_whole_samples_is_the_unbiased_estimate():
    a, b = points(9), points(9, seed=1, shift=0.5)
    mean, std = kernel_inception_distance(a, b, subsets=3, size=9)
    np.testing.assert_allclose(mean, by_definition(a, b), rtol=1e-12)
    assert std < 1e-14


def test_distance_is_unbiased():
    # With the pairs i = j its mean would be tens of these deviations above zero.
    a, b = points(4000), points(4000, seed=1)
    mean, std = kernel_inception_distance(a, b, subsets=200, size=40)
    assert abs(mean) < 3 * std / np.sqrt(200)


def test_mean_over_subsets_estimates_the_distance_of_whole_samples():
    a, b = points(60), points(60, seed=1, shift=0.5)
    mean, std = kernel_inception_distance(a, b, subsets=400, size=20)
    whole = kernel_inception_distance(a, b, subsets=1, size=60).mean
    assert abs(mean - whole) < 3 * std / np.sqrt(400)


def test_seed_decides_the_subsets():
    a, b = points(30), points(30, seed=1)
    same, other = (kernel_inception_distance(a, b, subsets=5, size=9, seed=seed) for seed in (3, 4))
    assert kernel_inception_distance(a, b, subsets=5, size=9, seed=3) == same != other


def test_float32_features_are_compared_by_kernels_in_float64():
    a, b = points(20).astype(np.float32), points(20, seed=1).astype(np.float32)
    wide = kernel_inception_distance(a.astype(np.float64), b.astype(np.float64), subsets=2, size=20)
    np.testing.assert_allclose(kernel_inception_distance(a, b, subsets=2, size=20), wide, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "at most the smaller sample, 30, got 31"),
        ({"size": 1}, "at least 2 .* got 1"),
        ({"size": 9.0}, "size must be an integer >= 1, got 9.0"),
        ({"size": 9, "subsets": 0}, "subsets must be an integer >= 1, got 0"),
        ({"size": 9, "seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_wrong_subsets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_inception_distance(points(40), points(30), **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_features_that_are_not_finite_are_refused_by_name(name, value):
    samples = {"a": points(30), "b": points(30, seed=1)}
    samples[name][29, 3] = value  # whether or not a subset would meet it
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got 1 values that are not"):
        kernel_inception_distance(**samples, subsets=1, size=2)


@pytest.mark.parity
def test_kernel_distance_is_that_of_torch_fidelity_on_whole_samples():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = points(50), points(50, seed=1, shift=0.2)
    expected = theirs.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=2, kid_subset_size=50, verbose=False
    )
    mean = kernel_inception_distance(a, b, subsets=2, size=50).mean
    np.testing.assert_allclose(mean, expected["kernel_inception_distance_mean"], rtol=1e-10)
