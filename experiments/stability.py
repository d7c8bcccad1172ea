"""What keeps a training from diverging? Remedies, one at a time, for trainings that are unstable without them.

    python experiments/stability.py
    python experiments/stability.py --cases digits --remedies none QK-norm

A run that was stopped, or killed, continues by the same command.

All cases have a plain squared error, no clipping, targets of single rows and a learning rate that is too high. A spike
is a line of the log (a mean over 25 steps) whose raw error of rows with r = t is more than three times the median of
the twenty lines before it.

README.md beside this file says what to do when a training diverges, RESULTS.md has the figures.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ablation_recipes
import ablation_tables
import digits
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import toy_problems
from jaxtyping import Array, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import exact, metrics, picture, run
    from mf_eqx.data import DrawRows


class Remedy(NamedTuple):
    """What is changed in a case."""

    rate: float = 1.0
    """Factor of the learning rate."""
    warmup: float = 0.02
    """Part of the training over which the learning rate rises."""
    clip: float | None = None
    """Largest norm of a gradient, None for any."""
    weight: mfx.AbstractWeight = mfx.ConstantWeight()
    short_gaps_first: bool = False
    """Over the first half of the training (`GapCurriculum`)."""
    references: bool = False
    """Targets have no variance (`StableTarget`)."""
    qk_norm: bool = False


REMEDIES = {
    "none": Remedy(),
    "rate / 4": Remedy(rate=1 / 4),
    "long warm-up": Remedy(warmup=0.25),
    "clipped gradients": Remedy(clip=1.0),
    "unit steps": Remedy(weight=mfx.AdaptiveWeight(0.5, 0.01)),
    "short gaps first": Remedy(short_gaps_first=True),
    "references": Remedy(references=True),
    "QK-norm": Remedy(qk_norm=True),
}


class Case(NamedTuple):
    """A training that is unstable without a remedy, and how its field is judged."""

    title: str
    identity: mfx.AbstractIdentity
    times: mfx.AbstractTimes
    labels: int | None
    references: mfx.StableTarget
    make_field: Callable[[bool, Key[Array, ""]], mfx.AbstractField]
    draw: Callable[[Key[Array, ""]], mfx.Batch]
    judge: Callable[[mfx.AbstractField], float]
    judged: str
    steps: int
    learning_rate: float


@functools.cache
def checkerboard(identity: mfx.AbstractIdentity) -> Case:
    distribution = toy_problems.distribution_of("checkerboard")
    problem = toy_problems.make_problem("checkerboard", samples=10, rows=1000)

    def make_field(qk_norm: bool, key: Key[Array, ""]) -> mfx.AbstractField:
        return mfx.MLP(2, width=96, depth=3, key=key)

    return Case(
        f"{type(identity).__name__}, checkerboard",
        identity,
        mfx.LogitNormalTimes(0, 2),
        labels=None,
        references=mfx.StableTarget(exact.draw(distribution, 1 << 16, jr.key(2**31 - 2)), number=512),
        make_field=make_field,
        draw=exact.Draw(distribution, 256),
        judge=lambda field: float(metrics.field_errors(field, problem.known).overall.value),
        judged="error of u",
        steps=3000,
        learning_rate=1e-2,
    )


@functools.cache
def handwritten_digits() -> Case:
    config, recipe = digits.Config(), ablation_recipes.handwritten_digits()
    train, judge = digits.load(config).train, recipe.open_judge(Path())
    x, label = jnp.asarray(train.x), jnp.asarray(train.label)

    def make_field(qk_norm: bool, key: Key[Array, ""]) -> mfx.AbstractField:
        size = mfx.DiTSize(config.depth, config.width, config.heads, config.patch)
        return mfx.DiT((1, 8, 8), size, labels=digits.CLASSES, qk_norm=qk_norm, unroll=True, key=key)

    return Case(
        "MeanFlow, digits",
        mfx.MeanFlow(),
        mfx.UniformTimes(),
        labels=digits.CLASSES,
        references=mfx.StableTarget(x, label),
        make_field=make_field,
        draw=DrawRows(x, label, config.batch),
        judge=lambda field: judge.score(field, ablation_tables.Setting())["distance"],
        judged="Frechet distance",
        steps=600,
        learning_rate=2e-2,
    )


CASES: dict[str, Callable[[], Case]] = {
    "MeanFlow": functools.partial(checkerboard, mfx.MeanFlow()),
    "ImprovedMeanFlow": functools.partial(checkerboard, mfx.ImprovedMeanFlow()),
    "digits": handwritten_digits,
}
WITH_ATTENTION = ("digits",)
"""Cases whose network can have QK-norm."""


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A study of stability."""

    cases: tuple[str, ...] = tuple(CASES)
    """MeanFlow and ImprovedMeanFlow, by an MLP on the checkerboard; digits, by MeanFlow and a DiT."""
    remedies: tuple[str, ...] = tuple(REMEDIES)
    """none; rate / 4; long warm-up (a quarter of the training); clipped gradients (norm 1); unit steps (p = 1/2, c =
    0.01); short gaps first; references; QK-norm (of the DiT)."""
    seeds: int = 2
    """Trainings of each case and remedy, from seeds 0, 1, ..."""
    parts: float = 1.0
    """Factor of the numbers of steps: 3000 on the checkerboard, 600 on digits."""
    log_every: int = 25
    """Steps between lines of each cell's metrics.jsonl, in which spikes are counted."""
    most_faults: int = 10**6
    """Steps in a row without a finite loss and gradient after which the run stops, by default never. Such a step leaves
    the state unchanged; a training that diverges is judged by its last finite state, and the table says so."""

    def __post_init__(self):
        self.check(seeds=1)
        run.check_sizes(self, seeds=100)
        run.check_among(self, cases=CASES, remedies=REMEDIES)
        if not 0 < self.parts <= 100:
            raise ValueError(f"parts must lie in (0, 100], got {self.parts}")
        if not cells(self):
            found = f"{', '.join(self.remedies)} for {', '.join(self.cases)}"
            raise ValueError(f"remedies must hold one that fits a case (QK-norm fits digits alone), got {found}")


class Cell(NamedTuple):
    """A training."""

    case: str
    remedy: str
    seed: int


def cells(config: Config) -> list[Cell]:
    """Seeds outside: those of one setting compile the same program."""
    return [
        Cell(case, remedy, seed)
        for seed in range(config.seeds)
        for case in config.cases
        for remedy in config.remedies
        if case in WITH_ATTENTION or not REMEDIES[remedy].qk_norm
    ]


def steps_of(config: Config, cell: Cell) -> int:
    return max(round(config.parts * CASES[cell.case]().steps), 2)


def objective(case: Case, remedy: Remedy, steps: int) -> mfx.Objective:
    weight = remedy.weight
    if remedy.short_gaps_first:
        weight = mfx.GapCurriculum(weight, optax.linear_schedule(0.0, 1.0, steps // 2))
    return mfx.Objective(
        case.identity,
        time_pairs=mfx.TimePairs(case.times),
        identity_share=0.5,
        weight=weight,
        label_dropout=None if case.labels is None else mfx.LabelDropout(0.1, case.labels),
        stable_target=case.references if remedy.references else None,
    )


@functools.cache
def train_step(config: Config, cell: Cell) -> mfx.TrainStep:
    """One object for all seeds, whose program is then compiled once."""
    case, remedy, steps = CASES[cell.case](), REMEDIES[cell.remedy], steps_of(config, cell)
    rate, warmup = case.learning_rate * remedy.rate, round(remedy.warmup * steps)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(steps, warmup + 1), rate / 100)
    optimizer = optax.adam(schedule)
    if remedy.clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(remedy.clip), optimizer)
    return mfx.TrainStep(objective(case, remedy, steps), optimizer, [mfx.ExponentialAverage(0.99)])


def name_of(cell: Cell) -> str:
    return re.sub(r"\W+", "_", "_".join(map(str, cell)))


def training(config: Config, cell: Cell) -> run.Training:
    case, (field_key, run_key) = CASES[cell.case](), jr.split(jr.key(cell.seed))
    step = train_step(config, cell._replace(seed=0))
    make_field = functools.partial(case.make_field, REMEDIES[cell.remedy].qk_norm, field_key)
    return run.Training(name_of(cell), step, make_field, case.draw, steps_of(config, cell), run_key)


def spikes(errors: Sequence[float]) -> int:
    """Lines whose error is above three times the median of the twenty before, or not finite."""
    medians = [float(np.median(errors[i - 20 : i])) for i in range(20, len(errors))]
    return sum(not error <= 3 * median for error, median in zip(errors[20:], medians, strict=True))


class Result(NamedTuple):
    """What a training has come to, and the raw error of its rows with r = t by step."""

    quality: float
    spikes: int
    faults: int
    errors: dict[int, float]


def judge(directory: run.RunDirectory, config: Config, cell: Cell, state: mfx.TrainState | None) -> Result:
    assert state is not None
    records = run.RunDirectory(directory.root / "cells" / name_of(cell)).records()
    errors = {record["step"]: _number(record["boundary_error"]) for record in records}
    faults = int(state.faults.total)
    return Result(CASES[cell.case]().judge(state.averages[0]), spikes([*errors.values()]), faults, errors)


def _number(value: float | None) -> float:
    """NaN for the null that the log has in place of numbers that are not finite."""
    return math.nan if value is None else value


def note(cell: Cell, result: Result) -> str:
    return f"{', '.join(map(str, cell))}: {result.quality:.3g}, {result.spikes} spikes, {result.faults} faults"


def save(config: Config, results: Mapping[Cell, Result], directory: run.RunDirectory) -> str:
    """The table and the figure. Returns the table."""
    rows = []
    for case, remedy in dict.fromkeys(cell[:2] for cell in results):
        of_seeds = [results[cell] for cell in results if cell[:2] == (case, remedy)]
        columns = ([r.quality for r in of_seeds], [r.spikes for r in of_seeds], [r.faults for r in of_seeds])
        rows.append((case, remedy, *(", ".join(f"{value:.3g}" for value in column) for column in columns)))
    judged = "; ".join(f"{case}: {CASES[case]().judged}" for case in config.cases)
    table = run.table(rows, ("case", "remedy", "quality", "spikes", "steps left out as not finite"))
    text = f"Every seed. Quality, lower is better: {judged}.\n\n{table}"
    directory.save_results(text, [{**cell._asdict(), **result._asdict()} for cell, result in results.items()])
    save_figure(directory.path("stability.png"), config, results)
    return text


def save_figure(path: Path, config: Config, results: Mapping[Cell, Result]) -> None:
    """The raw error of rows with r = t by step, every seed: a row of panels for each case, a panel for each remedy."""
    remedies = list(dict.fromkeys(cell.remedy for cell in results))
    figure = picture.new_figure(2.1 * len(remedies), 2.4 * len(config.cases))
    panels = figure.subplots(len(config.cases), len(remedies), squeeze=False, sharex="row", sharey="row")
    for row, case in zip(panels, config.cases, strict=True):
        row[0].set_ylabel(CASES[case]().title, fontsize="x-small")
        for panel, remedy in zip(row, remedies, strict=True):
            for cell, result in results.items():
                if cell[:2] == (case, remedy):
                    panel.plot([*result.errors], [*result.errors.values()], color=f"C{cell.seed}", linewidth=0.8)
            panel.set(yscale="log")
            panel.set_title(remedy, fontsize="small")
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize="x-small")
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Train every case with every remedy, and count what goes wrong."""
    run.require("matplotlib")
    trainings = {cell: training(config, cell) for cell in cells(config)}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)
        judge_cell = functools.partial(judge, directory, config)
        results = run.train_cells(config, trainings, judge_cell, directory, note=note)
        text = f"{save(config, results, directory)}\n\n{time.perf_counter() - directory.opened:.0f} seconds."
        print(f"{text} Figure, results.md and results.json are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
