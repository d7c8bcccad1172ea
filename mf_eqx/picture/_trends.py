"""Plots of results against a parameter: several panels of several series, with one point per seed."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._figure import new_figure, plain, save_figure


class Series(NamedTuple):
    """One line of `save_trends`.

    **Arguments:** `label`; `values` of all seeds, by the parameter's value; `colour` and `line` as in matplotlib.
    """

    label: str
    values: Mapping[float, Sequence[float]]
    colour: str
    line: str = "-"


def save_trends(path: str | Path, panels: Mapping[str, Sequence[Series]], parameter: str, *, least: float = 0) -> None:
    """Save plots of results against a parameter as PNG, on a logarithmic y axis: points are seeds, lines their means.

    **Arguments:** `path` of the file; `panels` their titles and series; `parameter` its name; `least`: values up to
    this one are skipped, since a logarithmic axis cannot show them.

    **Raises:** `MissingDependency` without matplotlib.
    """
    figure = new_figure(3.6 * len(panels), 3.6)
    for (title, series), panel in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False).flat, strict=True):
        for each in series:
            points = np.array([(x, y) for x, seeds in each.values.items() for y in seeds if y > least])
            means = np.array([(x, np.mean(seeds)) for x, seeds in each.values.items() if min(seeds) > least])
            if len(points):
                panel.plot(*points.T, ".", color=each.colour, label=None if len(means) else plain(each.label))
            if len(means):
                panel.plot(*means.T, each.line, color=each.colour, label=plain(each.label))
        panel.set(title=plain(title), xlabel=plain(parameter), yscale="log")
        panel.grid(alpha=0.3)
    pairs = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in figure.axes)
    by_label: dict[str, Any] = {}
    for handle, label in itertools.chain.from_iterable(pairs):
        by_label.setdefault(label, handle)
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize="small")
    save_figure(path, figure)
