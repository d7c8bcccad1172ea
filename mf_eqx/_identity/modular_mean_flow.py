r"""Modular MeanFlow: the MeanFlow identity with a part of the gradient through its derivative.

$$u(z_t, r, t) + (t - r)\, \mathrm{sg}_\lambda\Big[\frac{d}{dt} u(z_t, r, t)\Big] = v_t, \qquad \mathrm{sg}_\lambda[a] =
\lambda\, a + (1 - \lambda)\, \mathrm{sg}(a), \qquad \lambda: 0 \to 1.$$

With $\lambda = 0$ this is MeanFlow; with $\lambda = 1$ the squared error of its equation is minimised as it stands.

With the conditional velocity and $\lambda > 0$ the true average velocity is no stationary point. Its residual is
$\Delta = ((t - r)\, \partial_z u - 1)\, (v_t - v)$, whose mean over the $v_t$ at one z is zero; but the gradient of
du/dt varies with $v_t$, too, so that with $\Sigma$ the covariance of $v_t$ at z the mean gradient of $|\Delta|^2$ is

$$2 \lambda\, (t - r)\, \mathrm{tr}\big((\partial_\theta \partial_z u)^\top ((t - r)\, \partial_z u - 1) \Sigma\big).$$

It draws u towards samples $z - (t - r)\, u$ that depend less on z, and so are blurred. It vanishes with the marginal
velocity (`Objective.velocity`), and `StableTarget` makes it small.

Source: Modular MeanFlow: Towards Stable and Scalable One-Step Generative Modeling, You, Liu, He, 2025, arXiv
2508.17426. The remark on the mean gradient is ours.
"""

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float

from .._derivative import FusedJVP, Passes
from .._field import AbstractField
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .base import AbstractScheduledIdentity
from .facts import Facts


class ModularMeanFlow(AbstractScheduledIdentity):
    r"""The residual $u + (t - r)\, \mathrm{sg}_\lambda[du/dt] - v$.

    It costs a JVP with its gradient, at any $\lambda$. Attention whose derivative has no gradient, such as
    `CudnnAttention`, is refused.

    **Arguments:** `gradient_share` the part $\lambda$ of the gradient that passes through du/dt, in [0, 1], or a
    schedule of it.
    """

    gradient_share: Schedule = eqx.field(default=1.0, converter=as_schedule("gradient_share", 0.0, 1.0))

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        """With a share that rises linearly from 0 to 1 over the first half of the training; the half is ours."""
        return cls(optax.linear_schedule(0.0, 1.0, max(steps // 2, 1)))

    @property
    def facts(self) -> Facts:
        return Facts(learns_through_derivative=True, passes=Passes(tangent=3))

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        v, share = jax.lax.stop_gradient(row.v), at_step(self.gradient_share, row.context).astype(row.z.dtype)
        u, dudt = FusedJVP()(field, row.z, row.r, row.t, row.condition, tangent=(v, 0.0, 1.0), key=row.key)
        return u + (row.t - row.r) * (share * dudt + (1 - share) * jax.lax.stop_gradient(dudt)) - v
