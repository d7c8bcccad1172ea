r"""The velocity that a *weighted* regression learns: the effect of the adaptive weight on Flow Matching, without a
network.

A loss $\mathrm{sg}(w(\|u - v_t\|^2))\, \|u - v_t\|^2$ is stationary not at the posterior mean $v = E[v_t \mid z_t]$ but
where

$$E\big[w(\|u - v_t\|^2)\, (u - v_t) \mid z_t = z\big] = 0, \qquad\text{that is}\qquad
u = \frac{E[w\, v_t \mid z]}{E[w \mid z]},$$

an M-estimate of location: with p = 1/2 and c = 0 the geometric median, with p = 1 close to a mode. It is computed by
fixed-point iteration of the right-hand side, starting from the posterior mean. It differs from v wherever the posterior
of $v_t$ is skewed or has several modes, and no amount of training or capacity removes the difference.

This applies to Flow Matching, so to the rows with r = t of any objective. In rows with r < t MeanFlow's residual has
another noise, $(I - (t - r)\, \partial_z u)(v_t - v)$, because the tangent of the JVP is conditional, too. At the true
u this matrix is the Jacobian of the flow map. It is small where trajectories converge, and there the bias is small,
too.

Both expectations are over a mixture. The weight is itself a mixture of exponentials,

$$(e + c)^{-p} = \frac{1}{\Gamma(p)} \int_0^\infty s^p e^{-s c} e^{-s e} \, d\log s,$$

and under a component $N(\mu, \tau^2 I)$ in d dimensions, with $g = 1 + 2 s \tau^2$,

$$E\big[e^{-s \|u - v\|^2}\big] = g^{-d/2} e^{-s \|u - \mu\|^2 / g}, \qquad
E\big[v\, e^{-s \|u - v\|^2}\big] = E\big[e^{-s \|u - v\|^2}\big]\, \frac{\mu + 2 s \tau^2 u}{g}.$$

This leaves one smooth integral over $\log s$, which is computed by the trapezoidal rule.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._custom_types import Condition, TimeLike
from .._interpolant import AbstractInterpolant, LinearInterpolant
from .._weight import AdaptiveWeight
from ._gaussian_mixture import GaussianMixture


class WeightedVelocity(eqx.Module):
    r"""A stationary point $u(z, t)$ of Flow Matching under an adaptive weight. At power 0 it is `MarginalVelocity`.

    Its `AverageVelocity` is that of the flow that Flow Matching would learn with unlimited capacity and data.

    Intended for squared errors up to a thousand times max(c, 1), where the sum of exponentials equals the weight within
    0.1%.

    **Arguments:**

    - `mixture`: the distribution of the data, which must be vectors.
    - `weight`: `AdaptiveWeight(power, offset)`.
    - `interpolant`: the path.
    - `nodes`: number of nodes of the integral over $\log s$.
    - `iterations`: number of fixed-point iterations, starting from the posterior mean. Between two modes and with a
      small c the convergence is slow: compare with twice as many. With p > 1/2 there may be several stationary points.

    **Raises:** `ValueError` if the mixture's data are not vectors, if the power is neither 0 nor in [0.2, 2], or if
    `nodes` or `iterations` is too small.
    """

    mixture: GaussianMixture
    weight: AdaptiveWeight
    interpolant: AbstractInterpolant = LinearInterpolant()
    nodes: int = 48
    iterations: int = 60

    def __check_init__(self):
        if self.mixture.mean.ndim != 2:
            shape = self.mixture.mean.shape
            raise ValueError(f"mixture must be of vectors, with a mean of shape (component, dim), got {shape}")
        if not (self.weight.power == 0 or 0.2 <= self.weight.power <= 2):
            raise ValueError(f"weight.power must be 0 or lie in [0.2, 2], got {self.weight.power}")
        if self.nodes < 2:
            raise ValueError(f"nodes must be >= 2, got {self.nodes}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {self.iterations}")

    def __call__(self, z: Float[Array, " dim"], t: TimeLike, condition: Condition = None) -> Float[Array, " dim"]:
        """u(z, t | condition)."""
        mean, std, mass = self.mixture.posterior(self.interpolant, z, t, condition)
        start = _sum(mass, mean)
        if self.weight.power == 0:
            return start
        s, factor = (jnp.asarray(values, z.dtype) for values in self._exponentials())
        variance = 2 * s[:, None] * std**2
        growth = 1 + variance
        scale = factor[:, None] * mass * growth ** (-z.size / 2)

        def average(u: Float[Array, " dim"], _: None) -> tuple[Float[Array, " dim"], None]:
            distance = jnp.sum((u - mean) ** 2, axis=1)
            share = scale * jnp.exp(-s[:, None] * distance / growth)
            factor_of_u = jnp.sum(share * variance / growth)
            return (_sum(jnp.sum(share / growth, axis=0), mean) + factor_of_u * u) / jnp.sum(share), None

        return jax.lax.scan(average, start, length=self.iterations)[0]

    def _exponentials(self) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
        """Exponents s and factors of the exponentials whose sum is the weight, up to a constant factor."""
        power, offset = self.weight.power, self.weight.offset
        # The parts of the integral outside of these limits are about 1e-4 (below, at the largest supported error) and
        # e^{-30} (above).
        largest = 1000 * max(offset, 1)
        s = np.geomspace(1e-4 ** (1 / power) / largest, 30 / offset, self.nodes)
        return s, s**power * np.exp(-s * offset)


def _sum(factor: Float[Array, " component"], terms: Float[Array, "component dim"]) -> Float[Array, " dim"]:
    return jnp.tensordot(factor, terms, 1, precision="highest")  # accelerators round the factors by default
