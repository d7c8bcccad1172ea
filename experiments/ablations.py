"""The ablations of the MeanFlow paper (Tab. 1a to 1f and Tab. 5) as trends, on data that everyone has.

    python experiments/ablations.py                      all tables on eight Gaussians
    python experiments/ablations.py --only 1a 1b         two of them
    python experiments/ablations.py --data digits --only 1a
    python experiments/ablations.py --data fashion --only 1a 1b 1e 1f 5      an estimated 90 minutes on 2 cores
    python experiments/ablations.py --method Shortcut    the tables that another method has

Every cell is one training from one seed. Finished cells are kept in runs/ablations/<data>/cells.jsonl, those of other
methods than MeanFlow in runs/ablations/<data>_<method>, and a cell that is there is not trained again: tables share
their cells, and more seeds add to those that exist. A command that was stopped, or killed, goes on where it was.

The paper's column is FID on ImageNet, of 400,000 steps of batch 256 around p = 1 and lognorm(-0.4, 1.0), by Adam with
betas 0.9 and 0.95, a constant rate of 1e-4 and an average of decay 0.9999. Fashion-MNIST has the same p and times here,
points and digits have p = 0 and uniform times. Adam's betas (0.9 and 0.999), the rate with its warm-up and decay and
the average differ from the paper's everywhere, the batch on images (64), and far smaller networks take far fewer steps.
What can agree is the order. The column is MeanFlow's beside other methods, too.

Gradients are clipped to norm 1 on points and digits, whose p = 0 lets a single row pull without bound: without it
single steps ruined trainings with a large p or kappa. On Fashion-MNIST they are not, since the paper tells of no
clipping. A cell with ten steps in a row whose loss or gradient is not finite is shown as diverged.

Guidance moves samples away from the data: in Tab. 1f and 5 of points read the distance to the guided truth. Share 0 is
judged like all others, at u(z, 0, 1), which Flow Matching never trained; toy_2d.py has Flow Matching as it is meant to
be used. Images of Fashion-MNIST are judged by features of EfficientNet-Lite0 (extra `features`), by those of a
classifier and by what it reads; their row `real data` has as many training images beside the test images, and the
classifier's accuracy on the test images. That of digits has one random half of the data beside the other, and the
classifier's accuracy on digits that are held out. RESULTS.md beside this file has the tables that were run, and says
where their orders agree.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import fashion
import image_samples
import jax.random as jr
import numpy as np
import optax
import toy_2d
from ablation_images import fashion_mnist
from ablation_recipes import (
    CENTRES,
    CLASSES,
    DIVERGED,
    eight_gaussians,
    handwritten_digits,
    Judge,
    LABEL_DROPOUT,
    Numbers,
    Recipe,
)
from ablation_report import agreement, Column, draw, rounded, spread
from ablation_tables import Cell, EMBEDDINGS, paper_tables, Setting, Table
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, picture, run


NAMES = tuple(paper_tables(Setting()))
"""Of all tables."""


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A run of ablations."""

    data: Literal["eight_gaussians", "digits", "fashion"] = "eight_gaussians"
    """eight_gaussians: four classes of two opposite Gaussians each, an MLP, distance to the truth known. digits: a DiT,
    Frechet distance in pixels. fashion: Fashion-MNIST, a DiT, Frechet distance in features of EfficientNet-Lite0 and of
    a classifier, classes that are read."""
    files: str = fashion.PLACE
    """With --data fashion: the folder with its four IDX files."""
    method: str = "MeanFlow"
    """The identity of mf_eqx that is trained, by name."""
    identity: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity, which join the methods by their
    names. When the file changes, their cells are trained again."""
    only: tuple[str, ...] | None = None
    """Tables: 1a (share), 1b (tangent), 1c (embedding), 1d (times), 1e (p), 1f (omega), 5 (kappa); by default all that
    the method has. Only MeanFlow has 1b; methods that learn from pairs of data and noise have neither 1f nor 5; methods
    that need boundary rows (see the README's table of methods) have no share of 100% in 1a. In 1e the weight of a
    method with a loss of its own applies to rows with r = t alone."""
    seeds: int = 2
    """Trainings of each cell, from seeds 0, 1, ..."""
    steps: int | None = None
    """Training steps of a cell, by default 4000 for eight_gaussians, 1500 for digits, 2000 for fashion."""
    save_every: int = 200
    """Steps between checkpoints of a cell; its last step is always saved."""
    log_every: int = 100
    """Steps between lines of each cell's metrics.jsonl, or slightly fewer, to make the parts equal; each line is the
    mean over these steps. A cell can be stopped after each line."""
    most_faults: int = 10**6
    """Steps in a row without a finite loss and gradient after which the whole run stops. Such a step leaves the state
    unchanged. By default the run goes on, and a cell with ten such steps in a row is recorded as diverged."""
    name: str = ""
    """Directory below runs/ablations where cells, tables and pictures are kept, by default that of the data set and
    the method."""

    def __post_init__(self):
        self.check(seeds=1)
        run.check_sizes(self, seeds=100)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.method not in (known := toy_2d.identities(self.identity, 1)):
            raise ValueError(f"method must be among {', '.join(known)}; got {self.method}")
        if not tables(self):
            raise ValueError(f"method must be one that a table can have, got {self.method}, which no table can")
        if self.files != fashion.PLACE and self.data != "fashion":
            raise ValueError(f"files must be left out with --data {self.data}, got {self.files}")
        if self.only is None:
            return
        if unknown := [name for name in self.only if name not in NAMES]:
            raise ValueError(f"only must be among {', '.join(NAMES)}; got {', '.join(unknown)}")
        if len(set(self.only)) < len(self.only):
            raise ValueError(f"only must differ from each other, got {', '.join(self.only)}")
        if not self.only:
            raise ValueError(f"only must be at least one of {', '.join(NAMES)}; got none")
        for name in self.only:
            if name not in tables(self):
                reason = next(iter(refused(self, name).values()))
                raise ValueError(f"only must be among the tables of {self.method}, got {name}: {reason}")


def identity(config: Config, setting: Setting, steps: int) -> mfx.AbstractIdentity | None:
    """The method in one cell; None if no row carries it.

    **Raises:** `ValueError` if the setting has a tangent that the method has not.
    """
    method = toy_2d.identities(config.identity, steps)[config.method]
    if isinstance(method, mfx.MeanFlow):
        method = mfx.MeanFlow(*setting.tangent)
    elif setting.tangent != Setting.tangent:
        raise ValueError(f"tangent must be {Setting.tangent} for {config.method}, got {setting.tangent}")
    return method if setting.share else None


def refused(config: Config, name: str) -> dict[str, str]:
    """The rows of a table that the method cannot have, with the reason, which its objective derives from its facts."""
    reasons = {}
    for value, (setting, _) in paper_tables(CENTRES[config.data])[name].cells.items():
        try:
            objective(config, setting, CLASSES, LABEL_DROPOUT, steps=1)
        except ValueError as error:
            reasons[value] = str(error)
    return reasons


def tables(config: Config) -> dict[str, Table]:
    """The tables in which the method has two rows or more: those rows."""
    found = {}
    for name, table in paper_tables(CENTRES[config.data]).items():
        without = refused(config, name)
        cells = {value: cell for value, cell in table.cells.items() if value not in without}
        if len(cells) > 1:
            found[name] = table._replace(cells=cells)
    return found


def method_key(config: Config) -> dict[str, str]:
    """What the key of a cell says of the method: nothing of MeanFlow, and the digest of the file of one's own."""
    if config.method == "MeanFlow":
        return {}
    if config.identity is None or config.method not in toy_2d.own_methods(config.identity)[0]:
        return {"method": config.method}
    return {"method": config.method, "own": toy_2d.own_methods(config.identity)[1]}


def objective(config: Config, setting: Setting, labels: int, label_dropout: float, *, steps: int) -> mfx.Objective:
    times = mfx.UniformTimes() if setting.times is None else mfx.LogitNormalTimes(*setting.times)
    return mfx.Objective(
        identity(config, setting, steps),
        time_pairs=mfx.TimePairs(times),
        identity_share=setting.share,
        weight=mfx.AdaptiveWeight(setting.power),
        guidance=None if (setting.scale, setting.mix) == (1, 0) else mfx.Guidance(setting.scale, setting.mix),
        label_dropout=mfx.LabelDropout(label_dropout, labels),
    )


@functools.cache
def train_step(
    config: Config, setting: Setting, labels: int, numbers: Numbers, prepare: data.FromPixels | None = None
) -> mfx.TrainStep:
    rate, warmup = numbers.learning_rate, 100
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(numbers.steps, warmup + 1), rate / 100)
    clipped = [] if numbers.clip is None else [optax.clip_by_global_norm(numbers.clip)]
    optimizer = optax.chain(*clipped, optax.adam(schedule))
    averages = [mfx.ExponentialAverage(numbers.decay)]
    loss = objective(config, setting, labels, numbers.label_dropout, steps=numbers.steps)
    return mfx.TrainStep(loss, optimizer, averages, prepare, teacher=0 if loss.needs_teacher else None)


def training(config: Config, recipe: Recipe, cell: Cell, name: str, settings: dict[str, Any]) -> run.Training:
    field_key, run_key = jr.split(jr.key(cell.seed))
    step = train_step(config, cell.setting, recipe.labels, recipe.numbers, recipe.prepare)
    step.check_batch_size(recipe.numbers.batch)
    make_field = functools.partial(recipe.make_field, EMBEDDINGS[cell.setting.embedding], field_key)
    return run.Training(name, step, make_field, recipe.draw, recipe.numbers.steps, run_key, settings)


def report(config: Config, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> str:
    """Tables as text."""
    parts, commits = [], set()
    for name in names:
        table, found = tables(config)[name], {}
        for value, (setting, _) in table.cells.items():
            keys = [key_of(config, recipe, Cell(setting, seed)) for seed in range(config.seeds)]
            commits |= {ledger.commit(key) for key in keys}
            found[value] = [ledger[key] for key in keys]
        # A cell that diverged has a distance alone.
        columns = tuple(dict.fromkeys(column for results in found.values() for result in results for column in result))
        values = {column: [of_seeds(results, column) for results in found.values()] for column in columns}
        rows: list[tuple[object, ...]] = [
            (value, fid, *(spread(values[column][i]) for column in columns))
            for i, (value, (_, fid)) in enumerate(table.cells.items())
        ]
        if (key := floor_key(config, recipe)) in ledger:
            rows.append(("real data", None, *(rounded(ledger[key].get(column, math.nan), 3) for column in columns)))
        order = "the order of MeanFlow's paper" if method_key(config) else "the paper's order"
        fids = [fid for _, fid in table.cells.values()]
        orders = "\n".join(
            f"By {column}: {agreement(values[column], fids, order)}" for column in recipe.ordered if column in values
        )
        headers = (table.title, fid_label(config), *columns)
        parts.append(f"## Tab. {name}: {table.title}\n\n{run.table(rows, headers)}\n\n{orders}")
        parts += [f"Without {value}: {reason}." for value, reason in refused(config, name).items()]
    about = (
        f"{config.method}, distance: {recipe.distance}. {recipe.beside}{' ' if recipe.beside else ''}"
        f"Mean ± half the range of seeds 0 to {config.seeds - 1}; {recipe.numbers.steps} steps. "
        f"Commits: {', '.join(sorted(map(str, commits)))}."
    )
    return "\n\n".join([about, *parts])


def of_seeds(results: Sequence[Mapping[str, float]], column: str) -> list[float]:
    """One figure of all seeds; NaN for a seed whose training diverged."""
    return [result.get(column, math.nan) for result in results]


def fid_label(config: Config) -> str:
    return "MeanFlow's FID in its paper" if method_key(config) else "paper's FID"


def save_figure(path: Path, config: Config, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> None:
    """Two panels per table: our distance with every seed, and below it the paper's FID."""
    columns = []
    for name in names:
        table = tables(config)[name]
        cells = table.cells
        keys = {
            value: [key_of(config, recipe, Cell(setting, seed)) for seed in range(config.seeds)]
            for value, (setting, _) in cells.items()
        }
        distances = {value: [ledger[key]["distance"] for key in row] for value, row in keys.items()}
        columns.append(Column(f"Tab. {name}: {table.title}", distances, [fid for _, fid in cells.values()]))
    draw(path, columns, f"{config.method}'s {recipe.distance}, every seed", fid_label(config))


def describe(config: Config, cell: Cell) -> str:
    """What is not as in the centre, and the seed."""
    values, centre = dataclasses.asdict(cell.setting), dataclasses.asdict(CENTRES[config.data])
    changed = [f"{name} {values[name]}" for name in centre if values[name] != centre[name]]
    return f"{', '.join(changed) or 'centre'}, seed {cell.seed}"


def key_of(config: Config, recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """What a finished cell is found by: everything that its result depends on but the code."""
    parts = [recipe.numbers._asdict(), recipe.details, method_key(config)]
    return joined({"data": config.data, "setting": cell.setting, "seed": cell.seed}, *parts)


def joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """All parts of a key in one.

    **Raises:** `ValueError` if two of them have the same name, of which one would be lost.
    """
    names = [name for part in parts for name in part]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"parts of a key must have different names, got {', '.join(twice)} twice")
    return {name: value for part in parts for name, value in part.items()}


def floor_key(config: Config, recipe: Recipe) -> dict[str, Any]:
    """What the figures of real data are found by."""
    return joined({"data": config.data, "real": True}, recipe.details)


def cells_of(config: Config, name: str) -> list[Cell]:
    return [Cell(setting, seed) for seed in range(config.seeds) for setting, _ in tables(config)[name].cells.values()]


def make_recipe(config: Config) -> Recipe:
    steps = 2 if config.test_run else config.steps
    given = {} if steps is None else {"steps": steps}
    if config.data == "eight_gaussians":
        return eight_gaussians(**given)
    if config.data == "digits":
        return handwritten_digits(**given)
    given |= {"judged": 100, "classifier_steps": 2} if config.test_run else {}
    return fashion_mnist(files=config.files, **given)


def main(config: Config) -> None:
    """Train the cells that are missing, then write tables and a figure."""
    run.require("matplotlib")
    recipe = make_recipe(config)
    shared = f"{config.data}_{config.method}" if method_key(config) else config.data
    with run.opened(config, shared=shared) as directory:
        run_cells(config, recipe, directory)


def run_cells(config: Config, recipe: Recipe, directory: run.RunDirectory) -> None:
    """Train what is missing of what is asked for, and write all tables that are complete."""
    ledger, key = run.Ledger(directory.root / "cells.jsonl"), functools.partial(key_of, config, recipe)
    names = tuple(tables(config)) if config.only is None else config.only
    wanted = dict.fromkeys(cell for name in names for cell in cells_of(config, name))
    # Seeds outside: those of one setting compile the same program.
    missing = sorted((cell for cell in wanted if key(cell) not in ledger), key=lambda cell: cell.seed)
    seconds = {cell: recipe.seconds(cell.setting, CENTRES[config.data]) for cell in missing}
    steps, kept = recipe.numbers.steps, len(wanted) - len(missing)
    time_needed = f"; the others take about {sum(seconds.values()) / 60:.0f} minutes of CPU time" if missing else ""
    finished = f"{kept} of them finished before (see {directory.root})"
    print(f"{len(wanted)} cells of {steps} steps, {finished}{time_needed}", flush=True)
    train_missing(config, recipe, directory, ledger, seconds)
    # The files have every table that is complete, also from earlier calls; what is printed is what was asked for.
    complete = [name for name in tables(config) if all(key(cell) in ledger for cell in cells_of(config, name))]
    everything = report(config, recipe, ledger, complete)
    directory.path("results.md").write_text(everything + "\n", encoding="utf-8")
    save_figure(directory.path("ablations.png"), config, recipe, ledger, complete)
    pictures = ["ablations.png", *save_pictures(config, recipe, directory, complete)]
    text, wall = report(config, recipe, ledger, names), time.perf_counter() - directory.opened
    print(f"{text}\n\n{wall:.0f} seconds. results.md, {', '.join(pictures)} are in {directory.root}.")


def train_missing(
    config: Config, recipe: Recipe, directory: run.RunDirectory, ledger: run.Ledger, seconds: dict[Cell, float]
) -> None:
    """Train and judge the cells that are not in the ledger, of which it is estimated how many seconds each takes."""
    key = functools.partial(key_of, config, recipe)
    trainings = {
        cell: training(config, recipe, cell, f"{describe(config, cell)} {run.digest(key(cell))}", key(cell))
        for cell in seconds
    }
    run.announce(config, trainings, directory)
    has_all_floors = not recipe.has_floor or floor_key(config, recipe) in ledger
    if not trainings and has_all_floors:
        return
    judge = recipe.open_judge(directory.root)
    if not has_all_floors:
        ledger.put(floor_key(config, recipe), judge.floor)
    began, done = time.perf_counter(), 0.0

    def judged(cell: Cell, state: mfx.TrainState | None) -> dict[str, float]:
        assert state is not None
        return figures_of(recipe, judge, cell, state, directory.path(samples_name(key(cell))))

    def note(cell: Cell, result: dict[str, float]) -> str:
        nonlocal done
        ledger.put(key(cell), result)
        done += seconds[cell]
        left = (time.perf_counter() - began) / done * (sum(seconds.values()) - done) / 60
        distance = result["distance"]
        outcome = f"distance {distance:.4g}" if math.isfinite(distance) else "diverged"
        return f"{describe(config, cell)}: {outcome}; about {left:.0f} minutes left"

    run.train_cells(config, trainings, judged, directory, note=note)


def figures_of(recipe: Recipe, judge: Judge, cell: Cell, state: mfx.TrainState, samples: Path) -> dict[str, float]:
    """What the last state of a cell scores, after its pictures are in the file `samples`; of a training that diverged a
    distance of NaN, and no picture."""
    if int(state.faults.most_in_row) >= DIVERGED:
        return {"distance": math.nan}
    if recipe.sampler is not None:
        label, _ = recipe.sampler.columns()
        np.save(samples, recipe.sampler(state.averages[0], label, 1, image_samples.PICTURE_SEED))
    return judge.score(state.averages[0], cell.setting)


def samples_name(key: dict[str, Any]) -> str:
    """Of the file with the images of a cell that pictures show."""
    return f"samples/{run.digest(key)}.npy"


def save_pictures(config: Config, recipe: Recipe, directory: run.RunDirectory, names: Sequence[str]) -> list[str]:
    """For each table of images a row of them for each value, from the same noise, of the first seed; a training that
    diverged has none."""
    if recipe.sampler is None:
        return []
    (_, columns), saved = recipe.sampler.columns(), []
    for path in directory.root.glob("samples_*.png"):  # of tables that were complete with other steps or seeds
        path.unlink()
    for name in names:
        rows = {value: Cell(setting, 0) for value, (setting, _) in tables(config)[name].cells.items()}
        paths = {value: directory.path(samples_name(key_of(config, recipe, cell))) for value, cell in rows.items()}
        images = {value: np.load(path) for value, path in paths.items() if path.exists()}
        if images:
            saved.append(f"samples_{name}.png")
            labels = {"row_labels": [*images], "column_labels": columns}
            picture.save_image_grid(directory.path(saved[-1]), np.stack([*images.values()]), -1, 1, **labels)
    return saved


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
