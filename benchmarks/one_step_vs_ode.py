"""Where does one step win? Average velocities against ODE solvers on the learnt v, by evaluations and by seconds.

    python benchmarks/one_step_vs_ode.py --quick     short trainings, fewer samplers
    python benchmarks/one_step_vs_ode.py             the trainings of toy_2d.py and digits.py
    python benchmarks/one_step_vs_ode.py --methods MeanFlow Shortcut

On a 2-D toy set (whose exact field is known, for the floor of the distance) and on handwritten digits, networks are
trained with one architecture and budget: one by each method, which knows u(z, r, t) and v(z, t) = u(z, t, t), and one
by Flow Matching, which knows only v. From the same noise:

- u in 1, 2, 4 steps of each method's network; only in 1 step where a method learns only u(z, 0, t);
- Euler, Heun (2 evaluations per step) and diffrax's adaptive Bosh3 and Tsit5 on v of every network.

Distances are those of the experiments: sliced Wasserstein-2 on the toy set, Frechet distance in raw pixels on digits.
Evaluations are per sample. Those of an adaptive solver are the mean over samples: 1 at the start, then 3 (Bosh3) or 6
(Tsit5) for each step that it tried, the first of size 0.1. Seconds are for `timed` samples in one batch, all samplers
timed in rounds of changing order; in a batch every sample waits for the slowest, as on any accelerator.

README.md beside this file has figures.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
import digits
import toy_2d
import toy_problems

import mf_eqx as mfx
from mf_eqx import measure, picture, run

FIXED = {"Euler": (mfx.sample_euler, 1), "Heun": (mfx.sample_heun, 2)}  # with evaluations per step
ADAPTIVE = {"Bosh3": (diffrax.Bosh3(), 3), "Tsit5": (diffrax.Tsit5(), 6)}  # with evaluations per step
FLOW_MATCHING = "Flow Matching"
# In the figure, by sampler: a colour says which network.
MARKERS = dict(zip(("u", *FIXED, *ADAPTIVE), "osx^v", strict=True))
LINES = dict(zip(MARKERS, ("-", "-", "--", "-.", ":"), strict=True))


@dataclasses.dataclass(frozen=True)
class Config:
    """A comparison of samplers."""

    data: tuple[str, ...] = ("checkerboard", "digits")
    """digits, and toy sets by the names of toy_2d.py."""
    methods: tuple[str, ...] = ("MeanFlow",)
    """Methods that learn an average velocity: the identities of mf_eqx by name. Each is trained as in toy_2d.py and
    digits.py; methods that learn from pairs of data and noise go without a target of less variance."""
    identity: str | None = None
    """A Python file with identities of your own, subclasses of mf_eqx.AbstractIdentity, which join the methods by their
    names."""
    toy_steps: int = toy_2d.Config.steps
    """Training steps on a toy set."""
    digits_steps: int = digits.Config.steps
    """Training steps on digits."""
    samples: int = 4000
    """Generated samples of a toy set; of digits there are as many as in the data."""
    euler: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of Euler steps."""
    heun: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of Heun steps, two evaluations each."""
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    """Relative and absolute tolerances of the adaptive solvers."""
    timed: int = 256
    """Samples at a time where seconds are measured."""
    rounds: int = 5
    """Rounds that are timed."""
    seed: int = 0
    """Seed of the trainings."""
    quick: bool = False
    """Train 600 steps on a toy set and 300 on digits, generate 1000 samples of a toy set, try fewer samplers, and time
    3 rounds."""
    name: str | None = None
    """Name of the run below runs/one_step_vs_ode/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, samples=10**6, euler=10**4, heun=10**4)
        run.check_among(self, data=("digits", *toy_problems.DATA), methods=toy_2d.identities(self.identity, 1))
        for name in ("euler", "heun", "tolerances"):
            if not getattr(self, name) or not min(getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive numbers, got {getattr(self, name)}")
        least = {"toy_steps": 1, "digits_steps": 1, "samples": 10, "timed": 1, "rounds": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        for name in self.data:  # what the experiments refuse, before anything trains
            check_digits(self) if name == "digits" else toy_settings(self, name)


# Samplers


class Sampler(NamedTuple):
    """A way from noise to samples: `generate(eps, condition)` returns them and the evaluations per sample."""

    family: str
    setting: str
    generate: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]

    def __str__(self) -> str:
        return f"{self.family}, {self.setting}"


def fixed(
    family: str, field: mfx.AbstractField, sampler: Callable[..., jax.Array], steps: int, per_step: int
) -> Sampler:
    @eqx.filter_jit
    def generate(eps: jax.Array, condition: Any) -> tuple[jax.Array, jax.Array]:
        one = functools.partial(sampler, field, times=mfx.uniform_times(steps))
        return jax.vmap(one)(eps, condition), jnp.asarray(steps * per_step)

    return Sampler(family, f"{steps} step{'s' * (steps > 1)}", generate)


def adaptive(family: str, field: mfx.AbstractField, name: str, tolerance: float) -> Sampler:
    solver, per_step = ADAPTIVE[name]
    control = diffrax.PIDController(rtol=tolerance, atol=tolerance)

    def one(eps: jax.Array, condition: Any) -> tuple[jax.Array, jax.Array]:
        def velocity(t: Any, z: jax.Array, _: None) -> jax.Array:
            return field(z, t, t, condition)

        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), solver, 1.0, 0.0, -0.1, eps, stepsize_controller=control, max_steps=1000
        )
        assert solved.ys is not None
        return solved.ys[-1], 1 + per_step * solved.stats["num_steps"]

    @eqx.filter_jit
    def generate(eps: jax.Array, condition: Any) -> tuple[jax.Array, jax.Array]:
        x, evaluations = jax.vmap(one)(eps, condition)
        return x, jnp.mean(evaluations)

    return Sampler(family, f"tolerance {tolerance:g}", generate)


def samplers(config: Config, fields: dict[str, mfx.AbstractField]) -> list[Sampler]:
    """Of the average velocities, then of v of every network."""
    methods, found = toy_2d.identities(config.identity, 1), []
    for network, field in fields.items():
        if network != FLOW_MATCHING:
            counts = (1,) if methods[network].facts.ends_at_data else (1, 2, 4)
            found += [fixed(f"u of {network}", field, mfx.sample, steps, 1) for steps in counts]
    for network, field in fields.items():
        for name, (sampler, per_step) in FIXED.items():
            counts = config.euler if name == "Euler" else config.heun
            found += [fixed(f"{name} on v of {network}", field, sampler, steps, per_step) for steps in counts]
        for name in ADAPTIVE:
            found += [adaptive(f"{name} on v of {network}", field, name, tol) for tol in config.tolerances]
    return found


def parts(family: str) -> tuple[str, str]:
    """The sampler of a family, which is "u" for the average velocity itself, and the network."""
    sampler, _, network = family.rpartition(" of ")
    return sampler.removesuffix(" on v"), network


# Problems


class Problem(NamedTuple):
    """Trained networks, noise, and how samples are judged."""

    name: str
    fields: dict[str, mfx.AbstractField]
    eps: jax.Array
    condition: Any
    distance: Callable[[jax.Array], float]
    distance_name: str
    floor: float
    floor_name: str


def toy_settings(config: Config, name: str) -> toy_2d.Config:
    """Those of toy_2d.py."""
    return toy_2d.Config(
        data=(name,),
        methods=(*config.methods, "FlowMatching"),
        identity=config.identity,
        settings=("common",),
        shorter=(),
        steps=config.toy_steps,
        samples=config.samples,
        rows=10,
        workers=1,
    )


def toy_problem(config: Config, name: str, directory: run.RunDirectory) -> Problem:
    toy = toy_settings(config, name)
    problem = toy_problems.make_problem(name, samples=toy.samples, rows=toy.rows)
    labels = (*config.methods, FLOW_MATCHING)
    cells = {
        label: toy_problems.Cell(name, method, config.seed) for label, method in zip(labels, toy.methods, strict=True)
    }
    trainings = {label: toy_2d.training(toy, cell) for label, cell in cells.items()}
    fields = run.train_cells(
        toy,
        trainings,
        lambda label, state: toy_2d.field_of(cells[label], problem, state),
        run.RunDirectory(directory.root / name),
    )
    eps = jr.normal(toy_problems.judged_keys().noise, problem.data.shape)

    def distance(x: jax.Array) -> float:
        return toy_problems.quality(problem, x).sliced_wasserstein

    floor = distance(toy_problems.generate(problem.truth, eps, 1))
    return Problem(name, fields, eps, None, distance, "sliced W2", floor, "exact average velocity, 1 step")


def digits_settings(config: Config) -> digits.Config:
    """Those of digits.py, with a warm-up and an average that are as much shorter as the training is."""
    whole, share = digits.Config(), config.digits_steps / digits.Config.steps
    warmup, decay = round(share * whole.warmup), whole.decay ** (1 / share)
    return dataclasses.replace(
        whole, steps=config.digits_steps, warmup=warmup, decay=decay, seed=config.seed, preview_every=0
    )


def digits_objectives(
    config: Config, settings: digits.Config, target: mfx.StableTarget | None = None
) -> dict[str, mfx.Objective]:
    """Of all networks, by name."""
    methods = toy_2d.identities(config.identity, settings.steps)
    found = {}
    for name in config.methods:
        allowed = None if methods[name].facts.uses_pair else target
        found[name] = digits.objective(settings, allowed, methods[name])
    return found | {FLOW_MATCHING: digits.flow_matching(settings, target)}


def check_digits(config: Config) -> None:
    """Refuses methods that cannot be trained on digits."""
    settings = digits_settings(config)
    for name, objective in digits_objectives(config, settings).items():
        if settings.batch % objective.divisor:
            rule = f"methods must take the batch of digits, {settings.batch}"
            raise ValueError(f"{rule}; got {name}, which takes multiples of {objective.divisor}")


def digits_problem(config: Config, directory: run.RunDirectory) -> Problem:
    settings = digits_settings(config)
    rows = digits.load(settings)
    judge, target, fields = digits.Judge(rows), digits.stable_target(settings, rows.train), {}
    for name, objective in digits_objectives(config, settings, target).items():
        method = digits.Method(name, objective, mfx.sample, (1,), shown=1)
        part = run.RunDirectory(directory.root / name.lower().replace(" ", "_"))
        fields[name] = digits.train(settings, method, rows.train, part)
    eps = jr.normal(jr.key(digits.JUDGED_SEED), rows.every.x.shape)

    def distance(x: jax.Array) -> float:
        return judge.frechet(digits.pixels(np.asarray(x)))

    floor = digits.references(rows, judge, config.seed)[0].frechet
    assert floor is not None
    label = jnp.asarray(rows.every.label)
    return Problem("digits", fields, eps, label, distance, "Frechet distance", floor, "two random halves of the data")


# Judging


class Point(NamedTuple):
    """One sampler on one problem."""

    data: str
    family: str
    setting: str
    evaluations: float
    seconds: float
    spread: float
    distance: float


def judge(config: Config, problem: Problem) -> list[Point]:
    wanted = samplers(config, problem.fields)
    inputs = jax.tree.map(lambda leaf: leaf[: config.timed], (problem.eps, problem.condition))
    calls = {str(s): functools.partial(s.generate, *inputs) for s in wanted}
    made = {}
    with run.Progress(len(wanted) * (config.rounds + 2)) as progress:
        for i, sampler in enumerate(wanted):
            made[str(sampler)] = jax.block_until_ready(sampler.generate(problem.eps, problem.condition))
            progress.update(i + 1, {})
        times = measure.time_interleaved(calls, config.rounds, report=progress.update, done=len(wanted))
    points = []
    for sampler in wanted:
        (x, evaluations), measured = made[str(sampler)], times[str(sampler)]
        seen = (float(evaluations), measured.median, measured.spread, problem.distance(x))
        points.append(Point(problem.name, sampler.family, sampler.setting, *seen))
    return points


def verdict(points: list[Point]) -> str:
    """What the cheapest solver, on v of any network, needs to be as near to the data as each average velocity."""
    lines, averages = [], [p for p in points if parts(p.family)[0] == "u"]
    for point in averages:
        rivals = [p for p in points if p not in averages and p.distance <= point.distance]
        text = f"{point.family} in {point.setting} ({point.distance:.3g}): "
        if not np.isfinite(point.distance):
            lines.append(text + "samples are not finite.")
            continue
        if not rivals:
            lines.append(text + "no solver on v of any network comes as near.")
            continue
        fewest, fastest = min(rivals, key=lambda p: p.evaluations), min(rivals, key=lambda p: p.seconds)
        lines.append(
            f"{text}{fewest.family} needs {fewest.evaluations / point.evaluations:.3g} times the evaluations "
            f"({fewest.evaluations:.3g}), {fastest.family} {fastest.seconds / point.seconds:.3g} times the seconds."
        )
    return "\n".join(f"- {line}" for line in lines)


def describe(problem: Problem, points: list[Point]) -> str:
    rows = [
        (p.family, p.setting, f"{p.evaluations:.4g}", f"{p.seconds:.4f}", f"{100 * p.spread:.0f}%", f"{p.distance:.3g}")
        for p in points
    ]
    table = run.table(rows, ("sampler", "", "evaluations", "seconds", "spread", problem.distance_name))
    floor = f"For comparison ({problem.floor_name}): {problem.floor:.3g}. {len(problem.eps)} samples."
    return f"**{problem.name}**\n\n{table}\n\n{floor}\n\n{verdict(points)}"


def save_figure(path: Path, judged: list[tuple[Problem, list[Point]]]) -> None:
    """Per problem: distance against evaluations and against seconds, a line per family, a colour per network."""
    with run.optional("matplotlib"):
        from matplotlib import colormaps
        from matplotlib.lines import Line2D
        from matplotlib.ticker import NullFormatter
    figure = picture.new_figure(12, 4.6 * len(judged))
    panels = figure.subplots(len(judged), 2, squeeze=False)
    networks = [name for name in judged[0][0].fields if name != FLOW_MATCHING]
    colour = colormaps["tab10" if len(networks) <= 10 else "tab20"]
    colours = {name: colour(i) for i, name in enumerate(networks)} | {FLOW_MATCHING: (0, 0, 0, 1)}

    def style_of(sampler: str) -> dict[str, Any]:
        width = 3 if sampler == "u" else 1
        return {"marker": MARKERS[sampler], "linestyle": LINES[sampler], "linewidth": width, "markersize": 4 + width}

    for row, (problem, points) in zip(panels, judged, strict=True):
        for panel, unit in zip(row, ("evaluations", "seconds"), strict=True):
            for family in dict.fromkeys(p.family for p in points):
                line = [(getattr(p, unit), p.distance) for p in points if p.family == family]
                sampler, network = parts(family)
                panel.plot(*zip(*line, strict=True), color=colours[network], **style_of(sampler))
            panel.axhline(problem.floor, color="grey", linestyle=":")
            panel.set(xscale="log", yscale="log", xlabel=unit, ylabel=problem.distance_name, title=problem.name)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3, which="both")
        legend = [Line2D([], [], color=colours[name], linewidth=3, label=name) for name in colours]
        for sampler in MARKERS:
            label = "u" if sampler == "u" else f"{sampler} on v"
            legend.append(Line2D([], [], color="grey", label=label, **style_of(sampler)))
        legend.append(Line2D([], [], color="grey", linestyle=":", label=problem.floor_name))
        row[1].legend(handles=legend, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4)
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Compare samplers."""
    began = time.perf_counter()
    run.require("matplotlib")
    if config.quick:
        fewer = {"euler": (1, 4, 16), "heun": (1, 4, 16), "tolerances": (1e-1, 1e-3), "rounds": 3}
        config = dataclasses.replace(config, toy_steps=600, digits_steps=300, samples=1000, **fewer)
    directory = run.RunDirectory.create(config, config.name)
    judged, texts = [], []
    for name in config.data:
        print(f"{name}: training {len(config.methods) + 1} networks", flush=True)
        problem = digits_problem(config, directory) if name == "digits" else toy_problem(config, name, directory)
        print(f"{name}: sampling", flush=True)
        judged.append((problem, judge(config, problem)))
        texts.append(describe(*judged[-1]))
        directory.save_results("\n\n".join(texts), [point._asdict() for _, points in judged for point in points])
    save_figure(directory.path("one_step_vs_ode.png"), judged)
    print("\n\n".join(texts))
    print(f"\n{time.perf_counter() - began:.0f} seconds. Picture and results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
