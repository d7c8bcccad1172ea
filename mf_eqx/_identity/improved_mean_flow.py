r"""Improved MeanFlow, without an extra head: the MeanFlow identity along the *predicted* velocity.

$$u(z_t, r, t) = v_t - (t - r)\, \frac{d}{dt} u(z_t, r, t) \quad\text{along}\quad \dot z = u(z_t, t, t)$$

The conditional velocity is a noisy tangent; u(z, t, t) is the network's own estimate of the marginal one. The
regression target keeps the conditional (or guided) v_t, so the minimiser is the same average velocity, reached with
less variance.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012.
"""

from typing import ClassVar

import jax
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField, stopped
from .base import AbstractIdentity, Context


class ImprovedMeanFlow(AbstractIdentity):
    r"""The improved MeanFlow identity: $u - \mathrm{sg}(v - (t - r)\, du/dt)$ with tangent (u(z, t, t), 0, 1).

    One forward pass more than `MeanFlow` on its rows. Needs boundary rows, or u(z, t, t) is never trained.

    **Arguments:** `derivative` the engine that computes du/dt.
    """

    derivative: AbstractDerivative = FusedJVP()

    needs_boundary: ClassVar[bool] = True
    uses_velocity: ClassVar[bool] = True

    def residual(
        self,
        field: AbstractField,
        z: Float[Array, "*data"],
        v: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition,
        *,
        key: Key[Array, ""] | None,
        context: Context | None = None,
    ) -> Float[Array, "*data"]:
        r, t = as_times(r, t, z)
        predicted = stopped(field)(z, t, t, condition, key=key)
        u, dudt = self.derivative(field, z, r, t, condition, tangent=(predicted, 0.0, 1.0), key=key)
        return u - jax.lax.stop_gradient(v - (t - r) * dudt)
