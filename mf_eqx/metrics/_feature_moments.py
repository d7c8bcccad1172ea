r"""Mean and covariance of features, accumulated batch by batch in float64 on the host, and their files.

Two sets of n and m features, with means $\mu$, $\nu$ and sums of centred products $S$, $T$, together are a set of n + m
features, whose mean and sum of centred products are

$$\mu + \frac{m}{n + m} \delta, \qquad S + T + \frac{n m}{n + m}\, \delta \delta^T, \qquad \delta = \nu - \mu.$$

Features are centred before they are squared: if the squared mean were subtracted from sums of squares, most digits of
the difference could be lost.

    total = functools.reduce(operator.add, map(AccumulatedMoments.of, batches))
    save_moments("cifar10.npz", total.moments(protocol="CIFAR-train"))

Reference: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, Chan, Golub and LeVeque, 1979.
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped

from .._files import open_regular, write_whole
from .._validate import check_finite

_MEAN, _COVARIANCE = ("mu", "ref_mu"), ("sigma", "ref_sigma")
_LARGEST_ARRAY = 1 << 30
"""Bytes; a covariance of 2,048 features has 32 million."""
_UNREADABLE = (ValueError, EOFError, KeyError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)
_ENCRYPTED = 1
"""The flag bit of an encrypted member of an archive."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and covariance of features, all that a Fréchet distance needs.

    **Arguments:** `mean`; `cov` unbiased; `count` of the features; `protocol` the name of the protocol by which
    features were computed from images; `weights` the digest of the network's weights. The last three are None if a file
    does not contain them.
    """

    mean: Float[np.ndarray, " features"]
    cov: Float[np.ndarray, "features features"]
    count: int | None = None
    protocol: str | None = None
    weights: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class AccumulatedMoments:
    """Moments of the features so far; the moments of two sets are combined by `+`, in any order.

    **Arguments:** `count` of features; `mean`; `scatter` the sum of centred products, float64.
    """

    count: int
    mean: Float[np.ndarray, " features"]
    scatter: Float[np.ndarray, "features features"]

    @classmethod
    def of(cls, features: Float[Array | np.ndarray, "rows features"]) -> "AccumulatedMoments":
        """The moments of one batch.

        **Raises:** `ValueError` if it has no row or values that are not finite.
        """
        wide = np.asarray(features, np.float64)
        if wide.ndim != 2 or len(wide) < 1:
            raise ValueError(f"features must have shape (rows, features) with rows >= 1, got {wide.shape}")
        check_finite("features", wide)
        mean = wide.mean(axis=0)
        centred = wide - mean
        return cls(len(wide), mean, centred.T @ centred)

    def __add__(self, other: "AccumulatedMoments") -> "AccumulatedMoments":
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta, delta * (self.count * (other.count / count)))
        return AccumulatedMoments(count, self.mean + delta * (other.count / count), scatter)

    def moments(self, protocol: str | None = None, weights: str | None = None) -> FeatureMoments:
        """Mean and unbiased covariance of the features so far.

        **Raises:** `ValueError` for fewer than two features, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"count of features must be at least 2 for a covariance, got {self.count}")
        return FeatureMoments(self.mean, self.scatter / (self.count - 1), self.count, protocol, weights)


def save_moments(path: str | Path, moments: FeatureMoments) -> None:
    """Write moments as .npz: `mu`, `sigma` and, if known, `count`, `protocol`, `weights`. The file is written
    completely or not at all.

    **Raises:** `ValueError` if a moment is not finite, which readers would refuse; `OSError` if it cannot be written.
    """
    for name, value in (("mean", moments.mean), ("cov", moments.cov)):
        check_finite(name, value)
    known = {name: value for name in ("count", "protocol", "weights") if (value := getattr(moments, name)) is not None}
    content = io.BytesIO()
    np.savez(content, mu=moments.mean, sigma=moments.cov, **known)
    write_whole(path, content.getvalue())


def load_moments(path: str | Path) -> FeatureMoments:
    """Moments in an .npz file: `mu` and `sigma`, as most programs name them (also in ADM's reference batches), or
    `ref_mu` and `ref_sigma`. Other arrays in the file are not read.

    **Raises:** `OSError` if it cannot be read; `ValueError` that names the file if it is no .npz file or damaged, if an
    array is missing, given twice with different values, pickled, of a wrong shape or not finite.
    """
    names = (*_MEAN, *_COVARIANCE, "count", "protocol", "weights")
    arrays = _read(path, names)
    mean, cov = (_either(path, arrays, pair) for pair in (_MEAN, _COVARIANCE))
    if mean.ndim != 1 or mean.size == 0 or cov.shape != 2 * mean.shape:
        raise ValueError(f"{path}: must hold a mean (dim,) and a covariance (dim, dim), got {mean.shape}, {cov.shape}")
    count = _single(path, arrays, "count", "iu")
    if count is not None and count < 2:
        raise ValueError(f"{path}: count must be at least 2, got {count}")
    return FeatureMoments(
        mean, cov, count, _single(path, arrays, "protocol", "U"), _single(path, arrays, "weights", "U")
    )


def _read(path: str | Path, names: tuple[str, ...]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays with these names in an .npz file, as far as they exist."""
    with open_regular(path) as raw:
        try:
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array without a name")
            with file:
                _check_members(file.zip.infolist())
                return {name: file[name] for name in names if name in file.files}
        except _UNREADABLE as error:
            reason = f"must be an .npz file of plain arrays, but it cannot be read: {error}"
            raise ValueError(f"{path}: {reason}") from error


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    """Refuses members that are too large, that are compressed by a method with unlimited output, or that are
    encrypted."""
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{info.filename} must be stored or deflated, and not encrypted")
        if info.file_size > _LARGEST_ARRAY:
            raise ValueError(f"{info.filename} must have at most {_LARGEST_ARRAY:,} bytes, got {info.file_size:,}")


def _either(path: str | Path, arrays: Mapping[str, Any], names: tuple[str, str]) -> Float[np.ndarray, "..."]:
    """The array that has one of two names, in float64."""
    present = [name for name in names if name in arrays]
    if not present:
        raise ValueError(f"{path}: must hold {names[0]} or {names[1]}, got neither")
    for name in present:
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{path}: {name} must be floating point, got {arrays[name].dtype}")
        check_finite(f"{path}: {name}", arrays[name])
    if len(present) == 2 and not np.array_equal(arrays[names[0]], arrays[names[1]]):
        raise ValueError(f"{path}: {names[0]} and {names[1]} must be equal if both are there, but they differ")
    return arrays[present[0]].astype(np.float64)


def _single(path: str | Path, arrays: Mapping[str, Any], name: str, kinds: str) -> Any:
    """A number or a text beside the moments, or None."""
    if name not in arrays:
        return None
    value = arrays[name]
    if value.shape != () or value.dtype.kind not in kinds:
        raise ValueError(f"{path}: {name} must be a single {'text' if kinds == 'U' else 'integer'}, got {value!r}")
    return value.item()
