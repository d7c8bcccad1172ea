r"""Rows: one drawn example each, with everything that a method may know of it.

$$z_t = \alpha_t x + \sigma_t \epsilon, \qquad v_t = \dot\alpha_t x + \dot\sigma_t \epsilon, \qquad r \le t$$

`Drawing` makes a row of one example of the data: noise, times and the dropped condition come from the row's own key,
which is folded from its index in the global batch. So no result depends on how rows are spread over devices or
micro-batches.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ._batch import Batch
from ._custom_types import as_times, at_least_float32, Condition, Time, TimeLike
from ._field import AbstractField
from ._guidance import LabelDropout
from ._interpolant import AbstractInterpolant
from ._stable_target import StableTarget
from ._times import AbstractTimes, TimePairs


class Context(eqx.Module):
    """What an objective may know beyond its rows.

    **Arguments:** `step` number of finished training steps, of which schedules are functions; `teacher` a field that
    does not learn (see `TrainStep`), or None. Evaluate a teacher with `key=None`.
    """

    step: Int[Array, ""]
    teacher: AbstractField | None = None


class Row(eqx.Module):
    r"""One example, as a method sees it. Everything is without batch axis.

    **Arguments:**

    - `z`: state at time `t`.
    - `v`: its velocity: conditional in training, guided if the objective guides, or what its `velocity` gives; the
      marginal one in proofs.
    - `r`, `t`: times, r <= t.
    - `condition`: of the row, the null condition if it was dropped.
    - `key`: one per row and step. Pass it unchanged to every evaluation of the field, as `evaluate` does, so that all
      see the same dropout mask. Fold it with a large number for draws of your own: `fold_in(key, i)` with a small i is
      `split(key, n)[i]`, which the field may use. None without dropout and draws.
    - `context`: training step and teacher. None where nothing trains: in proofs and metrics.
    - `x`, `eps`, `path`: data, noise and interpolant that made z. None where z was drawn otherwise; x and eps also
      where an objective guides, or has a `velocity` or a `stable_target`, of which they know nothing.
    - `dropped`: whether the condition was dropped.
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
    dropped: Bool[Array, ""]

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
        dropped: Bool[Array, ""] | bool = False,
    ):
        self.z, self.v = z, v
        self.r, self.t = as_times(r, t, z)
        self.condition, self.key, self.context = condition, key, context
        self.x, self.eps, self.path = x, eps, path
        self.dropped = jnp.asarray(dropped)

    def at(self, time: TimeLike) -> Float[Array, "*data"]:
        r"""The state of the same x and $\epsilon$ at another time.

        **Raises:** `ValueError` if the row does not know its x, eps and path.
        """
        if self.x is None or self.eps is None or self.path is None:
            raise ValueError(
                "x, eps and path must be given for the state at another time, but this row has z and v alone (an "
                "objective gives them unless it guides or has a velocity, which x and eps know nothing of)"
            )
        return self.path.state_and_velocity(self.x, self.eps, time)[0]

    def evaluate(self, field: AbstractField, z: Float[Array, "*data"], r: Time, t: Time) -> Float[Array, "..."]:
        """A field at (z, r, t), under the row's condition and dropout mask."""
        return field(z, r, t, self.condition, key=self.key)

    def map(self, function: Callable[["Row"], PyTree[Array]]) -> PyTree[Array]:
        """The function of each row of a group, in which all arrays but those of `context` and `path` have a leading
        axis."""
        return jax.vmap(lambda row: function(_sharing(row, self.context, self.path)))(_sharing(self, None, None))


def _sharing(row: Row, context: Context | None, path: AbstractInterpolant | None) -> Row:
    """The row with another context and path, which all rows of a group share."""
    return eqx.tree_at(lambda row: (row.context, row.path), row, (context, path), is_leaf=lambda node: node is None)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How rows of one kind are drawn: those of the boundary, r = t, or those of an identity.

    **Arguments:** `is_boundary` the kind; `ends_at_data` whether r is 0; `drop_probability` of each row's condition;
    `with_pair` whether rows know their x and eps; the others as in `Objective`.
    """

    is_boundary: bool
    ends_at_data: bool
    path: AbstractInterpolant
    time_pairs: TimePairs
    boundary_times: AbstractTimes | None
    drop_probability: float
    label_dropout: LabelDropout | None
    velocity: Callable[[Float[Array, "*data"], Time, Condition], Float[Array, "*data"]] | None
    stable_target: StableTarget | None
    with_pair: bool

    def __call__(self, example: Batch, key: Key[Array, ""], context: Context | None) -> Row:
        """The row of one example.

        **Arguments:** `example` a batch of one, without batch axis; `key` of the step; `context`.
        """
        return self._draw(example, key, example.index, context)

    def group(self, examples: Batch, key: Key[Array, ""], context: Context | None) -> Row:
        """The rows of several examples, whose arrays have a leading axis. They share the times of the first one."""

        def draw(example: Batch) -> Row:
            return _sharing(self._draw(example, key, examples.index[0], None), None, None)

        return _sharing(jax.vmap(draw)(examples), context, self.path)

    def _draw(
        self, example: Batch, key: Key[Array, ""], first: Int[Array | np.ndarray, ""], context: Context | None
    ) -> Row:
        """The row of one example, with the times of the row of index `first`."""
        eps_key, _, drop_key, field_key = jr.split(jr.fold_in(key, example.index), 4)
        times_key = jr.split(jr.fold_in(key, first), 4)[1]
        x = at_least_float32(example.x)
        r, t = (jnp.asarray(time, x.dtype) for time in self._draw_times(times_key))
        eps = jr.normal(eps_key, x.shape, x.dtype)
        z, v = self.path.state_and_velocity(x, eps, t)
        dropped, condition = jnp.asarray(False), example.condition
        if self.label_dropout is not None and self.drop_probability > 0:
            dropped = jr.bernoulli(drop_key, self.drop_probability)
            null = self.label_dropout.null_like(condition)
            condition = jax.tree.map(lambda null, c: jnp.where(dropped, null, c), null, condition)
        if self.stable_target is not None:
            v = self.stable_target.velocity(self.path, x, eps, t, condition, dropped, key=key)
        if self.velocity is not None:
            v = jax.lax.stop_gradient(self.velocity(z, t, condition).astype(z.dtype))
            if v.shape != z.shape:
                raise ValueError(f"velocity must return the shape of z, {z.shape}, got {v.shape}")
        pair = {"x": x, "eps": eps} if self.with_pair else {}
        return Row(z, v, r, t, condition, key=field_key, context=context, path=self.path, dropped=dropped, **pair)

    def _draw_times(self, key: Key[Array, ""]) -> tuple[TimeLike, TimeLike]:
        if self.is_boundary and self.boundary_times is not None:
            t = self.boundary_times(key=key)
            return t, t
        r, t = self.time_pairs(key=key)
        if self.is_boundary:
            return t, t
        return (0.0 if self.ends_at_data else r), t
