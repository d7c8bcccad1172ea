"""Fields that tests share: two in closed form, and fresh networks made to depend on all their parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mf_eqx import AbstractField


class GaussianField(AbstractField):
    """The average velocity of data N(mean, std^2 I) on the straight path, from its flow map.

    Phi(z) = (1 - r) m + (sigma_r / sigma_t) (z - (1 - t) m) with sigma_t^2 = (1 - t)^2 s^2 + t^2, and
    u = (z - Phi(z)) / (t - r) with the division carried out, so that r = t is allowed.
    """

    mean: jax.Array
    std: float

    def __call__(self, z, r, t, condition=None, *, key=None):
        sigma_r, sigma_t = (jnp.sqrt((1 - time) ** 2 * self.std**2 + time**2) for time in (r, t))
        rate = ((t + r) - (2 - t - r) * self.std**2) / (sigma_r + sigma_t)  # (sigma_t - sigma_r) / (t - r)
        return -self.mean + rate / sigma_t * (z - (1 - t) * self.mean)

    def flow(self, z, r, t):
        """The state at r of the trajectory through (z, t)."""
        sigma_r, sigma_t = (jnp.sqrt((1 - time) ** 2 * self.std**2 + time**2) for time in (r, t))
        return (1 - r) * self.mean + sigma_r / sigma_t * (z - (1 - t) * self.mean)

    def sample(self, *, key):
        return self.mean + self.std * jr.normal(key, self.mean.shape, self.mean.dtype)


class PointMassField(AbstractField):
    """The average velocity of data at one point: u = v = (z - point) / t for t > 0."""

    point: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return (z - self.point) / t

    def sample(self, *, key):
        return self.point


class ScaledField(AbstractField):
    """`factor` times another field: wrong everywhere by the same relative error, (factor - 1)^2."""

    field: AbstractField
    factor: float

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.factor * self.field(z, r, t, condition, key=key)


def refilled(field, seed=0):
    """`field` with every zero-initialised parameter drawn from N(0, 0.1^2).

    A fresh network outputs zero whatever its input, so that a test of its derivatives would prove nothing.
    """
    draws = np.random.default_rng(seed)

    def refill(leaf):
        if not eqx.is_inexact_array(leaf) or np.any(leaf):
            return leaf
        return jnp.asarray(0.1 * draws.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(refill, field)
