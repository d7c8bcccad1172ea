"""Post-training of saved weights by losses on whole batches of generated images: the Frechet distance, or drifting.

    python experiments/post_train.py --start runs/digits/1a2b3c4d/meanflow/ema_0.997.safetensors    a minute or two
    python experiments/post_train.py --start runs/fashion/1a2b3c4d/ema.safetensors                  not run yet
    python experiments/post_train.py --start ema.safetensors --features lite0
    python experiments/post_train.py --start ema.safetensors --preset drifting
    python experiments/post_train.py --start ema.safetensors --evaluations 2 --queue 5000

The weights are those of digits.py, images.py or fashion.py, the data those that they were trained with unless --data
names others. A step generates a batch, each image under the label of a row of the data, and moves the distribution of
its features towards that of the data: `mfx.FrechetLoss`, `mfx.Drifting`. The average ends as ema.safetensors, which
generate.py and evaluate.py read. A run that was stopped, or killed, continues by the same command.

At the end images of both weights are judged as by images.py. A distance in the space that was trained in says little of
quality: what counts is printed last, the distance in the other spaces, what is read, and what is covered. On digits
these distances rose while those that were trained with fell: RESULTS.md has the figures.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import digits
    import image_classifier
    import image_judge
    import image_samples
    import image_sources
    import post_features

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, run


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A post-training."""

    start: str = ""
    """File of weights to start from, as digits.py, images.py and fashion.py leave it."""
    data: tuple[str, ...] = ()
    """Images, given as for images.py; by default those that the weights were trained with."""
    test: tuple[str, ...] = ()
    """Images to hold samples against, given as for images.py."""
    holdout: float = 0.1
    """Share of the data that is held out if there are no test images, in (0, 1), as in images.py; not for digits."""
    loss: Literal["frechet", "drifting"] = "frechet"
    """Frechet distance of features, or drifting."""
    features: tuple[post_features.Name, ...] = ("pixels", "classifier")
    """Spaces of features, whose losses are added: pixels; classifier, another one than that which judges; lite0. A
    small classifier alone does not see noise between pixels, which then grows."""
    feature_weights: tuple[float, ...] = ()
    """A weight for each space, by default 1. Frechet distances are divided by the variance of the data."""
    evaluations: int = 1
    """Equal steps from noise to data in which images are generated."""
    population_decay: float = 0.9
    """Decay per step of the running moments of generated features: with 0.9 they are of the last 10 batches. The longer
    they lag behind, the smaller the learning rate must be."""
    queue: int = 0
    """Moments of so many of the last generated images, in place of running averages."""
    reference: int = 10_000
    """Most training images whose features are the reference of Frechet distances."""
    scales: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Of drifting, in units of the mean distance of features."""
    steps: int = 300
    """Steps. The learning rate decays over all of them, so that more are another run."""
    batch: int = 128
    """Images per step."""
    learning_rate: float = 1e-4
    """Peak of Adam's learning rate, after the warm-up and before the cosine decay to 0."""
    warmup: int = 50
    """Steps of linear warm-up, in which moments are gathered."""
    decay: float = 0.98
    """Decay per step of the parameter average that is judged."""
    samples: int = run.setting(10_000)
    """Images that are judged, at most as many as are held out."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=0, warmup=0, seed=0, samples=2, reference=2, evaluations=1, queue=0, batch=1)
        run.check_sizes(self, batch=1 << 20, samples=1 << 20, reference=1 << 20, queue=1 << 22, evaluations=64)
        if self.accumulation > 1:
            raise ValueError(f"accumulation must be 1 for losses that are no means over rows, got {self.accumulation}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie in (0, 1), got {self.holdout}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if not self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"features must be at least one space, and no space twice, got {self.features}")
        if self.feature_weights and len(self.feature_weights) != len(self.features):
            rule = f"{len(self.features)}, one for each space"
            raise ValueError(f"feature_weights must be {rule}, got {len(self.feature_weights)}")
        if self.feature_weights and min(self.feature_weights) <= 0:
            raise ValueError(f"feature_weights must be > 0, got {self.feature_weights}")
        if 0 < self.queue < self.batch:
            raise ValueError(f"queue must be 0 or at least the batch of {self.batch}, got {self.queue}")
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.Drifting(scales=self.scales)
        mfx.ExponentialAverage(self.decay)
        if not 0 <= self.population_decay < 1:
            raise ValueError(f"population_decay must lie in [0, 1), got {self.population_decay}")


def open_weights(path: str) -> checkpoint.Weights:
    """Those of a network that makes images in [-1, 1], of labels or of nothing."""
    if not path:
        raise ValueError("--start must be given, got none")
    weights = checkpoint.read_weights(path)
    notes, network = weights.notes, weights.network
    if notes is None or notes.pixels != (-1, 1) or notes.tokenizer is not None:
        raise ValueError(f"{path}: must be of images in [-1, 1], as the notes of images.py say, got {notes}")
    if notes.trained is not None and not notes.trained.average:
        raise ValueError(f"{path}: must be of a network with u trained at r < t, got one of Flow Matching")
    if network is None or network.get("guidance") or network.get("condition"):
        raise ValueError(f"{path}: must be of a network that takes labels or nothing, got {network}")
    return weights


def labels_of(weights: checkpoint.Weights) -> int | None:
    return None if weights.network is None else weights.network.get("labels")


def open_data(config: Config, weights: checkpoint.Weights, shape: tuple[int, ...]) -> image_sources.Parts:
    """Training and test images for the network, which has its labels or none."""
    about, labels = weights.config, labels_of(weights)
    paths = config.data or about.get("data") or ()
    if paths == "digits":
        parts = digits_as_images(digits.Config(holdout=about.get("holdout", 0.2), seed=about.get("seed", 0)))
    elif not paths or not isinstance(paths, tuple | list):
        raise ValueError(f"--data must be given for {weights.path}, which does not name its data, got none")
    else:
        where = {"size": shape[1:], "holdout": config.holdout, "grey": shape[0] == 1}
        parts = image_sources.open_parts(tuple(paths), config.test, **where)
    for part in (parts.train, parts.test):
        if part.row_shape != shape:
            raise ValueError(f"{part.name}: images must have the shape {shape} of the network, got {part.row_shape}")
        if labels is not None and (part.labels is None or part.labels > labels):
            raise ValueError(f"{part.name}: labels must be the {labels} of the network, got {part.labels}")
    if "classifier" in config.features and parts.train.labels is None:
        raise ValueError(f"--features must be without classifier for {parts.train.name}, without labels")
    return parts


def digits_as_images(config: digits.Config) -> image_sources.Parts:
    """The digits in bytes, as digits.py divides them."""

    def in_bytes(source: data.ArraySource) -> data.ArraySource:
        x = np.rint(127.5 * (source.x + 1)).astype(np.uint8)
        return data.ArraySource(x, source.label, labels=digits.CLASSES, name=source.name)

    found = digits.load(config)
    return image_sources.Parts(in_bytes(found.train), in_bytes(found.holdout), [*"0123456789"])


def objective(
    config: Config,
    spaces: list[post_features.Space],
    train: data.AbstractSource,
    parallelism: mfx.Parallelism | None,
    *,
    unroll: bool,
) -> mfx.SampleObjective:
    """The losses in all spaces, with the moments of the training images."""
    weights = config.feature_weights or (1.0,) * len(spaces)
    times = mfx.uniform_times(config.evaluations)
    place = (lambda loss: loss) if parallelism is None else parallelism.replicate
    if config.loss == "drifting":
        losses = tuple(place(mfx.Drifting(space.features, config.scales)) for space in spaces)
        return mfx.SampleObjective(losses, weights, times, unroll=unroll)
    population = mfx.QueuedPopulation(config.queue) if config.queue else mfx.RunningPopulation(config.population_decay)
    count = min(10 * config.batch if config.test_run else config.reference, len(train))
    losses, scaled = [], []
    for space, weight in zip(spaces, weights, strict=True):
        known = post_features.moments(space, train, count)
        losses.append(place(mfx.FrechetLoss(known.mean, known.cov, space.features, population)))
        scaled.append(weight / float(np.trace(known.cov)))
    return mfx.SampleObjective(losses, tuple(scaled), times, unroll=unroll)


def optimizer(config: Config) -> optax.GradientTransformation:
    steps = max(config.steps, config.warmup + 1)
    return optax.adam(optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.warmup, steps, 0))


def main(config: Config) -> None:
    """Post-train saved weights, then judge them beside those they started from."""
    run.require("matplotlib", "safetensors")
    weights = open_weights(config.start)
    start: Any = weights.fill(weights.make_network)
    train, test, names = open_data(config, weights, start.data_shape)
    labels = labels_of(weights)
    parallelism, is_unrolled = run.parallelism(config), isinstance(start, mfx.UNet) and jax.default_backend() == "cpu"
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    sampler = image_samples.Sampler("", mfx.sample, (config.evaluations,), config.evaluations, labels, names)
    with run.opened(config) as directory:
        run.tell(f"{len(train):,} {train.name}, {len(test):,} {test.name}, labels: {labels or 'none'}")
        judging = image_judge.feature_spaces() if run.is_first() else []
        folder = directory.root.parent
        read = {"steps": 2 if config.test_run else image_classifier.STEPS}
        spaces = [post_features.make_space(name, train, folder, **read) for name in config.features]
        loss = objective(config, spaces, train, parallelism, unroll=is_unrolled)
        parts = data.InTurn((*([] if labels else [data.WithoutLabel()]), data.FromPixels()))
        averages = [mfx.ExponentialAverage(config.decay)]
        step = mfx.TrainStep(loss, optimizer(config), averages, parts, parallelism=parallelism)

        def make_state() -> mfx.TrainState:
            return mfx.init_state(weights.make_network(), step.optimizer, averages, loss, key=jr.key(config.seed))

        def preview(state: mfx.TrainState, path: Path) -> None:
            image_samples.save_samples(sampler, run.local(state.averages[0]), path, rows=2)

        options: dict[str, Any] = {"steps": config.steps, "preview": preview, "start": config.start}
        options["name"] = run.sha256_of_file(config.start)  # a run does not go on from other weights
        options["shown"] = ("loss", "frechet_distance", "drift")
        state = run.train(config, step, make_state, stream, directory, **options)
        save_weights(config, directory, state, weights, loss)
        if run.is_first():
            classifier = None if labels is None else image_classifier.trained(train, folder, **read)
            count = min(10 if config.test_run else config.samples, len(test), len(train))
            judge = image_judge.Judge(judging, classifier, train, test, count)
            finish(config, sampler, {"before": start, "after": run.local(state.averages[0])}, judge, directory)


def save_weights(
    config: Config,
    directory: run.RunDirectory,
    state: mfx.TrainState,
    weights: checkpoint.Weights,
    loss: mfx.SampleObjective,
) -> None:
    """The average as weights, which know what they come from."""
    assert weights.notes is not None
    changed = {"trained": loss.trained, "steps": int(state.step), "decay": config.decay}
    notes = dataclasses.replace(weights.notes, **changed)
    about = {"loss": config.loss, "features": list(config.features), "start": run.sha256_of_file(config.start)}
    path = directory.path("ema.safetensors")
    checkpoint.save_weights(path, state.averages[0], {**weights.config, "post_training": about}, notes)


def finish(
    config: Config,
    sampler: image_samples.Sampler,
    fields: dict[str, mfx.AbstractField],
    judge: image_judge.Judge,
    directory: run.RunDirectory,
) -> None:
    """Pictures, and what the samples of both networks score."""
    began, results = time.perf_counter(), judge.real_images()
    label = np.zeros(len(judge.real.x), np.int32) if judge.label is None else judge.label
    with run.Progress(len(fields), doing="judging") as progress:
        for done, (name, field) in enumerate(fields.items(), 1):
            image_samples.save_samples(sampler, field, directory.path(f"samples_{name}.png"), rows=8)

            def made(field: mfx.AbstractField = field) -> Iterator[tuple[int, Any]]:
                yield config.evaluations, sampler(field, label, config.evaluations, image_samples.JUDGED_SEED)

            results += judge.samples(name, made())
            progress.update(done, {})
    chance = len(judge.train) / (len(judge.train) + len(judge.test))
    names = sampler.all_names if judge.label is not None else None
    text = f"{len(label):,} images each.\n\n{image_judge.report(results, names, chance)}\n\n{change(config, results)}"
    directory.save_results(text, [row._asdict() for row in results])
    run.tell(f"{text}\n\nJudged in {time.perf_counter() - began:.0f} s. {directory.root} has the weights and pictures.")


SHARES = {
    "right class read": lambda row: row.agreement,
    "right class read, lowest class": lambda row: image_judge.least(row.agreement_by_class),
    "covered, lowest class": lambda row: image_judge.least(row.coverage_by_class),
    **{
        f"covered, {space}": lambda row, space=space: (row.coverage or {}).get(space)
        for space in ("pixels", "lite0", image_judge.CLASSIFIER)
    },
}
"""Names of shares, and where a result has them."""


def change(config: Config, results: list[image_judge.Result]) -> str:
    """What counts: the scores before and after, without distances in the spaces that were trained in."""
    floor, before, after = results[0], *results[-2:]
    rows = []
    for space in floor.frechet or ():
        if space not in config.features or space == image_judge.CLASSIFIER:  # that which judges is another one
            values = [(row.frechet or {}).get(space, math.nan) for row in (before, after)]
            kind = " of another seed" if space in config.features else ""
            rows.append((f"Frechet distance, {space}{kind}", *values, f"{100 * (values[1] / values[0] - 1):+.0f}%"))
    for name, of in SHARES.items():
        found = [of(row) for row in (before, after)]
        if None not in found:
            rows.append((name, *map(image_judge.percent, found), f"{100 * (found[1] - found[0]):+.1f} points"))
    return f"Not trained in:\n\n{run.table(rows, ('', 'before', 'after', 'change'))}"


PRESETS = {
    "default": ("Frechet distance of pixels and of the features of a classifier", Config()),
    "drifting": ("drifting in the same spaces", Config(loss="drifting", batch=256)),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
