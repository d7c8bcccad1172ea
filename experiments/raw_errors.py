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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import checkpoint, run

GAPS = ("0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1")
"""Of t - r, the bins of the metric `identity_error_by_gap`."""
OWN, ALL = "own digit", "all digits"
"""Whose velocity a residual has."""


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A training of digits.py with the velocity of each row's own digit as target, and its raw errors at stages."""

    steps: int = 3000
    """Training steps."""
    stages: int = 10
    """Number of stages, equally far apart; divides the steps."""
    rounds: int = 8
    """Passes over the training digits in which errors are measured, with new noise and times."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self):
        self.check(steps=1, stages=1, rounds=1, seed=0)
        if self.steps % self.stages:
            raise ValueError(f"stages must divide the {self.steps} steps, got {self.stages}")


def digits_config(config: Config) -> digits.Config:
    every = config.steps // config.stages
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(run.Settings)}
    same |= {"save_every": every, "keep_every": every, "preview_every": 0}
    return digits.Config(**same, steps=config.steps, seed=config.seed, stable_target=False)


def errors(
    field: mfx.AbstractField, objective: mfx.Objective, batch: mfx.Batch, rounds: int
) -> tuple[float, list[float]]:
    """The raw errors of rows with r = t, and of rows with r < t by their gap."""

    @eqx.filter_jit
    def measured(field: mfx.AbstractField, key: Any) -> Any:
        metrics = objective(field, batch, key=key)[1]
        return metrics["boundary_error"], metrics["identity_error_by_gap"]

    found = [measured(field, jr.key(number)) for number in range(rounds)]
    boundary, by_gap = (jax.tree.map(lambda *leaves: sum(leaves), *each) for each in zip(*found, strict=True))
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
    with run.optional("matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    steps = [found["step"] for found in stages]
    for panel, name in zip(panels, (OWN, ALL), strict=False):
        for gap in GAPS:
            panel.plot(steps, [found[f"{gap}, {name}"] for found in stages], ".-", label=f"t - r from {gap}")
        panel.set(title=f"raw identity error, velocity of {name}", xlabel="step", yscale="log")
        panel.legend(fontsize="small")
    panels[1].sharey(panels[0])
    panels[2].plot(steps, [found["distance"] for found in stages], ".-", color="black")
    panels[2].set(title="Frechet distance, one evaluation", xlabel="step", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, format="png")


def main(config: Config) -> None:
    """Train, then measure the raw errors of every stage."""
    run.require("matplotlib", "safetensors")
    of_digits = digits_config(config)
    data = digits.load(of_digits)
    method = digits.Method("MeanFlow", digits.objective(of_digits), mfx.sample, (1,), shown=1)
    with run.opened(config) as directory:
        part = run.RunDirectory(directory.root / "meanflow")
        digits.train(of_digits, method, data.train, part)
        judge, saved = digits.Judge(data), checkpoint.Checkpoints(part.root / "checkpoints")

        stages = []
        for step in saved.steps():
            restored = saved.load(functools.partial(digits.first_state, of_digits), step=step)
            assert restored is not None
            stages.append(stage(of_digits, restored.state, data, judge, config.rounds))
            run.tell(f"step {step}: distance {stages[-1]['distance']:.3g}")
        text = run.table([list(found.values()) for found in stages], list(stages[0]))
        directory.save_results(text, stages)
        save_figure(directory.path("raw_errors.png"), stages)
        print(f"{text}\n\nFigure, results.md and results.json are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
