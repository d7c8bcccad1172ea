"""Does an objective learn the true average velocity, and does it sample? Toy data in two dimensions, exact truth.

    python experiments/toy_2d.py                                 2 data sets x 5 methods x 2 seeds
    python experiments/toy_2d.py --quick                         55 seconds on 2 CPU cores
    python experiments/toy_2d.py --data two_moons pinwheel --methods MeanFlow Exact WrongTangent
    python experiments/toy_2d.py --preset plain                  conditional velocity as target, no Fourier features
    python experiments/toy_2d.py --preset long                   one network, trained for an hour
    python experiments/toy_2d.py --dry-run                       what would be trained, and what is done already

A run that was stopped, or killed, continues by the same command.

A data set is a Gaussian mixture, so its velocity v is known in closed form and its average velocity u by integration.
Every method is held against that truth, and its samples against the density. README.md beside this file has figures.
"""

import dataclasses
import functools
import importlib
import math
import runpy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import exact, metrics, picture, run

DATA: dict[str, Callable[[], exact.GaussianMixture]] = {
    "eight_gaussians": exact.eight_gaussians,
    "three_gaussians": exact.three_gaussians,
    "two_moons": exact.two_moons,
    "checkerboard": exact.checkerboard,
    "sharp_checkerboard": lambda: exact.checkerboard(1 / 64, points=2048),
    "swiss_roll": exact.swiss_roll,
    "pinwheel": exact.pinwheel,
    "two_spirals": exact.two_spirals,
}


def is_usual(identity: mfx.AbstractIdentity) -> bool:
    facts, own_loss = identity.facts, isinstance(identity, mfx.AbstractIdentityWithLoss)
    return facts.exact and not (facts.needs_teacher or facts.learns_through_derivative or own_loss)


@functools.cache
def identities(own: str | None, steps: int) -> dict[str, mfx.AbstractIdentity]:
    """The identities of mf_eqx, and those of a Python file of the user's own, for a training of that many steps."""
    return mfx.identities_in(vars(mfx) if own is None else {**vars(mfx), **runpy.run_path(own)}, steps)


def methods(own: str | None = None) -> list[str]:
    return ["FlowMatching", *identities(own, 1), "WrongTangent", "Exact"]


USUAL = ["FlowMatching", *(name for name, identity in identities(None, 1).items() if is_usual(identity))]
EVALUATIONS = (1, 2, 4, 8)
EDGES = tuple(np.linspace(0, 1, 9).tolist())
FLOW_TIMES = (0.5, 0.7, 1.0)
PATH = mfx.LinearInterpolant()
REFERENCES = 1 << 16
JUDGED_PAIRS = mfx.TimePairs(mfx.UniformTimes())


class JudgedKeys(NamedTuple):
    """Of everything that is judged: the same for all methods and seeds."""

    truth: Key[Array, ""]
    data: Key[Array, ""]
    floor: Key[Array, ""]
    noise: Key[Array, ""]
    slices: Key[Array, ""]
    large: Key[Array, ""]


def judged_keys() -> JudgedKeys:
    """Made when they are needed: a script that is imported must not touch a device."""
    return JudgedKeys(*jr.split(jr.key(2**31 - 1), 6))


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A toy run: every data set with every method and seed."""

    data: tuple[str, ...] = ("eight_gaussians", "checkerboard")
    """Data sets: eight_gaussians, three_gaussians, two_moons, checkerboard, sharp_checkerboard, swiss_roll, pinwheel,
    two_spirals."""
    methods: tuple[str, ...] = (*USUAL, "Exact")
    """Methods: FlowMatching, the identities of mf_eqx by name, WrongTangent (MeanFlow with the tangent (v, 0, 0), which
    is wrong), Exact (the true field, put through the same table). By default the identities that hold exactly, and need
    no teacher, no gradient through a derivative and no loss of their own."""
    own: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity, which join the methods by their
    names. Finished trainings are not done again when the file changes: give another --name then."""
    seeds: int = 2
    """Trainings of each, from seeds 0, 1, ..."""
    steps: int = 5000
    """Training steps."""
    batch: int = 256
    """Rows per step, drawn anew each time; a multiple of the denominator of identity_share."""
    width: int = 96
    """Width of the MLP."""
    depth: int = 5
    """Residual blocks of the MLP, two layers each."""
    condition_width: int = 32
    """Width of the embedded times, which enter every block."""
    fourier_features: int = 16
    """Frequencies of Fourier features of z, 0 for none; z itself stays beside them."""
    fourier_scale: float = 0.5
    """Standard deviation of these frequencies at the start, in cycles per unit of the data."""
    references: int = 512
    """Data points from which each step estimates the velocity with less variance, drawn from 65,536 / copies that are
    drawn once; 0 for the conditional velocity. Methods that learn from pairs of data and noise (ConsistencyTraining,
    InductiveMomentMatching) go without."""
    learning_rate: float = 2e-3
    """Peak of Adam's learning rate, after 100 steps of warm-up and before the cosine decay."""
    clip: float = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it. Without it single steps can ruin a long run."""
    decay: float = 0.995
    """Decay per step of the parameter average that is judged."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the identity; Flow Matching has none."""
    pair_times: tuple[float, float] = (0.0, 3.0)
    """Mean and standard deviation of the logit of both times of a pair (r, t), drawn apart and sorted: much at both
    ends, since one step reads the field at (0, 1)."""
    at_data: float = 0.1
    """Share of pairs whose r is set to 0."""
    boundary_times: tuple[float, float] = (-0.5, 1.5)
    """The same for t of rows with r = t: a little more near the data, where v varies most."""
    power: float = 1.0
    """Adaptive weight's power p (Eq. 22): no single row pulls hard. It biases targets that have variance (see
    weight_bias.py): take 0 with --references 0. Methods that go without references have 0."""
    offset: float = 0.3
    """Adaptive weight's offset c (Eq. 22)."""
    marginal: bool = False
    """Regress on the exact marginal velocity, which no real data set allows; references are not used then."""
    copies: int = 1
    """Independent copies of the data set side by side: data in 2 x copies dimensions."""
    samples: int = 4000
    """Generated samples that are judged, and real ones that they are held against."""
    large_samples: int = 50000
    """The same for one more sliced W2 at one evaluation, whose noise floor is lower."""
    rows: int = 2000
    """Rows (z, r, t) at which fields are held against the truth."""
    quick: bool = False
    """Only the first data set and one seed, and of the methods FlowMatching, MeanFlow and Exact unless others are
    asked for; at most 1500 steps, a decay of 0.98, 1000 samples (5000 of the large), 500 rows."""

    def __post_init__(self):
        self.check(seeds=1, steps=1, width=1, depth=1, copies=1, samples=10, large_samples=10, rows=10)
        run.check_sizes(self, seeds=100, batch=1 << 20, width=1 << 14, depth=1000, copies=1000)
        run.check_sizes(self, samples=10**6, large_samples=10**7, rows=10**6)
        self.check(condition_width=1, fourier_features=0, references=0)
        run.check_sizes(self, condition_width=1 << 14, fourier_features=1 << 14, references=REFERENCES)
        if self.own is not None and not Path(self.own).is_file():
            raise ValueError(f"own must be a Python file, got {self.own}")
        for name, known in (("data", DATA), ("methods", methods(self.own))):
            if unknown := [item for item in getattr(self, name) if item not in known]:
                raise ValueError(f"{name} must be among {', '.join(known)}; got {', '.join(unknown)}")
            if not getattr(self, name):
                raise ValueError(f"{name} must be at least one of {', '.join(known)}; got none")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from each other, got {', '.join(getattr(self, name))}")
        if not self.clip > 0:
            raise ValueError(f"clip must be > 0, got {self.clip}")
        if not self.fourier_scale > 0:
            raise ValueError(f"fourier_scale must be > 0, got {self.fourier_scale}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        for method in self.methods:
            train_step(self, method).check_batch_size(self.batch)
            if self.marginal and learns_from_pairs(objective(self, method).identity):
                raise ValueError(f"marginal must be False for {method}, which learns from pairs of data and noise")


def shrunk(config: Config) -> Config:
    """What `--quick` runs."""
    most = {"seeds": 1, "steps": 1500, "decay": 0.98, "samples": 1000, "large_samples": 5000, "rows": 500}
    methods = ("FlowMatching", "MeanFlow", "Exact") if config.methods == Config.methods else config.methods
    least = {name: min(bound, getattr(config, name)) for name, bound in most.items()}
    return dataclasses.replace(config, data=config.data[:1], methods=methods, **least)


def learns_from_pairs(identity: mfx.AbstractIdentity | None) -> bool:
    """Whether a method needs x and eps themselves, and can take no other velocity."""
    return identity is not None and identity.facts.uses_pair


def objective(config: Config, method: str) -> mfx.Objective:
    """The method's objective, without what depends on the data: the velocity of `marginal`, the references."""
    wrong = mfx.MeanFlow(tangent_t=0)
    identity = wrong if method == "WrongTangent" else identities(config.own, config.steps).get(method)
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(*config.pair_times), at_data=config.at_data),
        boundary_times=mfx.LogitNormalTimes(*config.boundary_times),
        identity_share=config.identity_share if identity else 0,
        weight=mfx.AdaptiveWeight(0.0 if learns_from_pairs(identity) else config.power, config.offset),
    )


def with_target(objective: mfx.Objective, config: Config, data: str) -> mfx.Objective:
    """The objective, regressing on a better velocity than the conditional one where the method can take it."""
    if config.marginal:
        velocity = exact.MarginalVelocity(distribution_of(config, data), PATH)
        return dataclasses.replace(objective, velocity=velocity)
    if config.references and not learns_from_pairs(objective.identity):
        stable_target = mfx.StableTarget(references_of(config, data), number=config.references)
        return dataclasses.replace(objective, stable_target=stable_target)
    return objective


@functools.cache
def references_of(config: Config, data: str) -> Float[Array, "references dim"]:
    """The points of which each step takes some: the same for all methods and seeds."""
    number = max(REFERENCES // config.copies, config.references)
    return exact.draw(distribution_of(config, data), number, jr.key(2**31 - 2))


@functools.cache
def train_step(config: Config, method: str) -> mfx.TrainStep:
    rate, warmup = config.learning_rate, 100
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(config.steps, warmup + 1), rate / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule))
    average = mfx.ExponentialAverage(config.decay)
    loss = objective(config, method)
    return mfx.TrainStep(loss, optimizer, [average], teacher=0 if loss.needs_teacher else None, unroll=True)


class Instantaneous(mfx.AbstractField):
    """What Flow Matching knows, u(z, r, t) = v(z, t): sampling by it is Euler's method."""

    field: mfx.AbstractField

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, t, t, condition, key=key)


class Problem(NamedTuple):
    """A data set with everything that methods are held against."""

    name: str
    mixture: exact.GaussianMixture
    distribution: exact.AbstractDistribution
    truth: exact.AverageVelocity
    known: metrics.FieldTruth
    data: Float[Array, "samples dim"]
    limit: float


def distribution_of(config: Config, name: str) -> exact.AbstractDistribution:
    mixture = DATA[name]()
    return exact.StackedMixture(mixture, config.copies) if config.copies > 1 else mixture


def make_problem(config: Config, name: str) -> Problem:
    mixture, distribution = DATA[name](), distribution_of(config, name)
    # The best that float32 can do, and a thousand times less than the error of any network here.
    truth = exact.AverageVelocity(exact.MarginalVelocity(distribution, PATH), rtol=1e-5, atol=1e-5)
    known = metrics.field_truth(truth, distribution.sample, PATH, JUDGED_PAIRS, config.rows, key=judged_keys().truth)
    data = exact.draw(distribution, config.samples, judged_keys().data)
    limit = 1.05 * float(jnp.max(jnp.abs(mixture.mean)) + 3 * jnp.max(mixture.std))
    return Problem(name, mixture, distribution, truth, known, data, limit)


class Cell(NamedTuple):
    """What is trained and judged."""

    data: str
    method: str
    seed: int


def cells(config: Config) -> list[Cell]:
    """Seeds outside: those of one method compile the same program."""
    every = [Cell(d, m, seed) for seed in range(config.seeds) for d in config.data for m in config.methods]
    return [cell for cell in every if cell.method != "Exact" or cell.seed == 0]


def training(config: Config, cell: Cell) -> run.Training | None:
    """What the cell trains, if anything."""
    if cell.method == "Exact":
        return None
    field_key, run_key = jr.split(jr.key(cell.seed))
    target = with_target(objective(config, cell.method), config, cell.data)
    step = dataclasses.replace(train_step(config, cell.method), objective=target)

    def make_field() -> mfx.MLP:
        return mfx.MLP(
            2 * config.copies,
            width=config.width,
            depth=config.depth,
            condition_width=config.condition_width,
            fourier_features=config.fourier_features,
            fourier_scale=config.fourier_scale,
            key=field_key,
        )

    draw = exact.Draw(distribution_of(config, cell.data), config.batch)
    return run.Training("_".join(map(str, cell)), step, make_field, draw, config.steps, run_key)


@eqx.filter_jit
def generate(field: mfx.AbstractField, eps: Float[Array, "rows dim"], number: int) -> Float[Array, "rows dim"]:
    # An exact field integrates: in one vmap every row would wait for the slowest.
    rows = 50 if isinstance(field, exact.AverageVelocity) else len(eps)
    times = mfx.uniform_times(number)
    return jax.lax.map(lambda eps: mfx.sample(field, eps, times=times), eps, batch_size=min(rows, len(eps)))


class Quality(NamedTuple):
    """How near samples are to the data; all but the coverage are 0 at best, up to the noise of finite samples. NaN for
    samples that are not finite, of a training that diverged."""

    sliced_wasserstein: float
    energy_distance: float
    mmd: float
    mode_coverage: float
    total_variation: float


def quality(problem: Problem, x: Float[Array, "rows dim"]) -> Quality:
    if not np.isfinite(x).all():
        return Quality(*[math.nan] * len(Quality._fields))
    mixture, limit, pairs = problem.mixture, problem.limit, x.reshape(-1, 2)  # copies are samples of one mixture
    return Quality(
        float(metrics.sliced_wasserstein(x, problem.data, key=judged_keys().slices)),
        float(metrics.energy_distance(x, problem.data)),
        float(metrics.maximum_mean_discrepancy(x, problem.data)),
        float(metrics.mode_coverage(pairs, mixture.mean, mixture.std, mixture.weight, mixture.label)),
        float(metrics.total_variation(pairs, mixture.log_density, low=(-limit, -limit), high=(limit, limit))),
    )


class Accuracy(NamedTuple):
    """How near a field is to the truth: E|u - u*|² / E|u*|² in three places, and root-mean-square residuals of the
    equations, relative to the velocity."""

    overall: float
    diagonal: float
    one_step: float
    identity: float
    semigroup: float


class Result(NamedTuple):
    """One field, judged."""

    data: str
    method: str
    seed: int
    accuracy: Accuracy
    quality: tuple[Quality, ...]
    large_sliced_wasserstein: float | None
    cells: metrics.RelativeError
    samples: tuple[Float[Array, "rows dim"], ...]
    field: mfx.AbstractField


def judge(config: Config, problems: Mapping[str, Problem], cell: Cell, state: mfx.TrainState | None) -> Result:
    problem = problems[cell.data]
    field, rows = problem.truth if state is None else state.averages[0], problem.known.overall
    field = Instantaneous(field) if cell.method == "FlowMatching" else field
    errors = metrics.field_errors(field, problem.known, edges=EDGES)
    v = problem.known.diagonal.u
    accuracy = Accuracy(
        float(errors.overall.value),
        float(errors.diagonal.value),
        float(errors.one_step.value),
        float(metrics.relative_identity_residual(mfx.MeanFlow(), field, rows.z, v, rows.r, rows.t)),
        float(metrics.relative_semigroup_residual(field, rows.z, rows.r, rows.t)),
    )
    eps = jr.normal(judged_keys().noise, problem.data.shape)
    samples = tuple(generate(field, eps, number) for number in EVALUATIONS)
    judged = tuple(quality(problem, x) for x in samples)
    large = None
    if not isinstance(field, exact.AverageVelocity):  # it would integrate for minutes
        eps = jr.normal(judged_keys().noise, (config.large_samples, problem.data.shape[1]))
        large = large_distance(config, problem, generate(field, eps, 1))
    return Result(*cell, accuracy, judged, large, errors.cells, samples, field)


def large_distance(config: Config, problem: Problem, x: Float[Array, "rows dim"]) -> float:
    if not np.isfinite(x).all():
        return math.nan
    data = exact.draw(problem.distribution, config.large_samples, judged_keys().large)
    return float(metrics.sliced_wasserstein(x, data, key=judged_keys().slices))


def tables(config: Config, problem: Problem, results: Sequence[Result]) -> str:
    """The figures of one data set: means over seeds, then their spread."""
    keys = jr.split(judged_keys().floor, 5)
    floors = [quality(problem, exact.draw(problem.distribution, config.samples, key)) for key in keys]
    large_floor = large_distance(
        config, problem, exact.draw(problem.distribution, config.large_samples, judged_keys().floor)
    )
    headers = ("", "evaluations", "error of u", "r = t", "(0, 1)", "identity", "semigroup")
    headers += (f"sliced W2 of {config.large_samples}", f"of {config.samples}", "energy", "MMD²", "modes", "TV")

    def lines(combine: Callable[[Any], Any], methods: Sequence[str]) -> list[tuple]:
        rows = []
        for method in methods:
            runs = [result for result in results if result.method == method]
            large = [[result.large_sliced_wasserstein] for result in runs]
            of_field = [
                *combine([result.accuracy for result in runs]),
                *([None] if None in large[0] else combine(large)),
            ]
            for i, number in enumerate(EVALUATIONS):
                of_samples = combine([result.quality[i] for result in runs])
                rows.append(
                    (method, number, *of_field, *of_samples) if i == 0 else ("", number, *[None] * 6, *of_samples)
                )
        return rows

    means = lines(lambda values: [float(value) for value in np.mean(values, axis=0)], config.methods)
    means.append(("samples of the data", *[None] * 6, large_floor, *np.mean(floors, axis=0).tolist()))
    text = f"## {problem.name}\n\n{run.table(means, headers)}"
    if config.seeds > 1:
        learned = [method for method in config.methods if method != "Exact"]
        spread = lines(lambda values: [f"{x:.0%}" for x in np.ptp(values, axis=0) / np.mean(values, axis=0)], learned)
        text += f"\n\nSpread over {config.seeds} seeds, (largest - smallest) / mean:\n\n{run.table(spread, headers)}"
    return text


def save_pictures(config: Config, problem: Problem, results: Sequence[Result], directory: run.RunDirectory) -> None:
    """Samples, errors over (r, t), and flows; samples and flows of the first seed."""
    first = {result.method: result for result in results if result.seed == 0}
    shown = {"data": (problem.data[:, :2],) * len(EVALUATIONS)}
    shown |= {method: [x[:, :2] for x in result.samples] for method, result in first.items()}
    counts = [f"{number} evaluation{'s' if number > 1 else ''}" for number in EVALUATIONS]
    path = directory.path(f"{problem.name}_samples.png")
    picture.save_point_grid(
        path, shown, counts, limit=problem.limit, title=f"{problem.name}: samples from the same noise"
    )
    maps = {}
    for method in first.keys() - {"Exact"}:
        cells = [result.cells for result in results if result.method == method]
        maps[method] = functools.reduce(metrics.RelativeError.__add__, cells).value
    shown = {method: maps[method] for method in config.methods if np.any(np.asarray(maps.get(method, 0)) > 0)}
    if shown:
        picture.save_heat_maps(
            directory.path(f"{problem.name}_errors.png"),
            shown,
            EDGES,
            row_label="r",
            column_label="t",
            value_label="E|u - u*|² / E|u*|²",
            title=f"{problem.name}: error of the average velocity by cells of (r, t)",
        )
    if config.copies == 1:
        fields = {"truth": problem.truth} | {m: result.field for m, result in first.items() if m != "Exact"}
        eps = jr.normal(judged_keys().noise, (40, 2))
        flows = {name: picture.flow_of(field, eps, FLOW_TIMES, limit=problem.limit) for name, field in fields.items()}
        columns = [f"-u(z, 0, {t}), towards the data" for t in FLOW_TIMES]
        picture.save_flows(directory.path(f"{problem.name}_flows.png"), flows, columns, limit=problem.limit + 0.5)


def as_record(result: Result) -> dict[str, Any]:
    """A result as JSON holds it."""
    return {
        "data": result.data,
        "method": result.method,
        "seed": result.seed,
        **result.accuracy._asdict(),
        "large_sliced_wasserstein": result.large_sliced_wasserstein,
        "quality": [{"evaluations": n, **q._asdict()} for n, q in zip(EVALUATIONS, result.quality, strict=True)],
        "error_by_cell": np.asarray(result.cells.value).tolist(),
    }


def note(cell: Cell, result: Result) -> str:
    error, distance = result.accuracy, result.quality[0].sliced_wasserstein
    return (
        f"{cell.data} {cell.method} seed {cell.seed}: error of u {error.overall:.3g}, at (0, 1) {error.one_step:.3g}; "
        f"sliced W2 at one evaluation {distance:.3g}"
    )


def main(config: Config) -> None:
    """Train every method on every data set, and hold it against the truth."""
    with run.optional("matplotlib"):  # now rather than after the trainings
        importlib.import_module("matplotlib")
    config = shrunk(config) if config.quick else config
    if config.test_run:
        config = dataclasses.replace(config, samples=100, large_samples=100, rows=20)
    trainings = {cell: training(config, cell) for cell in cells(config)}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)
        print(f"integrating the truth at {3 * config.rows} points of each data set", flush=True)
        problems = {name: make_problem(config, name) for name in config.data}
        judge_cell = functools.partial(judge, config, problems)
        results = list(run.train_cells(config, trainings, judge_cell, directory, note=note).values())
        judged = {name: [result for result in results if result.data == name] for name in problems}
        parts = [tables(config, problem, judged[name]) for name, problem in problems.items()]
        text = "\n\n".join([*parts, f"{time.perf_counter() - directory.opened:.0f} seconds in all."])
        directory.save_results(text, [as_record(result) for result in results])
        for name, problem in problems.items():
            save_pictures(config, problem, judged[name], directory)
        print(f"{text} Pictures, results.md and results.json are in {directory.root}.")


PLAIN = Config(
    width=128,
    depth=3,
    condition_width=128,
    fourier_features=0,
    references=0,
    pair_times=(0.0, 2.0),
    at_data=0.0,
    power=0.0,
    offset=0.01,
)

PRESETS = {
    "default": ("two data sets, all methods, two seeds", Config()),
    "plain": ("conditional velocity as target, no Fourier features", PLAIN),
    "long": (
        "one network on the checkerboard, as good as an hour makes it",
        dataclasses.replace(
            PLAIN,
            data=("checkerboard",),
            methods=("MeanFlow", "Exact"),
            seeds=1,
            steps=80000,
            batch=512,
            width=256,
            condition_width=256,
            learning_rate=1e-3,
            # Constant up to errors of about 100, so that no row can pull harder than a few others together. It scales
            # the loss by 1/100, and with it what `clip` means.
            power=1.0,
            offset=100.0,
            decay=0.9995,
            samples=10000,
            large_samples=500000,
        ),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
