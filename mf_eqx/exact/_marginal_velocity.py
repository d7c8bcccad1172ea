r"""The marginal velocity of a distribution along one path, as a function of state and time."""

import equinox as eqx
from jaxtyping import Array, Float

from .._custom_types import as_scalar, Condition, TimeLike
from .._interpolant import AbstractInterpolant, LinearInterpolant
from ._base import AbstractDistribution


class MarginalVelocity(eqx.Module):
    r"""The marginal velocity $v(z, t \mid c) = E[v_t \mid z_t = z, c]$ (Eq. 1), which Flow Matching learns.

    **Arguments:** `distribution` of the data; `interpolant` the path, the paper's straight one by default.
    """

    distribution: AbstractDistribution
    interpolant: AbstractInterpolant = LinearInterpolant()

    def __call__(self, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None) -> Float[Array, "*data"]:
        """v(z, t | condition); without a condition, that of the whole distribution."""
        return self.distribution.velocity(self.interpolant, z, as_scalar("t", t, z), condition)
