"""ImageNet 256 x 256 in one evaluation: the paper's latent DiTs, trained from scratch by guided MeanFlow, and the
in-context networks of improved MeanFlow, whose guidance is chosen at sampling.

    python experiments/prepare_latents.py --images imagenet/train --vae sd-vae-ft-mse --to data/imagenet256
    python experiments/imagenet_latents.py --preset XL/2 --data data/imagenet256 --bfloat16
    python experiments/imagenet_latents.py --preset B/4 --data data/imagenet256          the ablation's network
    python experiments/imagenet_latents.py --preset iMF-B/2 --data data/imagenet256 --bfloat16    improved MeanFlow
    python experiments/imagenet_latents.py --preset XL/2 --start sit.safetensors         from SiT (import_weights.py)
    python experiments/imagenet_latents.py --preset XL/2 --bfloat16 --remat products --dry-run    what it takes
    python experiments/imagenet_latents.py --preset quick --data data/fashion_latents \\
        --vae runs/tokenizer/1a2b3c4d/vae --images /usr/share/datasets/fashion-mnist      by a tokenizer of one's own

A run that was stopped, or killed, continues by the same command, on any number of devices and processes that divides
the batch. The average ends as .safetensors beside the checkpoints; generate.py samples from it, evaluate.py judges it.
With --vae the previews are images, else there are none; with --images, too, samples are held against test images at the
end, as by images.py. Weights of improved MeanFlow are saved without the velocity head, which sampling does not use; to
continue training, --start takes the directory of the run. The paper chooses scale and interval of guidance after
training, as `evaluate.py --guidance-scale 4 6 8 --guidance-interval 0.4 0.65 0.4 0.6` does. Previews use the scale and
interval of the paper's tables, except those of iMF-M/2 and iMF-L/2: the paper samples these at scale 10.5, which is
above every scale of the training, so their previews use 8.

The paper's FID at one evaluation (50,000 samples): B/4 without guidance after 80 epochs 61.06; B/2 6.17, M/2 5.01, L/2
3.84, XL/2 3.43 after 240 epochs; XL/2+ after 1000 epochs with two evaluations 2.20. That of improved MeanFlow: iMF-B/2
3.39, iMF-M/2 2.27, iMF-L/2 1.86, iMF-XL/2 1.72, with two evaluations 1.54. RESULTS.md beside this file says what was
run here.

Sources of every number: the MeanFlow paper (arXiv 2505.13447), Tab. 4 and App. A; the improved MeanFlow paper (Improved
Mean Flows: On the Challenges of Fastforward Generative Models, Geng et al., 2025, arXiv 2512.02012); and the code of
their authors where it says more.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    import image_judge
    import image_samples
    import image_sources
    import images
    import prepare_latents
    import saved

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, picture, run, vae

DECODED_AT_ONCE = 8
"""Latents in one call: those of ImageNet take 0.2 GB each."""
PREVIEW_SEED = 2**31 - 1
"""Of the noise of all pictures."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A run on latents. Times in [0, 1]; latents of about unit variance."""

    data: str = "data/imagenet256"
    """Folder of latents by prepare_latents.py."""
    vae: str = run.setting("")
    """Weights of the tokenizer, for pictures: a folder as diffusers has it, a .safetensors file, or "hub" to download
    the paper's."""
    images: tuple[str, ...] = run.setting(())
    """The images that the latents in data were made of, given as to prepare_latents.py: then samples are judged at the
    end. Needs vae."""
    test: tuple[str, ...] = run.setting(())
    """With images: test images to hold samples against, given like the data of images.py; by default those of CIFAR-10
    or MNIST, or what `prepare_latents.py --holdout` left out."""
    samples: int = run.setting(10_000)
    """With images: samples that are judged, at most as many as there are test images."""
    start: str = ""
    """Weights or checkpoints of the same network to start from: a .safetensors file by import_weights.py or of another
    run, or that run's directory."""
    epochs: float = run.setting(240.0)
    """Passes over the data; more continue a finished run."""
    batch: int = 256
    """Latents per step; a multiple of the denominator of identity_share."""
    depth: int = 12
    """Blocks of the DiT."""
    width: int = 768
    """Width of the tokens, a multiple of heads and of 4."""
    heads: int = 12
    """Attention heads."""
    patch: int = 2
    """Side of a patch in places of the latent."""
    learning_rate: float = 1e-4
    """Adam's learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    warmup_epochs: float = 0.0
    """Passes over the data in which the learning rate rises from 0."""
    decay: float = 0.9999
    """Decay per step of the parameter average that generates."""
    identity_share: float = 0.25
    """Share of rows with r < t, which carry the MeanFlow identity; in [0, 1]. 0 is Flow Matching."""
    times: tuple[float, float] = (-0.4, 1.0)
    """Mean and standard deviation of the logit of both times, drawn apart and sorted."""
    power: float = 1.0
    """Adaptive weight's power p (Eq. 22)."""
    offset: float = 0.01
    """Adaptive weight's offset c (Eq. 22)."""
    scale: float = 1.0
    """Guidance scale omega (Eq. 21). With mix 0, 1 means no guidance."""
    mix: float = 0.0
    """Guidance mix kappa (Eq. 21), in [0, 1); the effective scale is omega / (1 - kappa)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Interval of t in which guidance applies, closed at both ends."""
    label_dropout: float = 0.1
    """Share of rows whose label is dropped, in [0, 1 - identity_share], or in [0, 1] if identity_share is 1."""
    improved: bool = False
    """Improved MeanFlow: a network that gets its condition as tokens and predicts v beside u, which is the tangent; and
    scales and intervals of guidance that are drawn for each row and given to the network, in place of scale, mix and
    interval."""
    head_depth: int = 8
    """With improved: how many of the blocks are those of u alone; v has as many more, in training."""
    largest_scale: float = 8.0
    """With improved: guidance scales are drawn from 1 to this one, intervals around t = 0.5."""
    scale_power: float = 1.0
    """With improved: the density of the scales is proportional to omega^-scale_power."""
    sample_scale: float = run.setting(1.0)
    """With improved: the guidance scale of pictures and of judged samples."""
    sample_interval: tuple[float, float] = run.setting((0.0, 1.0))
    """With improved: the interval of t in which sample_scale applies, closed at both ends."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, times, losses and averages stay in float32."""
    cudnn: bool = run.setting(False)
    """Attention by cuDNN where no JVP passes; needs an NVIDIA GPU and bfloat16."""
    remat: Literal["none", "products", "full"] = run.setting("none")
    """What the backward pass computes again, to save memory: nothing; all but products with weights and convolutions;
    all but each block's input."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(samples=2)
        run.check_sizes(self, batch=1 << 20, depth=1000, width=1 << 14, patch=1 << 10, samples=1 << 20)
        if self.images and not self.vae:
            raise ValueError(f"images must be left out without vae, which decodes samples, got {' '.join(self.images)}")
        if self.test and not self.images:
            raise ValueError(f"test must be left out without images, got {' '.join(self.test)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be > 0 and finite, got {self.epochs}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        guided_at_all = guided(self) or self.improved
        guidance_flags.check_dropout(self.label_dropout, self.identity_share, guided=guided_at_all)
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs must be >= 0 and finite, got {self.warmup_epochs}")
        check_improved(self)
        if self.cudnn and not self.bfloat16:
            raise ValueError("bfloat16 must be given with cudnn, got float32")
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.check_batch_size(self.batch, objective(self, 1000).identity_share)
        mfx.ExponentialAverage(self.decay)
        side = 4 * max(self.patch, 1)
        eqx.filter_eval_shape(lambda: network_of(self, (4, side, side), 10, jr.key(0)))  # a real key needs a device


def check_improved(config: Config) -> None:
    """Refuses flags of improved MeanFlow without it, and those that it has no use for."""
    if not config.improved:
        for name in ("head_depth", "largest_scale", "scale_power", "sample_scale", "sample_interval"):
            if (found := getattr(config, name)) != getattr(Config, name):
                raise ValueError(f"{name} must be left out without improved, got {found}")
        if not guided(config) and config.interval != (0, 1):
            raise ValueError(f"interval must be left out without guidance, got {config.interval}")
        return
    if guided(config):
        found = config.scale if config.scale != 1 else f"mix = {config.mix}"
        raise ValueError(f"scale must be 1, and mix 0, with improved, which draws scales; got {found}")
    if config.interval != (0, 1):
        raise ValueError(f"interval must be 0 1 with improved, which draws intervals; got {config.interval}")
    if config.identity_share in (0, 1):
        raise ValueError(f"identity_share must lie between 0 and 1 with improved, got {config.identity_share}")
    guidance_flags.check_scales(config.largest_scale, config.scale_power)
    drawn = objective(config, 1000).trained.guidance
    assert drawn is not None
    guidance_flags.check_drawn(drawn, [config.sample_scale], [config.sample_interval])


def guided(config: Config) -> bool:
    return (config.scale, config.mix) != (1, 0)


def guidance(config: Config) -> mfx.AbstractGuidance | None:
    if config.improved:
        return mfx.DrawnGuidance(mfx.PowerLawScales(config.scale_power, 1.0, config.largest_scale))
    return mfx.Guidance(config.scale, config.mix, config.interval) if guided(config) else None


def identity(config: Config) -> mfx.AbstractIdentity | None:
    if config.improved:
        return mfx.ImprovedMeanFlow()
    return mfx.MeanFlow() if config.identity_share else None


def objective(config: Config, labels: int) -> mfx.Objective:
    times = mfx.LogitNormalTimes(*config.times)
    return mfx.Objective(
        identity(config),
        time_pairs=mfx.TimePairs(times),
        boundary_times=None if config.identity_share else times,  # else the larger time of a pair
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(config.power, config.offset),
        guidance=guidance(config),
        label_dropout=mfx.LabelDropout(config.label_dropout, labels),
    )


def make_field(config: Config, source: data.AbstractSource, key: Key[Array, ""]) -> mfx.DiT | mfx.InContextDiT:
    channels, height, width = source.row_shape
    return network_of(config, (channels // 2, height, width), source.labels, key)


def network_of(
    config: Config, shape: tuple[int, int, int], labels: int | None, key: Key[Array, ""]
) -> mfx.DiT | mfx.InContextDiT:
    sizes = config.depth, config.width, config.heads, config.patch
    how: dict[str, Any] = {
        "labels": labels,
        "dtype": jnp.bfloat16 if config.bfloat16 else jnp.float32,
        "attention": mfx.nn.CudnnAttention() if config.cudnn else mfx.nn.XLAAttention(),
        "remat": mfx.nn.REMATS[config.remat],
        "key": key,
    }
    if not config.improved:
        return mfx.DiT(shape, mfx.DiTSize(*sizes), **how)
    size = mfx.InContextDiTSize(*sizes, head_depth=config.head_depth)
    return mfx.InContextDiT(shape, size, guidance=True, velocity_head=True, **how)


def for_sampling(field: mfx.AbstractField) -> mfx.DiT | mfx.InContextDiT:
    """The network without what sampling does not use."""
    assert isinstance(field, mfx.DiT | mfx.InContextDiT)
    return field.without_velocity_head() if isinstance(field, mfx.InContextDiT) else field


def optimizer(config: Config, rows: int) -> optax.GradientTransformation:
    """Adam, for a data set of so many rows."""
    if warmup := round(config.warmup_epochs * rows / config.batch):
        return optax.adam(optax.linear_schedule(0.0, config.learning_rate, warmup), *config.betas)
    return optax.adam(config.learning_rate, *config.betas)


def open_source(config: Config) -> data.AbstractSource:
    """The latents."""
    source = prepare_latents.open_latents(config.data)
    if source.labels is None:
        raise ValueError(f"data must have labels, a folder of images for each class, got none in {config.data}")
    if config.batch > len(source):
        raise ValueError(f"batch must be at most the {len(source)} latents in {config.data}, got {config.batch}")
    return source


class Decoder(NamedTuple):
    """What turns latents into images: the tokenizer of the data, and the statistics that they were standardised by."""

    tokenizer: vae.Autoencoder
    statistics: vae.LatentStatistics

    def __call__(self, z: Float[Array, "rows latent height width"]) -> Float[Array, "rows colours _ _"]:
        parts = (z[start : start + DECODED_AT_ONCE] for start in range(0, len(z), DECODED_AT_ONCE))
        return jnp.concatenate([saved.decode(self.tokenizer, self.statistics, part) for part in parts])


def open_decoder(config: Config, wanted: checkpoint.Tokenizer) -> Decoder | None:
    """What turns latents into pictures, if it is given: that of the data."""
    if not config.vae:
        return None
    tokenizer = prepare_latents.open_tokenizer(config.vae, wanted.size)
    if (found := tokenizer.digest()) != wanted.digest:
        raise ValueError(f"vae must hold the tokenizer of {config.data}, {wanted.digest:.16}, got {found[:16]}")
    return Decoder(tokenizer, wanted.statistics)


@eqx.filter_jit
def generate(
    sampled: mfx.AbstractField, network: mfx.DiT | mfx.InContextDiT, decoder: Decoder, number: int, euler_steps: int = 0
) -> Float[Array, "rows colours height width"]:
    """Images of evenly spaced labels, from the noise of all pictures, in one evaluation each, or in Euler steps for
    Flow Matching. `sampled` is the network, or the network at a scale of guidance."""
    eps = jr.normal(jr.key(PREVIEW_SEED), (number, *network.data_shape))
    label = jnp.arange(number) * network.null_label // number

    def one(row: tuple[Array, Array]) -> Array:
        if euler_steps:
            x = mfx.sample_euler(sampled, *row, times=mfx.uniform_times(euler_steps))
        else:
            x = mfx.sample(sampled, *row)
        return decoder(x[None])[0]

    return jax.lax.map(one, (eps, label), batch_size=min(number, DECODED_AT_ONCE))


def save_samples(config: Config, field: mfx.AbstractField, decoder: Decoder, path: Path) -> None:
    """A square of sixteen generated images."""
    network = sampled = for_sampling(field)
    if config.improved:
        sampled = mfx.WithGuidance(network, config.sample_scale, config.sample_interval)
    euler_steps = 0 if config.identity_share else images.EULER_STEPS[-1]
    x = np.asarray(generate(sampled, network, decoder, 16, euler_steps))
    picture.save_image_grid(path, x.reshape(4, 4, *x.shape[1:]), -1, 1)


def open_images(
    config: Config, latents: data.AbstractSource, notes: prepare_latents.LatentNotes, tokenizer: vae.Autoencoder
) -> image_sources.Parts:
    """The images of which the latents are, and test images."""
    if not (config.test or notes.holdout or image_sources.has_test_images(Path(config.images[0]))):
        rule = f"{config.images[0]} has no test images of its own and {config.data} was made without --holdout"
        raise ValueError(f"test must be given, as {rule}, got none")
    how: dict[str, Any] = {"size": notes.size, "holdout": notes.holdout, "grey": notes.grey}
    parts = image_sources.open_parts(config.images, config.test, **how)
    train, wanted = parts.train, (notes.rows, *notes.size, notes.labels)
    if (len(train), *train.row_shape[1:], train.labels) != wanted or parts.test.labels is None:
        rule = "be the {:,} of {}, {} x {} pixels, with {} labels, and test images with labels"
        found = f"{len(train):,} of shape {train.row_shape} with {train.labels}"
        raise ValueError(f"images must {rule.format(notes.rows, config.data, *wanted[1:])}, got {found}")
    if not are_latents(latents, train, tokenizer):
        found = " ".join(config.images)
        raise ValueError(f"images must be those that {config.data} was made of, got other ones in {found}")
    return parts


def are_latents(latents: data.AbstractSource, images: data.AbstractSource, tokenizer: vae.Autoencoder) -> bool:
    """Whether a few of the latents are what the tokenizer makes of the same images. Half precision moves a mean by
    about a hundredth of its size, other images by about its size."""
    rows = image_sources.spread(len(images), min(len(images), 8))
    x, stored = images.take(rows), latents.take(rows)
    if not np.array_equal(x.label, stored.label):  # pyright: ignore[reportArgumentType]
        return False
    half = len(stored.x[0]) // 2
    wanted = stored.x[:, :half].astype(np.float32)
    found = np.asarray(prepare_latents.encode(tokenizer, jnp.asarray(x.x)))[:, :half].astype(np.float32)
    return bool(np.abs(found - wanted).mean() < 0.1 * np.abs(wanted - wanted.mean()).mean())


def make_sampler(config: Config, real: image_sources.Parts, decoder: Decoder) -> image_samples.Sampler:
    """How judged images are made."""
    how: dict[str, Any] = {"labels": real.train.labels, "class_names": real.class_names, "decode": decoder}
    if config.improved:
        how["guidance"] = config.sample_scale, config.sample_interval
    if not config.identity_share:
        steps = images.EULER_STEPS
        return image_samples.Sampler("Flow Matching on latents", mfx.sample_euler, steps, steps[-1], **how)
    name = "improved MeanFlow on latents" if config.improved else "MeanFlow on latents"
    return image_samples.Sampler(name, mfx.sample, images.EVALUATIONS, images.EVALUATIONS[0], **how)


def main(config: Config) -> None:
    """Train on the latents of ImageNet, or of any folder of images, and save what was learnt."""
    run.require("matplotlib", "safetensors")
    if config.images:
        run.require("sklearn")
    source = open_source(config)
    latents = prepare_latents.read_notes(config.data)
    decoder = open_decoder(config, latents.of_tokenizer())
    real = open_images(config, source, latents, decoder.tokenizer) if config.images and decoder else None
    field_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    step = mfx.TrainStep(
        objective(config, source.labels or 0),
        optimizer(config, len(source)),
        [mfx.ExponentialAverage(config.decay)],
        data.SamplePosterior(latents.of_tokenizer().statistics),
        accumulation=config.accumulation,
        parallelism=parallelism,
    )
    stream = data.Stream(source, config.batch, seed=config.seed, parallelism=parallelism)
    steps = math.ceil(config.epochs * len(source) / config.batch)

    def make_state() -> mfx.TrainState:
        return mfx.init_state(make_field(config, source, field_key), step.optimizer, step.averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        assert decoder is not None
        save_samples(config, run.local(state.averages[0]), decoder, path)

    with run.opened(config) as directory:
        scale = f"effective guidance scale {mfx.Guidance(config.scale, config.mix).effective_scale:g}"
        found = f"guidance scales from 1 to {config.largest_scale:g}" if config.improved else scale
        run.tell(f"{steps:,} steps, {found}")
        spaces = image_judge.feature_spaces() if real and run.is_first() else []
        shown = preview if decoder is not None else None
        state = run.train(config, step, make_state, stream, directory, steps=steps, preview=shown, start=config.start)
        save(config, directory, state, source, decoder)
        field = run.local(for_sampling(state.averages[0]))
        if real and decoder and run.is_first():
            how: dict[str, Any] = {"most": 10 if config.test_run else config.samples, "test_run": config.test_run}
            samplers = [make_sampler(config, real, decoder)]
            images.finish(samplers, field, spaces, real.train, real.test, directory, **how)
        run.tell(f"the average is in {directory.root}")


def save(
    config: Config,
    directory: run.RunDirectory,
    state: mfx.TrainState,
    source: data.AbstractSource,
    decoder: Decoder | None,
) -> None:
    """The average as weights, and pictures of it."""
    latents = prepare_latents.read_notes(config.data)
    notes = checkpoint.Notes(
        pixels=(-1, 1),
        tokenizer=latents.of_tokenizer(),
        class_names=tuple(latents.class_names) if latents.class_names else None,
        trained=objective(config, source.labels or 0).trained,
        steps=int(state.step),
        decay=config.decay,
    )
    learnt: dict[str, Any] = {"data": config.data}
    if not config.improved:
        learnt["guidance"] = [config.scale, config.mix, list(config.interval)]
    average = for_sampling(state.averages[0])
    checkpoint.save_weights(directory.path(f"ema_{config.decay}.safetensors"), average, learnt, notes)
    field = run.local(average)
    if run.is_first():
        if decoder is not None:
            save_samples(config, field, decoder, directory.path("samples.png"))
        if records := directory.records():
            picture.save_curves(directory.path("curves.png"), records)


def of_size(size: mfx.DiTSize, **changes: Any) -> Config:
    return Config(depth=size.depth, width=size.width, heads=size.heads, patch=size.patch, **changes)


def improved(size: mfx.InContextDiTSize, sample_interval: tuple[float, float] = (0.4, 0.6), **changes: Any) -> Config:
    """The recipe of improved MeanFlow for a network, with the interval of its samples in the paper."""
    common: dict[str, Any] = {"batch": 1024, "epochs": 640.0, "warmup_epochs": 10.0, "identity_share": 0.5}
    sizes = {name: getattr(size, name) for name in ("depth", "width", "heads", "patch", "head_depth")}
    return Config(**common | sizes | changes, improved=True, sample_scale=8.0, sample_interval=sample_interval)


TWO: dict[str, Any] = {"scale": 1.0, "mix": 0.5}
"""Effective guidance scale 2."""
TWO_AND_A_HALF: dict[str, Any] = {"scale": 0.2, "mix": 0.92}
"""Effective guidance scale 2.5."""

QUICK = Config(
    data="data/fashion_latents",
    epochs=64 / 60,
    batch=16,
    depth=4,
    width=96,
    heads=4,
    patch=1,
    learning_rate=2e-3,
    betas=(0.9, 0.999),
    warmup_epochs=32 / 600,
    decay=0.997,
    identity_share=0.5,
    power=0.5,
    samples=2000,
    save_every=1000,
    preview_every=1000,
)
"""The quick preset of images.py on latents: the same network. Its patches are single places of a latent of 7 x 7; those
of images.py are squares of 4 x 4 pixels of 28 x 28."""

PRESETS = {
    "B/4": ("the network of the paper's ablations, 80 epochs without guidance", of_size(mfx.DIT_B4, epochs=80.0)),
    "B/2": ("Tab. 4; effective guidance scale 2", of_size(mfx.DIT_B2, **TWO)),
    "M/2": ("Tab. 4; effective guidance scale 2", of_size(mfx.DIT_M2, **TWO)),
    "L/2": ("Tab. 4; effective guidance scale 2.5", of_size(mfx.DIT_L2, interval=(0.0, 0.8), **TWO_AND_A_HALF)),
    "XL/2": ("Tab. 4; effective guidance scale 2.5", of_size(mfx.DIT_XL2, interval=(0.0, 0.75), **TWO_AND_A_HALF)),
    "XL/2+": ("Tab. 4; 1000 epochs", of_size(mfx.DIT_XL2, epochs=1000.0, interval=(0.3, 0.8), **TWO)),
    "iMF-B/2": ("improved MeanFlow; sampled at guidance 8 in [0.4, 0.65]", improved(mfx.IMF_B2, (0.4, 0.65))),
    "iMF-M/2": ("improved MeanFlow; sampled at guidance 8 in [0.4, 0.6] (the paper: at 10.5)", improved(mfx.IMF_M2)),
    "iMF-L/2": ("improved MeanFlow; sampled at guidance 8 in [0.4, 0.6] (the paper: at 10.5)", improved(mfx.IMF_L2)),
    "iMF-XL/2": ("improved MeanFlow; sampled at guidance 8 in [0.42, 0.62]", improved(mfx.IMF_XL2, (0.42, 0.62))),
    "iMF-tiny": (
        "a small network of improved MeanFlow, on latents of your own; with --patch 1 on those of tokenizer.py",
        dataclasses.replace(
            improved(mfx.InContextDiTSize(3, 64, 4, 2, head_depth=1)),
            epochs=20.0,
            batch=32,
            warmup_epochs=1.0,
            learning_rate=1e-3,
            decay=0.99,
            sample_scale=2.0,
            sample_interval=(0.0, 1.0),
            save_every=200,
        ),
    ),
    "quick": ("as the quick preset of images.py: 4,000 steps on latents of Fashion-MNIST", QUICK),
    "tiny": (
        "a small network, on latents of your own",
        Config(
            epochs=20.0, batch=32, depth=3, width=64, heads=4, learning_rate=1e-3, decay=0.99, save_every=200, **TWO
        ),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
