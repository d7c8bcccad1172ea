"""What does the JVP cost? Training steps of MeanFlow and its variants against Flow Matching's.

    python benchmarks/jvp_overhead.py --quick               a small DiT, under 2 minutes on 2 CPU cores
    python benchmarks/jvp_overhead.py --preset paper        DiT-B/4 at batch 256, the paper's own measurement
    python benchmarks/jvp_overhead.py --preset cifar        the CIFAR-10 U-Net at batch 1024, share 0.75
    python benchmarks/jvp_overhead.py --preset accelerator  B/4, B/2, XL/2 in bfloat16, for one large GPU
    python benchmarks/jvp_overhead.py --model B/4 S/4 --batch 16 --remat none products full
    python benchmarks/jvp_overhead.py --network mine.py:Net --shape 3 64 64 --identity mine.py:Mix

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
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from steps import (
    ATTENTIONS,
    check_device,
    COMPARED,
    DITS,
    DTYPES,
    ENGINES,
    FLOAT32_ONLY,
    FLOW_MATCHING,
    FORMS,
    formula_flops,
    make_batch,
    make_state,
    make_step,
    MODELS,
    out_of_memory,
    own_network,
    Setting,
    UNETS,
    variant_of,
    VARIANTS,
    xla_flops,
)

import mf_eqx as mfx
from mf_eqx import measure, nn, picture, run

# What is asked for


@dataclasses.dataclass(frozen=True)
class Config:
    """A comparison. The first value of an axis is the base, the others are tried one at a time."""

    model: tuple[str, ...] = ("S/4",)
    """Axis: MLP; the DiTs tiny (S/4 with 2 blocks), S/4, S/2, B/4, B/2, M/2, L/2, XL/2; U-Net (of the CIFAR-10
    experiment, with labels and without dropout), U-Net tiny."""
    batch: tuple[int, ...] = (16,)
    """Axis: rows per step, multiples of 4 for the default share."""
    dtype: tuple[str, ...] = ("float32",)
    """Axis: compute precision, float32 or bfloat16. Parameters are float32."""
    form: tuple[str, ...] = ("default",)
    """Axis: scan (one compiled block), unroll (no loop), default (the network's own: for a DiT see
    `nn.known_unroll`, unroll for a U-Net)."""
    remat: tuple[str, ...] = ("none",)
    """Axis: what the backward pass computes again: none, products (all but products with weights and convolutions),
    full."""
    attention: tuple[str, ...] = ("xla",)
    """Axis: xla, cudnn (NVIDIA GPUs, bfloat16), chunked (blocks of keys), pallas (NVIDIA GPUs). The formula counts the
    operations of xla."""
    share: tuple[float, ...] = (0.25,)
    """Axis: share of rows with r < t, in (0, 0.9]; 0.25 for ImageNet, 0.75 for CIFAR-10."""
    variant: tuple[str, ...] = COMPARED
    """Steps that are compared with Flow Matching, by their names in the table, or methods of mf_eqx by their names. By
    default only one of the methods that cost the same."""
    network: str | None = None
    """A network of your own in place of `model`, as mine.py:Net: a subclass of mf_eqx.AbstractField that is made as
    Net(shape, key=key), as Net(size, key=key) where the shape is one number. Its conditions are labels from 0 to 999,
    1000 for "no label", which it may ignore. XLA's count, which needs programs without loops, is left out."""
    shape: tuple[int, ...] = ()
    """Shape of one row for the network of --network, such as 3 64 64."""
    identity: str | None = None
    """A method of your own besides `variant`, as mine.py:Mix: a subclass of mf_eqx.AbstractIdentity that can be made
    without arguments. If its facts do not state its passes, its program is counted as it is traced."""
    rounds: int = 7
    """Rounds that are timed."""
    count: bool = True
    """Have XLA count operations, on unrolled programs compiled for the CPU (of a DiT, with one and two blocks)."""
    quick: bool = False
    """Take the model tiny and the default of every other axis, whatever is given for them, and leave out the stopped
    JVP and the finite difference."""
    name: str | None = None
    """Name of the run below runs/jvp_overhead/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, batch=1 << 20, shape=1 << 14)
        own_network(self.network, self.shape)
        run.check_among(self, model=MODELS, dtype=DTYPES, form=FORMS, remat=nn.REMATS, attention=ATTENTIONS)
        run.check_among(self, variant=VARIANTS)
        if not self.share or not all(0 < share <= 0.9 for share in self.share):
            raise ValueError(f"share must be numbers in (0, 0.9], got {self.share}")
        if not self.batch or min(self.batch) < 1:
            raise ValueError(f"batch must be positive numbers, got {self.batch}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")
        for setting in settings(self):
            if setting.attention == "cudnn" and setting.dtype != "bfloat16":
                raise ValueError(f"attention cudnn must come with dtype bfloat16, got {setting.dtype}")
            if setting.model == "MLP" and setting[3:6] != ("default", "none", "xla"):
                raise ValueError(f"model MLP must come with form default, remat none and attention xla, got {setting}")
            if self.network and setting[2:6] != ("float32", "default", "none", "xla"):
                raise ValueError(f"network must come with the default dtype, form, remat and attention, got {setting}")
            try:
                group = variant_of(self.identity or "MeanFlow", setting.share).objective.divisor
            except ValueError as error:
                raise ValueError(str(error).removeprefix("identity_")) from None
            if setting.batch % group:
                raise ValueError(
                    f"batch must be multiples of {group} with share {setting.share:g}, got {setting.batch}"
                )


def settings(config: Config) -> list[Setting]:
    """The base, and one axis at a time away from it."""
    axes = {axis: getattr(config, axis) for axis in Setting._fields}
    if (own := own_network(config.network, config.shape)) is not None:
        axes["model"] = (own,)
    base = Setting(*(values[0] for values in axes.values()))
    return [base, *(base._replace(**{axis: value}) for axis, values in axes.items() for value in values[1:])]


def chosen(config: Config, setting: Setting) -> list[str]:
    """Names of the steps, Flow Matching's first: everything is a ratio to it."""
    names = [name for name in VARIANTS if name in config.variant or name == FLOW_MATCHING]
    names += [] if config.identity is None else [config.identity]
    return [name for name in names if setting.dtype == "float32" or name not in FLOAT32_ONLY]


# Measuring


class Measurement(NamedTuple):
    """One variant in one setting. `xla_ratio` is None where it was not counted, `times` where memory was too small,
    `peak_bytes` where the allocator says nothing or an earlier step needed as much."""

    setting: Setting
    name: str
    flops: float
    xla_ratio: float | None
    cost: measure.Cost | None
    times: measure.Times | None
    peak_bytes: int | None


class Meter:
    """Progress, counted in programs compiled, operations counted and steps taken."""

    def __init__(self, progress: run.Progress):
        self.progress, self.done = progress, 0

    def report(self, seconds: float) -> None:
        """One of them is done."""
        self.done += 1
        self.progress.update(self.done, {"seconds": seconds})


def parts(config: Config, setting: Setting) -> int:
    """How much a `Meter` counts in one setting."""
    return len(chosen(config, setting)) * (config.rounds + 3 + counted(config, setting))


def counted(config: Config, setting: Setting) -> bool:
    """Whether XLA's count, which is of a program without remat, belongs to this setting."""
    return config.count and setting.model in (*DITS, *UNETS) and setting.remat == "none"


def measured(config: Config, setting: Setting, meter: Meter) -> list[Measurement]:
    """All variants in one setting, their steps interleaved on one state."""
    names = chosen(config, setting)
    state, batch = make_state(setting, key=jr.key(0)), make_batch(setting, key=jr.key(1))
    programs = compile_steps(names, setting, state, batch, meter)

    def take(name: str) -> mfx.Metrics:
        nonlocal state
        state, metrics = programs[name](state, batch)
        return metrics

    peaks: dict[str, int | None] = {}
    # The allocator remembers the process's highest point: it belongs to the step that raises it, the smallest first.
    for name in sorted(programs, key=lambda name: programs[name].cost.temporary_bytes):
        with telling_memory(meter.progress, setting, name):
            before = allocator_peak()
            jax.block_until_ready(take(name))
            peaks[name] = after if (after := allocator_peak()) != before else None
            meter.report(0.0)
        if name not in peaks:  # the state went with it
            state = make_state(setting, key=jr.key(0))
    calls = {name: functools.partial(take, name) for name in names if name in peaks}
    times = measure.time_interleaved(calls, config.rounds, report=meter.progress.update, done=meter.done)
    meter.done += len(calls) * (config.rounds + 1)
    ratios = count_ratios(names, setting, meter) if counted(config, setting) else {}
    return [
        Measurement(
            setting,
            name,
            formula_flops(setting, name),
            ratios.get(name),
            programs[name].cost if name in programs else None,
            times.get(name),
            peaks.get(name),
        )
        for name in names
    ]


def compile_steps(
    names: list[str], setting: Setting, state: mfx.TrainState, batch: mfx.Batch, meter: Meter
) -> dict[str, measure.Program[tuple[mfx.TrainState, mfx.Metrics]]]:
    """Those that memory is large enough for."""
    programs = {}
    for name in names:
        with telling_memory(meter.progress, setting, name):
            programs[name] = measure.compile_program(make_step(setting, name), state, batch, donate=(0,))
            meter.report(programs[name].cost.compile_seconds)
    return programs


def count_ratios(names: list[str], setting: Setting, meter: Meter) -> dict[str, float]:
    """Operations as XLA counts them, relative to Flow Matching's."""
    ratios, model = {}, setting.model
    assert isinstance(model, str)
    for name in names:
        began = time.perf_counter()
        operations = (xla_flops(model, each, setting.share) for each in (name, FLOW_MATCHING))
        ratios[name] = next(operations) / next(operations)
        meter.report(time.perf_counter() - began)
    return ratios


def allocator_peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@contextlib.contextmanager
def telling_memory(progress: run.Progress, setting: Setting, name: str) -> Iterator[None]:
    """Say that memory is too small, and go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
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
    times, shapes = m.times, jax.eval_shape(lambda: make_batch(m.setting, key=jr.key(0)))
    return {
        **m.setting._asdict(),
        "variant": m.name,
        "flops": m.flops,
        "xla_flops_ratio": m.xla_ratio,
        "matmul_peak": peak,
        "batch_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
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
    figure = picture.new_figure(12, 4.2 * len(groups))
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
        plane.set(xlabel="GFLOP in products and convolutions", ylabel="ms per step (median, quartiles)", xlim=(0, None))
        plane.set_ylim(0, None)
        plane.legend(fontsize="small")
        plane.grid(alpha=0.3)
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Time training steps against Flow Matching's."""
    began = time.perf_counter()
    run.require("matplotlib")
    config = shrunk(config) if config.quick else config
    check_device(*config.attention)
    directory = run.RunDirectory.create(config, config.name)
    wanted = settings(config)
    groups, peaks, texts = [], {}, []
    with run.Progress(sum(parts(config, setting) for setting in wanted)) as progress:
        meter = Meter(progress)
        for setting in wanted:
            progress.note(f"{setting}: {len(chosen(config, setting))} steps")
            if setting.dtype not in peaks:
                peaks[setting.dtype] = measure.matmul_peak(DTYPES[setting.dtype])
            began_at = meter.done
            groups.append(measured(config, setting, meter))
            meter.done = began_at + parts(config, setting)  # steps that found no memory, too
            texts.append(describe(groups[-1], peaks[setting.dtype]))
            records = [as_record(m, peaks[m.setting.dtype]) for group in groups for m in group]
            directory.save_results("\n\n".join(texts), records)  # after each: an interruption loses one
            gc.collect()
    save_figure(directory.path("jvp_overhead.png"), groups)
    print("\n\n".join(texts))
    print(f"\n{time.perf_counter() - began:.0f} seconds. Picture, results.md and results.json are in {directory.root}.")


def shrunk(config: Config) -> Config:
    """What `--quick` runs."""
    base = {field.name: field.default for field in dataclasses.fields(Config) if field.name in Setting._fields}
    variant = tuple(name for name in config.variant if name not in ENGINES)
    return dataclasses.replace(config, **{**base, "model": ("tiny",), "variant": variant or (FLOW_MATCHING,)})


PRESETS = {
    "default": ("DiT-S/4 at batch 16", Config()),
    "paper": ("DiT-B/4 at batch 256, float32: the paper's measurement", Config(model=("B/4",), batch=(256,))),
    "cifar": (
        "the CIFAR-10 U-Net with its share of 0.75 at batch 1024, float32 and bfloat16, for one large GPU",
        Config(model=("U-Net",), batch=(1024,), dtype=("float32", "bfloat16"), share=(0.75,)),
    ),
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
