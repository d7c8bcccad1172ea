r"""Guidance as an input of a network: its scale and its interval are chosen at sampling, at one evaluation.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar, at_least_float32, Condition, Scalar, ScalarLike, TimeLike
from .._validate import check_positive, described, on_host_if_known
from ..nn import ConditionEmbedding, ConditionTokens, ScalarEmbedding


class GuidanceCondition(NamedTuple):
    r"""The condition of a network that takes guidance as an input.

    **Arguments:** `condition` an integer label, or what else the network is conditioned on; `scale` the effective scale
    of the guided velocity (the paper's $\omega$), > 0, 1 for none; `start` and `end` the first and the last time at
    which the velocity is guided (its $t_{min}$, $t_{max}$). In a batch, each has one value a row.
    """

    condition: Condition
    scale: ScalarLike = 1.0
    start: ScalarLike = 0.0
    end: ScalarLike = 1.0

    def at(self, r: TimeLike, t: TimeLike) -> "GuidanceCondition":
        """The condition with which u(z, r, t) is trained and evaluated.

        For r < t it is this condition. At r = t, where u is the velocity at one time, all that matters is whether the
        interval contains t: the condition is then the scale in force at t, which is 1 outside the interval, with the
        interval [0, 1].

        **Raises:** `ValueError` unless scale > 0 and 0 <= start <= end <= 1, as far as their values are known.
        """
        _check(self)
        is_average = jnp.asarray(r) < t
        is_guided = is_average | ((jnp.asarray(self.start) <= t) & (t <= jnp.asarray(self.end)))
        numbers = (is_guided, self.scale, 1.0), (is_average, self.start, 0.0), (is_average, self.end, 1.0)
        return GuidanceCondition(self.condition, *(jnp.where(*number) for number in numbers))


def condition_at(condition: Condition, r: TimeLike, t: TimeLike) -> Condition:
    """`GuidanceCondition.at` of a `GuidanceCondition`; any other condition as it is."""
    return condition.at(r, t) if isinstance(condition, GuidanceCondition) else condition


class GuidanceTokens(eqx.Module):
    r"""Tokens of $1 - 1 / \omega$, $t_{min}$ and $t_{max}$, in this order, each by `ConditionTokens` of a number."""

    scale: ConditionTokens
    start: ConditionTokens
    end: ConditionTokens

    def __call__(self, condition: GuidanceCondition) -> Float[Array, "tokens width"]:
        """Computed in float32 or better.

        **Raises:** `ValueError` unless scale, start and end are one number each with scale > 0 and 0 <= start <= end <=
        1, as far as their values are known.
        """
        scale, start, end = _numbers(condition, self.scale.vectors)
        return jnp.concatenate([self.scale(scale), self.start(start), self.end(end)])


class GuidanceEmbedding(eqx.Module):
    r"""The sum of the embeddings of $1 - 1 / \omega$, $t_{min}$ and $t_{max}$, which a network adds to those of times
    and condition.

    **Arguments:** as for `mf_eqx.nn.ScalarEmbedding`.
    """

    scale: ScalarEmbedding
    start: ScalarEmbedding
    end: ScalarEmbedding

    def __init__(self, width: int, *, size: int, init: jax.nn.initializers.Initializer, key: Key[Array, ""]):
        self.scale, self.start, self.end = (
            ScalarEmbedding(width, size=size, init=init, key=key) for key in jr.split(key, 3)
        )

    def __call__(self, condition: GuidanceCondition) -> Float[Array, " width"]:
        """Computed in float32 or better. **Raises:** as `GuidanceTokens`."""
        scale, start, end = _numbers(condition, self.scale.out.weight)
        return self.scale(scale) + self.start(start) + self.end(end)


def embed(
    embedding: ConditionEmbedding,
    guidance: GuidanceEmbedding | None,
    r: TimeLike,
    t: TimeLike,
    condition: Condition,
) -> Float[Array, " width"]:
    """The embedding of times and condition, and of the guidance if the network takes it."""
    inner = without_guidance(condition, guidance is not None)
    embedded = embedding(r, t, inner)
    return embedded if guidance is None else embedded + guidance(condition)


def without_guidance(condition: Condition, takes_guidance: bool) -> Condition:
    """What a network is conditioned on besides guidance.

    **Raises:** `ValueError` for a network that takes guidance unless the condition is a `GuidanceCondition`, and for
    any other network if it is one.
    """
    if takes_guidance != isinstance(condition, GuidanceCondition):
        rule, without = ("no GuidanceCondition", "out") if not takes_guidance else ("a GuidanceCondition", "")
        hint = " (WithGuidance samples, DrawnGuidance trains)" if takes_guidance else ""
        found = f"got {described(condition)}{hint}"
        raise ValueError(f"condition must be {rule} for a field with{without} guidance, {found}")
    return condition.condition if takes_guidance else condition


def check_has_condition(guidance: bool, labels: int | None, condition: object) -> None:
    """Raises a `ValueError` if a network without labels and condition is to take guidance."""
    if guidance and labels is None and condition is None:
        raise ValueError("guidance must be False for a field without labels and condition, got True")


def _check(condition: GuidanceCondition) -> None:
    check_positive("scale", condition.scale)
    # On the host: `jnp.asarray` would make tracers of Python's numbers inside jit.
    first, last = map(on_host_if_known, (condition.start, condition.end))
    if first is not None and last is not None and not ((first >= 0) & (first <= last) & (last <= 1)).all():
        raise ValueError(f"start and end must satisfy 0 <= start <= end <= 1, got {first} and {last}")


def _numbers(condition: GuidanceCondition, like: Float[Array, "..."]) -> tuple[Scalar, Scalar, Scalar]:
    r"""$1 - 1 / \omega$, $t_{min}$ and $t_{max}$, in float32 or better."""
    _check(condition)
    scale, start, end = (
        at_least_float32(as_scalar(name, getattr(condition, name), like)) for name in ("scale", "start", "end")
    )
    return 1 - 1 / scale, start, end
