"""Results against a parameter: several figures of several series, seed by seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._optional import optional


class Series(NamedTuple):
    """One line of `save_trends`.

    **Arguments:** `label`; `values` of every seed by the parameter's value; `colour` and `line` as matplotlib has them.
    """

    label: str
    values: Mapping[float, Sequence[float]]
    colour: str
    line: str = "-"


def save_trends(path: str | Path, panels: Mapping[str, Sequence[Series]], parameter: str, *, least: float = 0) -> None:
    """Save figures against a parameter as PNG, a panel each, on logarithmic axes: points are seeds, lines their means.

    **Arguments:** `path` of the file; `panels` their titles and series; `parameter` its name; values up to `least`
    are left out, since a logarithmic axis has no place for them.

    **Raises:** `MissingDependency` without matplotlib.
    """
    with optional("matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(3.6 * len(panels), 3.6), dpi=100, layout="constrained")
    for (title, series), panel in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False).flat, strict=True):
        for one in series:
            points = np.array([(x, y) for x, many in one.values.items() for y in many if y > least])
            means = np.array([(x, np.mean(many)) for x, many in one.values.items() if min(many) > least])
            if len(means):
                panel.plot(*points.T, ".", color=one.colour)
                panel.plot(*means.T, one.line, color=one.colour, label=one.label)
        panel.set(title=title, xlabel=parameter, yscale="log")
        panel.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, format="png")
