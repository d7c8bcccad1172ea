"""Tables and pictures of `toy_2d.py`: a leaderboard, what lies behind it, error against time, samples, flows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import install_import_hook
from toy_problems import Cell, copies_of, Density, EDGES, EVALUATIONS, judged_keys, Problem, Quality, samples_of

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import picture, run

FLOW_TIMES = (0.5, 0.7, 1.0)
MARKERS = "os^vD<>pP*Xh"
HIGHEST = 2.0  # error that is drawn: one method that diverged must not make all others look alike


class Entry(NamedTuple):
    """One judged training: `found` is what `toy_problems.judge` returned."""

    cell: Cell
    steps: int
    found: Mapping[str, Any]


class Line(NamedTuple):
    """The trainings of one method with the same settings: one per seed."""

    method: str
    settings: str
    part: float
    steps: int
    found: list[Mapping[str, Any]]

    def values(self, name: str) -> list[float]:
        """A number of the record of every seed."""
        return [found[name] for found in self.found]

    def quality(self, evaluations: int, name: str) -> list[float]:
        return [found["quality"][EVALUATIONS.index(evaluations)][name] for found in self.found]

    def density(self, name: str) -> list[float]:
        return [found["density"][name] for found in self.found]

    @property
    def error(self) -> float:
        return float(np.mean(self.values("overall")))


def lines_of(entries: Sequence[Entry]) -> list[Line]:
    """The best first; a training that diverged last."""
    found: dict[tuple[str, str, float, int], list[Mapping[str, Any]]] = {}
    for cell, steps, values in entries:
        found.setdefault((cell.method, cell.settings, cell.part, steps), []).append(values)
    lines = [Line(*kind, values) for kind, values in found.items()]
    return sorted(lines, key=lambda line: (not math.isfinite(line.error), line.error))


def spread(values: Sequence[float]) -> str:
    """The mean, with half the range if there are several."""
    if not np.isfinite(values).all():
        return "diverged"
    half = f" ± {np.ptp(values) / 2:.1g}" if len(values) > 1 else ""
    return f"{np.mean(values):.2g}{half}"


BOARD = (
    *("", "settings", "error of u", "r = t", "(0, 1)", "W2 of many, 1 step", "W2, 1 step", "2 steps"),
    *("TV, 1 step", "2 steps", "KL, 1 step", "time of a step", "error at equal time", "W2"),
)


def tables(
    data: str,
    entries: Sequence[Entry],
    costs: Mapping[str, float],
    floor: Mapping[str, Any],
    at_data: Sequence[str] = (),
) -> str:
    """The leaderboard, sorted by the error of u, and the other figures.

    **Arguments:** `data` the name; `entries`; `costs` seconds of a step by method, or none; `floor` what samples of the
    data score; `at_data` the methods that learn u(z, 0, t) alone, which come last.
    """
    whole = [line for line in lines_of(entries) if line.part == 1]
    whole.sort(key=lambda line: line.method in at_data)
    seconds = min((costs[line.method] * line.steps for line in whole if line.method in costs), default=math.nan)
    rows = [
        (
            line.method,
            line.settings,
            *judged(line, line.method in at_data),
            *timed(line, entries, costs, seconds, at_data),
        )
        for line in whole
    ]
    best = [f"{floor['quality'][0][name]:.2g}" for name in ("sliced_wasserstein", "total_variation")]
    many = f"{floor['large_sliced_wasserstein']:.2g}"
    rows.append(("samples of the data", "", *[None] * 3, many, best[0], None, best[1], *[None] * 5))
    shown = len(BOARD) if costs else len(BOARD) - 3
    text = f"## {data}\n\n{run.table([row[:shown] for row in rows], BOARD[:shown])}"
    if costs:
        text += f"\n\nTime of a step relative to Flow Matching; equal time: {seconds:.3g} s of CPU time."
    if last := [line.method for line in whole if line.method in at_data]:
        names = ", ".join(dict.fromkeys(last))
        text += f"\n\nThese learn u(z, 0, t) alone, so further evaluations take new noise: {names}."
    if faults := [f"{line.method} ({n})" for line in whole if (n := sum(line.values("faults")))]:
        text += f"\n\nSteps without a finite gradient, which were left out: {', '.join(faults)}."
    return f"{text}\n\n{details(whole, floor)}\n\n{densities(whole)}"


def judged(line: Line, at_data: bool) -> list[str | None]:
    """Errors and distances."""
    errors = [None if at_data else spread(line.values("overall")), spread(line.values("diagonal"))]
    errors += [spread(line.values("one_step"))]
    is_exact = line.found[0]["large_sliced_wasserstein"] is None
    distances = [None if is_exact else spread(line.values("large_sliced_wasserstein"))]
    for name in ("sliced_wasserstein", "total_variation"):
        distances += [spread(line.quality(1, name)), spread(line.quality(2, name))]
    return [*errors, *distances, spread(line.density("divergence"))]


def timed(
    line: Line, entries: Sequence[Entry], costs: Mapping[str, float], seconds: float, at_data: Sequence[str]
) -> list[str | None]:
    """The time of a step relative to Flow Matching, and error and one-step distance after `seconds` of training."""
    if line.settings != "common" or line.method not in costs:
        return [None, None, None]
    lengths = [other for other in lines_of(entries) if other[:2] == line[:2]]
    cost = f"{costs[line.method] / costs['FlowMatching']:.2f}" if "FlowMatching" in costs else None
    error = None if line.method in at_data else value_at(seconds, lengths, costs, "overall")
    return [cost, error, value_at(seconds, lengths, costs, "sliced_wasserstein")]


def value_at(seconds: float, lines: Sequence[Line], costs: Mapping[str, float], name: str) -> str | None:
    """The mean error or one-step distance that a method has reached by then: interpolated between its trainings, on
    logarithmic axes; None before the shortest."""
    spent = [costs[line.method] * line.steps for line in lines]
    means = [np.mean(line.values(name) if name == "overall" else line.quality(1, name)) for line in lines]
    order = np.argsort(spent)
    x, y = np.log(spent)[order], np.log(means)[order]
    if len(x) < 2 or not x[0] - 1e-9 <= math.log(seconds) <= x[-1] + 1e-9:
        return None
    value = math.exp(np.interp(math.log(seconds), x, y))
    return f"{value:.2g}" if math.isfinite(value) else "diverged"


def details(lines: Sequence[Line], floor: Mapping[str, Any]) -> str:
    """Everything that is judged, at every number of evaluations; means over seeds."""
    headers = ("", "settings", "evaluations", "identity", "semigroup", "sliced W2", "energy", "modes", "TV")
    rows = []
    for line in lines:
        residuals = [spread(line.values(name)) for name in ("identity", "semigroup")]
        for number in EVALUATIONS:
            distances = [float(np.mean(line.quality(number, name))) for name in Quality._fields]
            start = (line.method, line.settings, number, *residuals)
            rows.append((*(start if number == 1 else ("", "", number, None, None)), *distances))
    at_best = [floor["quality"][0][name] for name in Quality._fields]
    rows.append(("samples of the data", "", "", None, None, *at_best))
    return run.table(rows, headers)


def densities(lines: Sequence[Line]) -> str:
    """The densities of samples of one evaluation against that of the data; means over seeds."""
    headers = ("", "settings", "KL in nats", "standard error", "effective share", "mean weight", "turned over")
    ordered = sorted(lines, key=lambda line: float(np.nan_to_num(np.mean(line.density("divergence")), nan=math.inf)))
    rows = [
        (line.method, line.settings, *(float(np.mean(line.density(name))) for name in Density._fields))
        for line in ordered
    ]
    return run.table(rows, headers)


def save_pictures(
    report: run.RunDirectory,
    problem: Problem,
    fields: Mapping[str, mfx.AbstractField],
    new_noise: Mapping[str, float],
) -> None:
    """Samples and flows by method; `new_noise` its share before further evaluations, by method."""
    name, limit = problem.name, problem.limit
    samples = {method: samples_of(problem, field, new_noise[method]) for method, field in fields.items()}
    samples["data"] = [problem.data]
    shown = {method: [np.asarray(x)[:, :2] for x in row] for method, row in samples.items()}
    counts = [f"{number} evaluation{'s' if number > 1 else ''}" for number in EVALUATIONS]
    title = f"{name}: samples from the same noise"
    picture.save_point_grid(report.path(f"{name}_samples.png"), shown, counts, limit=limit, title=title)
    one_step = {"data": shown["data"][0]} | {method: row[0] for method, row in shown.items()}
    title = f"{name}: samples of one evaluation"
    picture.save_point_panels(report.path(f"{name}_one_step.png"), one_step, limit=limit, title=title)
    if copies_of(name) == 1:
        fields = {"truth": problem.truth} | {method: field for method, field in fields.items() if method != "Exact"}
        eps = jr.normal(judged_keys().noise, (40, 2))
        flows = {method: picture.flow_of(field, eps, FLOW_TIMES, limit=limit) for method, field in fields.items()}
        columns = [f"-u(z, 0, {t}), towards the data" for t in FLOW_TIMES]
        picture.save_flows(report.path(f"{name}_flows.png"), flows, columns, limit=limit + 0.5)


def save_error_maps(path: Path, data: str, entries: Sequence[Entry]) -> None:
    """The errors in cells of (r, t) with the common settings, means over seeds."""
    lines = [line for line in lines_of(entries) if line[1:3] == ("common", 1) and line.method != "Exact"]
    maps = {line.method: np.mean([found["error_by_cell"] for found in line.found], axis=0) for line in lines}
    maps = {method: values for method, values in maps.items() if np.any(values > 0)}
    if maps:
        title = f"{data}: error of the average velocity by cells of (r, t)"
        value = "E|u - u*|² / E|u*|²"
        picture.save_heat_maps(path, maps, EDGES, row_label="r", column_label="t", value_label=value, title=title)


def save_error_against_time(path: Path, panels: Mapping[str, tuple[Sequence[Entry], Mapping[str, float]]]) -> None:
    """A panel per data set with the error of u against the CPU time of the training, a line per method with the common
    settings, bars from the least to the largest of the seeds."""
    figure = picture.new_figure(4.6 * len(panels) + 2.6, 5)
    methods = dict.fromkeys(e.cell.method for entries, _ in panels.values() for e in entries)
    styles = {
        method: {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "linestyle": ("-", "--")[i // 10 % 2]}
        for i, method in enumerate(methods)
    }
    for (data, (entries, costs)), panel in zip(
        panels.items(), figure.subplots(1, len(panels), squeeze=False).flat, strict=True
    ):
        common = [line for line in lines_of(entries) if line.settings == "common" and line.method in costs]
        for method in dict.fromkeys(line.method for line in common):
            lines = sorted((line for line in common if line.method == method), key=lambda line: line.steps)
            seconds, values = [costs[method] * line.steps for line in lines], [line.values("overall") for line in lines]
            means = np.mean(values, axis=1)
            bars = np.abs(np.stack([means - np.min(values, axis=1), np.max(values, axis=1) - means]))
            panel.errorbar(seconds, means, bars, label=method, markersize=5, linewidth=1, capsize=2, **styles[method])
        panel.set(xscale="log", yscale="log", xlabel="CPU seconds of training", ylabel="error of u")
        panel.set_title(data, parse_math=False)  # a file's name may have dollar signs
        panel.set_ylim(top=min(panel.get_ylim()[1], HIGHEST))
        panel.grid(alpha=0.3, which="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    picture.save_figure(path, figure)
