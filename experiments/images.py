"""Images of one's own in one evaluation: a DiT or a U-Net, with labels or without, trained from scratch by MeanFlow or
another method.

    python experiments/images.py --data photos --size 64                        a folder, or a folder for each class
    python experiments/images.py --data /usr/share/datasets/fashion-mnist       IDX files; CIFAR-10; shards
    python experiments/images.py --data photos --size 64 --preset quick         a small network, minutes on a CPU
    python experiments/images.py --data photos --size 64 --preset guided        guidance inside the target; needs labels
    python experiments/images.py --data photos --size 64 --preset any-guidance  one network, guided at sampling
    python experiments/images.py --data photos --size 48 64 --network unet --flips        48 rows of 64 pixels
    python experiments/images.py --data photos --size 64 --method AlphaFlow     another method of mf_eqx
    python experiments/images.py --data photos --size 64 --identity mine.py:Mix            a method of your own
    python experiments/images.py --data photos --size 64 --network mine.py:Net             a network of your own
    python experiments/images.py --data photos --size 64 --dry-run              what it takes, before it is started

A run that was stopped, or killed, continues by the same command, on any number of devices and processes that divides
the batch; with a larger --steps, a finished one continues, too. The parameter average is left in ema.safetensors, which
generate.py, evaluate.py and --start read. The paper's CIFAR-10, with its U-Net and its numbers, is cifar10.py; pixel
MeanFlow, whose networks predict images, is pixels.py.

At the end at most `--samples` images are generated with the labels of test images and compared with these: by distances
in several feature spaces, by a classifier, by how many test images are covered, and by how many samples repeat training
images. image_judge.py says how, fashion.py is this recipe for Fashion-MNIST, and RESULTS.md says what was run.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import guidance_flags
    import image_classifier
    import image_judge
    import image_samples
    import image_sources

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, picture, run

EVALUATIONS, EULER_STEPS = (1, 2, 4), (1, 4, 16)
"""Evaluations per judged image: along the average velocity, and in Euler steps for Flow Matching."""
POWER = 0.5
"""Power of the adaptive weight, of methods that have one by default."""
SHOWN = 1000
"""Test images of which some are shown, where none are judged."""
MOST_REFERENCES = 1 << 32
"""Bytes that the images of stable targets may take on each device."""
SIZES = {
    "dit": {"small": mfx.DiTSize(4, 96, 4, 4), "medium": mfx.DiTSize(6, 128, 4, 4), "large": mfx.DIT_S2},
    "unet": {
        "small": mfx.UNetSize(16, (1, 2), 1, ()),
        "medium": mfx.UNetSize(24, (1, 2, 2), 1, ()),
        "large": mfx.UNetSize(128, (1, 2, 2), 2, ()),
    },
}
UNUSED = {"dit": ("multipliers", "blocks", "attention", "dropout"), "unet": ("depth", "heads", "patch")}
"""Fields of the configuration that are those of another network."""
OF_NETWORKS = ("width", *UNUSED["dit"], *UNUSED["unet"], "bfloat16", "remat", "guidance_input")
"""Fields that say how these networks are made, and do nothing for a network of one's own."""


Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclasses.dataclass(frozen=True)
class Config(image_sources.ImageSettings):
    """A run on images. Times in [0, 1]; pixels in [-1, 1]."""

    labels: bool = True
    """Use the labels of the data, if there are any."""
    network: str = "dit"
    """dit, a diffusion transformer; unet, a U-Net; or a network of your own, as mine.py:Net, or mine.py if the file
    defines one: a subclass of mf_eqx.AbstractField that is made as Net(shape, key=key), shape being channels, height
    and width, or as Net(shape, labels=10, key=key) if it has this argument and the data have labels. A label is its
    condition; in rows without a label it is the number of labels."""
    network_size: Literal["small", "medium", "large"] = "medium"
    """Size of the network, unless it is your own. A value of 0 or () below means: as in this size."""
    width: int = 0
    """Width of the DiT's tokens, a multiple of heads and of 4; channels of the U-Net, a multiple of 4."""
    depth: int = 0
    """Blocks of the DiT."""
    heads: int = 0
    """Attention heads of the DiT."""
    patch: int = 0
    """Side of a patch of the DiT in pixels; divides the image."""
    multipliers: tuple[int, ...] = ()
    """Factors of the U-Net's width, one for each resolution; each resolution is half of the one before."""
    blocks: int = 0
    """Residual blocks of the U-Net per resolution going down; one more going up."""
    attention: tuple[int, ...] = ()
    """Resolutions of the U-Net with attention, given by their rows of pixels; the middle always has attention."""
    dropout: float = 0.0
    """Dropout rate within the U-Net's blocks."""
    start: str = ""
    """Weights or checkpoints of the same network to start from: a .safetensors file, or the directory of a run."""
    method: str | None = None
    """A method of mf_eqx by the name of its class, such as AlphaFlow or Shortcut; by default MeanFlow, with
    guidance_input ImprovedMeanFlow. Flow Matching is --identity-share 0."""
    identity: str | None = None
    """A method of your own in place of these, as mine.py:Mix, or mine.py if the file defines one: a subclass of
    mf_eqx.AbstractIdentity that can be made without arguments."""
    steps: int = run.setting(24_000)
    """Training steps; more continue a finished run, unless its method has a schedule, which is made for them."""
    batch: int = 16
    """Images per step; a multiple of the denominator of identity_share. On a CPU, where a small batch takes hardly more
    time per image, four steps of 16 images do far more than one of 64."""
    learning_rate: float = 1e-3
    """Adam's learning rate, constant after the warm-up."""
    warmup: int = 500
    """Steps of linear warm-up."""
    decay: float = 0.9995
    """Decay per step of the parameter average that generates."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the equation of the method; in [0, 1]. 0 is Flow Matching."""
    times: tuple[float, float] = (-0.4, 1.0)
    """Mean and standard deviation of the logit of both times, drawn apart and sorted, or of the one time of Flow
    Matching; by default the paper's. 0 and 2 are nearly uniform."""
    power: float | None = None
    """Adaptive weight's power p (Eq. 22), 0 for no weight. By default 0.5 for methods whose rows with r < t use the
    velocity of the data, such as MeanFlow, and 0 for all others, such as Shortcut, and for Flow Matching: without the
    noise of this velocity the errors of these rows are small, and a weight that favours small errors lets them win,
    though wrong fields, such as u = 0, solve most of these equations, too."""
    offset: float = 0.01
    """Adaptive weight's offset c (Eq. 22)."""
    references: int = 0
    """Training images from which a step estimates the mean velocity at each state (mf_eqx.StableTarget); with 0 the
    target is the velocity of a row's own image alone."""
    scale: float = 1.0
    """Guidance scale omega (Eq. 21). With mix 0, 1 means no guidance."""
    mix: float = 0.0
    """Guidance mix kappa (Eq. 21), in [0, 1); the effective scale is omega / (1 - kappa)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Interval of t in which guidance applies, closed at both ends."""
    guidance_input: bool = False
    """Draw guidance scales from 1 to 8 and intervals for each row and give them to the network, so that they are chosen
    at sampling (improved MeanFlow), in place of scale, mix and interval; needs labels."""
    sample_scale: tuple[float, ...] = run.setting((1.0, 2.0))
    """With guidance_input: the scales that are judged; pictures show the last."""
    sample_interval: tuple[float, float] = run.setting((0.0, 1.0))
    """With guidance_input: the first and the last time at which these scales hold, in all samples."""
    label_dropout: float = 0.1
    """Share of rows whose label is dropped, in [0, 1 - identity_share], or in [0, 1] if identity_share is 1."""
    flips: bool = False
    """Mirror half of the images, left to right."""
    augmentation: float = 0.0
    """Probability in [0, 1] of each of EDM's scaling, stretching and shifting, of which the U-Net is told."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, times, losses and averages stay in float32."""
    remat: Literal["none", "products", "full"] = run.setting("none")
    """What the backward pass computes again, to save memory: nothing; all but products with weights and convolutions;
    all but each block's input."""
    samples: int = run.setting(10_000)
    """Images that are judged, at most as many as are held out; 0 for none, which leaves pictures and weights."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check_images()
        self.check(steps=0, warmup=0, seed=0, references=0, samples=0)
        self.check(width=0, depth=0, heads=0, patch=0, blocks=0)
        run.check_sizes(self, batch=1 << 20, width=1 << 14, depth=1000, multipliers=1 << 10, blocks=32)
        run.check_sizes(self, samples=1 << 20)
        if self.samples == 1:
            raise ValueError("samples must be 0 or at least 2, got 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if self.network not in SIZES:
            check_own_network(self)
        for name in UNUSED.get(self.network, ()):
            if value := getattr(self, name):
                raise ValueError(f"{name} must be left out with --network {self.network}, which has none, got {value}")
        if not 0 <= self.augmentation <= 1:
            raise ValueError(f"augmentation must lie in [0, 1], got {self.augmentation}")
        check_method(self)
        if self.labels:
            guided_at_all = guided(self) or self.guidance_input
            guidance_flags.check_dropout(self.label_dropout, self.identity_share, guided=guided_at_all)
        check_guidance(self, self.labels)
        if self.augmentation and self.network != "unet":
            kind = "a DiT" if self.network == "dit" else "a network of your own"
            raise ValueError(f"augmentation must be 0 for {kind}, which is not told of it, got {self.augmentation}")
        if self.augmentation and self.labels and self.label_dropout:
            raise ValueError("augmentation must be 0 with label_dropout, which drops what is told of it; or labels off")
        if self.augmentation and self.references:
            raise ValueError(f"references must be 0 with augmentation, got {self.references}")
        # What the parts themselves refuse is refused here, where a flag can be named.
        loss = objective(self, 10 if self.labels else None)
        group = 1 if loss.identity is None else loss.identity.facts.group
        mfx.check_batch_size(self.batch, loss.identity_share, group=group)
        mfx.ExponentialAverage(self.decay)
        prepare(self, 10)
        if self.network == "dit":  # a U-Net must know the side of images
            side = size_of(self).patch
            eqx.filter_eval_shape(lambda: make_field(self, (3, side, side), 10, jr.key(0)))  # a real key needs a device


def identity_of(config: Config) -> mfx.AbstractIdentity | None:
    """The method, with its schedules made for the steps of the run; None for Flow Matching."""
    if not config.identity_share:
        return None
    if config.identity is not None:
        return run.own_identity("identity", config.identity, config.steps)
    default = "ImprovedMeanFlow" if config.guidance_input else "MeanFlow"
    return mfx.identities_in(vars(mfx), config.steps)[config.method or default]


def training_name(config: Config) -> str:
    """What must not change when a run continues, beside the recipe itself: the content of a file of one's own, and the
    number of steps that a schedule is made for."""
    own = {"identity": config.identity, "network": None if config.network in SIZES else config.network}
    parts = [f"{place} ({run.own_file(name, place).digest})" for name, place in own.items() if place is not None]
    if isinstance(identity := identity_of(config), mfx.AbstractScheduledIdentity):
        parts.append(f"{type(identity).__name__} for {config.steps} steps")
    return ", ".join(parts)


def weighted(identity: mfx.AbstractIdentity | None) -> bool:
    """Whether a method has the adaptive weight by default.

    Where rows with r < t do not use the velocity v of the data, their errors are free of its noise and soon far below
    those of rows with r = t. A weight that favours small errors lets such rows win, though wrong fields, such as u = 0,
    solve most of these equations, too. With p = 0.5 four of these methods learnt nothing on Fashion-MNIST (RESULTS.md).
    """
    return identity is not None and identity.facts.uses_velocity


def check_own_network(config: Config) -> None:
    """Refuses what is no class of a file, and flags that are those of other networks."""
    if ".py" not in config.network:
        raise ValueError(f"network must be {', '.join(SIZES)} or a class as mine.py:Net, got {config.network}")
    run.own_class("network", config.network, mfx.AbstractField)
    check_left_out(config, OF_NETWORKS, f"with --network {config.network}, a network of your own")


def check_method(config: Config) -> None:
    """Refuses methods that are not there, and what a method cannot be combined with."""
    run.check_among(config, method=mfx.identities_in(vars(mfx), 1))
    given = config.identity or config.method
    if config.identity is not None and config.method is not None:
        raise ValueError(f"method must be left out with identity, which is one, got {config.method}")
    if given is not None and not config.identity_share:
        raise ValueError(f"identity_share must be > 0 for {given}, got 0, which is Flow Matching")
    if (identity := identity_of(config)) is None:
        return
    name, facts = type(identity).__name__, identity.facts
    if facts.needs_velocity_head:
        raise ValueError(f"identity must be a method without a velocity head, which no network here has, got {name}")
    if facts.uses_pair and config.references:
        rule = f"be 0 for {name}, which learns from pairs of an image and noise"
        raise ValueError(f"references must {rule}, got {config.references}")
    if facts.uses_pair or (facts.group > 1 and facts.uses_velocity):
        reason = "which learns from pairs of an image and noise" if facts.uses_pair else "whose rows share times"
        if guided(config):
            raise ValueError(f"scale must be 1 and mix 0 for {name}, {reason}, got {config.scale} and {config.mix}")
        if config.guidance_input:
            raise ValueError(f"guidance_input must be left out for {name}, {reason}, got True")


def guided(config: Config) -> bool:
    return (config.scale, config.mix) != (1, 0)


def check_guidance(config: Config, has_labels: bool) -> None:
    if guided(config) and not has_labels:
        raise ValueError(f"scale must be 1 and mix 0 without labels, got {config.scale} and {config.mix}")
    if not guided(config) and not config.guidance_input and config.interval != (0, 1):
        raise ValueError(f"interval must be left out without guidance, got {config.interval}")
    if not config.guidance_input:
        return check_left_out(config, ("sample_scale", "sample_interval"), "without guidance_input")
    if not has_labels:
        raise ValueError("guidance_input must be left out without labels, got True")
    if guided(config) or config.interval != (0, 1):
        found = f"{config.scale:g}, {config.mix:g} and {config.interval}"
        raise ValueError(f"scale, mix and interval must be 1, 0 and (0, 1) with guidance_input, got {found}")
    if config.identity_share in (0, 1):
        raise ValueError(f"identity_share must lie between 0 and 1 with guidance_input, got {config.identity_share}")
    drawn = objective(config, 10).trained.guidance
    assert drawn is not None
    guidance_flags.check_drawn(drawn, config.sample_scale, [config.sample_interval])


def check_left_out(config: Any, names: Sequence[str], when: str) -> None:
    """Refuses flags that would do nothing: those that differ from the defaults of their class."""
    for name in names:
        if (found := getattr(config, name)) != getattr(type(config), name):
            raise ValueError(f"{name} must be left out {when}, got {found}")


def size_of(config: Config) -> Any:
    """The size of the network, a `DiTSize` or a `UNetSize`: by its name, but for the fields that are given."""
    size = SIZES[config.network][config.network_size]
    return size._replace(**{name: value for name in size._fields if (value := getattr(config, name))})


def make_field(config: Config, shape: Shape, labels: int | None, key: Key[Array, ""]) -> mfx.AbstractField:
    if config.network not in SIZES:
        label = None if labels is None else jax.ShapeDtypeStruct((), jnp.int32)
        return run.own_network("network", config.network, shape, label, labels=labels)(key=key)
    how: dict[str, Any] = {
        "dtype": jnp.bfloat16 if config.bfloat16 else jnp.float32,
        "remat": mfx.nn.REMATS[config.remat],
        "key": key,
    }
    how["guidance"] = config.guidance_input
    if config.network == "dit":
        return mfx.DiT(shape, size_of(config), labels=labels, **how)
    numbers = 6 if config.augmentation else 0  # by which EDM's augmentation tells the network of itself
    return mfx.UNet(shape, size_of(config), labels=labels, augmentation=numbers, dropout=config.dropout, **how)


def objective(config: Config, labels: int | None, target: mfx.StableTarget | None = None) -> mfx.Objective:
    times, identity, guidance = mfx.LogitNormalTimes(*config.times), identity_of(config), None
    if guided(config):
        guidance = mfx.Guidance(config.scale, config.mix, config.interval)
    elif config.guidance_input:  # which evaluates the velocity that improved MeanFlow takes as its tangent anyway
        guidance = mfx.DrawnGuidance()
    power = config.power if config.power is not None else POWER if weighted(identity) else 0.0
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(times),
        boundary_times=None if config.identity_share else times,
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(power, config.offset),
        guidance=guidance,
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


def make_samplers(config: Config, labels: int | None, class_names: Sequence[str] | None) -> list[image_samples.Sampler]:
    """How images are made: one way, or one for each scale of guidance. Pictures show the last."""
    names, identity = None if labels is None else class_names, identity_of(config)
    if identity is None:
        steps = EULER_STEPS
        return [image_samples.Sampler("Flow Matching", mfx.sample_euler, steps, steps[-1], labels, names)]
    name, along = type(identity).__name__, mfx.sample_consistency if identity.facts.ends_at_data else mfx.sample
    if config.guidance_input:
        return at_scales(name, config.sample_scale, config.sample_interval, labels, names, along)
    return [image_samples.Sampler(name, along, EVALUATIONS, EVALUATIONS[0], labels, names)]


def at_scales(
    name: str,
    scales: Sequence[float],
    interval: tuple[float, float],
    labels: int | None,
    class_names: Sequence[str] | None,
    along: Callable[..., Any] = mfx.sample,
) -> list[image_samples.Sampler]:
    """One evaluation or several, at each scale of guidance."""
    how = along, EVALUATIONS, EVALUATIONS[0], labels, class_names
    return [image_samples.Sampler(f"{name}, guidance {scale:g}", *how, (scale, interval)) for scale in scales]


def optimizer(config: Config) -> optax.GradientTransformation:
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup, 1))
    return optax.adam(warmup if config.warmup else config.learning_rate)


def open_data(config: Config, class_names: Sequence[str] | None) -> image_sources.Parts:
    """Training and test images that agree with the configuration, and the names of the classes if they have any."""
    parts = config.open_parts()
    parts = parts if class_names is None else parts._replace(class_names=class_names)
    labels, name = parts.train.labels if config.labels else None, parts.train.name
    check_guidance(config, labels is not None)
    if labels is not None and parts.test.labels is None:
        rule = f"must have labels as the training images have, got none in {parts.test.name} (or --no-labels)"
        raise ValueError(f"test {rule}")
    if labels and parts.class_names and labels != len(parts.class_names):
        raise ValueError(f"{name}: labels must be {len(parts.class_names)}, one for each class, got {labels}")
    return parts


def main(config: Config, class_names: Sequence[str] | None = None) -> None:
    """Train on images, then judge what the network generates in one evaluation."""
    run.require("matplotlib", "safetensors", "sklearn")
    train, test, names = open_data(config, class_names)
    labels = train.labels if config.labels else None
    field_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    loss = objective(config, labels, stable_target(config, train, labels, parallelism))
    step = mfx.TrainStep(
        loss,
        optimizer(config),
        [mfx.ExponentialAverage(config.decay)],
        prepare(config, labels),
        teacher=0 if loss.needs_teacher else None,
        accumulation=config.accumulation,
        parallelism=parallelism,
    )
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    channels, height, width = train.row_shape
    shape = (channels, height, width)
    samplers = [sampler._replace(data_shape=shape) for sampler in make_samplers(config, labels, names)]

    def make_state() -> mfx.TrainState:
        field = make_field(config, shape, labels, field_key)
        return mfx.init_state(field, step.optimizer, step.averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        image_samples.save_samples(samplers[-1], run.local(state.averages[0]), path, rows=2)

    with run.opened(config) as directory:
        run.tell(f"{len(train):,} {train.name}, {len(test):,} {test.name}, labels: {labels or 'none'}")
        spaces = image_judge.feature_spaces() if config.samples and run.is_first() else []
        options = {"name": training_name(config), "preview": preview, "start": config.start}
        state = run.train(config, step, make_state, stream, directory, steps=config.steps, **options)
        about = {"data": list(config.data), "test": list(config.test), "holdout": config.holdout}  # which it never saw
        if config.network not in SIZES:  # which does not tell it
            about |= {"data_shape": shape, "labels": labels}
        save_weights(config, directory, state, names, loss.trained, about)
        if run.is_first():
            field, most = run.local(state.averages[0]), min(config.samples, 10 if config.test_run else 1 << 20)
            finish(samplers, field, spaces, train, test, directory, most=most, test_run=config.test_run)


def save_weights(
    config: Config,
    directory: run.RunDirectory,
    state: mfx.TrainState,
    names: Sequence[str] | None,
    trained: mfx.Trained,
    about: dict[str, Any],
) -> None:
    """The average as weights, with what `about` says of data and network."""
    notes = checkpoint.Notes(
        pixels=(-1, 1),
        class_names=tuple(names) if names and config.labels else None,
        trained=trained,
        steps=int(state.step),
        decay=config.decay,
    )
    checkpoint.save_weights(directory.path("ema.safetensors"), state.averages[0], about, notes)


def finish(
    samplers: Sequence[image_samples.Sampler],
    field: mfx.AbstractField,
    spaces: Sequence[image_judge.FeatureSpace],
    train: data.AbstractSource,
    test: data.AbstractSource,
    directory: run.RunDirectory,
    *,
    most: int,
    test_run: bool,
) -> None:
    """Pictures, and what at most so many samples of each sampler score; pictures alone if it is 0."""
    began, last = time.perf_counter(), samplers[-1]
    if records := directory.records():
        picture.save_curves(directory.path("curves.png"), records)
    image_samples.save_samples(last, field, directory.path("samples.png"), rows=8)
    count = min(most, len(test), len(train))
    shown = test.take(image_sources.spread(len(test), count or min(SHOWN, len(test))))
    image_samples.save_comparison(samplers, field, shown, directory.path("comparison.png"))
    if not count:
        return print(f"Nothing was judged. Weights and pictures are in {directory.root}.")

    classifier = None
    if last.labels is not None:
        steps = 2 if test_run else image_classifier.STEPS
        classifier = image_classifier.trained(train, directory.root.parent, steps=steps)
    judge = image_judge.Judge(spaces, classifier, train, test, count)
    label = np.zeros(count, np.int32) if judge.label is None else judge.label
    with run.Progress(sum(len(sampler.evaluations) for sampler in samplers), doing="judging") as progress:
        done = itertools.count(1)

        def made(
            sampler: image_samples.Sampler,
        ) -> Iterator[tuple[int, Float[np.ndarray, "rows channels height width"]]]:
            for number in sampler.evaluations:
                yield number, sampler(field, label, number, image_samples.JUDGED_SEED)
                progress.update(next(done), {})

        results = judge.real_images()
        for sampler in samplers:
            results += judge.samples(sampler.name, made(sampler))
    chance = len(train) / (len(train) + len(test))
    text = f"{count:,} images each.\n\n{image_judge.report(results, last.all_names, chance)}"
    directory.save_results(text, [row._asdict() for row in results])
    print(f"{text}\n\nJudged in {time.perf_counter() - began:.0f} s. Weights and pictures are in {directory.root}.")


PRESETS = {
    "default": ("a medium network, 24,000 steps: 73 minutes for 28 x 28 in grey on one CPU core", Config()),
    "quick": (
        "a small network, 4,000 steps: seven minutes for 28 x 28 in grey on one CPU core",
        Config(
            network_size="small",
            steps=4000,
            decay=0.997,
            warmup=200,
            learning_rate=2e-3,
            samples=2000,
        ),
    ),
    "guided": ("as the default, with an effective guidance scale of 2", Config(mix=0.5)),
    "any-guidance": (
        "as the default, with guidance scale and interval as inputs, chosen at sampling",
        Config(guidance_input=True),
    ),
    "gpu": (
        "a large network in bfloat16, for a GPU; not run yet",
        Config(network_size="large", steps=6000, batch=256, learning_rate=4e-4, decay=0.999, bfloat16=True),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
