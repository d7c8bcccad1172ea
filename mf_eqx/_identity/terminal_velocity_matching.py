r"""Terminal velocity matching: the Lagrangian equation with the velocity of an averaged copy at the end.

$$u(z_t, r, t) - (t - r)\, \partial_r u(z_t, r, t) = \bar v(X_{t \to r}(z_t), r), \qquad
X_{t \to r}(z) = z - (t - r)\, u(z, r, t),$$

with $\bar v(z, r) = \bar u(z, r, r)$ of an exponential average of the parameters, of decay 0.99 in the paper. Weights
of the paper that depend on the scale of guidance are left out.

Source: Terminal Velocity Matching, Zhou, Parger, Haque, Song, 2025, arXiv 2511.19797.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from .._field import AbstractField
from .._model.guidance import condition_at
from .._row import Row
from .base import AbstractIdentity
from .facts import Facts
from .lagrangian_self_distillation import lagrangian_sides, SELF_DISTILLATION
from .teacher import teacher_of


class TerminalVelocityMatching(AbstractIdentity):
    r"""The residual $u - (t - r)\, \partial_r u - \bar u(X, r, r)$ with the teacher's $\bar u$.

    The teacher is one of the averages, `TrainStep(..., averages=[ExponentialAverage(0.99), ...], teacher=0)`, not
    necessarily the average that is evaluated, or a frozen field. The method needs boundary rows, and costs as much as
    `LagrangianSelfDistillation`.

    **Raises** (when called): `ValueError` without a teacher.
    """

    @property
    def facts(self) -> Facts:
        return dataclasses.replace(SELF_DISTILLATION, needs_teacher=True, paper_settings=None)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        teacher = teacher_of(row, type(self).__name__)
        left, end = lagrangian_sides(field, row)
        condition = condition_at(row.condition, row.r, row.r)
        return left - jax.lax.stop_gradient(teacher(end, row.r, row.r, condition, key=None))
