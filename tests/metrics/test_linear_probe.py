import numpy as np
import pytest

from mf_eqx.metrics import linear_probe
from mf_eqx.metrics._linear_probe import _fit

RANDOM = np.random.default_rng(0)
CENTRES = RANDOM.normal(size=(3, 5))
LABELS = RANDOM.integers(0, 3, 400)
FEATURES = (CENTRES[LABELS] + 0.8 * RANDOM.normal(size=(400, 5))).astype(np.float32)
TRAIN, TEST = (FEATURES[:300], LABELS[:300]), (FEATURES[300:], LABELS[300:])


def test_it_solves_the_least_squares_problem_with_an_offset():
    (x, y), ridge = TRAIN, 0.7
    wide = x.astype(np.float64)
    standard = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    root = np.sqrt(len(x) * ridge)
    rows = np.concatenate([np.c_[standard, np.ones(len(x))], np.c_[root * np.eye(5), np.zeros(5)]])
    solution = np.linalg.lstsq(rows, np.concatenate([np.eye(3)[y], np.zeros((5, 3))]), rcond=None)[0]
    scores = np.c_[(TEST[0] - wide.mean(axis=0)) / wide.std(axis=0), np.ones(100)] @ solution
    mean, weight, share = _fit(*TRAIN, 3, ridge)
    np.testing.assert_allclose((TEST[0] - mean) @ weight + share, scores, rtol=1e-10, atol=1e-10)
    found = linear_probe(*TRAIN, *TEST, ridge=ridge)
    np.testing.assert_array_equal(found.predictions, scores.argmax(axis=1))
    assert found.accuracy == np.mean(scores.argmax(axis=1) == TEST[1]) > 0.7


def test_labels_without_order_are_predicted_as_they_are():
    names = np.array([7, -3, 100])
    found = linear_probe(TRAIN[0], names[TRAIN[1]], TEST[0], names[TEST[1]])
    plain = linear_probe(*TRAIN, *TEST)
    np.testing.assert_array_equal(found.predictions, names[plain.predictions])
    assert found.accuracy == plain.accuracy


def test_units_of_features_and_constant_ones_change_nothing():
    scale, offset = np.array([1e-3, 1, 1e3, 1e-6, 1]), np.array([5, -1e3, 0, 1, 1e-2])

    def changed(x):
        return np.c_[x * scale + offset, np.full(len(x), 0.1)]

    found = linear_probe(changed(TRAIN[0].astype(np.float64)), TRAIN[1], changed(TEST[0].astype(np.float64)), TEST[1])
    np.testing.assert_array_equal(found.predictions, linear_probe(*TRAIN, *TEST).predictions)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    whole = linear_probe(*TRAIN, *TEST)
    monkeypatch.setattr("mf_eqx.metrics._linear_probe._ROWS_PER_PIECE", 7)
    np.testing.assert_array_equal(linear_probe(*TRAIN, *TEST).predictions, whole.predictions)


def test_features_without_information_give_the_most_frequent_class():
    labels = np.array([4] * 60 + [2] * 40)
    found = linear_probe(np.full((100, 3), 0.1), labels, np.full((50, 3), 0.1), labels[-50:])
    assert set(found.predictions) == {4} and found.accuracy == 0.2


BAD = np.full((300, 5), np.nan)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": BAD}, "`features` must be finite, got 1500 values that are not"),
        ({"test_features": BAD[:100]}, "`test_features` must be finite, got 500 values that are not"),
        ({"test_features": np.ones((100, 4))}, "`features` and `test_features` must have the same dim"),
        ({"labels": TRAIN[1][:-1]}, r"labels must be an integer for each of the 300 rows, got int64 of shape \(299,\)"),
        ({"labels": TRAIN[1] + 0.5}, "labels must be an integer for each of the 300 rows, got float64"),
        (
            {"test_labels": np.eye(3, dtype=int)[TEST[1]]},
            r"test_labels must be .* 100 rows, got .* \(100, 3\)",
        ),
        ({"labels": np.full(300, 3)}, r"labels must be of at least two classes, got \[3\]"),
        ({"ridge": 0.0}, "ridge must be > 0 and finite, got 0.0"),
        ({"ridge": np.nan}, "ridge must be > 0 and finite, got nan"),
    ],
)
def test_wrong_arguments_are_refused(changed, message):
    names = ("features", "labels", "test_features", "test_labels")
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**dict(zip(names, (*TRAIN, *TEST), strict=True)), **changed})
