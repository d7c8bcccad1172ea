r"""MeanFlow: the identity obtained by differentiating (t - r) u with respect to t.

$$u(z_t, r, t) = v(z_t, t) - (t - r)\, \frac{d}{dt} u(z_t, r, t) \qquad (6)$$

Source: Mean Flows for One-step Generative Modeling, Geng, Deng, Bai, Kolter, He, 2025, arXiv 2505.13447.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField
from .._row import Row
from .._validate import as_float, check_finite
from .base import AbstractIdentity
from .facts import Facts


class MeanFlow(AbstractIdentity):
    r"""The MeanFlow identity (Eq. 6, target of Eq. 11): $u - \mathrm{sg}(v - (t - r)\, du/dt)$.

    The derivative is taken along the *given* velocity, conditional in training, with tangent (v, 0, 1).

    **Arguments:** `tangent_r`, `tangent_t` the other two parts of the tangent on (z, r, t). Only (0, 1) is right; Tab.
    1b shows this by runs with (0, 0), (1, 0) and (1, 1). `derivative` the engine that computes du/dt.
    """

    tangent_r: float = eqx.field(default=0.0, converter=as_float("tangent_r"))
    tangent_t: float = eqx.field(default=1.0, converter=as_float("tangent_t"))
    derivative: AbstractDerivative = FusedJVP()

    def __check_init__(self):
        check_finite("tangent_r", self.tangent_r)
        check_finite("tangent_t", self.tangent_t)

    @property
    def facts(self) -> Facts:
        return Facts(exact=(self.tangent_r, self.tangent_t) == (0, 1), passes=self.derivative.passes, paper_settings={})

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        tangent = (row.v, self.tangent_r, self.tangent_t)
        u, dudt = self.derivative(field, row.z, row.r, row.t, row.condition, tangent=tangent, key=row.key)
        return u - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt)
