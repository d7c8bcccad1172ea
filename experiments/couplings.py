"""Which data belong to which noise? Independent, optimal and rectified pairs, in one step and in several, on toy data.

    python experiments/couplings.py                             the checkerboard, five minutes on 2 CPU cores
    python experiments/couplings.py --data two_moons --seeds 3

A run that was stopped, or killed, continues by the same command.

A path joins x and eps. If these are drawn apart, paths cross, the velocity of a state is a mean of many, and its flow
is curved. Flow Matching and MeanFlow are trained on three sets of pairs, all of the same size:

- independent: x and eps are drawn apart, as everywhere else;
- optimal: within batches, each eps goes to the x that makes all paths together shortest (`data.optimal_pairs`);
- rectified: x is where the trained Flow Matching network takes eps (Rectified flow, Liu, Gong, Liu, 2023, arXiv
  2209.03003; with MeanFlow on these pairs: Rectified MeanFlow, arXiv 2511.23342). It costs a training and 32
  evaluations for each pair.

`curvature` is E|v - (eps - x)|^2 / E|eps - x|^2 along a network's own trajectories from eps to x, 0 where these are
straight lines. RESULTS.md beside this file has the figures.
"""

import dataclasses
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import toy_problems
from jaxtyping import Array, Float, install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data, exact, picture, run

COUPLINGS, METHODS = ("independent", "optimal", "rectified"), ("FlowMatching", "MeanFlow")
FOLLOWED, STEPS = 500, 32
"""Trajectories of which the curvature is measured; steps of Heun's method (two evaluations) or of Euler's."""


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A study of couplings."""

    data: str = "checkerboard"
    """Data set of two dimensions, one of toy_2d.py's."""
    pairs: int = 51_200
    """Pairs of data and noise in each set, a multiple of group."""
    group: int = 512
    """Pairs within which the optimal coupling chooses: its time grows as the square of this number."""
    seeds: int = 1
    """Trainings of each kind, from seeds 0, 1, ..."""
    steps: int = 3000
    """Training steps."""
    batch: int = 256
    """Pairs per step."""
    samples: int = 4000
    """Samples that are judged."""

    def __post_init__(self):
        self.check(seeds=1, steps=1, batch=2, samples=10, group=2, pairs=2)
        run.check_sizes(self, seeds=100, batch=1 << 20, samples=10**6, group=1 << 12, pairs=10**7)
        run.check_among(self, data=[name for name in toy_problems.DATA if name != toy_problems.STACKED])
        if self.pairs % self.group:
            raise ValueError(f"pairs must be a multiple of group = {self.group}, got {self.pairs}")
        if self.batch % 2:
            raise ValueError(f"batch must be even, got {self.batch}")


class Cell(NamedTuple):
    """One training."""

    coupling: str
    method: str
    seed: int


class Pairs(NamedTuple):
    x: Float[Array, "pairs 2"]
    eps: Float[Array, "pairs 2"]


def independent(config: Config) -> Pairs:
    x_key, eps_key = jr.split(jr.key(2**31 - 5))
    x = exact.draw(toy_problems.distribution_of(config.data), config.pairs, x_key)
    return Pairs(x, jr.normal(eps_key, x.shape))


def optimal(config: Config, pairs: Pairs) -> Pairs:
    groups = [np.asarray(ends).reshape(-1, config.group, 2) for ends in pairs]
    coupled = [data.optimal_pairs(x, eps) for x, eps in zip(*groups, strict=True)]
    return Pairs(pairs.x, jnp.asarray(np.concatenate(coupled)))


@eqx.filter_jit
def rectified(field: mfx.AbstractField, pairs: Pairs) -> Pairs:
    """The same noise, and where the flow of a field takes it."""
    times = mfx.uniform_times(STEPS // 2)
    return Pairs(jax.vmap(lambda eps: mfx.sample_heun(field, eps, times=times))(pairs.eps), pairs.eps)


def training(config: Config, cell: Cell, pairs: Pairs) -> run.Training:
    share = 0 if cell.method == "FlowMatching" else 0.5
    objective = mfx.Objective(
        mfx.MeanFlow() if share else None,
        identity_share=share,
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(0, 2)),
        boundary_times=mfx.UniformTimes(),
        weight=mfx.ConstantWeight(),
    )
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, 100, max(config.steps, 101), 2e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    step = mfx.TrainStep(objective, optimizer, [mfx.ExponentialAverage(0.995)], data.TakeEps())
    field_key, run_key = jr.split(jr.key(cell.seed))
    draw = data.DrawRows(pairs.x, {"eps": pairs.eps}, config.batch)

    def make_field() -> mfx.MLP:
        return mfx.MLP(2, width=96, depth=5, condition_width=32, fourier_features=16, key=field_key)

    settings = {**cell._asdict(), **{name: getattr(config, name) for name in ("data", "pairs", "group", "batch")}}
    return run.Training("_".join(map(str, cell)), step, make_field, draw, config.steps, run_key, settings)


@eqx.filter_jit
def curvature(field: mfx.AbstractField, eps: Float[Array, "rows 2"]) -> Float[Array, ""]:
    times = jnp.asarray(mfx.uniform_times(STEPS))

    def follow(eps: Float[Array, "2"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        def move(z: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            v = field(z, ends[0], ends[0])
            return z - (ends[0] - ends[1]) * v, v

        x, v = jax.lax.scan(move, eps, (times[:-1], times[1:]))
        return jnp.mean(jnp.sum((v - (eps - x)) ** 2, axis=1)), jnp.sum((eps - x) ** 2)

    off, length = jax.vmap(follow)(eps)
    return jnp.mean(off) / jnp.mean(length)


class Result(NamedTuple):
    """Figures of a trained field, its samples in one step, and itself."""

    figures: dict[str, float]
    samples: Float[Array, "rows 2"]
    field: mfx.AbstractField


def judge(problem: toy_problems.Problem, cell: Cell, state: mfx.TrainState | None) -> Result:
    assert state is not None
    field, eps = state.averages[0], jr.normal(toy_problems.judged_keys().noise, problem.data.shape)
    sampled = toy_problems.Instantaneous(field) if cell.method == "FlowMatching" else field
    figures, first = {"curvature": float(curvature(field, eps[:FOLLOWED]))}, None
    for number in (1, 2, 4):
        x = toy_problems.generate(sampled, eps, number)
        quality, first = toy_problems.quality(problem, x), x if first is None else first
        figures[f"TV, {number}"], figures[f"W2, {number}"] = quality.total_variation, quality.sliced_wasserstein
    assert first is not None
    return Result(figures, first, field)


def main(config: Config) -> None:
    """Train on three couplings, then hold samples against the density."""
    run.require("matplotlib")
    if config.test_run:
        config = dataclasses.replace(config, samples=100, pairs=2 * config.group)
    problem = toy_problems.make_problem(config.data, samples=config.samples, rows=10)
    results: dict[Cell, Result] = {}
    with run.opened(config) as directory:
        pairs = independent(config)
        sets = {"independent": pairs, "optimal": optimal(config, pairs)}
        lengths = {name: float(jnp.mean(jnp.sum((x - eps) ** 2, axis=1))) for name, (x, eps) in sets.items()}
        for stage in (COUPLINGS[:2], COUPLINGS[2:]):
            for seed in range(config.seeds if stage == COUPLINGS[2:] else 0):
                sets[f"rectified {seed}"] = rectified(results[Cell("independent", "FlowMatching", seed)].field, pairs)
            cells = [Cell(*kind, seed) for seed in range(config.seeds) for kind in _kinds(stage)]
            trainings = {c: training(config, c, sets.get(c.coupling) or sets[f"rectified {c.seed}"]) for c in cells}
            run.announce(config, trainings, directory)
            results |= run.train_cells(
                config, trainings, lambda c, state: judge(problem, c, state), directory, note=note
            )
        save(config, problem, results, lengths, directory)


def _kinds(couplings: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(coupling, method) for coupling in couplings for method in METHODS]


def note(cell: Cell, result: Result) -> str:
    shown = ", ".join(f"{name}: {value:.3g}" for name, value in result.figures.items())
    return f"{cell.coupling} pairs, {cell.method}, seed {cell.seed}: {shown}"


def save(
    config: Config,
    problem: toy_problems.Problem,
    results: dict[Cell, Result],
    lengths: dict[str, float],
    directory: run.RunDirectory,
) -> None:
    rows = []
    for kind in _kinds(COUPLINGS):
        found = [result.figures for cell, result in results.items() if cell[:2] == kind]
        rows.append((*kind, *(f"{np.mean([figures[name] for figures in found]):.3g}" for name in found[0])))
    floor = toy_problems.quality(problem, exact.draw(problem.distribution, config.samples, jr.key(1)))
    headers = ("pairs", "trained", *next(iter(results.values())).figures)
    text = (
        f"{config.data}, seeds: {config.seeds}. TV: total variation to the density (data: "
        f"{floor.total_variation:.2g}), W2: sliced Wasserstein distance to the data (data: "
        f"{floor.sliced_wasserstein:.2g}), at 1, 2, 4 evaluations; Flow Matching by Euler's method. Mean of "
        f"|eps - x|^2: {', '.join(f'{name} {length:.3g}' for name, length in lengths.items())}."
        f"\n\n{run.table(rows, headers)}"
    )
    directory.save_results(text, [{**cell._asdict(), **result.figures} for cell, result in results.items()])
    shown = {f"{c.coupling}, {c.method}": r.samples for c, r in results.items() if c.seed == 0}
    title = f"{config.data}: one evaluation"
    picture.save_point_panels(directory.path("samples.png"), shown, limit=problem.limit, columns=2, title=title)
    print(f"{text}\n\n{time.perf_counter() - directory.opened:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
