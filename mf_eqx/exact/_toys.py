r"""Toy data sets in two dimensions, each one a Gaussian mixture.

A point set would not do: its v is singular at t = 0, and its flow ends in the points rather than in the shape. So a
shape is some 512 points of it, each blurred by a small standard deviation: smooth, with the exact density, velocity and
samples from one object.

All of them lie within about 2 of the origin, so that unit noise covers them. Every component carries the label of its
part of the shape (a moon, an arm, a cell of the board), for conditions and for counting modes.

The points are quantiles or grids, not draws: a data set is the same on every machine, and has no noise of its own.
Everywhere `std` is the blur and `points` the number of components in all; both raise `ValueError` where they make no
mixture: `std` must be > 0, `points` a positive multiple of the number of parts.
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
    """Three Gaussians, unequal in mass (0.5, 0.2, 0.3) and in standard deviation (0.3, 0.5, 0.2), labels 0 to 2: a
    method that loses small modes or confuses widths shows it here."""
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    return GaussianMixture(
        jnp.asarray(mean, jnp.result_type(float)),
        std=np.array([0.3, 0.5, 0.2]),
        weight=np.array([0.5, 0.2, 0.3]),
        label=np.arange(3),
    )


def two_moons(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    """Two interleaved half circles of radius 1, labels 0 (upper) and 1 (lower): scikit-learn's moons, centred."""
    angle = np.linspace(0, np.pi, _part(points, 2))
    upper = _polar(1.0, angle)
    return _mixture([upper - [0.5, 0.25], [0.5, 0.25] - upper], std)


def checkerboard(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    """The eight dark cells of a 4 x 4 board on [-1, 1]², labels 0 to 7 row by row from below; the cell at (-1, -1) is
    dark.

    **Arguments:** `std` of the blur, flat inside a cell from about half the distance of points on, 1/32 by default;
    `points` in all, 8 times a square.

    **Raises:** `ValueError` unless `points` is 8 times a square.
    """
    side = round(_part(points, 8) ** 0.5)
    if 8 * side**2 != points:
        raise ValueError(f"points must be 8 times a square, got {points}")
    offset = (np.arange(side) + 0.5) / side / 2
    cell = np.stack(np.meshgrid(offset, offset, indexing="ij"), axis=-1).reshape(-1, 2)
    corners = [(column / 2 - 1, row / 2 - 1) for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    return _mixture([cell + corner for corner in corners], std)


def swiss_roll(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    r"""The spiral $\theta (\cos\theta, \sin\theta) / 10$ with $\theta$ uniform in $[1.5 \pi, 4.5 \pi]$, one label:
    the first and last coordinate of scikit-learn's `make_swiss_roll`, divided by 10."""
    angle = 1.5 * np.pi * (1 + 2 * _quantiles(_part(points, 1)))
    return _mixture([_polar(angle / 10, angle)], std)


def pinwheel(std: float = 0.05, *, points: int = 510) -> GaussianMixture:
    r"""Five bent arms, labels 0 to 4: radii N(1, 0.3²), at angles $2 \pi k / 5 + e^{radius} / 4$.

    The shape is that of Composing graphical models with neural networks for structured representations and fast
    inference, Johnson, Duvenaud, Wiltschko, Datta, Adams, 2016, arXiv 1603.06277.

    `std` is also the width of an arm.
    """
    radius = 1 + 0.3 * np.asarray(norm.ppf(_quantiles(_part(points, 5))), np.float64)
    return _mixture([_polar(radius, 2 * np.pi * arm / 5 + np.exp(radius) / 4) for arm in range(5)], std)


def two_spirals(std: float = 0.05, *, points: int = 512) -> GaussianMixture:
    r"""Two arms of one and a half turns, the one the other turned by 180 degrees, labels 0 and 1: $\theta (\cos\theta,
    \sin\theta) / 2 \pi$ with $\theta = 3 \pi \sqrt q$, q uniform, which spreads the mass about evenly along the arm."""
    angle = 3 * np.pi * np.sqrt(_quantiles(_part(points, 2)))
    arm = _polar(angle / (2 * np.pi), angle)
    return _mixture([arm, -arm], std)


def _mixture(parts: list[Float[np.ndarray, "_ 2"]], std: float) -> GaussianMixture:
    """Equal Gaussians around all points; the label is the number of the part."""
    label = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return GaussianMixture(jnp.asarray(np.concatenate(parts), jnp.result_type(float)), std, label=label)


def _polar(
    radius: float | Float[np.ndarray, " points"], angle: Float[np.ndarray, " points"]
) -> Float[np.ndarray, "points 2"]:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _quantiles(points: int) -> Float[np.ndarray, " points"]:
    """The middles of equal shares of [0, 1]."""
    return (np.arange(points) + 0.5) / points


def _part(points: int, parts: int) -> int:
    if points < parts or points % parts:
        raise ValueError(f"points must be a positive multiple of {parts}, got {points}")
    return points // parts
