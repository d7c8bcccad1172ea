r"""A point mass: every trajectory on the straight path is a straight line with constant velocity, so that u = v."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._field import AbstractField
from ._base import check_point


class PointMassAverageVelocity(AbstractField):
    r"""The average velocity of data at one point $x_0$, on `LinearInterpolant`,

    $$u(z, r, t) = v(z, t) = (z - x_0) / t,$$

    for t > 0; r may be 0. It ignores the condition.

    **Arguments:** `point` $x_0$.
    """

    point: Float[Array, "*data"] = eqx.field(converter=jnp.asarray)

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        check_point("z", z, self.point.shape)
        _, t = as_times(r, t, z)
        return (z - self.point) / t
