"""Why may the raw identity error of a training rise while its samples improve? On digits, at stages of one training.

    python experiments/raw_errors.py

A run that was stopped, or killed, continues by the same command.

Rows with r < t leave the residual u - v + (t - r) du/dt, with the velocity v of the row's own digit. With the mean
velocity m of all training digits of its label in place of v, which is what can be learnt, another residual remains.
Since du/dt = d_z u v + d_t u, they differ by

    (1 - (t - r) d_z u) (m - v) = dX/dz (m - v),        X(z) = z - (t - r) u(z, r, t),

the noise of the target, multiplied by the Jacobian of the step from t to r. The two vary independently, so their mean
squares add up. A field that tells digits apart has a step that moves neighbouring noise far apart: its Jacobian is
large, and the noise of the target grows with it, however good the field is.

RESULTS.md beside this file has the figures.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import checkpoint, picture, run
    from mf_eqx.data import DrawRows

GAPS = ("0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1")
"""Of t - r, the bins of the metric `identity_error_by_gap`."""
OWN, ALL = "own digit", "all digits"
"""Which velocity a residual has: that of the row's own digit, or the mean of all training digits of its label."""


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """Trainings of digits.py with the velocity of each row's own digit as target, and their raw errors at stages."""

    steps: int = 3000
    """Training steps."""
    stages: int = 10
    """Number of stages, equally far apart; divides the steps."""
    rounds: int = 8
    """Passes over the training digits in which errors are measured, with new noise and times."""
    seeds: int = 1
    """Trainings, from seeds 0, 1, ..."""

    def __post_init__(self):
        self.check(steps=1, stages=1, rounds=1, seeds=1)
        run.check_sizes(self, seeds=100, stages=1000, rounds=10**4)
        if self.steps % self.stages:
            raise ValueError(f"stages must divide the {self.steps} steps, got {self.stages}")


def of_digits(config: Config, seed: int) -> digits.Config:
    return digits.Config(steps=config.steps, seed=seed, stable_target=False)


def training(config: Config, seed: int, data: digits.Digits) -> run.Training:
    recipe, (field_key, run_key) = of_digits(config, seed), jr.split(jr.key(seed))
    average = mfx.ExponentialAverage(recipe.decay)
    step = mfx.TrainStep(digits.objective(recipe), digits.optimizer(recipe), [average])
    draw = DrawRows(jnp.asarray(data.train.x), jnp.asarray(digits.label_of(data.train)), recipe.batch)
    make_field = functools.partial(digits.make_field, recipe, field_key)
    return run.Training(str(seed), step, make_field, draw, config.steps, run_key, [config.steps, seed])


@eqx.filter_jit
def measured(
    field: mfx.AbstractField, objective: mfx.Objective, batch: mfx.Batch, key: Key[Array, ""]
) -> dict[str, mfx.Mean]:
    return objective(field, batch, key=key)[1]


def errors(
    field: mfx.AbstractField, objective: mfx.Objective, batch: mfx.Batch, rounds: int
) -> tuple[float, list[float]]:
    """The raw errors of rows with r = t, and of rows with r < t by their gap."""
    found = [measured(field, objective, batch, jr.key(number)) for number in range(rounds)]
    boundary, by_gap = (
        functools.reduce(operator.add, [each[name] for each in found])
        for name in ("boundary_error", "identity_error_by_gap")
    )
    return float(boundary.value), np.asarray(by_gap.value).tolist()


def stage(
    config: digits.Config, state: mfx.TrainState, data: digits.Digits, judge: digits.Judge, rounds: int
) -> dict[str, Any]:
    """Of one state: the distance of its samples, and its raw errors with either velocity, over the same rows."""
    label = digits.label_of(data.every)
    times = mfx.uniform_times(1)
    x = digits.generate(state.averages[0], mfx.sample, jnp.asarray(label), times, jr.key(digits.JUDGED_SEED))
    rows = len(data.train.x) // 2 * 2
    batch = mfx.Batch(jnp.asarray(data.train.x[:rows]), jnp.asarray(digits.label_of(data.train)[:rows]))
    targets = {OWN: None, ALL: mfx.StableTarget(jnp.asarray(data.train.x), jnp.asarray(data.train.label))}
    found = {
        name: errors(state.field, digits.objective(config, target), batch, rounds) for name, target in targets.items()
    }
    return {
        "step": int(state.step),
        "distance": judge.frechet(digits.pixels(np.asarray(x))),
        **{f"r = t, {name}": boundary for name, (boundary, _) in found.items()},
        **{f"{gap}, {name}": by_gap[i] for i, gap in enumerate(GAPS) for name, (_, by_gap) in found.items()},
    }


def save_figure(path: Path, stages: Sequence[dict[str, Any]]) -> None:
    """Errors by gap, with either velocity, and the distance of samples."""
    figure = picture.new_figure(12, 3.6)
    panels = figure.subplots(1, 3)
    panels[1].sharey(panels[0])
    steps = [found["step"] for found in stages]
    for panel, name in zip(panels, (OWN, ALL), strict=False):
        for gap in GAPS:
            panel.plot(steps, [found[f"{gap}, {name}"] for found in stages], ".-", label=f"t - r from {gap}")
        panel.set(title=f"raw identity error, velocity of {name}", xlabel="step", yscale="log")
        panel.legend(fontsize="small")
    panels[2].plot(steps, [found["distance"] for found in stages], ".-", color="black")
    panels[2].set(title="Frechet distance, one evaluation", xlabel="step", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Train, then measure the raw errors of every stage."""
    run.require("matplotlib")
    every = config.steps // config.stages
    config = dataclasses.replace(config, keep_last=config.stages, save_every=every, log_every=every)
    data = {seed: digits.load(of_digits(config, seed)) for seed in range(config.seeds)}
    trainings = {seed: training(config, seed, data[seed]) for seed in data}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)

        def judge(seed: int, state: mfx.TrainState | None) -> list[dict[str, Any]]:
            saved = checkpoint.Checkpoints(directory.root / "cells" / str(seed) / "checkpoints")
            restored = [saved.load(trainings[seed].make_state, step=step) for step in saved.steps()]
            judge_of, recipe = digits.Judge(data[seed]), of_digits(config, seed)
            states = [found.state for found in restored if found is not None]
            return [stage(recipe, state, data[seed], judge_of, config.rounds) for state in states]

        results = run.train_cells(config, trainings, judge, directory)
        parts = [
            f"Seed {seed}\n\n{run.table([[*found.values()] for found in stages], [*stages[0]])}"
            for seed, stages in results.items()
        ]
        text = "\n\n".join(parts)
        directory.save_results(text, [{"seed": seed, **found} for seed in results for found in results[seed]])
        save_figure(directory.path("raw_errors.png"), results[0])
        print(f"{text}\n\nFigure (seed 0), results.md and results.json are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
