"""What keeps a training from diverging? Remedies against trainings that fail; and why raw errors may rise late.

    python experiments/stability.py
    python experiments/stability.py --cases digits --remedies none QK-norm

A run that was stopped, or killed, continues by the same command.

1. Each case is a training that fails without a remedy: with plain squared error, without clipping, at a high learning
   rate or a strong guidance mix. Each remedy changes one thing. A spike is a line of the log (a mean over 25 steps)
   whose raw error of rows with r = t is more than three times the median of the twenty lines before.
2. The raw `identity_error` of a training on digits, from its checkpoints, over the same rows: with the velocity of each
   row's own digit, which training regresses on, and with the mean velocity of all training digits of its label, which
   is what can be learnt. The difference is the variance of the target, passed on by the field.

README.md beside this file says what follows from it, RESULTS.md has the figures.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ablations
import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import toy_problems
from jaxtyping import Array, Float, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import checkpoint, exact, metrics, picture, run
    from mf_eqx.data import DrawRows


class Remedy(NamedTuple):
    """What is changed in a case."""

    rate: float = 1.0
    """Factor of the learning rate."""
    warmup: float = 0.02
    """Part of the training over which the learning rate rises."""
    clip: float = math.inf
    """Largest norm of a gradient."""
    weight: mfx.AbstractWeight = mfx.ConstantWeight()
    short_gaps_first: bool = False
    """Over the first half of the training (`GapCurriculum`)."""
    references: bool = False
    """Targets have no variance (`StableTarget`)."""
    qk_norm: bool = False


REMEDIES = {
    "none": Remedy(),
    "rate / 4": Remedy(rate=1 / 4),
    "long warm-up": Remedy(warmup=0.25),
    "clipped gradients": Remedy(clip=1.0),
    "unit steps": Remedy(weight=mfx.AdaptiveWeight(0.5, 0.01)),
    "short gaps first": Remedy(short_gaps_first=True),
    "references": Remedy(references=True),
    "QK-norm": Remedy(qk_norm=True),
}


class Case(NamedTuple):
    """A training that is unstable without a remedy, and how its field is judged."""

    title: str
    identity: mfx.AbstractIdentity
    times: mfx.AbstractTimes
    labels: int | None
    references: mfx.StableTarget
    make_field: Callable[[bool, Key[Array, ""]], mfx.AbstractField]
    draw: Callable[[Key[Array, ""]], mfx.Batch]
    judge: Callable[[mfx.AbstractField], float]
    judged: str
    steps: int
    learning_rate: float


@functools.cache
def checkerboard() -> Case:
    distribution = toy_problems.distribution_of("checkerboard")
    problem = toy_problems.make_problem("checkerboard", samples=10, rows=1000)

    def make_field(qk_norm: bool, key: Key[Array, ""]) -> mfx.AbstractField:
        return mfx.MLP(2, width=96, depth=3, key=key)

    return Case(
        "ImprovedMeanFlow on the checkerboard, an MLP",
        mfx.ImprovedMeanFlow(),
        mfx.LogitNormalTimes(0, 2),
        labels=None,
        references=mfx.StableTarget(exact.draw(distribution, 1 << 16, jr.key(2**31 - 2)), number=512),
        make_field=make_field,
        draw=exact.Draw(distribution, 256),
        judge=lambda field: float(metrics.field_errors(field, problem.known).overall.value),
        judged="error of u",
        steps=4000,
        learning_rate=2e-2,
    )


@functools.cache
def handwritten_digits() -> Case:
    config, recipe = digits.Config(), ablations.handwritten_digits()
    train = digits.load(config).train
    x, label = jnp.asarray(train.x), jnp.asarray(train.label)

    def make_field(qk_norm: bool, key: Key[Array, ""]) -> mfx.AbstractField:
        size = mfx.DiTSize(config.depth, config.width, config.heads, config.patch)
        return mfx.DiT((1, 8, 8), size, labels=digits.CLASSES, qk_norm=qk_norm, unroll=True, key=key)

    return Case(
        "MeanFlow on digits, a DiT",
        mfx.MeanFlow(),
        mfx.UniformTimes(),
        labels=digits.CLASSES,
        references=mfx.StableTarget(x, label),
        make_field=make_field,
        draw=DrawRows(x, label, config.batch),
        judge=lambda field: recipe.judge(field, ablations.Setting())["distance"],
        judged="Frechet distance",
        steps=1000,
        learning_rate=1e-2,
    )


CASES: dict[str, Callable[[], Case]] = {"checkerboard": checkerboard, "digits": handwritten_digits}
MLP_CASES = ("checkerboard",)
WATCHED, STAGES = "digits, raw errors", 10


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A study of stability."""

    cases: tuple[str, ...] = tuple(CASES)
    """checkerboard (ImprovedMeanFlow, an MLP) and digits (MeanFlow, a DiT)."""
    remedies: tuple[str, ...] = tuple(REMEDIES)
    """none; rate / 4; long warm-up (a quarter of the training); clipped gradients (norm 1); unit steps (p = 1/2, c =
    0.01); short gaps first; references; QK-norm (of the DiT)."""
    seeds: int = 2
    """Trainings of each, from seeds 0, 1, ..."""
    parts: float = 1.0
    """Factor of the numbers of steps: 4000 on the checkerboard, 1000 on digits."""
    watched_steps: int = 3000
    """Steps of the training on digits whose raw errors are watched; 0 for none."""
    log_every: int = 25
    """Steps between lines of each cell's metrics.jsonl, in which spikes are counted."""

    def __post_init__(self):
        self.check(seeds=1, watched_steps=0)
        run.check_sizes(self, seeds=100)
        for name, known in (("cases", CASES), ("remedies", REMEDIES)):
            if unknown := [each for each in getattr(self, name) if each not in known]:
                raise ValueError(f"{name} must be among {', '.join(known)}; got {unknown[0]}")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from each other, got {', '.join(getattr(self, name))}")
        if not 0 < self.parts <= 100:
            raise ValueError(f"parts must lie in (0, 100], got {self.parts}")


class Cell(NamedTuple):
    """A training."""

    case: str
    remedy: str
    seed: int


def cells(config: Config) -> list[Cell]:
    """Seeds outside: those of one setting compile the same program."""
    found = [
        Cell(case, remedy, seed)
        for seed in range(config.seeds)
        for case in config.cases
        for remedy in config.remedies
        if not (case in MLP_CASES and REMEDIES[remedy].qk_norm)
    ]
    return [*found, Cell("digits", WATCHED, 0)] if config.watched_steps else found
