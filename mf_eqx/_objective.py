r"""Objectives: from a batch to a loss.

An `Objective` is a boundary condition plus an identity. Each row draws noise and times from a key of its own, folded
from the row's index in the *global* batch, so that no result depends on how rows are spread over devices or
micro-batches. Then the batch is split, statically and strided: a share of the rows carries the identity, the others
regress u(z, t, t) on the velocity and never pay for a JVP.

    loss = mean over all rows of sg(w(error)) error,   error = sum over dimensions of residual^2

Guidance costs what it must. On r = t rows the conditional value is the loss's own output, so only the unconditional
pass is extra; on identity rows both come from a copy of the field behind stop-gradient, the conditional one only if it
is mixed in.
"""

import abc
import functools
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, Shaped

from ._custom_types import at_least_float32, Condition, Scalar, Time, TimeLike
from ._field import AbstractField, check_per_example, stopped
from ._guidance import first_lost, Guidance, LabelDropout
from ._identity import AbstractIdentity, Context, MeanFlow
from ._interpolant import AbstractInterpolant, LinearInterpolant
from ._times import AbstractTimes, as_share, check_batch_size, split_rows, TimePairs
from ._validate import quotient
from ._weight import AbstractWeight, AdaptiveWeight


class Batch(eqx.Module):
    """Rows of training data.

    **Arguments:** `x` data with a leading batch axis (channels first for images; a PyTree if `TrainStep.prepare` makes
    data of it); `condition` a PyTree with the same leading axis, or None; `index` each row's index in the global batch,
    0, 1, ... by default (pass it when `x` is a part of a larger batch). With a scalar `index` it is a single row
    without batch axis.
    """

    x: PyTree[Shaped[ArrayLike, "..."]]
    condition: PyTree[Shaped[ArrayLike, "..."]]
    index: Int[Array | np.ndarray, "..."]

    def __init__(
        self,
        x: PyTree[Shaped[ArrayLike, "..."]],
        condition: PyTree[Shaped[ArrayLike, "..."]] = None,
        index: Int[Array | np.ndarray, "..."] | None = None,
    ):
        self.x = x
        self.condition = condition
        if index is not None and np.ndim(index) == 0:  # one row, as `TrainStep.prepare` sees it
            self.index = index
            return
        shapes = [np.shape(leaf)[:1] for leaf in jax.tree.leaves((x, condition, index))]
        if len(set(shapes)) != 1 or shapes[0] == ():
            raise ValueError(f"x, condition and index must share their leading batch axis, got {shapes}")
        self.index = np.arange(*shapes[0], dtype=np.int32) if index is None else index


class Mean(eqx.Module):
    """A mean as (total, count), so that the means of micro-batches and devices add up to that of the whole batch.

    **Arguments:** `total` sum of the values; `count` how many there were, of the same shape.
    """

    total: Float[ArrayLike, "*bins"]
    count: Float[ArrayLike, "*bins"]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Float[Array | np.ndarray, "*bins"]:
        """total / count; NaN where nothing was counted. Known values are divided on the host: there
        `jax.debug_nans`, which stops at each NaN that JAX computes, does not stop at these."""
        return quotient(self.total, self.count)


Metrics: TypeAlias = dict[str, Mean]


def total(metrics: Sequence[Metrics]) -> Metrics:
    """The metrics of several steps, or parts of a step, as if of one: every `Mean` over all that they count.

    **Arguments:** `metrics` at least one, all with the same names.
    """
    return {name: functools.reduce(operator.add, (part[name] for part in metrics)) for name in metrics[0]}


class AbstractObjective(eqx.Module):
    """A loss over a batch."""

    @abc.abstractmethod
    def __call__(
        self, field: AbstractField, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        """The pair `(loss, metrics)`."""


class _Row(eqx.Module):
    """One drawn example: where the field is evaluated, and the velocity of its path."""

    z: Float[Array, "*data"]
    v: Float[Array, "*data"]
    r: Time
    t: Time
    condition: Condition
    dropped: Bool[Array, ""]
    key: Key[Array, ""]


class Objective(AbstractObjective):
    r"""A boundary condition and an identity (Alg. 1, Eq. 9 to 11 with `MeanFlow`). The defaults are the paper's for
    ImageNet.

    `Objective(identity=None, identity_share=0)` is Flow Matching.

    **Arguments:**

    - `identity`: the equation for r < t, or None.
    - `interpolant`: the path.
    - `time_pairs`: the distribution of (r, t). On r = t rows, t is the larger time of the pair (as in the authors'
      ImageNet code), unless `boundary_times` is given.
    - `boundary_times`: a distribution of t for the r = t rows; plain Flow Matching wants it given.
    - `identity_share`: the share of rows that carry the identity ("ratio of r != t", Tab. 1a), a fraction n/k with k <=
      64; the batch must be a multiple of k. 1/4 in the ImageNet experiments, 3/4 for CIFAR-10.
    - `weight`: from an example's error to its weight.
    - `guidance`: None, or how the target is guided; needs `label_dropout`, which names the null condition.
    - `label_dropout`: None, or how the condition is dropped.
    - `velocity`: None, or a function v(z, t, condition) whose value replaces the conditional velocity $v_t$, as target
      and as tangent: a trained Flow Matching field (distillation), or the marginal velocity itself
      (`mf_eqx.exact.MarginalVelocity`), to see what the variance of $v_t$ costs. No gradient enters it. Rows whose
      condition was dropped ask it for the null condition, which a mixture does not know (NaN): wrap it.

    **Metrics**, each a `Mean`: `loss` (weighted); `boundary_error` and `identity_error`, the *raw* mean squared error
    per dimension of rows with r = t and with r < t; `identity_error_by_gap`, the latter in four equal bins of t - r.
    NaN where there was no row.

    **Raises:** `ValueError` where parts contradict each other, or, when called, if the batch is not divisible.
    """

    identity: AbstractIdentity | None = MeanFlow()
    interpolant: AbstractInterpolant = LinearInterpolant()
    time_pairs: TimePairs = TimePairs()
    boundary_times: AbstractTimes | None = None
    identity_share: Fraction = eqx.field(default=Fraction(1, 4), converter=as_share)
    weight: AbstractWeight = AdaptiveWeight()
    guidance: Guidance | None = None
    label_dropout: LabelDropout | None = None
    velocity: Callable[[Float[Array, "*data"], Time, Condition], Float[Array, "*data"]] | None = None

    def __check_init__(self):
        share = self.identity_share
        if self.identity is None and share != 0:
            raise ValueError(f"identity_share must be 0 without an identity (Flow Matching), got {share}")
        if share == 1 and self.identity is not None and self.identity.needs_boundary:
            name = type(self.identity).__name__
            raise ValueError(f"identity_share must be below 1 for {name}, which leaves u(z, t, t) open; got {share}")
        if self.guidance is not None and self.label_dropout is None:
            raise ValueError("label_dropout must be given with guidance: it names the null condition; got None")
        if self.label_dropout is not None and self._drop_probability > 1:
            raise ValueError(
                f"label_dropout.rate must be at most 1 - identity_share = {1 - share}, since only r = t rows are "
                f"dropped; got {self.label_dropout.rate}"
            )

    @property
    def _drop_probability(self) -> float:
        """Of a row that may be dropped at all."""
        assert self.label_dropout is not None
        return self.label_dropout.rate / (1.0 if self._drops_any_row else float(1 - self.identity_share))

    @property
    def _drops_any_row(self) -> bool:
        return self.label_dropout is not None and (not self.label_dropout.boundary_only or self.identity_share == 1)

    def __call__(
        self, field: AbstractField, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        metrics = total([part(field, rows, key=key, context=context)[1] for part, rows in self.parts(batch)])
        return jnp.asarray(metrics["loss"].value), metrics

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        """The rows of each kind, r = t first, with an objective for them alone: the loss is the mean over all rows, so
        losses, gradients and metrics may be computed one part after the other.

        **Raises:** `ValueError` if the batch does not fit.
        """
        self._check(batch)
        identity_rows, boundary_rows = split_rows(batch, self.identity_share)
        parts = [(_Part(self, boundary=True), boundary_rows), (_Part(self, boundary=False), identity_rows)]
        return [(part, rows) for part, rows in parts if rows.index.shape[0]]

    def _check(self, batch: Batch) -> None:
        check_batch_size(batch.index.shape[0], self.identity_share)
        dtype = getattr(batch.x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"x must be one floating-point array here (TrainStep.prepare can make it so), got {dtype}")
        if self.label_dropout is not None:
            given, null = (jax.tree.structure(tree) for tree in (batch.condition, self.label_dropout.null))
            if given != null:
                raise ValueError(f"condition must have the structure of label_dropout.null, {null}; got {given}")
            jax.tree.map(_check_null, self.label_dropout.null, batch.condition)
            if not jax.tree.leaves(batch.condition):
                raise ValueError(f"condition must be given with label_dropout, got {batch.condition}")

    def _evaluate(
        self, field: AbstractField, batch: Batch, boundary: bool, key: Key[Array, ""], context: Context | None
    ) -> Metrics:
        """The metrics of rows of one kind."""
        check_per_example(field)

        def evaluate(row: Batch) -> tuple[Scalar, Scalar, Scalar]:
            drawn = self._draw(row, key, boundary)
            if boundary:
                difference = self._boundary_residual(field, drawn)
            else:
                difference = self._identity_residual(field, drawn, context)
            error = jnp.sum(difference**2)
            loss = jax.lax.stop_gradient(self.weight(error)) * error
            return loss, error / difference.size, drawn.t - drawn.r

        losses, errors, gaps = jax.vmap(evaluate)(batch)
        metrics = {"loss": _mean(losses), **_errors_by_kind(errors, gaps)}
        return metrics if self.identity_share > 0 else {name: metrics[name] for name in ("loss", "boundary_error")}

    def _draw(self, row: Batch, key: Key[Array, ""], boundary: bool) -> _Row:
        eps_key, times_key, drop_key, field_key = jr.split(jr.fold_in(key, row.index), 4)
        x = at_least_float32(row.x)
        r, t = self._draw_times(times_key, boundary)
        r, t = jnp.asarray(r, x.dtype), jnp.asarray(t, x.dtype)
        z, v = self.interpolant.state_and_velocity(x, jr.normal(eps_key, x.shape, x.dtype), t)
        dropped, condition = jnp.asarray(False), row.condition
        if self.label_dropout is not None and (boundary or self._drops_any_row):
            dropped = jr.bernoulli(drop_key, self._drop_probability)
            condition = jax.tree.map(lambda null, c: jnp.where(dropped, null, c), self._null_like(condition), condition)
        if self.velocity is not None:
            v = jax.lax.stop_gradient(self.velocity(z, t, condition).astype(z.dtype))
            if v.shape != z.shape:
                raise ValueError(f"velocity must return the shape of z, {z.shape}, got {v.shape}")
        return _Row(z, v, r, t, condition, dropped, field_key)

    def _draw_times(self, key: Key[Array, ""], boundary: bool) -> tuple[TimeLike, TimeLike]:
        if boundary and self.boundary_times is not None:
            t = self.boundary_times(key=key)
            return t, t
        r, t = self.time_pairs(key=key)
        return (t, t) if boundary else (r, t)

    def _null_like(self, condition: Condition) -> Condition:
        """The null condition as arrays like those of one row."""
        assert self.label_dropout is not None
        return jax.tree.map(
            lambda null, c: jnp.broadcast_to(jnp.asarray(null, c.dtype), c.shape), self.label_dropout.null, condition
        )

    def _boundary_residual(self, field: AbstractField, row: _Row) -> Float[Array, "*data"]:
        u = at_least_float32(field(row.z, row.t, row.t, row.condition, key=row.key))
        if u.shape != row.z.shape:
            raise ValueError(f"field must return the shape of z, {row.z.shape}, got {u.shape}")
        return u - self._guided(field, row, jax.lax.stop_gradient(u))

    def _identity_residual(self, field: AbstractField, row: _Row, context: Context | None) -> Float[Array, "*data"]:
        assert self.identity is not None
        v = row.v
        if self.guidance is not None and self.identity.uses_velocity:
            conditional = None
            if self.guidance.mix != 0:
                conditional = at_least_float32(stopped(field)(row.z, row.t, row.t, row.condition, key=row.key))
            v = self._guided(field, row, conditional)
        residual = self.identity.residual(field, row.z, v, row.r, row.t, row.condition, key=row.key, context=context)
        return at_least_float32(residual)

    def _guided(
        self, field: AbstractField, row: _Row, conditional: Float[Array, "*data"] | None
    ) -> Float[Array, "*data"]:
        """The velocity to regress on: guided (Eq. 21), or plain v where the condition was dropped."""
        if self.guidance is None:
            return row.v
        null = self._null_like(row.condition)
        unconditional = at_least_float32(stopped(field)(row.z, row.t, row.t, null, key=row.key))
        guided = self.guidance.velocity(row.v, conditional, unconditional, row.t)
        return jnp.where(row.dropped, row.v, guided)


class _Part(AbstractObjective):
    """The rows of one kind."""

    objective: Objective
    boundary: bool

    def __call__(
        self, field: AbstractField, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        metrics = self.objective._evaluate(field, batch, self.boundary, key, context)
        return jnp.asarray(metrics["loss"].value), metrics


def _check_null(null: ArrayLike, condition: ArrayLike) -> None:
    """Refuses a null condition that the condition's dtype would turn into another one."""
    dtype, given = jnp.result_type(condition), getattr(null, "dtype", None) or np.asarray(null).dtype
    floats = [jnp.issubdtype(kind, jnp.floating) for kind in (given, dtype)]
    if floats == [True, False]:
        raise ValueError(f"label_dropout.null must be an integer like the condition, got {null}")
    try:
        lost = first_lost(null, dtype)
    except jax.errors.TracerArrayConversionError:  # an argument of the program, of which only the dtype is known
        if not floats[1] and jnp.promote_types(given, dtype) != dtype:
            rule = f"of the condition's dtype {dtype}, or a Python integer"
            raise ValueError(f"label_dropout.null must be {rule}, got an array of {given}") from None
        return
    if lost is not None:
        raise ValueError(f"label_dropout.null must be a number of the condition's dtype {dtype}, got {lost}")


def _mean(values: Float[Array, " batch"]) -> Mean:
    return Mean(jnp.sum(values), jnp.full((), values.size, values.dtype))


def _errors_by_kind(errors: Float[Array, " batch"], gaps: Float[Array, " batch"], bins: int = 4) -> Metrics:
    """Raw errors of rows with r = t, which identity rows may have too, and with r < t, also by equal bins of t - r."""
    bin_of = jnp.where(gaps > 0, jnp.minimum((gaps * bins).astype(int), bins - 1), bins)
    member = bin_of[:, None] == jnp.arange(bins + 1)
    total = jnp.sum(jnp.where(member, errors[:, None], 0), axis=0)  # no product: a NaN must stay in its bin
    count = jnp.sum(member, axis=0, dtype=errors.dtype)
    return {
        "boundary_error": Mean(total[bins], count[bins]),
        "identity_error": Mean(jnp.sum(total[:bins]), jnp.sum(count[:bins])),
        "identity_error_by_gap": Mean(total[:bins], count[:bins]),
    }
