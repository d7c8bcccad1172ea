r"""Consistency training: the flow map sends two points of one path to the same end.

With $X_{t \to 0}(z) = z - t\, u(z, 0, t)$, for z_t and z_s of the same x and $\epsilon$, s < t,

$$X_{t \to 0}(z_t) = X_{s \to 0}(z_s), \qquad X_{0 \to 0}(x) = x,$$

which the average velocity satisfies as s -> t, in the mean over x and $\epsilon$. The loss is the pseudo-Huber loss,

$$\frac{\sqrt{|\Delta|^2 + c^2} - c}{t - s}.$$

Easy Consistency Tuning starts at s = 0, which is regression on x, and moves s to t in stages. In the paper
s = (1 - gap) t relates noise levels of its path, with gap = n(t) / 2^stage; here it relates times, and n = 1.

Source: Consistency Models Made Easy, Geng, Pokle, Luo, Lin, Kolter, 2024, arXiv 2406.14548; pseudo-Huber loss from
Improved Techniques for Training Consistency Models, Song, Dhariwal, 2023, arXiv 2310.14189.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._field import AbstractField, stopped
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .._validate import check_positive
from .base import AbstractIdentityWithLoss
from .facts import Facts

MIN_GAP = 1 / 1024


class ConsistencyTraining(AbstractIdentityWithLoss):
    r"""The residual $X_{t \to 0}(z_t) - \mathrm{sg}(X_{s \to 0}(z_s))$ with s = (1 - gap) t, on rows with r = 0.

    It learns from x and $\epsilon$ directly, so neither guidance nor a given velocity has an effect on it. At r > 0,
    as used when sampling by several steps, u(z, r, t) is trained by boundary rows at most.

    **Arguments:** `gap` in (0, 1], or a schedule of it: `optax.exponential_decay(1.0, d, 0.5, staircase=True,
    end_value=1 / 256)` for stages of d steps; values below 1/1024 count as 1/1024, since s = t would be trivial.
    `offset` c in one dimension, > 0; in n dimensions it is $c \sqrt{n}$; 0.00054 in iCT.
    """

    gap: Schedule = eqx.field(converter=as_schedule("gap", 0.0, 1.0))
    offset: float = eqx.field(default=0.00054, converter=float)

    def __check_init__(self):
        check_positive("offset", self.offset)
        if self.gap == 0:
            raise ValueError("gap must be > 0, got 0.0")

    @property
    def facts(self) -> Facts:
        return Facts(trains_velocity=False, uses_velocity=False, uses_pair=True, ends_at_data=True, exact=False)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        gap = jnp.maximum(at_step(self.gap, row.context), MIN_GAP).astype(row.t.dtype)
        s = row.t * (1 - gap)
        start, zero = row.at(s), jnp.zeros_like(row.t)
        end = start - s * row.evaluate(stopped(field), start, zero, s)
        residual = row.z - row.t * row.evaluate(field, row.z, zero, row.t) - jax.lax.stop_gradient(end)
        c = self.offset * math.sqrt(residual.size)
        huber = jnp.sqrt(jnp.sum(residual**2) + c**2) - c
        return residual, huber / jnp.maximum(row.t - s, jnp.finfo(s.dtype).eps)
