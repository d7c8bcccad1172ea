"""Features of images: batches are streamed through the network, and their features are counted, checked and collected.

    extractor = FeatureExtractor(load_inception("inception.safetensors"), ADM)
    samples = collect_features(extractor, batches, count=50_000)      # 600 MB on the host; or, moments alone:
    moments = stream_moments(extractor, batches, count=50_000)

The caller makes the batches: they may be distributed over devices, and the last one may be padded (rows beyond `count`
are cut off). The network is compiled once if all batches have one shape. With several devices, place the extractor on
all of them, too.
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

from .._leaves import digest_of_arrays, leaves, on_host
from .._validate import as_count, Count
from ._feature_moments import AccumulatedMoments, FeatureMoments
from ._inception import Features
from ._protocol import Protocol


class FeatureExtractor(eqx.Module):
    """A protocol, and the network that computes features from the protocol's outputs.

    **Arguments:** `network` from (rows, 3, height, width) to `Features`: an `Inception`, an `EfficientNetLite0`, or
    another one; `protocol`, whose images have the size that the network takes.
    """

    network: Callable[[Float[Array, "rows 3 new_height new_width"]], Features]
    protocol: Protocol

    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "rows channels height width"] | UInt8[Array, "rows channels height width"]
    ) -> tuple[Features, Bool[Array, " rows"]]:
        """Features of samples in [-1, 1] or of uint8 pixels, and which rows of `x` were finite."""
        return self.network(self.protocol(x)), jnp.isfinite(x.astype(jnp.float32)).all(axis=(1, 2, 3))

    def digest(self) -> str:
        """A sha256 of the network's arrays, which identifies the weights that results were computed with."""
        return digest_of_arrays(dict(sorted(leaves(self.network).items())))


class SampleFeatures(NamedTuple):
    """Features of a set of images, as `sample_quality` requires them.

    **Arguments:** `pooled`, `logits` one row for each image, in the order of the images; `moments` of `pooled`.
    """

    pooled: Float[np.ndarray, "rows features"]
    logits: Float[np.ndarray, "rows classes"]
    moments: FeatureMoments


_ROWS_PER_PIECE = 4096
"""The number of features whose moments are computed at once."""

# Axes without names: batches may differ in their number of rows.
_Batch = Float[Array | np.ndarray, "_ _ _ _"] | UInt8[Array | np.ndarray, "_ _ _ _"]


def collect_features(
    extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None = None
) -> SampleFeatures:
    """Features of the images in `batches`, kept on the host: 12 kB for each image with Inception.

    **Arguments:** `extractor`; `batches` of images (rows, channels, height, width), in colour or grey, samples in
    [-1, 1] or uint8 pixels; `count` the number of images after which to stop, also in the middle of a batch, at least
    2, or None for all. Samples need not lie in [-1, 1], since those of a network may lie outside: they are clipped.

    **Raises:** `ValueError` if a value of a sample is not finite (a NaN would become a black pixel), if a batch does
    not contain such images, if it looks like pixels in floating point (whole numbers beyond 1, or none below 0 and some
    above 16), if batches end before `count`, or if `count` is not an integer >= 2.
    """
    features = [*_stream(extractor, batches, count)]
    pooled, logits = (np.concatenate(parts) for parts in zip(*features, strict=True))
    pieces = np.array_split(pooled, range(_ROWS_PER_PIECE, len(pooled), _ROWS_PER_PIECE))  # few, large products
    total = functools.reduce(operator.add, map(AccumulatedMoments.of, pieces))
    return SampleFeatures(pooled, logits, total.moments(extractor.protocol.name, extractor.digest()))


def stream_moments(
    extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None = None
) -> FeatureMoments:
    """Mean and covariance of the features of images, which are not kept: for a reference, or a FID alone.

    **Arguments, Raises:** as for `collect_features`.
    """
    parts = (AccumulatedMoments.of(part.pooled) for part in _stream(extractor, batches, count))
    total = functools.reduce(operator.add, parts)
    return total.moments(extractor.protocol.name, extractor.digest())


def _stream(extractor: FeatureExtractor, batches: Iterable[_Batch], count: Count | None) -> Iterator[Features]:
    """Features on the host, batch by batch, `count` rows in all."""
    count = None if count is None else as_count("count", count, 2)  # fewer have no covariance
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
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        rule = "(rows, 3, height, width) or (rows, 1, height, width), none of them 0"
        raise ValueError(f"batches must be images of shape {rule}, got {x.shape}")
    if x.dtype != np.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"batches must be samples in floating point or pixels in uint8, got {x.dtype}")
    if x.dtype != np.uint8 and (x > 1).any() and ((x == jnp.round(x)).all() or (x.min() >= 0 and x.max() > 16)):
        found = f"numbers from {x.min()} to {x.max()}, which look like those of pixels in [0, 255]"
        raise ValueError(f"batches of {x.dtype} must be samples in [-1, 1], got {found}")
