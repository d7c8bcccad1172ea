"""Images from a part of them, in few evaluations and without training for it: half hidden, four pixels in one, noise.

    python experiments/inverse.py                         trains on the handwritten digits first
    python experiments/inverse.py --weights runs/digits/1a2b3c4d/meanflow/ema_0.997.safetensors    20 minutes, busy CPUs
    python experiments/inverse.py --weights ema.safetensors --data photos --images 20
    python experiments/inverse.py --dry-run               what would be trained, or restored

A training that was stopped, or killed, continues by the same command.

An observation is y = A x, with noise or without. `mfx.sample_with_reward` bends trajectories towards images x with a
small |y - A x|^2, by looking ahead to where a state will end. A flow map says where: z - t u(z, 0, t). A network of
Flow Matching can only go on along its velocity: z - t v(z, t), the mean of all images that the state may come from.
Both are read from one network here, and are compared at equal numbers of evaluations; the reward changes the look-ahead
(E), or the state through the network (J, which takes a pass backwards for each step). Each row has the scale of
--scales that is best on images of the training. A network with labels is given the label of the image.

The mean of all possible images has the least squared error, and looks like none of them: so the table has the Frechet
distance, too. RESULTS.md beside this file has the figures.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import digits
    import image_sources
    import saved
    from inverse_problems import Figures, Images, Judge, Problem, problems, Way, ways

    import mf_eqx as mfx
    from mf_eqx import data, picture, run

SHOWN, REFERENCE, MOST = 5, 2000, 4096
"""Images of each problem in the picture; the most images of the reference; the most values of an image."""
UNSHOWN = ("2", "7", "8")
"""Numbers of evaluations that the picture leaves out."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """Restorations."""

    weights: str = ""
    """File of weights of images in [-1, 1], as the recipes leave it, with u trained at all r < t. Without, the network
    of digits.py is trained first."""
    data: tuple[str, ...] = ()
    """Images, given as for images.py; by default those that the weights were trained with, of which those that were
    held out are restored."""
    images: int = 150
    """Images that are restored; scales are chosen on as many others."""
    samples: int = 2
    """Restorations of each image, each from a noise of its own."""
    evaluations: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of evaluations. A straight step takes one, a step along the flow two, but for the last step."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Scales to choose from; without passes backwards only those below 2, where the ascent of these rewards
    converges."""
    noise: float = 0.5
    """Standard deviation of the noise that is to be removed; images are in [-1, 1]."""
    steps: int = 3000
    """Training steps, without weights."""
    seed: int = 0
    """Of the training, without weights."""

    def __post_init__(self):
        self.check(images=2, samples=2, evaluations=1, steps=0, seed=0)
        run.check_sizes(self, images=10**4, samples=100, evaluations=1000)
        if not self.evaluations:
            raise ValueError("evaluations must be at least one number, got none")
        if not any(0 < scale < 2 for scale in self.scales) or min(self.scales) <= 0:
            raise ValueError(f"scales must be > 0, and one of them below 2, got {self.scales}")
        if not 0 < self.noise <= 100:
            raise ValueError(f"noise must lie in (0, 100], got {self.noise}")
        if self.data and not self.weights:
            raise ValueError(f"data must be left out without weights, got {self.data[0]}")


# A network and its images


class Subject(NamedTuple):
    """A network, images that it was trained on, and images that it never saw."""

    field: mfx.AbstractField
    train: Images
    test: Images


def taken(source: data.AbstractSource, count: int, *, labelled: bool) -> Images:
    rows = source.take(np.arange(count) * len(source) // count)
    x = rows.x / 127.5 - 1 if source.dtype == np.uint8 else rows.x
    return Images(x.astype(np.float32), rows.label if labelled else None)


def subject_of(
    config: Config, field: mfx.AbstractField, train: data.AbstractSource, test: data.AbstractSource, *, labelled: bool
) -> Subject:
    if (most := min(len(train), len(test))) < config.images:
        raise ValueError(f"--images must be at most {most}, the number of {test.name}, got {config.images}")
    _, height, width = train.row_shape
    if height % 2 or width % 2 or np.prod(train.row_shape) > MOST:
        rule = f"images with even sides and at most {MOST} values"
        raise ValueError(f"--data must be {rule}, got {train.row_shape}")
    reference = taken(train, min(len(train), REFERENCE), labelled=labelled)
    return Subject(field, reference, taken(test, config.images, labelled=labelled))


def opened_weights(config: Config) -> Subject:
    """**Raises:** `ValueError` for weights of other values than pixels, and for images that do not fit them."""
    subject = saved.open_subject(config.weights, "", mfx.Parallelism(), bfloat16=False)
    shape, about, trained = subject.data_shape, subject.config, subject.notes.trained
    if not subject.is_image or subject.pixels != (-1, 1):
        raise ValueError(f"--weights must be of images in [-1, 1], got values of shape {shape} in {config.weights}")
    if trained is not None and (not (trained.average and trained.velocity) or trained.one_step or trained.ends_at_data):
        raise ValueError(f"--weights must be of a network with u trained at all r <= t, got {config.weights}")
    paths = config.data or about.get("data")
    are_digits = paths == "digits" and {"holdout", "seed"} <= {*about}
    if not paths or not (are_digits or isinstance(paths, list | tuple)):
        raise ValueError(f"--data must be given for {config.weights}, which does not name its data, got none")
    if are_digits:
        _, train, test = digits.load(digits.Config(holdout=about["holdout"], seed=about["seed"]))
    else:
        where = {"size": shape[1:], "holdout": about.get("holdout") or 0.1, "grey": shape[0] == 1}
        tested = () if config.data else tuple(about.get("test") or ())
        train, test, _ = image_sources.open_parts(tuple(paths), tested, **where)
    if train.row_shape != shape or (subject.labels is not None and subject.labels != train.labels):
        found = f"{train.row_shape} with {train.labels or 'no'} labels"
        raise ValueError(f"--data must be of shape {shape} with {subject.labels or 'any'} labels, got {found}")
    field = mfx.WithGuidance(subject.field, 1.0, (0.0, 1.0)) if subject.takes_guidance else subject.field
    return subject_of(config, field, train, test, labelled=subject.labels is not None)


def trained(config: Config, directory: run.RunDirectory) -> Subject:
    """The network that digits.py trains by default."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(run.Settings)}
    recipe = digits.Config(**settings, steps=config.steps, seed=config.seed)
    _, train, test = digits.load(recipe)
    objective = digits.objective(recipe, digits.stable_target(recipe, train))
    method = digits.Method("MeanFlow", objective, mfx.sample, (1,), shown=1)
    field = digits.train(recipe, method, train, run.RunDirectory(directory.root / "meanflow"))
    return subject_of(config, field, train, test, labelled=True)


# Restorations


class Row(NamedTuple):
    """One row of the table."""

    problem: str
    way: str
    evaluations: int | None
    scale: float | None
    figures: Figures


HEADERS = ("look-ahead, reward", "evaluations", "scale", "error, seen", "PSNR, not seen", "spread", "Frechet distance")


class Comparison(NamedTuple):
    """The rows of one problem, and images by the names of ways."""

    rows: list[Row]
    shown: dict[str, Float[np.ndarray, "rows *image"]]


def restored(
    config: Config, subject: Subject, way: Way, judges: Mapping[str, Judge]
) -> tuple[float, Float[np.ndarray, "samples rows *image"]]:
    """The scale with the least squared error on images of the training, and what it makes of the others."""

    def at(scale: float, part: str) -> Float[np.ndarray, "samples rows *image"]:
        return judges[part].restored(subject.field, way, scale, config.samples)

    def error(scale: float) -> float:
        found = np.mean((at(scale, "train") - judges["train"].images.x) ** 2)
        return float(found) if np.isfinite(found) else np.inf

    best = min((scale for scale in config.scales if way.through_field or scale < 2), key=error)
    return best, at(best, "test")


def compare(config: Config, subject: Subject, problem: Problem, progress: Callable[[], None]) -> Comparison:
    """All ways to restore the images of one problem."""
    reference = subject.train.x.reshape(len(subject.train.x), -1)
    parts = {"train": subject.train.some(config.images), "test": subject.test}
    judges = {name: Judge(problem, part, problem.observe(part.x), reference) for name, part in parts.items()}
    truth, observed = subject.test.x, judges["test"].observed
    rows = [
        Row(problem.name, name, None, None, judges["test"].figures(x[None]))
        for name, x in (("the images themselves", truth), ("the observation", observed))
    ]
    shown = {"observed": observed}
    for way in ways(config.evaluations):
        scale, x = restored(config, subject, way, judges)
        rows.append(Row(problem.name, way.name, way.evaluations, scale, judges["test"].figures(x)))
        shown[f"{way.name}, {way.evaluations}"] = x[0]
        progress()
    return Comparison(rows, {**shown, "truth": truth})


def main(config: Config) -> None:
    """Restore images that are seen in part, by the look-ahead of a flow map and by that of a velocity."""
    run.require("matplotlib", "safetensors", "sklearn")
    if config.test_run:
        config = dataclasses.replace(config, images=SHOWN, evaluations=config.evaluations[:1], scales=(1.0,))
    weights = opened_weights(config) if config.weights else None
    if weights is not None and config.dry_run:
        return run.tell(f"would restore {config.images} images in {len(ways(config.evaluations))} ways")
    with run.opened(config) as directory:
        subject = weights or trained(config, directory)
        if not run.is_first():
            return None
        solved = problems(subject.test.x.shape[1:], config.noise)
        done = itertools.count(1)
        with run.Progress(len(solved) * len(ways(config.evaluations)), doing="compiling") as progress:
            found = [compare(config, subject, each, lambda: progress.update(next(done), {})) for each in solved]
        save(found, directory)


def save(found: list[Comparison], directory: run.RunDirectory) -> None:
    """A table for each problem, and a picture with a row for each way and columns for each problem."""
    texts = []
    for rows, _ in found:
        cells = [(r.way, r.evaluations, r.scale, *(f"{value:.3g}" for value in r.figures)) for r in rows]
        texts.append(f"{rows[0].problem}:\n\n{run.table(cells, HEADERS)}")
    text = "\n\n".join(texts)
    every = [row for rows, _ in found for row in rows]
    directory.save_results(text, [{**row._asdict(), "figures": row.figures._asdict()} for row in every])
    names = [name for name in found[0].shown if name.rpartition(", ")[2] not in UNSHOWN]
    images = [np.concatenate([shown[name][:SHOWN] for _, shown in found]) for name in names]
    title = f"{SHOWN} images each: {', '.join(rows[0].problem for rows, _ in found)}"
    picture.save_image_grid(directory.path("restored.png"), np.stack(images), -1, 1, row_labels=names, title=title)
    print(f"{text}\n\n{time.perf_counter() - directory.opened:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
