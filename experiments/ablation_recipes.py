"""What `ablations.py` trains on points and digits, and how samples of one evaluation are judged. The recipe for images
is in `ablation_images.py`.

A recipe is made when a run needs it, since it reads data; where its tables have their centre is known before
(`CENTRES`): Fashion-MNIST has the paper's p = 1 and lognorm(-0.4, 1.0), points and digits have p = 0 and uniform
times. Targets are those of the paper everywhere: the velocity of a row's own image and noise, without references.
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
from ablation_tables import PAPER, Setting
from jaxtyping import Array, Float, install_import_hook, Int, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, exact, metrics

LABEL_DROPOUT = 0.1
DIVERGED = 10
"""Steps in a row without a finite loss and gradient with which a training counts as diverged: it is not judged."""
CENTRES = {"eight_gaussians": Setting(), "digits": Setting(), "fashion": PAPER}
"""From which tables vary one thing each, by the name of the data set."""


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
    """What is computed of samples: figures by name, of which the first is "distance", NaN if samples are not finite.

    **Arguments:** `score` from a field, and the setting that it was trained in, to the figures of its samples of one
    evaluation; `floor` the figures that real data have, as far as there are such.
    """

    score: Callable[[mfx.AbstractField, Setting], dict[str, float]]
    floor: Mapping[str, float] = {}


class Cost(NamedTuple):
    """Seconds of CPU time on one core of the machine that RESULTS.md tells of.

    **Arguments:** `step` of the setting in the centre; `cell` to compile and to judge.
    """

    step: float
    cell: float


class Recipe(NamedTuple):
    """What is trained on a data set, and how a field is judged.

    **Arguments:** `labels` how many; `make_field`, `draw`, `prepare` as for `run.Training` and `mf_eqx.TrainStep`;
    `open_judge` from a folder, for what later runs can use as well; `distance` in words; `numbers`; `cost`; `details`
    what else a result depends on; `sampler` of the images in pictures, or None; `ordered` the figures whose order is
    held against the paper's; `beside` what other figures mean; `has_floor` whether real data have figures.
    """

    labels: int
    make_field: Callable[[mfx.nn.TimeVariables, Key[Array, ""]], mfx.AbstractField]
    draw: Callable[[Key[Array, ""]], mfx.Batch]
    open_judge: Callable[[Path], Judge]
    distance: str
    numbers: Numbers
    cost: Cost
    details: Mapping[str, Any] = {}
    prepare: Callable[[mfx.Batch, Key[Array, ""]], mfx.Batch] | None = None
    sampler: image_samples.Sampler | None = None
    ordered: tuple[str, ...] = ("distance",)
    beside: str = ""
    has_floor: bool = False

    def seconds(self, setting: Setting, centre: Setting) -> float:
        """About how much CPU time a cell takes."""
        return self.cost.step * self.numbers.steps * passes(setting) / passes(centre) + self.cost.cell


def passes(setting: Setting) -> float:
    """Forward passes of a batch that a step of MeanFlow costs: three of Flow Matching, a tangent for each row with r <
    t, and with guidance one without label for every row (also for those whose label is dropped) and, for rows with r <
    t and kappa > 0, one with label."""
    if (setting.scale, setting.mix) == (1, 0):
        return 3 + setting.share
    return 3 + setting.share + 1 + (setting.share if setting.mix else 0)


CLASSES, ROWS, PATH = 4, 2000, mfx.LinearInterpolant()
PAIRS = mfx.TimePairs(mfx.UniformTimes())


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
    """Of everything that is judged: the same for all cells."""

    truth: Key[Array, ""]
    data: Key[Array, ""]
    noise: Key[Array, ""]


def judged_keys() -> JudgedKeys:
    """Made when they are needed: a script that is imported must not touch a device."""
    return JudgedKeys(*jr.split(jr.key(2**31 - 1), 3))


@eqx.filter_jit
def one_step(
    field: mfx.AbstractField, eps: Float[Array, "rows *data"], label: Int[Array, " rows"]
) -> Float[Array, "rows *data"]:
    return jax.vmap(lambda eps, label: mfx.sample(field, eps, label))(eps, label)


def eight_gaussians(steps: int = 4000) -> Recipe:
    """Four classes of two opposite Gaussians each, and an MLP: the truth is known, also that of guided fields."""
    numbers = Numbers(steps, batch=256, width=96, learning_rate=2e-3, decay=0.995)
    mixture = exact.eight_gaussians()
    mixture = exact.GaussianMixture(mixture.mean, mixture.std, label=jnp.arange(8) % CLASSES)
    condition = jnp.arange(CLASSES).repeat(ROWS // CLASSES)

    @functools.cache
    def truth(scale: float) -> tuple[metrics.FieldTruth, Float[Array, "rows 2"]]:
        """Of the guided field, and one-step samples of it."""
        velocity = exact.GuidedVelocity(exact.MarginalVelocity(mixture, PATH), scale)
        field = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
        known = metrics.field_truth(field, mixture.sample, PATH, PAIRS, ROWS, condition, key=judged_keys().truth)
        return known, known.one_step.z - known.one_step.u

    keys = jr.split(judged_keys().data, ROWS)
    real = jax.vmap(lambda key, label: mixture.sample(key=key, condition=label))(keys, condition)

    def by_class(x: Float[Array, "rows 2"], y: Float[Array, "rows 2"]) -> float:
        """Energy distance to the samples of the same class, its mean over classes; NaN if x is not finite."""
        if not np.isfinite(x).all():
            return math.nan
        pairs = [(x[condition == label], y[condition == label]) for label in range(CLASSES)]
        return float(np.mean([metrics.energy_distance(*pair) for pair in pairs]))

    def score(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
        known, exact_samples = truth(round(setting.scale / (1 - setting.mix), 6))
        errors = metrics.field_errors(field, known)
        x = one_step(field, jr.normal(judged_keys().noise, (ROWS, 2)), condition)
        return {
            "distance": by_class(x, real),
            "distance to the guided truth": by_class(x, exact_samples),
            "error of u": float(errors.overall.value),
            "error of u at (0, 1)": float(errors.one_step.value),
        }

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        return mfx.MLP(2, width=numbers.width, depth=3, labels=CLASSES, time_variables=variables, key=key)

    draw = exact.DrawLabelled(mixture, numbers.batch)
    distance = "energy distance of one-step samples to the data, per class"
    ordered = ("distance", "distance to the guided truth")
    cost = Cost(0.006, 5)
    return Recipe(CLASSES, make_field, draw, lambda folder: Judge(score), distance, numbers, cost, ordered=ordered)


def handwritten_digits(steps: int = 1500) -> Recipe:
    """scikit-learn's digits, and the network of `digits.py`; the Frechet distance is that of pixels."""
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
    cost = Cost(0.11, 15)
    return Recipe(digits.CLASSES, make_field, draw, open_judge, distance, numbers, cost, details, has_floor=True)
