r"""The velocity that a *weighted* regression learns: what the adaptive weight does to Flow Matching, without a network.

A loss $\mathrm{sg}(w(\|u - v_t\|^2))\, \|u - v_t\|^2$ is stationary not at the posterior mean $v = E[v_t \mid z_t]$ but
where

$$E\big[w(\|u - v_t\|^2)\, (u - v_t) \mid z_t = z\big] = 0, \qquad\text{that is}\qquad
u = \frac{E[w\, v_t \mid z]}{E[w \mid z]},$$

an M-estimate of location: with p = 1/2 and c = 0 the geometric median, with p = 1 close to a mode. It is found here by
iterating the right-hand side from the posterior mean, with the exact posterior of a mixture. It differs from v wherever
the posterior of $v_t$ is skewed or has several modes, and no amount of training or capacity removes the difference.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._custom_types import Condition, Time
from .._interpolant import AbstractInterpolant, LinearInterpolant
from .._weight import AbstractWeight
from ._gaussian_mixture import GaussianMixture


class WeightedVelocity(eqx.Module):
    r"""The stationary point $u(z, t)$ of Flow Matching under a weight; `MarginalVelocity` if the weight is constant.

    Its `AverageVelocity` is the flow that a network of unlimited capacity would learn from unlimited data.

    **Arguments:**

    - `mixture`: the distribution of the data.
    - `weight`: such as `AdaptiveWeight(power, offset)`.
    - `interpolant`: the path.
    - `nodes`: points that stand for each component's posterior, exact in mean and covariance.
    - `iterations`: of the fixed point. From the posterior mean the iteration never leaves the basin of that mean; with
      p > 1 there may be other stationary points.

    **Raises:** `ValueError` if `nodes` or `iterations` is too small.
    """

    mixture: GaussianMixture
    weight: AbstractWeight
    interpolant: AbstractInterpolant = LinearInterpolant()
    nodes: int = 16
    iterations: int = 50

    def __check_init__(self):
        if self.mixture.mean.ndim != 2 or self.mixture.mean.shape[1] != 2:
            raise ValueError(f"mixture must be one of points in the plane, got mean of shape {self.mixture.mean.shape}")
        if self.nodes < 3:
            raise ValueError(f"nodes must be >= 3, got {self.nodes}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {self.iterations}")

    def __call__(self, z: Float[Array, " dim"], t: Time, condition: Condition = None) -> Float[Array, " dim"]:
        """u(z, t | condition)."""
        mass, v = self._posterior(z, t, condition)

        def average(u: Float[Array, " dim"], _: None) -> tuple[Float[Array, " dim"], None]:
            error = jnp.sum((u - v) ** 2, axis=1)
            share = mass * jax.vmap(self.weight)(error)
            return share @ v / jnp.sum(share), None

        return jax.lax.scan(average, mass @ v, length=self.iterations)[0]

    def _posterior(
        self, z: Float[Array, " dim"], t: Time, condition: Condition
    ) -> tuple[Float[Array, " point"], Float[Array, "point dim"]]:
        """The distribution of the conditional velocity given z, as points and their masses."""
        velocity, std, mass = self.mixture.posterior(self.interpolant, z, t, condition)
        points = velocity[:, None] + std[:, None, None] * jnp.asarray(_gaussian_nodes(self.nodes), z.dtype)
        return jnp.repeat(mass / self.nodes, self.nodes), points.reshape(-1, z.size)


def _gaussian_nodes(number: int) -> Float[np.ndarray, "number 2"]:
    """Points of equal mass with the mean and covariance of N(0, I) in the plane: rings of its radial quantiles, turned
    by the golden angle."""
    radius = np.sqrt(-2 * np.log1p(-(np.arange(number) + 0.5) / number))
    angle = np.arange(number) * np.pi * (3 - np.sqrt(5))
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    points -= points.mean(axis=0)
    return points @ np.linalg.inv(np.linalg.cholesky(points.T @ points / number)).T
