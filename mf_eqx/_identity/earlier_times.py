r"""Rules for the earlier time s of two, given t and a gap, in terms of noise levels $\tau = t / (1 - t)$."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._custom_types import as_scalar, Scalar, ScalarLike, Time, TimeLike

_LARGEST, _LARGEST_IMM = 80.0, 160.0


def noise_level(t: TimeLike, largest: float = _LARGEST) -> Scalar:
    r"""The level $\tau = t / (1 - t)$, at most `largest`: the ratio of noise and data on the linear path."""
    t = as_scalar("t", t)
    return jnp.minimum(t / (1 - t), largest)


def ect_earlier_time(t: TimeLike, gap: ScalarLike) -> Time:
    r"""ECT's time s, of level $\tau_s = \tau_t\, (1 - \mathrm{gap}\, (1 + 8 / (1 + e^{\tau_t})))$, 0 at least (arXiv
    2406.14548)."""
    return _at_level(t, lambda level: level * (1 - gap * (1 + 8 * jax.nn.sigmoid(-level))))


def ict_earlier_time(t: TimeLike, gap: ScalarLike) -> Time:
    r"""iCT's time s: one step back on the grid of levels from 0.002 to 80 that is even in $\tau^{1/7}$ and has 1/gap
    steps (arXiv 2310.14189)."""
    step = gap * (_LARGEST ** (1 / 7) - 0.002 ** (1 / 7))
    return _at_level(t, lambda level: jnp.maximum(level ** (1 / 7) - step, 0) ** 7)


def imm_earlier_time(t: TimeLike, gap: ScalarLike) -> Time:
    r"""IMM's time s, of level $\tau_s = \tau_t - 160\, \mathrm{gap}$, 0 at least (arXiv 2503.07565)."""
    return _at_level(t, lambda level: level - gap * _LARGEST_IMM, _LARGEST_IMM)


def _at_level(t: TimeLike, earlier: Callable[[Scalar], Scalar], largest: float = _LARGEST) -> Time:
    level = jnp.maximum(earlier(noise_level(t, largest)), 0)
    return level / (1 + level)
