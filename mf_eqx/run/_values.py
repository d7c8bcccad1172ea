"""Metrics as plain numbers on the host."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import ArrayLike

from .._mean import Mean

Value: TypeAlias = int | float | list[Any]
"""A number, or nested lists of numbers for a metric in bins."""


def fetch(metrics: Mapping[str, Mean | ArrayLike]) -> dict[str, Value]:
    """Metrics fetched from the device in one transfer. Waits for the step that computes them.

    **Arguments:** `metrics` by name: a `Mean` (its value is taken, NaN where nothing was counted), an array, a number.

    **Returns:** the same names with plain Python numbers, in lists for metrics that have axes.
    """
    return {name: _plain(value) for name, value in jax.device_get(dict(metrics)).items()}


def _plain(value: Mean | ArrayLike) -> Value:
    if isinstance(value, Mean):
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.divide(value.total, value.count)
    return np.asarray(value).tolist()


def short(value: float) -> str:
    """`value` with four significant digits, without an exponent where that is readable."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
