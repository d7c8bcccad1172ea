r"""Inductive moment matching: the flow maps from t and from a slightly smaller s send samples to the same distribution.

A group of M rows shares r <= s <= t, s = max(r, t - gap). With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$ and states
z_t, z_s of the same x and $\epsilon$ in each row, its loss is the squared maximum mean discrepancy (MMD) of

$$y_i = X_{t \to r}(z_t^i) \quad\text{and}\quad \hat y_i = \mathrm{sg}(X_{s \to r}(z_s^i)), \qquad
k(y, y') = e^{-|y - y'| / (n (t - r))},$$

the Laplace kernel in n dimensions. With the average velocity, both distributions become equal as s -> t.

The paper decreases the noise-to-data ratio by a constant; here time is decreased instead. The paper also weighs by a
function of t.

Source: Inductive Moment Matching, Zhou, Ermon, Song, 2025, arXiv 2503.07565.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._field import AbstractField, stopped
from .._row import Row
from .._schedule import as_schedule, at_step, Schedule
from .base import AbstractIdentityWithLoss
from .consistency_training import MIN_GAP
from .facts import Facts


class InductiveMomentMatching(AbstractIdentityWithLoss):
    r"""The MMD of groups of rows; the residual of a row is $y_i - \hat y_i$.

    It learns from x and $\epsilon$ directly, so neither guidance nor a given velocity has an effect on it.

    **Arguments:** `gap` of time in (0, 1], or a schedule of it; values below 1/1024 count as 1/1024. `particles` M, 4
    in the paper.
    """

    gap: Schedule = eqx.field(default=1 / 64, converter=as_schedule("gap", 0.0, 1.0))
    particles: int = 4

    def __check_init__(self):
        if self.particles < 2:
            raise ValueError(f"particles must be >= 2, got {self.particles}")
        if self.gap == 0:
            raise ValueError("gap must be > 0, got 0.0")

    @property
    def facts(self) -> Facts:
        return Facts(uses_velocity=False, uses_pair=True, group=self.particles, exact=False)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "particles *data"], Scalar]:
        gap = jnp.maximum(at_step(self.gap, row.context), MIN_GAP).astype(row.t.dtype)

        def ends(row: Row) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
            s = jnp.maximum(row.r, row.t - gap)
            later, earlier = row.z, row.at(s)
            target = earlier - (s - row.r) * row.evaluate(stopped(field), earlier, row.r, s)
            return later - (row.t - row.r) * row.evaluate(field, later, row.r, row.t), jax.lax.stop_gradient(target)

        y, target = row.map(ends)
        scale = y[0].size * jnp.maximum((row.t - row.r)[0], jnp.finfo(y.dtype).eps)
        kernels = _mean_kernel(y, y, scale) + _mean_kernel(target, target, scale) - 2 * _mean_kernel(y, target, scale)
        return y - target, kernels


def _mean_kernel(y: Float[Array, "particles *data"], other: Float[Array, "particles *data"], scale: Scalar) -> Scalar:
    """The mean of the Laplace kernel over all pairs."""
    squares = jnp.sum((y[:, None] - other[None]) ** 2, axis=tuple(range(2, y.ndim + 1)))
    distances = jnp.sqrt(jnp.maximum(squares, jnp.finfo(y.dtype).eps ** 2))  # the slope of sqrt at 0 is infinite
    return jnp.mean(jnp.exp(-distances / scale))
