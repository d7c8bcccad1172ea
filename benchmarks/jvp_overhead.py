"""What does the JVP cost? Training steps of every variant against Flow Matching's.

    python benchmarks/jvp_overhead.py --quick               a small DiT, under 2 minutes on 2 CPU cores
    python benchmarks/jvp_overhead.py --preset paper        DiT-B/4 at batch 256, the paper's own measurement
    python benchmarks/jvp_overhead.py --preset accelerator  B/4, B/2, XL/2 in bfloat16, for one large GPU
    python benchmarks/jvp_overhead.py --model B/4 S/4 --batch 16 --remat none products full

A variant is one training step: loss, gradient, Adam, one average. The steps of all variants run in one process, in
rounds whose order changes, so compare ratios. The first value of each axis flag is the base; every other value is tried
with all other axes at the base, so that two axes of three values are five settings and not nine.

An overhead in percent means nothing without what the step does with the machine: a step that waits most of its time
hides any JVP. So beside times there are the operations, by formula and as XLA counts them; the utilisation of what
matrix products reach on the same machine; and the fit time = c + k x operations over the variants, where c is the fixed
cost of a step (optimiser, dispatch, small kernels) and k the price of an operation. (XLA counts loss and gradient
without loops and remat, in float32; the formula counts the step that is timed.)

README.md beside this file has figures.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx
from mf_eqx import nn, run

SHAPE, LABELS = (4, 32, 32), 1000
MLP_SHAPE = (2,)
SIZES = {
    "tiny": mfx.DiTSize(depth=2, width=384, heads=6, patch=4),
    "S/4": mfx.DIT_S4,
    "S/2": mfx.DIT_S2,
    "B/4": mfx.DIT_B4,
    "B/2": mfx.DIT_B2,
    "M/2": mfx.DIT_M2,
    "L/2": mfx.DIT_L2,
    "XL/2": mfx.DIT_XL2,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FORMS = {"scan": 1, "unroll": True}
REMATS: dict[str, nn.Remat] = {
    "none": False,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of weights; attention is done again
    "full": True,
}
ATTENTIONS: dict[str, nn.AbstractAttention] = {"xla": nn.XLAAttention(), "cudnn": nn.CudnnAttention()}


# What is compared


class Variant(NamedTuple):
    """A step: its objective, and its passes in units of one forward pass F of the whole batch (a backward pass is 2).

    `passes(tangent, share)`: `tangent` is the cost of a tangent pass, `share` that of the rows with r < t.
    """

    objective: mfx.Objective
    passes: Callable[[float, float], float]


def objective(identity: mfx.AbstractIdentity | None, share: Fraction, *, guided: bool = False) -> mfx.Objective:
    """The paper's settings. With share 1 a coin sets r = t as often as the split would, as in the authors' code."""
    coin = 0.75 if share == 1 else 0.0
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(equal=coin),
        identity_share=share,
        guidance=mfx.Guidance(scale=1.0, mix=0.5) if guided else None,
        label_dropout=mfx.LabelDropout(0.1, LABELS),
    )


QUARTER, EVERY = Fraction(1, 4), Fraction(1)
FLOW_MATCHING = "Flow Matching"
VARIANTS = {
    FLOW_MATCHING: Variant(objective(None, Fraction(0)), lambda T, s: 3),
    "MeanFlow on every row": Variant(objective(mfx.MeanFlow(), EVERY), lambda T, s: 3 + T),
    "MeanFlow": Variant(objective(mfx.MeanFlow(), QUARTER), lambda T, s: 3 + s * T),
    "stopped JVP": Variant(objective(mfx.MeanFlow(derivative=mfx.StoppedJVP()), QUARTER), lambda T, s: 3 + s * (1 + T)),
    "finite difference": Variant(
        objective(mfx.MeanFlow(derivative=mfx.CentralDifference()), QUARTER), lambda T, s: 3 + 2 * s
    ),
    "guided on every row": Variant(objective(mfx.MeanFlow(), EVERY, guided=True), lambda T, s: 3 + T + 2),
    "guided": Variant(objective(mfx.MeanFlow(), QUARTER, guided=True), lambda T, s: 3 + s * T + 1 + s),
    "ImprovedMeanFlow": Variant(objective(mfx.ImprovedMeanFlow(), QUARTER), lambda T, s: 3 + s * T + s),
    "SplitMeanFlow": Variant(objective(mfx.SplitMeanFlow(), QUARTER), lambda T, s: 3 + 2 * s),
}
FLOAT32_ONLY = ("finite difference",)


# What is asked for


@dataclasses.dataclass(frozen=True)
class Config:
    """A comparison. The first value of an axis is the base, the others are tried one at a time."""

    model: tuple[str, ...] = ("S/4",)
    """Axis: MLP, tiny (S/4 with 2 blocks), S/4, S/2, B/4, B/2, M/2, L/2, XL/2."""
    batch: tuple[int, ...] = (16,)
    """Axis: rows per step, multiples of 4."""
    dtype: tuple[str, ...] = ("float32",)
    """Axis: compute precision, float32 or bfloat16. Parameters are float32."""
    form: tuple[str, ...] = ("scan",)
    """Axis: scan (one compiled block) or unroll (no loop)."""
    remat: tuple[str, ...] = ("none",)
    """Axis: what the backward pass computes again: none, products (all but the products with weights), full."""
    attention: tuple[str, ...] = ("xla",)
    """Axis: xla or cudnn (NVIDIA GPUs, bfloat16)."""
    variant: tuple[str, ...] = tuple(VARIANTS)
    """What is compared with Flow Matching, by the names in the table."""
    rounds: int = 7
    """Rounds that are timed."""
    count: bool = True
    """Have XLA count operations, on small unrolled programs compiled for the CPU."""
    quick: bool = False
    """Take the small model at batch 16 and the first value of all other axes, whatever else is asked for."""
    name: str | None = None
    """Name of the run below runs/jvp_overhead/; by default the time of day."""

    def __post_init__(self):
        known = {
            "model": ("MLP", *SIZES),
            "dtype": DTYPES,
            "form": FORMS,
            "remat": REMATS,
            "attention": ATTENTIONS,
            "variant": VARIANTS,
        }
        for name, allowed in known.items():
            if not (values := getattr(self, name)):
                raise ValueError(f"{name} must be at least one of {', '.join(map(repr, allowed))}; got none")
            if wrong := [value for value in values if value not in allowed]:
                raise ValueError(f"{name} must be among {', '.join(map(repr, allowed))}; got {wrong[0]!r}")
        if not self.batch or min(self.batch) < 4 or any(batch % 4 for batch in self.batch):
            raise ValueError(f"batch must be positive multiples of 4, got {self.batch}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")
        for setting in settings(self):
            if setting.attention == "cudnn" and setting.dtype != "bfloat16":
                raise ValueError(f"attention cudnn must come with dtype bfloat16, got {setting.dtype}")
            if setting.model == "MLP" and setting[2:] != ("float32", "scan", "none", "xla"):
                raise ValueError(f"model MLP must come with float32, scan, remat none and xla, got {setting}")


class Setting(NamedTuple):
    """One value of every axis: what all variants have in common."""

    model: str
    batch: int
    dtype: str
    form: str
    remat: str
    attention: str

    def __str__(self) -> str:
        return (
            f"{self.model}, batch {self.batch}, {', '.join(self[2:4])}, remat {self.remat}, {self.attention} attention"
        )


def settings(config: Config) -> list[Setting]:
    """The base, and one axis at a time away from it."""
    base = Setting(*(getattr(config, axis)[0] for axis in Setting._fields))
    return [base, *(base._replace(**{a: value}) for a in Setting._fields for value in getattr(config, a)[1:])]


def variants(config: Config, setting: Setting) -> dict[str, Variant]:
    """Flow Matching first: everything is a ratio to it."""
    names = [FLOW_MATCHING, *(name for name in VARIANTS if name in config.variant and name != FLOW_MATCHING)]
    return {n: VARIANTS[n] for n in names if setting.dtype == "float32" or n not in FLOAT32_ONLY}


# Models and steps


def make_field(setting: Setting, *, depth: int | None = None, key: jax.Array) -> mfx.AbstractField:
    """The network of a setting, with another number of blocks if `depth` says so."""
    if setting.model == "MLP":
        return mfx.MLP(*MLP_SHAPE, labels=LABELS, key=key)
    size = SIZES[setting.model]
    return mfx.DiT(
        SHAPE,
        size if depth is None else size._replace(depth=depth),
        labels=LABELS,
        dtype=DTYPES[setting.dtype],
        remat=REMATS[setting.remat],
        attention=ATTENTIONS[setting.attention],
        unroll=FORMS[setting.form],
        key=key,
    )


def make_step(objective: mfx.Objective) -> mfx.TrainStep:
    return mfx.TrainStep(objective, optax.adam(1e-4, b2=0.95), [mfx.ExponentialAverage(0.9999)])


def make_state(setting: Setting, *, key: jax.Array) -> mfx.TrainState:
    step = make_step(VARIANTS[FLOW_MATCHING].objective)
    return mfx.init_state(make_field(setting, key=key), step.optimizer, step.averages, key=key)


def make_batch(setting: Setting, *, key: jax.Array) -> mfx.Batch:
    shape = MLP_SHAPE if setting.model == "MLP" else SHAPE
    labels = jr.randint(key, (setting.batch,), 0, LABELS)
    return mfx.Batch(jr.normal(key, (setting.batch, *shape)), labels)


# Operations


class Passes(NamedTuple):
    """Operations in matrix products for one row: a forward pass, and a tangent pass in units of it."""

    forward: float
    tangent: float


@functools.cache
def count_passes(model: str) -> Passes:
    """From the program of one row, as it is traced."""
    field = shapes_of(Setting(model, 1, "float32", "scan", "none", "xla"))
    row = jax.ShapeDtypeStruct(MLP_SHAPE if model == "MLP" else SHAPE, jnp.float32)
    time, label = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    forward = run.product_flops(lambda f, z, t, c: f(z, t, t, c), field, row, time, label)
    both = run.product_flops(lambda f, z, t, c: mfx.total_derivative(f, z, z, t, t, c), field, row, time, label)
    return Passes(forward, both / forward - 1)


def formula_flops(setting: Setting, variant: Variant) -> float:
    """Operations of a whole step's products."""
    forward, tangent = count_passes(setting.model)
    again = {"none": 0, "products": tangent - 1, "full": 1}[setting.remat]  # tangent - 1: the share of attention
    return setting.batch * forward * (variant.passes(tangent, float(variant.objective.identity_share)) + again)


@functools.cache
def xla_flops(model: str, name: str, rows: int = 16) -> float:
    """XLA's count for loss and gradient of so many rows, in float32.

    XLA counts the body of a loop once, and long programs compile for long: so it counts one and two blocks without a
    loop, and all other blocks cost what the second costs.
    """
    setting = Setting(model, rows, "float32", "unroll", "none", "xla")

    def gradient(field: mfx.AbstractField, x: jax.Array, label: jax.Array, key: jax.Array) -> Any:
        def loss(field: mfx.AbstractField) -> jax.Array:
            return VARIANTS[name].objective(field, mfx.Batch(x, label), key=key)[0]

        return eqx.filter_grad(loss)(field)

    def count(depth: int) -> float:
        x, label = jax.ShapeDtypeStruct((rows, *SHAPE), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
        inputs = (shapes_of(setting, depth), x, label, jr.key(0))
        return run.compile_program(gradient, *inputs, options=quick_options()).cost.flops

    depth = SIZES[model].depth
    with jax.default_device(jax.devices("cpu")[0]):
        two = count(2)
        return two if depth == 2 else two + (depth - 2) * (two - count(1))


@functools.cache
def quick_options() -> dict[str, str | bool] | None:
    """XLA's, for a program that is counted and never run: without the slow part of compiling, which comes after the
    passes that remove work."""
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    try:
        run.compile_program(lambda: jnp.zeros(()), options=options)
    except jax.errors.JaxRuntimeError:  # an XLA that does not know them
        return None
    return options


def shapes_of(setting: Setting, depth: int | None = None) -> mfx.AbstractField:
    """A network without its numbers."""
    return eqx.filter_eval_shape(lambda key: make_field(setting, depth=depth, key=key), jr.key(0))


# Measuring


class Measurement(NamedTuple):
    """One variant in one setting. `xla_ratio` is None where it was not counted, `times` where memory was too small,
    `peak_bytes` where the allocator says nothing or an earlier step needed as much."""

    setting: Setting
    name: str
    flops: float
    xla_ratio: float | None
    cost: run.Cost | None
    times: run.Times | None
    peak_bytes: int | None


def parts(config: Config, setting: Setting) -> int:
    """How many things `measure` reports: a program compiled, its operations counted, a step taken."""
    return len(variants(config, setting)) * (config.rounds + 3 + counted(config, setting))


def counted(config: Config, setting: Setting) -> bool:
    """Whether XLA's count, which is of a program without remat, belongs to this setting."""
    return config.count and setting.model != "MLP" and setting.remat == "none"


def measure(config: Config, setting: Setting, progress: run.Progress, done: int) -> list[Measurement]:
    """All variants in one setting, their steps interleaved on one state. Reports progress from `done` on."""

    def report(seconds: float) -> None:
        nonlocal done
        done += 1
        progress.update(done, {"seconds": seconds})

    chosen = variants(config, setting)
    state, batch = make_state(setting, key=jr.key(0)), make_batch(setting, key=jr.key(1))
    programs: dict[str, run.Program[tuple[mfx.TrainState, mfx.Metrics]]] = {}
    for name, variant in chosen.items():
        with telling_memory(progress, setting, name):
            programs[name] = run.compile_program(make_step(variant.objective), state, batch, donate=(0,))
            report(programs[name].cost.compile_seconds)

    def take(name: str) -> mfx.Metrics:
        nonlocal state
        state, metrics = programs[name](state, batch)
        return metrics

    peaks = {}
    # The allocator remembers the process's highest point: it belongs to the step that raises it, the smallest first.
    for name in sorted(programs, key=lambda name: programs[name].cost.temporary_bytes):
        with telling_memory(progress, setting, name):
            before = allocator_peak()
            jax.block_until_ready(take(name))
            peaks[name] = after if (after := allocator_peak()) != before else None
            report(0.0)
        if name not in peaks:  # the state went with it
            state = make_state(setting, key=jr.key(0))
    calls = {name: functools.partial(take, name) for name in chosen if name in peaks}
    times = run.time_interleaved(calls, config.rounds, progress=progress, done=done)
    done += len(calls) * (config.rounds + 1)
    ratios = {}
    for name in chosen if counted(config, setting) else ():
        began = time.perf_counter()
        ratios[name] = xla_flops(setting.model, name) / xla_flops(setting.model, FLOW_MATCHING)
        report(time.perf_counter() - began)
    return [
        Measurement(
            setting,
            name,
            formula_flops(setting, variant),
            ratios.get(name),
            programs[name].cost if name in programs else None,
            times.get(name),
            peaks.get(name),
        )
        for name, variant in chosen.items()
    ]


def allocator_peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@contextlib.contextmanager
def telling_memory(progress: run.Progress, setting: Setting, name: str) -> Iterator[None]:
    """Say that memory is too small, and go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        progress.note(f"{setting}: {name} needs more memory than there is")


class Fit(NamedTuple):
    """time = fixed + operations / rate, by least squares over the variants' medians."""

    fixed: float
    rate: float
    determination: float


def fit(measurements: list[Measurement]) -> Fit | None:
    """None with fewer than three different numbers of operations, or if no line with a cost of either kind fits."""
    points = [(m.flops, m.times.median) for m in measurements if m.times is not None]
    if len({flops for flops, _ in points}) < 3:
        return None
    flops, seconds = np.array(points).T
    slope, fixed = np.polyfit(flops, seconds, 1)
    if slope <= 0 or fixed < 0:
        return None
    left = np.sum((seconds - fixed - slope * flops) ** 2) / np.sum((seconds - seconds.mean()) ** 2)
    return Fit(float(fixed), float(1 / slope), float(1 - left))


# What is shown


def as_record(m: Measurement, peak: float) -> dict[str, Any]:
    """A measurement as JSON holds it."""
    times = m.times
    return {
        **m.setting._asdict(),
        "variant": m.name,
        "flops": m.flops,
        "xla_flops_ratio": m.xla_ratio,
        "matmul_peak": peak,
        "allocator_peak_bytes": m.peak_bytes,
        "wall_seconds": None if times is None else times.wall.tolist(),
        "cpu_seconds": None if times is None else times.cpu.tolist(),
        "cost": None if m.cost is None else dataclasses.asdict(m.cost),
    }


def ratio(m: Measurement, base: Measurement, clock: str) -> float | None:
    """Median over the rounds of this step's time over Flow Matching's in the same round."""
    if m.times is None or base.times is None:
        return None
    return float(np.median(getattr(m.times, clock) / getattr(base.times, clock)))


def tabulate(measurements: list[Measurement], peak: float) -> str:
    base = measurements[0]
    headers = [
        "step",
        "GFLOP",
        "/ FM",
        "XLA / FM",
        "ms",
        "least",
        "spread",
        "CPU ms",
        "time / FM",
        "CPU / FM",
        "of peak",
    ]
    headers += ["temporary MB", "allocator MB", "trace s", "lower s", "compile s"]
    rows = []
    for m in measurements:
        row: list[Any] = [
            m.name,
            f"{m.flops / 1e9:.1f}",
            f"{m.flops / base.flops:.3f}",
            m.xla_ratio and f"{m.xla_ratio:.3f}",
        ]
        if m.times is None:
            row += [None] * 7
        else:
            row += [f"{1e3 * m.times.median:.1f}", f"{1e3 * m.times.least:.1f}", f"{100 * m.times.spread:.0f}%"]
            row.append(f"{1e3 * m.times.median_cpu:.1f}")
            row += [f"{value:.2f}" if (value := ratio(m, base, c)) else None for c in ("wall", "cpu")]
            row += [f"{100 * m.flops / m.times.median / peak:.0f}%"]
        row += [m.cost and f"{m.cost.temporary_bytes / 1e6:.0f}", m.peak_bytes and f"{m.peak_bytes / 1e6:.0f}"]
        seconds = ("trace_seconds", "lower_seconds", "compile_seconds")
        rows.append([*row, *(m.cost and f"{getattr(m.cost, name):.2f}" for name in seconds)])
    return run.table(rows, headers)


def describe(measurements: list[Measurement], peak: float) -> str:
    """Heading, table and fit of one setting."""
    text = f"**{measurements[0].setting}**\n\n{tabulate(measurements, peak)}\n\n"
    text += f"Matrix products reach {peak / 1e9:.0f} GFLOP/s here."
    if (line := fit(measurements)) is not None and (times := measurements[0].times) is not None:
        text += (
            f" Fit: {1e3 * line.fixed:.1f} ms + GFLOP / {line.rate / 1e9:.0f} s (R² {line.determination:.3f}): "
            f"{100 * line.fixed / times.median:.0f}% of a Flow Matching step is fixed cost."
        )
    return text


def save_figure(path: Path, groups: list[list[Measurement]]) -> None:
    """Per setting: times relative to Flow Matching beside operations, and time against operations with the fit."""
    with run.optional("matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.2 * len(groups)), dpi=100, layout="constrained")
    for (bars, plane), measurements in zip(figure.subplots(len(groups), 2, squeeze=False), groups, strict=True):
        known = [m for m in measurements if m.times is not None]
        if not known or known[0].name != FLOW_MATCHING:
            continue
        places = np.arange(len(known))
        shown = {
            "operations, formula": [m.flops / known[0].flops for m in known],
            "operations, XLA": [m.xla_ratio or math.nan for m in known],
            "wall time": [ratio(m, known[0], "wall") for m in known],
            "CPU time": [ratio(m, known[0], "cpu") for m in known],
        }
        for i, (label, values) in enumerate(shown.items()):
            bars.barh(places + 0.2 * (i - 1.5), values, 0.2, label=label)
        bars.set_yticks(places, [m.name for m in known])
        bars.invert_yaxis()
        bars.axvline(1, color="black", linewidth=0.8)
        bars.set(title=str(known[0].setting), xlabel="relative to Flow Matching")
        bars.legend(fontsize="small")
        bars.grid(axis="x", alpha=0.3)
        for m in known:
            assert m.times is not None
            low, high = np.quantile(m.times.wall, [0.25, 0.75])
            x, y = m.flops / 1e9, 1e3 * m.times.median
            plane.errorbar(x, y, [[y - 1e3 * low], [1e3 * high - y]], fmt="o", capsize=3, label=m.name)
        if (line := fit(known)) is not None:
            ends = np.array([0, max(m.flops for m in known)])
            plane.plot(ends / 1e9, 1e3 * (line.fixed + ends / line.rate), color="grey", linewidth=1)
        plane.set(xlabel="GFLOP in matrix products", ylabel="ms per step (median, quartiles)", xlim=(0, None))
        plane.set_ylim(0, None)
        plane.legend(fontsize="small")
        plane.grid(alpha=0.3)
    figure.savefig(path, format="png")


def main(config: Config) -> None:
    """Time the training steps of every variant against Flow Matching's."""
    began = time.perf_counter()
    with run.optional("matplotlib"):  # now rather than after the measurements
        importlib.import_module("matplotlib")
    config = shrunk(config) if config.quick else config
    if "cudnn" in config.attention and jax.default_backend() != "gpu":
        raise ValueError(f"attention must be xla without an NVIDIA GPU, got cudnn on {jax.default_backend()}")
    directory = run.RunDirectory.create(config, config.name)
    wanted = settings(config)
    groups, peaks, texts, done = [], {}, [], 0
    with run.Progress(sum(parts(config, setting) for setting in wanted)) as progress:
        for setting in wanted:
            progress.note(f"{setting}: {len(variants(config, setting))} steps")
            if setting.dtype not in peaks:
                peaks[setting.dtype] = run.matmul_peak(DTYPES[setting.dtype])
            groups.append(measure(config, setting, progress, done))
            done += parts(config, setting)
            texts.append(describe(groups[-1], peaks[setting.dtype]))
            records = [as_record(m, peaks[m.setting.dtype]) for group in groups for m in group]
            directory.save_results("\n\n".join(texts), records)  # after each: an interruption loses one
            gc.collect()
    save_figure(directory.path("jvp_overhead.png"), groups)
    print("\n\n".join(texts))
    print(f"\n{time.perf_counter() - began:.0f} seconds. Picture, results.md and results.json are in {directory.root}.")


def shrunk(config: Config) -> Config:
    """What `--quick` runs."""
    base = {"dtype": ("float32",), "form": ("scan",), "remat": ("none",), "attention": ("xla",)}
    return dataclasses.replace(config, model=("tiny",), batch=(16,), **base)


PRESETS = {
    "default": ("DiT-S/4 at batch 16", Config()),
    "paper": ("DiT-B/4 at batch 256, float32: the paper's measurement", Config(model=("B/4",), batch=(256,))),
    "accelerator": (
        "B/4, B/2 and XL/2 in bfloat16 at batch 256, with remat, cuDNN attention and float32 beside the base",
        Config(
            model=("B/4", "B/2", "XL/2"),
            batch=(256,),
            dtype=("bfloat16", "float32"),
            remat=("none", "full"),
            attention=("xla", "cudnn"),
            rounds=15,
        ),
    ),
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
