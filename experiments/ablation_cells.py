"""The cells of `ablations.py`: which ones a method has, the keys of their results, their trainings and their figures.

A cell is one training from one seed. The ledger has the result of each finished cell, by a key that holds everything
that the result depends on but the code.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import image_samples
import jax.random as jr
import optax
import toy_2d
from ablation_recipes import CLASSES, DIVERGED, Judge, LABEL_DROPOUT, Numbers, Recipe
from ablation_tables import Cell, CENTRES, EMBEDDINGS, paper_tables, Setting, Table
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, run


@dataclasses.dataclass(frozen=True)
class Study(run.CellSettings):
    """What all cells of a run have in common."""

    data: Literal["eight_gaussians", "digits", "fashion"] = "eight_gaussians"
    """eight_gaussians: four classes of two opposite Gaussians each, an MLP, energy distances to the data and to the
    exact guided field. digits: scikit-learn's digits, a DiT, Frechet distance of grey values. fashion: Fashion-MNIST, a
    DiT, Frechet distances in features of EfficientNet-Lite0 and of a classifier, and classes that the latter reads."""
    method: str = "MeanFlow"
    """The identity of mf_eqx that is trained, by name."""
    identity: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity, which --method can then name.
    After a change of the file their cells are trained again."""
    seeds: int = 2
    """Trainings of each cell, from seeds 0, 1, ..."""


def identity(config: Study, setting: Setting, steps: int) -> mfx.AbstractIdentity | None:
    """The method that is trained in a setting; None with a share of 0, which is Flow Matching.

    **Raises:** `ValueError` for a tangent other than (v, 0, 1), if the method is not MeanFlow.
    """
    method = toy_2d.identities(config.identity, steps)[config.method]
    if isinstance(method, mfx.MeanFlow):
        method = mfx.MeanFlow(*setting.tangent)
    elif setting.tangent != Setting.tangent:
        raise ValueError(f"tangent must be {Setting.tangent} for {config.method}, got {setting.tangent}")
    return method if setting.share else None


def objective(config: Study, setting: Setting, labels: int, label_dropout: float, *, steps: int) -> mfx.Objective:
    times = mfx.UniformTimes() if setting.times is None else mfx.LogitNormalTimes(*setting.times)
    return mfx.Objective(
        identity(config, setting, steps),
        time_pairs=mfx.TimePairs(times),
        identity_share=setting.share,
        weight=mfx.AdaptiveWeight(setting.power),
        guidance=None if (setting.scale, setting.mix) == (1, 0) else mfx.Guidance(setting.scale, setting.mix),
        label_dropout=mfx.LabelDropout(label_dropout, labels),
    )


def refused(config: Study, name: str) -> dict[str, str]:
    """The rows of a table that the method cannot have, each with the reason: the error of its `Objective`."""
    reasons = {}
    for value, (setting, _) in paper_tables(CENTRES[config.data])[name].cells.items():
        try:
            objective(config, setting, CLASSES, LABEL_DROPOUT, steps=1)
        except ValueError as error:
            reasons[value] = str(error)
    return reasons


def tables(config: Study) -> dict[str, Table]:
    """The tables of which the method has two rows or more, without the rows that it cannot have."""
    found = {}
    for name, table in paper_tables(CENTRES[config.data]).items():
        without = refused(config, name)
        cells = {value: cell for value, cell in table.cells.items() if value not in without}
        if len(cells) > 1:
            found[name] = table._replace(cells=cells)
    return found


def cells_of(config: Study, name: str) -> list[Cell]:
    return [Cell(setting, seed) for seed in range(config.seeds) for setting, _ in tables(config)[name].cells.values()]


def method_key(config: Study) -> dict[str, str]:
    """The method's part of a key: nothing for MeanFlow; otherwise its name, and the digest of the user's own file."""
    if config.method == "MeanFlow":
        return {}
    if config.identity is None or config.method not in toy_2d.own_methods(config.identity)[0]:
        return {"method": config.method}
    return {"method": config.method, "own": toy_2d.own_methods(config.identity)[1]}


def key_of(config: Study, recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """The key of a cell's result."""
    parts = [recipe.numbers._asdict(), recipe.details, method_key(config)]
    return joined({"data": config.data, "setting": cell.setting, "seed": cell.seed}, *parts)


def floor_key(config: Study, recipe: Recipe) -> dict[str, Any]:
    """The key of the figures of real data."""
    return joined({"data": config.data, "real": True}, recipe.details)


def joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One key from its parts.

    **Raises:** `ValueError` if a name is in two parts.
    """
    names = [name for part in parts for name in part]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"parts of a key must have different names, got {', '.join(twice)} twice")
    return {name: value for part in parts for name, value in part.items()}


def describe(config: Study, cell: Cell) -> str:
    """What the cell changes of the centre, and its seed."""
    values, centre = dataclasses.asdict(cell.setting), dataclasses.asdict(CENTRES[config.data])
    changed = [f"{name} {values[name]}" for name in centre if values[name] != centre[name]]
    return f"{', '.join(changed) or 'centre'}, seed {cell.seed}"


@functools.cache
def train_step(
    config: Study, setting: Setting, labels: int, numbers: Numbers, prepare: data.FromPixels | None = None
) -> mfx.TrainStep:
    rate, warmup = numbers.learning_rate, 100
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(numbers.steps, warmup + 1), rate / 100)
    clipped = [] if numbers.clip is None else [optax.clip_by_global_norm(numbers.clip)]
    optimizer = optax.chain(*clipped, optax.adam(schedule))
    averages = [mfx.ExponentialAverage(numbers.decay)]
    loss = objective(config, setting, labels, numbers.label_dropout, steps=numbers.steps)
    return mfx.TrainStep(loss, optimizer, averages, prepare, teacher=0 if loss.needs_teacher else None)


def training(config: Study, recipe: Recipe, cell: Cell, name: str, settings: dict[str, Any]) -> run.Training:
    field_key, run_key = jr.split(jr.key(cell.seed))
    step = train_step(config, cell.setting, recipe.labels, recipe.numbers, recipe.prepare)
    step.check_batch_size(recipe.numbers.batch)
    make_field = functools.partial(recipe.make_field, EMBEDDINGS[cell.setting.embedding], field_key)
    return run.Training(name, step, make_field, recipe.draw, recipe.numbers.steps, run_key, settings)


def train_missing(
    config: Study, recipe: Recipe, directory: run.RunDirectory, ledger: run.Ledger, seconds: dict[Cell, float]
) -> None:
    """Train and judge cells, and put their figures into the ledger.

    **Arguments:** `seconds` the cells that are not in the ledger, with an estimate of the CPU time of each.
    """
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
        place = functools.partial(directory.path, samples_name(key(cell)))  # which makes a folder
        return figures_of(recipe, judge, cell, state, place)

    def note(cell: Cell, result: dict[str, float]) -> str:
        nonlocal done
        ledger.put(key(cell), result)
        done += seconds[cell]
        left = (time.perf_counter() - began) / done * (sum(seconds.values()) - done) / 60
        distance = result["distance"]
        outcome = f"distance {distance:.4g}" if math.isfinite(distance) else "diverged"
        return f"{describe(config, cell)}: {outcome}; about {left:.0f} min left"

    run.train_cells(config, trainings, judged, directory, note=note)


def figures_of(
    recipe: Recipe, judge: Judge, cell: Cell, state: mfx.TrainState, samples: Callable[[], Path]
) -> dict[str, float]:
    """The figures of a cell's last state. If the data are images, samples of that state are saved in the file
    `samples()` first. A training that diverged has a distance of NaN, no other figures and no samples."""
    if int(state.faults.most_in_row) >= DIVERGED:
        return {"distance": math.nan}
    if recipe.sampler is not None:
        label, _ = recipe.sampler.columns()
        run.save_array(samples(), recipe.sampler(state.averages[0], label, 1, image_samples.PICTURE_SEED))
    return judge.score(state.averages[0], cell.setting)


def samples_name(key: dict[str, Any]) -> str:
    """The file with the pictures of a cell."""
    return f"samples/{run.digest(key)}.npy"
