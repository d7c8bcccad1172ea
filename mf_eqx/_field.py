r"""Fields: average velocities u(z, r, t | condition), which every method learns.

$$u(z_t, r, t) = \frac{1}{t - r} \int_r^t v(z_\tau, \tau)\, d\tau \qquad (3), \qquad u(z_t, t, t) = v(z_t, t),$$

so one network holds both the one-step map and the velocity of Flow Matching.
"""

import abc
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ._custom_types import Condition, Time

_Tree = TypeVar("_Tree")


class AbstractField(eqx.Module):
    """An average velocity. Subclass it to make any network of your own a field.

    A field is called for one example; the caller makes batches by `jax.vmap`. The call must be differentiable in
    forward mode with respect to `z`, `r` and `t`; a fused attention kernel, which is not, must be an
    `mf_eqx.nn.AbstractAttention`. As the field gets one example, none of its layers may need a batch: use
    `eqx.nn.GroupNorm` or `LayerNorm`, not `BatchNorm`.

    Every floating-point JAX or NumPy array in a field is a parameter: it is trained, decayed by weight decay, and
    averaged. An array that no gradient reaches, for example because of `stop_gradient` in the call, is still decayed.
    Integer and boolean arrays, Python numbers and static fields are not changed. To keep constants out of training,

    - compute them with NumPy in the call (as `DiT` computes its position embedding), or store a tuple of numbers in
      `eqx.field(static=True)` and make an array of it in the call;
    - or give them no update: `optax.partition({"learnt": ..., "constant": optax.set_to_zero()}, labels)`, where
      `labels` names the kind of each array by its path.
    """

    @abc.abstractmethod
    def __call__(
        self,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        """u(z, r, t | condition).

        **Arguments:** `z` state at time `t`; `r <= t` times in [0, 1]; `condition` a PyTree without batch axis, or
        None; `key` for dropout, or None to evaluate without it. This package passes times as arrays of shape (); its
        own fields also accept Python and NumPy numbers.

        **Returns:** the average velocity over [r, t], of the shape of `z`, at least float32.
        """


class AbstractFieldWithVelocity(AbstractField):
    """An average velocity whose network has a second output: the velocity head, a prediction of the instantaneous
    velocity v(z, t) beside u.

    There are three passes, so that none computes what is not asked for: the call gives u, `velocity` gives v, and
    `with_velocity` gives both in one evaluation.
    """

    @property
    @abc.abstractmethod
    def has_velocity_head(self) -> bool:
        """Whether the head is there: a network may be without it, for sampling. The class attribute `True` will do."""

    @abc.abstractmethod
    def velocity(
        self, z: Float[Array, "*data"], t: Time, condition: Condition = None, *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*data"]:
        """v(z, t), which is `with_velocity(z, t, t)[1]`. **Arguments:** as for the field."""

    @abc.abstractmethod
    def with_velocity(
        self,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        """The pair (u(z, r, t), v(z, t)). **Arguments:** as for the field."""


def has_velocity_head(field: AbstractField) -> TypeGuard[AbstractFieldWithVelocity]:
    """Whether the field has a velocity head, so that `with_velocity` can be called."""
    return isinstance(field, AbstractFieldWithVelocity) and field.has_velocity_head


def instantaneous_velocity(
    field: AbstractField,
    z: Float[Array, "*data"],
    t: Time,
    condition: Condition = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*data"]:
    """The field's own prediction of v(z, t): of its velocity head, or u(z, t, t) of a field without one.

    **Arguments:** `field`; the others as for the field. Of a `GuidanceCondition` give `condition.at(t, t)`, what holds
    at one time.
    """
    if has_velocity_head(field):
        return field.velocity(z, t, condition, key=key)
    return field(z, t, t, condition, key=key)


Velocity: TypeAlias = AbstractField | Callable[[Float[Array, "*data"], Time, Condition], Float[Array, "*data"]]
"""An instantaneous velocity that is known everywhere: a function v(z, t, condition), such as a Module of
`mf_eqx.exact`, or a field, whose velocity head or u(z, t, t) it is."""


def velocity_at(
    velocity: Velocity, z: Float[Array, "*data"], t: Time, condition: Condition = None
) -> Float[Array, "*data"]:
    """The value of a known velocity; a field is evaluated without dropout."""
    if isinstance(velocity, AbstractField):
        return instantaneous_velocity(velocity, z, t, condition)
    return velocity(z, t, condition)


class WithVelocity(eqx.Module):
    """A field as the function that returns (u, v), for engines: their JVP then gives v without a second pass.

    (u, v), (dudt, _) = engine(WithVelocity(field), z, r, t, condition, tangent=tangent, key=key)
    """

    field: AbstractFieldWithVelocity

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
        return self.field.with_velocity(z, r, t, condition, key=key)


def stopped(tree: _Tree) -> _Tree:
    """`tree` with every inexact array behind `stop_gradient`: a field that serves as a target and is not trained."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def with_checked_shapes(u: _Tree, z: Float[Array, "*data"], name: str = "field", *, several: bool = False) -> _Tree:
    """`u`, what a field, or the function of this name, returned at `z`: one array, or `several` in a PyTree.

    **Raises:** `ValueError` unless all its arrays have the shape of `z`, and are real.
    """
    leaves = jax.tree.leaves(u)
    if not several and leaves and leaves[0] is not u:
        raise ValueError(f"{name} must return one array of the shape of z, {z.shape}, got {eqx.tree_pformat(u):.100}")
    if not leaves:
        raise ValueError(f"{name} must return the shape of z, {z.shape}, got {u}")
    if wrong := [jnp.shape(leaf) for leaf in leaves if jnp.shape(leaf) != z.shape]:
        raise ValueError(f"{name} must return the shape of z, {z.shape}, got {wrong[0]}")
    if others := [kind for kind in map(jnp.result_type, leaves) if jnp.issubdtype(kind, jnp.complexfloating)]:
        raise ValueError(f"{name} must return real values, got {others[0]}")
    return u


def check_field(field: eqx.Module) -> None:
    """Raises a `ValueError` if the field cannot be called as an `AbstractField` is, or if it holds a `BatchNorm`, which
    needs a batch, outside of inference mode."""
    _check_signature(field)

    def is_norm(node: object) -> bool:
        return isinstance(node, eqx.nn.BatchNorm)

    if any(is_norm(node) and not node.inference for node in jax.tree.leaves(field, is_leaf=is_norm)):
        raise ValueError(
            "field must be a function of one example, got an eqx.nn.BatchNorm, which needs a batch: use "
            "eqx.nn.GroupNorm or eqx.nn.LayerNorm"
        )


def _check_signature(field: Any) -> None:
    found = type(field).__name__
    try:
        signature = inspect.signature(field)
        found += f", which takes ({', '.join(signature.parameters)})"
        signature.bind("z", "r", "t", "condition", key="key")
    except TypeError as error:
        raise ValueError(
            f"field must be callable as field(z, r, t, condition, key=key), got {found}: call it from a subclass of "
            "mf_eqx.AbstractField"
        ) from error
