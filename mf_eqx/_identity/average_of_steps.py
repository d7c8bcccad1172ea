"""Several steps along a field, for equations that go on from a state by the field itself."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .._custom_types import Condition, Time
from .._field import AbstractField
from .._model.guidance import condition_at


def average_of_steps(
    field: AbstractField,
    z: Float[Array, "*data"],
    r: Time,
    t: Time,
    number: int,
    condition: Condition = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*data"]:
    r"""The average velocity $\bar u$ of equal steps along a field: they end at $z - (t - r)\, \bar u$.

    **Arguments:** `field`; `z` the state at `t`; `r <= t` times; `number` of steps; `condition`, a `GuidanceCondition`
    as it is at the times of each step; `key` for dropout, the same in all evaluations.
    """
    times = [r + (t - r) * (1 - i / number) for i in range(number + 1)]
    average = jnp.zeros_like(z)
    for later, earlier in itertools.pairwise(times):
        u = field(z - (t - r) * average, earlier, later, condition_at(condition, earlier, later), key=key)
        average = average + u / number
    return average
