r"""$\alpha$-Flow: from trajectory flow matching ($\alpha = 1$) to MeanFlow ($\alpha \to 0$).

With $s = t - \alpha (t - r)$ and $z_s = z_t - (t - s)\, v_t$, which is one Euler step with the given velocity,

$$u(z_t, r, t) = \alpha v_t + (1 - \alpha)\, u(z_s, r, s).$$

The paper's loss weighs the squared residual $S$ of this equation by $\alpha / (S + c)$. The residual here is divided by
$\alpha$: it is the residual of MeanFlow with the finite difference $(u - u(z_s, r, s)) / \alpha$ in place of
$(t - r)\, du/dt$. So its scale, and the effect of any weight on it, are the same at every $\alpha$. The weight
$1 / (S' + c)$, with $S'$ the square of this residual, is the paper's weight with offset $\alpha^2 c$. If the paper's
offset is fixed, these rows contribute less and less as $\alpha$ falls.

Source: AlphaFlow: Understanding and Improving MeanFlow Models, Zhang, Siarohin, Menapace, Vasilkovsky, Tulyakov, Qu,
Skorokhodov, 2025, arXiv 2510.20771.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField, stopped
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .base import AbstractIdentity
from .facts import Facts
from .mean_flow import MeanFlow


class AlphaFlow(AbstractIdentity):
    r"""The residual $u - \mathrm{sg}(v - (1 - \alpha)(u - u(z_s, r, s)) / \alpha)$.

    **Arguments:** `alpha` in [0, 1] or a schedule of it: from 1 to 0 along a sigmoid in the paper. Values below
    `clip` count as 0, where the residual is that of `MeanFlow`, and values above 1 - `clip` as 1, where it is u - v.
    Each step computes only one of the three residuals. `derivative` the engine that computes du/dt for `MeanFlow`.
    """

    alpha: Schedule = eqx.field(converter=as_schedule("alpha", 0.0, 1.0))
    clip: float = 0.005
    derivative: AbstractDerivative = FusedJVP()

    def __check_init__(self):
        if not 0 < self.clip < 0.5:
            raise ValueError(f"clip must lie in (0, 0.5), got {self.clip}")

    @property
    def facts(self) -> Facts:
        return Facts(exact=not callable(self.alpha) and self.alpha < self.clip)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        alpha = at_step(self.alpha, row.context).astype(row.z.dtype)

        def mean_flow() -> Float[Array, "*data"]:
            return MeanFlow(derivative=self.derivative).residual(field, row)

        def finite_difference() -> Float[Array, "*data"]:
            return _finite_difference_residual(field, row, alpha)

        def flow_matching() -> Float[Array, "*data"]:
            return row.evaluate(field, row.z, row.r, row.t) - jax.lax.stop_gradient(row.v)

        branches = [mean_flow, finite_difference, flow_matching]
        if not callable(self.alpha):
            return branches[(self.alpha >= self.clip) + (self.alpha > 1 - self.clip)]()
        return jax.lax.switch((alpha >= self.clip).astype(int) + (alpha > 1 - self.clip).astype(int), branches)


def _finite_difference_residual(field: AbstractField, row: Row, alpha: Scalar) -> Float[Array, "*data"]:
    u = row.evaluate(field, row.z, row.r, row.t)
    s = row.t - alpha * (row.t - row.r)
    earlier = row.evaluate(stopped(field), row.z - (row.t - s) * row.v, row.r, s)
    return u - jax.lax.stop_gradient(row.v - (1 - alpha) * (u - earlier) / alpha)
