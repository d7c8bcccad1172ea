"""Images in one evaluation without a tokenizer: pixel MeanFlow, whose networks predict images, trained from scratch.

    python experiments/pixels.py --preset tiny --data cifar-10-binary.tar.gz          a small network, on a CPU
    python experiments/pixels.py --preset tiny --data photos --size 64 --patch 8      a folder, or one for each class
    python experiments/pixels.py --preset B/16 --data imagenet/train --test imagenet/val --bfloat16    the paper's
    python experiments/pixels.py --preset B/16 --data imagenet/train --test imagenet/val --bfloat16 --dry-run

Data are those of images.py: folders of images, the files of CIFAR-10 or MNIST, shards. Without --test a tenth of a
folder is held out and not trained on; the paper trains on all of ImageNet's training images. A run that was stopped, or
killed, continues by the same command. Each average ends as ema_THOUSANDS.safetensors, called by its half-life and saved
without the velocity head; generate.py samples from it, evaluate.py judges it at several scales of guidance, which is
chosen at sampling where the data have labels. At the end samples of the first average are judged as by images.py.

The networks and the objective are those of improved MeanFlow, with outputs that are images x,

    u = (z - x) / max(t, 0.05),      v_t = (z_t - x) / max(t, 0.05)

so that targets are bounded as the outputs are. As v_t is slower below t = 0.05 than the path, samples keep up to 2% of
the noise's standard deviation (0.05 / e).

FID of the paper at one evaluation on ImageNet 256 x 256, after 320 epochs: B/16 3.12, L/16 2.52, H/16 2.22. They were
reached with two perceptual terms, in features of networks that do not come with this package (LPIPS, ConvNeXt);
`mfx.PerceptualTerm` takes any, and --perceptual those of EfficientNet-Lite0, in whose features evaluate.py and the end
of this script judge, too. The presets of the paper have not been run.

Sources of every number: One-step Latent-free Image Generation with Pixel Mean Flows, 2026, arXiv 2601.22158, and the
authors' code where it says more. These sources do not say which arrays Muon trains: here they are all matrices except
those of the patches and the positions.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, install_import_hook, Key, PyTree

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import guidance_flags
    import image_judge
    import image_samples
    import image_sources
    import images

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, metrics, run

LITE0_SIDE = 96
"""Of the images that EfficientNet-Lite0 sees."""


@dataclasses.dataclass(frozen=True)
class Config(image_sources.ImageSettings):
    """A run of pixel MeanFlow. Times in [0, 1]; pixels in [-1, 1]."""

    labels: bool = True
    """Use the labels of the data, if there are any. Without labels there is no guidance."""
    flips: bool = True
    """Mirror half of the images, left to right."""
    depth: int = 16
    """Blocks of the network in use."""
    head_depth: int = 8
    """How many of the blocks are those of u alone; v has as many more, in training."""
    width: int = 768
    """Width of the tokens, a multiple of heads."""
    heads: int = 12
    """Attention heads, of a size that is a multiple of 4."""
    patch: int = 16
    """Side of a patch in pixels; divides the image."""
    bottleneck: int = 128
    """Outputs of the first of two linear layers that make tokens of patches."""
    start: str = ""
    """Weights or checkpoints of the same network to start from: the directory of a run, or a .safetensors file with the
    velocity head."""
    epochs: float = run.setting(320.0)
    """Passes over the data; more continue a finished run."""
    batch: int = 1024
    """Images per step; a multiple of the denominator of identity_share."""
    learning_rate: float = 1e-3
    """Learning rate of Muon for matrices, and of Adam with Nesterov momentum for all else, constant."""
    half_lives: tuple[float, ...] = (500.0, 1000.0, 2000.0)
    """Half-life of each parameter average in thousands of images; the first average generates. Early in training a
    half-life is at most 5% of the images seen; with --start, which may bring averages, it is the full one from the
    first step on."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the identity of improved MeanFlow; in (0, 1)."""
    times: tuple[float, float] = (0.8, 0.8)
    """Mean and standard deviation of the logit of both times, drawn apart and sorted."""
    uniform: float = 0.0
    """Share of rows whose times are uniform instead; 0.1 is an option of the paper."""
    smallest_time: float = 0.05
    """Time below which velocities are bounded, in (0, 1)."""
    power: float = 1.0
    """Adaptive weight's power p (Eq. 22 of MeanFlow)."""
    offset: float = 0.01
    """Adaptive weight's offset c."""
    largest_scale: float = 8.0
    """Guidance scales are drawn from 1 to this one, with a density proportional to 1 / omega, intervals around t = 0.5;
    with labels."""
    label_dropout: float = 0.1
    """Share of rows whose label is dropped, in (0, 1 - identity_share]."""
    perceptual: float = 0.0
    """Coefficient of a loss in features of EfficientNet-Lite0 (extra "features"), for rows with t < 0.8; 0 for none."""
    sample_scale: tuple[float, ...] = run.setting((1.0, 2.0))
    """Guidance scales that are judged, of networks with labels; pictures show the last."""
    sample_interval: tuple[float, float] = run.setting((0.0, 1.0))
    """The first and the last time at which these scales hold, in all samples."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, times, losses and averages stay in float32."""
    remat: Literal["none", "products", "full"] = run.setting("none")
    """What the backward pass computes again, to save memory: nothing; all but products with weights and convolutions;
    all but each block's input."""
    samples: int = run.setting(10_000)
    """Images that are judged, at most as many as are held out."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check_images()
        self.check(seed=0, samples=2)
        run.check_sizes(self, batch=1 << 20, depth=1000, width=1 << 14, patch=1 << 10, bottleneck=1 << 14)
        run.check_sizes(self, samples=1 << 20)
        for name in ("learning_rate", "identity_share", "smallest_time"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be > 0 and finite, got {self.epochs}")
        if not self.half_lives or len(set(self.half_lives)) < len(self.half_lives):
            raise ValueError(f"half_lives must be at least one number, each once, got {self.half_lives}")
        if not all(0 < thousands < math.inf for thousands in self.half_lives):
            raise ValueError(f"half_lives must be > 0 and finite, got {self.half_lives}")
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform must lie in [0, 1], got {self.uniform}")
        check_guidance(self, self.labels)
        if not 0 <= self.perceptual < math.inf:
            raise ValueError(f"perceptual must be >= 0 and finite, got {self.perceptual}")
        # What the parts themselves refuse is refused here, where a flag can be named.
        averages(self)
        mfx.check_batch_size(self.batch, objective(self, None).identity_share)
        side = max(self.patch, 1)
        eqx.filter_eval_shape(lambda: make_field(self, (3, side, side), 10, jr.key(0)))  # a real key needs a device


def check_guidance(config: Config, has_labels: bool) -> None:
    if not has_labels:
        names = "largest_scale", "label_dropout", "sample_scale", "sample_interval"
        return images.check_left_out(config, names, "without labels")
    guidance_flags.check_dropout(config.label_dropout, config.identity_share, guided=True)
    guidance_flags.check_scales(config.largest_scale)
    drawn = objective(config, 10).trained.guidance
    assert drawn is not None
    guidance_flags.check_drawn(drawn, config.sample_scale, [config.sample_interval])


def make_field(config: Config, shape: images.Shape, labels: int | None, key: Key[Array, ""]) -> mfx.XPrediction:
    size = mfx.InContextDiTSize(
        config.depth,
        config.width,
        config.heads,
        config.patch,
        config.head_depth,
        bottleneck=config.bottleneck,
        learned_positions=True,
        grid=True,
    )
    network = mfx.InContextDiT(
        shape,
        size,
        labels=labels,
        guidance=labels is not None,
        velocity_head=True,
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
        remat=mfx.nn.REMATS[config.remat],
        key=key,
    )
    return mfx.XPrediction(network, config.smallest_time)


def for_sampling(field: mfx.AbstractField) -> mfx.XPrediction:
    """The network without its velocity head."""
    assert isinstance(field, mfx.XPrediction) and isinstance(field.field, mfx.InContextDiT)
    return mfx.XPrediction(field.field.without_velocity_head(), field.smallest_time)


class Lite0Features(eqx.Module):
    """Features of EfficientNet-Lite0 of one image, in colour or grey, with values in [-1, 1]."""

    network: metrics.EfficientNetLite0

    def __call__(self, image: Float[Array, "channels height width"]) -> Float[Array, " features"]:
        colours = jnp.broadcast_to(image, (3, *image.shape[1:]))
        return self.network((127.5 * colours + 0.5)[None] / 128).pooled[0]  # (pixel - 127) / 128


def perceptual(coefficient: float, parallelism: mfx.Parallelism | None) -> list[mfx.PerceptualTerm]:
    """The loss in features of EfficientNet-Lite0, none if its coefficient is 0."""
    if not coefficient:
        return []
    network = metrics.load_efficientnet_lite0()
    features = Lite0Features(network if parallelism is None else parallelism.replicate(network))
    return [mfx.PerceptualTerm(features, (LITE0_SIDE, LITE0_SIDE), coefficient)]


def objective(config: Config, labels: int | None, terms: Sequence[mfx.PerceptualTerm] = ()) -> mfx.Objective:
    guidance = mfx.DrawnGuidance(mfx.PowerLawScales(largest=config.largest_scale))
    return mfx.Objective(
        mfx.ImprovedMeanFlow(),
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(*config.times), uniform=config.uniform),
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(config.power, config.offset),
        guidance=None if labels is None else guidance,
        label_dropout=None if labels is None else mfx.LabelDropout(config.label_dropout, labels),
        smallest_time=config.smallest_time,
        perceptual=terms,
    )


def averages(config: Config) -> list[mfx.ExponentialAverage]:
    # A ramp makes the parameters of the first step the average, whatever --start has brought.
    rampup = None if config.start else 0.05
    rules = [mfx.HalfLife(1000 * thousands, config.batch, rampup) for thousands in config.half_lives]
    return [mfx.ExponentialAverage(rule) for rule in rules]


def optimizer(config: Config) -> optax.GradientTransformation:
    """Muon, block by block, for matrices; Adam with Nesterov momentum for all else, and for what takes patches and
    positions."""

    def matrices(parameters: PyTree[Any]) -> PyTree[Any]:
        numbers = mfx.nn.muon_dimension_numbers(parameters)

        def others(numbers: Any) -> tuple[Any, ...]:
            return numbers.field.bottleneck, numbers.field.patches, numbers.field.positions

        return eqx.tree_at(others, numbers, (None, None, None))

    return optax.contrib.muon(config.learning_rate, muon_weight_dimension_numbers=matrices)


def make_samplers(config: Config, labels: int | None, class_names: Sequence[str] | None) -> list[image_samples.Sampler]:
    if labels is not None:
        return images.at_scales("pMF", config.sample_scale, config.sample_interval, labels, class_names)
    return [image_samples.Sampler("pMF", mfx.sample, images.EVALUATIONS, images.EVALUATIONS[0])]


def prepare(config: Config, labels: int | None) -> data.InTurn:
    """From bytes to what the network sees."""
    parts = () if labels else (data.WithoutLabel(),)
    return data.InTurn((*parts, data.FromPixels(), data.RandomFlip(0.5 if config.flips else 0.0)))


def main(config: Config) -> None:
    """Train on images, then judge what the network generates in one evaluation."""
    run.require("matplotlib", "safetensors", "sklearn")
    train, test, names = config.open_parts()
    labels = train.labels if config.labels else None
    check_guidance(config, labels is not None)
    if labels is not None and test.labels is None:
        raise ValueError(f"test must have labels as the training images have, got none in {test.name}")
    field_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    step = mfx.TrainStep(
        objective(config, labels, perceptual(config.perceptual, parallelism)),
        optimizer(config),
        averages(config),
        prepare(config, labels),
        accumulation=config.accumulation,
        parallelism=parallelism,
    )
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    samplers = make_samplers(config, labels, names)
    channels, height, width = train.row_shape
    steps = math.ceil(config.epochs * len(train) / config.batch)

    def make_state() -> mfx.TrainState:
        field = make_field(config, (channels, height, width), labels, field_key)
        return mfx.init_state(field, step.optimizer, step.averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        image_samples.save_samples(samplers[-1], for_sampling(run.local(state.averages[0])), path, rows=2)

    with run.opened(config) as directory:
        run.tell(f"{steps:,} steps; {len(train):,} {train.name}, {len(test):,} {test.name}, labels: {labels or 'none'}")
        spaces = image_judge.feature_spaces() if run.is_first() else []
        options = {"steps": steps, "preview": preview, "start": config.start}
        state = run.train(config, step, make_state, stream, directory, **options)
        save_weights(config, directory, state, names, objective(config, labels).trained)
        if run.is_first():
            field, most = for_sampling(run.local(state.averages[0])), 10 if config.test_run else config.samples
            images.finish(samplers, field, spaces, train, test, directory, most=most, test_run=config.test_run)


def save_weights(
    config: Config,
    directory: run.RunDirectory,
    state: mfx.TrainState,
    names: Sequence[str] | None,
    trained: mfx.Trained,
) -> None:
    """Every average as weights, without the velocity head."""
    class_names, steps = tuple(names) if names and config.labels else None, int(state.step)
    for thousands, average, field in zip(config.half_lives, averages(config), state.averages, strict=True):
        assert isinstance(average.decay, mfx.HalfLife)
        notes = checkpoint.Notes(
            pixels=(-1, 1),
            class_names=class_names,
            trained=trained,
            steps=steps,
            decay=float(average.decay(jnp.asarray(steps))),  # of the last step, which a ramp may make smaller
        )
        path = directory.path(f"ema_{thousands:g}.safetensors")
        checkpoint.save_weights(path, for_sampling(field), {"data": list(config.data)}, notes)


def of_size(size: mfx.InContextDiTSize) -> Config:
    """The paper's recipe for a network, on folders of images."""
    sizes = {name: getattr(size, name) for name in ("depth", "head_depth", "width", "heads", "patch", "bottleneck")}
    return Config(size=(256,), **sizes)


PRESETS = {
    "B/16": ("the paper's, 256 x 256 pixels; give --test to train on all of --data; not run yet", of_size(mfx.PMF_B16)),
    "L/16": ("the paper's, 256 x 256 pixels; give --test to train on all of --data; not run yet", of_size(mfx.PMF_L16)),
    "H/16": ("the paper's, 256 x 256 pixels; give --test to train on all of --data; not run yet", of_size(mfx.PMF_H16)),
    "tiny": (
        "a small network; CIFAR-10, or images of your own",
        Config(
            data=("cifar-10-binary.tar.gz",),
            epochs=1.0,
            batch=64,
            depth=3,
            head_depth=1,
            width=96,
            heads=4,
            patch=4,
            bottleneck=32,
            half_lives=(4.0,),
            samples=1000,
            save_every=250,
            preview_every=250,
        ),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
