r"""Continuous-time consistency models (sCM): the end of the flow map stays while its start moves along the velocity.

With $X_{t \to 0}(z) = z - t\, u(z, 0, t)$, the derivative of the end along the path, $dX/dt = v - u - t\, du/dt$, is
zero. u is moved along

$$\frac{g}{|g| + c}, \qquad g = \frac{\alpha_t}{\sqrt{\alpha_t^2 + \sigma_t^2}}
\left(v_t - u - \rho\, t\, \frac{d}{dt} u(z_t, 0, t)\right), \qquad \rho: 0 \to 1 \text{ (tangent warm-up)}.$$

The paper has the circular path, where the first factor is its cos(t), and a network F with $X = \cos(t)\, z - \sin(t)\,
F$; here u is the average velocity on any path. So at $\rho = 0$ its X is the expected x, and here $z - t v$, another
value on the circular path; at $\rho = 1$ both directions of g are the same. Lengths of g differ by a factor of at most
3 (beside c), since the paper scales data by 0.5. The paper's learnt weight of t is left out: since g is normalised, the
best weight hardly depends on t. |g| is the root of the mean square over dimensions, as in NVIDIA's FastGen; the paper
writes a norm. The warm-up takes 10,000 steps there, of 100,000 to 400,000 on ImageNet.

Consistency training (sCT) takes the conditional velocity. Distillation (sCD) takes that of a frozen Flow Matching
field: `Objective.velocity`. `paper_settings` has the times for ImageNet 64 x 64 (Tab. 4), with the paper's noise level
$0.5 \tan t$ as our t / (1 - t); for CIFAR-10 their deviation is 1.4, for ImageNet 512 x 512 their mean -0.8.

Source: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, Lu, Song, 2024, arXiv 2410.11081.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField
from .._interpolant import LinearInterpolant
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .._times import LogitNormalTimes, TimePairs
from .._validate import as_float, check_positive
from .base import AbstractIdentityWithLoss, AbstractScheduledIdentity
from .facts import Facts
from .unit_step import unit_step_loss

_TIMES = LogitNormalTimes(-1.0, 1.6)


class ContinuousConsistency(AbstractIdentityWithLoss, AbstractScheduledIdentity):
    r"""The residual $u - \mathrm{sg}(v - \rho\, t\, du/dt)$ on rows with r = 0, with sCM's loss.

    u(z, r, t) for 0 < r < t is not learnt: sample with one evaluation, or with several by `sample_consistency`.

    **Arguments:** `warm_up` the part $\rho$ of the derivative, in [0, 1], or a schedule of it; `offset` c, > 0: 0.1 in
    the paper; `derivative` the engine that computes du/dt.
    """

    warm_up: Schedule = eqx.field(default=1.0, converter=as_schedule("warm_up", 0.0, 1.0))
    offset: float = eqx.field(default=0.1, converter=as_float("offset"))
    derivative: AbstractDerivative = FusedJVP()

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        """With a warm-up over the first tenth of the training."""
        return cls(optax.linear_schedule(0.0, 1.0, max(steps // 10, 1)))

    def __check_init__(self):
        check_positive("offset", self.offset)

    @property
    def facts(self) -> Facts:
        settings = {"identity_share": 1, "time_pairs": TimePairs(_TIMES, _TIMES)}
        exact, passes = self.warm_up == 1, self.derivative.passes
        return Facts(trains_velocity=False, ends_at_data=True, exact=exact, passes=passes, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        at, rho = (row.z, row.r, row.t, row.condition), at_step(self.warm_up, row.context).astype(row.z.dtype)
        u, dudt = self.derivative(field, *at, tangent=(row.v, 0.0, 1.0), key=row.key)
        residual = u - jax.lax.stop_gradient(row.v - rho * (row.t - row.r) * dudt)
        alpha, sigma, *_ = (row.path or LinearInterpolant()).rates(row.t)
        factor = alpha / jnp.hypot(alpha, sigma)
        return residual, unit_step_loss(residual, self.offset, factor=factor, root_mean_square=True)
