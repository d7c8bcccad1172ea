"""Every method of mf_eqx on the same real images: one network, the same operations, the same judges.

    python experiments/leaderboard.py                                   all methods on Fashion-MNIST
    python experiments/leaderboard.py --methods MeanFlow Shortcut --seeds 2
    python experiments/leaderboard.py --identity mine.py                with the methods of a file of your own
    python experiments/leaderboard.py --settings common paper           and with the settings of each method's paper
    python experiments/leaderboard.py --power 0                         without the adaptive weight of images.py
    python experiments/leaderboard.py --data photos --size 32           on images of your own
    python experiments/leaderboard.py --teacher ema.safetensors         distil a network of Flow Matching

Network, optimiser, batch and average are those of `images.py --preset quick`. With the common settings a method has the
share of rows, the times and the adaptive weight of that preset; with those of its paper it has what
`Facts.paper_settings` says. The weight is left out of Flow Matching, of losses that some methods bring, and of methods
whose rows with r < t do not use the velocity of the data (`images.weighted` says why). Methods differ in what a step
costs, so each is trained for as many steps as make the operations of `--steps` steps of MeanFlow
(`mf_eqx.measure.relative_cost` counts matrix products and convolutions; of AlphaFlow, whose steps differ, it takes the
most expensive one). Flow Matching samples by Euler's method, all others along their average velocity.

With `--teacher` the methods distil a network of Flow Matching, such as `fashion.py --preset quick --identity-share 0`
leaves in ema.safetensors: each training starts from this network and learns from its velocity, guided by
`--teacher-scale`, in place of the velocity of the data. A teacher's own flow is known: its velocity is integrated by an
adaptive solver, and the table has each method's error of u(z, 0, 1) to it. `DataFree` is `LagrangianDistillation` from
noise alone. Methods that learn from pairs of data and noise cannot be taught and are left out.

Results of finished trainings are in runs/leaderboard/all/cells.jsonl, and a training that is there is not done again. A
run that was stopped, or killed, continues by the same command. RESULTS.md has the figures.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import fashion
import images
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import toy_2d
from ablation_cells import samples_name
from ablation_images import figures
from ablation_recipes import digest_of, DIVERGED
from ablation_report import rounded, spread
from image_teacher import Teacher
from images import image_classifier, image_judge, image_samples
from jaxtyping import Array, install_import_hook, Int, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, measure, picture, run

FLOW_MATCHING, DATA_FREE = "FlowMatching", "DataFree"
EVALUATIONS, EULER_STEPS = (1, 4), images.EULER_STEPS
"""Evaluations per judged image: along the average velocity, and in Euler steps for Flow Matching."""
MOST_BYTES = 1 << 32
"""Of all training images, which are kept on the device."""
UNUSED = {"data", "test", "size", "holdout", "method", "identity", "steps", "samples", "remat"}
UNUSED |= {"sample_scale", "sample_interval"}
"""Fields of `images.py` on which no training here depends: it depends on the images themselves."""
COLUMNS = {
    "distance": "FD lite0",
    "FD classifier": "FD classifier",
    "covered lite0": "covered",
    "right class": "right class",
    "right class, lowest class": "lowest class",
}
"""The figures that are shown, and their headers."""
FLOW = "error to the teacher's flow"
"""One more with a teacher, of u(z, 0, 1)."""
TAUGHT = (
    "All start from the teacher and learn its velocity. Error to the teacher's flow: E|u - u*|^2 / E|u*|^2 of "
    "u(z, 0, 1), with u* the average of the teacher's velocity by an adaptive solver.",
)


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A run of all methods."""

    data: tuple[str, ...] = (fashion.PLACE,)
    """Images with labels or without, as for images.py: a folder, or with a folder for each class; CIFAR-10; a folder
    with IDX files; a folder of shards. Test images that belong to them are what samples are compared with, else a tenth
    that is held out."""
    size: tuple[int, ...] = ()
    """Side in pixels, or height and width, multiples of 4, to which images in folders are resized and cropped."""
    labels: bool = True
    """Use the labels of the data, if there are any."""
    methods: tuple[str, ...] = ()
    """FlowMatching, and identities of mf_eqx and of --identity by name; by default all of them."""
    identity: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity that can be made without
    arguments, or one of them as mine.py:Mix. When the file changes, their trainings are done again."""
    settings: tuple[str, ...] = ("common",)
    """common: the share and times of images.py, and --power, for every method; paper: the share, times and weight of
    each method's own paper, for methods whose paper's are known."""
    teacher: str | None = None
    """Weights of a network of Flow Matching to distil: what images.py --identity-share 0 leaves in ema.safetensors."""
    teacher_scale: float = 1.0
    """Scale of guidance of the teacher, 1 for none; needs labels, and a teacher that was trained without them, too."""
    power: float = images.POWER
    """Power p of the adaptive weight (Eq. 22) with the common settings, >= 0; 0 leaves it out for all methods."""
    seeds: int = 1
    """Trainings of each method, from seeds 0, 1, ..."""
    steps: int = 3000
    """Training steps of MeanFlow with the common settings. All other trainings have as many as cost the same
    operations."""
    name: str = ""
    """Directory below runs/leaderboard, by default one that all runs share: finished trainings are found there."""
    samples: int = 2000
    """Images that are judged, at most as many as there are test images."""
    save_every: int = 500
    """Steps between checkpoints of a training; its last step is always saved."""
    most_faults: int = 10**6
    """Steps in a row without a finite loss and gradient after which the whole run stops, by default never: such steps
    leave the state unchanged, and a training with ten of them in a row is shown as diverged."""

    def __post_init__(self):
        self.check(seeds=1, steps=1, samples=2, size=1)
        run.check_sizes(self, seeds=100, samples=1 << 20, size=1 << 14)
        mfx.AdaptiveWeight(self.power)
        if self.teacher is None and self.teacher_scale != 1:
            raise ValueError(f"teacher_scale must be left out without a teacher, got {self.teacher_scale}")
        if self.teacher is not None and self.settings != ("common",):
            raise ValueError(f"settings must be common with a teacher, got {' '.join(self.settings)}")
        run.check_among(self, settings=toy_2d.SETTINGS)
        if self.methods:
            run.check_among(self, methods=methods(self))
        if not cells(self):
            raise ValueError("settings must have common, or a method whose paper's settings are known, got none")


class Cell(NamedTuple):
    """One training."""

    method: str
    settings: str
    seed: int


def identities(config: Config, steps: int) -> dict[str, mfx.AbstractIdentity]:
    """Of all methods but Flow Matching, for a training of so many steps; with a teacher, those that can be taught."""
    taught = config.teacher is not None
    found = toy_2d.identities(config.identity, steps, taught)
    if not taught:
        return found
    found = {name: identity for name, identity in found.items() if not identity.facts.uses_pair}
    return {**found, DATA_FREE: mfx.LagrangianDistillation(stop_derivative=True)}


def methods(config: Config) -> list[str]:
    return [*([] if config.teacher else [FLOW_MATCHING]), *identities(config, 1)]


def cells(config: Config) -> list[Cell]:
    """All trainings, by seed first: two seeds of one method side by side would both compile its program."""
    known = identities(config, 1)
    of_paper = [name for name, identity in known.items() if identity.facts.paper_settings is not None]
    return [
        Cell(method, settings, seed)
        for seed in range(config.seeds)
        for settings in config.settings
        for method in config.methods or methods(config)
        if settings == "common" or method in of_paper
    ]


class Method(NamedTuple):
    """How a method is trained: by which step, how often, and what a step costs, in steps of Flow Matching."""

    cost: float
    steps: int
    step: mfx.TrainStep


class Study:
    """The images, and what is trained on them.

    **Raises:** `ValueError` as `images.open_data`, if Fashion-MNIST is not installed, for images that the network
    cannot take or that are too many for the device, and if a method cannot be trained like the others.
    """

    def __init__(self, config: Config):
        names = fashion.CLASSES if config.data == (fashion.PLACE,) else None
        if names is not None:
            fashion.check_files(config.data)
        quick = images.PRESETS["quick"][1]
        own = {"data": config.data, "size": config.size, "labels": config.labels}
        self.config, self.base = config, dataclasses.replace(quick, **own)
        self.train, self.test, self.class_names = images.open_data(self.base, names)
        if (size := len(self.train) * math.prod(self.train.row_shape)) > MOST_BYTES:
            raise ValueError(f"data must have at most {MOST_BYTES:,} bytes of pixels, got {size:,}")
        channels, height, width = self.train.row_shape
        if height % (patch := images.size_of(self.base).patch) or width % patch:
            raise ValueError(f"data must have sides that are multiples of {patch}, got {height} x {width}")
        self.shape, self.labels = (channels, height, width), self.train.labels if config.labels else None
        self.teacher: Teacher | None = None
        if config.teacher is not None:
            self.teacher = Teacher(config.teacher, config.teacher_scale, self.shape, self.labels)
        rows = self.train.take(np.arange(len(self.train)))
        label = None if self.labels is None else jnp.asarray(rows.label)
        self.draw = data.DrawRows(jnp.asarray(rows.x), label, self.base.batch)
        self.count = min(100 if config.test_run else config.samples, len(self.test), len(self.train))
        self.classifier_steps = 2 if config.test_run else image_classifier.STEPS
        self.train.digest = digest_of(self.train)  # part of the name of the classifier's file, too
        self.judging = {"samples": self.count, "classifier_steps": self.classifier_steps, "test": digest_of(self.test)}
        budget = config.steps * self.cost("MeanFlow", "common")
        self.methods = {
            kind: self.method(*kind, budget)
            for kind in dict.fromkeys((cell.method, cell.settings) for cell in cells(config))
        }

    def objective(self, method: str, settings: str, steps: int) -> mfx.Objective:
        """That of a training of so many steps, by which schedules of some methods go."""
        identity = identities(self.config, steps).get(method)
        if settings == "paper":
            assert identity is not None and identity.facts.paper_settings is not None
            dropout = None if self.labels is None else mfx.LabelDropout(self.base.label_dropout, self.labels)
            return mfx.Objective(identity, label_dropout=dropout, **identity.facts.paper_settings)
        share = 0.0 if identity is None else self.base.identity_share
        recipe = dataclasses.replace(self.base, identity_share=share, power=self.power(method, settings))
        changes: dict[str, Any] = {"identity": identity}
        changes |= {} if self.teacher is None else {"velocity": self.teacher.velocity}
        if method == DATA_FREE:
            changes |= {"identity_share": 1, "time_pairs": mfx.TimePairs(mfx.UniformTimes(), at_noise=1)}
        return dataclasses.replace(images.objective(recipe, self.labels), **changes)

    def power(self, method: str, settings: str) -> float | None:
        """Power of the adaptive weight. None with the settings of a paper, which have a weight of their own."""
        if settings == "paper":
            return None
        return self.config.power if images.weighted(identities(self.config, 1).get(method)) else 0.0

    def cost(self, method: str, settings: str) -> float:
        field = eqx.filter_eval_shape(self.make_field, jr.key(0))
        rows = self.base.batch
        label = None if self.labels is None else jnp.zeros(rows, int)
        batch = mfx.Batch(jnp.zeros((rows, *self.shape)), label)
        return measure.relative_cost(self.objective(method, settings, 1), field, batch)

    def method(self, method: str, settings: str, budget: float) -> Method:
        """Steps that cost `budget` steps of Flow Matching together."""
        try:
            cost = self.cost(method, settings)
        except ValueError as error:
            rule = "must be those that train with this network and batch"
            raise ValueError(f"methods {rule}, got {method} with its {settings} settings: {error}") from None
        steps = max(round(budget / cost), 1)
        loss, averages = self.objective(method, settings, steps), [mfx.ExponentialAverage(self.base.decay)]
        prepare, teacher = images.prepare(self.base, self.labels), 0 if loss.needs_teacher else None
        return Method(cost, steps, mfx.TrainStep(loss, images.optimizer(self.base), averages, prepare, teacher=teacher))

    def make_field(self, key: Key[Array, ""]) -> mfx.AbstractField:
        """A new network, or the teacher."""
        if self.teacher is not None:
            return self.teacher.field
        return images.make_field(self.base, self.shape, self.labels, key)

    def recipe(self, cell: Cell) -> dict[str, Any]:
        """Everything that a training depends on but the code."""
        own = self.config.identity if not hasattr(mfx, cell.method) else None
        unused = UNUSED | {field.name for field in dataclasses.fields(run.Settings)}
        values = {name: value for name, value in dataclasses.asdict(self.base).items() if name not in unused}
        values |= {**cell._asdict(), "steps": self.methods[cell[:2]].steps, "train": self.train.digest}
        values["power"] = self.power(*cell[:2])
        values |= {} if self.teacher is None else {"teacher": self.teacher.digest}
        return values | {"own": own and toy_2d.own_methods(own)[1]}

    def key(self, cell: Cell) -> dict[str, Any]:
        """Everything that a result depends on but the code."""
        return self.recipe(cell) | self.judging

    def real_key(self) -> dict[str, Any]:
        """The same of the figures of real images."""
        return {"real": True, "train": self.train.digest, "labels": self.labels} | self.judging

    def teacher_key(self) -> dict[str, Any]:
        """The same of the figures of the teacher."""
        return self.real_key() | {"real": False, "teacher": self.teacher and self.teacher.digest}

    def training(self, cell: Cell) -> run.Training:
        field_key, run_key = jr.split(jr.key(cell.seed))
        recipe, (_, steps, step) = self.recipe(cell), self.methods[cell[:2]]
        name = "_".join(map(str, (*cell, run.digest(recipe))))
        make_field = functools.partial(self.make_field, field_key)
        return run.Training(name, step, make_field, self.draw, steps, run_key, recipe)

    def sampler(self, method: str) -> image_samples.Sampler:
        if method == FLOW_MATCHING:
            how, evaluations = mfx.sample_euler, EULER_STEPS
        elif method == DATA_FREE:  # which knows one step alone
            how, evaluations = mfx.sample, EVALUATIONS[:1]
        else:
            facts = identities(self.config, 1)[method].facts
            how, evaluations = mfx.sample_consistency if facts.ends_at_data else mfx.sample, EVALUATIONS
        return image_samples.Sampler(method, how, evaluations, 1, self.labels, self.class_names)


def scores(
    judge: image_judge.Judge, sampler: image_samples.Sampler, field: mfx.AbstractField, label: Int[np.ndarray, " rows"]
) -> dict[str, dict[str, float]]:
    """Figures of the samples of a field by number of evaluations."""
    made = ((number, sampler(field, label, number, image_samples.JUDGED_SEED)) for number in sampler.evaluations)
    return {str(found.evaluations): figures(found) for found in judge.samples(sampler.name, made, search=False)}


def train_missing(study: Study, directory: run.RunDirectory, ledger: run.Ledger) -> None:
    """Train and judge the cells that are not in the ledger, and judge real images."""
    config, every = study.config, cells(study.config)
    missing = [cell for cell in every if study.key(cell) not in ledger]
    run.tell(f"{len(every)} trainings, {len(every) - len(missing)} of them finished before ({directory.root})")
    trainings = {cell: study.training(cell) for cell in missing}
    run.announce(config, trainings, directory)
    if not missing:
        return
    space, classifier = image_judge.lite0_space(), None
    if study.labels is not None:
        classifier = image_classifier.trained(study.train, directory.root, steps=study.classifier_steps)
    judge = image_judge.Judge([space], classifier, study.train, study.test, study.count)
    label = np.zeros(study.count, np.int32) if judge.label is None else judge.label
    if study.real_key() not in ledger:
        ledger.put(study.real_key(), figures(*judge.real_images()))
    if study.teacher is not None and study.teacher_key() not in ledger:
        sampler = study.sampler(FLOW_MATCHING)._replace(method=study.teacher.sample)
        ledger.put(study.teacher_key(), scores(judge, sampler, study.teacher.field, label))

    def judged(cell: Cell, state: mfx.TrainState | None) -> dict[str, dict[str, float]]:
        """Figures by number of evaluations, none of a training that diverged."""
        assert state is not None
        if int(state.faults.most_in_row) >= DIVERGED:
            return {}
        sampler, field = study.sampler(cell.method), state.averages[0]
        shown = sampler(field, sampler.columns()[0], sampler.evaluations[0], image_samples.PICTURE_SEED)
        run.save_array(directory.path(samples_name(study.key(cell))), shown)
        found = scores(judge, sampler, field, label)
        if study.teacher is not None:
            found["1"][FLOW] = study.teacher.error(field)
        return found

    def note(cell: Cell, result: dict[str, dict[str, float]]) -> str:
        ledger.put(study.key(cell), result)
        distances = [f"{values['distance']:.4g} at {number}" for number, values in result.items()]
        what = f"FD lite0 {', '.join(distances)}" if distances else "diverged"
        return f"{cell.method}, {cell.settings} settings, seed {cell.seed}: {what}"

    run.train_cells(config, trainings, judged, directory, note=note)


class Line(NamedTuple):
    """The trainings of one method with the same settings: figures by number of evaluations, for each seed."""

    method: str
    settings: str
    found: list[Mapping[str, Mapping[str, float]]]

    def values(self, evaluations: int, name: str) -> list[float] | None:
        """A figure of all seeds, NaN of those that diverged; None if no seed has it."""
        values = [found.get(str(evaluations), {}).get(name) for found in self.found]
        return None if all(value is None for value in values) else [math.nan if v is None else v for v in values]

    @property
    def name(self) -> str:
        return self.method if self.settings == "common" else f"{self.method}, its paper's settings"

    @property
    def distance(self) -> float:
        """The mean of one evaluation; infinite if all diverged."""
        finite = [value for value in self.values(1, "distance") or () if math.isfinite(value)]
        return float(np.mean(finite)) if finite else math.inf


def lines_of(study: Study, ledger: run.Ledger) -> list[Line]:
    """The nearest first."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells(study.config):
        found.setdefault(cell[:2], []).append(ledger[study.key(cell)])
    return sorted((Line(*kind, seeds) for kind, seeds in found.items()), key=lambda line: line.distance)


def report(study: Study, ledger: run.Ledger, lines: Sequence[Line]) -> str:
    """A row for each method, and what real images score."""
    real = ledger[study.real_key()]
    shown = {name: text for name, text in COLUMNS.items() if math.isfinite(real.get(name, math.nan))}
    headers = ["", "power", "steps", "cost of a step"]
    headers += [f"{text}, {number}" for text in shown.values() for number in EVALUATIONS]
    headers += [FLOW] if study.teacher else []
    rows: list[tuple[object, ...]] = []
    for line in lines:
        cost, steps, _ = study.methods[line[:2]]
        found = [line.values(number, name) for name in shown for number in EVALUATIONS]
        found += [line.values(1, FLOW)] if study.teacher else []
        diverged = not math.isfinite(line.distance)
        texts = ["diverged" if diverged else None if values is None else spread(values) for values in found]
        rows.append((line.name, study.power(*line[:2]), steps, f"{cost:.2f}", *texts))
    best = [value for name in shown for value in (rounded(real[name], 3), *[None] * (len(EVALUATIONS) - 1))]
    if study.teacher is not None:
        taught = ledger[study.teacher_key()]
        texts = [rounded(taught[str(number)][name], 3) for name in shown for number in EVALUATIONS]
        rows.append(("teacher, Euler steps", None, None, None, *texts, None))
        best.append(None)
    rows.append(("real images", None, None, None, *best))
    commits = sorted({str(ledger.commit(study.key(cell))) for cell in cells(study.config)})
    config = study.config
    sentences = [
        f"{study.count:,} samples and as many test images, made in the number of evaluations that a column names.",
        "Sorted by the first distance.",
        "Seed 0." if config.seeds == 1 else f"Mean ± half the range of seeds 0 to {config.seeds - 1}.",
        "FD: Frechet distance in the features of EfficientNet-Lite0 (lite0) and of a classifier of the training",
        "images; covered: share of test images with a sample near them in the space of lite0; right class: share of",
        "samples in which the classifier reads the class that was asked for, over all and in the class with the lowest",
        "share. Power: that of the adaptive weight, unless it is the weight of a method's paper. Cost of a step: its",
        "operations divided by those of a step of Flow Matching, which samples by Euler's method. The row of real",
        "images: training images beside the test images, and what is read in test images. Methods that learn",
        "u(z, 0, t) alone take new noise before a further evaluation.",
        *TAUGHT[: study.teacher is not None],
        f"Commits: {', '.join(commits)}.",
    ]
    return "\n\n".join([" ".join(sentences), run.table(rows, headers), *by_euler(study, ledger, lines, [*shown])])


def by_euler(study: Study, ledger: run.Ledger, lines: Sequence[Line], names: Sequence[str]) -> list[str]:
    """What Flow Matching, or the teacher, scores in the largest number of Euler steps."""
    last = EULER_STEPS[-1]
    found = [
        ("Flow Matching", [spread(line.values(last, name) or ()) for name in names])
        for line in lines
        if line.method == FLOW_MATCHING and math.isfinite(line.distance)
    ]
    if study.teacher is not None:
        values = ledger[study.teacher_key()][str(last)]
        found.append(("The teacher", [rounded(values[name], 3) for name in names]))
    return [
        f"{who} in {last} Euler steps: "
        f"{', '.join(f'{COLUMNS[name]} {text}' for name, text in zip(names, texts, strict=True))}."
        for who, texts in found
    ]


def save_picture(study: Study, directory: run.RunDirectory, lines: Sequence[Line], report: run.RunDirectory) -> None:
    """One-step samples of seed 0, a row for each method, all from the same noise."""
    paths = {line.name: directory.path(samples_name(study.key(Cell(*line[:2], 0)))) for line in lines}
    rows = {name: np.load(path) for name, path in paths.items() if path.exists()}
    _, names = study.sampler(FLOW_MATCHING).columns()
    if rows:
        labels = {"row_labels": [*rows], "column_labels": names}
        picture.save_image_grid(report.path("samples.png"), np.stack([*rows.values()]), -1, 1, **labels)


def main(config: Config) -> None:
    """Train every method, then write one table and one picture."""
    run.require("matplotlib", "sklearn")
    study = Study(config)
    with run.opened(config, shared="all") as directory:
        ledger = run.Ledger(directory.root / "cells.jsonl")
        train_missing(study, directory, ledger)
        report_directory = run.RunDirectory(directory.root / run.digest([study.key(cell) for cell in cells(config)]))
        report_directory.root.mkdir(exist_ok=True)
        lines = lines_of(study, ledger)
        save_picture(study, directory, lines, report_directory)
        text = report(study, ledger, lines)
        report_directory.save_results(text, [{**cell._asdict(), **ledger[study.key(cell)]} for cell in cells(config)])
        seconds = time.perf_counter() - directory.opened
        print(f"{text}\n\n{seconds:.0f} seconds. samples.png and the table are in {report_directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
