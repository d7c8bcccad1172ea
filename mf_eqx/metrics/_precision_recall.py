r"""Improved precision and recall: the manifold of a sample is the union of balls around its points, each reaching to
the point's k-th nearest neighbour in the sample. Precision is the share of generated points on the manifold of the real
ones; recall is the share of real points on the manifold of the generated ones.

All pairs are compared, in blocks of rows: memory stays near that of the features.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._validate import as_count, check_finite
from ._distance import check_samples

# Bounds the temporary of squared distances: 2**25 of them are 128 MiB in float32.
_DISTANCES_PER_BLOCK = 2**25
# Up to this dimension distances come from differences, which are as exact as the points; above it from products, which
# cost a matrix product instead of a pass over all differences.
_LARGEST_DIM_OF_DIFFERENCES = 64


_SMALL_EXTENT = 1e-12  # of a sample; in float32 squares are rounded to zero below some 1e-23


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images that look real, and of real ones that can be generated."""

    precision: float
    recall: float


def precision_recall(
    generated: Float[Array | np.ndarray, "sample_a dim"],
    real: Float[Array | np.ndarray, "sample_b dim"],
    *,
    neighbours: int = 3,
) -> PrecisionRecall:
    r"""Improved precision and recall of features,

    $$\text{precision} = \frac1n \sum_i \big[\exists j: |g_i - r_j| \le d_k(r_j)\big], \qquad
      \text{recall} = \frac1m \sum_j \big[\exists i: |r_j - g_i| \le d_k(g_i)\big],$$

    $d_k$ being the distance of a point to its k-th nearest neighbour in its own sample, itself not counted. Both depend
    on the numbers of points: compare only at equal numbers. The literature has 50,000 generated and 10,000 real images
    (ADM, with distances rounded to float16; here they are float32).

    Up to 64 dimensions, distances come from differences of points. Above, they come from products of points, less the
    mean of the real ones: distances below about 1e-3 of the extent of a sample are then rounding, and a point whose
    distance equals a radius may fall on either side of it.

    **Arguments:** `generated`, `real` features, one point per row; `neighbours` k.

    **Raises:** `ValueError` if a sample is not (sample, dim) with more than `neighbours` points, if their dims differ,
    if a value is not finite or so large that the square of a distance is not, or if `neighbours` is no
    integer >= 1.

    **Reference:** Improved Precision and Recall Metric for Assessing Generative Models, Kynkäänniemi, Karras, Laine,
    Lehtinen and Aila, 2019, arXiv 1904.06991.
    """
    check_samples(generated=generated, real=real)
    neighbours = as_count("neighbours", neighbours)
    if neighbours >= min(len(generated), len(real)):
        raise ValueError(
            f"neighbours must be below the numbers of points, {len(generated)} and {len(real)}, got {neighbours}"
        )
    check_finite("`generated`", generated)
    check_finite("`real`", real)
    g, r = _centred(generated, real)
    for name, points in (("generated", g), ("real", r)):
        check_finite(f"squares of `{name}` in float32", jnp.sum(points**2, axis=1))
    precise = np.asarray(_covered(g, r, _squared_radii(r, neighbours)))
    recalled = np.asarray(_covered(r, g, _squared_radii(g, neighbours)))
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def _centred(*samples: Float[Array | np.ndarray, "_ dim"]) -> list[Float[Array, "_ dim"]]:
    """All samples less about the mean of the last: near the origin, distances from products have smaller rounding
    errors. The mean is rounded to few bits, so that the difference is exact for points of few bits, such as pixels.
    Points very close to each other are scaled, so that the squares of their distances are not zero."""
    exact = [np.asarray(points) for points in samples]
    exact = [points.astype(np.promote_types(points.dtype, np.float32), copy=False) for points in exact]
    with np.errstate(over="ignore", invalid="ignore"):  # overflow to infinity is refused later
        centre = exact[-1].mean(axis=0, dtype=np.float64)
        extent = np.abs(exact[-1] - centre.astype(exact[-1].dtype)).max()
        scale = 1.0
        if 0 < extent < np.inf:
            unit = 2.0 ** (np.floor(np.log2(extent)) - 3)
            centre = np.round(centre / unit) * unit
            scale = 1 / unit if extent < _SMALL_EXTENT else 1.0
        near = [points - centre.astype(points.dtype) for points in exact]
        return [jnp.asarray((points * points.dtype.type(scale)).astype(np.float32)) for points in near]


@functools.partial(jax.jit, static_argnums=1)
def _squared_radii(points: Float[Array, "sample dim"], neighbours: int) -> Float[Array, " sample"]:
    squares = jnp.sum(points**2, axis=1)

    def radius(point: Float[Array, " dim"], index: Int[Array, ""]) -> Float[Array, ""]:
        others = jnp.where(jnp.arange(len(points)) == index, jnp.inf, _squared_distances(point, points, squares))
        return -jax.lax.top_k(-others, neighbours)[0][-1]

    return jax.lax.map(
        lambda row: radius(*row), (points, jnp.arange(len(points))), batch_size=_rows_per_block(len(points))
    )


@jax.jit
def _covered(
    queries: Float[Array, "queries dim"], points: Float[Array, "sample dim"], squared_radii: Float[Array, " sample"]
) -> Bool[Array, " queries"]:
    """Whether each query lies in the ball of any point."""
    squares = jnp.sum(points**2, axis=1)
    return jax.lax.map(
        lambda query: jnp.any(_squared_distances(query, points, squares) <= squared_radii),
        queries,
        batch_size=min(len(queries), _rows_per_block(len(points))),
    )


def _squared_distances(
    point: Float[Array, " dim"], points: Float[Array, "sample dim"], squares: Float[Array, " sample"]
) -> Float[Array, " sample"]:
    if points.shape[1] <= _LARGEST_DIM_OF_DIFFERENCES:
        return jnp.sum((points - point) ** 2, axis=1)
    products = jnp.matmul(points, point, precision="highest")
    return jnp.maximum(squares + jnp.sum(point**2) - 2 * products, 0)


def _rows_per_block(count: int) -> int:
    return min(count, max(1, _DISTANCES_PER_BLOCK // count))
