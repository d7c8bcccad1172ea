"""Which tangent should MeanFlow take? Bias and variance of its gradient, exactly known, and what trainings learn.

    python experiments/tangent_study.py

A run that was stopped, or killed, continues by the same command.

The tangent is b v + (1 - b) u(z, t, t), the target v: MeanFlow at b = 1, `ImprovedMeanFlow` below. With b < 1 the
gradient is biased unless u(z, t, t) is the marginal velocity, and has another variance. arXiv 2605.09235 calls 1 - b
beta: it finds the least squared error of the gradient near beta = 0.94 (b = 0.06), but the best images at b = 1. There
the exact field is not known; here it is.

- Gradients (`gradient_moments.py`): bias, variance and the b of least squared error at every batch, for MeanFlows of
  toy_2d.py after several lengths of training, with the conditional v and with v from references (`StableTarget`). They
  are measured without an adaptive weight, which would add a bias of its own. The size of a batch counts only rows with
  r < t, which are half of the rows of a step.
- Quality: trainings with every b and both v, held against the exact field. With references they have toy_2d.py's
  adaptive weight, without them none.

RESULTS.md beside this file has the figures.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
import toy_2d
import toy_problems
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import gradient_moments as gm

    import mf_eqx as mfx
    from mf_eqx import metrics, picture, run

GIVEN = {"conditional": gm.CONDITIONAL, "references": gm.STABLE}
LINES = {"conditional": "-", "references": "--"}
COSINES = {"cosine with g*": "-", "with descent": ":"}
OF_ONE, AT_BATCH = "of that at b = 1", "equal at batch"
QUALITIES = ("error of u", "error at (0, 1)", "sliced W2")


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A study of the tangent."""

    data: str = "checkerboard"
    """Data set, one of toy_2d.py's."""
    tangents: tuple[float, ...] = (0.0, 0.06, 0.25, 0.5, 0.75, 0.94, 1.0)
    """Parts b of the given velocity v in the tangent b v + (1 - b) u(z, t, t)."""
    seeds: int = 3
    """Trainings of each setting, from seeds 0, 1, ..."""
    steps: int = 4000
    """Training steps of each."""
    stages: tuple[int, ...] = (500, 2000, 5000)
    """Steps of the trainings by MeanFlow, with references, at whose ends gradients are measured."""
    gradient_rows: int = 65536
    """Rows over which gradients are averaged, a multiple of 16."""
    batches: tuple[int, ...] = (16, 128, 1024, 8192)
    """Rows with r < t in a batch, for which the b of least squared error is given; 128 in the trainings."""
    width: int = 96
    """Width of the MLP."""
    depth: int = 5
    """Residual blocks of the MLP, two layers each."""
    samples: int = 20000
    """Samples that are judged."""
    rows: int = 1000
    """Rows (z, r, t) at which fields are held against the truth."""

    def __post_init__(self):
        self.check(gradient_rows=gm.GROUPS)
        run.check_sizes(self, seeds=100, gradient_rows=1 << 20)
        for name in ("tangents", "stages", "batches"):
            if not (values := getattr(self, name)):
                raise ValueError(f"{name} must be at least one number, got none")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {', '.join(map(str, values))}")
        if wrong := [b for b in self.tangents if not 0 <= b <= 1]:
            raise ValueError(f"tangents must lie in [0, 1], got {wrong[0]}")
        for name in ("stages", "batches"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be >= 1, got {min(getattr(self, name))}")
        if self.gradient_rows % gm.GROUPS:
            raise ValueError(f"gradient_rows must be a multiple of {gm.GROUPS}, got {self.gradient_rows}")
        if self.data == toy_problems.STACKED:
            raise ValueError(f"data must be of two dimensions, got {self.data}")
        toy_config(self, Cell("references", 1.0, self.steps, 0))


class Cell(NamedTuple):
    """A training."""

    given: str
    b: float
    steps: int
    seed: int


def stages(config: Config) -> list[Cell]:
    return [Cell("references", 1.0, steps, 0) for steps in config.stages]


def cells(config: Config) -> list[Cell]:
    """Seeds outside: those of one setting compile the same program."""
    settings = [(given, b, config.steps) for given in GIVEN for b in config.tangents]
    return list(dict.fromkeys([Cell(*s, seed) for seed in range(config.seeds) for s in settings] + stages(config)))


def toy_config(config: Config, cell: Cell) -> toy_2d.Config:
    plain = {"references": 0, "power": 0.0} if cell.given == "conditional" else {}
    same = {name: getattr(config, name) for name in ("seeds", "width", "depth", "samples", "rows")}
    return toy_2d.Config(data=(config.data,), methods=("MeanFlow",), steps=cell.steps, **same, **plain)


def training(config: Config, cell: Cell) -> run.Training:
    """The training of toy_2d.py with another tangent."""
    made = toy_2d.training(toy_config(config, cell), toy_problems.Cell(config.data, "MeanFlow", cell.seed))
    assert made is not None
    identity = mfx.MeanFlow() if cell.b == 1 else mfx.ImprovedMeanFlow(cell.b)
    objective = dataclasses.replace(objective_of(made), identity=identity)
    return made._replace(name="_".join(map(str, cell)), step=dataclasses.replace(made.step, objective=objective))


def objective_of(training: run.Training) -> mfx.Objective:
    assert isinstance(training.step.objective, mfx.Objective)
    return training.step.objective


class Result(NamedTuple):
    """What a training has learnt, and its gradients if it is a stage."""

    quality: dict[str, float]
    gradients: gm.Moments | None


def judge(
    config: Config, problem: toy_problems.Problem, rows: gm.Rows, cell: Cell, state: mfx.TrainState | None
) -> Result:
    assert state is not None
    field = state.averages[0]
    errors = metrics.field_errors(field, problem.known)
    eps = jr.normal(toy_problems.judged_keys().noise, problem.data.shape)
    distance = toy_problems.large_distance(problem, toy_problems.generate(field, eps, 1))
    found = gm.moments(*gm.gradients(state.field, rows)) if cell in stages(config) else None
    values = (float(errors.overall.value), float(errors.one_step.value), distance)
    return Result(dict(zip(QUALITIES, values, strict=True)), found)


def note(cell: Cell, result: Result) -> str:
    shown = {name: f"{value:.3g}" for name, value in result.quality.items()}
    return f"b {cell.b:g}, {cell.given}, {cell.steps} steps, seed {cell.seed}: {shown}"


def main(config: Config) -> None:
    """Measure gradients of stages, train with every tangent, and hold both against the truth."""
    run.require("matplotlib")
    if config.test_run:
        config = dataclasses.replace(config, samples=100, rows=20, gradient_rows=64)
    trainings = {cell: training(config, cell) for cell in cells(config)}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)
        print(f"integrating the truth at {config.gradient_rows} rows", flush=True)
        first = stages(config)[0]
        problem = toy_problems.make_problem(config.data, samples=config.samples, rows=config.rows)
        draw = functools.partial(gm.draw_rows, objective_of(trainings[first]), problem.distribution, problem.truth)
        judge_cell = functools.partial(judge, config, problem, draw(config.gradient_rows, jr.key(2**31 - 5)))
        results = run.train_cells(config, trainings, judge_cell, directory, note=note)
        save(config, results, directory)


def save(config: Config, results: Mapping[Cell, Result], directory: run.RunDirectory) -> None:
    """Tables and the figure."""
    found = {cell.steps: g for cell in stages(config) if (g := results[cell].gradients) is not None}
    of_stage = [(steps, moments, given) for steps, moments in found.items() for given in GIVEN]
    measured, best = [], []
    for steps, moments, given in of_stage:
        for b in config.tangents:
            figures: dict[str, Any] = {
                name: gm.with_error(x) for name, x in gm.figures(moments, GIVEN[given], b).items()
            }
            if given == "references":  # which the rows of a batch share: its variance is not that of one row / batch
                figures[AT_BATCH] = None
            measured.append({"steps": steps, "v": given, "b": b, **figures})
        if given == "conditional":
            least = {str(n): gm.with_error(gm.best_tangent(moments, gm.CONDITIONAL, n)) for n in config.batches}
            best.append({"steps": steps, **least})
    judged = [
        {"v": given, "b": b, **{name: quality(config, results, name, given, b) for name in QUALITIES}}
        for given in GIVEN
        for b in config.tangents
    ]
    heads = (
        f"Gradients over {config.gradient_rows} rows, value ± standard error: bias in units of |g\\*|, variance of one "
        "row in units of |g\\*|², the batch at which |bias|² is variance / batch, cosines of the expected gradient",
        "The b in [0, 1] with the least squared error of the gradient with the conditional v, by rows of a batch",
        f"Quality after {config.steps} steps, mean ± half the range of {config.seeds} seeds",
    )
    parts = [f"{head}:\n\n{as_table(lines)}" for head, lines in zip(heads, (measured, best, judged), strict=True)]
    text = "\n\n".join([*parts, f"{time.perf_counter() - directory.opened:.0f} seconds in all."])
    trained = [{**cell._asdict(), **result.quality} for cell, result in results.items()]
    directory.save_results(text, [{"gradients": measured, "best b": best, "trainings": trained}])
    save_figure(directory.path("tangent_study.png"), config, results, found)
    print(f"{text} Figure, results.md and results.json are in {directory.root}.")


def quality(config: Config, results: Mapping[Cell, Result], name: str, given: str, b: float) -> list[float]:
    """Of all seeds."""
    return [results[Cell(given, b, config.steps, seed)].quality[name] for seed in range(config.seeds)]


def as_table(lines: list[dict[str, Any]]) -> str:
    """Pairs are values with their errors, lists all seeds."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            value = (np.mean(value), np.ptp(value) / 2) if len(value) > 1 else value[0]
        if not isinstance(value, tuple):
            return value
        return f"{value[0]:.3g} ± {value[1]:.1g}" if np.isfinite(value).all() else None

    return run.table([[text(value) for value in line.values()] for line in lines], list(lines[0]))


def save_figure(path: Path, config: Config, results: Mapping[Cell, Result], found: Mapping[int, gm.Moments]) -> None:
    """Top: gradients, colours are stages (batches in the last panel). Bottom: best b, and quality of every seed."""
    figure = picture.new_figure(16, 7.5)
    (bias, cosine, variance, error), (best, *qualities) = figure.subplots(2, 4)
    grid, batches, last = np.linspace(0, 1, 41), np.logspace(0, 7, 71), list(found)[-1]
    for i, (steps, moments) in enumerate(found.items()):
        name, colour = f"{steps} steps", f"C{i}"
        curves = {key: [gm.figures(moments, gm.STABLE, b)[key][0] for b in grid] for key in ("bias", *COSINES)}
        bias.plot(grid, curves["bias"], color=colour, label=name)
        for key, line in COSINES.items():
            cosine.plot(grid, curves[key], line, color=colour, label=f"{name}, {key.removeprefix('cosine ')}")
        for given, line in LINES.items():
            style = {"color": colour, "linestyle": line, "label": f"{name}, {given}"}
            variance.plot(grid, [gm.figures(moments, GIVEN[given], b)[OF_ONE][0] for b in grid], **style)
        least = [gm.best_tangent(moments, gm.CONDITIONAL, batch)[0] for batch in batches]
        best.plot(batches, least, color=colour, label=name)
    for i, batch in enumerate(config.batches):
        values = [gm.squared_error(found[last], gm.CONDITIONAL, b, batch) for b in grid]
        error.plot(grid, values, color=f"C{i}", label=f"batch {batch}")
    for panel, name in zip(qualities, QUALITIES, strict=True):
        for i, given in enumerate(GIVEN):
            values = np.array([quality(config, results, name, given, b) for b in config.tangents])
            panel.plot(config.tangents, values, ".-", color=f"C{i}", linewidth=0.4)
            panel.plot(config.tangents, values.mean(1), LINES[given], color=f"C{i}", label=given)
        panel.set(title=f"{name}: every seed, mean", xlabel="b", yscale="log")
    bias.set(title="bias / |g*|", xlabel="b")
    cosine.set(title="cosine of the expected gradient", xlabel="b")
    variance.set(title="variance, 1 at b = 1", xlabel="b")
    error.set(title=f"squared error after {last} steps, 1 at b = 1", xlabel="b", yscale="log")
    best.set(title="b of least squared error, conditional v", xlabel="rows with r < t in a batch", xscale="log")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
        panel.title.set_fontsize("medium")
    picture.save_figure(path, figure)


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
