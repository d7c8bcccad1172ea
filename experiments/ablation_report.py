"""What `ablations.py` makes of the figures of all cells: how they spread, whose order they have, and pictures."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mf_eqx import run


def spread(values: Sequence[float]) -> str:
    """Mean and half the range of all values that are finite, and how many are not."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "diverged"
    half_range = f" ± {rounded(np.ptp(finite) / 2, 1)}" if len(finite) > 1 else ""
    lost = len(values) - len(finite)
    return rounded(np.mean(finite), 3) + half_range + (f", {lost} of {len(values)} diverged" if lost else "")


def rounded(value: float | np.floating, digits: int) -> str:
    """A number with so many digits, and all that it has before the point."""
    return f"{value:.{digits}g}" if not abs(value) >= 10**digits else f"{value:,.0f}"


def agreement(ours: Sequence[Sequence[float]], papers: Sequence[float], order: str = "the paper's order") -> str:
    """How many pairs of rows are in the paper's order, where all seeds agree on theirs."""
    finite = [bool(np.isfinite(values).all()) for values in ours]
    pairs = [(i, j) for i in range(len(ours)) for j in range(len(ours)) if papers[i] < papers[j]]
    pairs = [(i, j) for i, j in pairs if finite[i] and finite[j]]
    same = sum(max(ours[i]) < min(ours[j]) for i, j in pairs)
    opposite = sum(max(ours[j]) < min(ours[i]) for i, j in pairs)
    text = (
        f"Of {len(pairs)} pairs of rows, {same} are in {order}, {opposite} in the opposite one; in "
        f"{len(pairs) - same - opposite} the seeds overlap."
    )
    return text if all(finite) else f"{text} Rows left out because a training diverged: {finite.count(False)}."


class Column(NamedTuple):
    """A table as `draw` shows it: its title, the distances of all seeds by value, the paper's FIDs."""

    title: str
    distances: dict[str, list[float]]
    fids: list[float]


def draw(path: Path, columns: Sequence[Column], ours: str, papers: str) -> None:
    with run.optional("matplotlib"):
        from matplotlib.figure import Figure
    width = min(4, len(columns))
    height = -(-len(columns) // width)
    figure = Figure(figsize=(3.4 * width, 3.9 * height), dpi=100, layout="constrained")
    panels = figure.subplots(2 * height, width, squeeze=False, gridspec_kw={"height_ratios": [3, 2] * height})
    for i, column in enumerate(columns):
        above, below = panels[2 * (i // width), i % width], panels[2 * (i // width) + 1, i % width]
        for place, values in enumerate(column.distances.values()):
            finite = [value for value in values if np.isfinite(value)]
            above.plot([place] * len(finite), finite, "o", color="C0", markersize=4, alpha=0.6)
            if finite:
                above.plot(place, np.mean(finite), "_", color="C0", markersize=16)
            if len(finite) < len(values):
                above.plot(place, 0.97, "x", color="C3", markersize=6, transform=above.get_xaxis_transform())
        below.plot(column.fids, "s", color="C1", markersize=5)
        for panel, values in ((above, [*itertools.chain(*column.distances.values())]), (below, column.fids)):
            finite = [value for value in values if np.isfinite(value)]
            panel.set_yscale("log" if finite and max(finite) > 3 * min(finite) else "linear")
            panel.tick_params(axis="y", which="both", labelsize=7)
            panel.set_xlim(-0.5, len(column.fids) - 0.5)
            panel.grid(axis="y", alpha=0.3)
        above.set_xticks(range(len(column.fids)), [])
        below.set_xticks(range(len(column.fids)), list(column.distances), rotation=25, fontsize=8)
        above.set_title(column.title, fontsize=9)
    for panel in panels.T.reshape(width, height, 2).transpose(1, 0, 2).reshape(-1, 2)[len(columns) :].flat:
        panel.remove()
    title = f"circles: {ours}, and their mean; crosses: a training diverged; squares: {papers}"
    figure.suptitle(textwrap.fill(title, 40 * width), fontsize=10)
    figure.savefig(path, format="png")
