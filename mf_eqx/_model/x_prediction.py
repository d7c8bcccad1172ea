r"""Networks that predict data in place of velocities.

On the straight path, $v(z, t) = (z - E[x | z]) / t$. A network whose output is of data, which lie on a manifold of few
dimensions, need not represent the noise that a velocity contains. In the paper, a network of large patches of pixels
learns only so.

Source: One-step Latent-free Image Generation with Pixel Mean Flows, 2026, arXiv 2601.22158.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar, as_times, at_least_float32, Condition, Time, TimeLike
from .._field import AbstractField, AbstractFieldWithVelocity, has_velocity_head
from .._validate import as_float, check_positive


class XPrediction(AbstractFieldWithVelocity):
    r"""The field of a network that predicts data ("x-prediction"):

    $$u(z, r, t) = \frac{z - x_u(z, r, t)}{\max(t, t_0)}, \qquad v(z, t) = \frac{z - x_v(z, t)}{\max(t, t_0)}$$

    with $x_u$ the output of `field`, and $x_v$ that of its velocity head, if it has one. For t >= t_0 nothing is lost:
    from $x_u = z - t u$ it recovers u. Below t_0 the division is bounded, so that u is t / t_0 times as large; methods
    that train there need targets that are bounded alike, those of an `Objective` with the same `smallest_time`.

    **Arguments:** `field` whose outputs are data; `smallest_time` the $t_0$, 0.05 in the paper.

    **Raises:** `ValueError` unless `smallest_time` is > 0 and finite, and if `field` is an `XPrediction` already.
    """

    field: AbstractField
    smallest_time: float = eqx.field(default=0.05, converter=as_float("smallest_time"), static=True)

    def __check_init__(self):
        check_positive("smallest_time", self.smallest_time)
        if isinstance(self.field, XPrediction):
            raise ValueError("field must be a network whose outputs are data, got an XPrediction")

    @property
    def has_velocity_head(self) -> bool:
        return has_velocity_head(self.field)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """That of the network."""
        return self.field.data_shape  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def null_label(self) -> int:
        """That of the network."""
        return self.field.null_label  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        r, t = as_times(r, t, z)
        return self._velocity_of(self.field(z, r, t, condition, key=key), z, t)

    def velocity(
        self, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None, *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*data"]:
        """v(z, t) by the velocity head. **Raises:** `ValueError` for a network without a velocity head."""
        t = as_scalar("t", t, z)
        return self._velocity_of(self._with_head().velocity(z, t, condition, key=key), z, t)

    def with_velocity(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        """The pair (u(z, r, t), v(z, t)). **Raises:** as `velocity`."""
        r, t = as_times(r, t, z)
        of_average, of_velocity = self._with_head().with_velocity(z, r, t, condition, key=key)
        return self._velocity_of(of_average, z, t), self._velocity_of(of_velocity, z, t)

    def _with_head(self) -> AbstractFieldWithVelocity:
        if not isinstance(self.field, AbstractFieldWithVelocity) or not self.field.has_velocity_head:
            rule = "have a velocity head for a field that is asked for its velocity"
            raise ValueError(f"field must {rule}, got {type(self.field).__name__} without")
        return self.field

    def _velocity_of(self, x: Float[Array, "*data"], z: Float[Array, "*data"], t: Time) -> Float[Array, "*data"]:
        return (at_least_float32(z) - x) / jnp.maximum(t, self.smallest_time)
