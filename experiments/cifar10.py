"""CIFAR-10 in one evaluation: the paper's U-Net, trained from scratch by MeanFlow without labels.

    python experiments/cifar10.py --data cifar-10-binary.tar.gz                   the paper's experiment
    python experiments/cifar10.py --preset v1 --data cifar-10-batches-bin         the authors' later times, better
    python experiments/cifar10.py --preset tiny                                   a small network on drawn shapes
    python experiments/cifar10.py --preset tiny --data cifar-10-binary.tar.gz     the same on the real images
    python experiments/cifar10.py --bfloat16 --dry-run                            what it takes, before it is started

A run that was stopped, or killed, continues by the same command. Data are a folder or an archive of CIFAR-10, a folder
of shards by prepare_data.py (faster to start) or of other images, or "shapes". The averages end as .safetensors beside
the checkpoints; generate.py samples from them, evaluate.py judges them.

The paper's numbers: FID 2.92 at one evaluation, after 800,000 steps of 1024 images. RESULTS.md beside this file says
what was run here.

Sources of every number: the MeanFlow paper (arXiv 2505.13447), App. A, and the authors' code where it says more.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, install_import_hook, Key, UInt8

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import image_sources

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, picture, run

SHAPES = "shapes"
"""The name of the data that are drawn."""
PREVIEW_SEED = 2**31 - 1
"""Of the noise of all pictures."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A CIFAR-10 run. Times in [0, 1]; pixels in [-1, 1]."""

    data: str = "cifar-10-binary.tar.gz"
    """Images of 3 x 32 x 32 bytes: a folder or an archive of CIFAR-10, a folder of shards, a folder of image files,
    which are resized and cropped, or "shapes" for drawn ones. Labels, if there are any, are not used."""
    start: str = ""
    """Weights or checkpoints of the same network to start from: a .safetensors file, or the directory of a run."""
    steps: int = run.setting(800_000)
    """Training steps (the authors' code: 768,000); more continue a finished run."""
    batch: int = 1024
    """Images per step; a multiple of the denominator of identity_share."""
    width: int = 128
    """Channels of the U-Net, times one of multipliers per resolution; a multiple of 4."""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Factors of the width at 32 x 32 pixels, 16 x 16, ..."""
    blocks: int = 4
    """Residual blocks per resolution going down; one more going up."""
    attention: tuple[int, ...] = (16,)
    """Resolutions with attention, beside the middle."""
    dropout: float = 0.2
    """Dropout rate within residual blocks; active under the JVP too."""
    learning_rate: float = 6e-4
    """Adam's learning rate, constant after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    warmup: int = 10_000
    """Steps of linear warm-up from 1e-8 (the authors' code: 9,600)."""
    decays: tuple[float, ...] = (0.99995, 0.9999, 0.9996)
    """Decay per step of each parameter average; the first one generates, and is the paper's."""
    average_every: int = 16
    """Steps between updates of the averages, which then decay by as many powers."""
    identity_share: float = 0.75
    """Share of rows with r < t, which carry the MeanFlow identity; in [0, 1]. 0 is Flow Matching."""
    times: tuple[float, float] = (-2.0, 2.0)
    """Mean and standard deviation of the logit of both times, drawn apart and sorted; of t alone with r_times."""
    r_times: tuple[float, float] | None = None
    """Mean and standard deviation of r's own logit, followed by r = min(r, t); None for one distribution of both."""
    power: float = 0.75
    """Adaptive weight's power p (Eq. 22)."""
    offset: float = 1e-3
    """Adaptive weight's offset c (Eq. 22)."""
    augmentation: float = 0.12
    """Probability of each of scaling, stretching and shifting (EDM); 0 for no augmentation but flips."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, times, losses and averages stay in float32."""
    remat: Literal["none", "products", "full"] = run.setting("none")
    """What the backward pass computes again, to save memory: nothing; all but products with weights and convolutions;
    all but each block's input."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=0, warmup=0, seed=0)
        run.check_sizes(self, batch=1 << 20, width=1 << 14, multipliers=1 << 10, blocks=32)
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.decays or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"decays must be at least one number, each once, got {self.decays}")
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.check_batch_size(self.batch, objective(self).identity_share)
        eqx.filter_eval_shape(lambda: make_field(self, jr.key(0)))  # the key within: a real one needs a device
        averages(self)
        prepare(self)


def make_field(config: Config, key: Key[Array, ""]) -> mfx.UNet:
    return mfx.UNet(
        (3, 32, 32),
        mfx.UNetSize(config.width, config.multipliers, config.blocks, config.attention),
        augmentation=6,
        dropout=config.dropout,
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
        remat=mfx.nn.REMATS[config.remat],
        key=key,
    )


def objective(config: Config) -> mfx.Objective:
    r_times = None if config.r_times is None else mfx.LogitNormalTimes(*config.r_times)
    times = mfx.LogitNormalTimes(*config.times)
    return mfx.Objective(
        mfx.MeanFlow() if config.identity_share else None,
        time_pairs=mfx.TimePairs(times, r_times),
        boundary_times=None if config.identity_share else times,  # else the larger time of a pair
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(config.power, config.offset),
    )


def averages(config: Config) -> list[mfx.ExponentialAverage]:
    return [mfx.ExponentialAverage(decay, config.average_every) for decay in config.decays]


def prepare(config: Config) -> data.InTurn:
    """From bytes to what the network sees: the loader's flip, which the network is not told, then EDM's pipe."""
    pipe = data.EDMAugmentation(config.augmentation, flip=0.5 if config.augmentation else 0.0)
    return data.InTurn((data.WithoutLabel(), data.FromPixels(), data.RandomFlip(), pipe))


def optimizer(config: Config) -> optax.GradientTransformation:
    warmup = optax.linear_schedule(1e-8, config.learning_rate, max(config.warmup, 1))
    return optax.adam(warmup if config.warmup else config.learning_rate, *config.betas)


def open_source(path: str) -> data.AbstractSource:
    """The training images."""
    if path == SHAPES:
        return data.ArraySource(draw_shapes(4096, seed=0), name="drawn shapes")
    source = image_sources.open_images((path,), size=(32,))
    if source.row_shape != (3, 32, 32) or source.dtype != np.uint8:
        found = f"{source.dtype} of shape {source.row_shape} in {path}, on which images.py trains"
        raise ValueError(f"data must have rows of uint8 of shape (3, 32, 32), got {found}")
    return source


def draw_shapes(number: int, *, seed: int) -> UInt8[np.ndarray, "rows 3 32 32"]:
    """Discs and squares of random place, size and colour on plain grounds: images that a small network can learn."""
    draws = np.random.default_rng(seed)
    ground, colour = draws.uniform(0, 255, (2, number, 3, 1, 1))
    centre, radius = draws.uniform(10, 22, (number, 2, 1, 1)), draws.uniform(4, 9, (number, 1, 1))
    down, right = (axis - centre[:, number] for number, axis in enumerate(np.mgrid[:32, :32].astype(np.float64)))
    is_disc = draws.random((number, 1, 1)) < 0.5
    distance = np.where(is_disc, np.hypot(down, right), np.maximum(abs(down), abs(right)))
    cover = np.clip(radius - distance + 0.5, 0, 1)[:, None]  # edges are soft by one pixel
    return np.rint(ground + cover * (colour - ground)).astype(np.uint8)


def evaluations(config: Config) -> tuple[int, int]:
    """Numbers of evaluations in which pictures are made; previews are made in the first."""
    return (1, 2) if config.identity_share else (4, 16)


def save_samples(config: Config, field: mfx.AbstractField, path: Path, *, steps: int, side: int) -> None:
    """A square of generated images: along u, or in Euler steps for Flow Matching."""
    key, times = jr.key(PREVIEW_SEED), mfx.uniform_times(steps)
    method = mfx.sample if config.identity_share else mfx.sample_euler
    loops_are_slow = jax.default_backend() == "cpu"  # those of convolutions
    generator = mfx.Generator(field, key, (3, 32, 32), times, method=method, unroll=loops_are_slow)
    x = np.asarray(generator.from_noise(jr.normal(key, (side**2, 3, 32, 32))))
    picture.save_image_grid(path, x.reshape(side, side, 3, 32, 32), -1, 1)


def main(config: Config) -> None:
    """Train on CIFAR-10, or images like it, and save what was learnt."""
    run.require("matplotlib", "safetensors")
    field_key, run_key = jr.split(jr.key(config.seed))
    parallelism = run.parallelism(config)
    step = mfx.TrainStep(
        objective(config),
        optimizer(config),
        averages(config),
        prepare(config),
        accumulation=config.accumulation,
        parallelism=parallelism,
    )
    source = open_source(config.data)
    stream = data.Stream(source, config.batch, seed=config.seed, parallelism=parallelism)

    def make_state() -> mfx.TrainState:
        return mfx.init_state(make_field(config, field_key), step.optimizer, step.averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        save_samples(config, run.local(state.averages[0]), path, steps=evaluations(config)[0], side=4)

    with run.opened(config) as directory:
        options = {"steps": config.steps, "preview": preview, "start": config.start}
        state = run.train(config, step, make_state, stream, directory, **options)
        save(config, directory, state)
        run.tell(f"{len(config.decays)} averages and samples are in {directory.root}")


def save(config: Config, directory: run.RunDirectory, state: mfx.TrainState) -> None:
    """Every average as weights, and pictures of the first."""
    trained, trained_for = objective(config).trained, int(state.step)
    for decay, field in zip(config.decays, state.averages, strict=True):
        notes = checkpoint.Notes(pixels=(-1, 1), trained=trained, steps=trained_for, decay=decay)
        checkpoint.save_weights(directory.path(f"ema_{decay}.safetensors"), field, {"data": config.data}, notes)
    field = run.local(state.averages[0])
    if run.is_first():
        for steps in evaluations(config):
            save_samples(config, field, directory.path(f"samples_{steps}.png"), steps=steps, side=8)
        if records := directory.records():
            picture.save_curves(directory.path("curves.png"), records)


TINY = Config(
    data=SHAPES,
    steps=1000,
    batch=16,
    width=16,
    multipliers=(1, 2),
    blocks=1,
    attention=(16,),
    dropout=0.0,
    learning_rate=2e-3,
    warmup=50,
    decays=(0.99,),
    average_every=1,
    save_every=200,
    preview_every=200,
)
PAPER = Config()
V1 = Config(times=(-0.6, 1.6), r_times=(-4.0, 1.6))

PRESETS = {
    "paper": ("App. A of the paper (the authors' code calls it v0)", PAPER),
    "v1": ("the times of the authors' later code: t and r from two distributions", V1),
    "tiny": ("a small network for minutes on a CPU", TINY),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
