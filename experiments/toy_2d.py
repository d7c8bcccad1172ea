"""Which objectives learn the true average velocity, how soon, and do they sample? Toy data with exact truth.

    python experiments/toy_2d.py                                 all methods on the checkerboard: a leaderboard
    python experiments/toy_2d.py --quick                         three methods on eight Gaussians, a minute on 2 cores
    python experiments/toy_2d.py --preset full                   three seeds, four data sets, one in 64 dimensions
    python experiments/toy_2d.py --data two_moons pinwheel --methods MeanFlow Exact WrongTangent
    python experiments/toy_2d.py --identity mine.py              with the methods of a file of your own
    python experiments/toy_2d.py --quick --data points.npy --identity mine.py --network mine.py:Net
                                                                 on points of your own, with a network of your own
    python experiments/toy_2d.py --preset plain                  conditional velocity as target, no Fourier features
    python experiments/toy_2d.py --preset long                   one network, trained for an hour
    python experiments/toy_2d.py --dry-run                       what would be trained, and what is done already

A run that was stopped, or killed, continues by the same command. A finished training is not repeated: other commands
with the same settings take its result from the table `cells.jsonl`.

Every method is trained with the common settings below, which suit toys, and with the shares, times and weight of its
own paper (`Facts.paper_settings`); network, optimiser and data are the same. Shorter trainings with the common settings
show the quality after fewer steps; together with the CPU time of a step, which is measured in this run, they give the
quality of every method at equal time. RESULTS.md beside this file has figures.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import toy_problems
import toy_report
from jaxtyping import Array, Float, install_import_hook
from toy_points import is_own, read_points, title_of
from toy_problems import (
    Cell,
    copies_of,
    DATA,
    distribution_of,
    floor,
    Instantaneous,
    judge,
    make_problem,
    PATH,
    Problem,
    STACKED,
)

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import checkpoint, exact, measure, run

REFERENCES = 1 << 16
SETTINGS = ("common", "paper")


@functools.cache
def own_methods(path: str) -> tuple[dict[str, type], str]:
    """The identities that a Python file defines, by name, and a digest of it, as it was when it was read first."""
    members, digest = run.own_file("identity", path)
    if not path.endswith(".py"):  # mine.py:Mix
        cls = run.own_class("identity", path, mfx.AbstractIdentity)
        members = {cls.__name__: cls}
    found = {
        name: members[name] for name in mfx.identities_in(members, 1) if members[name] is not getattr(mfx, name, None)
    }
    if taken := [name for name in found if name in methods()]:
        raise ValueError(f"identity must be a file whose methods have other names than mf_eqx's, got {taken[0]}")
    if not found:
        raise ValueError(f"identity must hold identities that can be made without arguments, got none in {path}")
    return found, digest


@functools.cache
def identities(own: str | None, steps: int, known_velocity: bool = False) -> dict[str, mfx.AbstractIdentity]:
    """The identities of mf_eqx, and those of a Python file of the user's own, for a training of that many steps; those
    that need a known velocity only if there is one."""
    names = vars(mfx) if own is None else {**vars(mfx), **own_methods(own)[0]}
    return mfx.identities_in(names, steps, known_velocity=known_velocity)


def methods(own: str | None = None) -> list[str]:
    return ["FlowMatching", *identities(own, 1), "WrongTangent", "Exact"]


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """A toy run: every data set with every method, settings and seed."""

    data: tuple[str, ...] = ()
    """Data sets, by default checkerboard: eight_gaussians, three_gaussians, two_moons, checkerboard,
    sharp_checkerboard, swiss_roll, pinwheel, two_spirals; eight_gaussians_64d, 32 independent copies, which a DiT
    learns in the shape 4 x 4 x 4; or .npy files of points of your own, shape (rows, 2), which are moved and scaled to
    mean 0 and root-mean-square distance 1 from it."""
    blur: float = toy_problems.BLUR
    """Standard deviation of the Gaussian around each point of a file, after the points are scaled to root-mean-square
    distance 1 from their mean. These Gaussians are the density whose exact field is the truth. A smaller blur gives
    sharper details, which are harder to learn; below the distance between neighbouring points the network learns the
    single points instead of their shape."""
    points: int = toy_problems.POINTS
    """Largest number of points that are taken from a file; of more, this many are taken at random, always the same
    ones. Every run integrates the exact field, in a time proportional to this number."""
    methods: tuple[str, ...] = ()
    """Methods: FlowMatching, the identities of mf_eqx and of --identity by name, WrongTangent (MeanFlow with the
    tangent (v, 0, 0), which is wrong), Exact (the true field, put through the same table). By default all but
    WrongTangent, and with --marginal without those that learn from pairs of data and noise."""
    identity: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity that can be made without
    arguments, or one of them as mine.py:Mix. When the file changes, their trainings are done again."""
    network: str | None = None
    """A network of your own in place of MLP and DiT, as mine.py:Net, or mine.py if the file defines one: a subclass of
    mf_eqx.AbstractField that is made as Net(size, key=key), 2 being the size of points in the plane. When the file
    changes, everything is trained again."""
    settings: tuple[str, ...] = SETTINGS
    """common: those below for every method; paper: the share, times and weight of each method's own paper, for methods
    whose paper's are known."""
    seeds: int = 1
    """Trainings of each method, from seeds 0, 1, ..."""
    steps: int = 3000
    """Training steps."""
    shorter: tuple[float, ...] = (0.25,)
    """Lengths of shorter trainings with the common settings, as parts of `steps`; may be empty."""
    batch: int = 256
    """Rows per step, drawn anew each time; a multiple of the denominator of each method's share of identity rows."""
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
    dit_width: int = 48
    """Width of the DiT of eight_gaussians_64d."""
    dit_depth: int = 2
    """Blocks of that DiT."""
    dit_batch: int = 64
    """Rows per step for that DiT, each with 32 draws of the mixture: two in each of its 16 tokens."""
    dit_learning_rate: float = 3e-3
    """Peak of Adam's learning rate for that DiT."""
    references: int = 512
    """Data points from which each step estimates the velocity with less variance, drawn from 65,536 (fewer in 64
    dimensions) that are drawn once; 0 for the conditional velocity. Methods that learn from pairs of data and noise
    (ConsistencyTraining, InductiveMomentMatching) go without."""
    learning_rate: float = 2e-3
    """Peak of Adam's learning rate, after 100 steps of warm-up and before the cosine decay."""
    clip: float = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it. Without it single steps can ruin a long run."""
    decay: float = 0.995
    """Decay per step of the parameter average that is judged."""
    identity_share: float = 0.5
    """Share of rows with r < t, which carry the identity; Flow Matching has none."""
    pair_times: tuple[float, float] = (0.0, 3.0)
    """Mean and standard deviation of the logit of both times of a pair (r, t), which are drawn independently and
    sorted. The default puts many times near both ends, since one-step sampling evaluates the field at (0, 1)."""
    at_data: float = 0.1
    """Share of pairs whose r is set to 0."""
    boundary_times: tuple[float, float] = (-0.5, 1.5)
    """Mean and standard deviation of the logit of t in rows with r = t: slightly more of them near the data, where v
    varies most."""
    power: float = 1.0
    """Adaptive weight's power p (Eq. 22); from p = 1/2 on the gradient of a single row is bounded. It biases the field
    if targets have variance (see weight_bias.py), so take 0 with --references 0. Methods that cannot use references
    always have 0."""
    offset: float = 0.3
    """Adaptive weight's offset c (Eq. 22)."""
    marginal: bool = False
    """Regress on the exact marginal velocity, which no real data set allows; references are not used then."""
    samples: int = 4000
    """Generated samples that are judged, and real ones that they are held against."""
    large_samples: int = 50000
    """Generated samples, and as many real ones, for one more sliced W2 at one evaluation, whose noise floor is
    lower."""
    new_noise: float = 0.0
    """Share of the noise before evaluations after the first that is new, from 0 to 1 (mfx.sample_consistency); always 1
    for methods that learn u(z, 0, t) alone."""
    rows: int = 2000
    """Rows (z, r, t) at which fields are held against the truth."""
    most_faults: int = 10**6
    """Steps in a row without a finite loss and gradient after which the run stops, by default never. Such a step leaves
    the state unchanged; a method that diverges is judged by its last finite state, and the table says so."""
    name: str = ""
    """Directory below runs/toy_2d/, by default one that all runs share: finished cells are found there."""
    quick: bool = False
    """Only the first data set, by default eight_gaussians, one seed, the common settings, and of the methods
    FlowMatching, MeanFlow, Exact and those of --identity unless others are asked for; at most 1500 steps, a decay of
    0.98, 1000 samples (5000 of the large), 500 rows."""

    def __post_init__(self):
        self.check(seeds=1, steps=1, width=1, depth=1, samples=10, large_samples=10, rows=10)
        run.check_sizes(self, seeds=100, batch=1 << 20, width=1 << 14, depth=1000)
        run.check_sizes(self, dit_batch=1 << 20, dit_width=1 << 12, dit_depth=1000)
        run.check_sizes(self, samples=10**6, large_samples=10**7, rows=10**6)
        self.check(condition_width=1, fourier_features=0, references=0, dit_batch=1, dit_width=4, dit_depth=1)
        run.check_sizes(self, condition_width=1 << 14, fourier_features=1 << 14, references=REFERENCES)
        self.check_own()
        run.check_among(self, settings=SETTINGS)
        if self.data:
            run.check_among(self, data=(*DATA, "FILE.npy", *filter(is_own, self.data)))
        if self.methods:
            run.check_among(self, methods=methods(self.identity))
        if wrong := [part for part in self.shorter if not 0 < part < 1]:
            raise ValueError(f"shorter must lie in (0, 1), got {wrong[0]}")
        if len(set(self.shorter)) < len(self.shorter):
            raise ValueError(f"shorter must differ from each other, got {', '.join(map(str, self.shorter))}")
        if not 0 <= self.new_noise <= 1:
            raise ValueError(f"new_noise must lie in [0, 1], got {self.new_noise}")
        if not self.clip > 0:
            raise ValueError(f"clip must be > 0, got {self.clip}")
        if not self.fourier_scale > 0:
            raise ValueError(f"fourier_scale must be > 0, got {self.fourier_scale}")
        for name in ("learning_rate", "dit_learning_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if self.dit_width % 12:
            raise ValueError(
                f"dit_width must be a multiple of 12 (three heads, sin-cos positions), got {self.dit_width}"
            )
        for cell in cells(self):
            if cell.method != "Exact" and cell.seed == 0:
                check_batch(self, cell)
                if self.marginal and learns_from_pairs(identity_of(self, cell)):
                    raise ValueError(
                        f"marginal must be False for {cell.method}, which learns from pairs of data and noise"
                    )

    def check_own(self) -> None:
        """Refuses files of points and networks that cannot be used."""
        self.check(points=2)
        run.check_sizes(self, points=1 << 14)
        if not 0 < self.blur < 10:
            raise ValueError(f"blur must lie in (0, 10), got {self.blur}")
        for name in filter(is_own, self.data):
            toy_problems.mixture_of(name, self.blur, self.points)
        names = [*DATA, *(title_of(name) for name in dict.fromkeys(self.data) if is_own(name))]
        if taken := [name for name in self.data if names.count(title_of(name)) > 1]:
            raise ValueError(f"data must be files of different names, other than mf_eqx's, got {', '.join(taken)}")
        for size in {2 * copies_of(name) for name in chosen_data(self)} if self.network is not None else ():
            run.own_network("network", str(self.network), (size,))


def check_batch(config: Config, cell: Cell) -> None:
    """Refuses a batch that the method's rows do not divide."""
    step = train_step(config, cell)
    try:
        step.check_batch_size(batch_of(config, cell.data))
    except ValueError as error:
        name = "dit_batch" if is_stacked(cell.data) else "batch"
        text = f"{name}{str(error).removeprefix('batch')}, with the {cell.settings} settings of {cell.method}"
        raise ValueError(text) from None


def shrunk(config: Config) -> Config:
    """What `--quick` runs."""
    most = {"seeds": 1, "steps": 1500, "decay": 0.98, "samples": 1000, "large_samples": 5000, "rows": 500}
    least = {name: min(bound, getattr(config, name)) for name, bound in most.items()}
    data = config.data[:1] or ("eight_gaussians",)
    own = own_methods(config.identity)[0] if config.identity else {}
    chosen = config.methods or ("FlowMatching", "MeanFlow", *own, "Exact")
    return dataclasses.replace(config, data=data, methods=chosen, settings=("common",), shorter=(), **least)


def chosen_data(config: Config) -> tuple[str, ...]:
    return config.data or ("checkerboard",)


def chosen_methods(config: Config) -> list[str]:
    known = identities(config.identity, 1)
    without = ["WrongTangent", *(name for name in known if config.marginal and learns_from_pairs(known[name]))]
    return list(config.methods) or [method for method in methods(config.identity) if method not in without]


def cells(config: Config) -> list[Cell]:
    """All cells, in an order in which the seeds of one method, which compile the same program, are neither far apart
    nor neighbours. Methods whose paper's settings are not known have the common settings only, and the exact field is
    judged once."""
    known = identities(config.identity, 1)
    of_paper = [name for name, identity in known.items() if identity.facts.paper_settings is not None]
    kinds = [(settings, 1.0) for settings in config.settings]
    kinds += [("common", part) for part in config.shorter if "common" in config.settings]
    every = [
        Cell(data, method, seed, *kind)
        for data in chosen_data(config)
        for kind in kinds
        for seed in range(config.seeds)
        for method in chosen_methods(config)
        if kind[0] == "common" or method in of_paper
    ]
    return [cell for cell in every if cell.method != "Exact" or cell[2:] == (0, "common", 1.0)]


def steps_of(config: Config, cell: Cell) -> int:
    return max(round(cell.part * config.steps), 1)


def identity_of(config: Config, cell: Cell) -> mfx.AbstractIdentity | None:
    if cell.method == "WrongTangent":
        return mfx.MeanFlow(tangent_t=0)
    return identities(config.identity, steps_of(config, cell)).get(cell.method)


def is_stacked(data: str) -> bool:
    return copies_of(data) > 1


def batch_of(config: Config, data: str) -> int:
    return config.dit_batch if is_stacked(data) else config.batch


def learns_from_pairs(identity: mfx.AbstractIdentity | None) -> bool:
    """Whether a method needs x and eps themselves, and can take no other velocity."""
    return identity is not None and identity.facts.uses_pair


def objective(config: Config, cell: Cell) -> mfx.Objective:
    """The cell's objective, without what depends on the data: the velocity of `marginal`, the references."""
    identity = identity_of(config, cell)
    if cell.settings == "paper":
        assert identity is not None and identity.facts.paper_settings is not None
        return mfx.Objective(identity, **identity.facts.paper_settings)
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(*config.pair_times), at_data=config.at_data),
        boundary_times=mfx.LogitNormalTimes(*config.boundary_times),
        identity_share=Fraction(config.identity_share).limit_denominator(64) if identity else 0,
        weight=mfx.AdaptiveWeight(0.0 if learns_from_pairs(identity) else config.power, config.offset),
    )


def with_target(objective: mfx.Objective, config: Config, data: str) -> mfx.Objective:
    """The objective, regressing on a better velocity than the conditional one where the method can take it."""
    if config.marginal:
        velocity = exact.MarginalVelocity(distribution(config, data), PATH)
        return dataclasses.replace(objective, velocity=velocity)
    if config.references and not learns_from_pairs(objective.identity):
        stable_target = mfx.StableTarget(references_of(config, data), number=config.references)
        return dataclasses.replace(objective, stable_target=stable_target)
    return objective


def distribution(config: Config, data: str) -> toy_problems.Distribution:
    return distribution_of(data, config.blur, config.points)


@functools.cache
def references_of(config: Config, data: str) -> Float[Array, "references dim"]:
    """The points of which each step takes some: the same for all methods and seeds."""
    number = max(REFERENCES // copies_of(data), config.references)
    return exact.draw(distribution(config, data), number, jr.key(2**31 - 2))


@functools.cache
def _train_step(config: Config, cell: Cell) -> mfx.TrainStep:
    rate = config.dit_learning_rate if is_stacked(cell.data) else config.learning_rate
    warmup = 100
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, max(steps_of(config, cell), warmup + 1), rate / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule))
    average, loss = mfx.ExponentialAverage(config.decay), objective(config, cell)
    return mfx.TrainStep(loss, optimizer, [average], teacher=0 if loss.needs_teacher else None)


def train_step(config: Config, cell: Cell) -> mfx.TrainStep:
    """The step without the target, which depends on the data; one object for all seeds, whose program is then compiled
    once."""
    return _train_step(config, cell._replace(data=STACKED if is_stacked(cell.data) else "", seed=0))


class OnVectors(mfx.AbstractField):
    """A field of images of a shape (channels, height, width) that takes and returns vectors, channels last: both
    coordinates of a draw are channels of one pixel."""

    field: mfx.AbstractField
    shape: tuple[int, int, int]

    def __call__(self, z, r, t, condition=None, *, key=None):
        channels, *sides = self.shape
        u = self.field(jnp.moveaxis(z.reshape(*sides, channels), -1, 0), r, t, condition, key=key)
        return jnp.moveaxis(u, 0, -1).reshape(z.shape)


def make_field(config: Config, data: str, seed: int) -> mfx.AbstractField:
    """A network of one's own; or an MLP for two dimensions, a DiT for 64."""
    key, _ = jr.split(jr.key(seed))
    if config.network is not None:
        return run.own_network("network", config.network, (2 * copies_of(data),))(key=key)
    if is_stacked(data):
        shape, size = (4, 4, 4), mfx.DiTSize(config.dit_depth, config.dit_width, heads=3, patch=1)
        return OnVectors(mfx.DiT(shape, size, unroll=True, key=key), shape)
    return mfx.MLP(
        2,
        width=config.width,
        depth=config.depth,
        condition_width=config.condition_width,
        fourier_features=config.fourier_features,
        fourier_scale=config.fourier_scale,
        key=key,
    )


def training(config: Config, cell: Cell) -> run.Training | None:
    """What the cell trains, if anything."""
    if cell.method == "Exact":
        return None
    target = with_target(objective(config, cell), config, cell.data)
    step = dataclasses.replace(train_step(config, cell), objective=target)
    settings, (_, run_key) = recipe(config, cell), jr.split(jr.key(cell.seed))
    title = title_of(cell.data)
    name = f"{title}_{cell.method}_{cell.settings}_{steps_of(config, cell)}_{cell.seed}_{run.digest(settings)}"
    field = functools.partial(make_field, config, cell.data, cell.seed)
    draw = exact.Draw(distribution(config, cell.data), batch_of(config, cell.data))
    return run.Training(name, step, field, draw, steps_of(config, cell), run_key, settings)


JUDGING = ("samples", "large_samples", "rows")  # and new_noise, where it has an effect
CHOICE = ("data", "blur", "points", "network", "methods", "identity", "settings", "seeds", "steps", "shorter", "quick")


OF_MLP = ("batch", "width", "depth", "condition_width", "fourier_features", "fourier_scale", "learning_rate")
OF_DIT = ("dit_batch", "dit_width", "dit_depth", "dit_learning_rate")
OF_COMMON = ("identity_share", "pair_times", "at_data", "boundary_times", "power", "offset")


def recipe(config: Config, cell: Cell) -> dict[str, Any]:
    """Everything that the cell's training depends on but the code; of the exact field, its data set alone."""
    if cell.method == "Exact":
        return {"data": cell.data, "method": cell.method, **own_values(config, cell)}
    unused = {*JUDGING, "new_noise", *CHOICE, *(field.name for field in dataclasses.fields(run.CellSettings))}
    unused |= {*(OF_MLP if is_stacked(cell.data) else OF_DIT), *(OF_COMMON if cell.settings == "paper" else ())}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}
    own = own_methods(config.identity)[1] if config.identity is not None and cell.method not in methods() else None
    cell_values = {name: value for name, value in cell._asdict().items() if name != "part"}
    return {**cell_values, **values, "steps": steps_of(config, cell), "own": own, **own_values(config, cell)}


def own_values(config: Config, cell: Cell) -> dict[str, Any]:
    """What a recipe says of points and a network of one's own: nothing of other cells."""
    found: dict[str, Any] = {}
    if is_own(cell.data):  # the points that are taken, wherever their file lies
        points = toy_problems.mixture_of(cell.data, config.blur, config.points).mean
        found |= {"data": run.digest(np.asarray(points).tolist()), "blur": config.blur}
    if config.network is not None and cell.method != "Exact":
        cls = run.own_class("network", config.network, mfx.AbstractField)
        found["network"] = [cls.__name__, run.own_file("network", config.network).digest]
    return found


def key_of(config: Config, cell: Cell) -> dict[str, Any]:
    """What a judged cell is found by."""
    found = recipe(config, cell) | {name: getattr(config, name) for name in JUDGING}
    found["density"] = True  # older results have none
    share = new_noise_of(config, cell.method)
    return found | {"new_noise": share} if share else found


def ends_at_data(config: Config, method: str) -> bool:
    """Whether a method learns u(z, 0, t) alone, so that more than one evaluation takes new noise."""
    identity = identities(config.identity, 1).get(method)
    return identity is not None and identity.facts.ends_at_data


def new_noise_of(config: Config, method: str) -> float:
    """The share of new noise before further evaluations."""
    return 1.0 if ends_at_data(config, method) else config.new_noise


def field_of(cell: Cell, problem: Problem, state: mfx.TrainState | None) -> mfx.AbstractField:
    """The field that is judged."""
    if state is None:
        return problem.truth
    return Instantaneous(state.averages[0]) if cell.method == "FlowMatching" else state.averages[0]


ROUNDS, TIMED_STEPS = 3, 250


def measure_costs(config: Config, data: str, ledger: run.Ledger) -> dict[str, float]:
    """Seconds of CPU time of a step with the common settings, by method: the median of a few rounds of all methods in
    turn, in the middle of the training for those that change."""
    trainings = {c: training(config, c) for c in cells(config) if (c.data, *c[2:]) == (data, 0, "common", 1.0)}
    device = jax.devices()[0].device_kind
    keys = {
        cell.method: {"time of a step": recipe(config, cell), "device": device}
        for cell in trainings
        if cell.method != "Exact"
    }
    if any(key not in ledger for key in keys.values()):
        steps = min(TIMED_STEPS, config.steps)
        calls = {cell.method: repeated(made, steps) for cell, made in trainings.items() if made is not None}
        with run.Progress((ROUNDS + 1) * len(calls), shown=("seconds",)) as progress:
            progress.note(f"{data}: measuring the time of a step")
            times = measure.time_interleaved(calls, ROUNDS, report=progress.update)
        for name, measured in times.items():
            ledger.put(keys[name], {"cpu_seconds": measured.median_cpu / steps})
    return {name: ledger[key]["cpu_seconds"] for name, key in keys.items()}


def costs_of(config: Config, data: str, ledger: run.Ledger) -> dict[str, float]:
    """The result of `measure_costs`, if the quality at equal time is asked for, else nothing; measured once for all
    data sets of the same dimension."""
    same_size = next(name for name in chosen_data(config) if copies_of(name) == copies_of(data))
    return measure_costs(config, same_size, ledger) if config.shorter else {}


def repeated(training: run.Training, steps: int) -> Callable[[], Any]:
    """A function that does some steps in the middle of a training."""
    state = training.make_state()
    state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(training.steps // 2, state.step.dtype))

    def call() -> Any:
        nonlocal state
        state, metrics = mfx.scan_steps(training.step, state, training.draw, steps)
        return metrics

    return call


def main(config: Config) -> None:
    """Train every method on every data set, and hold it against the truth."""
    run.require("matplotlib", "safetensors")
    config = shrunk(config) if config.quick else config
    if config.test_run:
        config = dataclasses.replace(config, samples=100, large_samples=100, rows=20, log_every=1)
    with run.opened(config, shared="all") as directory:
        ledger = run.Ledger(directory.root / "cells.jsonl")
        train_missing(config, directory, ledger)
        report = run.RunDirectory(directory.root / run.digest(asked(config)))
        report.root.mkdir(exist_ok=True)
        text = write_report(config, directory, ledger, report)
        seconds = time.perf_counter() - directory.opened
        print(f"{text}\n\n{seconds:.0f} seconds. Pictures, weights, results.md and results.json are in {report.root}.")


def asked(config: Config) -> dict[str, Any]:
    """What the report is of: the script's own fields."""
    common = {field.name for field in dataclasses.fields(run.CellSettings)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in common}


@functools.cache
def problem_of(config: Config, data: str) -> Problem:
    print(f"{data}: integrating the truth at {3 * config.rows} points", flush=True)
    same = {"blur": config.blur, "points": config.points}
    return make_problem(data, samples=config.samples, rows=config.rows, **same)


def train_missing(config: Config, directory: run.RunDirectory, ledger: run.Ledger) -> None:
    """Train and judge the cells that are not in the ledger."""
    missing = [cell for cell in cells(config) if key_of(config, cell) not in ledger]
    trainings = {cell: training(config, cell) for cell in missing}
    print(f"{len(cells(config))} cells, {len(cells(config)) - len(missing)} of them finished before", flush=True)
    run.announce(config, trainings, directory)
    for data in dict.fromkeys(cell.data for cell in missing):
        problem_of(config, data)
        costs_of(config, data, ledger)  # before the trainings, which then use the same programs

    def judge_cell(cell: Cell, state: mfx.TrainState | None) -> dict[str, Any]:
        problem = problem_of(config, cell.data)
        faults = 0 if state is None else int(state.faults.total)
        field, new_noise = field_of(cell, problem, state), new_noise_of(config, cell.method)
        return judge(problem, field, config.large_samples, new_noise) | {"faults": faults}

    def note(cell: Cell, result: dict[str, Any]) -> str:
        ledger.put(key_of(config, cell), result)
        return (
            f"{' '.join(map(str, cell))}: error of u {result['overall']:.3g}, at (0, 1) {result['one_step']:.3g}; "
            f"sliced W2 at one evaluation {result['quality'][0]['sliced_wasserstein']:.3g}, "
            f"KL {result['density']['divergence']:.3g}"
        )

    run.train_cells(config, trainings, judge_cell, directory, note=note)


def write_report(config: Config, directory: run.RunDirectory, ledger: run.Ledger, report: run.RunDirectory) -> str:
    """Tables and pictures of everything that was asked for. Returns the tables."""
    results = {cell: ledger[key_of(config, cell)] for cell in cells(config)}
    texts, panels = [], {}
    at_data = [name for name in identities(config.identity, 1) if ends_at_data(config, name)]
    for data in chosen_data(config):
        entries = [
            toy_report.Entry(cell, steps_of(config, cell), found)
            for cell, found in results.items()
            if cell.data == data
        ]
        costs = costs_of(config, data, ledger)
        panels[title_of(data)] = entries, costs
        at_best = floor(problem_of(config, data), config.large_samples)
        texts.append(toy_report.tables(title_of(data), entries, costs, at_best, at_data))
        toy_report.save_error_maps(report.path(f"{title_of(data)}_errors.png"), title_of(data), entries)
        save_pictures(config, data, directory, report)
    if any(costs for _, costs in panels.values()):
        toy_report.save_error_against_time(report.path("error_against_time.png"), panels)
    if config.new_noise:
        texts.append(f"Share of new noise before evaluations after the first: {config.new_noise:g}.")
    commits = sorted({str(ledger.commit(key_of(config, cell))) for cell in results})
    text = "\n\n".join([*texts, f"Commits: {', '.join(commits)}."])
    report.save_results(
        text, [{**cell._asdict(), "steps": steps_of(config, cell), **found} for cell, found in results.items()]
    )
    return text


def save_pictures(config: Config, data: str, directory: run.RunDirectory, report: run.RunDirectory) -> None:
    """Samples, flows and weights, of the first seed and settings. The fields are read from their checkpoints."""
    problem, kind = problem_of(config, data), (0, config.settings[0], 1.0)
    trainings = {cell: training(config, cell) for cell in cells(config) if cell.data == data and cell[2:] == kind}
    fields = run.train_cells(config, trainings, lambda cell, state: field_of(cell, problem, state), directory)
    shown = {cell.method: field for cell, field in fields.items()}
    toy_report.save_pictures(report, problem, shown, {name: new_noise_of(config, name) for name in shown})
    for cell, field in fields.items():
        if cell.method != "Exact":
            save_weights(config, cell, field, report)


def save_weights(config: Config, cell: Cell, field: mfx.AbstractField, report: run.RunDirectory) -> None:
    """The averaged network, with what brings its samples back to the unit of a file of points."""
    network = field.field if isinstance(field, Instantaneous) else field
    unit = read_points(cell.data, config.points) if is_own(cell.data) else None
    notes = checkpoint.Notes(
        trained=objective(config, cell).trained,
        steps=steps_of(config, cell),
        decay=config.decay,
        mean=None if unit is None else unit.mean,
        std=None if unit is None else unit.size,
    )
    path = report.path(f"{title_of(cell.data)}_{cell.method}.safetensors")
    about = {"data": title_of(cell.data)}
    if config.network is not None:  # which does not tell it
        about |= {"data_shape": (2 * copies_of(cell.data),)}
    checkpoint.save_weights(path, network, about, notes)


PLAIN = Config(
    data=("eight_gaussians", "checkerboard"),
    methods=("FlowMatching", "ImprovedMeanFlow", "MeanFlow", "Shortcut", "SplitMeanFlow", "Exact"),
    settings=("common",),
    seeds=2,
    steps=5000,
    shorter=(),
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
    "default": ("all methods on the checkerboard", Config()),
    "full": (
        "all methods on four data sets, three seeds",
        Config(data=("eight_gaussians", "checkerboard", "two_spirals", STACKED), seeds=3),
    ),
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
