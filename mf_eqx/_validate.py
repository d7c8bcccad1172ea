"""Checks of arguments that several parts share. Values that JAX traces are not known, and pass."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Shaped

Count: TypeAlias = int | np.integer
"""How many there are of something."""


def known(values: Any) -> Shaped[np.ndarray, "..."] | None:
    """`values` on the host, or None where JAX traces them."""
    try:
        return np.asarray(values)
    except jax.errors.TracerArrayConversionError:
        return None


def check_finite(name: str, values: Any) -> None:
    """Raises a `ValueError` unless all `values` are finite."""
    on_host = known(values)
    if on_host is not None and not (finite := np.isfinite(on_host)).all():
        raise ValueError(f"{name} must be finite, got {np.sum(~finite)} values that are not")


def check_positive(name: str, values: Any, *, or_zero: bool = False) -> None:
    """Raises a `ValueError` unless all `values` are > 0, or >= 0 with `or_zero`, and finite."""
    on_host = known(values)
    if on_host is not None and not np.all(np.isfinite(on_host) & ((on_host > 0) | (or_zero & (on_host == 0)))):
        raise ValueError(f"{name} must be {'>= 0' if or_zero else '> 0'} and finite, got {on_host}")


def as_count(name: str, value: Count, least: int = 1) -> int:
    """`value` as an int. **Raises:** `ValueError` unless it is an integer, no truth value, and >= `least`."""
    if not _is_count(value, least):
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def check_sizes(**sizes: Count | Sequence[Count]) -> None:
    """Raises a `ValueError` unless each of these, an integer or several, is >= 1."""
    for name, size in sizes.items():
        if not isinstance(size, Sequence):
            as_count(name, size)
        elif not all(_is_count(one) for one in size):
            raise ValueError(f"{name} must be of integers >= 1, got {size}")


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def quotient(total: ArrayLike, count: ArrayLike) -> Array | np.ndarray:
    """total / count, NaN without a word where both are 0: on the host, unless JAX traces them."""
    dividend, divisor = known(total), known(count)
    if dividend is None or divisor is None:
        return jnp.divide(total, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(dividend, divisor))
