"""Post-training of saved weights by losses on whole batches of generated images: the Frechet distance, drifting, or a
reward.

    python experiments/post_train.py --start runs/digits/1a2b3c4d/meanflow/ema_0.997.safetensors
    python experiments/post_train.py --start runs/fashion/1a2b3c4d/ema.safetensors
    python experiments/post_train.py --start ema.safetensors --preset lite0
    python experiments/post_train.py --start ema.safetensors --preset drifting
    python experiments/post_train.py --start ema.safetensors --preset reward
    python experiments/post_train.py --start ema.safetensors --evaluations 2 --queue 5000

The weights are those of digits.py, images.py or fashion.py, the data those that they were trained with unless --data
names others; what was held out then is held out again. A step generates a batch, each image under the label of a row of
the data, and moves the distribution of its features towards that of the data: `mfx.FrechetLoss`, `mfx.Drifting`. Or it
rewards the probability that a classifier gives the wanted label, without its derivative: `mfx.RewardObjective`. A
Frechet distance is divided by the variance of the data in its feature space, or, with --relative, by its own value.
Before the first step, the running moments or the queue of generated features are filled with images of the weights that
training starts from. The average ends as ema.safetensors, which generate.py and evaluate.py read. A run that was
stopped, or killed, continues by the same command.

At the end images of both weights are judged as by images.py. A distance in a space that was trained in says little of
quality: what counts is printed last, what is found in the other spaces. RESULTS.md has figures of digits, where it
was hardly a gain, and of Fashion-MNIST.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
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
    import saved

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
    """Images to hold samples against, given as for images.py; by default those that the weights were tested with."""
    holdout: float | None = None
    """Share of the data that is held out if there are no test images, in (0, 1), as in images.py; by default that which
    the weights never saw."""
    loss: Literal["frechet", "drifting", "reward"] = "frechet"
    """Frechet distance of features, drifting, or the reward of being read as the wanted label by a classifier."""
    features: tuple[post_features.Name, ...] = ("pixels", "classifier")
    """Spaces of features, whose losses are added: pixels; classifier, another one than that which judges; lite0. A
    small classifier alone does not see noise between pixels, which then grows."""
    feature_weights: tuple[float, ...] = ()
    """A weight for each space, by default 1. Frechet distances are divided by the variance of the data before."""
    relative: bool = False
    """Divide each Frechet distance by its own value instead, so that only its relative change counts."""
    evaluations: int = 1
    """Equal steps from noise to data in which images are generated."""
    population_decay: float = 0.9
    """Decay per step of the running moments of generated features: with 0.9 they are of about 10 batches."""
    queue: int = 0
    """Take the moments of this many of the last generated images, in place of running averages; 0 for running
    averages."""
    refresh: int = 8
    """Steps from one computation of a Frechet distance's eigenvalues to the next. Between them the distance is
    replaced by a lower bound, since with pixels and lite0 eigenvalues are half of a step on a CPU. 1 for every step."""
    reference: int = 10_000
    """Largest number of training images whose features are the reference of Frechet distances."""
    scales: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Scales of drifting, in units of the mean distance of features."""
    anchor: float = 0.0
    """With a reward, the weight of the squared distance of u from that of the weights that training starts from."""
    steps: int = 300
    """Steps. The learning rate decays over all of them, so that more are another run."""
    batch: int = 128
    """Images per step."""
    learning_rate: float = 2e-5
    """Peak of Adam's learning rate, after the warm-up and before the cosine decay to 0. If the Frechet distance
    swings in place of falling, it is too large."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: float = 0.98
    """Decay per step of the parameter average that is judged, and that with a reward makes the samples."""
    samples: int = run.setting(10_000)
    """Images that are judged, at most as many as are held out."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=0, warmup=0, seed=0, samples=2, reference=2, evaluations=1, queue=0, batch=1, refresh=1)
        run.check_sizes(
            self, batch=1 << 20, samples=1 << 20, reference=1 << 20, queue=1 << 22, evaluations=64, refresh=1 << 20
        )
        if self.accumulation > 1:
            raise ValueError(f"accumulation must be 1 for losses that are no means over rows, got {self.accumulation}")
        if self.holdout is not None and not 0 < self.holdout < 1:
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
        self.check_unused()
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.Drifting(scales=self.scales)
        if not 0 <= self.anchor < float("inf"):
            raise ValueError(f"anchor must be >= 0 and finite, got {self.anchor}")
        mfx.ExponentialAverage(self.decay)
        if not 0 <= self.population_decay < 1:
            raise ValueError(f"population_decay must lie in [0, 1), got {self.population_decay}")

    def check_unused(self) -> None:
        """Refuses what another flag leaves without a use."""
        unused = {"frechet": ("scales", "anchor"), "drifting": UNUSED_IN_DRIFTING, "reward": UNUSED_IN_REWARD}[
            self.loss
        ]
        reasons = dict.fromkeys(unused, f"--loss {self.loss}")
        reasons |= {"population_decay": "--queue"} if self.queue else {}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, reason in reasons.items():
            if (found := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name} must be left out with {reason}, which does not use it, got {found}")

    @property
    def population(self) -> mfx.AbstractPopulation:
        return mfx.QueuedPopulation(self.queue) if self.queue else mfx.RunningPopulation(self.population_decay)

    @property
    def spaces(self) -> tuple[post_features.Name, ...]:
        """The spaces of features that are trained in; that of the classifier that rewards is one."""
        return ("classifier",) if self.loss == "reward" else self.features

    @property
    def population_size(self) -> int:
        """Samples that moments are of."""
        return self.queue or round(self.batch / (1 - self.population_decay))


UNUSED_BUT_IN_FRECHET = ("queue", "population_decay", "refresh", "reference", "relative")
UNUSED_IN_DRIFTING = (*UNUSED_BUT_IN_FRECHET, "anchor")
UNUSED_IN_REWARD = (*UNUSED_BUT_IN_FRECHET, "scales", "features", "feature_weights")
LEAST_ROWS = 4
"""For drifting, the fewest rows of each label in a batch, on average: only samples and data of the same label act on
each other."""


def open_weights(path: str, loss: str) -> checkpoint.Weights:
    """Those of a network that makes images in [-1, 1], of labels or of nothing, which `loss` can train on."""
    if not path:
        raise ValueError("--start must be given, got none")
    try:
        weights = checkpoint.read_weights(path)
    except ValueError as error:
        raise ValueError(f"--start: {error}") from error
    notes, network = weights.notes, weights.network
    if notes is None or notes.pixels != (-1, 1) or notes.tokenizer is not None:
        raise ValueError(f"--start must be of images in [-1, 1], as the notes of images.py say, got {notes} in {path}")
    trained = notes.trained
    if trained is not None and not trained.average:
        raise ValueError(f"--start must be of a network with u trained at r < t, got one of Flow Matching in {path}")
    if loss == "reward" and (
        saved.post_trained_evaluations(weights.config)
        or (trained is not None and (trained.ends_at_data or trained.one_step))
    ):
        raise ValueError(f"--start must be of a network with u trained at all r < t for a reward, got {path}")
    if network is None or network.get("guidance") or network.get("condition"):
        raise ValueError(f"--start must be of a network that takes labels or nothing, got {network} in {path}")
    return weights


def labels_of(weights: checkpoint.Weights) -> int | None:
    return None if weights.network is None else weights.network.get("labels")


def open_data(config: Config, weights: checkpoint.Weights, shape: tuple[int, ...]) -> image_sources.Parts:
    """Training and test images for the network, which has its labels or none."""
    about, labels = data_of(config, weights), labels_of(weights)
    if about["data"] == "digits":
        parts = digits_as_images(digits.Config(holdout=about["holdout"], seed=about["seed"]))
    else:
        where = {"size": shape[1:], "holdout": about["holdout"], "grey": shape[0] == 1}
        parts = image_sources.open_parts(tuple(about["data"]), tuple(about["test"]), **where)
    for part in (parts.train, parts.test):
        if part.row_shape != shape:
            rule = f"images of the shape {shape} of the network"
            raise ValueError(f"--data must be {rule}, got {part.row_shape} in the {part.name}")
        if labels is not None and (part.labels is None or part.labels > labels):
            rule = f"images with the {labels} labels of the network"
            raise ValueError(f"--data must be {rule}, got {part.labels} in the {part.name}")
    if config.loss == "reward" and labels is None:
        raise ValueError(f"--loss must not be reward for {weights.path}, a network without labels")
    if "classifier" in config.spaces and parts.train.labels is None:
        raise ValueError(f"--features must be without classifier for {parts.train.name}, without labels")
    return parts


def data_of(config: Config, weights: checkpoint.Weights) -> dict[str, Any]:
    """The data, and what is held out of them: as flags say, else as it was for the weights, so that images that the
    network was trained on are not called held out."""
    about = {"data": list(config.data)} if config.data else dict(weights.config)
    paths = about.get("data")
    if paths == "digits" and isinstance(about.get("holdout"), float) and isinstance(about.get("seed"), int):
        for name in ("test", "holdout"):
            if found := getattr(config, name):
                raise ValueError(f"--{name} must be left out for the digits, which are divided as before, got {found}")
        return {name: about[name] for name in ("data", "holdout", "seed")}
    if not paths or not isinstance(paths, list):
        raise ValueError(f"--data must be given for {weights.path}, which does not name its data, got none")
    test, holdout = list(config.test) or about.get("test") or [], config.holdout or about.get("holdout")
    if config.holdout is not None:
        image_sources.check_holdout(paths, test, config.holdout)
    if holdout is None and not test and not image_sources.has_test_images(Path(paths[0])):
        raise ValueError(f"--holdout or --test must be given: nothing says what {weights.path} never saw of {paths[0]}")
    return {"data": paths, "test": test, "holdout": 0.1 if holdout is None else holdout}


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
    start: mfx.AbstractField,
    train: data.AbstractSource,
    parallelism: mfx.Parallelism | None,
) -> mfx.SampleObjective | mfx.RewardObjective:
    """The loss that was asked for. The steps of a U-Net are unrolled on CPUs, where its loops are slow."""
    unroll = isinstance(start, mfx.UNet) and jax.default_backend() == "cpu"
    if config.loss == "reward":
        return reward_objective(config, spaces[0], start, parallelism, unroll=unroll)
    return sample_objective(config, spaces, train, parallelism, unroll=unroll)


def sample_objective(
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
    count = min(config.population_size if config.test_run else config.reference, len(train))
    losses, scaled = [], []
    for space, weight in zip(spaces, weights, strict=True):
        known = post_features.moments(space, train, count)
        how = {"population": config.population, "relative": config.relative, "refresh": config.refresh}
        loss = mfx.FrechetLoss(known.mean, known.cov, space.features, **how)
        losses.append(place(loss))
        scaled.append(weight if config.relative else weight / float(np.trace(known.cov)))
    return mfx.SampleObjective(losses, tuple(scaled), times, unroll=unroll)


def reward_objective(
    config: Config,
    space: post_features.Space,
    start: mfx.AbstractField,
    parallelism: mfx.Parallelism | None,
    *,
    unroll: bool,
) -> mfx.RewardObjective:
    """The reward of the classifier of a space, held to the network that training starts from."""
    assert isinstance(space.features, post_features.OfClassifier)
    held: dict[str, Any] = {"reference": start, "anchor": config.anchor} if config.anchor else {}
    reward, times = post_features.LabelProbability(space.features), mfx.uniform_times(config.evaluations)
    loss = mfx.RewardObjective(reward, times=times, unroll=unroll, **held)
    return loss if parallelism is None else parallelism.replicate(loss)


def check_numbers(config: Config, train: data.AbstractSource, labels: int | None) -> None:
    """Refuses moments of fewer images than features, which say little of a distribution, and batches in which a label
    has too few rows to drift."""
    if config.loss == "drifting" and config.batch < (least := LEAST_ROWS * (labels or 1)):
        rule = f"{least} for drifting, {LEAST_ROWS} rows for each of {labels or 1} labels"
        raise ValueError(f"--batch must be at least {rule}, got {config.batch}")
    if config.loss != "frechet":
        return
    found, count = config.population_size, min(config.reference, len(train))
    for name in config.features:
        rule = f"must be at least the {post_features.size(name, train.row_shape)} features of {name}"
        if found < post_features.size(name, train.row_shape):
            flag = "--queue" if config.queue else "--batch / (1 - population_decay)"
            raise ValueError(f"{flag} {rule}, got {found}")
        if count < post_features.size(name, train.row_shape):
            raise ValueError(f"--reference, and the training images, {rule}, got {count}")


def filled_state(
    config: Config,
    loss: mfx.SampleObjective | mfx.RewardObjective,
    field: mfx.AbstractField,
    train: data.AbstractSource,
    parts: data.InTurn,
    place: Callable[[Any], Any],
) -> Any:
    """The populations of the losses with images of the network that training starts from. The labels are those of the
    first batches of a stream, and all of it is the same in a run that continues."""
    if isinstance(loss, mfx.RewardObjective):
        return loss.init()
    key, stream = jr.key(config.seed + 1), data.Stream(train, config.batch, seed=config.seed + 1)

    def batches() -> Iterator[mfx.Batch]:
        for number in range(loss.batches_to_fill(config.batch)):
            yield place(jax.vmap(lambda row: parts(row, jr.fold_in(key, row.index)))(stream[number]))

    return loss.fill(place(field), batches(), key=key)


def optimizer(config: Config) -> optax.GradientTransformation:
    steps = max(config.steps, config.warmup + 1)
    return optax.adam(optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.warmup, steps, 0))


def main(config: Config) -> None:
    """Post-train saved weights, then judge them beside those they started from."""
    run.require("matplotlib", "safetensors", "sklearn")
    weights = open_weights(config.start, config.loss)
    start: Any = weights.fill(weights.make_network)
    train, test, names = open_data(config, weights, start.data_shape)
    labels = labels_of(weights)
    check_numbers(config, train, labels)
    parallelism = run.parallelism(config)
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    sampler = image_samples.Sampler("", mfx.sample, (config.evaluations,), config.evaluations, labels, names)
    with run.opened(config) as directory:
        run.tell(f"{len(train):,} {train.name}, {len(test):,} {test.name}, labels: {labels or 'none'}")
        judging = image_judge.feature_spaces() if run.is_first() else []
        folder = directory.root.parent
        read = {"steps": 2 if config.test_run else image_classifier.STEPS}
        spaces = [post_features.make_space(name, train, folder, **read) for name in config.spaces]
        loss = objective(config, spaces, start, train, parallelism)
        parts = data.InTurn((*([] if labels else [data.WithoutLabel()]), data.FromPixels()))
        averages = [mfx.ExponentialAverage(config.decay)]
        teacher = 0 if loss.needs_teacher else None
        step = mfx.TrainStep(loss, optimizer(config), averages, parts, parallelism=parallelism, teacher=teacher)
        place = (lambda tree: tree) if parallelism is None else parallelism.replicate
        filled = filled_state(config, loss, start, train, parts, place)

        def make_state(filled: Any) -> mfx.TrainState:
            state = mfx.init_state(weights.make_network(), step.optimizer, averages, loss, key=jr.key(config.seed))
            return dataclasses.replace(state, objective=filled)

        def preview(state: mfx.TrainState, path: Path) -> None:
            image_samples.save_samples(sampler, run.local(state.averages[0]), path, rows=2)

        options: dict[str, Any] = {"steps": config.steps, "preview": preview, "start": config.start}
        # A run does not go on from other weights, nor with other features.
        options["name"] = run.digest([run.sha256_of_file(config.start), *map(post_features.digest, spaces)])
        options["shown"] = ("loss", "frechet_distance", "drift", "reward")
        state = run.train(config, step, eqx.Partial(make_state, filled), stream, directory, **options)
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
    loss: mfx.SampleObjective | mfx.RewardObjective,
) -> None:
    """The average as weights, which know what they come from."""
    assert weights.notes is not None
    changed = {"trained": loss.trained, "steps": int(state.step), "decay": config.decay}
    notes = dataclasses.replace(weights.notes, **changed)
    about = {"loss": config.loss, "features": list(config.spaces), "start": run.sha256_of_file(config.start)}
    if config.loss != "reward":  # which trains u at all times
        about["evaluations"] = config.evaluations
    history = {"post_training": [*weights.config.get("post_training", ()), about]}
    path = directory.path("ema.safetensors")
    checkpoint.save_weights(path, state.averages[0], {**data_of(config, weights), **history}, notes)


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


def change(config: Config, results: list[image_judge.Result]) -> str:
    """What counts: the scores before and after in the feature spaces that were not used in training. If the features of
    a classifier were used, the scores by the judging classifier are in a table of their own, since it is of the same
    kind."""
    spaces = [name for name in results[0].frechet or () if name != image_judge.CLASSIFIER]
    rows = [row for name in spaces if name not in config.spaces for row in scores(results, name)]
    if spaces[-1] not in config.spaces:  # in which the judge counts classes one by one
        rows += compared(results, "covered, lowest class", lambda row: image_judge.least(row.coverage_by_class))
    read = scores(results, image_judge.CLASSIFIER)
    read += compared(results, "right class read", lambda row: row.agreement)
    read += compared(results, "right class read, lowest", lambda row: image_judge.least(row.agreement_by_class))
    if image_judge.CLASSIFIER not in config.spaces:
        return table("Not trained in", rows + read)
    apart = "By a classifier of the same kind as that which was trained with, from another seed"
    return f"{table('Not trained in', rows)}\n\n{table(apart, read)}"


def scores(results: list[image_judge.Result], space: str) -> list[tuple[Any, ...]]:
    """Distance and coverage in a space."""
    before, after = ((row.frechet or {}).get(space) for row in results[-2:])
    if before is None or after is None:
        return []
    distance = (f"Frechet distance, {space}", before, after, f"{100 * (after / before - 1):+.0f}%")
    return [distance, *compared(results, f"covered, {space}", lambda row: (row.coverage or {}).get(space))]


def compared(
    results: list[image_judge.Result], name: str, of: Callable[[image_judge.Result], float | None]
) -> list[tuple[Any, ...]]:
    """A share before and after, if it is known."""
    before, after = map(of, results[-2:])
    if before is None or after is None:
        return []
    return [(name, *map(image_judge.percent, (before, after)), f"{100 * (after - before):+.1f} points")]


def table(title: str, rows: list[tuple[Any, ...]]) -> str:
    return f"{title}:\n\n{run.table(rows, ('', 'before', 'after', 'change'))}" if rows else f"{title}: nothing judged."


PRESETS = {
    "default": ("Frechet distance of pixels and of the features of a classifier", Config()),
    "lite0": (
        "Frechet distance of pixels and of the features of EfficientNet-Lite0",
        Config(features=("pixels", "lite0"), steps=215, learning_rate=4e-5, warmup=20),
    ),
    "drifting": ("drifting in the same spaces", Config(loss="drifting", batch=256, learning_rate=1e-4)),
    "reward": ("the probability that a classifier gives the wanted label", Config(loss="reward", decay=0.9)),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
