"""Handwritten digits in one evaluation: a small class-conditional DiT trained from scratch by MeanFlow.

    python experiments/digits.py                      330 to 450 seconds on 2 busy CPU cores
    python experiments/digits.py --preset guided      about 5 minutes
    python experiments/digits.py --preset any-guidance    about 10 minutes; one network, its guidance chosen at sampling
    python experiments/digits.py --compare            Flow Matching beside it, twice the time
    python experiments/digits.py --dry-run            what would be trained, where, and in how much memory

A run that was stopped, or killed, continues by the same command. The average ends as .safetensors beside the
checkpoints; generate.py samples from it.

Expect a Frechet distance of 14 to 16 at one evaluation (between two random halves of the data: 17.5), with 98% of the
digits read correctly; RESULTS.md beside this file has all figures.

The data are scikit-learn's 1,797 real digits (8x8 pixels, grey values 0 to 16; Alpaydin and Kaynak, UCI, 1998), which
come with the package: nothing is downloaded.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Int, Key
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import guidance_flags
    from image_samples import counted

    import mf_eqx as mfx
    from mf_eqx import checkpoint, data, metrics, picture, run

CLASSES = 10
"""Digits; the same number is the label that means "no label"."""
PICTURE_SEED, JUDGED_SEED = 2**31 - 1, 2**31 - 2
"""Of the noise of all pictures, and of all judged sets."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A digits run. Times in [0, 1]; pixel values in the data's own unit, 0 to 16."""

    start: str = ""
    """Weights or checkpoints of the same network to start from: a .safetensors file, or the directory of a run."""
    steps: int = 3000
    """Training steps. The learning rate decays over all of them, so that more are another run; see start."""
    batch: int = 64
    """Rows per step; a multiple of the denominator of identity_share."""
    width: int = 96
    """Width of the DiT's tokens, a multiple of heads and of 4."""
    depth: int = 4
    """Blocks of the DiT."""
    heads: int = 4
    """Attention heads."""
    patch: int = 2
    """Side of a patch in pixels; divides 8."""
    learning_rate: float = 2e-3
    """Peak of Adam's learning rate, after the warm-up and before the cosine decay."""
    warmup: int = 200
    """Steps of linear warm-up."""
    decay: float = 0.997
    """Decay per step of the parameter average that generates."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the MeanFlow identity; in [0, 1]. 0 is Flow Matching."""
    stable_target: bool = True
    """Take the velocity of all training digits of a row's label, instead of that of its own digit alone: at 3000 steps
    it brings the Frechet distance at one evaluation from 24 to 14 (RESULTS.md beside this file). Guidance then takes
    the velocities of all digits as well, instead of the network's own."""
    power: float = 0.5
    """Adaptive weight's power p (Eq. 22)."""
    offset: float = 0.01
    """Adaptive weight's offset c (Eq. 22)."""
    scale: float = 1.0
    """Guidance scale omega (Eq. 21). With mix 0, 1 means no guidance."""
    mix: float = 0.0
    """Guidance mix kappa (Eq. 21), in [0, 1); the effective scale is omega / (1 - kappa)."""
    guidance_input: bool = False
    """Draw guidance scales and intervals for each row and give them to the network, so that they are chosen at sampling
    (as in improved MeanFlow), in place of scale and mix."""
    largest_scale: float = 4.0
    """With guidance_input: the largest scale omega that is drawn; the smallest is 1, and the density omega^-2."""
    sample_scale: tuple[float, ...] = run.setting(())
    """With guidance_input: the scales that are judged, by default 1 and 2 (or largest_scale, if that is less); pictures
    show the last."""
    sample_interval: tuple[float, float] = run.setting((0.0, 1.0))
    """With guidance_input: the first and the last time at which these scales hold, in all samples."""
    label_dropout: float = 0.1
    """Share of rows whose label is dropped, in [0, 1 - identity_share], or in [0, 1] if identity_share is 1."""
    holdout: float = 0.2
    """Share of the digits that is never trained on, in [0.02, 0.49], equal for every class."""
    compare: bool = False
    """Also train Flow Matching with the same network and budget."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=0, warmup=0, seed=0, width=1, depth=1, heads=1, patch=1)
        run.check_sizes(self, width=1 << 12, depth=100)
        if not 0.02 <= self.holdout <= 0.49:
            raise ValueError(f"holdout must lie in [0.02, 0.49], got {self.holdout}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if self.guidance_input and guided(self):
            found = self.scale if self.scale != 1 else f"mix = {self.mix}"
            raise ValueError(f"scale must be 1, and mix 0, with guidance_input, which draws scales; got {found}")
        defaults = {"sample_scale": (), "sample_interval": (0, 1), "largest_scale": Config.largest_scale}
        if not 1 < self.largest_scale <= 100:
            raise ValueError(f"largest_scale must lie in (1, 100], got {self.largest_scale}")
        for name, default in defaults.items():
            if not self.guidance_input and (found := getattr(self, name)) != default:
                raise ValueError(f"{name} must be left out without guidance_input, got {found}")
        guided_at_all = guided(self) or self.guidance_input
        guidance_flags.check_dropout(self.label_dropout, self.identity_share, guided=guided_at_all)
        if self.guidance_input:
            drawn = mfx.GuidanceRange(1.0, self.largest_scale, mfx.DrawnGuidance().middle)
            guidance_flags.check_drawn(drawn, self.judged_scales, [self.sample_interval])
        # What the parts themselves refuse is refused here, where a flag can be named.
        mfx.check_batch_size(self.batch, objective(self).identity_share)
        eqx.filter_eval_shape(lambda: make_field(self, jr.key(0)))  # the key within: a real one needs a device
        mfx.ExponentialAverage(self.decay)

    @property
    def judged_scales(self) -> tuple[float, ...]:
        """With guidance_input: the scales that are judged."""
        return self.sample_scale or (1.0, min(2.0, self.largest_scale))


class Digits(NamedTuple):
    """All digits, and the same in two parts: what is trained on, and what never is. x in [-1, 1] as the network sees
    them, channels first."""

    every: data.ArraySource
    train: data.ArraySource
    holdout: data.ArraySource


def load(config: Config) -> Digits:
    """The digits, split with equal shares of every class."""
    values, target = load_digits(return_X_y=True)
    x, label = (values.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32), target.astype(np.int32)
    train, holdout = train_test_split(
        np.arange(len(label)), test_size=config.holdout, stratify=label, random_state=config.seed
    )
    if len(train) < config.batch:
        raise ValueError(f"batch must be at most the {len(train)} digits that are trained on, got {config.batch}")
    parts = {"digits": np.arange(len(label)), "training digits": train, "held-out digits": holdout}
    return Digits(*(data.ArraySource(x[p], label[p], labels=CLASSES, name=name) for name, p in parts.items()))


def label_of(source: data.ArraySource) -> Int[np.ndarray, " rows"]:
    assert source.label is not None
    return source.label


def pixels(x: Float[np.ndarray, "rows 1 8 8"]) -> Float[np.ndarray, "rows 64"]:
    """Grey values from 0 to 16, as the data have them; NaN where a sample is not finite."""
    return np.clip(8 * (np.where(np.isfinite(x), x, np.nan).reshape(-1, 64).astype(np.float64) + 1), 0, 16)


def guided(config: Config) -> bool:
    return (config.scale, config.mix) != (1, 0)


def guidance(config: Config) -> mfx.AbstractGuidance | None:
    if config.guidance_input:
        return mfx.DrawnGuidance(mfx.PowerLawScales(2.0, largest=config.largest_scale))
    return mfx.Guidance(config.scale, config.mix) if guided(config) else None


def stable_target(config: Config, source: data.ArraySource) -> mfx.StableTarget | None:
    return mfx.StableTarget(jnp.asarray(source.x), jnp.asarray(source.label)) if config.stable_target else None


def targets(config: Config, target: mfx.StableTarget | None) -> dict[str, Any]:
    """What all objectives here have in common: which velocity they regress on."""
    guides = guidance(config)
    return {
        "guidance": guides,
        "label_dropout": mfx.LabelDropout(config.label_dropout, CLASSES),
        "stable_target": target,
        "exact_guidance": guides is not None and target is not None,
    }


def objective(
    config: Config, target: mfx.StableTarget | None = None, identity: mfx.AbstractIdentity = mfx.MeanFlow()
) -> mfx.Objective:
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(mfx.UniformTimes()),
        identity_share=config.identity_share,
        weight=mfx.AdaptiveWeight(config.power, config.offset),
        **targets(config, target),
    )


def flow_matching(config: Config, target: mfx.StableTarget | None = None) -> mfx.Objective:
    """What `--compare` trains: the same times, target and guidance, without an identity and with the plain squared
    error."""
    return mfx.Objective(
        identity=None,
        identity_share=0,
        boundary_times=mfx.UniformTimes(),
        weight=mfx.ConstantWeight(),
        **targets(config, target),
    )


class Method(NamedTuple):
    """What is trained, how it samples, and in how many evaluations; pictures show the number `shown`."""

    name: str
    objective: mfx.Objective
    sampler: Callable
    evaluations: tuple[int, ...]
    shown: int


def make_field(config: Config, key: Key[Array, ""]) -> mfx.DiT:
    size = mfx.DiTSize(config.depth, config.width, config.heads, config.patch)
    return mfx.DiT((1, 8, 8), size, labels=CLASSES, guidance=config.guidance_input, unroll=True, key=key)


def optimizer(config: Config) -> optax.GradientTransformation:
    rate, steps = config.learning_rate, max(config.steps, config.warmup + 1)
    return optax.adam(optax.warmup_cosine_decay_schedule(0, rate, config.warmup, steps, rate / 100))


def sampled(config: Config, method: Method, field: mfx.AbstractField) -> list[tuple[Method, mfx.AbstractField]]:
    """What is judged of a field: itself, or with guidance as an input the field at each scale."""
    if not config.guidance_input:
        return [(method, field)]
    return [
        (
            method._replace(name=f"{method.name}, guidance {scale:g}"),
            mfx.WithGuidance(field, scale, config.sample_interval),
        )
        for scale in config.judged_scales
    ]


def train(
    config: Config, method: Method, source: data.AbstractSource, directory: run.RunDirectory
) -> mfx.AbstractField:
    """The averaged field after `config.steps` steps."""
    field_key, run_key = jr.split(jr.key(config.seed))
    averages, parallelism = [mfx.ExponentialAverage(config.decay)], run.parallelism(config)
    step = mfx.TrainStep(
        method.objective,
        optimizer(config),
        averages,
        accumulation=config.accumulation,
        parallelism=parallelism,
        teacher=0 if method.objective.needs_teacher else None,
    )
    stream = data.Stream(source, config.batch, seed=config.seed, parallelism=parallelism)

    def make_state() -> mfx.TrainState:
        return mfx.init_state(make_field(config, field_key), step.optimizer, averages, key=run_key)

    def preview(state: mfx.TrainState, path: Path) -> None:
        save_samples(*sampled(config, method, run.local(state.averages[0]))[-1], path, rows=2)

    state = run.train(
        config,
        step,
        make_state,
        stream,
        directory,
        steps=config.steps,
        name=method.name,
        preview=preview,
        start=config.start,
    )
    field, decay = run.local(state.averages[0]), config.decay
    notes = checkpoint.Notes(
        pixels=(-1, 1),
        class_names=tuple("0123456789"),
        trained=method.objective.trained,
        steps=int(state.step),
        decay=decay,
    )
    about = {"data": "digits", "holdout": config.holdout, "seed": config.seed}  # which digits it never saw
    checkpoint.save_weights(directory.path(f"ema_{decay}.safetensors"), field, about, notes)
    return field


@eqx.filter_jit
def generate(
    field: mfx.AbstractField,
    sampler: Callable,
    label: Int[Array, " rows"],
    times: tuple[float, ...],
    key: Key[Array, ""],
) -> Float[Array, "rows 1 8 8"]:
    """One digit per label, from the same noise for every field, sampler and grid of times."""
    eps = jr.normal(key, (label.size, 1, 8, 8))
    return jax.vmap(lambda eps, label: sampler(field, eps, label, times=times))(eps, label)


def save_samples(method: Method, field: mfx.AbstractField, path: Path, rows: int) -> None:
    """A grid of digits, a column per class."""
    label = jnp.tile(jnp.arange(CLASSES), rows)
    x = generate(field, method.sampler, label, mfx.uniform_times(method.shown), jr.key(PICTURE_SEED))
    title = f"{method.name}, {counted(method.shown)} per digit"
    picture.save_image_grid(path, x.reshape(rows, CLASSES, 1, 8, 8), -1, 1, column_labels="0123456789", title=title)


def save_comparison(path: Path, real: data.ArraySource, trained: list[tuple[Method, mfx.AbstractField]]) -> None:
    """Twenty digits of each method at each number of evaluations, from the same noise, below real ones."""
    label = np.repeat(np.arange(CLASSES), 2)
    rows = {"data": real.x[[np.flatnonzero(real.label == c)[i % 2] for i, c in enumerate(label)]]}
    for method, field in trained:
        for number in method.evaluations:
            x = generate(field, method.sampler, jnp.asarray(label), mfx.uniform_times(number), jr.key(PICTURE_SEED))
            rows[f"{method.name}, {counted(number)}"] = np.asarray(x)
    columns = [str(digit) for digit in label]
    picture.save_image_grid(path, np.stack([*rows.values()]), -1, 1, row_labels=[*rows], column_labels=columns)


class Judge:
    """Everything a generated set is held against; fitted to the data once. A set that is not finite scores NaN."""

    def __init__(self, digits: Digits):
        self.every = pixels(digits.every.x)
        self.holdout = pixels(digits.holdout.x)
        self.reader = SVC(C=10).fit(pixels(digits.train.x), digits.train.label)
        self.train, _ = train_test_split(  # as many as are held out, so that chance is 50%
            pixels(digits.train.x), train_size=len(self.holdout), stratify=digits.train.label, random_state=0
        )

    def frechet(self, x: Float[np.ndarray, "rows 64"]) -> float:
        return metrics.frechet_distance(x, self.every) if np.isfinite(x).all() else math.nan

    def read(self, x: Float[np.ndarray, "rows 64"], label: Int[np.ndarray, " rows"]) -> list[float]:
        """Of each class, the share of digits in which the classifier reads the wanted one."""
        if not np.isfinite(x).all():
            return [math.nan] * CLASSES
        correct = self.reader.predict(x) == label
        return [float(correct[label == digit].mean()) for digit in range(CLASSES)]

    def nearer_to_training(self, x: Float[np.ndarray, "rows 64"]) -> float:
        """The share of digits that lie nearer to a training digit than to any held-out one."""
        if not np.isfinite(x).all():
            return math.nan
        (_, train), (_, holdout) = (pairwise_distances_argmin_min(x, y) for y in (self.train, self.holdout))
        return float((train < holdout).mean())


class Result(NamedTuple):
    """One row of the table: what was judged, made in how many evaluations per digit."""

    what: str
    evaluations: int | None = None
    frechet: float | None = None
    read: list[float] | None = None
    nearer_to_training: float | None = None


def references(digits: Digits, judge: Judge, seed: int) -> list[Result]:
    """What real digits score: the noise floor of the distance, and how well the classifier reads what it never saw."""
    orders = [np.random.default_rng((seed, split)).permutation(len(judge.every)) for split in range(10)]
    halves = [metrics.frechet_distance(*np.array_split(judge.every[order], 2)) for order in orders]
    train = metrics.frechet_distance(pixels(digits.train.x), judge.holdout)
    return [
        Result("data: two random halves", frechet=float(np.mean(halves))),
        Result("data: training against hold-out", frechet=train),
        Result("data: hold-out", read=judge.read(judge.holdout, label_of(digits.holdout))),
    ]


def judged(method: Method, field: mfx.AbstractField, number: int, digits: Digits, judge: Judge) -> Result:
    """A generated set with the data's own labels, against all data."""
    label = label_of(digits.every)
    made = generate(field, method.sampler, jnp.asarray(label), mfx.uniform_times(number), jr.key(JUDGED_SEED))
    x = pixels(np.asarray(made))
    return Result(method.name, number, judge.frechet(x), judge.read(x, label), judge.nearer_to_training(x))


def report(results: list[Result]) -> str:
    """Both tables as text."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}%"

    summary = [
        (*row[:3], percent(sum(row.read) / CLASSES if row.read else None), percent(row.nearer_to_training))
        for row in results
    ]
    classes = [(row.what, row.evaluations, *map(percent, row.read)) for row in results if row.read]
    headers = ("", "evaluations", "Frechet distance", "read correctly", "nearer to training (chance 50%)")
    by_class = run.table(classes, ("", "evaluations", *"0123456789"))
    return f"{run.table(summary, headers)}\n\nRead correctly, by class:\n\n{by_class}"


def main(config: Config) -> None:
    """Train on handwritten digits, then judge what the network generates in one evaluation."""
    began = time.perf_counter()
    run.require("matplotlib", "safetensors")
    digits = load(config)
    target = stable_target(config, digits.train)
    methods = [Method("MeanFlow", objective(config, target), mfx.sample, (1, 2, 4), shown=1)]
    if config.compare:
        methods.append(Method("Flow Matching", flow_matching(config, target), mfx.sample_euler, (1, 4, 32), shown=32))
    with run.opened(config) as directory:
        results, trained = [], []
        judge = Judge(digits)
        for method in methods:
            scale = f"scale {mfx.Guidance(config.scale, config.mix).effective_scale:g}"
            found = (
                f"guidance scales from 1 to {config.largest_scale:g}"
                if config.guidance_input
                else f"effective guidance {scale}"
            )
            run.tell(f"{method.name}: {config.steps} steps, {found}")
            part = run.RunDirectory(directory.root / method.name.lower().replace(" ", "_"))
            field = train(config, method, digits.train, part)
            made = sampled(config, method, field)
            results += [judged(*each, number, digits, judge) for each in made for number in method.evaluations]
            trained += made
            if run.is_first():
                save_samples(*made[-1], part.path("samples.png"), rows=10)
                if records := part.records():
                    picture.save_curves(part.path("curves.png"), records)
        if run.is_first():
            save_comparison(directory.path("comparison.png"), digits.holdout, trained)
            results = references(digits, judge, config.seed) + results
            text = f"{report(results)}\n\n{time.perf_counter() - began:.0f} seconds in this session."
            directory.save_results(text, [row._asdict() for row in results])
            print(f"{text} Pictures and metrics are in {directory.root}.")


PRESETS = {
    "unguided": ("plain MeanFlow: the whole variety of the data", Config()),
    "guided": ("effective guidance scale 2: sharper and narrower", Config(mix=0.5)),
    "any-guidance": (
        "guidance scale and interval as inputs, chosen at sampling: judged at scales 1 and 2",
        Config(guidance_input=True, steps=6000),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
