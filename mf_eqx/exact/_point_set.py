r"""Point sets: the distribution of a finite data set, whose velocity every network trained on it approximates.

$$v(z, t) = \dot\alpha_t \hat x + \dot\sigma_t \frac{z - \alpha_t \hat x}{\sigma_t}, \qquad
\hat x = E[x \mid z] = \sum_i p_i x_i, \quad p = \mathrm{softmax}_i \Big(\log w_i -
\frac{\|z - \alpha_t x_i\|^2}{2 \sigma_t^2}\Big).$$

It is a Gaussian mixture of standard deviation zero, and its velocity is singular at t = 0. Its flow ends at the points
themselves, not at new points of the shape from which they were drawn: for toy data with a shape, blur the points
(`GaussianMixture`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, Real

from .._custom_types import as_floats, as_scalar, Condition, TimeLike
from .._interpolant import AbstractInterpolant
from .._validate import check_finite, check_positive
from ._base import AbstractDistribution, check_point


class PointSet(AbstractDistribution):
    r"""Points with masses, $\sum_i w_i \delta_{x_i}$; no labels, so `condition` must be None.

    **Arguments:** `points` one per row; `weight` their relative masses $w_i$ > 0, whose sum may be any number, equal by
    default.

    The velocity divides by $\sigma_t$: both times of an average velocity, r and t, should be at least `earliest`. At
    `earliest` the division loses three digits (an absolute error of about 1e-13 in float64 and 1e-4 in float32, for
    points of order one); at t = 0 the result is NaN.

    **Raises:** `ValueError` if shapes do not fit, if a point is not finite, or if a mass is not positive and finite.
    """

    points: Float[Array, "point *data"]
    weight: Float[Array, " point"]

    earliest: ClassVar[float] = 1e-3

    def __init__(
        self,
        points: Real[Array | np.ndarray, "point *data"],
        weight: Real[Array | np.ndarray, " point"] | None = None,
    ):
        self.points = as_floats("points", points)
        weight = np.ones(self.points.shape[:1]) if weight is None else weight
        self.weight = jnp.asarray(weight, self.points.dtype)

    def __check_init__(self):
        number = self.points.shape[:1]
        if self.points.ndim < 1 or self.points.size < 1:
            raise ValueError(
                f"points must hold at least one point along its first axis, of at least one value, got shape "
                f"{self.points.shape}"
            )
        if self.weight.shape != number:
            raise ValueError(f"weight must have one value per point, {number}, got shape {self.weight.shape}")
        check_finite("points", self.points)
        check_positive("weight", self.weight)

    def velocity(
        self, interpolant: AbstractInterpolant, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None
    ) -> Float[Array, "*data"]:
        _check_condition(condition)
        check_point("z", z, self.points.shape[1:])
        alpha, sigma, alpha_rate, sigma_rate = interpolant.rates(as_scalar("t", t, z))
        offset = (z - alpha * self.points).reshape(len(self.points), -1)
        logits = jnp.log(self.weight) - jnp.sum(offset**2, axis=1) / (2 * sigma**2)
        x = jnp.tensordot(jax.nn.softmax(logits), self.points, 1, precision="highest")
        return alpha_rate * x + sigma_rate * (z - alpha * x) / sigma

    def sample(self, *, key: Key[Array, ""], condition: Condition = None) -> Float[Array, "*data"]:
        _check_condition(condition)
        return self.points[jr.categorical(key, jnp.log(self.weight))]


def _check_condition(condition: Condition) -> None:
    if condition is not None:
        raise ValueError(f"condition must be None for a point set, which has no labels, got {condition}")
