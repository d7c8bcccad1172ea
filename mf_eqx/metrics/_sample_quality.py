"""All metrics of a sample of images at once, with the settings on which they depend.

extractor = FeatureExtractor(load_inception("inception.safetensors"), ADM)
reference = load_moments("VIRTUAL_imagenet256_labeled.npz")
samples = collect_features(extractor, (draw(i) for i in itertools.count()), count=50_000)
quality = sample_quality(samples, reference)
print(quality)
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Float

from ._feature_moments import FeatureMoments
from ._features import SampleFeatures
from ._frechet import frechet_distance_of_moments
from ._inception_score import inception_score, MeanAndStd
from ._kernel_inception_distance import kernel_inception_distance
from ._precision_recall import precision_recall, PrecisionRecall


@dataclasses.dataclass(frozen=True)
class SampleQuality:
    """Metrics of a sample, and the settings without which they have no meaning.

    **Arguments:** `fid`; `inception_score`; `kid` and `precision_recall`, None without features of the reference;
    `count` of images; `protocol`; `weights`, a digest.
    """

    fid: float
    inception_score: MeanAndStd
    kid: MeanAndStd | None
    precision_recall: PrecisionRecall | None
    count: int | None
    protocol: str | None
    weights: str | None

    def __str__(self) -> str:
        parts = [f"FID {self.fid:.4g}", "IS {:.4g} ± {:.2g}".format(*self.inception_score)]
        parts += ["KID {:.4g} ± {:.2g}".format(*self.kid)] if self.kid else []
        parts += ["precision {:.4f}, recall {:.4f}".format(*self.precision_recall)] if self.precision_recall else []
        source = f"{self.count} images, {self.protocol}, weights {(self.weights or 'unknown')[:8]}"
        return f"{', '.join(parts)} ({source})"


def sample_quality(
    samples: SampleFeatures,
    reference: FeatureMoments,
    reference_features: Float[Array | np.ndarray, "sample dim"] | None = None,
    *,
    splits: int = 10,
    subsets: int = 100,
    size: int = 1000,
    neighbours: int = 3,
    seed: int = 0,
) -> SampleQuality:
    """Fréchet distance and Inception Score of a sample; with features of the reference also KID, precision and recall.

    The features of the reference may be of other images than its moments, as in the literature: ADM has moments of all
    of ImageNet and features of 10,000 images.

    **Arguments:** `samples`; `reference` moments; `reference_features`, or None; `splits` of the Inception Score;
    `subsets`, `size`, `seed` of the KID; `neighbours` of precision and recall.

    **Raises:** `ValueError` if the reference was made by another protocol or with other weights, if it names these;
    and the errors of the single metrics.
    """
    for name in ("protocol", "weights"):
        ours, theirs = getattr(samples.moments, name), getattr(reference, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(f"{name} of the reference must be that of the samples, {ours!r}, got {theirs!r}")
    moments = samples.moments
    fid = frechet_distance_of_moments(moments.mean, moments.cov, reference.mean, reference.cov)
    kid = shares = None
    if reference_features is not None:
        kid = kernel_inception_distance(samples.pooled, reference_features, subsets=subsets, size=size, seed=seed)
        shares = precision_recall(samples.pooled, reference_features, neighbours=neighbours)
    score = inception_score(samples.logits, splits=splits)
    return SampleQuality(fid, score, kid, shares, moments.count, moments.protocol, moments.weights)
