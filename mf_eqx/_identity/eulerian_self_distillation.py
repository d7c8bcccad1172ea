r"""Eulerian self-distillation: the flow map stays where it ends while its start moves along the velocity.

With $X_{t \to r}(z) = z - (t - r)\, u(z, r, t)$ and $\hat v = u(z, t, t)$, the equation $\partial_t X + \partial_z X\,
\hat v = 0$ is

$$u + (t - r)\, (\partial_t u + \partial_z u\, \hat v) = \hat v,$$

which is MeanFlow along the network's own velocity, but learns through the derivative, too.

The authors' experiments with this equation put $\partial_z u\, \hat v$ behind stop-gradient, and they report that
training is unstable. On toy data it is, too, and the stop-gradient is the cause. With $h = t - r$, let the error of u
be a wave $e^{i (\omega t + k z)}$. Its residual is $1 + i h (\omega + k v)$ times the wave, and a gradient step
multiplies this by the adjoint of the terms that receive a gradient. If all do, the wave decays at the rate $1 + h^2
(\omega + k v)^2$. If only $u + h\, \partial_t u$ does, the real part of the rate is $1 + h^2 \omega (\omega + k v)$;
where it is negative, the wave grows. So by default all terms receive a gradient here.

Source: How to build a consistency model: Learning flow maps via self-distillation, Boffi, Albergo, Vanden-Eijnden,
2025, arXiv 2505.18825, and the authors' code. The remark on waves is ours.
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
    r"""The residual $u + (t - r)\, (\partial_t u + \partial_z u\, \mathrm{sg}(\hat v)) - \mathrm{sg}(\hat v)$.

    It needs boundary rows, from which v is learnt, and does not use v on its own rows. Attention whose derivative has
    no gradient, such as `CudnnAttention`, is refused. `ConstantWeight` is the safe weight: see `AdaptiveWeight`.

    **Arguments:** `stop_advection` puts $\partial_z u\, \hat v$ behind stop-gradient, as in the authors' experiments,
    which costs one more tangent pass.
    """

    stop_advection: bool = False

    @property
    def facts(self) -> Facts:
        # With stop_advection, u of the second JVP is that of the first, which XLA notices.
        return dataclasses.replace(SELF_DISTILLATION, passes=Passes(forward=1, tangent=3 + self.stop_advection))

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        at, jvp, h = (row.z, row.r, row.t, row.condition), FusedJVP(), row.t - row.r
        v = row.evaluate(stopped(field), row.z, row.t, row.t)
        direction = jnp.zeros_like(row.z) if self.stop_advection else v
        u, slope = jvp(field, *at, tangent=(direction, 0.0, 1.0), key=row.key)
        if not self.stop_advection:
            return u + h * slope - v
        _, advection = jvp(stopped(field), *at, tangent=(v, 0.0, 0.0), key=row.key)
        return u + h * slope - jax.lax.stop_gradient(v - h * advection)
