r"""Terminal velocity matching: the Lagrangian equation with the velocity of an averaged copy at the end.

$$u(z_t, r, t) - (t - r)\, \partial_r u(z_t, r, t) = \bar v(X_{t \to r}(z_t), r), \qquad
X_{t \to r}(z) = z - (t - r)\, u(z, r, t),$$

with $\bar v(z, r) = \bar u(z, r, r)$ of an exponential average of the parameters, of decay 0.99. The gradient passes
through the whole left side, but not through X (Eq. 12 of the paper).

Each example of the paper has a row with r < t and a boundary row, with times of its own; here half of the rows are of
each kind, which weighs the two losses equally, too. With guidance of scale $\omega$, an input of the network, the paper
divides both losses by $\omega^2$, takes the velocity without condition from the averaged copy, and sets $\omega = 1$
where the condition is dropped (Eq. 14 and 15). `Guidance` has no such weight, and takes the network's own velocity.

Source: Terminal Velocity Matching, Zhou, Parger, Haque, Song, 2025, arXiv 2511.19797; `paper_settings` are those of all
configurations in the authors' code.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from .._field import AbstractField
from .._model.guidance import condition_at
from .._row import Row, teacher_of
from .._times import LogitNormalTimes, TimePairs
from .._weight import ConstantWeight
from .base import AbstractIdentity
from .facts import Facts
from .lagrangian_self_distillation import lagrangian_sides, SELF_DISTILLATION

_TIMES = LogitNormalTimes(-0.4, 1.0)


class TerminalVelocityMatching(AbstractIdentity):
    r"""The residual $u - (t - r)\, \partial_r u - \bar u(X, r, r)$ with the teacher's $\bar u$.

    The teacher is one of the averages, `TrainStep(..., averages=[ExponentialAverage(0.99), ...], teacher=0)`, not
    necessarily the average that is evaluated, or a frozen field. The method needs boundary rows, and costs as much as
    `LagrangianSelfDistillation`.

    **Raises** (when called): `ValueError` without a teacher.
    """

    @property
    def facts(self) -> Facts:
        settings = {
            "identity_share": 0.5,
            "time_pairs": TimePairs(_TIMES, gap_times=LogitNormalTimes(-0.8, 1.0)),
            "boundary_times": _TIMES,
            "weight": ConstantWeight(mean=True),
        }
        return dataclasses.replace(SELF_DISTILLATION, needs_teacher=True, paper_settings=settings)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        teacher = teacher_of(row.context, type(self).__name__)
        left, end = lagrangian_sides(field, row)
        condition = condition_at(row.condition, row.r, row.r)
        return left - jax.lax.stop_gradient(teacher(end, row.r, row.r, condition, key=None))
