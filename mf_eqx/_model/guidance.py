r"""Guidance as an input of a network: its scale and its interval are chosen at sampling, at one evaluation.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import as_scalar, at_least_float32, Condition, ScalarLike
from .._validate import check_positive, on_host_if_known
from ..nn import ConditionTokens


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
        check_positive("scale", condition.scale)
        scale, start, end = (
            at_least_float32(as_scalar(name, getattr(condition, name), self.scale.vectors))
            for name in ("scale", "start", "end")
        )
        first, last = map(on_host_if_known, (condition.start, condition.end))  # a jit knows numbers of Python only here
        if first is not None and last is not None and not 0 <= first <= last <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start <= end <= 1, got {first} and {last}")
        return jnp.concatenate([self.scale(1 - 1 / scale), self.start(start), self.end(end)])
