import itertools

import numpy as np
import pytest
import scipy.special

from mf_eqx.metrics import inception_score


def logits(rows=103, classes=7, scale=2.0):
    return scale * np.random.default_rng(1).standard_normal((rows, classes))


def by_definition(p):
    mean = p.mean(0)
    return np.exp(np.mean([scipy.special.rel_entr(row, mean).sum() for row in p]))


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_score_is_the_mean_over_contiguous_splits(splits):
    x = logits()
    p = scipy.special.softmax(x, axis=1)
    bounds = [i * 103 // splits for i in range(splits + 1)]
    scores = [by_definition(p[a:b]) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(
        inception_score(x, splits=splits), (np.mean(scores), np.std(scores)), rtol=1e-12, atol=1e-14
    )


def test_score_of_sure_and_different_images_is_the_number_of_classes():
    sure = 1000.0 * np.tile(np.eye(5), (4, 1))
    np.testing.assert_allclose(inception_score(sure, splits=2), (5, 0), atol=1e-12)


def test_score_of_images_that_are_all_alike_is_one():
    np.testing.assert_allclose(inception_score(np.tile(logits(1), (20, 1)), splits=2), (1, 0), atol=1e-12)


def test_score_does_not_change_when_a_row_is_shifted():
    x = logits(20)
    np.testing.assert_allclose(inception_score(x + 500 * np.arange(20)[:, None]), inception_score(x), rtol=1e-10)


def test_float32_logits_are_scored_in_float64():
    x = logits(5000).astype(np.float32)
    assert inception_score(x) == inception_score(x.astype(np.float64))


@pytest.mark.parametrize(
    ("splits", "message"),
    [(0, "an integer >= 1, got 0"), (2.0, "an integer >= 1, got 2.0"), (21, "at most the 20 rows, got 21")],
)
def test_splits_that_are_no_count_or_have_no_rows_are_refused(unchecked, splits, message):
    with pytest.raises(ValueError, match=f"splits must be {message}"):
        inception_score(logits(20), splits=splits)


@pytest.mark.parametrize("shape", [(20,), (20, 0)])
def test_logits_of_another_shape_are_refused(unchecked, shape):
    with pytest.raises(ValueError, match=r"logits must have shape \(rows, classes\), got \(20,"):
        inception_score(np.zeros(shape))


def test_logits_that_are_not_finite_are_refused():
    x = logits(20)
    x[3, 2], x[17, 0] = np.inf, np.nan  # in two of the splits
    with pytest.raises(ValueError, match="logits must be finite, got 2 values"):
        inception_score(x)


@pytest.mark.parity
def test_score_is_that_of_torch_fidelity():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    expected = theirs.isc_features_to_metric(torch.from_numpy(logits()), splits=10, shuffle=False)
    np.testing.assert_allclose(inception_score(logits()), list(expected.values()), rtol=1e-10)
