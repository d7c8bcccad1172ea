r"""Improved MeanFlow, without an extra head: the MeanFlow identity along the *predicted* velocity.

$$u(z_t, r, t) = v_t - (t - r)\, \frac{d}{dt} u(z_t, r, t) \quad\text{along}\quad \dot z = u(z_t, t, t)$$

The conditional velocity is a noisy tangent; u(z, t, t) is the network's own estimate of the marginal one. The
regression target keeps the conditional (or guided) v_t, so the minimiser is the same average velocity, reached with
less variance.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012.
"""

import jax
from jaxtyping import Array, Float

from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField, stopped
from .._row import Row
from .base import AbstractIdentity
from .facts import Facts


class ImprovedMeanFlow(AbstractIdentity):
    r"""The improved MeanFlow identity: $u - \mathrm{sg}(v - (t - r)\, du/dt)$ with tangent (u(z, t, t), 0, 1).

    It costs one forward pass more than `MeanFlow` on its rows. It needs boundary rows, because otherwise u(z, t, t) is
    never trained.

    **Arguments:** `derivative` the engine that computes du/dt.
    """

    derivative: AbstractDerivative = FusedJVP()

    @property
    def facts(self) -> Facts:
        return Facts(degenerate=True, trains_velocity=False)

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        tangent = (row.evaluate(stopped(field), row.z, row.t, row.t), 0.0, 1.0)
        u, dudt = self.derivative(field, row.z, row.r, row.t, row.condition, tangent=tangent, key=row.key)
        return u - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt)
