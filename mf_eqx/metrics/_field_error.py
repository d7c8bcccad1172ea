r"""How far a field is from the truth.

Against a known average velocity $u^*$ (a field of `mf_eqx.exact`) the error is

$$\frac{E |u - u^*|^2}{E |u^*|^2},$$

with states $z_t$ of the true marginal (`draw_states`). Numerator and denominator are sums over rows, so the error can
also be computed in cells of (r, t): a field can be right near r = t, where Flow Matching trains it, and wrong at
(0, 1), where one-step sampling evaluates it. `field_truth` evaluates the truth once for the errors of any number of
fields (`field_errors`).

All functions take rows (a leading batch axis), are jitted, and evaluate fields without dropout. If a value is not
finite, whether it is an argument or computed by a field, the result is not finite, and no error is raised: so a field
that diverged can be listed in a table like any other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Real, Shaped

from .._custom_types import at_least_float32, Condition, Scalar, Time
from .._field import AbstractField
from .._interpolant import AbstractInterpolant
from .._times import TimePairs
from .._validate import quotient


class RelativeError(eqx.Module):
    """A relative error as sums over rows, so that the errors of several sets of rows can be added.

    **Arguments:** `error` sum of |u - u*|²; `truth` sum of |u*|²; `count` of rows.
    """

    error: Float[Array, "*cells"]
    truth: Float[Array, "*cells"]
    count: Int[Array, "*cells"]

    def __add__(self, other: "RelativeError") -> "RelativeError":
        return jax.tree.map(jnp.add, self, other)

    @property
    def value(self) -> Float[Array | np.ndarray, "*cells"]:
        """E|u - u*|² / E|u*|²; NaN where there is no row (computed as `mf_eqx.Mean.value`)."""
        return quotient(self.error, self.truth)


class FieldErrors(eqx.Module):
    """The relative errors of a field, for a table: `errors.overall.value` is a number.

    **Arguments:** `overall` over the drawn pairs (r, t); `diagonal` at (t, t), which Flow Matching learns; `one_step`
    at (0, 1), which one-step sampling evaluates; `cells` like `overall`, in cells of r and t.
    """

    overall: RelativeError
    diagonal: RelativeError
    one_step: RelativeError
    cells: RelativeError


class KnownRows(eqx.Module):
    """Rows at which the truth has been evaluated.

    **Arguments:** `z` states at `t`; `r <= t` times; `condition` one for each row, or None; `u` the truth there.
    """

    z: Float[Array, "rows *data"]
    r: Float[Array, " rows"]
    t: Float[Array, " rows"]
    condition: PyTree[Shaped[Array, "rows ..."]]
    u: Float[Array, "rows *data"]


class FieldTruth(eqx.Module):
    """The truth at all rows that `FieldErrors` requires.

    **Arguments:** `overall` at the drawn pairs (r, t); `diagonal` at (t, t), the marginal velocity; `one_step` at (0,
    1).
    """

    overall: KnownRows
    diagonal: KnownRows
    one_step: KnownRows


@eqx.filter_jit
def draw_states(
    sample: Callable[..., Float[Array, "*data"]],
    interpolant: AbstractInterpolant,
    time_pairs: TimePairs,
    rows: int,
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
    *,
    key: Key[Array, ""],
) -> tuple[Float[Array, "rows *data"], Float[Array, " rows"], Float[Array, " rows"]]:
    r"""States of the true marginal, $z_t = \alpha_t x + \sigma_t \epsilon$, with their pairs r <= t.

    **Arguments:** `sample` draws one example of the data: `sample(key=...)`, and with conditions `sample(key=...,
    condition=...)`, such as `GaussianMixture(...).sample` of `mf_eqx.exact`; `interpolant` the path; `time_pairs` the
    distribution of (r, t); `rows` their number; `condition` one for each row, or None; `key`.

    **Returns:** `(z, r, t)`, each with a leading axis of `rows`, in the dtype of the data.

    **Raises:** `ValueError` unless rows >= 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")

    def draw(key: Key[Array, ""], condition: Condition) -> tuple[Float[Array, "*data"], Time, Time]:
        x_key, eps_key, times_key = jr.split(key, 3)
        x = sample(key=x_key) if condition is None else sample(key=x_key, condition=condition)
        r, t = (time.astype(x.dtype) for time in time_pairs(key=times_key))
        z, _ = interpolant.state_and_velocity(x, jr.normal(eps_key, x.shape, x.dtype), t)
        return z, r, t

    return jax.vmap(draw)(jr.split(key, rows), condition)


@eqx.filter_jit
def relative_error(
    field: AbstractField,
    truth: AbstractField | Float[Array, "rows *data"],
    z: Float[Array, "rows *data"],
    r: Float[Array, " rows"],
    t: Float[Array, " rows"],
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
) -> RelativeError:
    r"""The relative error of a field, $E|u - u^*|^2 / E|u^*|^2$, where both are evaluated at (z, r, t, condition).

    **Arguments:** `field`; `truth` the average velocity $u^*$, or its values in these rows; `z` states at `t`, usually
    from `draw_states`; `r <= t`; `condition` one for each row, or None.

    **Returns:** one number as a `RelativeError`.
    """
    error, size = _squares(field, truth, z, r, t, condition)
    return RelativeError(jnp.sum(error), jnp.sum(size), jnp.asarray(len(error), jnp.int32))


def relative_error_by_cell(
    field: AbstractField,
    truth: AbstractField | Float[Array, "rows *data"],
    z: Float[Array, "rows *data"],
    r: Float[Array, " rows"],
    t: Float[Array, " rows"],
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
    *,
    edges: Sequence[float] | Real[Array | np.ndarray, " edges"] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> RelativeError:
    """The relative error of a field in each cell of a grid over (r, t).

    **Arguments:** as for `relative_error`; `edges` of the cells along either axis, strictly increasing. A cell contains
    its lower edge, and the last cell its upper edge, too; rows outside all cells are not counted.

    **Returns:** a `RelativeError` of shape (cells of r, cells of t). Cells with r > t contain no rows; their value is
    NaN. A value that is not finite makes its own cell NaN; a time that is not finite makes all cells NaN.

    **Raises:** `ValueError` if `edges` are fewer than two or not strictly increasing.
    """
    return _error_by_cell(field, truth, (z, r, t, condition), _as_edges(edges))


def _as_edges(edges: Sequence[float] | Real[Array | np.ndarray, " edges"]) -> tuple[float, ...]:
    """As numbers, which no `filter_jit` traces."""
    bounds = np.asarray(edges, np.float64)
    if bounds.ndim != 1 or len(bounds) < 2 or not (np.diff(bounds) > 0).all():
        raise ValueError(f"edges must be at least two strictly increasing numbers, got {edges}")
    return tuple(map(float, bounds))


@eqx.filter_jit
def _error_by_cell(
    field: AbstractField,
    truth: AbstractField | Float[Array, "rows *data"],
    rows: tuple[Any, ...],
    edges: tuple[float, ...],
) -> RelativeError:
    bounds, (z, r, t, condition) = np.asarray(edges), rows
    cells = len(bounds) - 1
    row, column = _cell(r, bounds), _cell(t, bounds)
    index = jnp.where((row < cells) & (column < cells), cells * row + column, cells**2)

    def total(values: Shaped[Array, " rows"]) -> Shaped[Array, "cells cells"]:
        # Not a product with one-hot rows: a value that is not finite must change its own cell only.
        return jax.ops.segment_sum(values, index, cells**2).reshape(cells, cells)

    error, size = _squares(field, truth, z, r, t, condition)
    finite = jnp.all(jnp.isfinite(r) & jnp.isfinite(t))  # other times would count as outside all cells
    return RelativeError(jnp.where(finite, total(error), jnp.nan), total(size), total(jnp.ones_like(index, jnp.int32)))


@eqx.filter_jit
def field_truth(
    truth: AbstractField,
    sample: Callable[..., Float[Array, "*data"]],
    interpolant: AbstractInterpolant,
    time_pairs: TimePairs,
    rows: int,
    condition: PyTree[Shaped[Array, "rows ..."]] = None,
    *,
    key: Key[Array, ""],
) -> FieldTruth:
    """The truth at rows drawn here, evaluated once for any number of fields to compare with it.

    **Arguments:** `truth` the average velocity $u^*$; `sample`, `interpolant`, `time_pairs`, `rows`, `condition` as for
    `draw_states`; `key`.

    **Returns:** a `FieldTruth`. `diagonal` has the drawn states and t; `one_step` has the same number of rows of fresh
    noise.
    """
    states_key, noise_key = jr.split(key)
    z, r, t = draw_states(sample, interpolant, time_pairs, rows, condition, key=states_key)
    eps = jr.normal(noise_key, z.shape, z.dtype)

    def known(z: Float[Array, "rows *data"], r: Float[Array, " rows"], t: Float[Array, " rows"]) -> KnownRows:
        # Not one vmap: every row would wait for the one whose integration takes most steps.
        u = jax.lax.map(lambda row: truth(*row), (z, r, t, condition), batch_size=min(rows, 50))
        return KnownRows(z, r, t, condition, u)

    return FieldTruth(known(z, r, t), known(z, t, t), known(eps, jnp.zeros_like(r), jnp.ones_like(t)))


def field_errors(
    field: AbstractField,
    truth: FieldTruth,
    *,
    edges: Sequence[float] | Real[Array | np.ndarray, " edges"] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> FieldErrors:
    """The relative errors of a field: overall, at r = t, at (0, 1), and in cells.

    Where `truth` was made in float64, call this under `jax.enable_x64(True)`, too; the field may be in float32.

    **Arguments:** `field`; `truth` from `field_truth`; `edges` as for `relative_error_by_cell`, which
    raises for bad ones.
    """
    return _field_errors(field, truth, _as_edges(edges))


@eqx.filter_jit
def _field_errors(field: AbstractField, truth: FieldTruth, edges: tuple[float, ...]) -> FieldErrors:
    def error(rows: KnownRows) -> RelativeError:
        return relative_error(field, rows.u, rows.z, rows.r, rows.t, rows.condition)

    rows = truth.overall
    return FieldErrors(
        overall=error(rows),
        diagonal=error(truth.diagonal),
        one_step=error(truth.one_step),
        cells=_error_by_cell(field, rows.u, (rows.z, rows.r, rows.t, rows.condition), edges),
    )


def _squares(
    field: AbstractField,
    truth: AbstractField | Float[Array, "rows *data"],
    z: Float[Array, "rows *data"],
    r: Float[Array, " rows"],
    t: Float[Array, " rows"],
    condition: PyTree[Shaped[Array, "rows ..."]],
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """|u - u*|² and |u*|² of each row."""
    exact = jax.vmap(truth)(z, r, t, condition) if isinstance(truth, AbstractField) else truth

    def square(
        z: Float[Array, "*data"], r: Time, t: Time, condition: Condition, exact: Float[Array, "*data"]
    ) -> tuple[Scalar, Scalar]:
        exact = at_least_float32(exact)
        return jnp.sum((field(z, r, t, condition) - exact) ** 2), jnp.sum(exact**2)

    return jax.vmap(square)(z, r, t, condition, exact)


def _cell(times: Float[Array, " rows"], bounds: Float[np.ndarray, " edges"]) -> Int[Array, " rows"]:
    """The cell of each time; the number of cells for a time outside of them."""
    edges = jnp.asarray(bounds, times.dtype)
    cells = len(bounds) - 1
    cell = jnp.searchsorted(edges, times, side="right") - 1
    cell = jnp.where(times == edges[-1], cells - 1, cell)
    return jnp.where(cell < 0, cells, cell)
