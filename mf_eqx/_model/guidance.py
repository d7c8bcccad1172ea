r"""Guidance as an input of a network: its scale and its interval are chosen at sampling, at one evaluation.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._custom_types import as_scalar, Condition, Scalar, ScalarLike
from .._validate import check_positive, described, on_host_if_known
from ..nn import ConditionTokens


class GuidanceCondition(NamedTuple):
    r"""The condition of a network that takes guidance as an input.

    **Arguments:** `label` an integer label, or another condition in its place; `scale` the effective scale of the
    guided velocity (the paper's $\omega$), > 0, 1 for none; `interval` the first and the last time at which it is
    guided (its $t_{min}$, $t_{max}$), an array of shape (2,) or a pair of numbers.
    """

    label: Condition
    scale: ScalarLike = 1.0
    interval: Float[ArrayLike, "2"] | Sequence[ScalarLike] = (0.0, 1.0)


class GuidanceTokens(eqx.Module):
    r"""Tokens of $1 - 1 / \omega$, $t_{min}$ and $t_{max}$, in this order, each by `ConditionTokens` of a number."""

    scale: ConditionTokens
    start: ConditionTokens
    end: ConditionTokens

    def __call__(self, condition: GuidanceCondition) -> Float[Array, "tokens width"]:
        """**Raises:** `ValueError` unless the scale is one number > 0 and the interval two with 0 <= start <= end <= 1,
        as far as their values are known."""
        like = self.scale.vectors
        check_positive("scale", condition.scale)
        scale = as_scalar("scale", condition.scale, like)
        start, end = _as_pair(condition.interval, like)
        return jnp.concatenate([self.scale(1 - 1 / scale), self.start(start), self.end(end)])


def _as_pair(interval: Float[ArrayLike, "2"] | Sequence[ScalarLike], like: Float[Array, "..."]) -> list[Scalar]:
    given: Any = interval if isinstance(interval, Sequence) or np.ndim(interval) == 1 else ()
    ends = [as_scalar(f"interval[{i}]", end, like) for i, end in enumerate(given)]
    if len(ends) != 2:
        raise ValueError(f"interval must be two numbers, got {described(interval)}")
    start, end = map(on_host_if_known, ends)
    if start is not None and end is not None and not 0 <= start <= end <= 1:
        raise ValueError(f"interval must satisfy 0 <= start <= end <= 1, got {start} and {end}")
    return ends
