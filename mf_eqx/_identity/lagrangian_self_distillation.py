r"""Lagrangian self-distillation: the end of the flow map X moves with the velocity at that end.

With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$, the equation $\partial_r X_{t \to r}(z) = v(X_{t \to r}(z), r)$ is

$$u(z_t, r, t) - (t - r)\, \partial_r u(z_t, r, t) = v(X_{t \to r}(z_t), r),$$

where v is the network's own u(z, r, r). The gradient passes through the whole left side, including the derivative.

The authors' loss has a learnt weight, $e^{-w(r, t)} |\Delta|^2 + w(r, t)$, for this and the boundary term.
`paper_settings`, those for CIFAR-10, leave it out. `AdaptiveWeight` comes nearest, with the error of the row itself in
place of the mean error at (r, t); but with it (p = 0.5) the method learnt nothing on Fashion-MNIST, where it learns
with `ConstantWeight`.

Source: How to build a consistency model: Learning flow maps via self-distillation, Boffi, Albergo, Vanden-Eijnden,
2025, arXiv 2505.18825, and the authors' code; the equation is from Flow map matching, the same authors, 2024, arXiv
2406.07507.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._derivative import FusedJVP, Passes
from .._field import AbstractField, stopped
from .._row import Row
from .._times import TimePairs, UniformTimes
from .._weight import ConstantWeight
from .base import AbstractIdentity
from .facts import Facts

SELF_DISTILLATION = Facts(
    degenerate=True,
    trains_velocity=False,
    uses_velocity=False,
    learns_through_derivative=True,
    passes=Passes(forward=1, tangent=3),  # the velocity at the end, and a JVP with its gradient
    paper_settings={
        "time_pairs": TimePairs(UniformTimes()),
        "boundary_times": UniformTimes(),
        "weight": ConstantWeight(),
    },
)
"""Facts of all methods that learn v from boundary rows, and u through a derivative."""


def lagrangian_sides(
    field: AbstractField, row: Row, *, stop_derivative: bool = False
) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
    r"""The left side of the equation, and the end of the flow map.

    **Returns:** $u - (t - r)\, \partial_r u$, with a gradient through u and, unless `stop_derivative`, its derivative,
    and $X_{t \to r}(z)$ behind stop-gradient.
    """
    along_r = (jnp.zeros_like(row.z), 1.0, 0.0)
    u, slope = FusedJVP()(field, row.z, row.r, row.t, row.condition, tangent=along_r, key=row.key)
    h, slope = row.t - row.r, jax.lax.stop_gradient(slope) if stop_derivative else slope
    return u - h * slope, jax.lax.stop_gradient(row.z - h * u)


class LagrangianSelfDistillation(AbstractIdentity):
    r"""The residual $u - (t - r)\, \partial_r u - \mathrm{sg}(u(X, r, r))$.

    It needs boundary rows, from which v is learnt, and does not use v on its own rows. It costs a JVP with its gradient
    and one more pass: 3 + s (3 T + 1) forward passes of the batch, with s the share of such rows and T the cost of a
    tangent pass. Attention whose derivative has no gradient, such as `CudnnAttention`, is refused.
    """

    @property
    def facts(self) -> Facts:
        return SELF_DISTILLATION

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        left, end = lagrangian_sides(field, row)
        return left - row.evaluate(stopped(field), end, row.r, row.r)
