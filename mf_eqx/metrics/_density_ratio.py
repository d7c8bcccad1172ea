r"""Divergence of a model from a *known* distribution, from the exact log-densities of its own samples.

With samples x of the model p, their densities p(x) (`mf_eqx.sample_with_log_density`) and those of the truth, q(x),

$$\mathrm{KL}(p \,\|\, q) = E_{x \sim p} \log \frac{p(x)}{q(x)}, \qquad w(x) = \frac{q(x)}{p(x)}, \qquad
E_{x \sim p}\, w(x) = q(\{x: p(x) > 0\}).$$

There are no cells and no second sample: if p = q, every ratio is 1, and the estimate is 0 for any number of samples.

**A map that folds.** If several noises make one x, its density is a sum over them, while the density along a single
noise, $\hat p(x) \le p(x)$, is one term of this sum. Hence the estimate is a lower bound, in expectation,

$$E \log \frac{\hat p(x)}{q(x)} \le E \log \frac{p(x)}{q(x)} = \mathrm{KL}(p \,\|\, q),$$

and it can be negative. Substituting x for $\epsilon$ in the mean of $\hat w = q / \hat p$ gives

$$E\, \hat w = \int q(X(\epsilon))\, \Big| \det \frac{\partial X}{\partial \epsilon} \Big|\, d\epsilon
= E_{x \sim q}\, \#\{\epsilon: X(\epsilon) = x\}:$$

the mean number of noises that make a point of the data. If this expectation is above 1 the map folds, and if it is
below 1 some data are made by no noise. Its estimate has large errors where few samples have most of the weight.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from .._validate import check_finite


class ReverseKullbackLeibler(NamedTuple):
    """How far a model is from the truth.

    **Fields:**

    - `divergence`: the estimate of KL(model || truth) in nats.
    - `standard_error`: of `divergence`.
    - `effective_share`: Kish's effective sample size of the weights truth/model, as a share of the samples, in (0, 1].
    - `mean_weight`: the mean of these weights, which is the mean number of noises that make a point of the data.
    """

    divergence: float
    standard_error: float
    effective_share: float
    mean_weight: float


def reverse_kullback_leibler(
    log_density: Float[Array | np.ndarray, " sample"], true_log_density: Float[Array | np.ndarray, " sample"]
) -> ReverseKullbackLeibler:
    r"""The divergence of a model from the truth, KL(model || truth), and the quality of its samples as proposals.

    $$\mathrm{KL} \approx \frac1n \sum_i \ell_i, \qquad \ell_i = \log p(x_i) - \log q(x_i), \qquad
    \mathrm{share} = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}, \quad w_i = e^{-\ell_i}.$$

    The divergence punishes samples where the truth has little density, and, by a density that is too high elsewhere,
    mass that samples lack. It hardly sees a lost mode of little mass: of a model without a share m of the
    mass it is -log(1 - m). A few samples far from all data determine it: at a distance of k standard deviations from a
    Gaussian component each has about $k^2 / 2$ nats. The effective share is blind to such samples, whose weights are
    0, and punishes places to which the model gives too little density; from a finite sample it is too high if it has
    not met those places.

    **Arguments:** `log_density` of samples under the model that made them, log p; `true_log_density` of the same
    samples, log q, as `mf_eqx.exact.GaussianMixture` has it. Both in nats and normalised.

    **Returns:** a `ReverseKullbackLeibler`. If the densities are those of `mf_eqx.sample_with_log_density` and the map
    folds, `divergence` is a lower bound in expectation, and `effective_share` is not that of the model's density.

    **Raises:** `ValueError` unless both are vectors of the same length >= 2, and finite.

    **References:** Survey Sampling, Kish, 1965; the share as a measure of maps of few steps in FALCON: Few-step
    Accurate Likelihoods for Continuous Flows, Rehman et al., 2025, arXiv 2512.09914.
    """
    shapes = np.shape(log_density), np.shape(true_log_density)
    if len(shapes[0]) != 1 or shapes[0] != shapes[1] or shapes[0][0] < 2:
        raise ValueError(
            f"log_density and true_log_density must be vectors of the same length >= 2, got shapes {shapes[0]} and "
            f"{shapes[1]}"
        )
    check_finite("log_density", log_density)
    check_finite("true_log_density", true_log_density)
    ratio = np.asarray(log_density, np.float64) - np.asarray(true_log_density, np.float64)
    weight = np.exp(ratio.min() - ratio)  # the largest is 1
    with np.errstate(over="ignore"):
        mean_weight = np.exp(np.log(np.mean(weight)) - ratio.min())
    return ReverseKullbackLeibler(
        divergence=float(np.mean(ratio)),
        standard_error=float(np.std(ratio, ddof=1) / np.sqrt(ratio.size)),
        effective_share=float(np.mean(weight) ** 2 / np.mean(weight**2)),
        mean_weight=float(mean_weight),
    )
