r"""Objectives: from a batch to a loss.

An `Objective` is a boundary condition plus an identity. The batch is split, statically and strided: a share of the rows
carries the identity, the others regress u(z, t, t) on the velocity and never pay for a JVP.

    loss = mean over all rows of sg(w(error)) error,   error = sum over dimensions of residual^2

Guidance costs no more passes than necessary. On r = t rows the conditional value is the loss's own output, so only the
unconditional pass is extra. On identity rows both values come from a copy of the field behind stop-gradient; the
conditional one is computed only if `Guidance.mix` is not 0, and an identity along the predicted velocity, such as
`ImprovedMeanFlow`, reuses it.

A velocity head, if the field has one, learns the same (guided) velocity v as u(z, t, t), with the same weight:

    loss of a row = sg(w(error of u)) error of u + sg(w(error of v)) error of v

on r = t rows, and on identity rows of an `AbstractIdentityWithVelocity`. Guidance then takes the head's values.
Perceptual terms are added to the loss of a row.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ._abstract_objective import AbstractMeanObjective, AbstractObjective
from ._batch import Batch, check_batch, check_eps
from ._custom_types import at_least_float32, Scalar
from ._drawn_guidance import DrawnGuidance, PowerLawScales
from ._field import (
    AbstractField,
    check_field,
    has_velocity_head,
    instantaneous_velocity,
    stopped,
    Velocity,
    with_checked_shapes,
)
from ._guidance import AbstractGuidance, GuidanceRange
from ._identity import (
    AbstractIdentity,
    AbstractIdentityWithLoss,
    AbstractIdentityWithVelocity,
    Facts,
    MeanFlow,
)
from ._interpolant import AbstractInterpolant, LinearInterpolant
from ._label_dropout import LabelDropout
from ._mean import errors_by_kind, mean_of, Metrics, total
from ._model import check_labels_fit, XPrediction
from ._model.guidance import condition_at
from ._perceptual import PerceptualTerm
from ._row import Context, Drawing, Row
from ._stable_target import StableTarget
from ._times import AbstractTimes, as_share, check_batch_size, rows_per_group, split_rows, TimePairs
from ._trained import Trained
from ._validate import as_float, check_key, check_kind, with_checked_scalar
from ._weight import AbstractWeight, AdaptiveWeight, weight_of

_KINDS = {
    "identity": AbstractIdentity,
    "interpolant": AbstractInterpolant,
    "time_pairs": TimePairs,
    "boundary_times": AbstractTimes,
    "weight": AbstractWeight,
    "guidance": AbstractGuidance,
    "label_dropout": LabelDropout,
    "stable_target": StableTarget,
}
"""The parts of an objective."""


def _as_terms(terms: Sequence[PerceptualTerm]) -> tuple[PerceptualTerm, ...]:
    """`terms` as a tuple. **Raises:** `ValueError` unless they are a list or a tuple of `PerceptualTerm`."""
    if not isinstance(terms, Sequence) or not all(isinstance(term, PerceptualTerm) for term in terms):
        raise ValueError(f"perceptual must be a list of PerceptualTerm, got {terms!r:.100}")
    return tuple(terms)


class Objective(AbstractObjective):
    r"""A boundary condition and an identity (with `MeanFlow`: Alg. 1 and Eq. 9 to 11 of arXiv 2505.13447). The defaults
    are that paper's for ImageNet; `Objective(method, **method.facts.paper_settings)` has those of another method's
    paper, if they are known.

    `Objective(identity=None, identity_share=0)` is Flow Matching.

    **Arguments:**

    - `identity`: the equation for r < t, or None.
    - `interpolant`: the path.
    - `time_pairs`: the distribution of (r, t). On r = t rows, t is the larger time of the pair (as in the authors'
      ImageNet code), unless `boundary_times` is given.
    - `boundary_times`: a distribution of t for the r = t rows; it should be given for plain Flow Matching.
    - `identity_share`: the share of rows that carry the identity ("ratio of r != t", Tab. 1a), a fraction n/k with k <=
      64; the batch must be a multiple of k. 1/4 in the ImageNet experiments, 3/4 for CIFAR-10.
    - `weight`: the function from an example's error to its weight.
    - `guidance`: None, or how the target is guided: by one `Guidance`, or by a `DrawnGuidance` that the field gets as
      an input; needs `label_dropout`, which names the null condition.
    - `label_dropout`: None, or how the condition is dropped.
    - `velocity`: None, or what replaces the conditional velocity $v_t$, as target and as tangent: a trained field,
    whose
      u(z, t, t) or velocity head it is (distillation), or a function v(z, t, condition), such as the marginal velocity
      itself (`mf_eqx.exact.MarginalVelocity`), to measure the effect of the variance of $v_t$. No gradient passes
      through it, and a field is evaluated without dropout. It must be the velocity of the path, without the factor of
      `smallest_time`: an `XPrediction` has that factor already and would get it twice. For rows whose condition was
      dropped, it gets the null condition; an exact mixture returns NaN for a label that it does not have, so wrap it.
    - `stable_target`: None, or reference data from which $v_t$ is estimated with less variance than from the row's own
      x alone.
    - `exact_guidance`: whether `guidance` takes the velocities of `stable_target` with and without the label, in place
      of the field's own: the target is then the fixed point of guidance. It costs no evaluation of the field, and does
      not multiply the field's errors by scale - 1. Needs a `stable_target` of all references, with labels.
    - `smallest_time`: $t_0$ in [0, 1): rows learn the velocity $\min(1, t / t_0)\, v_t$, on the straight path $(z_t -
      x) / \max(t, t_0)$, the target that an `XPrediction` with the same $t_0$ needs. 0.05 in its paper; 0 for $v_t$
      itself. The field learns the exact average of this velocity. For $t \ge t_0$ it is $v_t$; below, the flow is
      slower, so that a sample at r = 0 keeps a part of the noise: $t_0 / e$ of it for data at one point.
    - `perceptual`: `PerceptualTerm`s, none by default. They need an identity that gives its u, an
      `AbstractIdentityWithVelocity`, or none.

    **Metrics**, each a `Mean`: `loss` (weighted); `boundary_error` and `identity_error`, the *raw* mean squared error
    per dimension of rows with r = t and with r < t; `identity_error_by_gap`, the latter in four equal bins of t - r;
    `velocity_error`, for a field with a velocity head, that of the head on the rows that train it; `perceptual_loss`,
    if there are such terms, their part of the loss. A mean over no rows is NaN.

    **Raises:** `ValueError` if arguments contradict each other, or, when called, if the batch is not divisible, or if
    the field is an `XPrediction` with another `smallest_time`.
    """

    identity: AbstractIdentity | None = MeanFlow()
    interpolant: AbstractInterpolant = LinearInterpolant()
    time_pairs: TimePairs = TimePairs()
    boundary_times: AbstractTimes | None = None
    identity_share: Fraction = eqx.field(default=Fraction(1, 4), converter=as_share)
    weight: AbstractWeight = AdaptiveWeight()
    guidance: AbstractGuidance | None = None
    label_dropout: LabelDropout | None = None
    velocity: Velocity | None = None
    stable_target: StableTarget | None = None
    exact_guidance: bool = False
    smallest_time: float = eqx.field(default=0.0, converter=as_float("smallest_time"))
    perceptual: tuple[PerceptualTerm, ...] = eqx.field(default=(), converter=_as_terms)

    def __check_init__(self):
        for name, kind in _KINDS.items():
            if (part := getattr(self, name)) is not None:
                check_kind(name, part, kind)
        share = self.identity_share
        if self.identity is None and share != 0:
            raise ValueError(f"identity_share must be 0 without an identity (Flow Matching), got {share}")
        facts, name = self._facts, type(self.identity).__name__
        check_kind(f"facts of {name}", facts, Facts)
        if share == 1 and facts.degenerate:
            raise ValueError(f"identity_share must be below 1 for {name}, which does not fix u(z, t, t); got {share}")
        if facts.group > 1 and not isinstance(self.identity, AbstractIdentityWithLoss):
            raise ValueError(f"group must be 1 for {name}, which is no AbstractIdentityWithLoss; got {facts.group}")
        if facts.group > 1 and facts.uses_velocity and self.guidance is not None:
            raise ValueError(f"guidance must be None for {name}, whose rows share times; got {self.guidance}")
        for part in ("guidance", "velocity", "stable_target"):
            if facts.uses_pair and (given := getattr(self, part)) is not None:
                raise ValueError(f"{part} must be None for {name}, which learns from x and eps alone; got {given}")
        if facts.needs_velocity and self.velocity is None:
            raise ValueError(f"velocity must be given for {name}, which learns from a known one; got None")
        if facts.needs_velocity and self.guidance is not None:
            rule = f"be None for {name}; guide the velocity itself, by a GuidedField"
            raise ValueError(f"guidance must {rule}; got {self.guidance}")
        self._check_options_of_pixels()
        if self.velocity is not None and self.stable_target is not None:
            raise ValueError("stable_target must be None with a velocity, which replaces it; got both")
        if self.exact_guidance:
            self._check_exact_guidance()
        if self.guidance is not None and self.label_dropout is None:
            raise ValueError("label_dropout must be given with guidance: it names the null condition; got None")
        if self.label_dropout is not None and self._drop_probability > 1:
            raise ValueError(
                f"label_dropout.rate must be at most 1 - identity_share = {1 - share}, since only r = t rows are "
                f"dropped; got {self.label_dropout.rate}"
            )

    def _check_exact_guidance(self) -> None:
        target = self.stable_target
        if self.guidance is None or target is None:
            missing = "guidance" if self.guidance is None else "stable_target"
            raise ValueError(f"{missing} must be given with exact_guidance, got None")
        if target.label is None or target.number is not None:
            found = "no labels" if target.label is None else f"number = {target.number}"
            raise ValueError(f"stable_target must be of all references, with labels, for exact_guidance; got {found}")

    def _check_options_of_pixels(self) -> None:
        name, given = type(self.identity).__name__, self.smallest_time
        if not 0 <= given < 1:
            raise ValueError(f"smallest_time must lie in [0, 1), got {given}")
        if given > 0 and not isinstance(self.interpolant, LinearInterpolant):
            kind = type(self.interpolant).__name__
            raise ValueError(f"smallest_time must be 0 for any path but LinearInterpolant, got {given} and {kind}")
        if given > 0 and (self._facts.uses_pair or self._facts.needs_velocity):
            source = "x and eps" if self._facts.uses_pair else "a known velocity"
            raise ValueError(f"smallest_time must be 0 for {name}, which learns from {source} alone; got {given}")
        if self.perceptual and not isinstance(self.identity, AbstractIdentityWithVelocity | None):
            rule = "be empty for an identity that is no AbstractIdentityWithVelocity"
            raise ValueError(f"perceptual must {rule}, got {len(self.perceptual)} terms for {name}")

    @property
    def _drop_probability(self) -> float:
        """The probability that a row is dropped, among the rows that may be dropped."""
        if self.label_dropout is None:
            return 0.0
        return self.label_dropout.rate / (1.0 if self._drops_any_row else float(1 - self.identity_share))

    @property
    def _drops_any_row(self) -> bool:
        return self.label_dropout is not None and (not self.label_dropout.boundary_only or self.identity_share == 1)

    def __call__(
        self, field: AbstractField, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        """The pair `(loss, metrics)`."""
        loss, (metrics, _) = self.evaluate(field, batch, None, key=key, context=context)
        return loss, metrics

    def evaluate(
        self, field: AbstractField, batch: Batch, state: None, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, None]]:
        parts = [part.evaluate(field, rows, None, key=key, context=context) for part, rows in self.parts(batch)]
        metrics = total([metrics for _, (metrics, _) in parts])
        return jnp.asarray(metrics["loss"].value), (metrics, None)

    def init(self) -> None:
        return None

    @property
    def divisor(self) -> int:
        return rows_per_group(self.identity_share, self._facts.group)

    @property
    def needs_teacher(self) -> bool:
        return self._facts.needs_teacher

    @property
    def trained(self) -> Trained:
        """Which values of a field it trains, for those who sample later."""
        facts, drops = self._facts, self._drop_probability > 0
        average, from_noise = self.identity_share > 0, self.time_pairs.at_noise == 1
        velocity = self.identity_share < 1 or (facts.trains_velocity and not from_noise)
        return Trained(
            average=average,
            null_velocity=velocity and drops,
            null_average=average and drops and self._drops_any_row,
            velocity=velocity,
            ends_at_data=average and (facts.ends_at_data or self.time_pairs.at_data == 1),
            one_step=average and from_noise,
            guidance=_guidance_range(self.guidance),
        )

    @property
    def _facts(self) -> Facts:
        return Facts() if self.identity is None else self.identity.facts

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        """The rows of each kind, r = t first. **Raises:** `ValueError` if the batch does not meet the requirements."""
        self._check(batch)
        identity_rows, boundary_rows = split_rows(batch, self.identity_share)
        parts = [(_Part(self, boundary=True), boundary_rows), (_Part(self, boundary=False), identity_rows)]
        return [(part, rows) for part, rows in parts if rows.index.shape[0]]

    def _check(self, batch: Batch) -> None:
        check_batch("batch", batch)
        check_batch_size(batch.index.shape[0], self.identity_share, group=self._facts.group)
        dtype = getattr(batch.x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"x must be one floating-point array here (TrainStep.prepare can convert it), got {dtype}")
        check_eps(batch)
        if self.stable_target is not None and batch.eps is not None:
            raise ValueError(
                "stable_target must be None for batches with eps, since it is for Gaussian noise; got both"
            )
        if self.label_dropout is not None:
            self.label_dropout.check(batch.condition)

    def _evaluate(
        self, field: AbstractField, batch: Batch, boundary: bool, key: Key[Array, ""], context: Context | None
    ) -> Metrics:
        """The metrics of rows of one kind."""
        check_field(field)
        check_key(key)
        if self._facts.needs_velocity_head and not has_velocity_head(field):
            rule = f"have a velocity head (AbstractFieldWithVelocity) for {type(self.identity).__name__}"
            raise ValueError(f"field must {rule}, got {type(field).__name__} without one")
        if isinstance(field, XPrediction) and field.smallest_time != self.smallest_time:
            rule = f"be {field.smallest_time}, that of the XPrediction, whose velocities are bounded by it"
            raise ValueError(f"smallest_time must {rule}, got {self.smallest_time}")
        if self.label_dropout is not None:
            check_labels_fit("label_dropout.null", self.label_dropout.null, field)
        draw, group = self._drawing(boundary), 1 if boundary else self._facts.group

        def evaluate(example: Batch) -> tuple[Scalar, Scalar, Scalar, Scalar | None, Scalar | None]:
            row = draw(example, key, context)
            term = (self._boundary_term if boundary else self._identity_term)(field, row)
            velocity_error = None if term.velocity_residual is None else _per_dimension(term.velocity_residual)
            return term.loss, _per_dimension(term.residual), row.t - row.r, velocity_error, term.perceptual

        def evaluate_group(examples: Batch) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
            rows = draw.group(examples, key, context)
            residuals, loss = self._residual_and_loss(field, rows)
            return jnp.broadcast_to(loss, (group,)), jax.vmap(_per_dimension)(residuals), rows.t - rows.r

        velocity_errors = perceptual = None
        if group == 1:
            losses, errors, gaps, velocity_errors, perceptual = jax.vmap(evaluate)(batch)
        else:
            groups = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), batch)
            losses, errors, gaps = (values.reshape(-1) for values in jax.vmap(evaluate_group)(groups))
        metrics = {"loss": mean_of(losses), **errors_by_kind(errors, gaps)}
        if has_velocity_head(field):
            metrics["velocity_error"] = mean_of(losses[:0] if velocity_errors is None else velocity_errors)
        if perceptual is not None:
            metrics["perceptual_loss"] = mean_of(perceptual)
        if self.identity_share == 0:
            del metrics["identity_error"], metrics["identity_error_by_gap"]
        return metrics

    def _drawing(self, boundary: bool) -> Drawing:
        """How rows of one kind are drawn."""
        return Drawing(
            is_boundary=boundary,
            ends_at_data=self._facts.ends_at_data,
            path=self.interpolant,
            time_pairs=self.time_pairs,
            boundary_times=self.boundary_times,
            drop_probability=self._drop_probability if boundary or self._drops_any_row else 0.0,
            label_dropout=self.label_dropout,
            guidance=self.guidance,
            velocity=self.velocity,
            stable_target=self.stable_target,
            exact_guidance=self.exact_guidance,
            smallest_time=self.smallest_time,
            with_data=bool(self.perceptual),
            with_pair=self.guidance is None and self.velocity is None and self.stable_target is None,
        )

    def _boundary_term(self, field: AbstractField, row: Row) -> "_Term":
        """What a row with r = t contributes: u(z, t, t) = v, and the same for the velocity head."""
        u, v = _average_and_velocity(field, row)
        target = self._guided(field, row, jax.lax.stop_gradient(u if v is None else v))
        return self._term(u - target, row, u, None if v is None else v - target)

    def _identity_term(self, field: AbstractField, row: Row) -> "_Term":
        """What a row that carries the identity contributes."""
        identity, name, row = self.identity, type(self.identity).__name__, self._with_guided_velocity(field, row)
        assert identity is not None
        if isinstance(identity, AbstractIdentityWithLoss):
            return _Term(*self._residual_and_loss(field, row))
        if not isinstance(identity, AbstractIdentityWithVelocity):
            residual = with_checked_shapes(identity.residual(field, row), row.z, name)
            return self._term(at_least_float32(residual), row)
        values: Any = tuple(identity.residual_and_values(field, row))
        residual, u, v = with_checked_shapes(values, row.z, name, several=True)
        velocity_residual = None if v is None else at_least_float32(v) - row.v
        return self._term(at_least_float32(residual), row, at_least_float32(u), velocity_residual)

    def _residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        """The residual and the loss of a row; of a group of rows, their residuals and their mean loss."""
        assert isinstance(self.identity, AbstractIdentityWithLoss)
        residual, loss = self.identity.residual_and_loss(field, row)
        name = type(self.identity).__name__
        loss = with_checked_scalar(loss, f"the loss of {name}", differentiable=True)
        return with_checked_shapes(residual, row.z, name), jnp.asarray(loss)

    def _term(
        self,
        residual: Float[Array, "*data"],
        row: Row,
        u: Float[Array, "*data"] | None = None,
        velocity_residual: Float[Array, "*data"] | None = None,
    ) -> "_Term":
        """The errors of u and of the velocity head, each with its weight, and the perceptual terms of u."""
        loss, perceptual = self._weighted(residual, row), None
        if velocity_residual is not None:
            loss = loss + self._weighted(velocity_residual, row)
        if self.perceptual and u is not None:
            perceptual = jnp.sum(jnp.stack([term(row, u) for term in self.perceptual]))
            loss = loss + perceptual
        return _Term(residual, loss, velocity_residual, perceptual)

    def _weighted(self, residual: Float[Array, "*data"], row: Row) -> Scalar:
        error = jnp.sum(residual**2)
        return weight_of(self.weight, error, row) * error

    def _with_guided_velocity(self, field: AbstractField, row: Row) -> Row:
        if self.guidance is None or self.exact_guidance or not self._facts.uses_velocity:
            return row
        predicted = at_least_float32(row.own_velocity(field)) if self.guidance.needs_conditional else None
        guided = self._guided(field, row, predicted)
        return eqx.tree_at(
            lambda row: (row.v, row.predicted), row, (guided, predicted), is_leaf=lambda node: node is None
        )

    def _guided(
        self, field: AbstractField, row: Row, conditional: Float[Array, "*data"] | None
    ) -> Float[Array, "*data"]:
        """The velocity to regress on: guided (Eq. 21), or plain v where the condition was dropped."""
        if self.guidance is None or self.label_dropout is None or self.exact_guidance:  # then v is guided already
            return row.v
        null = self.guidance.null(row.condition, row.t, self.label_dropout)
        own = instantaneous_velocity(stopped(field), row.z, row.t, null, key=row.key)
        guided = self.guidance.velocity(row.v, conditional, at_least_float32(own), row.t, row.condition)
        guided = with_checked_shapes(guided, row.z, type(self.guidance).__name__)
        return jnp.where(row.dropped, row.v, guided)


class _Term(NamedTuple):
    """What a row contributes to the loss: the residual of u, the loss, the error of the velocity head, and the part of
    the loss that is perceptual."""

    residual: Float[Array, "*data"]
    loss: Scalar
    velocity_residual: Float[Array, "*data"] | None = None
    perceptual: Scalar | None = None


def _average_and_velocity(field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Float[Array, "*data"] | None]:
    """u(z, t, t), and v(z, t) of the velocity head if there is one, in one evaluation."""
    if not has_velocity_head(field):
        return at_least_float32(with_checked_shapes(row.evaluate(field, row.z, row.t, row.t), row.z)), None
    condition = condition_at(row.condition, row.t, row.t)
    pair = field.with_velocity(row.z, row.t, row.t, condition, key=row.key)
    u, v = with_checked_shapes(pair, row.z, several=True)
    return at_least_float32(u), at_least_float32(v)


def _guidance_range(guidance: AbstractGuidance | None) -> GuidanceRange | None:
    """The scales and intervals of a `DrawnGuidance`, None where they are those of a function of the user's own."""
    if not isinstance(guidance, DrawnGuidance) or not isinstance(guidance.scales, PowerLawScales):
        return None
    return GuidanceRange(guidance.scales.smallest, guidance.scales.largest, guidance.middle)


def _per_dimension(residual: Float[Array, "*data"]) -> Scalar:
    """The mean squared error."""
    return jnp.sum(residual**2) / residual.size


class _Part(AbstractMeanObjective):
    """The objective on rows of one kind, r = t or r < t."""

    objective: Objective
    boundary: bool

    def __call__(
        self, field: AbstractField, batch: Batch, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, Metrics]:
        metrics = self.objective._evaluate(field, batch, self.boundary, key, context)
        return jnp.asarray(metrics["loss"].value), metrics
