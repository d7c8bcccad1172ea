r"""Consistency training: the flow map sends two points of one path to the same end.

With $X_{t \to 0}(z) = z - t\, u(z, 0, t)$, for z_t and z_s of the same x and $\epsilon$, s < t,

$$X_{t \to 0}(z_t) = X_{s \to 0}(z_s), \qquad X_{0 \to 0}(x) = x,$$

which the average velocity satisfies as s -> t, in the mean over x and $\epsilon$. The loss is the pseudo-Huber one,
$(\sqrt{|\Delta|^2 + c^2} - c) / (\tau_t - \tau_s)$, with noise levels $\tau = t / (1 - t)$ of at most 80.

Easy Consistency Tuning (ECT) starts at s = 0 for most t, regression on x, and halves the gap by stages; its code has c
= 0 and the weight 4 + ((1 - t) / t)^2 (for ImageNet c = 0.06 in all, quarters of the gap, and times of (-0.8, 1.6)).
Improved Consistency Training (iCT) has a grid of times that becomes finer.

Source: Consistency Models Made Easy, Geng, Pokle, Luo, Lin, Kolter, 2024, arXiv 2406.14548, and the authors' code;
Improved Techniques for Training Consistency Models, Song, Dhariwal, 2023, arXiv 2310.14189.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._custom_types import Scalar, Time
from .._field import AbstractField, stopped
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .._times import LogitNormalTimes, TimePairs
from .._validate import as_float, check_positive
from .base import AbstractIdentityWithLoss, AbstractScheduledIdentity
from .earlier_times import ect_earlier_time, ict_earlier_time, noise_level
from .facts import Facts, PAIRS

_LEAST_GAP, _TIMES = 1 / 2048, LogitNormalTimes(-1.1, 2.0)


class ConsistencyTraining(AbstractIdentityWithLoss, AbstractScheduledIdentity):
    r"""The residual $X_{t \to 0}(z_t) - \mathrm{sg}(X_{s \to 0}(z_s))$ on rows with r = 0.

    It learns from x and $\epsilon$: guidance, velocity and `stable_target` are refused. Sample by `sample_consistency`.

    **Arguments:** `gap` in (0, 1], or a schedule; smaller gaps count as 1/2048, since s = t teaches nothing;
    `offset` c > 0 for one dimension ($c \sqrt{n}$ for n of them): 0.00054 in iCT; `earlier_time`, from t and gap to s.
    """

    gap: Schedule = eqx.field(converter=as_schedule("gap", 0.0, 1.0))
    offset: float = eqx.field(default=0.00054, converter=as_float("offset"))
    earlier_time: Callable[[Time, Scalar], Time] = ect_earlier_time

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        """ECT's gaps: 1/2, 1/4, ..., 1/256."""
        return cls(optax.exponential_decay(0.5, max(steps // 8, 1), 0.5, staircase=True, end_value=1 / 256))

    @classmethod
    def improved(cls, steps: int) -> AbstractScheduledIdentity:
        """iCT's grids of times: 10, 20, ..., 1280 steps."""
        gap = optax.exponential_decay(1 / 10, max(steps // 8, 1), 0.5, staircase=True, end_value=1 / 1280)
        return cls(gap, earlier_time=ict_earlier_time)

    def __check_init__(self):
        check_positive("offset", self.offset)
        if self.gap == 0:
            raise ValueError("gap must be > 0, got 0.0")

    @property
    def facts(self) -> Facts:
        settings = {"identity_share": 1, "time_pairs": TimePairs(_TIMES, _TIMES)}
        return dataclasses.replace(PAIRS, trains_velocity=False, ends_at_data=True, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        gap = jnp.maximum(at_step(self.gap, row.context), _LEAST_GAP).astype(row.t.dtype)
        s, zero = self.earlier_time(row.t, gap), jnp.zeros_like(row.t)
        end = row.at(s) - s * row.evaluate(stopped(field), row.at(s), zero, s)
        residual = row.z - row.t * row.evaluate(field, row.z, zero, row.t) - jax.lax.stop_gradient(end)
        c, step = self.offset * residual.size**0.5, noise_level(row.t) - noise_level(s)
        return residual, (jnp.sqrt(jnp.sum(residual**2) + c**2) - c) / jnp.maximum(step, jnp.finfo(s.dtype).eps)
