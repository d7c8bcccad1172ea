r"""Toy data sets in two dimensions, each one a Gaussian mixture.

A point set is not suitable: its v is singular at t = 0, and its flow ends at the points instead of at the shape. So a
shape is represented by about 512 of its points, each blurred by a small standard deviation. This distribution is
smooth, and one object gives its exact density, velocity and samples.

All of them are within a distance of about 2 from the origin, so that noise of standard deviation 1 covers them. Every
component has the label of its part of the shape (a moon, an arm, a cell of the board), for conditions and for counting
modes.

The points are quantiles or grids, not random draws: a data set is the same on every machine and without random noise.
Where a function takes them, `std` is the standard deviation of the blur and `points` the total number of components.
They raise `ValueError` unless `std` is > 0 and `points` is a positive multiple of the number of parts.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Float

from ._gaussian_mixture import GaussianMixture


def eight_gaussians(std: float = 0.1) -> GaussianMixture:
    """Eight equal Gaussians on the unit circle, labels 0 to 7 counter-clockwise from (1, 0)."""
    angle = np.arange(8) / 8 * 2 * np.pi
    return _mixture([_polar(1.0, angle)[i : i + 1] for i in range(8)], std)


def three_gaussians() -> GaussianMixture:
    """Three Gaussians with different masses (0.5, 0.2, 0.3) and standard deviations (0.3, 0.5, 0.2), labels 0 to 2.
    They reveal whether a method loses small modes or learns wrong widths."""
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    return GaussianMixture(
        jnp.asarray(mean, jnp.result_type(float)),
        std=np.array([0.3, 0.5, 0.2]),
        weight=np.array([0.5, 0.2, 0.3]),
        label=np.arange(3),
    )


def two_moons(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    """Two interleaved half circles of radius 1, labels 0 (upper) and 1 (lower), as scikit-learn's moons but centred."""
    angle = np.linspace(0, np.pi, _points_per_part(points, 2))
    upper = _polar(1.0, angle)
    return _mixture([upper - [0.5, 0.25], [0.5, 0.25] - upper], std)


def checkerboard(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    """The eight dark cells of a 4 x 4 board on [-1, 1]², labels 0 to 7 row by row from the bottom; the cell at (-1, -1)
    is dark.

    **Arguments:** `std` of the blur: the density is flat inside a cell if `std` is at least about half the distance
    between neighbouring points, which is 1/16 by default; `points` the total number, 8 times a square.

    **Raises:** `ValueError` unless `points` is 8 times a square.
    """
    side = round(_points_per_part(points, 8) ** 0.5)
    if 8 * side**2 != points:
        raise ValueError(f"points must be 8 times a square, got {points}")
    offset = (np.arange(side) + 0.5) / side / 2
    cell = np.stack(np.meshgrid(offset, offset, indexing="ij"), axis=-1).reshape(-1, 2)
    corners = [(column / 2 - 1, row / 2 - 1) for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    return _mixture([cell + corner for corner in corners], std)


def swiss_roll(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    r"""The spiral $\theta (\cos\theta, \sin\theta) / 10$ with $\theta$ uniform in $[1.5 \pi, 4.5 \pi]$, one label.
    These are the first and the last coordinate of scikit-learn's `make_swiss_roll`, divided by 10."""
    angle = 1.5 * np.pi * (1 + 2 * _quantiles(_points_per_part(points, 1)))
    return _mixture([_polar(angle / 10, angle)], std)


def pinwheel(std: float = 0.05, *, points: int = 510) -> GaussianMixture:
    r"""Five bent arms, labels 0 to 4: radii N(1, 0.3²), at angles $2 \pi k / 5 + e^{radius} / 4$.

    The shape is that of Composing graphical models with neural networks for structured representations and fast
    inference, Johnson, Duvenaud, Wiltschko, Datta, Adams, 2016, arXiv 1603.06277.

    `std` is also the width of an arm.
    """
    radius = 1 + 0.3 * np.asarray(norm.ppf(_quantiles(_points_per_part(points, 5))), np.float64)
    return _mixture([_polar(radius, 2 * np.pi * arm / 5 + np.exp(radius) / 4) for arm in range(5)], std)


def two_spirals(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    r"""Two spiral arms of one and a half turns, labels 0 and 1. The first is $\theta (\cos\theta, \sin\theta) / 2 \pi$
    with $\theta = 3 \pi \sqrt q$, q uniform, so that the mass is distributed almost evenly along the arm. The second is
    the first, rotated by 180 degrees."""
    angle = 3 * np.pi * np.sqrt(_quantiles(_points_per_part(points, 2)))
    arm = _polar(angle / (2 * np.pi), angle)
    return _mixture([arm, -arm], std)


def _mixture(parts: list[Float[np.ndarray, "_ 2"]], std: float) -> GaussianMixture:
    """Equal Gaussians around all points; the label of a point is the number of its part."""
    label = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return GaussianMixture(jnp.asarray(np.concatenate(parts), jnp.result_type(float)), std, label=label)


def _polar(
    radius: float | Float[np.ndarray, " points"], angle: Float[np.ndarray, " points"]
) -> Float[np.ndarray, "points 2"]:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _quantiles(points: int) -> Float[np.ndarray, " points"]:
    """The midpoints of `points` equal intervals in [0, 1]."""
    return (np.arange(points) + 0.5) / points


def _points_per_part(points: int, parts: int) -> int:
    if points < parts or points % parts:
        raise ValueError(f"points must be a positive multiple of {parts}, got {points}")
    return points // parts
