"""From images to features: batches stream through the network, and what comes out is counted, checked and kept.

    extractor = FeatureExtractor(load_inception("inception.safetensors"), ADM)
    samples = collect_features(extractor, batches, count=50_000)      # 600 MB on the host; or, moments alone:
    moments = stream_moments(extractor, batches, count=50_000)

A batch is whatever the caller makes of it: spread over devices or not, with a last one that is padded (rows beyond
`count` are cut off). Equal batches compile once. On several devices put the extractor on all of them as well.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from .._leaves import digest, leaves, on_host
from .._validate import as_count, Count
from ._feature_moments import FeatureMoments, RunningMoments
from ._inception import Features
from ._protocol import Protocol


class FeatureExtractor(eqx.Module):
    """A network of features behind a protocol.

    **Arguments:** `network` from (rows, 3, 299, 299) to `Features`: an `Inception`, or another; `protocol`.
    """

    network: Callable[[Float[Array, "rows 3 299 299"]], Features]
    protocol: Protocol

    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "rows 3 height width"] | UInt8[Array, "rows 3 height width"]
    ) -> tuple[Features, Bool[Array, " rows"]]:
        """Features of samples in [-1, 1] or of uint8 pixels, and which rows were finite before they became pixels."""
        return self.network(self.protocol(x)), jnp.isfinite(x.astype(jnp.float32)).all(axis=(1, 2, 3))

    def digest(self) -> str:
        """A sha256 of the network's arrays, which tells apart the weights that numbers were made with."""
        return digest(dict(sorted(leaves(self.network).items())))


class SampleFeatures(NamedTuple):
    """Features of a set of images, as `sample_quality` wants them.

    **Arguments:** `pooled`, `logits` one row for each image, in the order in which they came; `moments` of `pooled`.
    """

    pooled: Float[np.ndarray, "rows features"]
    logits: Float[np.ndarray, "rows classes"]
    moments: FeatureMoments


_ROWS = 4096
"""Features whose moments are taken at once."""

# Nameless axes: batches may differ in their number of rows.
_Batch = Float[Array | np.ndarray, "_ 3 _ _"] | UInt8[Array | np.ndarray, "_ 3 _ _"]


def collect_features(
    extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None = None
) -> SampleFeatures:
    """Features of the images in `batches`, kept on the host: 12 kB for each image.

    **Arguments:** `extractor`; `batches` of images (rows, 3, height, width), samples in [-1, 1] or uint8 pixels;
    `count` of images after which to stop, in the middle of a batch if need be, at least 2, or None for all. That
    samples lie in [-1, 1] is not checked, since those of a network need not: what lies outside is clipped.

    **Raises:** `ValueError` if a value of a sample is not finite (a NaN would become a black pixel), if batches are no
    such images, if they end before `count`, or if `count` is no integer >= 2.
    """
    features = [*_stream(extractor, batches, count)]
    pooled, logits = (np.concatenate(parts) for parts in zip(*features, strict=True))
    pieces = np.array_split(pooled, range(_ROWS, len(pooled), _ROWS))  # fewer and larger products than of batches
    total = functools.reduce(operator.add, map(RunningMoments.of, pieces))
    return SampleFeatures(pooled, logits, total.moments(extractor.protocol.name, extractor.digest()))


def stream_moments(
    extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None = None
) -> FeatureMoments:
    """Mean and covariance of the features of images, which are not kept: for a reference, or a FID alone.

    **Arguments, Raises:** as `collect_features`.
    """
    parts = (RunningMoments.of(part.pooled) for part in _stream(extractor, batches, count))
    total = functools.reduce(operator.add, parts)
    return total.moments(extractor.protocol.name, extractor.digest())


def _stream(extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None) -> Iterator[Features]:
    """Features on the host, batch by batch, `count` rows in all."""
    count = None if count is None else as_count("count", count, 2)  # of fewer there is no covariance
    done = 0
    for x in batches:
        _check_images(x)
        features, finite = jax.tree.map(on_host, extractor(jnp.asarray(x)))
        rows = len(finite) if count is None else min(len(finite), count - done)
        if not finite[:rows].all():
            raise ValueError(f"samples must be finite, got NaN or infinity in sample {done + np.argmin(finite[:rows])}")
        yield Features(*(part[:rows] for part in features))
        done += rows
        if done == count:
            return
    if count is not None or done == 0:
        raise ValueError(f"batches must hold {count or 'at least 1'} images, got {done}")


def _check_images(x: _Batch) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"batches must be images of shape (rows, 3, height, width), none of them 0, got {x.shape}")
    if x.dtype != np.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"batches must be samples in floating point or pixels in uint8, got {x.dtype}")
