"""What a recipe of `ablations.py` is, and those for points and digits; `ablation_images.py` has that for Fashion-MNIST.

A recipe says what is trained, and how one-step samples are judged. It reads data, so it is made when a run needs it.
Targets are those of the paper: the velocity of a row's own data and noise, without references.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import digits
import equinox as eqx
import image_samples
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from ablation_tables import Setting
from jaxtyping import Array, Float, install_import_hook, Int, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, exact, metrics

CLASSES, ROWS, PATH = 4, 2000, mfx.LinearInterpolant()
"""For points: the number of labels, the number of samples that are judged, and the path from data to noise."""
LABEL_DROPOUT = 0.1
DIVERGED = 10
"""A training with so many steps in a row without a finite loss and gradient has diverged, and is not judged."""


class Numbers(NamedTuple):
    """What a recipe fixes for all cells. `clip` is the largest norm of a gradient, or None."""

    steps: int
    batch: int
    width: int
    learning_rate: float
    decay: float
    clip: float | None = 1.0
    label_dropout: float = LABEL_DROPOUT


class Judge(NamedTuple):
    """How one-step samples of a field are judged.

    **Arguments:** `score` a function from a field, and the setting that it was trained in, to figures by name, of which
    the first is "distance"; they are NaN if samples are not finite. `floor` the figures of real data, if they have any.
    """

    score: Callable[[mfx.AbstractField, Setting], dict[str, float]]
    floor: Mapping[str, float] = {}


class CpuSeconds(NamedTuple):
    """Seconds of CPU time, on the machine of RESULTS.md.

    **Arguments:** `step` of a step in the centre; `cell` for compiling and judging a cell.
    """

    step: float
    cell: float


class Recipe(NamedTuple):
    """What is trained on a data set, and how a field is judged.

    **Arguments:** `labels` their number; `make_field` a function from embedded times and a key to a network; `draw` and
    `prepare` as for `run.Training` and `mf_eqx.TrainStep`; `open_judge` a function from a folder, in which it may save
    what later runs need, to the judge; `distance` what the figure "distance" is, in words; `numbers`; `cost`; `details`
    everything else that a result depends on; `sampler` of the images in pictures, or None; `ordered` the figures whose
    order is compared with the paper's; `beside` sentences about the other figures; `has_floor` whether real data have
    figures.
    """

    labels: int
    make_field: Callable[[mfx.nn.TimeVariables, Key[Array, ""]], mfx.AbstractField]
    draw: Callable[[Key[Array, ""]], mfx.Batch]
    open_judge: Callable[[Path], Judge]
    distance: str
    numbers: Numbers
    cost: CpuSeconds
    details: Mapping[str, Any] = {}
    prepare: Callable[[mfx.Batch, Key[Array, ""]], mfx.Batch] | None = None
    sampler: image_samples.Sampler | None = None
    ordered: tuple[str, ...] = ("distance",)
    beside: str = ""
    has_floor: bool = False

    def seconds(self, setting: Setting, centre: Setting) -> float:
        """An estimate of a cell's CPU time."""
        return self.cost.step * self.numbers.steps * passes(setting) / passes(centre) + self.cost.cell


def passes(setting: Setting) -> float:
    """The cost of a step of MeanFlow, in forward passes of a batch: 3 for Flow Matching, and 1 for the tangents of rows
    with r < t. Guidance adds 1 without label for all rows, and, if kappa > 0, 1 with label for rows with r < t."""
    if (setting.scale, setting.mix) == (1, 0):
        return 3 + setting.share
    return 3 + setting.share + 1 + (setting.share if setting.mix else 0)


def digest_of(*sources: data.AbstractSource) -> str:
    """SHA-256 of all rows and labels, in their order."""
    digest = hashlib.sha256()
    for source in sources:
        rows = source.take(np.arange(len(source)))
        digest.update(f"{rows.x.dtype} {rows.x.shape}".encode())
        digest.update(np.ascontiguousarray(rows.x).tobytes())
        digest.update(b"" if rows.label is None else rows.label.astype("<i8").tobytes())
    return digest.hexdigest()


class JudgedKeys(NamedTuple):
    """The keys of all random numbers of a judge, the same for all cells."""

    truth: Key[Array, ""]
    data: Key[Array, ""]
    noise: Key[Array, ""]


def judged_keys() -> JudgedKeys:
    """A function, since a script must not touch a device while it is imported."""
    return JudgedKeys(*jr.split(jr.key(2**31 - 1), 3))


@eqx.filter_jit
def one_step(
    field: mfx.AbstractField, eps: Float[Array, "rows *data"], label: Int[Array, " rows"]
) -> Float[Array, "rows *data"]:
    return jax.vmap(lambda eps, label: mfx.sample(field, eps, label))(eps, label)


def eight_gaussians(steps: int = 4000) -> Recipe:
    """Four classes of two opposite Gaussians each, and an MLP. The exact field is known, with guidance as well."""
    numbers = Numbers(steps, batch=256, width=96, learning_rate=2e-3, decay=0.995)
    mixture = exact.eight_gaussians()
    mixture = exact.GaussianMixture(mixture.mean, mixture.std, label=jnp.arange(8) % CLASSES)

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        return mfx.MLP(2, width=numbers.width, depth=3, labels=CLASSES, time_variables=variables, key=key)

    draw = exact.DrawLabelled(mixture, numbers.batch)
    distance = "energy distance of one-step samples to the data, per class"
    ordered = ("distance", "distance to the guided truth")
    open_judge, cost = lambda folder: judge_points(mixture), CpuSeconds(0.006, 5)
    return Recipe(CLASSES, make_field, draw, open_judge, distance, numbers, cost, ordered=ordered)


def judge_points(mixture: exact.GaussianMixture) -> Judge:
    """Judges by the distances of samples to data and to samples of the exact guided field, and by the errors of u."""
    label = jnp.arange(CLASSES).repeat(ROWS // CLASSES)
    keys = jr.split(judged_keys().data, ROWS)
    real = jax.vmap(lambda key, label: mixture.sample(key=key, condition=label))(keys, label)

    @functools.cache
    def truth(scale: float) -> tuple[metrics.FieldTruth, Float[Array, "rows 2"]]:
        """The exact field with guidance of a scale, and its one-step samples."""
        velocity = exact.GuidedVelocity(exact.MarginalVelocity(mixture, PATH), scale)
        field = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
        pairs = mfx.TimePairs(mfx.UniformTimes())
        known = metrics.field_truth(field, mixture.sample, PATH, pairs, ROWS, label, key=judged_keys().truth)
        return known, known.one_step.z - known.one_step.u

    def score(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
        known, exact_samples = truth(round(setting.scale / (1 - setting.mix), 6))
        errors = metrics.field_errors(field, known)
        x = one_step(field, jr.normal(judged_keys().noise, (ROWS, 2)), label)
        return {
            "distance": energy_by_class(x, real, label),
            "distance to the guided truth": energy_by_class(x, exact_samples, label),
            "error of u": float(errors.overall.value),
            "error of u at (0, 1)": float(errors.one_step.value),
        }

    return Judge(score)


def energy_by_class(x: Float[Array, "rows 2"], y: Float[Array, "rows 2"], label: Int[Array, " rows"]) -> float:
    """Energy distance between samples of the same class, averaged over classes; NaN if an x is not finite."""
    if not np.isfinite(x).all():
        return math.nan
    return float(np.mean([metrics.energy_distance(x[label == i], y[label == i]) for i in range(CLASSES)]))


def handwritten_digits(steps: int = 1500) -> Recipe:
    """scikit-learn's digits, and the network of `digits.py`, judged by the Frechet distance of grey values."""
    config = digits.Config()
    numbers = Numbers(steps, config.batch, config.width, config.learning_rate, config.decay)
    parts = digits.load(config)
    label = jnp.asarray(parts.every.label)

    def open_judge(folder: Path) -> Judge:
        judge = digits.Judge(parts)
        halves, _, unseen = digits.references(parts, judge, config.seed)
        assert halves.frechet is not None and unseen.read is not None

        def score(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
            eps = jr.normal(judged_keys().noise, (len(label), 1, 8, 8))
            x = digits.pixels(np.asarray(one_step(field, eps, label)))
            read = float(np.mean(judge.read(x, digits.label_of(parts.every))))
            return {"distance": judge.frechet(x), "read correctly": read}

        return Judge(score, {"distance": halves.frechet, "read correctly": float(np.mean(unseen.read))})

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        size = mfx.DiTSize(config.depth, config.width, config.heads, config.patch)
        return mfx.DiT((1, 8, 8), size, labels=digits.CLASSES, time_variables=variables, unroll=True, key=key)

    draw = data.DrawRows(jnp.asarray(parts.train.x), jnp.asarray(parts.train.label), numbers.batch)
    distance = "Frechet distance of one-step samples, grey values squared"
    details = {name: getattr(config, name) for name in ("depth", "heads", "patch", "holdout")}
    details |= {"split_seed": config.seed, "images": digest_of(parts.train, parts.holdout)}
    options = {"details": details, "has_floor": True}
    return Recipe(digits.CLASSES, make_field, draw, open_judge, distance, numbers, CpuSeconds(0.065, 15), **options)
