r"""Comparison of a sample with a *known* distribution: with its modes and its density, not with another sample.

Both metrics come from the total variation of two distributions over finitely many places, one minus the mass that they
share,

$$\mathrm{TV}(p, q) = \tfrac12 \sum_i |p_i - q_i| = 1 - \sum_i \min(p_i, q_i),$$

where the places are modes (`mode_coverage`, which returns the shared mass) or cells of a grid (`total_variation`).
"""

import functools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._custom_types import as_floats, at_least_float32, Scalar
from .._validate import as_count, check_finite, check_positive
from ._distance import nan_unless_finite


def mode_coverage(
    x: Float[Array | np.ndarray, "sample dim"],
    mean: Float[Array | np.ndarray, "component dim"],
    std: Float[Array | np.ndarray, " component"],
    weight: Float[Array | np.ndarray, " component"],
    label: Int[Array | np.ndarray, " component"] | None = None,
    *,
    radius: float = 3.0,
) -> Scalar:
    r"""The mass that a sample and a Gaussian mixture put on the same modes,

    $$\sum_k \min(\hat p_k, w_k),$$

    $\hat p_k$ being the share of the sample that lies within `radius` standard deviations of a component of mode k, and
    nearer (in standard deviations) to it than to the other modes. 1 means that every mode has its mass; a missing mode
    lowers the result by its weight, a point between the modes by 1/n.

    **Arguments:** `x` the sample; `mean`, `std`, `weight` of the components (as in `mf_eqx.exact.GaussianMixture`);
    `label` the mode of each component, integers below the number of components (by default every component is a mode);
    `radius` in standard deviations: of exact samples in two dimensions, 1.1% lie outside a radius of 3.

    **Returns:** a number in [0, 1].

    **Raises:** `ValueError` if shapes do not fit, a value is not finite, a label is no integer or out of range, a
    weight is negative or all are 0, or `radius` or a standard deviation is not positive. Under `jax.jit` values are not
    known: there the result is NaN if one is not finite.

    **Reference:** modes and high-quality samples within three standard deviations as in VEEGAN, Srivastava, Valkov,
    Russell, Gutmann and Sutton, 2017, where a mode counts as covered by a single sample; here its mass counts.
    """
    check_positive("radius", radius)
    components = len(mean)
    if np.ndim(x) != 2 or len(x) < 1 or np.shape(x)[1:] != np.shape(mean)[1:]:
        raise ValueError(f"`x` must have shape (sample, {np.shape(mean)[-1]}) as `mean`, got {np.shape(x)}.")
    mode = np.arange(components) if label is None else np.asarray(label)
    for name, shape in (("std", np.shape(std)), ("weight", np.shape(weight)), ("label", mode.shape)):
        if shape != (components,):
            raise ValueError(f"`{name}` must be {components} numbers, one for each component, got shape {shape}.")
    if mode.dtype.kind not in "iu":
        raise ValueError(f"`label` must be integers, got {mode.dtype}.")
    if mode.min() < 0 or mode.max() >= components:
        raise ValueError(f"`label` must lie in [0, {components}), got {mode.min()} to {mode.max()}.")
    given = {"`x`": x, "`mean`": mean, "`std`": std, "`weight`": weight}
    x, mean, std, weight = (at_least_float32(as_floats(name, values)) for name, values in given.items())
    for name, values in zip(given, (x, mean, std, weight), strict=True):
        check_finite(name, values)
    check_positive("`std`", std)
    check_positive("`weight`", weight, or_zero=True)
    check_positive("the sum of `weight`", jnp.sum(weight))
    share = _mode_coverage(x, mean, std, weight, jnp.asarray(mode), jnp.asarray(radius, std.dtype))
    return nan_unless_finite(share, x, mean, std, weight)


@jax.jit
def _mode_coverage(
    x: Float[Array, "sample dim"],
    mean: Float[Array, "component dim"],
    std: Float[Array, " component"],
    weight: Float[Array, " component"],
    mode: Int[Array, " component"],
    radius: Scalar,
) -> Scalar:
    components = len(mean)

    def nearest(point: Float[Array, " dim"]) -> Int[Array, ""]:
        distance = jnp.linalg.norm(point - mean, axis=1) / std
        best = jnp.argmin(distance)
        return jnp.where(distance[best] <= radius, mode[best], components)

    # Modes have numbers below `components`; points of no mode get the number `components`, which is cut off.
    modes = jax.lax.map(nearest, x, batch_size=min(len(x), 1000))
    share = jnp.bincount(modes, length=components + 1)[:components] / len(x)
    expected = jax.ops.segment_sum(weight / jnp.sum(weight), mode, components)
    return jnp.sum(jnp.minimum(share, expected))


def total_variation(
    x: Float[Array | np.ndarray, "sample dim"],
    log_density: Callable[[Float[Array, " dim"]], Scalar],
    *,
    low: Sequence[float],
    high: Sequence[float],
    bins: int = 32,
    nodes: int = 4,
) -> Scalar:
    r"""Total variation between the histogram of a sample on a grid and the exact density,

    $$\tfrac12 \sum_i |\hat p_i - p_i| + \tfrac12 |\hat p_{out} - p_{out}|,$$

    where the last term is for the mass outside the grid. An exact sample of n points does not give zero, but about
    $\sqrt{2 / \pi n}\, \sum_i \sqrt{p_i} / 2$, so report the result for an exact sample of the same size, too.

    **Arguments:** `x` the sample; `log_density` of one point (as in `mf_eqx.exact.GaussianMixture`); `low`, `high` the
    corners of the grid, one number per dimension; `bins` along each dimension, so that there are bins^dim cells;
    `nodes` of the midpoint rule inside each cell along each dimension.

    **Returns:** a number in [0, 1], up to the error of the midpoint rule.

    **Raises:** `ValueError` if `x` is not (sample, dim) with at least one point, a value is not finite, the corners do
    not have one number per dimension, low < high does not hold, or `bins` or `nodes` is no integer >= 1. Under
    `jax.jit` values are not known: there the result is NaN if one is not finite.
    """
    if np.ndim(x) != 2 or min(np.shape(x)) < 1:
        raise ValueError(f"`x` must have shape (sample, dim) with at least one point, got {np.shape(x)}.")
    corners = np.asarray(low, np.float64), np.asarray(high, np.float64)
    dim = np.shape(x)[-1]
    if any(corner.shape != (dim,) for corner in corners) or not (corners[0] < corners[1]).all():
        raise ValueError(f"`low` and `high` must be {dim} numbers each, with low < high, got {low} and {high}.")
    check_finite("low", corners[0])
    check_finite("high", corners[1])
    bins, nodes = as_count("bins", bins), as_count("nodes", nodes)
    x = at_least_float32(as_floats("`x`", x))
    check_finite("`x`", x)
    points, volume = _midpoints(*corners, bins * nodes)
    density = _densities(log_density, jnp.asarray(points, x.dtype)).reshape((bins, nodes) * dim)
    expected = volume * jnp.sum(density, axis=tuple(range(1, 2 * dim, 2))).reshape(-1)
    distance = _total_variation(x, expected, *(jnp.asarray(corner, x.dtype) for corner in corners), bins)
    return nan_unless_finite(distance, x)


@functools.partial(jax.jit, static_argnums=4)
def _total_variation(
    x: Float[Array, "sample dim"],
    expected: Float[Array, " cells"],
    low: Float[Array, " dim"],
    high: Float[Array, " dim"],
    bins: int,
) -> Scalar:
    place = jnp.floor((x - low) / (high - low) * bins)
    inside = jnp.all((x >= low) & (x <= high), axis=1)
    place = jnp.clip(place, 0, bins - 1).astype(int)  # the upper edge belongs to the last cell
    cell = jnp.sum(place * bins ** np.arange(x.shape[1])[::-1], axis=1)
    share = jnp.bincount(jnp.where(inside, cell, expected.size), length=expected.size + 1) / len(x)
    outside = jnp.abs(share[-1] - (1 - jnp.sum(expected)))
    return (jnp.sum(jnp.abs(share[:-1] - expected)) + outside) / 2


def _midpoints(
    low: Float[np.ndarray, " dim"], high: Float[np.ndarray, " dim"], count: int
) -> tuple[Float[np.ndarray, "points dim"], float]:
    """The midpoints of count^dim equal parts of a box, and the volume of a part."""
    axes = [a + (np.arange(count) + 0.5) / count * (b - a) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    return points, float(np.prod((high - low) / count))


@eqx.filter_jit
def _densities(
    log_density: Callable[[Float[Array, " dim"]], Scalar], points: Float[Array, "points dim"]
) -> Float[Array, " points"]:
    return jnp.exp(jax.lax.map(log_density, points, batch_size=min(len(points), 1024)))
