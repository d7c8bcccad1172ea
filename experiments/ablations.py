"""The ablations of the MeanFlow paper (Tab. 1a to 1f and Tab. 5) as trends, on data that everyone has.

    python experiments/ablations.py                      all tables on eight Gaussians
    python experiments/ablations.py --only 1a 1b         two of them
    python experiments/ablations.py --data digits --only 1a
    python experiments/ablations.py --method Shortcut    the tables that another method has

Every cell is one training from one seed. Finished cells are kept in runs/ablations/<data>/cells.jsonl, those of other
methods than MeanFlow in runs/ablations/<data>_<method>, and a cell that is there is not trained again: tables share
their cells, and more seeds add to those that exist. A command that was stopped, or killed, goes on where it was.

The paper's column is FID on ImageNet, of 400,000 steps of batch 256 around another centre (p = 1, lognorm(-0.4, 1.0)):
what can agree is the order. It is MeanFlow's beside other methods, too. Guidance moves samples away from the data: in
Tab. 1f and 5 read the distance to the guided truth. Share 0 is judged like all others, at u(z, 0, 1), which Flow
Matching never trained; toy_2d.py has Flow Matching as it is meant to be used. RESULTS.md beside this file says where
orders agree and where they do not.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import toy_2d
from jaxtyping import Array, Float, install_import_hook, Int, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import exact, metrics, run
    from mf_eqx.data import DrawRows

EMBEDDINGS = {
    "(t, r)": mfx.nn.end_start,
    "(t, t - r)": mfx.nn.end_duration,
    "(t, r, t - r)": mfx.nn.end_start_duration,
    "t - r": mfx.nn.duration,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell but for its seed; the defaults are the centre from which tables vary one thing each."""

    share: float = 0.25
    tangent: tuple[float, float] = (0.0, 1.0)
    embedding: str = "(t, t - r)"
    times: tuple[float, float] | None = None  # mean and standard deviation of the logit, or uniform
    power: float = 0.0
    scale: float = 1.0
    mix: float = 0.0


class Cell(NamedTuple):
    """What is trained and judged."""

    setting: Setting
    seed: int


class Table(NamedTuple):
    """A table of the paper: what it varies, and its FID for each value."""

    title: str
    cells: dict[str, tuple[Setting, float]]


def guided(mix: float, effective: float = 2.0) -> Setting:
    return Setting(scale=round(effective * (1 - mix), 6), mix=mix)


TABLES = {
    "1a": Table(
        "share of rows with r < t",
        {f"{s:.0%}": (Setting(share=s), f) for s, f in [(0.0, 328.91), (0.25, 61.06), (0.5, 63.14), (1.0, 67.32)]},
    ),
    "1b": Table(
        "tangent on (z, r, t)",
        {
            f"(v, {r:g}, {t:g})": (Setting(tangent=(r, t)), f)
            for r, t, f in [(0.0, 1.0, 61.06), (0.0, 0.0, 268.06), (1.0, 0.0, 329.22), (1.0, 1.0, 137.96)]
        },
    ),
    "1c": Table(
        "embedded times",
        {e: (Setting(embedding=e), f) for e, f in zip(EMBEDDINGS, [61.75, 61.06, 63.98, 63.13], strict=True)},
    ),
    "1d": Table(
        "distribution of times",
        {
            "uniform" if p is None else f"lognorm{p}": (Setting(times=p), f)
            for p, f in [
                (None, 65.90),
                ((-0.2, 1.0), 63.83),
                ((-0.2, 1.2), 64.72),
                ((-0.4, 1.0), 61.06),
                ((-0.4, 1.2), 61.79),
            ]
        },
    ),
    "1e": Table(
        "power p of the adaptive weight",
        {
            f"{p:g}": (Setting(power=p), f)
            for p, f in [(0.0, 79.75), (0.5, 63.98), (1.0, 61.06), (1.5, 66.57), (2.0, 69.19)]
        },
    ),
    "1f": Table(
        "guidance scale omega, kappa 0",
        {
            f"{w:g}": (Setting(scale=w), f)
            for w, f in [(1.0, 61.06), (1.5, 33.33), (2.0, 20.15), (3.0, 15.53), (5.0, 20.75)]
        },
    ),
    "5": Table(
        "guidance mix kappa at effective scale 2",
        {f"{k:g}": (guided(k), f) for k, f in [(0.0, 20.15), (0.5, 19.15), (0.8, 19.10), (0.9, 18.63), (0.95, 19.17)]},
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A run of ablations."""

    data: Literal["eight_gaussians", "digits"] = "eight_gaussians"
    """eight_gaussians: four classes of two opposite Gaussians each, an MLP, distance to the truth known. digits: a DiT,
    Frechet distance."""
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
    """Training steps of a cell, by default 4000 for eight_gaussians, 1500 for digits."""
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
        if self.only is None:
            return
        if unknown := [name for name in self.only if name not in TABLES]:
            raise ValueError(f"only must be among {', '.join(TABLES)}; got {', '.join(unknown)}")
        if len(set(self.only)) < len(self.only):
            raise ValueError(f"only must differ from each other, got {', '.join(self.only)}")
        if not self.only:
            raise ValueError(f"only must be at least one of {', '.join(TABLES)}; got none")
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
    for value, (setting, _) in TABLES[name].cells.items():
        try:
            objective(config, setting, CLASSES, LABEL_DROPOUT, steps=1)
        except ValueError as error:
            reasons[value] = str(error)
    return reasons


def tables(config: Config) -> dict[str, Table]:
    """The tables in which the method has two rows or more: those rows."""
    found = {}
    for name, table in TABLES.items():
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


LABEL_DROPOUT = 0.1


class Numbers(NamedTuple):
    """What a recipe fixes for all cells."""

    steps: int
    batch: int
    width: int
    learning_rate: float
    decay: float
    clip: float = 1.0
    label_dropout: float = LABEL_DROPOUT


class Recipe(NamedTuple):
    """What is trained on a data set, and how a field is judged."""

    labels: int
    make_field: Callable[[mfx.nn.TimeVariables, Key[Array, ""]], mfx.AbstractField]
    draw: Callable[[Key[Array, ""]], mfx.Batch]
    judge: Callable[[mfx.AbstractField, Setting], dict[str, float]]
    distance: str
    numbers: Numbers


CLASSES, ROWS, PATH = 4, 2000, mfx.LinearInterpolant()
PAIRS = mfx.TimePairs(mfx.UniformTimes())


class JudgedKeys(NamedTuple):
    """Of everything that is judged: the same for all cells."""

    truth: Key[Array, ""]
    data: Key[Array, ""]
    noise: Key[Array, ""]


def judged_keys() -> JudgedKeys:
    """Made when they are needed: a script that is imported must not touch a device."""
    return JudgedKeys(*jr.split(jr.key(2**31 - 1), 3))


def eight_gaussians(steps: int = 4000) -> Recipe:
    numbers = Numbers(steps, batch=256, width=96, learning_rate=2e-3, decay=0.995)
    mixture = exact.eight_gaussians()
    mixture = exact.GaussianMixture(mixture.mean, mixture.std, label=jnp.arange(8) % CLASSES)
    condition = jnp.arange(CLASSES).repeat(ROWS // CLASSES)

    @functools.cache
    def truth(scale: float) -> tuple[metrics.FieldTruth, Float[Array, "rows 2"]]:
        """Of the guided field, and one-step samples of it."""
        velocity = exact.GuidedVelocity(exact.MarginalVelocity(mixture, PATH), scale)
        field = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
        known = metrics.field_truth(field, mixture.sample, PATH, PAIRS, ROWS, condition, key=judged_keys().truth)
        return known, known.one_step.z - known.one_step.u

    keys = jr.split(judged_keys().data, ROWS)
    data = jax.vmap(lambda key, label: mixture.sample(key=key, condition=label))(keys, condition)

    def by_class(x: Float[Array, "rows 2"], y: Float[Array, "rows 2"]) -> float:
        """Energy distance to the samples of the same class, its mean over classes; NaN if x is not finite."""
        if not np.isfinite(x).all():
            return math.nan
        pairs = [(x[condition == label], y[condition == label]) for label in range(CLASSES)]
        return float(np.mean([metrics.energy_distance(*pair) for pair in pairs]))

    def judge(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
        known, exact_samples = truth(round(setting.scale / (1 - setting.mix), 6))
        errors = metrics.field_errors(field, known)
        x = one_step(field, jr.normal(judged_keys().noise, (ROWS, 2)), condition)
        return {
            "distance": by_class(x, data),
            "distance to the guided truth": by_class(x, exact_samples),
            "error of u": float(errors.overall.value),
            "error of u at (0, 1)": float(errors.one_step.value),
        }

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        return mfx.MLP(2, width=numbers.width, depth=3, labels=CLASSES, time_variables=variables, key=key)

    distance = "energy distance of one-step samples to the data, per class"
    return Recipe(CLASSES, make_field, exact.DrawLabelled(mixture, numbers.batch), judge, distance, numbers)


def handwritten_digits(steps: int = 1500) -> Recipe:
    config = digits.Config()
    numbers = Numbers(steps, config.batch, config.width, config.learning_rate, config.decay)
    data = digits.load(config)
    judge_of = digits.Judge(data)
    label = jnp.asarray(data.every.label)

    def judge(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
        x = digits.pixels(np.asarray(one_step(field, jr.normal(judged_keys().noise, (len(label), 1, 8, 8)), label)))
        read = float(np.mean(judge_of.read(x, digits.label_of(data.every))))
        return {"distance": judge_of.frechet(x), "read correctly": read}

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        size = mfx.DiTSize(config.depth, config.width, config.heads, config.patch)
        return mfx.DiT((1, 8, 8), size, labels=digits.CLASSES, time_variables=variables, unroll=True, key=key)

    draw = DrawRows(jnp.asarray(data.train.x), jnp.asarray(data.train.label), numbers.batch)
    distance = "Frechet distance of one-step samples, grey values squared"
    return Recipe(digits.CLASSES, make_field, draw, judge, distance, numbers)


RECIPES = {"eight_gaussians": eight_gaussians, "digits": handwritten_digits}


@eqx.filter_jit
def one_step(
    field: mfx.AbstractField, eps: Float[Array, "rows *data"], label: Int[Array, " rows"]
) -> Float[Array, "rows *data"]:
    return jax.vmap(lambda eps, label: mfx.sample(field, eps, label))(eps, label)


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
def train_step(config: Config, setting: Setting, labels: int, numbers: Numbers) -> mfx.TrainStep:
    rate, warmup = numbers.learning_rate, 100
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(numbers.steps, warmup + 1), rate / 100)
    # Single steps ruin trainings with a large p or kappa otherwise.
    optimizer = optax.chain(optax.clip_by_global_norm(numbers.clip), optax.adam(schedule))
    averages = [mfx.ExponentialAverage(numbers.decay)]
    loss = objective(config, setting, labels, numbers.label_dropout, steps=numbers.steps)
    return mfx.TrainStep(loss, optimizer, averages, teacher=0 if loss.needs_teacher else None)


def training(config: Config, recipe: Recipe, cell: Cell, name: str, settings: dict[str, Any]) -> run.Training:
    field_key, run_key = jr.split(jr.key(cell.seed))
    step = train_step(config, cell.setting, recipe.labels, recipe.numbers)
    step.check_batch_size(recipe.numbers.batch)
    make_field = functools.partial(recipe.make_field, EMBEDDINGS[cell.setting.embedding], field_key)
    return run.Training(name, step, make_field, recipe.draw, recipe.numbers.steps, run_key, settings)


def report(config: Config, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> str:
    """Tables as text."""
    parts, commits = [], set()
    for name in names:
        table, rows, columns, distances = tables(config)[name], [], (), []
        for value, (setting, fid) in table.cells.items():
            keys = [key_of(config, recipe, Cell(setting, seed)) for seed in range(config.seeds)]
            commits |= {ledger.commit(key) for key in keys}
            results = [ledger[key] for key in keys]
            columns = tuple(results[0])
            rows.append((value, fid, *(spread([result[column] for result in results]) for column in columns)))
            distances.append([result["distance"] for result in results])
        order = "the order of MeanFlow's paper" if method_key(config) else "the paper's order"
        orders = agreement(distances, [fid for _, fid in table.cells.values()], order)
        headers = (table.title, fid_label(config), *columns)
        parts.append(f"## Tab. {name}: {table.title}\n\n{run.table(rows, headers)}\n\n{orders}")
        parts += [f"Without {value}: {reason}." for value, reason in refused(config, name).items()]
    about = (
        f"{config.method}, distance: {recipe.distance}. Mean ± half the range of seeds 0 to {config.seeds - 1}; "
        f"{recipe.numbers.steps} steps. Commits: {', '.join(sorted(map(str, commits)))}."
    )
    return "\n\n".join([about, *parts])


def fid_label(config: Config) -> str:
    return "MeanFlow's FID in its paper" if method_key(config) else "paper's FID"


def spread(values: Sequence[float]) -> str:
    half_range = f" ± {np.ptp(values) / 2:.1g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{half_range}"


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


def save_figure(path: Path, config: Config, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> None:
    """Two panels per table: our distance with every seed, and below it the paper's FID."""
    columns = []
    for name in names:
        cells = tables(config)[name].cells
        keys = {
            value: [key_of(config, recipe, Cell(setting, seed)) for seed in range(config.seeds)]
            for value, (setting, _) in cells.items()
        }
        distances = {value: [ledger[key]["distance"] for key in row] for value, row in keys.items()}
        columns.append(Column(f"Tab. {name}: {TABLES[name].title}", distances, [fid for _, fid in cells.values()]))
    draw(path, columns, f"{config.method}'s {recipe.distance}, every seed", fid_label(config))


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
            above.plot([place] * len(values), values, "o", color="C0", markersize=4, alpha=0.6)
            above.plot(place, np.mean(values), "_", color="C0", markersize=16)
        below.plot(column.fids, "s", color="C1", markersize=5)
        for panel, values in ((above, [*itertools.chain(*column.distances.values())]), (below, column.fids)):
            panel.set_yscale("log" if max(values) > 3 * min(values) else "linear")
            panel.tick_params(axis="y", which="both", labelsize=7)
            panel.set_xlim(-0.5, len(column.fids) - 0.5)
            panel.grid(axis="y", alpha=0.3)
        above.set_xticks(range(len(column.fids)), [])
        below.set_xticks(range(len(column.fids)), list(column.distances), rotation=25, fontsize=8)
        above.set_title(column.title, fontsize=9)
    for panel in panels.T.reshape(width, height, 2).transpose(1, 0, 2).reshape(-1, 2)[len(columns) :].flat:
        panel.remove()
    figure.suptitle(f"circles: {ours}, and their mean; squares: {papers}")
    figure.savefig(path, format="png")


def describe(cell: Cell) -> str:
    """What is not as in the centre, and the seed."""
    values = dataclasses.asdict(cell.setting)
    changed = [
        f"{name} {values[name]}" for name, centre in dataclasses.asdict(Setting()).items() if values[name] != centre
    ]
    return f"{', '.join(changed) or 'centre'}, seed {cell.seed}"


def key_of(config: Config, recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """What a finished cell is found by: everything that its result depends on but the code."""
    key = {"data": config.data, "setting": cell.setting, **recipe.numbers._asdict(), "seed": cell.seed}
    return key | method_key(config)


def cells_of(config: Config, name: str) -> list[Cell]:
    return [Cell(setting, seed) for seed in range(config.seeds) for setting, _ in tables(config)[name].cells.values()]


def main(config: Config) -> None:
    """Train the cells that are missing, then write tables and a figure."""
    run.require("matplotlib")
    steps = 2 if config.test_run else config.steps
    recipe = RECIPES[config.data]() if steps is None else RECIPES[config.data](steps)
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
    steps, kept = recipe.numbers.steps, len(wanted) - len(missing)
    print(f"{len(wanted)} cells of {steps} steps, {kept} of them finished before (see {directory.root})", flush=True)

    def note(cell: Cell, result: dict[str, float]) -> str:
        ledger.put(key(cell), result)
        return f"{describe(cell)}: distance {result['distance']:.4g}"

    def judge(cell: Cell, state: mfx.TrainState | None) -> dict[str, float]:
        assert state is not None
        return recipe.judge(state.averages[0], cell.setting)

    trainings = {
        cell: training(config, recipe, cell, f"{describe(cell)} {run.digest(key(cell))}", key(cell)) for cell in missing
    }
    run.announce(config, trainings, directory)
    run.train_cells(config, trainings, judge, directory, note=note)
    # The files have every table that is complete, also from earlier calls; what is printed is what was asked for.
    complete = [name for name in tables(config) if all(key(cell) in ledger for cell in cells_of(config, name))]
    everything = report(config, recipe, ledger, complete)
    directory.path("results.md").write_text(everything + "\n", encoding="utf-8")
    save_figure(directory.path("ablations.png"), config, recipe, ledger, complete)
    text, seconds = report(config, recipe, ledger, names), time.perf_counter() - directory.opened
    print(f"{text}\n\n{seconds:.0f} seconds. results.md and ablations.png are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
