"""How far a field is from being an average velocity at all, where the truth is not known.

The equations that every average velocity satisfies can be tested without a truth. Their residuals, relative to the size
of the velocity, measure how consistent a field is with itself, but not with the data: that of an identity needs the
velocity at each state, that of the semigroup property nothing but the field.

All functions take rows (a leading batch axis), are jitted, and evaluate fields without dropout. If a value is not
finite, the result is not finite, and no error is raised, as for the errors against a truth.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from .._custom_types import at_least_float32, Condition, Time
from .._field import AbstractField, Velocity, with_checked_shapes
from .._identity import AbstractIdentity, semigroup_residual
from .._row import Context, Row
from .._validate import quotient


def relative_identity_residual(
    identity: AbstractIdentity,
    field: AbstractField,
    z: Float[Array, "rows *data"],
    v: Float[Array, "rows *data"],
    r: Float[Array, " rows"],
    t: Float[Array, " rows"],
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
    *,
    velocity: Velocity | None = None,
    context: Context | None = None,
    key: Key[Array, ""] | None = None,
) -> Float[Array | np.ndarray, ""]:
    r"""The root-mean-square residual of an identity, relative to the given velocities.

    $$\Big( \frac{\sum_i |\mathrm{residual}_i|^2}{\sum_i |v_i|^2} \Big)^{1/2},$$

    with sums over rows and dimensions. The truth has the residual 0 if `v` is the *marginal* velocity; with a
    conditional velocity, the residual of an identity that contains v is the noise of that velocity.

    **Arguments:** `identity`; `field`; `z` states at `t`; `v` their velocities; `r <= t`; `condition` one for each row,
    or None; `velocity` and `context` for identities that require one; `key` for those that draw random numbers
    (`SplitMeanFlow`), else None.

    **Returns:** the ratio, 0 for an average velocity.

    **Raises:** `ValueError` for methods that require more than z and v: the pair of x and noise, a group of rows, or a
    velocity head.
    """
    facts = identity.facts
    if facts.uses_pair or facts.group > 1 or facts.needs_velocity_head:
        name = type(identity).__name__
        raise ValueError(f"identity must be an equation of z and v alone here, got {name}")
    return _root_ratio(_identity_residuals(identity, field, (z, v, r, t, condition), velocity, context, key), v)


def relative_semigroup_residual(
    field: AbstractField,
    z: Float[Array, "rows *data"],
    r: Float[Array, " rows"],
    t: Float[Array, " rows"],
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
    *,
    split: float | Float[Array, " rows"] = 0.5,
) -> Float[Array | np.ndarray, ""]:
    r"""The root-mean-square residual of the semigroup property (`mf_eqx.semigroup_residual`), relative to the field.

    $$\Big( \frac{\sum_i |u(z_i, r_i, t_i) - (1 - \lambda_i)\, u(z_{s_i}, r_i, s_i) - \lambda_i\, u(z_i, s_i, t_i)|^2}
    {\sum_i |u(z_i, r_i, t_i)|^2} \Big)^{1/2}$$

    It needs no velocity and no truth: it measures whether n steps lead to the same state as one step. It is NaN if the
    field is zero in all rows.

    **Arguments:** `field`; `z` states at `t`; `r <= t`; `condition` one for each row, or None; `split` the share
    $\lambda$ of the interval above s, one for all rows or one for each; 1/2 compares one step with two equal ones.

    **Returns:** the ratio, 0 for an average velocity.
    """
    shares = jnp.broadcast_to(jnp.asarray(split, t.dtype), t.shape)
    return _root_ratio(*_semigroup_residuals(field, (z, r, t, shares, condition)))


class _WithoutDropout(AbstractField):
    """`field` evaluated without a key, whatever key an identity passes on."""

    field: AbstractField

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        return self.field(z, r, t, condition)


@eqx.filter_jit
def _identity_residuals(
    identity: AbstractIdentity,
    field: AbstractField,
    rows: Any,
    velocity: Velocity | None,
    context: Context | None,
    key: Key[Array, ""] | None,
) -> Float[Array, "rows *data"]:
    without_dropout, keys = _WithoutDropout(field), None if key is None else jr.split(key, len(rows[0]))

    def residual(row, key):
        drawn = Row(*row, key=key, velocity=velocity, context=context)
        return with_checked_shapes(identity.residual(without_dropout, drawn), drawn.z, type(identity).__name__)

    return jax.vmap(residual)(rows, keys)


@eqx.filter_jit
def _semigroup_residuals(
    field: AbstractField, rows: Any
) -> tuple[Float[Array, "rows *data"], Float[Array, "rows *data"]]:
    """The residuals, and the values of the field."""
    z, r, t, _, condition = rows
    residuals = jax.vmap(lambda row: semigroup_residual(field, *row))(rows)
    return residuals, jax.vmap(field)(z, r, t, condition)


def _root_ratio(
    residual: Float[Array, "rows *data"], size: Float[Array, "rows *data"]
) -> Float[Array | np.ndarray, ""]:
    """The root of the ratio of the sums of squares; NaN if both are zero."""
    squares = (jnp.sum(at_least_float32(jnp.asarray(values)) ** 2) for values in (residual, size))
    ratio = quotient(*squares)
    return jnp.sqrt(ratio) if isinstance(ratio, jax.Array) else np.asarray(np.sqrt(ratio))
