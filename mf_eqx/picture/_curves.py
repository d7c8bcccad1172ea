"""Curves of logged metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from ._figure import new_figure, plain, save_figure

LogRecord: TypeAlias = Mapping[str, Any]


def save_curves(
    path: str | Path,
    records: Sequence[LogRecord] | Mapping[str, Sequence[LogRecord]],
    names: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> None:
    """Save the curves of metrics against the step as PNG, one panel per metric.

    Logged values are drawn faintly, their running mean over a twentieth of the curve boldly. Positive metrics that span
    more than a factor of ten get a logarithmic axis.

    **Arguments:**

    - `path`: of the file.
    - `records`: as returned by `RunDirectory.records`; or several such lists by name, to compare runs.
    - `names`: of the metrics; by default all. A metric in bins gives one curve per bin; a name that ends in `_by_gap`
      says that these are equal bins of t - r.
    - `title`: a text above everything.

    **Raises:** `ValueError` if there are no records, or a name is in none of them.
    """

    runs = dict(records) if isinstance(records, Mapping) else {"": records}
    known = list(dict.fromkeys(name for run in runs.values() for record in run for name in record if name != "step"))
    names = known if names is None else names
    if not known or not names:
        raise ValueError(
            f"records must hold at least one metric, got {sum(map(len, runs.values()))} records without any"
        )
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"names must be among {', '.join(known)}; got {', '.join(missing)}")
    columns = len(names) if len(names) <= 3 else math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(4.2 * columns, 3.0 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, panel in zip(names, panels, strict=False):
        _draw_metric(panel, name, runs)
    for panel in panels[len(names) :]:
        panel.remove()
    if title is not None:
        figure.suptitle(plain(title))
    save_figure(path, figure)


def _draw_metric(panel: Any, name: str, runs: Mapping[str, Sequence[LogRecord]]) -> None:
    finite_values = []
    for run, records in runs.items():
        steps, values = _series(records, name)
        for i, curve in enumerate(values.T):
            label = plain(" ".join(filter(None, [run, _bin(name, i, values.shape[1])])))
            finite, marker = curve[np.isfinite(curve)], "." if len(steps) < 10 else None  # a line needs two points
            (faint,) = panel.plot(steps, curve, alpha=0.25, linewidth=1, marker=marker)
            panel.plot(steps, _running_mean(curve), color=faint.get_color(), label=label if len(finite) else None)
            finite_values.append(finite)
    panel.set(title=plain(name), xlabel="step")
    panel.grid(alpha=0.3)
    if _spans_decades(np.concatenate(finite_values)):
        panel.set_yscale("log")
    if len(finite_values) > 1 and panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize="small")


def _bin(name: str, i: int, bins: int) -> str:
    """What the values of a metric in several bins are those of."""
    if bins == 1:
        return ""
    return f"t - r in {i / bins:g} to {(i + 1) / bins:g}" if name.endswith("_by_gap") else f"bin {i}"


def _series(
    records: Sequence[LogRecord], name: str
) -> tuple[Float[np.ndarray, " record"], Float[np.ndarray, "record curve"]]:
    """Steps and values of a metric where it was logged; null becomes NaN."""
    pairs = [(record["step"], np.ravel(record[name]).astype(float)) for record in records if name in record]
    steps = np.array([step for step, _ in pairs], float)
    return steps, np.stack([value for _, value in pairs]) if pairs else np.zeros((0, 1))


def _running_mean(values: Float[np.ndarray, " record"]) -> Float[np.ndarray, " record"]:
    """Mean of the finite values in a centred window over a twentieth of the curve, smaller at its ends."""
    window = np.ones(max(1, values.size // 20) | 1)
    if values.size < window.size:
        return values
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), window, mode="same")
    count = np.convolve(finite, window, mode="same")
    return np.divide(total, count, out=np.full(values.shape, np.nan), where=finite)


def _spans_decades(values: Float[np.ndarray, " value"]) -> bool:
    return values.size > 0 and 0 < 10 * float(values.min()) < float(values.max())
