"""Embeddings of times.

Which variables a network gets in place of (r, t) is a choice of Tab. 1c; the JVP is always that of u(., r, t). Each
choice is a function `(r, t) -> numbers`; every number gets its own sinusoidal embedding and two-layer MLP, and the
results are summed.
"""

import functools
import operator
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar, as_times, at_least_float32, ScalarLike, Time, TimeLike
from .._validate import check_counts, check_finite
from ._linear import Linear

TimeVariables: TypeAlias = Callable[[Time, Time], tuple[Time, ...]]


def end_start(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, r): FID 61.75 in Tab. 1c."""
    r, t = as_times(r, t)
    return t, r


def end_duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, t - r): FID 61.06 in Tab. 1c, the paper's default."""
    r, t = as_times(r, t)
    return t, t - r


def end_start_duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, r, t - r): FID 63.98 in Tab. 1c."""
    r, t = as_times(r, t)
    return t, r, t - r


def duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """t - r alone: FID 63.13 in Tab. 1c."""
    r, t = as_times(r, t)
    return (t - r,)


def check_even_size(size: int) -> None:
    """Raises a `ValueError` unless a sinusoidal embedding of `size` has as many cosines as sines."""
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and positive, got {size}")


def sinusoidal_embedding(
    value: ScalarLike, size: int, *, max_period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, " size"]:
    r"""Cosines, then sines, of $value \cdot P^{-k / (size/2)}$ for k = 0 .. size/2 - 1, in float32 or better.

    As in the authors' ImageNet code and in DiT.

    **Arguments:** `value` a time; `size` even; `max_period` the P above, 10,000 everywhere; `endpoint` whether k is
    divided by size/2 - 1 instead, so that the last frequency is 1 / P, as in the authors' CIFAR-10 code.
    """
    check_even_size(size)
    half, value = size // 2, as_scalar("value", value)
    frequencies = max_period ** (-np.arange(half) / max(half - endpoint, 1))
    angles = at_least_float32(value) * jnp.asarray(frequencies, np.promote_types(value.dtype, np.float32))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class TimePairEmbedding(eqx.Module):
    r"""Embedding of (r, t): per variable a sinusoidal embedding, linear, SiLU, linear; summed over the variables.

    It stays in float32 also under bfloat16 compute: with the angles in bfloat16, du/dt would be inaccurate.

    **Arguments:**

    - `width` of the result; `size` of each sinusoidal embedding, even (256 in the paper's DiT).
    - `variables`: `end_duration` (default), `end_start`, `end_start_duration`, `duration`, or a function of your own.
    - `time_scale`: factor on the times before the sinusoidal embedding. 1 in the authors' MeanFlow code; in DiT, whose
      time is an integer step, about 1000, which makes du/dt less accurate.
    - `init`: for the weights; normal with standard deviation 0.02 in DiT.
    """

    hidden: tuple[Linear, ...]
    out: tuple[Linear, ...]
    variables: TimeVariables = eqx.field(static=True)
    size: int = eqx.field(static=True)
    time_scale: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        variables: TimeVariables = end_duration,
        size: int = 256,
        time_scale: float = 1.0,
        init: jax.nn.initializers.Initializer = normal(0.02),
        key: Key[Array, ""],
    ):
        check_counts(width=width)
        check_finite("time_scale", time_scale)
        check_even_size(size)
        count = len(variables(jnp.zeros(()), jnp.ones(())))
        hidden_keys, out_keys = jr.split(key, (2, count))
        self.hidden = tuple(Linear(size, width, init=init, key=key) for key in hidden_keys)
        self.out = tuple(Linear(width, width, init=init, key=key) for key in out_keys)
        self.variables = variables
        self.size = size
        self.time_scale = float(time_scale)

    def __call__(self, r: TimeLike, t: TimeLike) -> Float[Array, " width"]:
        r, t = as_times(r, t, self.hidden[0].weight)

        def embed(value: Time, hidden: Linear, out: Linear) -> Float[Array, " width"]:
            return out(jax.nn.silu(hidden(sinusoidal_embedding(self.time_scale * value, self.size))))

        # Without a start value such as 0.0, which would make a float32 field float64 where float64 is enabled.
        return functools.reduce(operator.add, map(embed, self.variables(r, t), self.hidden, self.out))
