r"""Flow-anchored consistency models (FACM): continuous consistency on rows with r = 0, anchored by Flow Matching.

$$g = u(z_t, 0, t) - \left(v_t - t\, \frac{d}{dt} u(z_t, 0, t)\right), \qquad
\text{target} = \mathrm{sg}\left(u - \alpha(t)\, \mathrm{clip}(g, -1, 1)\right), \qquad \alpha(t) = 1 - (1 - t)^p.$$

Clipping and $\alpha$ only move the target closer to u. The solution is still g = 0, that of MeanFlow at r = 0. With e
the mean squared error to the target over dimensions, the loss is $\sin(\pi t / 2)\, e / \sqrt{\mathrm{sg}(e) + 0.001}$.

The boundary rows of the objective are the anchor. The paper adds both losses on the same rows. Its anchor loss has one
more term, one minus the cosine similarity of u(z, t, t) and v. Its network has no r, and sees the time -t on anchor
rows (the "expanded interval"). Times are $t = \frac{2}{\pi} \arctan e^n$ with n normal, mean -0.8 and deviation 1.6;
`paper_settings` has the nearest logit-normal times. The authors distil by default: v_t is then that of a frozen field,
guided by 1.75 for $t \le 0.875$.

Source: FACM: Flow-Anchored Consistency Models, Peng, Zhu, Liu, Wu, Li, Sun, Wu, 2025, arXiv 2507.03738, and the
authors' code.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField
from .._row import Row
from .._times import LogitNormalTimes, TimePairs
from .._validate import as_float, check_positive
from .._weight import ConstantWeight
from .base import AbstractIdentityWithLoss
from .facts import Facts
from .unit_step import root_loss

_OFFSET = 1e-3
_TIMES = LogitNormalTimes(-0.93, 1.85)


class FlowAnchoredConsistency(AbstractIdentityWithLoss):
    r"""The residual g, on rows with r = 0, with FACM's loss.

    u(z, r, t) for 0 < r < t is not learnt: sample with one evaluation, or with several by `sample_consistency`.

    **Arguments:** `power` p of $\alpha$, > 0: 0.5 in the authors' code; `derivative` the engine that computes du/dt.
    """

    power: float = eqx.field(default=0.5, converter=as_float("power"))
    derivative: AbstractDerivative = FusedJVP()

    def __check_init__(self):
        check_positive("power", self.power)

    @property
    def facts(self) -> Facts:
        settings = {"identity_share": 0.5, "time_pairs": TimePairs(_TIMES, _TIMES), "weight": ConstantWeight(mean=True)}
        passes = self.derivative.passes
        return Facts(trains_velocity=False, ends_at_data=True, passes=passes, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        at = (row.z, row.r, row.t, row.condition)
        u, dudt = self.derivative(field, *at, tangent=(row.v, 0.0, 1.0), key=row.key)
        residual = u - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt)
        way = (1 - (1 - row.t) ** self.power) * jnp.clip(residual, -1, 1)
        return residual, jnp.sin(jnp.pi / 2 * row.t) * root_loss(u, way, _OFFSET)
