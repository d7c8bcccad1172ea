"""Condition, guidance and times as the tokens in front of the patches of an `InContextDiT`."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import normal, variance_scaling
from jaxtyping import Array, Float, Key

from .._custom_types import Condition, Time
from .._validate import check_counts, check_finite, check_kind, described
from ..nn import (
    AbstractConditionEmbedding,
    AbstractConditionTokens,
    ConditionTokens,
    LabelEmbedding,
    ScalarEmbedding,
    TimeVariables,
)
from ..nn._condition_embedding import as_argument, as_embedding
from .guidance import check_has_condition, GuidanceTokens, without_guidance


class TokenCounts(NamedTuple):
    """How many tokens stand for the condition, for the guidance scale, for the start and for the end of the interval
    of guidance, and for each time variable."""

    condition: int = 8
    scale: int = 4
    start: int = 2
    end: int = 2
    time: int = 4


_FAN_IN = variance_scaling(1.0, "fan_in", "normal")


def _number_tokens(count: int, width: int, *, key: Key[Array, ""]) -> ConditionTokens:
    """Tokens of one number."""
    embedding_key, vectors_key = jr.split(key)
    return ConditionTokens(count, width, ScalarEmbedding(width, init=_FAN_IN, key=embedding_key), key=vectors_key)


class InContextEmbedding(eqx.Module):
    """The tokens of the condition, of the guidance and of the time variables, in this order.

    **Arguments:** `width` of a token; `labels`, `condition`, `guidance`, `counts`, `variables`, `time_scale` as for
    `InContextDiT`; `key`.

    **Raises:** `ValueError` if `labels` and `condition` are both given, or `guidance` without either; when called, if
    the condition does not fit them.
    """

    condition: AbstractConditionTokens | None
    guidance: GuidanceTokens | None
    times: tuple[ConditionTokens, ...]
    counts: TokenCounts = eqx.field(static=True)
    variables: TimeVariables = eqx.field(static=True)
    time_scale: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        labels: int | None,
        condition: int | AbstractConditionEmbedding | AbstractConditionTokens | None,
        guidance: bool,
        counts: TokenCounts,
        variables: TimeVariables,
        time_scale: float,
        key: Key[Array, ""],
    ):
        check_kind("tokens", counts, TokenCounts)
        check_counts(tokens=counts)
        check_finite("time_scale", time_scale)
        if labels is not None and condition is not None:
            rule = "labels must be None with a condition, whose tokens may hold a LabelEmbedding"
            raise ValueError(f"{rule}; got {labels}")
        check_has_condition(guidance, labels, condition)
        condition_key, vectors_key, guidance_key, times_key = jr.split(key, 4)
        if isinstance(condition, AbstractConditionTokens):
            self.condition = condition
        else:
            init = normal(width**-0.5)
            label = None if labels is None else LabelEmbedding(labels, width, init=init, key=condition_key)
            embedding = as_embedding(condition, width, init=_FAN_IN, key=condition_key) if label is None else label
            self.condition = (
                None if embedding is None else ConditionTokens(counts.condition, width, embedding, key=vectors_key)
            )
        self.guidance = None
        if guidance:
            keys = jr.split(guidance_key, 3)
            three = zip((counts.scale, counts.start, counts.end), keys, strict=True)
            self.guidance = GuidanceTokens(*(_number_tokens(count, width, key=key) for count, key in three))
        keys = jr.split(times_key, len(variables(jnp.zeros(()), jnp.ones(()))))
        self.times = tuple(_number_tokens(counts.time, width, key=key) for key in keys)
        self.counts, self.variables, self.time_scale = counts, variables, float(time_scale)

    @property
    def label(self) -> LabelEmbedding | None:
        """The embedding of labels, if the condition is a label."""
        embedding = self.condition.embedding if isinstance(self.condition, ConditionTokens) else None
        return embedding if type(embedding) is LabelEmbedding else None

    @property
    def length(self) -> int:
        """The number of tokens.

        **Raises:** `ValueError` with condition tokens of your own, whose number may differ from call to call.
        """
        condition, guidance = self.condition, self.guidance
        if condition is not None and not isinstance(condition, ConditionTokens):
            rule = "labels, a vector, an embedding or None for learned positions"
            raise ValueError(f"condition must be {rule}, got {type(condition).__name__}")
        parts = [condition, *self.times] + ([] if guidance is None else [guidance.scale, guidance.start, guidance.end])
        return sum(len(part.vectors) for part in parts if part is not None)

    @property
    def condition_argument(self) -> int | AbstractConditionEmbedding | AbstractConditionTokens | None:
        """The argument `condition` of which this is made."""
        if not isinstance(self.condition, ConditionTokens):
            return self.condition
        return None if self.label is not None else as_argument(self.condition.embedding)

    def __call__(self, r: Time, t: Time, condition: Condition) -> Float[Array, "tokens width"]:
        parts = []
        inner = without_guidance(condition, self.guidance is not None)
        if (self.condition is None) != (inner is None):
            rule = "None for a field without labels and condition" if self.condition is None else "given for this field"
            raise ValueError(f"condition must be {rule}, got {described(inner)}")
        if self.condition is not None:
            parts.append(self._checked(self.condition(inner)))
        if self.guidance is not None:
            parts.append(self.guidance(condition))
        parts += [tokens(self.time_scale * time) for tokens, time in zip(self.times, self.variables(r, t), strict=True)]
        return jnp.concatenate(parts)

    def _checked(self, tokens: Float[Array, "..."]) -> Float[Array, "tokens width"]:
        width = self.times[0].vectors.shape[1]
        if tokens.ndim != 2 or tokens.shape[1] != width:
            raise ValueError(f"condition must become tokens of shape (tokens, {width}), got shape {tokens.shape}")
        return tokens
