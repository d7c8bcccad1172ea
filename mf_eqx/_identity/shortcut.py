r"""Shortcut models, in continuous time: one step equals two half steps.

$$u(z_t, r, t) = \tfrac12 u(z_t, m, t) + \tfrac12 u(z_m, r, m), \qquad m = \tfrac{r + t}{2}$$

The paper trains on a dyadic grid of step sizes with an averaged copy as target; here r and t are continuous and the
target is the network itself behind stop-gradient, so that it differs from `SplitMeanFlow` in nothing but where it
splits.

Source: One Step Diffusion via Shortcut Models, Frans, Hafner, Levine, Abbeel, 2024, arXiv 2410.12557.
"""

from typing import ClassVar

from jaxtyping import Array, Float, Key

from .._custom_types import Condition, TimeLike
from .._field import AbstractField
from .base import AbstractIdentity, Context
from .split_mean_flow import semigroup_residual


class Shortcut(AbstractIdentity):
    """The semigroup property at the midpoint of [r, t]. Needs boundary rows; uses no v and no JVP."""

    needs_boundary: ClassVar[bool] = True
    uses_velocity: ClassVar[bool] = False

    def residual(
        self,
        field: AbstractField,
        z: Float[Array, "*data"],
        v: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition,
        *,
        key: Key[Array, ""] | None,
        context: Context | None = None,
    ) -> Float[Array, "*data"]:
        return semigroup_residual(field, z, r, t, 0.5, condition, key=key)
