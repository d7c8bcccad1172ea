r"""Shortcut models, in continuous time: one step equals two half steps.

$$u(z_t, r, t) = \tfrac12 u(z_t, m, t) + \tfrac12 u(z_m, r, m), \qquad m = \tfrac{r + t}{2}$$

The paper trains on a dyadic grid of step sizes with an averaged copy as target; here r and t are continuous and the
target is the network itself behind stop-gradient, so the only difference from `SplitMeanFlow` is the position of the
split.

Source: One Step Diffusion via Shortcut Models, Frans, Hafner, Levine, Abbeel, 2024, arXiv 2410.12557.
"""

from jaxtyping import Array, Float

from .._derivative import Passes
from .._field import AbstractField
from .._row import Row
from .base import AbstractIdentity
from .facts import Facts
from .split_mean_flow import semigroup_residual


class Shortcut(AbstractIdentity):
    """The semigroup property at the midpoint of [r, t]. It needs boundary rows, and uses neither v nor a JVP.

    `ConstantWeight` is the safe weight: see `AdaptiveWeight`.
    """

    @property
    def facts(self) -> Facts:
        return Facts(degenerate=True, trains_velocity=False, uses_velocity=False, passes=Passes(forward=2))

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        return semigroup_residual(field, row.z, row.r, row.t, 0.5, row.condition, key=row.key)
