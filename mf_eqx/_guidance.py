r"""Classifier-free guidance inside the target (Sec. 4.2, App. B.1): guided samples at one function evaluation.
`GuidedField` applies guidance when sampling, at two evaluations. `DrawnGuidance` is in `_drawn_guidance.py`.

The velocity $v_t$, both in the target and as the tangent of the JVP, is replaced by

$$\tilde v_t = \omega v_t + \kappa\, u(z_t, t, t \mid c) + (1 - \omega - \kappa)\, u(z_t, t, t) \qquad (21),$$

whose fixed point is $v_{cfg} = \omega' v(z_t, t \mid c) + (1 - \omega')\, v(z_t, t)$ (13) with effective scale
$\omega' = \omega / (1 - \kappa)$.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from ._custom_types import as_scalar, as_times, Condition, Scalar, Time, TimeLike
from ._field import AbstractField, check_field
from ._leaves import by_name
from ._model import check_labels
from ._validate import check_positive


def as_interval(ends: Sequence[float | int]) -> tuple[float, float]:
    """`ends` as a pair. **Raises:** `ValueError` if they are not two."""
    if np.ndim(ends) != 1 or len(ends) != 2:
        raise ValueError(f"interval must have two ends, got {ends}")
    return float(ends[0]), float(ends[1])


def check_interval(interval: tuple[float, float]) -> None:
    """Raises a `ValueError` unless `interval` lies in [0, 1], its lower end first."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval must satisfy 0 <= low <= high <= 1, got {interval}")


def guided_velocity(
    v: Float[Array, "*data"],
    conditional: Float[Array, "*data"] | None,
    unconditional: Float[Array, "*data"],
    scale: float | Scalar,
    mix: float | Scalar,
) -> Float[Array, "*data"]:
    r"""$\tilde v_t$ of Eq. 21. `conditional` may be None if `mix` is 0."""
    guided = scale * v + (1 - scale - mix) * unconditional
    return guided if conditional is None else guided + mix * conditional


class AbstractGuidance(eqx.Module):
    """How the velocity that a row learns is guided by velocities of the field itself."""

    @property
    @abc.abstractmethod
    def needs_conditional(self) -> bool:
        """Whether the guided velocity depends on the field's own velocity with the condition."""

    @abc.abstractmethod
    def condition(self, condition: Condition, r: Time, t: Time, *, key: Key[Array, ""]) -> Condition:
        """The condition that the field gets in a row with times r and t."""

    @abc.abstractmethod
    def null(self, condition: Condition, t: Time, dropout: "LabelDropout") -> Condition:
        """The condition of the unconditional pass, for a row whose conditional pass gets `condition`."""

    @abc.abstractmethod
    def velocity(
        self,
        v: Float[Array, "*data"],
        conditional: Float[Array, "*data"] | None,
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        """The guided velocity.

        **Arguments:** `v` conditional velocity of the path; `conditional` and `unconditional` the field's own
        velocities with and without the condition, behind stop-gradient, the former None unless `needs_conditional`;
        `t` time; `condition` of the row.
        """

    @abc.abstractmethod
    def fixed_point(
        self,
        conditional: Float[Array, "*data"],
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        r"""The velocity that a field learns, $v_{cfg} = \omega' v(z_t, t \mid c) + (1 - \omega') v(z_t, t)$ (13), where
        both marginal velocities are known. It is a fixed point: `velocity`, given the marginal v and this velocity as
        `conditional`, returns this velocity.

        **Arguments:** `conditional` and `unconditional` marginal velocity; `t` time; `condition` of the row.
        """


class Guidance(AbstractGuidance):
    r"""Guidance of the training target (Eq. 19 and 21).

    **Arguments:**

    - `scale`: the paper's $\omega$, > 0 and finite ("cfg scale" elsewhere, but see `effective_scale`).
    - `mix`: its $\kappa$, in [0, 1); 0 is Eq. 19 and needs no conditional pass on identity rows.
    - `interval`: interval of t inside which guidance applies, closed at both ends as in the authors' ImageNet code;
      outside it the target is plain $v_t$.

    Values in use: (scale, mix, interval) B/2 and M/2 (1.0, 0.5, (0, 1)); L/2 (0.2, 0.92, (0, 0.8)); XL/2 (0.2, 0.92,
    (0, 0.75)); XL/2+ (1.0, 0.5, (0.3, 0.8)). No guidance at all is `guidance=None`, which costs nothing.
    """

    scale: float = eqx.field(converter=float)
    mix: float = eqx.field(default=0.0, converter=float)
    interval: tuple[float, float] = eqx.field(default=(0.0, 1.0), converter=as_interval)

    def __check_init__(self):
        check_positive("scale", self.scale)
        if not 0 <= self.mix < 1:
            raise ValueError(f"mix must lie in [0, 1), got {self.mix}")
        check_interval(self.interval)

    @property
    def effective_scale(self) -> float:
        r"""$\omega' = \omega / (1 - \kappa)$: the scale of the learned $v_{cfg}$, elsewhere "cfg scale"."""
        return self.scale / (1 - self.mix)

    @property
    def needs_conditional(self) -> bool:
        return self.mix != 0

    def condition(self, condition: Condition, r: Time, t: Time, *, key: Key[Array, ""]) -> Condition:
        return condition

    def null(self, condition: Condition, t: Time, dropout: "LabelDropout") -> Condition:
        return dropout.null_like(condition)

    def velocity(
        self,
        v: Float[Array, "*data"],
        conditional: Float[Array, "*data"] | None,
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        r"""The guided velocity $\tilde v_t$ of Eq. 21.

        **Arguments:** `v` conditional velocity of the path; `conditional` u(z, t, t | c), may be None if `mix` is 0;
        `unconditional` u(z, t, t); `t` time. Both are values already behind stop-gradient. `condition` is not used.

        **Returns:** $\tilde v_t$, or `v` where t lies outside `interval`.
        """
        if conditional is None and self.mix != 0:
            raise ValueError(f"conditional must be given unless mix is 0, got None with mix = {self.mix}")
        guided = guided_velocity(v, conditional, unconditional, self.scale, self.mix)
        return jnp.where(self._is_guided(t), guided, v)

    def fixed_point(
        self,
        conditional: Float[Array, "*data"],
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        guided = guided_velocity(conditional, None, unconditional, self.effective_scale, 0.0)
        return jnp.where(self._is_guided(t), guided, conditional)

    def _is_guided(self, t: TimeLike) -> Bool[Array, ""]:
        (low, high), t = self.interval, as_scalar("t", t)
        return (t >= low) & (t <= high)


class GuidedField(AbstractField):
    r"""Classifier-free guidance at sampling, $w\, u(z, r, t \mid c) + (1 - w)\, u(z, r, t)$: two evaluations.

    For v = u(z, t, t) this is Eq. 13. At r < t it is not the average of the guided v, but it is the only guidance for a
    field that was trained without guidance. Such a field must have learnt the unconditional u at r < t as well
    (`LabelDropout` with `boundary_only` False).

    **Arguments:** `field`; `scale` w, 1 for none ("cfg scale" elsewhere); `null` the condition that means "none",
    broadcast to the shapes of the condition as in `LabelDropout`.

    **Raises:** `ValueError` unless 0 <= scale < infinity; if `null` contains a NumPy integer that does not fit into the
    dtype to which JAX converts it, or is a label that a network of this package lacks; when called, if an array of
    `null` does not broadcast to that of the condition.

    **Reference:** Classifier-Free Diffusion Guidance, Ho and Salimans, 2022, arXiv 2207.12598.
    """

    field: AbstractField
    scale: float = eqx.field(converter=float)
    null: Condition

    def __check_init__(self):
        check_field(self.field)
        check_positive("scale", self.scale, or_zero=True)
        _check_null(self.null)
        check_labels("null", self.null, self.field)

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        r, t = as_times(r, t, z)
        null = _broadcast(self.null, condition)
        with_condition, without = (self.field(z, r, t, c, key=key) for c in (condition, null))
        return self.scale * with_condition + (1 - self.scale) * without


class GuidanceRange(NamedTuple):
    """The guidance with which a field that takes it as an input was trained.

    **Arguments:** `smallest` and `largest` scale; `middle` the time that every interval contained, None if every
    interval was [0, 1].
    """

    smallest: float
    largest: float
    middle: float | None = None

    def contains(self, scale: float, interval: Sequence[float]) -> bool:
        """Whether a scale and an interval are among those of the training."""
        low, high = as_interval(interval)
        is_whole = (low, high) == (0, 1)
        is_drawn = is_whole or (self.middle is not None and 0 <= low <= self.middle <= high <= 1)
        return self.smallest <= scale <= self.largest and is_drawn


class Trained(NamedTuple):
    """Which values of a field an objective trains.

    **Arguments:**

    - `average`: u(z, r, t) for r < t; without it, sample by Euler steps along u(z, t, t).
    - `null_velocity`: u(z, t, t) with the null condition, which guidance needs, also in the target.
    - `null_average`: u(z, r, t) for r < t with the null condition, which a `GuidedField` needs, except by Euler steps.
    - `velocity`: u(z, t, t); without it, Euler steps follow values that were never trained.
    - `ends_at_data`: whether u(z, r, t) for r < t was trained at r = 0 alone; then sample in one step, by
      `sample_consistency`, or by Euler steps.
    - `one_step`: whether u(z, r, t) for r < t was trained at one pair of times alone, as by a `SampleObjective` of one
      step; then sample in this step.
    - `guidance`: for a field that takes guidance as an input, the scales and intervals that were drawn; None if it
      takes none, or if they are not known.
    """

    average: bool
    null_velocity: bool
    null_average: bool
    velocity: bool = True
    ends_at_data: bool = False
    one_step: bool = False
    guidance: GuidanceRange | None = None


class LabelDropout(eqx.Module):
    """Replacement of the condition by "no label", which trains the unconditional velocity that guidance needs.

    Dropped rows regress on plain v (the authors' ImageNet code).

    **Arguments:**

    - `rate`: share of all rows of the batch, 0.1 in the paper.
    - `null`: the condition that means "none": for a field with labels `field.null_label`, otherwise a PyTree with the
      structure of one example's condition, such as a vector of zeros. In a dropped row all arrays of the condition are
      replaced together. Each is broadcast to the shape of the condition's, so that a number is enough, and cast to its
      dtype; an `Objective` refuses other shapes, and a value that the cast would change, such as 300 for uint8 labels.
      Where null may occur in the data, add a flag to the condition: `{"x": x, "given": True}` and `{"x": 0.0, "given":
      False}`.
    - `boundary_only`: whether only r = t rows are dropped, with probability `rate` / (1 - identity share), so that the
      null condition is never trained at r < t. True agrees in expectation with the authors' ImageNet code, which drops
      a prefix of Binomial(B, 0.1) rows, all of them r = t rows. With False any row may be dropped, as in the paper's
      text. With an identity share of 1 any row may be dropped in either case.

    **Raises:** `ValueError` unless 0 <= rate <= 1, or if `null` contains a NumPy integer that does not fit into the
    dtype to which JAX converts it.
    """

    rate: float = eqx.field(converter=float)
    null: Condition
    boundary_only: bool = True

    def __check_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate}")
        _check_null(self.null)

    def null_like(self, condition: Condition) -> Condition:
        """The null condition as arrays of the shapes and dtypes of one row's condition."""
        return jax.tree.map(lambda null, c: jnp.broadcast_to(jnp.asarray(null, c.dtype), c.shape), self.null, condition)


def _broadcast(null: Condition, condition: Condition) -> Condition:
    """The null condition with the shapes of the condition, if it has the same structure."""
    if jax.tree.structure(null) != jax.tree.structure(condition):  # a field may accept several structures
        return null
    conditions = by_name("", condition)
    for name, leaf in by_name("", null).items():
        check_null_shape(f"null{name}", leaf, np.shape(conditions[name]))

    def broadcast(null: Any, c: Any) -> Any:
        return null if np.shape(null) == np.shape(c) else jnp.broadcast_to(null, np.shape(c))

    return jax.tree.map(broadcast, null, condition)


def check_null_shape(name: str, null: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless `null`, which is called `name`, can be broadcast to the shape of one condition."""
    found = np.shape(null)
    if len(found) > len(shape) or any(a not in (1, b) for a, b in zip(found[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must be a number or of shape {shape} as the condition is, got shape {found}")


def _check_null(null: Condition) -> None:
    """Refuses NumPy numbers whose value changes when JAX converts them: 2^32 becomes 0 in int32."""
    for leaf in jax.tree.leaves(null):
        if isinstance(leaf, np.ndarray | np.generic):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            if (changed := first_changed_by_cast(leaf, dtype)) is not None:
                raise ValueError(f"null must be representable in {dtype}, to which JAX converts it, got {changed}")


def first_changed_by_cast(value: ArrayLike | np.generic, dtype: np.dtype) -> Any:
    """The first number in `value` that a cast to `dtype` would change, or None if there is none: an integer out of
    range, a real number that would become infinite, or any complex number. Rounding does not count."""
    value = np.asarray(value)
    if np.iscomplexobj(value):
        changed = np.full(value.shape, True)
    elif jnp.issubdtype(dtype, jnp.floating):
        wide = value.astype(np.float64)
        with np.errstate(over="ignore"):
            changed = np.isfinite(wide) & ~np.isfinite(wide.astype(dtype))
    else:
        low, high = (0, 1) if jnp.issubdtype(dtype, jnp.bool_) else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
        changed = np.asarray((value < low) | (value > high), bool)
    return value[changed][0] if changed.any() else None
