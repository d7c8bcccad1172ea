"""Means as (total, count), which add up over micro-batches, devices and steps to the mean over all rows."""

import functools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ._validate import quotient

_BINS = 4
"""Of t - r, for metrics."""


class Mean(eqx.Module):
    """A mean as (total, count), so that the means of micro-batches and devices add up to the mean of the whole batch.

    **Arguments:** `total` sum of the values; `count` number of the values, of the same shape.
    """

    total: Float[ArrayLike, "*bins"]
    count: Float[ArrayLike, "*bins"]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Float[Array | np.ndarray, "*bins"]:
        """total / count; NaN where count is 0. Values that are not traced are divided on the host, so that
        `jax.debug_nans`, which raises at each NaN that JAX computes, does not raise here."""
        return quotient(self.total, self.count)


Metrics: TypeAlias = dict[str, Mean]


def total(metrics: Sequence[Metrics]) -> Metrics:
    """The metrics of several steps, or of several parts of a step, combined: each `Mean` is over all their values.

    **Arguments:** `metrics` at least one, all with the same names.
    """
    return {name: functools.reduce(operator.add, (part[name] for part in metrics)) for name in metrics[0]}


def mean_of(values: Float[Array, " batch"]) -> Mean:
    """The mean over all rows."""
    return Mean(jnp.sum(values), jnp.full((), values.size, values.dtype))


def errors_by_kind(errors: Float[Array, " batch"], gaps: Float[Array, " batch"]) -> Metrics:
    """Raw errors of rows with r = t (identity rows may be among them) and with r < t, also in equal bins of t - r."""
    bin_of = jnp.where(gaps > 0, jnp.minimum((gaps * _BINS).astype(int), _BINS - 1), _BINS)
    member = bin_of[:, None] == jnp.arange(_BINS + 1)
    total = jnp.sum(jnp.where(member, errors[:, None], 0), axis=0)  # not `member * errors`: a NaN must stay in its bin
    count = jnp.sum(member, axis=0, dtype=errors.dtype)
    return {
        "boundary_error": Mean(total[_BINS], count[_BINS]),
        "identity_error": Mean(jnp.sum(total[:_BINS]), jnp.sum(count[:_BINS])),
        "identity_error_by_gap": Mean(total[:_BINS], count[:_BINS]),
    }
