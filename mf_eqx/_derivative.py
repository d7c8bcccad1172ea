r"""The total derivative du/dt along a trajectory (Eq. 8), and the engines that compute it.

$$\frac{d}{dt} u(z_t, r, t) = v \cdot \partial_z u + \partial_t u,$$

a Jacobian-vector product of u at (z, r, t) with tangent (v, 0, 1). An engine is an object handed to an identity; it
decides how the product is taken, the identity decides what for. Cost on top of u with its gradient, in forward passes F
of the rows that carry an identity, and what du/dt is:

    FusedJVP             1.0 F   exact; u is its primal output, so nothing is computed twice
    StoppedJVP           2.0 F   exact; u comes from a pass of its own, which forward mode never sees
    CentralDifference    2.0 F   an approximation, for fields that forward mode cannot pass

(the tangent pass costs a little more than F, by the share of the attention's products). While an engine differentiates,
it replaces each `mf_eqx.nn.AbstractAttention` in the field by its `forward_mode()`.

A du/dt that was computed without a way back to the parameters carries no gradient. Asking for one raises an error:
training on zeros instead would look like training.
"""

import abc
from typing import Any, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ._custom_types import as_times, Condition, Scalar, Time, TimeLike
from ._engine_guards import refuse_custom_vjp, refuse_gradient, refuse_low_precision, traced
from ._field import AbstractField, stopped, WithVelocity
from ._validate import check_positive
from .nn import AbstractAttention, StoppedTangent

_Field = TypeVar("_Field", bound=eqx.Module)

Values: TypeAlias = PyTree[Float[Array, "*data"]]
"""What a field gives: u, or u and more, each of the shape of z."""


class Passes(NamedTuple):
    """Work in units of one evaluation of a field: `forward` passes and `tangent` passes, those of a JVP."""

    forward: float = 0
    tangent: float = 0


class AbstractDerivative(eqx.Module):
    """A way to compute a field together with its directional derivative."""

    @property
    @abc.abstractmethod
    def passes(self) -> Passes | None:
        """What du/dt costs on top of u with its gradient. None if that is not known."""

    @abc.abstractmethod
    def __call__(
        self,
        field: AbstractField | WithVelocity,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Values, Values]:
        """The pair `(u, dudt)` at `(z, r, t)` in direction `tangent` = (dz, dr, dt). Of a field that gives more than u,
        such as `WithVelocity`, both are what it gives."""


class FusedJVP(AbstractDerivative):
    """One `eqx.filter_jvp`: its primal output is the loss's own forward pass, so u is never computed twice.

    du/dt carries a gradient, unless the field's attention is a fused kernel.

    **Raises** (when called): `ValueError` if a `jax.custom_vjp` function stands between (z, r, t) and u.
    """

    @property
    def passes(self) -> Passes:
        return Passes(tangent=1)

    def __call__(
        self,
        field: AbstractField | WithVelocity,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Values, Values]:
        r, t = as_times(r, t, z)
        field = _in_forward_mode(field)
        u, dudt = _jvp(field, z, r, t, condition, tangent, key)
        return u, refuse_gradient(dudt, (u, z, r, t, tangent[0])) if _has_stopped_tangent(field) else dudt


class StoppedJVP(AbstractDerivative):
    """u by a forward pass of its own, du/dt by a JVP of the field behind stop-gradient.

    One forward pass more than `FusedJVP`; in exchange reverse mode never meets forward mode, and u and its gradient
    come from the plain field, fused kernels included. A gradient through du/dt raises `ValueError`.

    **Raises** (when called): as `FusedJVP`.
    """

    @property
    def passes(self) -> Passes:
        return Passes(forward=1, tangent=1)

    def __call__(
        self,
        field: AbstractField | WithVelocity,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Values, Values]:
        r, t = as_times(r, t, z)
        u: Values = field(z, r, t, condition, key=key)
        teacher = _in_forward_mode(stopped(field))
        _, dudt = _jvp(teacher, *stopped((z, r, t, condition, tangent)), key)
        return u, refuse_gradient(dudt, (u, z, r, t, tangent[0]))


class CentralDifference(AbstractDerivative):
    r"""du/dt without a JVP: $(u_{+} - u_{-}) / 2\epsilon$ with $u_{\pm} = u((z, r, t) \pm \epsilon\, (dz, dr, dt))$.

    For fields that forward mode cannot pass. The error is of order $\epsilon^2$ plus the rounding of u over $\epsilon$,
    which leaves float32 about four digits at best and bfloat16 none (on recent GPUs float32 products are TF32 unless
    `jax.default_matmul_precision` says otherwise, and leave fewer). The field is evaluated up to $\epsilon$ beyond [0,
    1], and at $t - \epsilon < r$ where t - r is smaller. A gradient through du/dt raises `ValueError`.

    **Arguments:** `step` the $\epsilon$ above, in units of time.

    **Raises:** `ValueError` unless step is > 0 and finite; when called, if the field computes in less than float32.
    """

    step: float = eqx.field(default=5e-3, converter=float)

    def __check_init__(self):
        check_positive("step", self.step)

    @property
    def passes(self) -> Passes:
        return Passes(forward=2)

    def __call__(
        self,
        field: AbstractField | WithVelocity,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition,
        *,
        tangent: tuple[Float[Array, "*data"], float, float],
        key: Key[Array, ""] | None,
    ) -> tuple[Values, Values]:
        r, t = as_times(r, t, z)
        u = _checked(field(z, r, t, condition, key=key), z)
        origins = (u, z, r, t, tangent[0])
        teacher, (z, r, t, condition), (dz, dr, dt) = stopped((field, (z, r, t, condition), tangent))

        def moved(step: Scalar) -> Values:
            return teacher(z + step * dz.astype(z.dtype), r + step * dr, t + step * dt, condition, key=key)

        at = traced(moved, refuse_low_precision, jnp.zeros((), z.dtype))
        after, before = (at(jnp.asarray(step, z.dtype)) for step in (self.step, -self.step))
        dudt = jax.tree.map(lambda after, before: (after - before) / (2 * self.step), after, before)
        return u, refuse_gradient(dudt, origins)


def total_derivative(
    field: AbstractField,
    z: Float[Array, "*data"],
    v: Float[Array, "*data"],
    r: TimeLike,
    t: TimeLike,
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


def _jvp(
    field: AbstractField | WithVelocity,
    z: Float[Array, "*data"],
    r: Time,
    t: Time,
    condition: Condition,
    tangent: tuple[Float[Array, "*data"], float, float],
    key: Key[Array, ""] | None,
) -> tuple[Values, Values]:
    dz, dr, dt = tangent
    primals, tangents = (z, r, t), (dz.astype(z.dtype), jnp.full_like(r, dr), jnp.full_like(t, dt))

    def differentiate(primals: Any, tangents: Any) -> tuple[Values, Values]:
        return eqx.filter_jvp(lambda z, r, t: field(z, r, t, condition, key=key), primals, tangents)

    u, dudt = traced(differentiate, refuse_custom_vjp, primals, tangents)(primals, tangents)

    def rate(u: Array, rate: Array | None) -> Array:
        return jnp.zeros_like(u) if rate is None else rate  # None: u does not depend on z, r or t

    return _checked(u, z), jax.tree.map(rate, u, dudt, is_leaf=lambda node: node is None)


def _checked(u: PyTree[Float[Array, "..."]], z: Float[Array, "*data"]) -> Values:
    if wrong := [leaf.shape for leaf in jax.tree.leaves(u) if leaf.shape != z.shape]:
        raise ValueError(f"field must return the shape of z, {z.shape}, got {wrong[0]}")
    return u


def _is_attention(node: object) -> bool:
    return isinstance(node, AbstractAttention)


def _in_forward_mode(field: _Field) -> _Field:
    """`field` with every attention in the form that a JVP passes."""
    return jax.tree.map(lambda node: node.forward_mode() if _is_attention(node) else node, field, is_leaf=_is_attention)


def _has_stopped_tangent(field: AbstractField | WithVelocity) -> bool:
    return any(isinstance(node, StoppedTangent) for node in jax.tree.leaves(field, is_leaf=_is_attention))
