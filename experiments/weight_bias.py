"""What the adaptive weight (Eq. 22) does to the field: its bias, exactly and in trained networks.

    python experiments/weight_bias.py

A run that was stopped, or killed, continues by the same command.

With a power p > 0 Flow Matching, like the r = t rows of every objective, learns not the mean of the conditional
velocities but something nearer to their mode. Three fields for every p and offset c:

- the flow of the weighted velocity (`exact.WeightedVelocity`), which Flow Matching would learn from unlimited data: no
  network, no training;
- a MeanFlow trained as usual, on conditional velocities. At r = t it learns the weighted velocity as well; its rows
  with r < t have other noise, (I - (t - r) du/dz) (v_t - v), and another bias;
- the same trained on the exact marginal velocity, whose mean is its mode: training error alone.

RESULTS.md beside this file has the figures.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax.random as jr
import numpy as np
import toy_2d
import toy_problems
from jaxtyping import Array, Float, install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import exact, metrics, picture, run

EXACT, CONDITIONAL, MARGINAL = "flow of the weighted v", "MeanFlow, conditional target", "MeanFlow, marginal target"
LINES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A study of the weight."""

    data: str = "eight_gaussians"
    """Data set, one of toy_2d.py's."""
    powers: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Powers p."""
    offsets: tuple[float, ...] = (0.01, 1.0)
    """Offsets c, in squared units of the data, summed over both dimensions."""
    seeds: int = 2
    """Trainings of each setting, from seeds 0, 1, ..."""
    steps: int = 4000
    """Training steps."""
    samples: int = 2000
    """Samples that are judged."""
    rows: int = 1000
    """Rows (z, r, t) at which fields are held against the truth."""

    def __post_init__(self):
        self.check()
        for name in ("powers", "offsets"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be at least one number, got none")
        if wrong := [power for power in self.powers if power and not 0.2 <= power <= 2]:
            raise ValueError(f"powers must be 0 or lie in [0.2, 2], got {wrong[0]}")
        if wrong := [offset for offset in self.offsets if not offset > 0]:
            raise ValueError(f"offsets must be > 0, got {wrong[0]}")
        if len(self.offsets) > len(LINES):
            raise ValueError(f"offsets must be at most {len(LINES)}, got {len(self.offsets)}")
        if not 1 <= self.seeds <= 100:
            raise ValueError(f"seeds must lie in [1, 100], got {self.seeds}")
        if self.data == toy_problems.STACKED:
            raise ValueError(f"data must be of two dimensions, got {self.data}")
        for cell in cells(self):
            if cell.seed == 0:
                toy_config(self, cell)


class Cell(NamedTuple):
    """What is judged."""

    kind: str
    power: float
    offset: float
    seed: int


def cells(config: Config) -> list[Cell]:
    """Seeds outside: those of one setting compile the same program."""
    weights = [(p, c) for p in config.powers for c in (config.offsets if p else config.offsets[:1])]
    kinds = {EXACT: 1, CONDITIONAL: config.seeds, MARGINAL: config.seeds}
    return [Cell(k, *w, seed) for seed in range(config.seeds) for k, n in kinds.items() if seed < n for w in weights]


def toy_config(config: Config, cell: Cell) -> toy_2d.Config:
    return dataclasses.replace(
        toy_2d.PLAIN,
        data=(config.data,),
        methods=("MeanFlow",),
        seeds=config.seeds,
        steps=config.steps,
        samples=config.samples,
        rows=config.rows,
        marginal=cell.kind == MARGINAL,
        power=cell.power,
        offset=cell.offset,
    )


class Result(NamedTuple):
    """One field, held against the truth; samples by one evaluation."""

    figures: dict[str, float]
    samples: Float[Array, "rows dim"]


def training(config: Config, cell: Cell) -> run.Training | None:
    """What the cell trains, if anything."""
    if cell.kind == EXACT:
        return None
    made = toy_2d.training(toy_config(config, cell), toy_problems.Cell(config.data, "MeanFlow", cell.seed))
    return made and made._replace(name="_".join(map(str, cell)))


def judge(problem: toy_problems.Problem, cell: Cell, state: mfx.TrainState | None) -> Result:
    if state is None:
        weight = mfx.AdaptiveWeight(cell.power, cell.offset)
        # Its error is the iteration's, far above that of the solver.
        field = exact.AverageVelocity(exact.WeightedVelocity(problem.mixture, weight), rtol=1e-3, atol=1e-3)
    else:
        field = state.averages[0]
    errors = metrics.field_errors(field, problem.known)
    samples = toy_problems.generate(field, jr.normal(toy_problems.judged_keys().noise, problem.data.shape), 1)
    quality = toy_problems.quality(problem, samples)
    figures = {
        "error of v": float(errors.diagonal.value),
        "error of u": float(errors.overall.value),
        "error at (0, 1)": float(errors.one_step.value),
        "sliced W2": quality.sliced_wasserstein,
        "energy distance": quality.energy_distance,
        "modes": quality.mode_coverage,
    }
    return Result(figures, samples)


def save_figure(path: Path, results: dict[Cell, Result]) -> None:
    """Errors and distances against p: colours are kinds, lines are offsets, points are seeds."""
    offsets, powers = (sorted(set(values)) for values in ([c.offset for c in results], [c.power for c in results]))

    def series(name: str, kind: str, colour: str, offset: float, line: str) -> picture.Series:
        found = {
            c: r.figures[name] for c, r in results.items() if c.kind == kind and (c.offset == offset or not c.power)
        }
        values = {p: [value for c, value in found.items() if c.power == p] for p in powers}
        return picture.Series(f"{kind}, c = {offset:g}", values, colour, line)

    kinds = ((EXACT, "black"), (CONDITIONAL, "C0"), (MARGINAL, "C1"))
    lines = list(zip(offsets, LINES, strict=False))
    names = ("error of v", "error of u", "sliced W2", "energy distance")
    panels = {name: [series(name, *kind, *line) for kind in kinds for line in lines] for name in names}
    picture.save_trends(
        path, panels, "power p", least=1e-4
    )  # without a weight it is the true flow: no error to be drawn


def note(cell: Cell, result: Result) -> str:
    shown = {name: f"{value:.3g}" for name, value in result.figures.items()}
    return f"p {cell.power:g}, c {cell.offset:g}, {cell.kind}, seed {cell.seed}: {shown}"


def main(config: Config) -> None:
    """Hold weighted regressions against the truth."""
    run.require("matplotlib")
    if config.test_run:
        config = dataclasses.replace(config, samples=100, rows=20)
    trainings = {cell: training(config, cell) for cell in cells(config)}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)
        problem = toy_problems.make_problem(config.data, samples=config.samples, rows=config.rows)
        judge_cell = functools.partial(judge, problem)
        results = run.train_cells(config, trainings, judge_cell, directory, note=note)
        save(config, results, problem.limit, directory)


def save(config: Config, results: dict[Cell, Result], limit: float, directory: run.RunDirectory) -> None:
    """Tables and pictures."""
    rows = []
    for kind, power, offset in dict.fromkeys(cell[:3] for cell in results if cell.seed == 0):
        of_seeds = [result.figures for cell, result in results.items() if cell[:3] == (kind, power, offset)]
        rows.append((kind, power, offset, *(float(np.mean([f[name] for f in of_seeds])) for name in of_seeds[0])))
    headers = ("field", "p", "c", *next(iter(results.values())).figures)
    text = f"Mean of {config.seeds} seeds, one evaluation.\n\n{run.table(rows, headers)}"
    directory.save_results(text, [{**cell._asdict(), **result.figures} for cell, result in results.items()])
    save_figure(directory.path("weight_bias.png"), results)
    shown = {
        kind: [results[c].samples for c in results if c[0] == kind and c.seed == 0 and c.offset == config.offsets[0]]
        for kind in (EXACT, CONDITIONAL, MARGINAL)
    }
    columns = [f"p = {power:g}" for power in config.powers]
    picture.save_point_grid(directory.path("samples.png"), shown, columns, limit=limit)
    print(
        f"{text}\n\n{time.perf_counter() - directory.opened:.0f} seconds. Pictures and results are in {directory.root}."
    )


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
