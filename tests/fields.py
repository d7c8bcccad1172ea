"""What tests share beside fixtures: fields in closed form, fresh networks made to depend on all their parameters, a
stand-in for a fused attention kernel, and a jit for programs that run once."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mf_eqx import AbstractField, nn


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
        return jax.device_put((0.1 * draws.standard_normal(leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(refill, field)


def filled(make, seed=0):
    """The field that `make()` returns, with every parameter drawn from N(0, 0.1^2): nothing is compiled, as it is when
    a network draws its own."""
    draws = np.random.default_rng(seed)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        # `jnp.asarray` would compile a program for each shape.
        return jax.device_put((0.1 * draws.standard_normal(leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(fill, eqx.filter_eval_shape(make))


def _weights(query, key):
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("qhd,khd->hqk", query.astype(wide), key.astype(wide)) / np.sqrt(query.shape[-1])
    raised = jnp.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(value_factor, gradient_factor, query, key, value):
    return value_factor * jnp.einsum("hqk,khd->qhd", _weights(query, key), value).astype(value.dtype)


def _fused_forward(value_factor, gradient_factor, *inputs):
    return _fused(value_factor, gradient_factor, *inputs), inputs


def _fused_backward(value_factor, gradient_factor, inputs, cotangent):
    query, key, value = inputs
    weights, scale = _weights(query, key), gradient_factor / np.sqrt(query.shape[-1])
    dweights = jnp.einsum("qhd,khd->hqk", cotangent, value)
    dlogits = weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True))
    gradients = (
        scale * jnp.einsum("hqk,khd->qhd", dlogits, key),
        scale * jnp.einsum("hqk,qhd->khd", dlogits, query),
        gradient_factor * jnp.einsum("hqk,qhd->khd", weights, cotangent),
    )
    return tuple(gradient.astype(leaf.dtype) for gradient, leaf in zip(gradients, inputs, strict=True))


_fused.defvjp(_fused_forward, _fused_backward)


class FusedAttention(nn.AbstractAttention):
    """Attention as a fused kernel presents it: forward mode is refused, the backward pass is written by hand.

    It is right if both factors are 1. Another `value_factor` makes its value recognisable, another `gradient_factor`
    its backward pass, which knows nothing of the former.
    """

    value_factor: float = eqx.field(default=1.0, static=True)
    gradient_factor: float = eqx.field(default=1.0, static=True)

    def __call__(self, query, key, value):
        return _fused(self.value_factor, self.gradient_factor, query, key, value)

    def forward_mode(self):
        return nn.StoppedTangent(self)


class Cubic(AbstractField):
    """u = factor (t^2 z + r z^2): its derivatives are known in closed form, and `factor` can be learnt."""

    factor: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.factor * (t**2 * z + r * z**2)

    def slopes(self, z, r, t):
        """The derivatives by z (diagonal), r and t, of factor 1."""
        return t**2 + 2 * r * z, z**2, 2 * t * z


class VelocityAlone(AbstractField):
    """A field of Flow Matching: NaN at r < t, where it was not trained."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.where(r == t, z, jnp.nan)
