r"""A linear probe: how well a linear function of features tells classes apart.

Ridge regression of one-hot labels $e_y$ on standardised features $\hat x = (x - \mu) / \sigma$, with n training rows:

$$W = (C + \lambda I)^{-1} \frac1n \sum_i \hat x_i\, (e_{y_i} - \bar e)^T, \qquad
  C = \frac1n \sum_i \hat x_i \hat x_i^T, \qquad \text{class of } x = \arg\max_k\, (\hat x^T W + \bar e)_k,$$

with the share of each class $\bar e$. It needs the moments of the features and the mean of each class alone, which are
accumulated in float64.
"""

import functools
import operator
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from .._validate import check_finite, check_positive
from ._distance import check_samples
from ._feature_moments import AccumulatedMoments

_ROWS_PER_PIECE = 4096


class LinearProbe(NamedTuple):
    """What a linear probe says of a test sample.

    **Arguments:** `accuracy` the share of rows whose label it predicts; `predictions` a label for each row.
    """

    accuracy: float
    predictions: Int[np.ndarray, " test"]


def linear_probe(
    features: Float[Array | np.ndarray, "train dim"],
    labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    test_labels: Int[Array | np.ndarray, " test"],
    *,
    ridge: float = 0.3,
) -> LinearProbe:
    r"""Accuracy of ridge regression from features to classes, in closed form and in float64.

    $$\min_{W, b}\; \frac1n \sum_i |W^T \hat x_i + b - e_{y_i}|^2 + \lambda |W|^2$$

    **Arguments:**

    - `features`, `labels`: to fit, one row and one integer for each image. Labels need not be consecutive.
    - `test_features`, `test_labels`: to judge. With generated images and the labels that were asked for, the accuracy
      says how often an image shows what was asked for.
    - `ridge`: $\lambda$, relative to the mean square of a feature, which is 1.

    **Raises:** `ValueError` if features are not (rows, dim) with equal dims, if a value is not finite, if labels are
    not one integer for each row, if training has fewer than two classes, or if `ridge` is not positive.
    """
    check_samples(features=features, test_features=test_features)
    features, test_features = np.asarray(features), np.asarray(test_features)
    check_finite("`features`", features)
    check_finite("`test_features`", test_features)
    check_positive("ridge", ridge)
    labels, test_labels = _labels("labels", labels, features), _labels("test_labels", test_labels, test_features)
    classes, index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must be of at least two classes, got {classes}")
    mean, weight, share = _fit(features, index, len(classes), ridge)
    predictions = classes[np.argmax((test_features - mean) @ weight + share, axis=1)]
    return LinearProbe(float(np.mean(predictions == test_labels)), predictions)


def _labels(name: str, labels: Int[Array | np.ndarray, "..."], features: np.ndarray) -> Int[np.ndarray, " rows"]:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(features),):
        rule = f"an integer for each of the {len(features)} rows"
        raise ValueError(f"{name} must be {rule}, got {labels.dtype} of shape {labels.shape}")
    return labels


def _fit(
    features: Float[np.ndarray, "train dim"], index: Int[np.ndarray, " train"], classes: int, ridge: float
) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim classes"], Float[np.ndarray, " classes"]]:
    """The mean of the features, the weights of the centred features, and the share of each class."""
    count = len(features)
    pieces = (features[start : start + _ROWS_PER_PIECE] for start in range(0, count, _ROWS_PER_PIECE))
    total = functools.reduce(operator.add, map(AccumulatedMoments.of, pieces))
    share = np.bincount(index, minlength=classes) / count
    sums = [features[index == number].sum(axis=0, dtype=np.float64) for number in range(classes)]
    std = np.sqrt(np.diag(total.scatter) / count)
    # A constant feature says nothing about classes, and must not be divided by its deviation. This may be computed as
    # slightly more than 0, since the mean over a piece is a sum with a rounding error for each row.
    std = np.where(std > _ROWS_PER_PIECE * np.finfo(np.float64).eps * np.abs(total.mean), std, 1)
    products = (np.stack(sums, axis=1) / count - np.outer(total.mean, share)) / std[:, None]
    covariance = total.scatter / count / np.outer(std, std)
    weight = np.linalg.solve(covariance + ridge * np.eye(len(std)), products)
    return total.mean, weight / std[:, None], share
