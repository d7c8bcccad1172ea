r"""Align Your Flow: the MeanFlow identity with a regularised tangent, and steps of bounded length.

$$g = (v_t - u) - \rho\, (t - r)\, \frac{d}{dt} u(z_t, r, t), \qquad \rho: 0 \to 0.99,$$

and u is moved along $g / (|g| + c)$. With $\rho = 1$ and g = 0 this is MeanFlow; the paper stops at 0.99, so that 1% of
Flow Matching's direction remains. This direction is, up to a factor 2, the negative gradient of the loss $\mathrm{sg}(1
/ (|g| + c))\, |g|^2$, where the target inside of g is behind stop-gradient.

The paper distils: v_t is then the velocity of a frozen, guided field (`Objective.velocity`). Its $\rho$ rises over
10,000 steps; it draws t - r first, as a logit-normal number of (-0.8, 1), then r uniformly. |g| is the Euclidean length
here. All these details are as in re-implementations by others: we have seen no code of the authors.

Source: Align Your Flow: Scaling Continuous-Time Flow Map Distillation, Sabour, Fidler, Kreis, 2025, arXiv 2506.14603.
"""

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .._times import LogitNormalTimes, TimePairs, UniformTimes
from .._validate import as_float, check_positive
from .base import AbstractIdentityWithLoss, AbstractScheduledIdentity
from .facts import Facts
from .unit_step import unit_step_loss

LARGEST_RHO = 0.99


class AlignYourFlow(AbstractIdentityWithLoss, AbstractScheduledIdentity):
    r"""The residual $-g = u - \mathrm{sg}(v - \rho\, (t - r)\, du/dt)$, with steps of length $|g| / (|g| + c)$.

    The residual of an exact field is $(1 - \rho)\, (u - v)$.

    **Arguments:** `rho` in [0, 1] or a schedule of it: 0.99 at last in the paper; `offset` c, > 0: 0.1 in the paper;
    `derivative` the engine that computes du/dt.
    """

    rho: Schedule = eqx.field(default=LARGEST_RHO, converter=as_schedule("rho", 0.0, 1.0))
    offset: float = eqx.field(default=0.1, converter=as_float("offset"))
    derivative: AbstractDerivative = FusedJVP()

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        """With rho rising over the first tenth of the training."""
        return cls(optax.linear_schedule(0.0, LARGEST_RHO, max(steps // 10, 1)))

    def __check_init__(self):
        check_positive("offset", self.offset)

    @property
    def facts(self) -> Facts:
        pairs = TimePairs(UniformTimes(), gap_times=LogitNormalTimes(-0.8, 1.0))
        settings = {"identity_share": 1, "time_pairs": pairs}
        return Facts(exact=self.rho == 1, passes=self.derivative.passes, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        tangent, rho = (row.v, 0.0, 1.0), at_step(self.rho, row.context).astype(row.z.dtype)
        u, dudt = self.derivative(field, row.z, row.r, row.t, row.condition, tangent=tangent, key=row.key)
        residual = u - jax.lax.stop_gradient(row.v - rho * (row.t - row.r) * dudt)
        return residual, unit_step_loss(residual, self.offset)
