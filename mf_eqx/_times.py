r"""Time samplers: at which (r, t) an objective is evaluated, and which rows carry its identity.

Three independent choices:

1. a distribution of one time (`UniformTimes`, `LogitNormalTimes`);
2. how two draws become a pair r <= t (`TimePairs`): sorted draws of one distribution, t and r from two distributions
   with r = min(r, t), or first the gap t - r and then r; optionally r = t with a given probability;
3. which rows of a batch carry the identity at all: the static strided split (`split_rows`).

The authors' codes mix 2 and 3: their ImageNet code sets r = t on a prefix of each device's batch, their CIFAR-10 code
at random for every row, and both compute the JVP for every row. With a static split no JVP is computed for rows with
r = t; with a strided split a data-sharded batch is divided without moving rows between devices.
"""

import abc
import math
from fractions import Fraction
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Key

from ._custom_types import Time
from ._validate import as_float, check_finite, check_kind, check_positive, with_checked_scalar

_Rows = TypeVar("_Rows")


class AbstractTimes(eqx.Module):
    """A distribution of one time in [0, 1]."""

    @abc.abstractmethod
    def __call__(self, *, key: Key[Array, ""]) -> Time:
        """One draw."""


class AbstractLimitedTimes(AbstractTimes):
    """A distribution of one time in [0, 1] that can also be drawn below a limit."""

    @abc.abstractmethod
    def below(self, limit: Time, *, key: Key[Array, ""]) -> Time:
        """One draw, given that it does not exceed `limit` in [0, 1]."""


class UniformTimes(AbstractLimitedTimes):
    """Times drawn from Uniform(0, 1): "uniform(0, 1)" of Tab. 1d."""

    def __call__(self, *, key: Key[Array, ""]) -> Time:
        return jr.uniform(key)

    def below(self, limit: Time, *, key: Key[Array, ""]) -> Time:
        return limit * jr.uniform(key, dtype=limit.dtype)


class LogitNormalTimes(AbstractLimitedTimes):
    r"""Times $t = \mathrm{sigmoid}(\mu + s n)$ with $n \sim N(0, 1)$: "lognorm(mu, sigma)" of the paper.

    **Arguments:** `mean` the paper's $\mu$, finite; `std` its $\sigma$, > 0 and finite. Values in use: (-0.4, 1.0) in
    the ImageNet experiments (the defaults); (-2, 2) for CIFAR-10 in the paper; t from (-0.6, 1.6) and r from (-4, 1.6)
    in the later CIFAR-10 code (see `TimePairs`).
    """

    mean: float = eqx.field(default=-0.4, converter=as_float("mean"))
    std: float = eqx.field(default=1.0, converter=as_float("std"))

    def __check_init__(self):
        check_finite("mean", self.mean)
        check_positive("std", self.std)

    def __call__(self, *, key: Key[Array, ""]) -> Time:
        return jax.nn.sigmoid(self.mean + self.std * jr.normal(key))

    def below(self, limit: Time, *, key: Key[Array, ""]) -> Time:
        largest = jax.scipy.special.ndtr((jax.scipy.special.logit(limit) - self.mean) / self.std)
        normal = jax.scipy.special.ndtri(largest * jr.uniform(key, dtype=limit.dtype))
        return jnp.minimum(jax.nn.sigmoid(self.mean + self.std * normal), limit)


class TimePairs(eqx.Module):
    """Pairs r <= t.

    **Arguments:**

    - `times`: the distribution of both draws, which are then sorted (the paper; CIFAR-10 "v0"), or of t alone when
      `r_times` is given.
    - `r_times`: a distribution of its own for r, followed by r = min(r, t) (the authors' CIFAR-10 "v1": t from
      `LogitNormalTimes(-0.6, 1.6)`, r from `LogitNormalTimes(-4, 1.6)`).
    - `equal`: the probability with which r is set to t. It is 0 by default, because the objective's strided split
      already makes rows with r = t. 0.25 with an identity share of 1 is the authors' CIFAR-10 code. In "v1" the minimum
      sets r = t in further pairs, so that about 30% of all pairs have r = t.
    - `at_data`: the probability with which r is set to 0, for more training of single steps to the data (transition
      models, arXiv 2509.04394). A pair whose r was set to t keeps it.
    - `uniform`: the probability with which both draws are uniform in [0, 1] instead; 0.1 as an option in pixel MeanFlow
      (arXiv 2601.22158).
    - `at_noise`: the probability with which t is set to 1, for more training of steps that start at noise. With 1, z is
      noise in all of these rows, so that no data enter them (`LagrangianDistillation` learns from them).
    - `gap_times`: a distribution of the gap t - r, in [0, 1], which is then drawn first, and r from `times`, given that
      t is at most 1 (terminal velocity matching, arXiv 2511.19797). Only without `r_times` and `uniform`.
    """

    times: AbstractTimes = LogitNormalTimes()
    r_times: AbstractTimes | None = None
    equal: float = eqx.field(default=0.0, converter=as_float("equal"))
    at_data: float = eqx.field(default=0.0, converter=as_float("at_data"))
    uniform: float = eqx.field(default=0.0, converter=as_float("uniform"))
    at_noise: float = eqx.field(default=0.0, converter=as_float("at_noise"))
    gap_times: AbstractTimes | None = None

    def __check_init__(self):
        check_kind("times", self.times, AbstractTimes)
        if self.r_times is not None:
            check_kind("r_times", self.r_times, AbstractTimes)
        if self.gap_times is not None:
            check_kind("gap_times", self.gap_times, AbstractTimes)
            check_kind("times with gap_times", self.times, AbstractLimitedTimes)
            if self.r_times is not None or self.uniform != 0:
                others = f"r_times={self.r_times}, uniform={self.uniform}"
                raise ValueError(f"gap_times must be None with r_times or uniform, got {others}")
        for name in ("equal", "at_data", "at_noise", "uniform"):
            if not 0 <= (probability := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a probability and must lie in [0, 1], got {probability}")

    def __call__(self, *, key: Key[Array, ""]) -> tuple[Time, Time]:
        """One pair `(r, t)`."""
        first_key, second_key, coin_key = jr.split(key, 3)
        if self.gap_times is None:
            r, t = self._of_two(first_key, second_key, coin_key)
        else:
            r, t = self._with_gap(self.gap_times, first_key, second_key)
        if self.at_data > 0:
            r = jnp.where(jr.bernoulli(jr.fold_in(coin_key, 1), self.at_data), 0, r)
        if self.at_noise > 0:
            t = jnp.where(jr.bernoulli(jr.fold_in(coin_key, 4), self.at_noise), 1, t)
        return jnp.where(jr.bernoulli(coin_key, self.equal), t, r), t

    def _of_two(
        self, first_key: Key[Array, ""], second_key: Key[Array, ""], coin_key: Key[Array, ""]
    ) -> tuple[Time, Time]:
        """r and t from two draws."""
        first = draw_time(self.times, first_key)
        second = draw_time(self.times if self.r_times is None else self.r_times, second_key)
        if self.uniform > 0:
            is_uniform, keys = jr.bernoulli(jr.fold_in(coin_key, 2), self.uniform), jr.split(jr.fold_in(coin_key, 3))
            first, second = (
                jnp.where(is_uniform, jr.uniform(key), time) for key, time in zip(keys, (first, second), strict=True)
            )
        return jnp.minimum(first, second), first if self.r_times is not None else jnp.maximum(first, second)

    def _with_gap(
        self, gap_times: AbstractTimes, first_key: Key[Array, ""], second_key: Key[Array, ""]
    ) -> tuple[Time, Time]:
        """r and t from t - r and r."""
        assert isinstance(self.times, AbstractLimitedTimes)
        gap = draw_time(gap_times, second_key)
        r = _as_time(self.times.below(1 - gap, key=first_key), self.times)
        return r, jnp.minimum(r + gap, 1)


def draw_time(times: AbstractTimes, key: Key[Array, ""]) -> Time:
    """One draw of `times`. **Raises:** `ValueError` unless it is a scalar."""
    return _as_time(times(key=key), times)


def _as_time(time: ArrayLike, times: AbstractTimes) -> Time:
    return jnp.asarray(with_checked_scalar(time, f"a time of {type(times).__name__}"))


def as_share(share: Fraction | float | int | str) -> Fraction:
    """`share` as a fraction with a denominator of at most 64, so that 0.3333 means 1/3.

    **Raises:** `ValueError` outside [0, 1], or if no such fraction is within 0.001: 0.33 is not 1/3.
    """
    try:
        exact = Fraction(share)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f'identity_share must be a number or a fraction such as "1/4", got {share}') from None
    if not 0 <= exact <= 1:
        raise ValueError(f"identity_share must lie in [0, 1], got {share}")
    fraction = exact.limit_denominator(64)
    if abs(fraction - exact) > Fraction(1, 1000) or (fraction in (0, 1) and fraction != exact):
        raise ValueError(
            f"identity_share must be within 0.001 of a fraction n/k with k <= 64, and 0 or 1 exactly, got {share} "
            f"(nearest: {fraction})"
        )
    return fraction


def rows_per_group(share: Fraction | float, group: int = 1) -> int:
    """The smallest number of consecutive rows that the strided split divides into whole groups of identity rows.

    With share n/k it is k, or the smallest multiple of k in which the identity rows, n of every k, are a multiple of
    `group`.
    """
    share = as_share(share)
    return share.denominator * (group // math.gcd(share.numerator, group))


def check_batch_size(
    batch: int, share: Fraction | float, *, shards: int = 1, accumulation: int = 1, group: int = 1
) -> None:
    """Refuses a batch that cannot be split.

    With share n/k the strided split divides every k consecutive rows. So each device and each accumulation step must
    get a multiple of k rows and, if the identity compares rows in groups, whole groups.

    **Arguments:** `batch` rows of the global batch; `share` the identity's share n/k; `shards` devices along the data
    axis; `accumulation` micro-batches per step; `group` rows that the identity compares.

    **Raises:** `ValueError` unless batch % (k x shards x accumulation) == 0; with groups, k is `rows_per_group`.
    """
    share = as_share(share)
    rows = rows_per_group(share, group)
    reason = f"denominator of identity_share = {share}" + (f", for groups of {group} rows" if group > 1 else "")
    check_divisible(batch, rows, reason, shards=shards, accumulation=accumulation)


def check_divisible(batch: int, rows: int, reason: str, *, shards: int, accumulation: int) -> None:
    """Raises a `ValueError` unless `batch` is a positive multiple of rows x shards x accumulation."""
    divisor = rows * shards * accumulation
    if batch <= 0 or batch % divisor:
        raise ValueError(
            f"batch must be a positive multiple of {rows} ({reason}) "
            f"x {shards} (data shards) x {accumulation} (accumulation steps) = {divisor}, got {batch}"
        )


def split_rows(rows: _Rows, share: Fraction | float) -> tuple[_Rows, _Rows]:
    """The static strided split: of every k consecutive rows the first n carry the identity.

    **Arguments:** `rows` a PyTree whose leaves share a leading batch axis, divisible by k; `share` = n/k in lowest
    terms.

    **Returns:** `(identity_rows, boundary_rows)`, of batch sizes B n/k and B (k - n)/k.
    """
    share = as_share(share)
    n, k = share.numerator, share.denominator

    def part(start: int, stop: int) -> _Rows:
        def take(leaf: Array | np.ndarray) -> Array | np.ndarray:
            grouped = leaf.reshape(leaf.shape[0] // k, k, *leaf.shape[1:])[:, start:stop]
            return grouped.reshape(leaf.shape[0] // k * (stop - start), *leaf.shape[1:])

        return jax.tree.map(take, rows)

    return part(0, n), part(n, k)
