r"""Inception Score: how sure a classifier is of each image, and how different the images are,

$$\mathrm{IS} = \exp\Big(\frac1n \sum_i \mathrm{KL}\big(p(y | x_i) \,\|\, \bar p(y)\big)\Big), \qquad
  \bar p = \frac1n \sum_i p(y | x_i).$$
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from .._validate import as_count, check_finite


class MeanAndStd(NamedTuple):
    """The mean of a number over parts of a sample, and its standard deviation (of the parts, not of the mean)."""

    mean: float
    std: float


def inception_score(logits: Float[Array | np.ndarray, "rows classes"], *, splits: int = 10) -> MeanAndStd:
    r"""Inception Score of the logits of a sample, the mean over contiguous splits.

    $$\mathrm{IS}_s = \exp\Big(\frac{1}{n_s} \sum_{i \in s} \sum_y p_{iy} \log \frac{p_{iy}}{\bar p_{sy}}\Big)$$

    Split s holds rows floor(s n / S) to floor((s + 1) n / S). Rows are taken in their order. Images that are sorted by
    class get too low a score, so shuffle them (torch-fidelity always does). ADM's code has splits of 5000, which are 10
    splits of 50,000 images. Small splits give too low a score.

    **Arguments:** `logits` without the bias of the last layer, as `Inception` gives them; `splits` S.

    **Returns:** mean, in [1, classes], and standard deviation over splits.

    **Raises:** `ValueError` if `logits` is not (rows, classes), if `splits` is no integer >= 1, if there are
    fewer rows than splits, or if a logit is not finite.

    **Reference:** Improved Techniques for Training GANs, Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, 2016,
    arXiv 1606.03498.
    """
    if len(shape := np.shape(logits)) != 2 or shape[1] < 1:
        raise ValueError(f"logits must have shape (rows, classes), got {shape}")
    rows = len(logits)
    if (splits := as_count("splits", splits)) > rows:
        raise ValueError(f"splits must be at most the {rows} rows, got {splits}")
    check_finite("logits", logits)
    bounds = [split * rows // splits for split in range(splits + 1)]
    scores = [_score(np.asarray(logits[a:b], np.float64)) for a, b in itertools.pairwise(bounds)]
    return MeanAndStd(float(np.mean(scores)), float(np.std(scores)))


def _score(logits: Float[np.ndarray, "rows classes"]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # A class whose probability underflows in all rows has the mean 0, and adds nothing.
    log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
