r"""Sampling: from noise at t = 1 to data at t = 0.

A field that knows average velocities jumps over a whole interval,

$$z_r = z_t - (t - r)\, u(z_t, r, t) \qquad (12),$$

so one evaluation, u(eps, 0, 1), gives a sample. A consistency model knows only the jumps to r = 0, and between two of
them new noise leads back to an earlier time. A field trained by Flow Matching knows only v(z, t) = u(z, t, t) and needs
an ODE solver; Euler and Heun are the baselines. All functions are per example: the caller makes batches by `jax.vmap`.
"""

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
    empty, or if the field cannot be called as an `AbstractField` is, returns another shape, or holds a `BatchNorm`,
    which needs a batch.
    """
    return _integrate(field, lambda u, z, r, t: z - (t - r) * u(z, r, t), eps, condition, times, unroll)


def sample_consistency(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid,
    key: Key[Array, ""],
    interpolant: AbstractInterpolant = LinearInterpolant(),
    unroll: bool = False,
) -> Float[Array, "*data"]:
    r"""One sample of a method that learns u(z, 0, t) alone (`Facts.ends_at_data`), one evaluation per interval of
    `times`. Each evaluation goes to the data, and new noise leads back to the next time s of the grid:

    $$x = z_t - t\, u(z_t, 0, t), \qquad z_s = \alpha_s x + \sigma_s \epsilon', \qquad
    \epsilon' \sim \mathcal{N}(0, I).$$

    On the grid (1, 0) it is `sample`.

    **Arguments:** as `sample`, and `key` for the new noise; `interpolant` the path of the training.

    **Raises:** as `sample`, and for a key or an interpolant of another kind.

    Source: Consistency Models, Song, Dhariwal, Chen, Sutskever, 2023, arXiv 2303.01469, Alg. 1.
    """

    check_times(times)
    check_key(key)
    check_kind("interpolant", interpolant, AbstractInterpolant)

    def step(u: Evaluate, z: Float[Array, "*data"], r: Time, t: Time, key: Key[Array, ""]) -> Float[Array, "*data"]:
        noise = jr.normal(key, z.shape, z.dtype)
        return interpolant.state_and_velocity(z - t * u(z, jnp.zeros_like(t), t), noise, r)[0]

    return _integrate(field, step, eps, condition, times, unroll, jr.split(key, len(times) - 1))


def sample_euler(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid,
    unroll: bool = False,
) -> Float[Array, "*data"]:
    """One sample of the ODE dz/dt = u(z, t, t) by Euler's method: arguments as `sample`, one evaluation per step."""
    return _integrate(field, lambda u, z, r, t: z - (t - r) * u(z, t, t), eps, condition, times, unroll)


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

    return _integrate(field, step, eps, condition, times, unroll)


def check_times(times: TimeGrid) -> None:
    """Raises a `ValueError` unless `times` is a strictly decreasing grid of at least two times in [0, 1]. Of times that
    JAX traces, it is known only how many they are."""
    grid = on_host_if_known(times)
    if grid is None and jnp.ndim(jnp.asarray(times)) == 1 and len(times) >= 2:
        return
    falls = grid is not None and grid.ndim == 1 and len(grid) >= 2 and (np.diff(grid.astype(float)) < 0).all()
    if grid is None or not falls or grid[0] > 1 or grid[-1] < 0:
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


def with_condition(
    field: AbstractField, eps: Real[ArrayLike, "*data"] | Sequence[Any], condition: Condition
) -> tuple[Evaluate, Float[Array, "*data"]]:
    """`field` with its condition, and `eps` in float32 or better.

    **Raises:** `ValueError` for a field or noise that cannot be sampled from; the function that is returned raises one
    if the field returns another shape.
    """
    check_field(field)
    eps = at_least_float32(as_floats(eps))
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


def _integrate(
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
