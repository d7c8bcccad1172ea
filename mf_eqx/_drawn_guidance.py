r"""Guidance that is drawn for each row and given to the field as an input, so that its scale and interval are chosen at
sampling, for one evaluation.

The velocity that a row learns is

$$v_g = v_t + \Big(1 - \frac{1}{\omega'}\Big)\, (v_c - v_u), \qquad
\omega' = \omega \text{ for } t_{min} \le t \le t_{max}, \text{ else } 1,$$

with the field's own velocities $v_c$ given the condition, $\omega'$ and the interval [0, 1], and $v_u$ given the null
condition: Eq. 21 of MeanFlow with scale 1 and mix $1 - 1/\omega'$. At each $\omega'$ the fixed point is

$$v_{cfg} = \omega' v(z_t, t \mid c) + (1 - \omega')\, v(z_t, t).$$

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012; the draws, and what the paper leaves open, as in the authors' released code.
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from ._custom_types import as_scalar, as_times, Condition, Scalar, ScalarLike, Time, TimeLike
from ._field import AbstractField, check_field
from ._guidance import AbstractGuidance, as_interval, check_interval, guided_velocity
from ._label_dropout import LabelDropout
from ._model import GuidanceCondition
from ._validate import as_float, check_finite, check_positive, with_checked_scalar


class PowerLawScales(eqx.Module):
    r"""Guidance scales $\omega$ with a density proportional to $\omega^{-\beta}$.

    **Arguments:** `power` the paper's $\beta$, finite: 1 (the default) draws $\log \omega$ uniformly, 2 prefers small
    scales, 0 draws $\omega$ uniformly; `smallest` and `largest` scale, 1 <= smallest <= largest, finite. If they are
    equal, the scale is constant.
    """

    power: float = eqx.field(default=1.0, converter=as_float("power"))
    smallest: float = eqx.field(default=1.0, converter=as_float("smallest"))
    largest: float = eqx.field(default=8.0, converter=as_float("largest"))

    def __check_init__(self):
        check_finite("power", self.power)
        check_finite("largest", self.largest)
        if not 1 <= self.smallest <= self.largest:
            bounds = f"{self.smallest} and {self.largest}"
            raise ValueError(f"smallest and largest must satisfy 1 <= smallest <= largest, got {bounds}")
        if abs(1 - self.power) * math.log(self.largest / self.smallest) > 80:  # beyond it, numbers of float32 overflow
            raise ValueError(f"power must satisfy |1 - power| log(largest / smallest) <= 80, got {self.power}")

    def __call__(self, *, key: Key[Array, ""]) -> Scalar:
        """One draw, by the inverse of the distribution function."""
        uniform, exponent = jr.uniform(key), 1 - self.power
        width = jnp.log(self.largest / self.smallest)
        if exponent == 0:
            return self.smallest * jnp.exp(uniform * width)
        return self.smallest * jnp.exp(jnp.log1p(uniform * jnp.expm1(exponent * width)) / exponent)


class DrawnGuidance(AbstractGuidance):
    r"""Guidance of the training target by a scale and an interval that are drawn for each row and given to the field.

    The field gets a `GuidanceCondition` in place of the condition, so it must be made for it: `InContextDiT`, `DiT`,
    `UNet` or `MLP` with `guidance=True`, or a network of your own. Sample with such a condition, or by `WithGuidance`.
    The defaults are the paper's draws.

    On rows with r = t, where an interval would decide no more than whether the row is guided, it is [0, 1].

    **Arguments:**

    - `scales`: how $\omega$ is drawn, `scales(key=key)`: `PowerLawScales`, or a function of your own with values > 0.5
      (below, the target has no stable fixed point).
    - `middle`: the interval has its start uniformly in [0, middle] and its end uniformly in [middle, 1]. None if it is
      always [0, 1].
    - `unconditional_scale`: whether the pass without a condition gets $\omega'$ as its scale (the paper's Alg. 2)
      instead of 1 (the authors' code). Both are trained to the same value, since rows without a condition learn plain
      $v_t$ at every scale.

    **Raises:** `ValueError` unless 0 <= middle <= 1.
    """

    scales: Callable[..., Scalar] = PowerLawScales()
    middle: float | None = 0.5
    unconditional_scale: bool = False

    def __check_init__(self):
        if not callable(self.scales):
            raise ValueError(f"scales must be called as scales(key=key), such as PowerLawScales(), got {self.scales}")
        if self.middle is not None and not 0 <= self.middle <= 1:
            raise ValueError(f"middle must lie in [0, 1] or be None, got {self.middle}")

    @property
    def needs_conditional(self) -> bool:
        return True

    def condition(self, condition: Condition, r: Time, t: Time, *, key: Key[Array, ""]) -> GuidanceCondition:
        scale_key, start_key, end_key = jr.split(key, 3)
        scale, start, end = with_checked_scalar(self.scales(key=scale_key), "a scale of DrawnGuidance"), 0.0, 1.0
        if self.middle is not None:
            start = self.middle * jr.uniform(start_key)
            end = 1 - (1 - self.middle) * jr.uniform(end_key)
        start, end = jnp.where(r < t, start, 0.0), jnp.where(r < t, end, 1.0)
        return GuidanceCondition(condition, *(jnp.asarray(number, t.dtype) for number in (scale, start, end)))

    def null(self, condition: GuidanceCondition, t: Time, dropout: LabelDropout) -> GuidanceCondition:
        scale = condition.at(t, t).scale if self.unconditional_scale else 1.0
        return GuidanceCondition(dropout.null_like(condition.condition), jnp.asarray(scale, t.dtype))

    def velocity(
        self,
        v: Float[Array, "*data"],
        conditional: Float[Array, "*data"] | None,
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        r"""The guided velocity $v_g$.

        **Arguments:** as for `Guidance`, `conditional` always given; `condition` a `GuidanceCondition`.
        """
        return guided_velocity(v, conditional, unconditional, 1.0, 1 - 1 / _scale_at(condition, t))

    def fixed_point(
        self,
        conditional: Float[Array, "*data"],
        unconditional: Float[Array, "*data"],
        t: TimeLike,
        condition: Condition = None,
    ) -> Float[Array, "*data"]:
        return guided_velocity(conditional, None, unconditional, _scale_at(condition, t), 0.0)


def _scale_at(condition: Condition, t: TimeLike) -> Scalar:
    r"""The scale in force at one time, $\omega'$."""
    if not isinstance(condition, GuidanceCondition):
        raise ValueError(f"condition must be a GuidanceCondition, got {type(condition).__name__}")
    return jnp.asarray(condition.at(t, t).scale)


class WithGuidance(AbstractField):
    """A network that takes guidance as an input, at one scale and interval: a field of the condition alone.

    It makes guided samples at one evaluation for each step; `GuidedField` needs two. Scale and interval are arrays, so
    that a sampler is compiled once for all of them; no gradient reaches them. The velocity head is not used.

    **Arguments:** `field` that takes a `GuidanceCondition`; `scale` > 0, 1 for no guidance, within the scales that were
    drawn in training; `interval` of t inside which the velocity is guided.

    **Raises:** `ValueError` unless scale > 0, finite, and 0 <= low <= high <= 1.
    """

    field: AbstractField
    scale: Scalar
    interval: tuple[Scalar, Scalar]

    def __init__(self, field: AbstractField, scale: ScalarLike, interval: Sequence[float] = (0.0, 1.0)):
        ends = as_interval(interval)
        check_field(field)
        check_positive("scale", as_scalar("scale", scale))
        check_interval(ends)
        self.field, self.scale = field, jnp.asarray(scale, float)
        self.interval = jnp.asarray(ends[0], float), jnp.asarray(ends[1], float)

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
        numbers = jax.lax.stop_gradient((self.scale, *self.interval))
        return self.field(z, r, t, GuidanceCondition(condition, *numbers).at(r, t), key=key)
