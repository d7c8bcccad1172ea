"""Images of one's own in one evaluation: a DiT or a U-Net, with labels or without, trained from scratch by MeanFlow.

    python experiments/images.py --data photos --size 64                        a folder, or a folder for each class
    python experiments/images.py --data /usr/share/datasets/fashion-mnist       IDX files; CIFAR-10; shards
    python experiments/images.py --data photos --size 64 --preset quick         about five minutes for 28 x 28 in grey
    python experiments/images.py --data photos --size 64 --preset guided        sharper and narrower; needs labels
    python experiments/images.py --data photos --size 64 --network unet --flips
    python experiments/images.py --data photos --size 64 --dry-run              what it takes, before it is started

A run that was stopped, or killed, continues by the same command, on any number of devices and processes that divides
the batch; with a larger --steps, a finished one continues, too. The parameter average is left in ema.safetensors, which
generate.py and --start read, and evaluate.py if the images are in colour. The paper's CIFAR-10, with its U-Net and its
numbers, is cifar10.py.

At the end as many images are generated as are held out, with the labels of these, and both are compared: by the Frechet
distance of pixels and the sliced Wasserstein distance of pixels, beside which stands what training images score. The
share of samples whose nearest image of all is a training image, and no test image, is compared with the share of
training images: one far above means that training images are repeated. RESULTS.md says what was run.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Int, Key, UInt8
from sklearn.metrics import pairwise_distances_argmin_min

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import image_sources

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, metrics, picture, run

PICTURE_SEED, JUDGED_SEED = 2**31 - 1, 2**31 - 2
"""Of the noise of all pictures, and of all judged images."""
EVALUATIONS = (1, 2, 4)
MOST_FEATURES = 1024
"""Of the Frechet distance: pixels, or means over squares of pixels where there are more."""
MOST_REFERENCES = 1 << 32
"""Bytes that the images of stable targets may take on each device."""
GENERATED_AT_ONCE = 50
"""Images, so that one program makes all of them."""
SEARCHED_AT_ONCE = 4096
"""Real images, among which the nearest one is looked for."""
UNUSED = {"dit": ("multipliers", "blocks", "attention", "dropout"), "unet": ("depth", "heads", "patch")}
"""Fields of the configuration that are those of another network."""


Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A run on images. Times in [0, 1]; pixels in [-1, 1]."""

    data: tuple[str, ...] = ("images",)
    """A folder of images, or with a folder of them for each class; CIFAR-10, its folder or archive; a folder with IDX
    files as of MNIST; an IDX file of images and one of labels; a folder of shards."""
    test: tuple[str, ...] = ()
    """Images to hold samples against, given like data. By default those of CIFAR-10 or MNIST, else a part of data."""
    holdout: float = 0.1
    """Share of the data that is held out if there are no test images, in (0, 1); the same images whatever the seed."""
    size: int = 0
    """Side in pixels to which images in folders are resized and cropped."""
    grey: bool = False
    """Images in grey: the mean over the colours."""
    labels: bool = True
    """Use the labels of the data, if there are any."""
    network: Literal["dit", "unet"] = "dit"
    """A diffusion transformer or a U-Net."""
    width: int = 128
    """Width of the DiT's tokens, a multiple of heads and of 4; channels of the U-Net, a multiple of 4."""
    depth: int = 6
    """Blocks of the DiT."""
    heads: int = 4
    """Attention heads of the DiT."""
    patch: int = 4
    """Side of a patch of the DiT in pixels; divides the image."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Of the U-Net's width at each resolution, each half of the one before."""
    blocks: int = 2
    """Of the U-Net, per resolution going down; one more going up."""
    attention: tuple[int, ...] = ()
    """Resolutions of the U-Net with attention, by their rows of pixels, beside the middle."""
    dropout: float = 0.0
    """Rate within the U-Net's blocks."""
    start: str = ""
    """Weights or checkpoints of the same network to start from: a .safetensors file, or the directory of a run."""
    steps: int = run.setting(8_000)
    """Training steps; more continue a finished run."""
    batch: int = 64
    """Images per step; a multiple of the denominator of identity_share."""
    learning_rate: float = 1e-3
    """Adam's learning rate, constant after the warm-up."""
    warmup: int = 200
    """Steps of linear warm-up."""
    decay: float = 0.999
    """Decay per step of the parameter average that generates."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the MeanFlow identity; in [0, 1]. 0 is Flow Matching."""
    times: tuple[float, float] = (0.0, 2.0)
    """Mean and standard deviation of the logit of both times, drawn apart and sorted; by default nearly uniform."""
    power: float = 0.5
    """Adaptive weight's power p (Eq. 22)."""
    offset: float = 0.01
    """Adaptive weight's offset c (Eq. 22)."""
    references: int = 0
    """Training images with which a step estimates the mean velocity at each state (mf_eqx.StableTarget); 0 to take that
    of a row's own image alone."""
    scale: float = 1.0
    """Guidance scale omega (Eq. 21). With mix 0, 1 means no guidance."""
    mix: float = 0.0
    """Guidance mix kappa (Eq. 21), in [0, 1); the effective scale is omega / (1 - kappa)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Interval of t in which guidance applies, closed at both ends."""
    label_dropout: float = 0.1
    """Share of rows whose label is dropped, in [0, 1 - identity_share]."""
    flips: bool = False
    """Mirror half of the images, left to right."""
    augmentation: float = 0.0
    """Probability in [0, 1] of each of EDM's scaling, stretching and shifting, of which the U-Net is told."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, times, losses and averages stay in float32."""
    remat: bool = run.setting(False)
    """Keep less for the backward pass, and compute it again."""
    samples: int = run.setting(2000)
    """Images that are judged, at most as many as are held out."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=0, warmup=0, seed=0, size=0, references=0, samples=2, width=1, depth=1, heads=1, patch=1)
        run.check_sizes(self, batch=1 << 20, width=1 << 14, depth=1000, multipliers=1 << 10, blocks=32, size=1 << 14)
        run.check_sizes(self, samples=1 << 20)
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie in (0, 1), got {self.holdout}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        for name in UNUSED[self.network]:
            if (value := getattr(self, name)) != (default := getattr(type(self), name)):
                rule = f"must be {default}, the default, with --network {self.network}, which does not use it"
                raise ValueError(f"{name} {rule}, got {value}")
        if not 0 <= self.augmentation <= 1:
            raise ValueError(f"augmentation must lie in [0, 1], got {self.augmentation}")
        check_guidance(self, self.labels)
        if guided(self) and self.label_dropout == 0:
            raise ValueError("label_dropout must be > 0 with guidance, which needs the unlabelled field; got 0.0")
        if self.augmentation and self.network != "unet":
            raise ValueError(f"augmentation must be 0 for a DiT, which is not told of it, got {self.augmentation}")
        if self.augmentation and self.labels and self.label_dropout:
            raise ValueError("augmentation must be 0 with label_dropout, which drops what is told of it; or labels off")
        if self.augmentation and self.references:
            raise ValueError(f"references must be 0 with augmentation, got {self.references}")
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.check_batch_size(self.batch, objective(self, 10 if self.labels else None).identity_share)
        mfx.ExponentialAverage(self.decay)
        prepare(self, 10)
        if self.network == "dit":  # a U-Net must know the side of images
            side = self.patch
            eqx.filter_eval_shape(lambda: make_field(self, (3, side, side), 10, jr.key(0)))  # a real key needs a device


def guided(config: Config) -> bool:
    return (config.scale, config.mix) != (1, 0)


def check_guidance(config: Config, has_labels: bool) -> None:
    if guided(config) and not has_labels:
        raise ValueError(f"scale must be 1 and mix 0 without labels, got {config.scale} and {config.mix}")


def make_field(config: Config, shape: Shape, labels: int | None, key: Key[Array, ""]) -> mfx.DiT | mfx.UNet:
    how: dict[str, Any] = {"dtype": jnp.bfloat16 if config.bfloat16 else jnp.float32, "remat": config.remat, "key": key}
    if config.network == "dit":
        return mfx.DiT(shape, mfx.DiTSize(config.depth, config.width, config.heads, config.patch), labels=labels, **how)
    size = mfx.UNetSize(config.width, config.multipliers, config.blocks, config.attention)
    numbers = 6 if config.augmentation else 0  # by which EDM's augmentation tells the network of itself
    return mfx.UNet(shape, size, labels=labels, augmentation=numbers, dropout=config.dropout, **how)


def objective(config: Config, labels: int | None, target: mfx.StableTarget | None = None) -> mfx.Objective:
    return mfx.Objective(
        mfx.MeanFlow() if config.identity_share else None,
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(*config.times)),
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(config.power, config.offset),
        guidance=mfx.Guidance(config.scale, config.mix, config.interval) if guided(config) else None,
        label_dropout=None if labels is None else mfx.LabelDropout(config.label_dropout, labels),
        stable_target=target,
    )


def prepare(config: Config, labels: int | None) -> data.InTurn:
    """From bytes to what the network sees."""
    parts = [] if labels else [data.WithoutLabel()]
    parts += [data.FromPixels(), data.RandomFlip(0.5 if config.flips else 0.0)]
    return data.InTurn((*parts, *([data.EDMAugmentation(config.augmentation, 0.0)] if config.augmentation else ())))


def stable_target(
    config: Config, source: data.AbstractSource, labels: int | None, parallelism: mfx.Parallelism | None
) -> mfx.StableTarget | None:
    """All training images, of which a step draws `config.references`; also mirrored where the rows are."""
    if not config.references:
        return None
    copies = 2 if config.flips else 1
    if (size := 4 * copies * len(source) * math.prod(source.row_shape)) > MOST_REFERENCES:
        raise ValueError(f"references must be 0 for images of more than {MOST_REFERENCES:,} bytes, got {size:,}")
    rows = source.take(np.arange(len(source)))
    x = (rows.x / np.float32(127.5) - 1).clip(-1, 1)
    x = np.concatenate([x, x[..., ::-1]]) if config.flips else x
    label = None if labels is None or rows.label is None else np.tile(rows.label, copies)
    place = jnp.asarray if parallelism is None else parallelism.replicate
    return mfx.StableTarget(place(x), None if label is None else place(label), min(config.references, len(x)))


def optimizer(config: Config) -> optax.GradientTransformation:
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1))
    return optax.adam(warmup if config.warmup else config.learning_rate)


# Samples


class Sampler(NamedTuple):
    """How images of a field are made."""

    config: Config
    labels: int | None
    class_names: list[str] | None

    def __call__(
        self, field: mfx.AbstractField, label: Int[np.ndarray, " rows"], evaluations: int, seed: int
    ) -> Float[np.ndarray, "rows channels height width"]:
        """An image for each label, from the noise of this seed."""
        method = mfx.sample if self.config.identity_share else mfx.sample_euler
        times, key = mfx.uniform_times(evaluations), jr.key(seed)
        shape = field.data_shape  # pyright: ignore[reportAttributeAccessIssue]
        options = {"method": method, "unroll": jax.default_backend() == "cpu"}  # XLA:CPU is slow in loops
        generator = mfx.Generator(field, key, shape, times, labels=self.labels, **options)
        made, rows = [], GENERATED_AT_ONCE
        for start in range(0, len(label), rows):
            keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, start + np.arange(rows))
            eps = jax.vmap(lambda key: jr.normal(key, shape))(keys)
            wanted = jnp.asarray(np.resize(label[start:], rows))  # the last part is filled up
            made.append(np.asarray(generator.from_noise(eps, None if self.labels is None else wanted)))
        return np.concatenate(made)[: len(label)]

    def columns(self) -> tuple[Int[np.ndarray, " columns"], list[str] | None]:
        """The labels of a picture's columns, at most ten, and their names."""
        if self.labels is None:
            return np.zeros(8, np.int32), None
        count = min(self.labels, 10)
        label = (np.arange(count) * self.labels // count).astype(np.int32)
        return label, [self.class_names[i] if self.class_names else str(i) for i in label]


def save_samples(sampler: Sampler, field: mfx.AbstractField, path: Path, rows: int) -> None:
    """Images of one evaluation, a column for each class."""
    label, names = sampler.columns()
    x = sampler(field, np.tile(label, rows), 1, PICTURE_SEED)
    picture.save_image_grid(path, x.reshape(rows, len(label), *x.shape[1:]), -1, 1, column_labels=names)


def save_comparison(sampler: Sampler, field: mfx.AbstractField, test: data.Rows, path: Path) -> None:
    """A test image of each class, white if there is none, and samples of the same classes, from the same noise
    for each number of evaluations."""
    label, names = sampler.columns()
    known = np.zeros(len(test.x), np.int32) if sampler.labels is None or test.label is None else test.label
    found = [test.x[known == c] for c in label]
    white = np.full_like(test.x[0], 255)  # where the test images lack a class
    rows = {"test images": np.stack([x[i % len(x)] if len(x) else white for i, x in enumerate(found)]) / 127.5 - 1}
    for number in EVALUATIONS:
        rows[counted(number)] = sampler(field, label, number, PICTURE_SEED)
    picture.save_image_grid(path, np.stack([*rows.values()]), -1, 1, row_labels=[*rows], column_labels=names)


def counted(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' if evaluations > 1 else ''}"


# Distances


class Result(NamedTuple):
    """One row of the table: what was held against the test images, made in how many evaluations per image."""

    what: str
    evaluations: int | None
    frechet: float
    sliced_wasserstein: float
    nearer_to_training: float | None = None


def pixels(x: UInt8[np.ndarray, "rows channels height width"]) -> Float[np.ndarray, "rows pixels"]:
    return x.reshape(len(x), -1).astype(np.float32) / 255


def features(x: UInt8[np.ndarray, "rows channels height width"]) -> Float[np.ndarray, "rows features"]:
    """Pixels in [0, 1], or their means over squares that are just large enough for `MOST_FEATURES`."""
    count, channels, height, width = x.shape
    side = min(math.ceil(math.sqrt(x[0].size / MOST_FEATURES)), height, width)
    rows, columns = height // side, width // side
    squares = x[..., : rows * side, : columns * side].reshape(count, channels, rows, side, columns, side)
    return squares.mean(axis=(3, 5)).reshape(count, -1) / 255


def distance_to(
    source: data.AbstractSource, x: UInt8[np.ndarray, "rows channels height width"]
) -> Float[np.ndarray, " rows"]:
    """That of the features of each image to the nearest ones of a source, all of which is searched."""
    wanted, parts = features(x), math.ceil(len(source) / SEARCHED_AT_ONCE)
    found = (features(source.take(rows).x) for rows in np.array_split(np.arange(len(source)), parts))
    return np.min([pairwise_distances_argmin_min(wanted, part)[1] for part in found], axis=0)


def judge(
    sampler: Sampler,
    field: mfx.AbstractField,
    train: data.AbstractSource,
    test: data.AbstractSource,
    count: int,
    update: Callable[[int], None],
) -> list[Result]:
    """Samples with the labels of so many test images against these, after as many training images."""
    known, real = (source.take(image_sources.spread(len(source), count)) for source in (train, test))

    def distances(x: UInt8[np.ndarray, "rows channels height width"]) -> tuple[float, float]:
        sliced = metrics.sliced_wasserstein(pixels(x), pixels(real.x), key=jr.key(0))
        return metrics.frechet_distance(features(x), features(real.x)), float(sliced)

    label = np.zeros(count, np.int32) if real.label is None else real.label
    made: dict[int, UInt8[np.ndarray, "rows channels height width"]] = {}
    for number in EVALUATIONS:
        x = sampler(field, label, number, JUDGED_SEED)
        if np.isfinite(x).all():
            made[number] = np.rint(127.5 * (x.clip(-1, 1) + 1)).astype(np.uint8)
        update(number)
    nearer = {}
    if made:  # together, so that the files of all images are read once
        near, far = (distance_to(source, np.concatenate([*made.values()])) for source in (train, test))
        nearer = dict(zip(made, np.split(near < far, len(made)), strict=True))
    method = "MeanFlow" if sampler.config.identity_share else "Flow Matching"
    results = [Result("training images", None, *distances(known.x))]
    for number in EVALUATIONS:
        found = (*distances(made[number]), float(nearer[number].mean())) if number in made else (math.nan,) * 3
        results.append(Result(method, number, *found))
    return results


def report(results: list[Result], count: int, chance: float) -> str:
    """The table as text. `chance` is the share of training images among all images."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}%"

    rows = [(*row[:4], percent(row.nearer_to_training)) for row in results]
    nearest = f"nearer to training (chance {percent(chance)})"
    headers = ("against test images", "evaluations", "Frechet distance", "sliced W2", nearest)
    return f"{count:,} images each, pixels in [0, 1].\n\n{run.table(rows, headers)}"


def main(config: Config) -> None:
    """Train on images, then judge what the network generates in one evaluation."""
    run.require("matplotlib", "safetensors")
    where = {"size": config.size, "holdout": config.holdout, "grey": config.grey}
    train, test, names = image_sources.open_parts(config.data, config.test, **where)
    labels = train.labels if config.labels else None
    check_guidance(config, labels is not None)
    if labels is not None and test.labels is None:
        raise ValueError(f"test must have labels as the training images have, got none in {test.name} (or --no-labels)")
    field_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    step = mfx.TrainStep(
        objective(config, labels, stable_target(config, train, labels, parallelism)),
        optimizer(config),
        [mfx.ExponentialAverage(config.decay)],
        prepare(config, labels),
        accumulation=config.accumulation,
        parallelism=parallelism,
        unroll=config.network == "unet" and jax.default_backend() == "cpu",
    )
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    sampler = Sampler(config, labels, names)

    channels, height, width = train.row_shape
    shape = (channels, height, width)

    def make_state() -> mfx.TrainState:
        field = make_field(config, shape, labels, field_key)
        return mfx.init_state(field, step.optimizer, step.averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        save_samples(sampler, run.local(state.averages[0]), path, rows=2)

    with run.opened(config) as directory:
        run.tell(f"{len(train):,} {train.name}, {len(test):,} {test.name}, labels: {labels or 'none'}")
        options = {"steps": config.steps, "preview": preview, "start": config.start}
        state = run.train(config, step, make_state, stream, directory, **options)
        save_weights(config, directory, state, names, objective(config, labels).trained)
        field = run.local(state.averages[0])
        if run.is_first():
            finish(config, sampler, field, train, test, directory)


def save_weights(
    config: Config,
    directory: run.RunDirectory,
    state: mfx.TrainState,
    names: list[str] | None,
    trained: mfx.Trained,
) -> None:
    """The average as weights."""
    notes = checkpoint.Notes(
        pixels=(-1, 1),
        class_names=tuple(names) if names and config.labels else None,
        trained=trained,
        steps=int(state.step),
        decay=config.decay,
    )
    config_of_data = {"data": list(config.data)}
    checkpoint.save_weights(directory.path("ema.safetensors"), state.averages[0], config_of_data, notes)


def finish(
    config: Config,
    sampler: Sampler,
    field: mfx.AbstractField,
    train: data.AbstractSource,
    test: data.AbstractSource,
    directory: run.RunDirectory,
) -> None:
    """Pictures and distances."""
    began = time.perf_counter()
    if records := directory.records():
        picture.save_curves(directory.path("curves.png"), records)
    save_samples(sampler, field, directory.path("samples.png"), rows=8)
    count = min(10 if config.test_run else config.samples, len(test), len(train))
    shown = test.take(image_sources.spread(len(test), count))
    save_comparison(sampler, field, shown, directory.path("comparison.png"))
    with run.Progress(max(EVALUATIONS), doing="judging") as progress:
        results = judge(sampler, field, train, test, count, lambda number: progress.update(number, {}))
    text = report(results, count, len(train) / (len(train) + len(test)))
    directory.save_results(text, [row._asdict() for row in results])
    print(f"{text}\n\nJudged in {time.perf_counter() - began:.0f} s. Weights and pictures are in {directory.root}.")


QUICK: dict[str, Any] = {"steps": 1000, "width": 96, "depth": 4, "decay": 0.99, "warmup": 100, "learning_rate": 2e-3}

PRESETS = {
    "default": ("a DiT of width 128 and depth 6: about an hour for 28 x 28 in grey on 2 CPU cores", Config()),
    "quick": (
        "a DiT of width 96 and depth 4: about five minutes",
        Config(**QUICK, save_every=250, preview_every=250),
    ),
    "guided": ("as the default, with an effective guidance scale of 2", Config(mix=0.5)),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
