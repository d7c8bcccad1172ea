r"""Rows: a row is one drawn example, with all values that a method may use.

$$z_t = \alpha_t x + \sigma_t \epsilon, \qquad v_t = \dot\alpha_t x + \dot\sigma_t \epsilon, \qquad r \le t$$

`Drawing` makes a row from one example of the data: noise, times and label dropout are drawn with the row's own key,
which is folded from its index in the global batch. So no result depends on how rows are spread over devices or
micro-batches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ._batch import Batch
from ._custom_types import as_times, at_least_float32, Condition, Time, TimeLike
from ._field import AbstractField, instantaneous_velocity, stopped, Velocity, velocity_at, with_checked_shapes
from ._guidance import AbstractGuidance
from ._interpolant import AbstractInterpolant
from ._label_dropout import LabelDropout
from ._model.guidance import condition_at
from ._stable_target import StableTarget
from ._times import AbstractTimes, draw_time, TimePairs


class Context(eqx.Module):
    """The values that an objective may use in addition to its rows.

    **Arguments:** `step` number of finished training steps, the argument of schedules; `teacher` a field that receives
    no gradient (see `TrainStep`), or None. Evaluate a teacher with `key=None`.
    """

    step: Int[Array, ""]
    teacher: AbstractField | None = None


def teacher_of(context: Context | None, name: str) -> AbstractField:
    """The teacher that `name`, a method or an objective, evaluates without a key. **Raises:** `ValueError` without."""
    if context is None or context.teacher is None:
        raise ValueError(f"context must have a teacher for {name}, got none")
    return context.teacher


class Row(eqx.Module):
    r"""One example, as a method gets it. No array has a batch axis.

    **Arguments:**

    - `z`: state at time `t`.
    - `v`: velocity at `z`: in training the conditional one, guided if the objective has guidance, or the value of the
      objective's `velocity` or `stable_target`; times min(1, t / t_0) if the objective has a `smallest_time` t_0; in
      tests with exact fields the marginal one.
    - `r`, `t`: times, r <= t.
    - `condition`: the condition of the row, or the null condition if it was dropped; with `DrawnGuidance` a
      `GuidanceCondition` of it.
    - `key`: one per row and step. Pass it unchanged to every evaluation of the field, as `evaluate` does, so that all
      use the same dropout mask. For your own random draws, fold it with a large number: `fold_in(key, i)` with a small
      i is `split(key, n)[i]`, which the field may use. None if there is neither dropout nor such a draw.
    - `context`: training step and teacher. None outside of training, as in metrics.
    - `x`, `eps`, `path`: data, noise and interpolant from which z was made. None if z was made otherwise; x and eps are
      also None if the objective has guidance, a `velocity` or a `stable_target`: a method that learns from x and eps
      would ignore these. An objective with perceptual terms always gives x.
    - `velocity`: the objective's `velocity`, or None; `known_velocity` evaluates it.
    - `dropped`: whether the condition was dropped.
    - `predicted`: the field's own v(z, t) as the objective evaluated it for guidance, behind stop-gradient; None if it
      did not. `own_velocity` returns it.
    """

    z: Float[Array, "*data"]
    v: Float[Array, "*data"]
    r: Time
    t: Time
    condition: Condition
    key: Key[Array, ""] | None
    context: Context | None
    x: Float[Array, "*data"] | None
    eps: Float[Array, "*data"] | None
    path: AbstractInterpolant | None
    velocity: Velocity | None
    dropped: Bool[Array, ""]
    predicted: Float[Array, "*data"] | None

    def __init__(
        self,
        z: Float[Array, "*data"],
        v: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
        context: Context | None = None,
        x: Float[Array, "*data"] | None = None,
        eps: Float[Array, "*data"] | None = None,
        path: AbstractInterpolant | None = None,
        velocity: Velocity | None = None,
        dropped: Bool[Array, ""] | bool = False,
        predicted: Float[Array, "*data"] | None = None,
    ):
        self.z, self.v = z, v
        self.r, self.t = as_times(r, t, z)
        self.condition, self.key, self.context = condition, key, context
        self.x, self.eps, self.path, self.velocity = x, eps, path, velocity
        self.dropped, self.predicted = jnp.asarray(dropped), predicted

    def at(self, time: TimeLike) -> Float[Array, "*data"]:
        r"""The state of the same x and $\epsilon$ at another time.

        **Raises:** `ValueError` if the row has no x, eps and path.
        """
        if self.x is None or self.eps is None or self.path is None:
            raise ValueError(
                "x, eps and path must be given for the state at another time, but this row has only z and v (an "
                "objective gives them unless it has guidance, a velocity or a stable_target)"
            )
        return self.path.state_and_velocity(self.x, self.eps, time)[0]

    def evaluate(self, field: AbstractField, z: Float[Array, "*data"], r: Time, t: Time) -> Float[Array, "..."]:
        """`field` at (z, r, t), with the row's key and condition; a `GuidanceCondition` is given as it is at (r, t)."""
        return field(z, r, t, condition_at(self.condition, r, t), key=self.key)

    def own_velocity(self, field: AbstractField) -> Float[Array, "..."]:
        """The field's own prediction of v(z, t), behind stop-gradient: of its velocity head, or u(z, t, t)."""
        if self.predicted is not None:
            return self.predicted
        condition = condition_at(self.condition, self.t, self.t)
        return instantaneous_velocity(stopped(field), self.z, self.t, condition, key=self.key)

    def known_velocity(self, z: Float[Array, "*data"], t: TimeLike) -> Float[Array, "*data"]:
        """The objective's `velocity` at any state and time, behind stop-gradient.

        **Raises:** `ValueError` if the row has none.
        """
        if self.velocity is None:
            raise ValueError("velocity must be given for its value at another state, but this row has none")
        return _value(self.velocity, z, jnp.asarray(t, z.dtype), self.condition)

    def map(self, function: Callable[["Row"], PyTree[Array]]) -> PyTree[Array]:
        """`function` applied to each row of a group. In a group, all arrays except those of `context`, `path` and
        `velocity` have a leading axis."""
        shared = _shared(self)
        return jax.vmap(lambda row: function(_with_shared(row, shared)))(_with_shared(self, (None, None, None)))


def _shared(row: Row) -> tuple[Any, Any, Any]:
    """The parts that all rows of a group share."""
    return row.context, row.path, row.velocity


def _with_shared(row: Row, shared: tuple[Any, Any, Any]) -> Row:
    """The row with these shared parts."""
    return eqx.tree_at(_shared, row, shared, is_leaf=lambda node: node is None)


def _value(velocity: Velocity, z: Float[Array, "*data"], t: Time, condition: Condition) -> Float[Array, "*data"]:
    """The value of an objective's velocity, in the dtype of z and behind stop-gradient."""
    v = with_checked_shapes(velocity_at(velocity, z, t, condition), z, "velocity")
    return jax.lax.stop_gradient(v.astype(z.dtype))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How rows of one kind are drawn: boundary rows with r = t, or rows that carry the identity.

    **Arguments:** `is_boundary` whether the rows are boundary rows; `ends_at_data` whether r is 0 in identity rows;
    `drop_probability` of each row's condition; `with_data` whether rows contain x, `with_pair` whether
    they contain x, eps and path; the others as in `Objective`.
    """

    is_boundary: bool
    ends_at_data: bool
    path: AbstractInterpolant
    time_pairs: TimePairs
    boundary_times: AbstractTimes | None
    drop_probability: float
    label_dropout: LabelDropout | None
    guidance: AbstractGuidance | None
    velocity: Velocity | None
    stable_target: StableTarget | None
    exact_guidance: bool
    smallest_time: float
    with_data: bool
    with_pair: bool

    def __call__(self, example: Batch, key: Key[Array, ""], context: Context | None) -> Row:
        """The row of one example.

        **Arguments:** `example` a single row of data, without batch axis; `key` of the step; `context`.
        """
        return self._draw(example, key, example.index, context)

    def group(self, examples: Batch, key: Key[Array, ""], context: Context | None) -> Row:
        """The rows of several examples, whose arrays have a leading axis. They share the times of the first one."""

        def draw(example: Batch) -> Row:
            return _with_shared(self._draw(example, key, examples.index[0], None), (None, None, None))

        return _with_shared(jax.vmap(draw)(examples), (context, self.path, self.velocity))

    def _draw(
        self, example: Batch, key: Key[Array, ""], times_index: Int[Array | np.ndarray, ""], context: Context | None
    ) -> Row:
        """The row of one example, with the times of the row whose index is `times_index`."""
        eps_key, _, drop_key, field_key = jr.split(jr.fold_in(key, example.index), 4)
        times_key = jr.split(jr.fold_in(key, times_index), 4)[1]
        x = at_least_float32(example.x)
        r, t = (jnp.asarray(time, x.dtype) for time in self._draw_times(times_key))
        eps = jr.normal(eps_key, x.shape, x.dtype) if example.eps is None else jnp.asarray(example.eps, x.dtype)
        pair = tuple(self.path.state_and_velocity(x, eps, t))
        z, v = with_checked_shapes(pair, x, type(self.path).__name__, several=True)
        dropped, condition = jnp.asarray(False), example.condition
        if self.label_dropout is not None and self.drop_probability > 0:
            dropped = jr.bernoulli(drop_key, self.drop_probability)
            null = self.label_dropout.null_like(condition)
            condition = jax.tree.map(lambda null, c: jnp.where(dropped, null, c), null, condition)
        if self.stable_target is not None:
            v = self.stable_target.velocity(self.path, x, eps, t, condition, dropped, key=key)
        if self.velocity is not None:
            v = _value(self.velocity, z, t, condition)
        if self.guidance is not None:
            condition = self.guidance.condition(condition, r, t, key=jr.fold_in(drop_key, 1))
        if self.exact_guidance and self.guidance is not None and self.stable_target is not None:
            null = self.stable_target.velocity(self.path, x, eps, t, example.condition, True, key=key)
            fixed_point = self.guidance.fixed_point(v, null, t, condition)
            v = jnp.where(dropped, v, with_checked_shapes(fixed_point, x, type(self.guidance).__name__))
        if self.smallest_time > 0:
            v = jnp.minimum(1, t / self.smallest_time) * v
        known: dict[str, Any] = {"path": self.path, "velocity": self.velocity}
        known |= {"x": x, "eps": eps} if self.with_pair else {"x": x} if self.with_data else {}
        return Row(z, v, r, t, condition, key=field_key, context=context, dropped=dropped, **known)

    def _draw_times(self, key: Key[Array, ""]) -> tuple[TimeLike, TimeLike]:
        if self.is_boundary and self.boundary_times is not None:
            t = draw_time(self.boundary_times, key)
            return t, t
        r, t = self.time_pairs(key=key)
        if self.is_boundary:
            return t, t
        return (0.0 if self.ends_at_data else r), t
