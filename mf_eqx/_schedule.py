"""Schedules: hyper-parameters that change with the training step."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ._custom_types import Scalar, ScalarLike
from ._row import Context
from ._validate import as_float, check_positive, with_checked_scalar

Schedule: TypeAlias = float | Callable[[Int[Array, ""]], ScalarLike]
"""A number, or a function from the number of finished training steps to a number, such as those of `optax.schedules`.
The range of a number is checked; the range of a function is not."""


class SigmoidSchedule(eqx.Module):
    r"""A sigmoid from 1 at the step `start` to 0 at `end`: $1 / (1 + e^{\gamma (2 p - 1) / 2})$ with p the part done.

    **Arguments:** `start` and `end` in steps; `steepness` $\gamma$, 25 in AlphaFlow (arXiv 2510.20771).

    **Raises:** `ValueError` unless start < end and steepness > 0.
    """

    start: int
    end: int
    steepness: float = eqx.field(default=25.0, converter=as_float("steepness"))

    def __check_init__(self):
        if not self.start < self.end:
            raise ValueError(f"end must be > start = {self.start}, got {self.end}")
        check_positive("steepness", self.steepness)

    def __call__(self, step: Int[Array, ""]) -> Scalar:
        fraction = (jnp.asarray(step, float) - self.start) / (self.end - self.start)
        return jax.nn.sigmoid(self.steepness * (0.5 - fraction))


def as_schedule(name: str, minimum: float, maximum: float) -> Callable[[Any], Any]:
    """A converter that returns functions unchanged, and raises `ValueError` for numbers outside [minimum, maximum]."""

    def convert(value: Any) -> Any:
        if callable(value):
            return value
        number = as_float(f"{name}, unless it is a schedule,")(value)
        if not minimum <= number <= maximum:
            raise ValueError(f"{name} must lie in [{minimum:g}, {maximum:g}] or be a schedule, got {value}")
        return number

    return convert


def at_step(schedule: Schedule, context: Context | None) -> Scalar:
    """The value of a schedule at a training step.

    Outside of training (`context` is None, as in metrics) it is the schedule's final value, evaluated at the largest
    step number in int32.
    """
    step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32) if context is None else context.step
    value = schedule(step) if callable(schedule) else schedule
    return jnp.asarray(with_checked_scalar(value, "the value of a schedule"), float)
