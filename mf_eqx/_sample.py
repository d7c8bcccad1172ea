r"""Sampling: from noise at t = 1 to data at t = 0.

A field that knows average velocities jumps over a whole interval,

$$z_r = z_t - (t - r)\, u(z_t, r, t) \qquad (12),$$

so one evaluation, u(eps, 0, 1), gives a sample. A consistency model knows only the jumps to r = 0, and between two of
them new noise leads back to the next time. A field trained by Flow Matching knows only v(z, t) = u(z, t, t) and needs
an ODE solver; Euler and Heun are the baselines. All functions are per example: the caller makes batches by `jax.vmap`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key, Real

from ._custom_types import as_floats, at_least_float32, Condition, Time
from ._field import AbstractField, check_field, with_checked_shapes
from ._interpolant import AbstractInterpolant, LinearInterpolant
from ._model.guidance import condition_at
from ._validate import as_count, check_key, check_kind, on_host_if_known

TimeGrid: TypeAlias = Sequence[float] | Real[Array | np.ndarray, " times"]
Evaluate: TypeAlias = Callable[[Float[Array, "*data"], Time, Time], Float[Array, "*data"]]
"""A field with its condition, as a function of z, r and t."""
_State = TypeVar("_State")


def uniform_times(steps: int) -> tuple[float, ...]:
    """The grid of `steps` equal intervals from 1 to 0, as steps + 1 times.

    **Raises:** `ValueError` unless steps >= 1.
    """
    steps = as_count("steps", steps)
    return tuple(float(time) for time in np.linspace(1.0, 0.0, steps + 1))


def sample(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid = (1.0, 0.0),
    unroll: bool = False,
) -> Float[Array, "*data"]:
    """One sample by average velocities (Alg. 2), one evaluation of the field per interval of `times`.

    **Arguments:** `field`; `eps` standard normal noise of the data's shape, an array or a list; `condition`; `times` a
    strictly decreasing grid in [0, 1], from 1 (noise) to 0 (data) by default; `uniform_times(n)` makes one of n steps;
    `unroll` True to unroll the loop over the steps (a single step never needs a loop). Useful for convolutional
    networks on CPUs: inside a loop XLA does not use its fast kernels for convolutions (a small U-Net in two steps: 3.8
    s in a loop, 0.13 s without).

    **Returns:** the state at the last time, data if that is 0, in float32 or better.

    **Raises:** `ValueError` if `times` is not such a grid (of traced times only their number is known), if `eps` is
    empty or no numbers, or if the field cannot be called as an `AbstractField` is, returns another shape, or holds a
    `BatchNorm`, which needs a batch.
    """
    return integrate(field, lambda u, z, r, t: z - (t - r) * u(z, r, t), eps, condition, times, unroll)


def sample_consistency(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid,
    key: Key[Array, ""],
    new_noise: float = 1.0,
    interpolant: AbstractInterpolant = LinearInterpolant(),
    unroll: bool = False,
) -> Float[Array, "*data"]:
    r"""One sample with new noise after each evaluation of u that does not end at the data, one per interval of `times`.

    From t to the next time r of the grid it goes to a time s <= r, and new noise leads back to r:

    $$z_s = z_t - (t - s)\, u(z_t, s, t), \qquad
    z_r = \frac{\alpha_r}{\alpha_s} z_s + \gamma\, \sigma_r \epsilon', \qquad \epsilon' \sim \mathcal{N}(0, I),$$

    where s is the time with $\sigma_s / \alpha_s = \sqrt{1 - \gamma^2}\, \sigma_r / \alpha_r$. If u is exact, the
    states have the right distribution for every $\gamma$, since the variances of old and new noise add up to
    $\sigma_r^2$. With $\gamma = 1$, s is 0: that is the sampling of consistency models, the only one for methods that
    learn u(z, 0, t) alone (`Facts.ends_at_data`). With $\gamma = 0$, or in one step to 0, it is `sample`.

    **Arguments:** as `sample`, and `key` for the new noise, one for each sample; `new_noise` $\gamma$ in [0, 1];
    `interpolant` the path of the training, whose noise must be independent of the data (`Batch.eps` is not).

    **Raises:** as `sample`, and for `new_noise` that is traced or outside of [0, 1], and a key or an interpolant of
    another kind.

    Source: Consistency Models, Song, Dhariwal, Chen, Sutskever, 2023, arXiv 2303.01469, Alg. 1; $\gamma$-sampling of
    Consistency Trajectory Models, Kim et al., 2024, arXiv 2310.02279.
    """
    check_times(times)
    check_key(key)
    check_kind("interpolant", interpolant, AbstractInterpolant)
    new_noise = _as_share("new_noise", new_noise)
    share_of_old = math.sqrt(1 - new_noise**2)

    def step(u: Evaluate, z: Float[Array, "*data"], r: Time, t: Time, key: Key[Array, ""]) -> Float[Array, "*data"]:
        s = _time_of_less_noise(interpolant, r, share_of_old)
        less = interpolant.alpha(r) / interpolant.alpha(s) * (z - (t - s) * u(z, s, t))
        return less + new_noise * interpolant.sigma(r) * jr.normal(key, z.shape, z.dtype)

    return integrate(field, step, eps, condition, times, unroll, jr.split(key, len(times) - 1))


def _time_of_less_noise(path: AbstractInterpolant, r: Time, share: float) -> Time:
    """The time s <= r at which the ratio of noise to data is `share` times that at r, by bisection."""
    if share in (0, 1):
        return share * r

    def halve(_: Array, bounds: tuple[Time, Time]) -> tuple[Time, Time]:
        low, high = bounds
        middle = (low + high) / 2
        beyond = path.sigma(middle) * path.alpha(r) > share * path.sigma(r) * path.alpha(middle)
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    return jax.lax.fori_loop(0, jnp.finfo(r.dtype).nmant + 2, halve, (jnp.zeros_like(r), r))[0]


def sample_euler(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid,
    unroll: bool = False,
) -> Float[Array, "*data"]:
    """One sample of the ODE dz/dt = u(z, t, t) by Euler's method: arguments as `sample`, one evaluation per step."""
    return integrate(field, lambda u, z, r, t: z - (t - r) * u(z, t, t), eps, condition, times, unroll)


def sample_heun(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid,
    unroll: bool = False,
) -> Float[Array, "*data"]:
    """One sample of the ODE dz/dt = u(z, t, t) by Heun's method: arguments as `sample`, two evaluations per step."""

    def step(u: Evaluate, z: Float[Array, "*data"], r: Time, t: Time) -> Float[Array, "*data"]:
        v = u(z, t, t)
        predicted = z - (t - r) * v
        return z - (t - r) / 2 * (v + u(predicted, r, r))

    return integrate(field, step, eps, condition, times, unroll)


def check_times(times: TimeGrid) -> None:
    """Raises a `ValueError` unless `times` is a strictly decreasing grid of at least two times in [0, 1]. Of times that
    JAX traces, it is known only how many they are."""
    grid = on_host_if_known(times)
    if grid is None and jnp.ndim(jnp.asarray(times)) == 1 and len(times) >= 2:
        return
    if grid is not None and grid.ndim == 1 and len(grid) >= 2 and grid.dtype.kind not in "US":
        grid = grid.astype(float)
        if (np.diff(grid) < 0).all() and grid[0] <= 1 and grid[-1] >= 0:
            return
    is_number = grid is not None and grid.ndim == 0 and grid.dtype.kind in "iu" and grid > 0
    hint = f": mfx.uniform_times({times}) makes one of {times} steps" if is_number else ""
    rule = "a strictly decreasing sequence of at least two times in [0, 1]"
    raise ValueError(f"times must be {rule}, got {times}{hint}")


def as_grid(times: TimeGrid) -> tuple[float, ...]:
    """`times` as numbers, which no `filter_jit` traces. **Raises:** as `check_times`."""
    check_times(times)
    if (grid := on_host_if_known(times)) is None:
        raise ValueError(f"times must be known when the program is compiled, got {times}")
    return tuple(map(float, grid))


def _as_share(name: str, value: float) -> float:
    if (known := on_host_if_known(value)) is None:
        raise ValueError(f"{name} must be known when the program is compiled, got {value}")
    if known.dtype.kind not in "fiu" or known.ndim or not 0 <= known <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(known)


def with_condition(
    field: AbstractField, eps: Real[ArrayLike, "*data"] | Sequence[Any], condition: Condition
) -> tuple[Evaluate, Float[Array, "*data"]]:
    """`field` with its condition, and `eps` in float32 or better.

    **Raises:** `ValueError` for a field or noise that cannot be sampled from; the function that is returned raises one
    if the field returns another shape.
    """
    check_field(field)
    eps = at_least_float32(as_floats("eps", eps))
    if eps.size < 1:
        raise ValueError(f"eps must hold at least one value, got shape {eps.shape}")

    def u(z: Float[Array, "*data"], r: Time, t: Time) -> Float[Array, "*data"]:
        return with_checked_shapes(field(z, r, t, condition_at(condition, r, t)), z)

    return u, eps


def over_intervals(
    step: Callable[..., _State], initial: _State, times: TimeGrid, dtype: DTypeLike, unroll: bool, *more: Array
) -> _State:
    """The state after `step(state, r, t, ...)` for each interval of `times`, which also gets its row of `more`."""
    grid = jnp.asarray(times, dtype)
    intervals = (grid[1:], grid[:-1], *more)
    if len(times) == 2:  # JAX would make a loop of this single step, unrolled or not
        return step(initial, *(each[0] for each in intervals))
    return jax.lax.scan(lambda state, row: (step(state, *row), None), initial, intervals, unroll=unroll)[0]


def integrate(
    field: AbstractField,
    step: Callable[..., Float[Array, "*data"]],
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition,
    times: TimeGrid,
    unroll: bool,
    *more: Array,
) -> Float[Array, "*data"]:
    """The state after `step(u, z, r, t, ...)` for each interval, which also gets its row of `more`."""
    check_times(times)
    u, eps = with_condition(field, eps, condition)
    return over_intervals(lambda z, *row: step(u, z, *row).astype(z.dtype), eps, times, eps.dtype, unroll, *more)
