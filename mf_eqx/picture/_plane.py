"""Pictures of two-dimensional data: samples, errors over (r, t), and the flow with its average velocities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._field import AbstractField
from .._optional import optional
from .._validate import check_counts, check_positive
from ._figure import new_figure, plain, save_figure

_SIDE = 2.2
_HIGHEST = 10.0
"""Of the colours of heat maps, so that one method that diverged does not make all others look alike."""


def save_point_grid(
    path: str | Path,
    points: Mapping[str, Sequence[Float[Array | np.ndarray, "_ 2"]]],
    columns: Sequence[str],
    *,
    limit: float,
    title: str | None = None,
) -> None:
    """Save a grid of scatter plots as PNG, all on the same axes.

    **Arguments:** `path` of the file; `points` of each row by its name, one sample per column, or fewer, such as one of
    the data: the other places of that row stay empty; `columns` their titles; `limit` of both axes, from -limit to
    limit: points outside are not drawn, but their share is written in the panel; `title` above everything.

    **Raises:** `ValueError` if a row has no samples or more than there are columns, or limit <= 0.
    """
    _check(points, columns, limit, least=1)
    figure, panels = _panels(len(points), len(columns), title)
    for (name, row), line in zip(points.items(), panels, strict=True):
        for column, sample, panel in zip(columns, row, line, strict=False):
            _scatter(panel, np.asarray(sample), limit)
            _label(panel, name, column)
        for panel in line[len(row) :]:
            panel.remove()
    save_figure(path, figure)


def save_point_panels(
    path: str | Path,
    points: Mapping[str, Float[Array | np.ndarray, "_ 2"]],
    *,
    limit: float,
    columns: int = 6,
    title: str | None = None,
) -> None:
    """Save one scatter plot for each sample as PNG, in lines of `columns` panels, each with its name.

    **Arguments:** as for `save_point_grid`, but `points` by name, and `columns` the number of panels in a line.

    **Raises:** `ValueError` without any points, if limit <= 0, or if columns < 1.
    """
    check_counts(columns=columns)
    _check({name: [sample] for name, sample in points.items()}, [""], limit)
    columns = min(columns, len(points))
    figure, panels = _panels(-(-len(points) // columns), columns, title)
    for panel in panels.flat[len(points) :]:
        panel.remove()
    for (name, sample), panel in zip(points.items(), panels.flat, strict=False):
        _scatter(panel, np.asarray(sample), limit)
        panel.set_title(plain(name), fontsize=9)
    save_figure(path, figure)


class Flow(NamedTuple):
    """The trajectories and vectors of one field, as `save_flows` draws them.

    **Arguments:** `paths` states along trajectories, from noise to data; `points` where arrows start; `arrows` one set
    per column, the vectors at `points`.
    """

    paths: Float[Array | np.ndarray, "path time 2"]
    points: Float[Array | np.ndarray, "point 2"]
    arrows: Float[Array | np.ndarray, "column point 2"]


@eqx.filter_jit
def flow_of(field: AbstractField, eps: Float[Array, "path 2"], times: Sequence[float], *, limit: float) -> Flow:
    """The paths z_r = eps - (1 - r) u(eps, r, 1) of noise by a field, and its vectors -u(z, 0, t), towards the data.

    **Arguments:** `field` without condition; `eps` noise, one path for each; `times` t, one set of arrows for each;
    `limit` of the grid on which the arrows start.
    """
    steps = jnp.linspace(1, 0, 41)
    paths = jax.vmap(lambda z: jax.vmap(lambda r: z - (1 - r) * field(z, r, jnp.ones(())))(steps))(eps)
    axis = jnp.linspace(-limit, limit, 13)
    points = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    arrows = jax.vmap(lambda t: jax.vmap(lambda z: -field(z, jnp.zeros(()), t))(points))(jnp.asarray(times))
    return Flow(paths, points, arrows)


def save_flows(
    path: str | Path, flows: Mapping[str, Flow], columns: Sequence[str], *, limit: float, title: str | None = None
) -> None:
    """Save trajectories and vector fields as PNG: a row per field, the trajectories first, as in Fig. 3 of the paper.

    The first field's trajectories are drawn in grey beneath those of the others, for comparison. Length and colour of
    an arrow show the length of its vector, on one scale in the whole picture; the colours end at the longest vector of
    the first field.

    **Arguments:** `path` of the file; `flows` by name, the true one first; `columns` titles of the sets of arrows;
    `limit` of both axes; `title` above everything.

    **Raises:** `ValueError` if a flow has another number of sets of arrows than there are columns, or limit <= 0.
    """
    _check({name: list(flow.arrows) for name, flow in flows.items()}, columns, limit)
    titles = ("trajectories", *columns)
    figure, panels = _panels(len(flows), len(titles), title)
    true_paths = next(iter(flows.values())).paths
    longest = float(np.max(np.linalg.norm(next(iter(flows.values())).arrows, axis=-1), initial=1e-9))
    for (name, flow), line in zip(flows.items(), panels, strict=True):
        for drawn, colour, width in ((true_paths, "0.75", 2.5), (flow.paths, "C0", 0.8)):
            for states in np.asarray(drawn):
                line[0].plot(*states.T, color=colour, linewidth=width)
        line[0].scatter(*np.asarray(flow.paths)[:, -1].T, s=6, color="C3", zorder=3)
        for arrows, panel in zip(np.asarray(flow.arrows), line[1:], strict=True):
            length = np.linalg.norm(arrows, axis=1)
            # A unit vector is a tenth of the panel.
            panel.quiver(
                *np.asarray(flow.points).T,
                *arrows.T,
                length,
                scale=10,
                width=0.006,
                cmap="viridis_r",
                clim=(0, longest),
            )
        for column, panel in zip(titles, line, strict=True):
            _frame(panel, limit)
            _label(panel, name, column)
    save_figure(path, figure)


def save_heat_maps(
    path: str | Path,
    maps: Mapping[str, Float[Array | np.ndarray, "rows columns"]],
    edges: Sequence[float] | Float[np.ndarray, " edges"],
    *,
    row_label: str,
    column_label: str,
    value_label: str,
    title: str | None = None,
) -> None:
    """Save heat maps as PNG on one logarithmic colour scale: for example an error in cells of (r, t), for every method.

    Values above 10 share one colour.

    **Arguments:** `path` of the file; `maps` by name, values > 0, NaN for empty cells; `edges` of the cells along both
    axes; `row_label`, `column_label` of the axes, `value_label` of the colours; `title` above everything.

    **Raises:** `ValueError` if no map holds a positive number.
    """
    values = {name: np.asarray(map) for name, map in maps.items()}
    positive = np.concatenate([map[np.isfinite(map) & (map > 0)] for map in values.values()] or [np.zeros(0)])
    if positive.size == 0:
        raise ValueError("maps must hold at least one positive number, got none")
    with optional("matplotlib"):
        from matplotlib.colors import LogNorm
    columns = min(len(values), 6)
    figure, grid = _panels(-(-len(values) // columns), columns, title, side=2.8)
    panels = list(grid.flat[: len(values)])
    for panel in grid.flat[len(values) :]:
        panel.remove()
    low = float(positive.min())
    norm = LogNorm(low, max(min(float(positive.max()), _HIGHEST), 1.01 * low))
    image = None
    for (name, map), panel in zip(values.items(), panels, strict=True):
        image = panel.pcolormesh(edges, edges, map, norm=norm, cmap="magma_r")
        row = plain(row_label) if panel in grid[:, 0] else None
        panel.set(title=plain(name), xlabel=plain(column_label), ylabel=row, aspect="equal")
    figure.colorbar(image, ax=panels, label=plain(value_label))
    save_figure(path, figure)


def _check(
    rows: Mapping[str, Sequence[Any]], columns: Sequence[str], limit: float, *, least: int | None = None
) -> None:
    if not rows:
        raise ValueError("there must be at least one row, got none")
    for name, row in rows.items():
        if least is not None and not least <= len(row) <= len(columns):
            raise ValueError(f"row {name!r} must have {least} to {len(columns)} items, got {len(row)}")
        if least is None and len(row) != len(columns):
            raise ValueError(f"columns must be {len(row)} titles, one per item of row {name!r}, got {len(columns)}")
    check_positive("limit", limit)


def _panels(rows: int, columns: int, title: str | None, *, side: float = _SIDE) -> tuple[Any, Any]:

    figure = new_figure(side * columns + 0.6, side * rows + 0.6)
    if title is not None:
        figure.suptitle(plain(title))
    return figure, figure.subplots(rows, columns, squeeze=False)


def _scatter(panel: Any, sample: Float[np.ndarray, "_ 2"], limit: float) -> None:
    panel.scatter(*sample.T, s=1.5, alpha=min(1.0, 2500 / max(len(sample), 1)), color="black", linewidths=0)
    outside = np.mean(~np.all(np.abs(sample) <= limit, axis=1)) if len(sample) else 0
    if outside > 0.001:
        panel.text(0.02, 0.02, f"{outside:.1%} outside", transform=panel.transAxes, fontsize=7, color="C3")
    _frame(panel, limit)


def _frame(panel: Any, limit: float) -> None:
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])


def _label(panel: Any, name: str, column: str) -> None:
    """Titles above the first row, names left of the first column."""
    place = panel.get_subplotspec()
    if place.is_first_row():
        panel.set_title(plain(column), fontsize=9)
    if place.is_first_col():
        panel.set_ylabel(plain(name), fontsize=9)
