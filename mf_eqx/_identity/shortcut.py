r"""Shortcut models, in continuous time: one step equals two half steps.

$$u(z_t, r, t) = \tfrac12 u(z_t, m, t) + \tfrac12 u(z_m, r, m), \qquad m = \tfrac{r + t}{2}$$

The paper trains on a dyadic grid: t - r is one of 1, 1/2, ..., 1/64, equally often, and r a multiple of it; the t of
boundary rows is one of 1/128. Its target is an averaged copy (decay 0.999), clipped to [-4, 4] like z_m. Here r and t
are continuous and the target is the network itself behind stop-gradient, so the only difference from `SplitMeanFlow` is
the position of the split. `paper_settings` has sorted uniform times, whose mean length is 0.33 in place of 0.28.

Source: One Step Diffusion via Shortcut Models, Frans, Hafner, Levine, Abbeel, 2024, arXiv 2410.12557, and the authors'
code.
"""

from jaxtyping import Array, Float

from .._derivative import Passes
from .._field import AbstractField
from .._row import Row
from .._times import TimePairs, UniformTimes
from .._weight import ConstantWeight
from .base import AbstractIdentity
from .facts import Facts
from .split_mean_flow import semigroup_residual


class Shortcut(AbstractIdentity):
    """The semigroup property at the midpoint of [r, t]. It needs boundary rows, and uses neither v nor a JVP.

    `ConstantWeight` is the safe weight: see `AdaptiveWeight`.
    """

    @property
    def facts(self) -> Facts:
        times, passes = UniformTimes(), Passes(forward=2)
        settings = {"time_pairs": TimePairs(times), "boundary_times": times, "weight": ConstantWeight(mean=True)}
        return Facts(
            degenerate=True, trains_velocity=False, uses_velocity=False, passes=passes, paper_settings=settings
        )

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        return semigroup_residual(field, row.z, row.r, row.t, 0.5, row.condition, key=row.key)
