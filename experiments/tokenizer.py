"""A tokenizer of one's own: a small autoencoder of images, so that fields can learn latents in place of pixels.

    python experiments/tokenizer.py --preset quick                           Fashion-MNIST, 7 to 8 minutes of CPU time
    python experiments/tokenizer.py                                          the same for longer
    python experiments/tokenizer.py --preset quick --data photos --size 64   images as of images.py
    python experiments/tokenizer.py --perceptual 0.1                         and a loss in features of a network

    python experiments/prepare_latents.py --images /usr/share/datasets/fashion-mnist \\
        --vae runs/tokenizer/1a2b3c4d/vae --to data/fashion_latents
    python experiments/imagenet_latents.py --preset quick --data data/fashion_latents \\
        --vae runs/tokenizer/1a2b3c4d/vae --images /usr/share/datasets/fashion-mnist

28 x 28 pixels in grey become 7 x 7 places of 4 channels. The network is that of Stable Diffusion, smaller; the loss is
absolute errors and a small Kullback-Leibler divergence. It is trained on the training images alone. The same command
continues a run that was stopped, or killed.

The run leaves `vae/`, the parameter average in the layout of diffusers, with mean and standard deviation of each
channel of the latents of training images; `reconstructions.png`; and tables of what test images lose, as seen by
image_judge.py. As reconstructions are of these same images, their distances may lie below those of training images.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach, Blattmann, Lorenz, Esser, Ommer, 2022, arXiv
2112.10752.
"""

import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Key, UInt8

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import fashion
    import image_classifier
    import image_judge
    import image_sources
    import pixels

    import mf_eqx as mfx
    from mf_eqx import data, picture, run, vae

FASHION = (fashion.PLACE,)
"""Where Fashion-MNIST lies."""
AT_ONCE = 10
"""Images that are encoded, or decoded, in one call."""
MEASURED, MEASURED_FOR_PREVIEWS = 10_000, 500
"""Training images, at most, of which the statistics of latents are taken."""
PART, SEEN = 1000, 64_000
"""Images of a part of latents, where there are few, and how many latents the training of a field should see."""
COLUMNS = 10
"""Of a picture."""
PERCEIVED = "It was trained by features of EfficientNet-Lite0, so that distances in these say little: read the others."
"""What is told of distances to those who trained with --perceptual."""
PICTURE_SEED = 2**31 - 1
"""Of the noise in all pictures and tables."""


@dataclasses.dataclass(frozen=True)
class Config(image_sources.ImageSettings):
    """A run of a tokenizer. Pixels in [-1, 1]."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels at each resolution, each half of the one before, multiples of groups; three of them make a latent of a
    quarter of the image's sides."""
    blocks: int = 1
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    latent: int = 4
    """Channels of a latent."""
    groups: int = 8
    """Groups of the normalisations."""
    kl: float = 1e-2
    """Weight of the divergence, beta, beside the sum of absolute errors."""
    perceptual: float = 0.0
    """Coefficient of a loss in features of EfficientNet-Lite0 (extra "features"); 0 for none."""
    start: str = ""
    """Directory of a run of the same network to start from."""
    steps: int = 8000
    """Training steps, over which the learning rate falls to 0."""
    batch: int = 16
    """Images per step."""
    learning_rate: float = 2e-3
    """Adam's learning rate after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up, fewer than steps."""
    decay: float = 0.998
    """Decay per step of the parameter average that is kept."""
    flips: bool = False
    """Mirror half of the images, left to right."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, losses and averages stay in float32. The tokenizer is judged in float32, as it
    is used by the other scripts."""
    samples: int = run.setting(10_000)
    """Test images that are judged, at most as many as there are."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check_images()
        self.check(steps=0, warmup=0, seed=0, samples=2, widths=1, blocks=1, latent=1, groups=1)
        run.check_sizes(self, batch=1 << 20, widths=1 << 14, blocks=100, latent=1 << 14, groups=1 << 14)
        run.check_sizes(self, samples=1 << 20)
        if not 1 <= len(self.widths) <= 8:
            raise ValueError(f"widths must be 1 to 8 numbers, got {len(self.widths)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if 0 < self.steps <= self.warmup and not self.test_run:
            raise ValueError(f"warmup must be below the {self.steps} steps, got {self.warmup}")
        for name in ("kl", "perceptual"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        mfx.check_batch_size(self.batch, 0.0)
        mfx.ExponentialAverage(self.decay)
        eqx.filter_eval_shape(lambda: make_tokenizer(self, 3, jr.key(0)))  # a real key needs a device


def make_tokenizer(config: Config, channels: int, key: Key[Array, ""]) -> vae.Autoencoder:
    size = vae.AutoencoderSize(config.widths, config.blocks, config.latent, config.groups, channels)
    return vae.Autoencoder(size, dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32, key=key)


def objective(config: Config, parallelism: mfx.Parallelism | None) -> vae.AutoencoderObjective:
    return vae.AutoencoderObjective(config.kl, *pixels.perceptual(config.perceptual, parallelism))


def optimizer(config: Config) -> optax.GradientTransformation:
    steps = max(config.steps, config.warmup + 1)  # of two steps or none, which a test run may have
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, steps))


def prepare(config: Config) -> data.InTurn:
    """From bytes to what the network sees."""
    return data.InTurn((data.WithoutLabel(), data.FromPixels(), data.RandomFlip(0.5 if config.flips else 0.0)))


def in_float32(config: Config, channels: int, tokenizer: vae.Autoencoder) -> vae.Autoencoder:
    """The tokenizer as prepare_latents.py and all others compute it, whatever the precision of its training."""
    config = dataclasses.replace(config, bfloat16=False)
    skeleton = eqx.filter_eval_shape(lambda: make_tokenizer(config, channels, jr.key(0)))
    return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(tokenizer))


# What is known of a tokenizer


@eqx.filter_jit
def encode(tokenizer: vae.Autoencoder, x: UInt8[Array, "rows channels height width"]) -> vae.Moments:
    return jax.vmap(tokenizer.encode)(x / jnp.float32(127.5) - 1)


@eqx.filter_jit
def decode(
    tokenizer: vae.Autoencoder, latent: Float[Array, "rows latent height width"]
) -> Float[Array, "rows channels _ _"]:
    return jax.vmap(tokenizer.decode)(latent)


class Encoded(NamedTuple):
    """Moments of the posteriors of images."""

    mean: Float[np.ndarray, "images latent height width"]
    std: Float[np.ndarray, "images latent height width"]

    def sampled(self) -> Float[np.ndarray, "images latent height width"]:
        """A latent of each image."""
        eps = np.random.default_rng(PICTURE_SEED).standard_normal(self.mean.shape, np.float32)
        return self.mean + self.std * eps

    def divergence(self) -> float:
        """The mean divergence of a latent in nats."""
        return float(jnp.mean(jax.vmap(lambda *pair: vae.Moments(*pair).divergence())(*map(jnp.asarray, self))))


def encoded(tokenizer: vae.Autoencoder, x: UInt8[np.ndarray, "images channels height width"]) -> Encoded:
    parts = [encode(tokenizer, jnp.asarray(part)) for part in image_sources.in_parts(x, AT_ONCE)]
    mean, std = (
        np.concatenate([np.asarray(getattr(part, name)) for part in parts])[: len(x)] for name in Encoded._fields
    )
    return Encoded(mean, std)


def decoded(
    tokenizer: vae.Autoencoder, latent: Float[np.ndarray, "images latent height width"]
) -> Float[np.ndarray, "images channels _ _"]:
    parts = [decode(tokenizer, jnp.asarray(part)) for part in image_sources.in_parts(latent, AT_ONCE)]
    return np.concatenate([*map(np.asarray, parts)])[: len(latent)]


def statistics(tokenizer: vae.Autoencoder, train: data.AbstractSource, most: int = MEASURED) -> vae.LatentStatistics:
    """Those of the latents of training images."""
    rows = image_sources.spread(len(train), min(len(train), most))
    return vae.LatentStatistics.of(*encoded(tokenizer, train.take(rows).x))


def peak_signal_to_noise(
    x: UInt8[np.ndarray, "images channels height width"], found: Float[np.ndarray, "images channels height width"]
) -> float:
    """The mean over images of 10 log10(255^2 / mean squared error) in dB, of pixels rounded to bytes."""
    errors = (np.rint(127.5 * (found.clip(-1, 1) + 1)) - x.astype(np.float64)) ** 2
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors.mean(axis=(1, 2, 3)), 1e-10))))


# Pictures and tables


def save_reconstructions(
    tokenizer: vae.Autoencoder, of_latents: vae.LatentStatistics, test: data.AbstractSource, path: Path
) -> None:
    """Test images, what their mean latents and latents that are drawn from their posteriors become, and what latents
    become that are drawn without any image, each number on its own, with the statistics of all."""
    x = test.take(image_sources.spread(len(test), min(len(test), COLUMNS))).x
    found = encoded(tokenizer, x)
    eps = np.random.default_rng(PICTURE_SEED).standard_normal(found.mean.shape, np.float32)
    noise = np.asarray(jax.vmap(of_latents.restore)(jnp.asarray(eps)))
    rows = {"test images": x / 127.5 - 1, "mean latents": decoded(tokenizer, found.mean)}
    rows |= {"drawn latents": decoded(tokenizer, found.sampled()), "noise": decoded(tokenizer, noise)}
    picture.save_image_grid(path, np.stack([*rows.values()]), -1, 1, row_labels=[*rows])


class Lost(NamedTuple):
    """What comes back of test images: of which latents, the absolute error of pixels in [0, 1], and the signal to noise
    ratio in dB."""

    what: str
    absolute_error: float
    psnr: float


def judge(
    tokenizer: vae.Autoencoder,
    train: data.AbstractSource,
    test: data.AbstractSource,
    classifier: image_classifier.Classifier | None,
    count: int,
) -> tuple[list[Lost], float, list[image_judge.Result]]:
    """What is lost, the divergence, and how the judge of samples sees what comes back."""
    judging = image_judge.Judge(image_judge.feature_spaces(), classifier, train, test, count)
    x, lost = judging.real.x, []
    found, results = encoded(tokenizer, x), judging.real_images()
    for what, latent in {"mean latents": found.mean, "drawn latents": found.sampled()}.items():
        made = decoded(tokenizer, latent)
        error = float(np.abs(made.clip(-1, 1) - (x / 127.5 - 1)).mean() / 2)
        lost.append(Lost(what, error, peak_signal_to_noise(x, made)))
        results += [result._replace(evaluations=None) for result in judging.samples(what, [(0, made)])]
    return lost, found.divergence(), results


def report(
    lost: list[Lost],
    divergence: float,
    of_latents: vae.LatentStatistics,
    results: list[image_judge.Result],
    names: list[str] | None,
    chance: float,
) -> str:
    """All numbers as text."""
    scales = [(channel, *pair) for channel, pair in enumerate(zip(of_latents.mean, of_latents.std, strict=True))]
    return "\n\n".join(
        [
            run.table(lost, ("test images by way of", "absolute error", "PSNR, dB")),
            f"Latents of training images by channel; divergence of a latent of a test image: {divergence:.4g} nats.",
            run.table(scales, ("channel", "mean", "standard deviation")),
            image_judge.report(results, names, chance),
        ]
    )


def finish(
    config: Config,
    tokenizer: vae.Autoencoder,
    of_latents: vae.LatentStatistics,
    images: image_sources.Parts,
    directory: run.RunDirectory,
) -> None:
    """Pictures and tables."""
    began, (train, test, names) = time.perf_counter(), images
    if records := directory.records():
        picture.save_curves(directory.path("curves.png"), records)
    save_reconstructions(tokenizer, of_latents, test, directory.path("reconstructions.png"))
    classifier, count = None, min(10 if config.test_run else config.samples, len(train), len(test))
    if train.labels is not None and test.labels is not None:
        steps = 2 if config.test_run else image_classifier.STEPS
        classifier = image_classifier.trained(train, directory.root.parent, steps=steps)
    lost, divergence, results = judge(tokenizer, train, test, classifier, count)
    labels = [*map(str, names or range(train.labels or 0))] if classifier is not None else None
    text = report(lost, divergence, of_latents, results, labels, len(train) / (len(train) + len(test)))
    seen = f" {PERCEIVED}" if config.perceptual else ""
    text = f"{count:,} images each.{seen}\n\n{text}"
    rows: list[Any] = [*(row._asdict() for row in (*lost, *results)), {"kl": divergence, **of_latents.as_json()}]
    directory.save_results(text, rows)
    print(f"{text}\n\nJudged in {time.perf_counter() - began:.0f} s. For latents of the training images, and a field:")
    encoding, training = next_commands(config, directory, len(train))
    without = [name for name, part in (("training", train), ("test", test)) if part.labels is None]
    print(encoding, f"(a field needs labels, which the {without[0]} images lack)" if without else training, sep="\n")


def next_commands(config: Config, directory: run.RunDirectory, rows: int) -> list[str]:
    """What encodes the images, so many, that the tokenizer was trained on, and what trains a field of their latents."""
    latents = f"data/latents_{directory.root.name}"
    common = ["--images", *config.data, "--vae", str(directory.root / "vae")]
    encoding, training = [*common, "--to", latents], ["--preset", "quick", "--data", latents, *common]
    if rows < 60_000:  # parts of few images would be filled up; the preset counts on those of Fashion-MNIST
        encoding += ["--parts", str(1 + rows // PART)]
        training += ["--epochs", f"{SEEN / rows:.4g}", "--warmup-epochs", f"{SEEN / 20 / rows:.4g}"]
    if config.size:
        encoding += ["--size", *map(str, config.size)]
    if config.grey:
        encoding.append("--grey")
    if config.test:
        training += ["--test", *config.test]
    elif not image_sources.has_test_images(Path(config.data[0])):
        encoding += ["--holdout", str(config.holdout)]
    scripts = {"prepare_latents.py": encoding, "imagenet_latents.py": training}
    return [
        shlex.join([sys.executable, str(Path(__file__).with_name(name)), *parts]) for name, parts in scripts.items()
    ]


def main(config: Config) -> None:
    """Train a tokenizer on images, then say what they lose."""
    run.require("matplotlib", "safetensors", "sklearn")
    if config.data == FASHION:
        fashion.check_files(config.data)
    images = config.open_parts()
    train, test, _ = images
    network_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    step = mfx.TrainStep(
        objective(config, parallelism),
        optimizer(config),
        [mfx.ExponentialAverage(config.decay)],
        prepare(config),
        accumulation=config.accumulation,
        parallelism=parallelism,
    )
    stream = data.Stream(train, config.batch, seed=config.seed, parallelism=parallelism)
    channels, height, width = train.row_shape
    if height % (factor := 2 ** (len(config.widths) - 1)) or width % factor:
        raise ValueError(
            f"widths must be {len(config.widths)} numbers for images with sides that are multiples of "
            f"{factor}, got {height} x {width} pixels in {train.name}: give fewer widths, or another --size"
        )

    def make_state() -> mfx.TrainState:
        tokenizer = make_tokenizer(config, channels, network_key)
        return mfx.init_state(tokenizer, step.optimizer, step.averages, step.objective, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        tokenizer = run.local(state.averages[0])
        save_reconstructions(tokenizer, statistics(tokenizer, train, MEASURED_FOR_PREVIEWS), test, path)

    with run.opened(config) as directory:
        run.tell(f"{len(train):,} {train.name}, {len(test):,} {test.name}")
        shown = "loss", "absolute_error", "kl"
        options: dict[str, Any] = {"preview": preview, "shown": shown, "start": config.start}
        state = run.train(config, step, make_state, stream, directory, steps=config.steps, **options)
        tokenizer = in_float32(config, channels, run.local(state.averages[0]))
        of_latents = statistics(tokenizer, train)
        vae.save_autoencoder(directory.path("vae"), tokenizer, of_latents)
        if run.is_first():
            finish(config, tokenizer, of_latents, images, directory)


PRESETS = {
    "default": ("Fashion-MNIST, or other small images: 8,000 steps; not run yet", Config(data=FASHION)),
    "quick": (
        "a smaller network, 2,000 steps: 7 to 8 minutes of CPU time",
        Config(
            data=FASHION, widths=(16, 32, 32), steps=2000, decay=0.99, samples=2000, save_every=500, preview_every=500
        ),
    ),
    "gpu": (
        "a large network with a loss in features, for a GPU; not run yet",
        Config(
            data=FASHION,
            widths=(64, 128, 128),
            blocks=2,
            steps=20_000,
            batch=128,
            learning_rate=5e-4,
            warmup=1000,
            decay=0.999,
            perceptual=0.1,
            bfloat16=True,
        ),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
