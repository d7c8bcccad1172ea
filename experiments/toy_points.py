"""A toy data set of points of one's own, whose exact velocity is known: used by `toy_2d.py`.

Points alone have no density: their velocity is infinite at t = 0. So the data set is a Gaussian mixture, each point
blurred a little, as the shapes in `mf_eqx.exact` are; training data and truth come from that one mixture. The exact
field sums over all points at each of its evaluations: its time grows as their number.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    from mf_eqx import data, exact


def is_own(name: str) -> bool:
    """Whether a data set is a file of points rather than one of `mf_eqx.exact`."""
    return name.endswith(".npy")


def title_of(name: str) -> str:
    """What a data set is called in tables and names of files."""
    return Path(name).stem if is_own(name) else name


class Points(NamedTuple):
    """Points that are moved and scaled so that their mean is 0 and their root-mean-square distance from it is 1, since
    the settings suit data of the size of the noise; and `mean` and `size`, the mean of the points in the file and their
    root-mean-square distance from it."""

    scaled: Float[np.ndarray, "points 2"]
    mean: tuple[float, float]
    size: float


def mixture_of_points(path: str, blur: float, most: int) -> exact.GaussianMixture:
    """The points of a file, each one Gaussian of standard deviation `blur`. **Arguments, Raises:** of `read_points`."""
    points = read_points(path, most).scaled
    return exact.GaussianMixture(jnp.asarray(points), blur, label=np.zeros(len(points), int))


@functools.cache
def read_points(path: str, most: int) -> Points:
    """The points of a file; of more than `most` that many, drawn without replacement and always the same ones.

    **Raises:** `OSError` if the file cannot be opened; `ValueError` unless it holds two or more different points,
    finite numbers of shape (rows, 2).
    """
    source = data.NpySource(path)
    if source.row_shape != (2,):
        found = ", ".join(map(str, ("rows", *source.row_shape)))
        raise ValueError(f"data must hold points of shape (rows, 2), got ({found}) in {path}")
    points = source.take(np.arange(len(source))).x.astype(np.float64)
    if not (finite := np.isfinite(points).all(axis=1)).all():
        row = int(np.argmin(finite))
        raise ValueError(f"data must be finite numbers, got {points[row]} in row {row} of {path}")
    if len(points) > most:
        points = points[np.sort(np.random.default_rng(0).choice(len(points), most, replace=False))]
    mean = points.mean(axis=0)
    if (size := float(np.sqrt(np.mean(np.sum((points - mean) ** 2, axis=1))))) == 0:
        raise ValueError(f"data must hold two or more different points, got one in {path}")
    return Points(((points - mean) / size).astype(np.float32), tuple(mean.tolist()), size)
