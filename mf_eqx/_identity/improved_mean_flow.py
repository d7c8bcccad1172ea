r"""Improved MeanFlow: the MeanFlow identity along the *predicted* velocity.

$$u(z_t, r, t) = v_t - (t - r)\, \frac{d}{dt} u(z_t, r, t) \quad\text{along}\quad
\dot z = \beta v_t + (1 - \beta)\, \hat v(z_t, t), \qquad \beta = 0$$

The conditional velocity is a noisy tangent; $\hat v$ is the network's own estimate of the marginal one: that of its
velocity head, or u(z, t, t) of a network without one. The head learns beside u, $\hat v(z_t, t) = v_t$. The regression
target keeps the conditional (or guided) v_t, so the minimiser is the same average velocity, reached with
less variance. Between this and MeanFlow ($\beta = 1$) lie mixed tangents.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012. Mixed tangents: On Variance Reduction in Learning Mean Flows, Lu, Wang, 2026, arXiv 2605.09235,
which calls $1 - \beta$ beta, and takes u(z, t, t) from an averaged copy.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField, has_velocity_head, WithVelocity
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .base import AbstractIdentityWithVelocity
from .facts import and_forward, Facts


class ImprovedMeanFlow(AbstractIdentityWithVelocity):
    r"""The improved MeanFlow identity: $u - \mathrm{sg}(v - (t - r)\, du/dt)$ with tangent
    $(\beta v + (1 - \beta)\, u(z, t, t), 0, 1)$.

    If the field has a velocity head, the head's v(z, t) takes the place of u(z, t, t), and it is trained in the same
    pass as u. This is the paper's method, with `DrawnGuidance` as the objective's guidance.

    It costs one forward pass more than `MeanFlow` on its rows, for v(z, t); guidance takes its conditional value from
    the same pass. It needs boundary rows, on which alone u(z, t, t) is trained: an identity share of 1 is refused for
    every network.

    **Arguments:** `conditional` the part $\beta$ of the given velocity in the tangent, in [0, 1), or a schedule of it;
    0 in the paper. `derivative` the engine that computes du/dt.
    """

    conditional: Schedule = eqx.field(default=0.0, converter=as_schedule("conditional", 0.0, 1.0))
    derivative: AbstractDerivative = FusedJVP()

    def __check_init__(self):
        if self.conditional == 1:
            raise ValueError("conditional must be below 1, which is MeanFlow; got 1.0")

    @property
    def facts(self) -> Facts:
        passes, settings = and_forward(self.derivative.passes, 1), {"identity_share": 0.5}
        return Facts(degenerate=True, trains_velocity=False, passes=passes, paper_settings=settings)

    def residual_and_values(
        self, field: AbstractField, row: Row
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"], Float[Array, "*data"] | None]:
        predicted = row.own_velocity(field)
        along = predicted + at_step(self.conditional, row.context).astype(predicted.dtype) * (row.v - predicted)
        inputs, how = (row.z, row.r, row.t, row.condition), {"tangent": (along, 0.0, 1.0), "key": row.key}
        if has_velocity_head(field):
            (u, v), (dudt, _) = self.derivative(WithVelocity(field), *inputs, **how)
        else:
            (u, dudt), v = self.derivative(field, *inputs, **how), None
        return u - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt), u, v
