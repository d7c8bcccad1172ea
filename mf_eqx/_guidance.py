r"""Classifier-free guidance inside the target (Sec. 4.2, App. B.1): guided samples at one function evaluation.
`GuidedField` applies guidance when sampling, at two evaluations. `DrawnGuidance` is in `_drawn_guidance.py`.

The velocity $v_t$, both in the target and as the tangent of the JVP, is replaced by

$$\tilde v_t = \omega v_t + \kappa\, u(z_t, t, t \mid c) + (1 - \omega - \kappa)\, u(z_t, t, t) \qquad (21),$$

whose fixed point is $v_{cfg} = \omega' v(z_t, t \mid c) + (1 - \omega')\, v(z_t, t)$ (13) with effective scale
$\omega' = \omega / (1 - \kappa)$.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ._custom_types import as_scalar, as_times, Condition, Scalar, Time, TimeLike
from ._field import AbstractField, check_field
from ._label_dropout import check_null, LabelDropout, null_shaped_as
from ._model import check_labels_fit
from ._validate import as_float, check_positive


def as_interval(ends: Sequence[float | int]) -> tuple[float, float]:
    """`ends` as a pair. **Raises:** `ValueError` if they are not two numbers."""
    if np.ndim(ends) != 1 or len(ends) != 2:
        raise ValueError(f"interval must have two ends, got {ends}")
    low, high = map(as_float("an end of interval"), ends)
    return low, high


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
    def null(self, condition: Condition, t: Time, dropout: LabelDropout) -> Condition:
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

    scale: float = eqx.field(converter=as_float("scale"))
    mix: float = eqx.field(default=0.0, converter=as_float("mix"))
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

    def null(self, condition: Condition, t: Time, dropout: LabelDropout) -> Condition:
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
    scale: float = eqx.field(converter=as_float("scale"))
    null: Condition

    def __check_init__(self):
        check_field(self.field)
        check_positive("scale", self.scale, or_zero=True)
        check_null(self.null)
        check_labels_fit("null", self.null, self.field)

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
        null = null_shaped_as(self.null, condition)
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
