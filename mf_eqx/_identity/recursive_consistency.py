r"""RCGM: recursive consistency of order N, with which TwinFlow trains beside its adversary.

One step along the given velocity, then N equal steps of the field, end where one step of the field does. With $z_0 =
z_t - \delta v_t$, $z_{i+1} = z_i - (s_i - s_{i+1})\, u_i$ and $u_i = \bar u(z_i, s_{i+1}, s_i)$,

$$(t - r)\, u(z_t, r, t) = \delta\, v_t + \sum_{i < N} (s_i - s_{i+1})\, u_i, \qquad s_0 = t - \delta, \dots, s_N = r,$$

with $\bar u$ of an averaged copy, of decay 0.99. Where $t - r < \delta$, the step is t - r, and u = v is left. The
residual g is the left side minus the right, over $\delta$; for N = 1 that of `AlphaFlow` and `SoFlow`, $\alpha = k =
\delta / (t - r)$. The loss is $w e / \sqrt{\mathrm{sg}(e) + 10^{-6}}$, e the mean of $\mathrm{clip}(g, -1, 1)^2$ and
$w = \tan(0.4 \pi (1 - t + r)) + 1$, here divided by its value at r = t. An exact field leaves a g of order $\delta$.

Quarters of TwinFlow's rows have (r, t) = (0, 1); r in [0.95 t, t]; r in [0, t]; and the adversary's, left out here. In
`paper_settings` a quarter are boundary rows; of the others half have r = 0 and half t = 1, independently. TwinFlow
guides as `Guidance(1.0, 0.5)` does, but with velocities of its averaged copy.

Source: Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation, Sun, Lin, ICLR 2026, by way
of the code of TwinFlow, Cheng, Sun, Li, Lin, 2025, arXiv 2512.05150. Euler Mean Flows, Li, Sun, Chen, He, Zhu, 2026,
arXiv 2602.02571, have the residual of `RecursiveConsistency(1, 0.05, 0.0, by_teacher=False)`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import Passes
from .._field import AbstractField, stopped
from .._row import Row, teacher_of
from .._schedule import as_schedule, at_step, Schedule
from .._times import TimePairs, UniformTimes
from .._validate import as_count, as_float, check_positive
from .._weight import AdaptiveWeight
from .average_of_steps import average_of_steps
from .base import AbstractIdentityWithLoss
from .facts import Facts
from .unit_step import root_loss


class RecursiveConsistency(AbstractIdentityWithLoss):
    r"""The residual $g = u - \mathrm{sg}(v - (t - r - \delta) (u - \sum_i u_i / N) / \delta)$, with a loss of its own.

    **Arguments:** `order` N >= 1; `step` $\delta$ in (0, 1] or a schedule, at most t - r; `conditional` $\beta$ in [0,
    1] or a schedule, for a first step along $\beta v + (1 - \beta)\, u(z, t, t)$, which needs boundary rows unless it
    is 1; `by_teacher` whether $\bar u$ is the teacher's, or the field's own; `clip` the largest |g| in the loss, > 0.
    Defaults are TwinFlow's. Compute in float32. `identity_error` is large: it is of errors of u divided by $\delta$.
    """

    order: int = eqx.field(default=2, converter=lambda order: as_count("order", order))
    step: Schedule = eqx.field(default=0.01, converter=as_schedule("step", 0.0, 1.0))
    conditional: Schedule = eqx.field(default=1.0, converter=as_schedule("conditional", 0.0, 1.0))
    by_teacher: bool = True
    clip: float = eqx.field(default=1.0, converter=as_float("clip"))

    def __check_init__(self):
        check_positive("clip", self.clip)
        if self.step == 0:
            raise ValueError("step must be > 0, got 0.0")

    @property
    def facts(self) -> Facts:
        given, weight = self.conditional == 1, AdaptiveWeight(0.5, 1e-6, mean=True)
        times, passes = TimePairs(UniformTimes(), at_data=0.5, at_noise=0.5), Passes(self.order + (not given))
        paper = {"identity_share": 0.75, "time_pairs": times, "boundary_times": UniformTimes(), "weight": weight}
        return Facts(not given, given, exact=False, needs_teacher=self.by_teacher, passes=passes, paper_settings=paper)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        gap, v, step = row.t - row.r, row.v, at_step(self.step, row.context).astype(row.z.dtype)
        u, part = row.evaluate(field, row.z, row.r, row.t), step / jnp.maximum(step, gap)
        if self.conditional != 1:
            predicted = row.own_velocity(field)
            v = predicted + at_step(self.conditional, row.context).astype(v.dtype) * (v - predicted)
        teacher = teacher_of(row.context, "RecursiveConsistency") if self.by_teacher else None
        along, key = (stopped(field), row.key) if teacher is None else (teacher, None)
        at = row.z - part * gap * v, row.r, row.r + (1 - part) * gap
        average = average_of_steps(along, *at, self.order, row.condition, key=key)
        residual = u - jax.lax.stop_gradient(row.v - (1 - part) * (u - average) / part)
        weight = (jnp.tan(0.4 * jnp.pi * (1 - gap)) + 1) / (jnp.tan(0.4 * jnp.pi) + 1)
        return residual, weight * root_loss(u, jnp.clip(residual, -self.clip, self.clip), 1e-6)
