r"""Mean and covariance of features, gathered batch by batch in float64 on the host, and their files.

Two sets of n and m features, with means $\mu$, $\nu$ and sums of centred products $S$, $T$, make one of n + m with

$$\mu + \frac{m}{n + m} \delta, \qquad S + T + \frac{n m}{n + m}\, \delta \delta^T, \qquad \delta = \nu - \mu.$$

Nothing is squared before it is centred: sums of squares would lose what is left of them when the mean is taken off.

    total = functools.reduce(operator.add, map(RunningMoments.of, batches))
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
"""The bit among the flags of a member of an archive."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and covariance of features, all that a Fréchet distance needs.

    **Arguments:** `mean`; `cov` unbiased; `count` of the features; `protocol`, the name of that by which images became
    features; `weights` of the network, their digest. The last three are None where a file does not tell.
    """

    mean: Float[np.ndarray, " features"]
    cov: Float[np.ndarray, "features features"]
    count: int | None = None
    protocol: str | None = None
    weights: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RunningMoments:
    """Moments of the features so far; those of two sets are added with `+`, in any order.

    **Arguments:** `count` of features; `mean`; `scatter` the sum of centred products, float64.
    """

    count: int
    mean: Float[np.ndarray, " features"]
    scatter: Float[np.ndarray, "features features"]

    @classmethod
    def of(cls, features: Float[Array | np.ndarray, "rows features"]) -> "RunningMoments":
        """Those of one batch.

        **Raises:** `ValueError` if it has no row or values that are not finite.
        """
        wide = np.asarray(features, np.float64)
        if wide.ndim != 2 or len(wide) < 1:
            raise ValueError(f"features must have shape (rows, features) with rows >= 1, got {wide.shape}")
        check_finite("features", wide)
        mean = wide.mean(axis=0)
        centred = wide - mean
        return cls(len(wide), mean, centred.T @ centred)

    def __add__(self, other: "RunningMoments") -> "RunningMoments":
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta, delta * (self.count * (other.count / count)))
        return RunningMoments(count, self.mean + delta * (other.count / count), scatter)

    def moments(self, protocol: str | None = None, weights: str | None = None) -> FeatureMoments:
        """What they come to.

        **Raises:** `ValueError` below two features, of which there is no covariance.
        """
        if self.count < 2:
            raise ValueError(f"count of features must be at least 2 for a covariance, got {self.count}")
        return FeatureMoments(self.mean, self.scatter / (self.count - 1), self.count, protocol, weights)


def save_moments(path: str | Path, moments: FeatureMoments) -> None:
    """Write moments as .npz: `mu`, `sigma`, and as far as known `count`, `protocol`, `weights`. Whole or not at all.

    **Raises:** `ValueError` if a moment is not finite, which no reader would take; `OSError` if it cannot be written.
    """
    for name, value in (("mean", moments.mean), ("cov", moments.cov)):
        check_finite(name, value)
    known = {name: value for name in ("count", "protocol", "weights") if (value := getattr(moments, name)) is not None}
    content = io.BytesIO()
    np.savez(content, mu=moments.mean, sigma=moments.cov, **known)
    write_whole(path, content.getvalue())


def load_moments(path: str | Path) -> FeatureMoments:
    """Moments in an .npz file: `mu` and `sigma`, as most programs name them (also in ADM's reference batches), or
    `ref_mu` and `ref_sigma`. Whatever else it holds is not read.

    **Raises:** `OSError` if it cannot be read; `ValueError` that names the file if it is no .npz file or damaged, if an
    array is missing, given twice with different values, pickled, of a wrong shape or not finite.
    """
    names = (*_MEAN, *_COVARIANCE, "count", "protocol", "weights")
    held = _read(path, names)
    mean, cov = (_either(path, held, pair) for pair in (_MEAN, _COVARIANCE))
    if mean.ndim != 1 or mean.size == 0 or cov.shape != 2 * mean.shape:
        raise ValueError(f"{path}: must hold a mean (dim,) and a covariance (dim, dim), got {mean.shape}, {cov.shape}")
    count = _single(path, held, "count", "iu")
    if count is not None and count < 2:
        raise ValueError(f"{path}: count must be at least 2, got {count}")
    return FeatureMoments(mean, cov, count, _single(path, held, "protocol", "U"), _single(path, held, "weights", "U"))


def _read(path: str | Path, names: tuple[str, ...]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of these names that an .npz file holds."""
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
    """Refuses what could unpack to any size, or not at all."""
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{info.filename} must be stored or deflated, and not encrypted")
        if info.file_size > _LARGEST_ARRAY:
            raise ValueError(f"{info.filename} must have at most {_LARGEST_ARRAY:,} bytes, got {info.file_size:,}")


def _either(path: str | Path, held: Mapping[str, Any], names: tuple[str, str]) -> Float[np.ndarray, "..."]:
    """The array that has one of two names, in float64."""
    found = [name for name in names if name in held]
    if not found:
        raise ValueError(f"{path}: must hold {names[0]} or {names[1]}, got neither")
    for name in found:
        if held[name].dtype.kind != "f":
            raise ValueError(f"{path}: {name} must be floating point, got {held[name].dtype}")
        check_finite(f"{path}: {name}", held[name])
    if len(found) == 2 and not np.array_equal(held[names[0]], held[names[1]]):
        raise ValueError(f"{path}: {names[0]} and {names[1]} must be equal if both are there, but they differ")
    return held[found[0]].astype(np.float64)


def _single(path: str | Path, held: Mapping[str, Any], name: str, kinds: str) -> Any:
    """A number or a text beside the moments, or None."""
    if name not in held:
        return None
    value = held[name]
    if value.shape != () or value.dtype.kind not in kinds:
        raise ValueError(f"{path}: {name} must be a single {'text' if kinds == 'U' else 'integer'}, got {value!r}")
    return value.item()
