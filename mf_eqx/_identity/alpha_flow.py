r"""$\alpha$-Flow: from trajectory flow matching ($\alpha = 1$) to MeanFlow ($\alpha \to 0$).

With $s = t - \alpha (t - r)$ and $z_s = z_t - (t - s)\, v_t$, which is one Euler step with the given velocity,

$$u(z_t, r, t) = \alpha v_t + (1 - \alpha)\, u(z_s, r, s).$$

Here the residual is divided by $\alpha$: it is then MeanFlow's with $(1 - \alpha) (u - u(z_s, r, s)) / \alpha$ in place
of $(t - r)\, du/dt$ (in bfloat16 mostly rounding at a small $\alpha$: compute in float32). With S the mean square of
the undivided residual, the weight $1 / (S / \alpha^2 + c)$ gives the gradient of $\alpha S / (S + \alpha^2 c)$, which
the paper derives (Section G.2); it then has c for $\alpha^2 c$, so that the gradient vanishes as $\alpha \to 0$.
`paper_settings` are those of B/2 with guidance (Tab. 3). Without it, and for XL/2, half of the rows carry the identity;
for XL/2 $\alpha$ falls from 1/2 to 5/6 of the training, and the authors clip targets with $\alpha > 0$ to [-4, 4].

Source: AlphaFlow: Understanding and Improving MeanFlow Models, Zhang, Siarohin, Menapace, Vasilkovsky, Tulyakov, Qu,
Skorokhodov, 2025, arXiv 2510.20771, and the authors' code.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._derivative import AbstractDerivative, FusedJVP, Passes
from .._field import AbstractField, stopped
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule, SigmoidSchedule
from .._times import LogitNormalTimes
from .._validate import as_float
from .._weight import AdaptiveWeight
from .base import AbstractScheduledIdentity
from .facts import Facts
from .mean_flow import MeanFlow


class AlphaFlow(AbstractScheduledIdentity):
    r"""The residual $u - \mathrm{sg}(v - (1 - \alpha)(u - u(z_s, r, s)) / \alpha)$.

    **Arguments:** `alpha` in [0, 1] or a schedule of it: from 1 to 0 along a sigmoid in the paper. Values below
    `clip` count as 0, where the residual is that of `MeanFlow`, and values above 1 - `clip` as 1, where it is u - v.
    Each step computes one of the three residuals. `derivative` the engine that computes du/dt for `MeanFlow`.
    """

    alpha: Schedule = eqx.field(converter=as_schedule("alpha", 0.0, 1.0))
    clip: float = eqx.field(default=0.005, converter=as_float("clip"))
    derivative: AbstractDerivative = FusedJVP()

    @classmethod
    def for_training(cls, steps: int) -> AbstractScheduledIdentity:
        return cls(SigmoidSchedule(0, max(steps, 1)))

    def __check_init__(self):
        if not 0 < self.clip < 0.5:
            raise ValueError(f"clip must lie in (0, 0.5), got {self.clip}")

    @property
    def facts(self) -> Facts:
        weight = AdaptiveWeight(offset=1e-3, mean=True)
        settings = {"identity_share": 0.75, "boundary_times": LogitNormalTimes(), "weight": weight}
        if callable(self.alpha):
            return Facts(exact=False, paper_settings=settings)
        branch = (self.alpha >= self.clip) + (self.alpha > 1 - self.clip)
        passes = [self.derivative.passes, Passes(forward=1), Passes()][branch]
        return Facts(exact=branch == 0, passes=passes, paper_settings=settings)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        alpha = at_step(self.alpha, row.context).astype(row.z.dtype)
        branches = [
            lambda: MeanFlow(derivative=self.derivative).residual(field, row),
            lambda: difference_residual(field, row, alpha),
            lambda: row.evaluate(field, row.z, row.r, row.t) - jax.lax.stop_gradient(row.v),
        ]
        if not callable(self.alpha):
            return branches[(self.alpha >= self.clip) + (self.alpha > 1 - self.clip)]()
        return jax.lax.switch((alpha >= self.clip).astype(int) + (alpha > 1 - self.clip).astype(int), branches)


def difference_residual(field: AbstractField, row: Row, alpha: Float[Array, ""]) -> Float[Array, "*data"]:
    """The residual for alpha in (0, 1]."""
    u, s = row.evaluate(field, row.z, row.r, row.t), row.t - alpha * (row.t - row.r)
    earlier = row.evaluate(stopped(field), row.z - (row.t - s) * row.v, row.r, s)
    return u - jax.lax.stop_gradient(row.v - (1 - alpha) * (u - earlier) / alpha)
