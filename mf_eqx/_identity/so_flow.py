r"""Solution flow models: two points of one step of the given velocity have the same end.

With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$, $l = t - k (t - r)$ and $z_l = z_t - (t - l)\, v_t$,

$$X_{t \to r}(z_t) = X_{l \to r}(z_l), \qquad k: 0.1 \to 0.002.$$

The left side minus the right side, divided by t - l as in the paper's loss, is minus the residual of `AlphaFlow` with
$\alpha = k$: the two methods differ in schedule and weights. There is no derivative.

The paper's loss weighs by $1 / (\overline{\Delta^2} + 0.01)^p$ with the *mean* over dimensions, p = 0.5 or 1
(`paper_settings`: 1, the authors' default). In the authors' code t - r and t - l are at least 1e-4, guidance can fade
out towards t = 1, and the gradient of boundary rows has a factor 2 that the others lack. The gradient of a residual
here is that of u(z, r, t), as in the authors' code, and not 1/k times as large.

Source: SoFlow: Solution Flow Models for One-Step Generative Modeling, Luo, Yuan, Liu, 2025, arXiv 2512.15657, and the
authors' code.
"""

import equinox as eqx
import optax
from jaxtyping import Array, Float

from .._derivative import Passes
from .._field import AbstractField
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .._times import LogitNormalTimes, TimePairs
from .._weight import AdaptiveWeight
from .alpha_flow import difference_residual
from .base import AbstractScheduledIdentity
from .facts import Facts

FIRST_STEP, LAST_STEP = 0.1, 0.002


class SoFlow(AbstractScheduledIdentity):
    r"""The residual $(X_{l \to r}(z_l) - X_{t \to r}(z_t)) / (t - l)$, whose gradient is replaced by that of u(z, r,
    t).

    An exact field leaves a residual of order k. In bfloat16 the difference is mostly rounding where k is small: compute
    in float32.

    **Arguments:** `step` the part k of [r, t] that one step spans, in (0, 1], or a schedule of it.
    """

    step: Schedule = eqx.field(default=LAST_STEP, converter=as_schedule("step", 0.0, 1.0))

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        return cls(optax.exponential_decay(FIRST_STEP, max(steps, 1), LAST_STEP / FIRST_STEP, end_value=LAST_STEP))

    def __check_init__(self):
        if self.step == 0:
            raise ValueError("step must be > 0, got 0.0")

    @property
    def facts(self) -> Facts:
        pairs = TimePairs(LogitNormalTimes(0.2, 0.8), LogitNormalTimes(-1.0, 0.8))
        weight = AdaptiveWeight(offset=0.01, mean=True)
        settings = {"time_pairs": pairs, "boundary_times": LogitNormalTimes(-0.2, 1.0), "weight": weight}
        return Facts(exact=False, passes=Passes(forward=1), paper_settings=settings)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        return difference_residual(field, row, at_step(self.step, row.context).astype(row.z.dtype))
