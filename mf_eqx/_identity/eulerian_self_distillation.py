r"""Eulerian self-distillation: the flow map stays where it ends while its start moves along the velocity.

With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$ and $\hat v = u(z, t, t)$, the equation $\partial_t X + \partial_z X\,
\hat v = 0$ is

$$u + (t - r)\, (\partial_t u + \partial_z u\, \hat v) = \hat v,$$

which is MeanFlow along the network's own velocity, but learns through the derivative $\partial_t u$, too. The term
$\partial_z X\, \hat v$ is behind stop-gradient, as in the authors' experiments with this equation. They found Eulerian
losses unstable on images, and recommend `LagrangianSelfDistillation`, which has the same learnt weight in their code.

Source: How to build a consistency model: Learning flow maps via self-distillation, Boffi, Albergo, Vanden-Eijnden,
2025, arXiv 2505.18825, and the authors' code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._derivative import FusedJVP, Passes
from .._field import AbstractField, stopped
from .._row import Row
from .base import AbstractIdentity
from .facts import Facts
from .lagrangian_self_distillation import SELF_DISTILLATION


class EulerianSelfDistillation(AbstractIdentity):
    r"""The residual $u + (t - r)\, \partial_t u - \mathrm{sg}(\hat v - (t - r)\, \partial_z u\, \hat v)$.

    Needs boundary rows, from which v is learnt; no v on its own rows. Fused attention, whose derivative has no
    gradient, is refused.
    """

    @property
    def facts(self) -> Facts:
        # u of the second JVP is that of the first, which XLA notices.
        return dataclasses.replace(SELF_DISTILLATION, passes=Passes(forward=1, tangent=4))

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        at, jvp, h = (row.z, row.r, row.t, row.condition), FusedJVP(), row.t - row.r
        v = row.evaluate(stopped(field), row.z, row.t, row.t)
        u, along_t = jvp(field, *at, tangent=(jnp.zeros_like(row.z), 0.0, 1.0), key=row.key)
        _, along_v = jvp(stopped(field), *at, tangent=(v, 0.0, 0.0), key=row.key)
        return u + h * along_t - jax.lax.stop_gradient(v - h * along_v)
