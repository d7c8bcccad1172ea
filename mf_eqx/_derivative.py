r"""The total derivative du/dt along a trajectory (Eq. 8), and the engines that compute it.

$$\frac{d}{dt} u(z_t, r, t) = v \cdot \partial_z u + \partial_t u,$$

a Jacobian-vector product of u at (z, r, t) with tangent (v, 0, 1). An engine is an object handed to an identity; it
decides how the product is taken, the identity decides what for.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ._custom_types import Condition, Time
from ._field import AbstractField


class AbstractDerivative(eqx.Module):
    """A way to compute a field together with its directional derivative."""

    @abc.abstractmethod
    def __call__(
        self,
        field: AbstractField,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        """The pair `(u, dudt)` at `(z, r, t)` in direction `tangent` = (dz, dr, dt)."""


class FusedJVP(AbstractDerivative):
    """One `eqx.filter_jvp`: its primal output is the loss's own forward pass, so u is never computed twice."""

    def __call__(
        self,
        field: AbstractField,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        dz, dr, dt = tangent
        u, dudt = eqx.filter_jvp(
            lambda z, r, t: field(z, r, t, condition, key=key),
            (z, r, t),
            (dz.astype(z.dtype), jnp.full_like(r, dr), jnp.full_like(t, dt)),
        )
        if u.shape != z.shape:
            raise ValueError(f"field must return the shape of z, {z.shape}, got {u.shape}")
        return u, jnp.zeros_like(u) if dudt is None else dudt  # None: u does not depend on z, r or t


def total_derivative(
    field: AbstractField,
    z: Float[Array, "*data"],
    v: Float[Array, "*data"],
    r: Time,
    t: Time,
    condition: Condition = None,
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
    r"""The field and its total derivative, $du/dt = v \cdot \partial_z u + \partial_t u$ (Eq. 8).

    **Arguments:** `field`; `z` state at time `t`; `v` velocity along which z moves; `r <= t`; `condition`; `key` for
    dropout.

    **Returns:** the pair `(u, dudt)`.
    """
    return FusedJVP()(field, z, r, t, condition, tangent=(v, 0.0, 1.0), key=key)
