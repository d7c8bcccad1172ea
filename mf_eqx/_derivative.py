r"""The total derivative du/dt along a trajectory (Eq. 8), and the engines that compute it.

$$\frac{d}{dt} u(z_t, r, t) = v \cdot \partial_z u + \partial_t u,$$

a Jacobian-vector product of u at (z, r, t) with tangent (v, 0, 1). An engine is an object passed to an identity: the
engine decides how the product is computed, the identity decides how it is used. The table lists the cost of each engine
in addition to u and its gradient, where F is one forward pass of the rows that carry an identity, and the accuracy of
du/dt:

    FusedJVP             1.0 F   exact; u is its primal output, so nothing is computed twice
    StoppedJVP           2.0 F   exact; u comes from a separate pass without forward mode
    CentralDifference    2.0 F   an approximation, for fields that forward mode cannot differentiate

(The tangent pass costs slightly more than F, depending on the share of the attention's matrix products.) While an
engine differentiates, it replaces each `mf_eqx.nn.AbstractAttention` in the field by its `forward_mode()`.

If du/dt is computed without a differentiable path to the parameters, it carries no gradient. A request for its gradient
then raises an error: with silent zeros in its place, training would seem to work.
"""

import abc
from typing import Any, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ._custom_types import as_times, Condition, Scalar, Time, TimeLike
from ._engine_guards import refuse_custom_vjp, refuse_gradient, refuse_low_precision, trace_and_check
from ._field import AbstractField, check_field, stopped, with_checked_shapes, WithVelocity
from ._validate import as_float, check_positive
from .nn import AbstractAttention, StoppedTangent

_Field = TypeVar("_Field", bound=eqx.Module)

Values: TypeAlias = PyTree[Float[Array, "*data"]]
"""The outputs of a field: u, or u and further arrays, each of the shape of z."""


class Passes(NamedTuple):
    """Work in units of one evaluation of a field: `forward` passes and `tangent` passes, those of a JVP."""

    forward: int = 0
    tangent: int = 0


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
        """The pair `(u, dudt)` at `(z, r, t)` in direction `tangent` = (dz, dr, dt). For a field with several outputs,
        such as `WithVelocity`, both have the structure of its outputs."""


class FusedJVP(AbstractDerivative):
    """One `eqx.filter_jvp`: its primal output is the loss's own forward pass, so u is never computed twice.

    du/dt carries a gradient, unless the field's attention becomes a `StoppedTangent` in forward mode, as
    `CudnnAttention` does.

    **Raises** (when called): `ValueError` if u is computed from (z, r, t) by a `jax.custom_vjp` function.
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
        field = in_forward_mode(field)
        u, dudt = _jvp(field, z, r, t, condition, tangent, key)
        return u, refuse_gradient(dudt, (u, z, r, t, tangent[0])) if has_stopped_tangent(field) else dudt


class StoppedJVP(AbstractDerivative):
    """u by a separate forward pass, du/dt by a JVP of the field behind stop-gradient.

    It costs one forward pass more than `FusedJVP`. In exchange, reverse mode is never applied to forward mode, and u
    and its gradient come from the unchanged field, including its fused kernels. A gradient through du/dt raises
    `ValueError`.

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
        teacher = in_forward_mode(stopped(field))
        _, dudt = _jvp(teacher, *stopped((z, r, t, condition, tangent)), key)
        return u, refuse_gradient(dudt, (u, z, r, t, tangent[0]))


class CentralDifference(AbstractDerivative):
    r"""du/dt without a JVP: $(u_{+} - u_{-}) / 2\epsilon$ with $u_{\pm} = u((z, r, t) \pm \epsilon\, (dz, dr, dt))$.

    For fields that forward mode cannot differentiate. The error is of order $\epsilon^2$ plus the rounding error of u
    divided by $\epsilon$: about four digits at best are correct in float32, and none in bfloat16. (On recent GPUs
    float32 products are computed in TF32 unless `jax.default_matmul_precision` says otherwise; then fewer digits are
    correct.) The field is evaluated up to $\epsilon$ outside of [0, 1], and at $t - \epsilon < r$ where t - r is
    smaller than $\epsilon$. A gradient through du/dt raises `ValueError`.

    **Arguments:** `step` the $\epsilon$ above, in units of time.

    **Raises:** `ValueError` unless step is > 0 and finite; when called, if the field computes in less than float32.
    """

    step: float = eqx.field(default=5e-3, converter=as_float("step"))

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
        u = with_checked_shapes(field(z, r, t, condition, key=key), z, several=_has_several_outputs(field))
        inputs = (u, z, r, t, tangent[0])
        teacher, (z, r, t, condition), (dz, dr, dt) = stopped((field, (z, r, t, condition), tangent))

        def evaluate_at(step: Scalar) -> Values:
            return teacher(z + step * dz.astype(z.dtype), r + step * dr, t + step * dt, condition, key=key)

        evaluate = trace_and_check(evaluate_at, refuse_low_precision, jnp.zeros((), z.dtype))
        after, before = (evaluate(jnp.asarray(step, z.dtype)) for step in (self.step, -self.step))
        dudt = jax.tree.map(lambda after, before: (after - before) / (2 * self.step), after, before)
        return u, refuse_gradient(dudt, inputs)


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
    check_field(field)
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

    u, dudt = trace_and_check(differentiate, refuse_custom_vjp, primals, tangents)(primals, tangents)

    def rate(u: Array, rate: Array | None) -> Array:
        return jnp.zeros_like(u) if rate is None else rate  # None: u does not depend on z, r or t

    return with_checked_shapes(u, z, several=_has_several_outputs(field)), jax.tree.map(
        rate, u, dudt, is_leaf=lambda node: node is None
    )


def _has_several_outputs(field: AbstractField | WithVelocity) -> bool:
    return not isinstance(field, AbstractField)


def _is_attention(node: object) -> bool:
    return isinstance(node, AbstractAttention)


def in_forward_mode(field: _Field) -> _Field:
    """`field` with every attention replaced by the form that forward mode can differentiate."""
    return jax.tree.map(lambda node: node.forward_mode() if _is_attention(node) else node, field, is_leaf=_is_attention)


def has_stopped_tangent(field: AbstractField | WithVelocity) -> bool:
    """Whether derivatives of `field` by forward mode carry no gradient, because of the form that its attention has."""
    return any(isinstance(node, StoppedTangent) for node in jax.tree.leaves(field, is_leaf=_is_attention))
