"""Where do the milliseconds of a step go? A profile of a training step, summed by kind of operation.

    python benchmarks/step_profile.py                                         a small DiT
    python benchmarks/step_profile.py --model XL/2 --batch 256 --dtype bfloat16 --variant guided

The profiler records each operation of the device. On a GPU that is each kernel, whose name says what it does; on a TPU
XLA states the kind; on a CPU it is each call of XLA, on whatever thread, so that the sum may exceed the time. The time
of an operation does not include the operations that began while it ran. "idle" is the time of a step in which the
device did nothing: it waited for the host, or for the memory of the next kernel. The profiler itself takes time, so
that the same steps are also timed without it. If memory is too small, the next remat that keeps less is taken.

README.md beside this file has figures.
"""

import dataclasses
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
from steps import (
    ATTENTIONS,
    check_device,
    DTYPES,
    make_batch,
    make_state,
    make_step,
    MODELS,
    out_of_memory,
    Setting,
    VARIANTS,
    with_less_memory,
)

from mf_eqx import measure, nn, run

KINDS = {
    "layout changes": r"nchwto|nhwcto",
    "attention kernels": r"fmha|flash|sdpa|mha_|attention_(?:value|query|key)",
    "collectives": r"nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective",
    "convolutions": r"conv(?!ert)|implicit_gemm|[dw]grad|winograd",
    "matrix products": r"gemm|dot|matmul|nvjet|cutlass|xmma|cublas|ynn|splitk",
    "copies": r"copy|memcpy|memset|transpose|concatenate|slice|pad|gather|scatter|data formatting",
    "reductions": r"reduc|softmax|norm",
    "random numbers": r"threefry|rng",
    "control": r"\b(while|conditional|call)\b",
    "other arithmetic": r"",
}
"""The first one whose pattern is found in the name of an operation is its kind."""
DEVICE = re.compile(r"^/device:(GPU|TPU):\d+$")
"""The name of a device's plane in a profile."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The step that is profiled."""

    model: str = "tiny"
    """MLP, tiny, S/4, S/2, B/4, B/2, M/2, L/2, XL/2, U-Net, U-Net tiny."""
    batch: int = 16
    """Rows per step, a multiple of 4."""
    dtype: str = "float32"
    """Compute precision, float32 or bfloat16."""
    remat: str = "none"
    """none, products, full: the first that is tried."""
    attention: str = "xla"
    """xla, cudnn (NVIDIA GPUs, bfloat16), chunked, pallas (NVIDIA GPUs)."""
    variant: str = "guided"
    """The step, by its name in `steps.py`."""
    steps: int = 3
    """Steps that are recorded."""
    names: int = 12
    """Operations that are shown by name, those that take most time."""
    name: str | None = None
    """Name of the run below runs/step_profile/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, batch=1 << 20, steps=100)
        run.check_among(self, model=MODELS, dtype=DTYPES, remat=nn.REMATS, attention=ATTENTIONS, variant=VARIANTS)
        if self.batch < 4 or self.batch % 4:
            raise ValueError(f"batch must be a positive multiple of 4, got {self.batch}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")


class Operation(NamedTuple):
    """One operation on one line of the profile, in nanoseconds: a stream of a GPU, a thread of a CPU."""

    name: str
    kind: str
    line: str
    start: float
    end: float


def timed(call: Any, steps: int) -> float:
    """The seconds of so many calls, each of which is waited for."""
    began = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(call())
    return time.perf_counter() - began


def recorded(call: Any, steps: int) -> tuple[list[Operation], float]:
    """The operations of so many calls, and the seconds that they took."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        seconds = timed(call, steps)
        jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return list(operations(jax.profiler.ProfileData.from_file(str(path)))), seconds


def operations(profile: Any) -> Iterator[Operation]:
    """What the first device did. **Raises:** `RuntimeError` if the profiler has not seen it."""
    planes = list(profile.planes)
    devices = sorted((plane for plane in planes if DEVICE.search(plane.name)), key=lambda plane: plane.name)
    if not devices and jax.default_backend() != "cpu":
        raise RuntimeError(f"the profiler saw no GPU or TPU, only {', '.join(plane.name for plane in planes)}")
    for plane in devices[:1] or [plane for plane in planes if plane.name == "/host:CPU"]:
        lines = list(plane.lines)
        # A TPU repeats its operations on lines for modules and steps, a GPU on lines that are derived from its streams.
        of_xla = [line for line in lines if line.name == "XLA Ops"]
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or of_xla or lines:
            for event in line.events:
                facts = dict(event.stats)
                if streams or of_xla or ("hlo_op" in facts and not event.name.startswith("end: ")):
                    name = f"{event.name} {facts.get('hlo_op', '')}".strip()
                    kind = str(facts.get("hlo_category") or name)
                    end = event.start_ns + event.duration_ns
                    yield Operation(event.name, kind_of(kind), line.name, event.start_ns, end)


def kind_of(name: str) -> str:
    """The kind of an operation by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def own_times(found: Iterable[Operation]) -> Iterator[tuple[Operation, float]]:
    """Each operation with its time in nanoseconds, without that of operations of its line that began while it ran.

    On a CPU those are inside of it. On a GPU kernels overlap, since a stream may run a graph of them. So the times of a
    line add up to the time in which something ran there.
    """
    lines: dict[str, list[Operation]] = defaultdict(list)
    for operation in sorted(found, key=lambda o: (o.start, -o.end)):
        lines[operation.line].append(operation)
    for line in lines.values():
        own, open_ones, now = [0.0] * len(line), list[int](), 0.0
        for number, start in enumerate([*(operation.start for operation in line), float("inf")]):
            while open_ones and now < start:
                last = open_ones[-1]  # the one that began last: the time belongs to it
                until = min(max(line[last].end, now), start)
                own[last] += until - now
                now = until
                if line[last].end <= now:
                    open_ones.pop()
            now = start
            open_ones.append(number)
        yield from zip(line, own, strict=True)


def busy(found: Iterable[Operation]) -> float:
    """Nanoseconds in which at least one operation ran."""
    total, until = 0.0, float("-inf")
    for operation in sorted(found, key=lambda o: o.start):
        total += max(operation.end - max(operation.start, until), 0.0)
        until = max(until, operation.end)
    return total


def sums(found: list[Operation], steps: int, key: str) -> dict[str, float]:
    """Milliseconds per step by `kind` or `name`, the largest first."""
    totals: dict[str, float] = defaultdict(float)
    for operation, nanoseconds in own_times(found):
        totals[getattr(operation, key)] += nanoseconds / 1e6 / steps
    return dict(sorted(totals.items(), key=lambda pair: -pair[1]))


def warmed_up(setting: Setting, variant: str) -> Any:
    """The compiled step as a call without arguments, after two steps."""
    state, batch = make_state(setting, key=jr.key(0)), make_batch(setting, key=jr.key(1))
    program = measure.compile_program(make_step(setting, variant), state, batch, donate=(0,))

    def take() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    timed(take, 2)
    return take


def fitting(setting: Setting, variant: str) -> tuple[Setting, Any]:
    """The step that memory is large enough for, with the least remat from that of the setting on."""
    *others, last = with_less_memory(setting)
    for each in others:
        try:
            return each, warmed_up(each, variant)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
        print(f"{each}: needs more memory than there is", flush=True)
    return last, warmed_up(last, variant)


def main(config: Config) -> None:
    """Profile a training step."""
    check_device(config.attention)
    setting = Setting(config.model, config.batch, config.dtype, remat=config.remat, attention=config.attention)
    directory = run.RunDirectory.create(config, config.name)
    setting, take = fitting(setting, config.variant)
    plain = 1e3 * timed(take, config.steps) / config.steps
    record = {**setting._asdict(), "variant": config.variant, "milliseconds": plain}
    text = f"**{setting}: {config.variant}**, {plain:.2f} ms per step"
    directory.save_results(text, [record])  # which holds if the profiler fails
    found, seconds = recorded(take, config.steps)
    per_step = 1e3 * seconds / config.steps
    kinds, names = sums(found, config.steps, "kind"), sums(found, config.steps, "name")
    idle = per_step - busy(found) / 1e6 / config.steps
    rows = [(kind, f"{ms:.2f}", f"{100 * ms / per_step:.1f}%") for kind, ms in [*kinds.items(), ("idle", idle)]]
    shown = [(name[:80], f"{ms:.2f}") for name, ms in list(names.items())[: config.names]]
    text += f", {per_step:.2f} ms with the profiler\n\n{run.table(rows, ('kind', 'ms', 'share'))}"
    text += f"\n\n{run.table(shown, ('operation', 'ms')) if found else 'The profiler saw no operation.'}"
    directory.save_results(text, [{**record, "profiled_milliseconds": per_step, "idle": idle, "kinds": kinds}])
    print(f"{text}\n\nResults are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
