r"""Inductive moment matching: the flow maps from t and from a slightly smaller s send samples to the same distribution.

A group of M rows shares r <= s <= t, with s close to t. With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$ and states
z_t, z_s of the same x and $\epsilon$ in each row, its loss is the squared maximum mean discrepancy of

$$y_i = X_{t \to r}(z_t^i) \quad\text{and}\quad \hat y_i = \mathrm{sg}(X_{s \to r}(z_s^i))$$

by the Laplace kernel $k(y, y') = e^{-|y - y'| / (n (t - r))}$ in n dimensions, times the weight

$$w = \frac{\alpha_t^a}{2 (\alpha_t^2 + \sigma_t^2)}\, \frac{-\dot\lambda_t}{1 + e^{\lambda_t - b}}, \qquad
\lambda = \ln (\alpha^2 / \sigma^2).$$

The average velocity makes both distributions equal as s -> t. The paper draws t < 0.994, then r < t, both uniformly.

Source: Inductive Moment Matching, Zhou, Ermon, Song, 2025, arXiv 2503.07565 (Tab. 5).
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar, Time
from .._field import AbstractField, stopped
from .._interpolant import LinearInterpolant
from .._row import Row
from .._times import TimePairs, UniformTimes
from .._validate import as_float, check_finite
from .base import AbstractIdentityWithLoss
from .earlier_times import imm_earlier_time
from .facts import Facts, PAIRS
from .laplace_kernel import squared_discrepancy


class InductiveMomentMatching(AbstractIdentityWithLoss):
    r"""The weighted discrepancy of groups of rows, without guidance; the residual of a row is $y_i - \hat y_i$.

    **Arguments:** `gap` in (0, 1], the difference of the noise levels of t and s in units of the largest level:
    $2^{-12}$ on ImageNet, $2^{-15}$ for CIFAR-10; `particles` M: 4 in the paper; `power` a >= 1: 1, or 2 for more than
    one step; `bias` b: 4 on ImageNet, 5 for CIFAR-10; `earlier_time` the function from t and the gap to s.
    """

    gap: float = eqx.field(default=2**-12, converter=as_float("gap"))
    particles: int = 4
    power: float = eqx.field(default=1.0, converter=as_float("power"))
    bias: float = eqx.field(default=4.0, converter=as_float("bias"))
    earlier_time: Callable[[Time, Scalar], Time] = imm_earlier_time

    def __check_init__(self):
        if self.particles < 2:
            raise ValueError(f"particles must be >= 2, got {self.particles}")
        if not 0 < self.gap <= 1:
            raise ValueError(f"gap must lie in (0, 1], got {self.gap}")
        if not 1 <= self.power < jnp.inf:
            raise ValueError(f"power must be >= 1 and finite, got {self.power}")
        check_finite("bias", self.bias)

    @property
    def facts(self) -> Facts:
        settings = {"identity_share": 1, "time_pairs": TimePairs(UniformTimes())}  # the nearest, with more large t
        return dataclasses.replace(PAIRS, group=self.particles, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "particles *data"], Scalar]:
        def ends(row: Row) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
            s = jnp.maximum(row.r, self.earlier_time(row.t, jnp.asarray(self.gap, row.t.dtype)))
            target = row.at(s) - (s - row.r) * row.evaluate(stopped(field), row.at(s), row.r, s)
            return row.z - (row.t - row.r) * row.evaluate(field, row.z, row.r, row.t), jax.lax.stop_gradient(target)

        y, target = row.map(ends)
        return y - target, self._weight(row) * squared_discrepancy(y, target, (row.t - row.r)[0])

    def _weight(self, row: Row) -> Scalar:
        alpha, sigma, alpha_rate, sigma_rate = (row.path or LinearInterpolant()).rates(row.t[0])
        sigma = jnp.maximum(sigma, jnp.finfo(sigma.dtype).eps)
        # -lambda' / 2 = (alpha sigma' - sigma alpha') / (alpha sigma), whose alpha is divided out: it is 0 at t = 1.
        slope = (alpha * sigma_rate - sigma * alpha_rate) * alpha ** (self.power - 1) / sigma
        return slope * jax.nn.sigmoid(self.bias - 2 * jnp.log(alpha / sigma)) / (alpha**2 + sigma**2)
