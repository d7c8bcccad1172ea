r"""Interpolants: paths between data and noise.

An interpolant ("probability path" in other libraries) fixes two functions of time,

$$z_t = \alpha_t x + \sigma_t \epsilon, \qquad v_t = \dot\alpha_t x + \dot\sigma_t \epsilon,$$

with $\alpha_0 = 1, \sigma_0 = 0$ (data) and $\alpha_1 = 0, \sigma_1 = 1$ (noise). A subclass states $\alpha$ and
$\sigma$; the velocity follows by `jax.jvp`, so that path and velocity cannot disagree.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._custom_types import as_scalar, Time, TimeLike


class AbstractInterpolant(eqx.Module):
    r"""A path $z_t = \alpha_t x + \sigma_t \epsilon$ from data (t = 0) to noise (t = 1)."""

    @abc.abstractmethod
    def alpha(self, t: Time) -> Time:
        r"""The coefficient of the data, $\alpha_t$ (the paper's $a_t$): 1 at t = 0, 0 at t = 1."""

    @abc.abstractmethod
    def sigma(self, t: Time) -> Time:
        r"""The coefficient of the noise, $\sigma_t$ (the paper's $b_t$): 0 at t = 0, 1 at t = 1."""

    def rates(self, t: TimeLike) -> tuple[Time, Time, Time, Time]:
        r"""$(\alpha_t, \sigma_t, \dot\alpha_t, \dot\sigma_t)$; the last two by forward-mode differentiation."""
        t = as_scalar("t", t)
        (alpha, sigma), (alpha_rate, sigma_rate) = jax.jvp(
            lambda t: (self.alpha(t), self.sigma(t)), (t,), (jnp.ones_like(t),)
        )
        return alpha, sigma, alpha_rate, sigma_rate

    def state_and_velocity(
        self, x: Float[Array, "*data"], eps: Float[Array, "*data"], t: TimeLike
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        r"""State and conditional velocity of one example.

        $$z_t = \alpha_t x + \sigma_t \epsilon, \qquad v_t = \dot\alpha_t x + \dot\sigma_t \epsilon$$

        **Arguments:** `x` data; `eps` noise of the same shape; `t` time in [0, 1].

        **Returns:** the pair `(z, v)`.
        """
        alpha, sigma, alpha_rate, sigma_rate = self.rates(as_scalar("t", t, x))
        return alpha * x + sigma * eps, alpha_rate * x + sigma_rate * eps


class LinearInterpolant(AbstractInterpolant):
    r"""The straight path $\alpha_t = 1 - t$, $\sigma_t = t$, hence $v_t = \epsilon - x$.

    "Optimal transport path" (Lipman et al. 2023, arXiv 2210.02747) or "rectified flow" (Liu et al. 2023, arXiv
    2209.03003) elsewhere; the default of the MeanFlow paper.
    """

    def alpha(self, t: TimeLike) -> Time:
        return 1 - as_scalar("t", t)

    def sigma(self, t: TimeLike) -> Time:
        return as_scalar("t", t)


class TrigonometricInterpolant(AbstractInterpolant):
    r"""The circular path $\alpha_t = \cos(\pi t / 2)$, $\sigma_t = \sin(\pi t / 2)$.

    Keeps the variance of standardised data (Albergo and Vanden-Eijnden 2023, arXiv 2209.15571; TrigFlow in Lu and Song
    2025, arXiv 2410.11081, where time runs to $\pi/2$).
    """

    def alpha(self, t: TimeLike) -> Time:
        return jnp.cos(jnp.pi / 2 * as_scalar("t", t))

    def sigma(self, t: TimeLike) -> Time:
        return jnp.sin(jnp.pi / 2 * as_scalar("t", t))
