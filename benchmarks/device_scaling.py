"""What does spreading a step over devices cost? Step and compile time against the number of devices.

    python benchmarks/device_scaling.py --quick             1 and 4 devices, 102 seconds on 2 busy CPU cores
    python benchmarks/device_scaling.py                     1, 2, 4 and 8, data parallel (189 seconds) and FSDP
    python benchmarks/device_scaling.py --real              the machine's own devices, for GPUs and TPUs

Without `--real` they are simulated CPU devices, in a process of their own for each number: they share the cores, so
that the same global batch takes the same work however it is spread, and only overhead grows. "collectives" are counted
in the compiled program.

README.md beside this file has figures.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np
import optax
from steps import count_collectives

import mf_eqx as mfx
from mf_eqx import measure, run

SIZES = {"small": mfx.DiTSize(2, 128, 4, 4), "S/4": mfx.DIT_S4, "B/4": mfx.DIT_B4, "XL/2": mfx.DIT_XL2}
SHAPE, LABELS = (4, 32, 32), 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """Meshes to measure."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    model: str = "small"
    """small, S/4, B/4, XL/2."""
    batch: int = 64
    """Rows of the global batch, a multiple of 4 times every number of devices."""
    rounds: int = 10
    """Steps to time."""
    real: bool = False
    """Use the machine's own devices, in this process."""
    quick: bool = False
    """1 and 4 devices, three steps."""
    cell: tuple[int, int] | None = None
    """Devices and fsdp of one measurement; what the script calls itself with."""
    name: str | None = None
    """Name of the run below runs/device_scaling/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, devices=1024, batch=1 << 20)
        run.check_among(self, model=SIZES)
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"devices must be at least one number >= 1, got {self.devices}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")
        for number in self.devices:
            if self.batch < 1 or self.batch % (4 * number):
                raise ValueError(f"batch must be a multiple of 4 x {number} devices, got {self.batch}")


class Result(NamedTuple):
    """One mesh."""

    devices: int
    fsdp: int
    seconds: float
    """Of a step, median."""
    spread: float
    cpu_seconds: float
    compile_seconds: float
    """To trace, lower and compile."""
    state_bytes: int
    """Per device."""
    temporary_bytes: int
    """Per device."""
    collectives: dict[str, int]


def measured(config: Config, devices: int, fsdp: int) -> Result:
    """One mesh, in this process."""
    parallelism = mfx.Parallelism(fsdp=fsdp, devices=jax.devices()[:devices])
    optimizer, averages = optax.adam(1e-4), [mfx.ExponentialAverage(0.9999)]
    step = mfx.TrainStep(mfx.Objective(), optimizer, averages, parallelism=parallelism)

    def make_state() -> mfx.TrainState:
        field = mfx.DiT(SHAPE, SIZES[config.model], labels=LABELS, key=jr.key(0))
        return mfx.init_state(field, optimizer, averages, key=jr.key(1))

    rng = np.random.default_rng(0)
    x = rng.standard_normal((config.batch, *SHAPE)).astype(np.float32)
    batch = parallelism.place(mfx.Batch(x, rng.integers(0, LABELS, config.batch).astype(np.int32)))
    state = parallelism.make(make_state)
    program = measure.compile_program(step, state, batch, donate=(0,))

    def once() -> jax.Array:
        nonlocal state
        state, _ = program(state, batch)
        return state.step

    times, cost = measure.time_interleaved({"step": once}, config.rounds, warm_up=2)["step"], program.cost
    placed = sum(placement.bytes_per_device for placement in parallelism.table(state))
    until_first = cost.trace_seconds + cost.lower_seconds + cost.compile_seconds
    return Result(
        devices,
        fsdp,
        times.median,
        times.spread,
        times.median_cpu,
        until_first,
        placed,
        cost.temporary_bytes,
        count_collectives(program),
    )


def measure_apart(config: Config, devices: int, fsdp: int) -> Result:
    """One mesh of forced devices, in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--cell", str(devices), str(fsdp), "--devices", str(devices)]
    command += ["--model", config.model, "--batch", str(config.batch), "--rounds", str(config.rounds)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise ValueError(f"devices {devices}, fsdp {fsdp} failed: {ended.stderr.strip().splitlines()[-1:]}")
    return Result(**json.loads(ended.stdout.splitlines()[-1]))


def cells(config: Config) -> list[tuple[int, int]]:
    """Each number of devices, data parallel, and all of them sharing one copy of the parameters."""
    return [(n, fsdp) for n in config.devices for fsdp in sorted({1, n})]


def report(results: list[Result]) -> str:
    """The table as text."""
    first, rows = results[0], []
    for r in results:
        ratios = f"{r.seconds / first.seconds:.2f}", f"{r.cpu_seconds / first.cpu_seconds:.2f}"
        sizes = f"{r.state_bytes / 1e6:.1f}", f"{r.temporary_bytes / 1e6:.0f}"
        counts = ", ".join(f"{count} {name}" for name, count in r.collectives.items()) or "none"
        rows.append(
            (
                r.devices,
                r.fsdp,
                f"{r.seconds:.3f}",
                *ratios,
                f"{r.spread:.0%}",
                f"{r.compile_seconds:.1f}",
                *sizes,
                counts,
            )
        )
    times = ("step, s", "/ one device", "CPU / one device", "spread", "compile, s")
    return run.table(rows, ("devices", "fsdp", *times, "state MB", "temporary MB", "collectives"))


def main(config: Config) -> None:
    """Time a training step on meshes."""
    if config.cell is not None:
        print(json.dumps(measured(config, *config.cell)._asdict()))
        return
    began = time.perf_counter()
    if config.quick:
        config = dataclasses.replace(config, devices=(1, 4), rounds=3)
    if config.real and jax.device_count() < max(config.devices):
        raise ValueError(f"devices must be at most the {jax.device_count()} that are here, got {max(config.devices)}")
    directory = run.RunDirectory.create(config, config.name)
    results = []
    with run.Progress(len(cells(config)), doing="compiling") as progress:
        for devices, fsdp in cells(config):
            results.append((measured if config.real else measure_apart)(config, devices, fsdp))
            progress.update(len(results), {"seconds": results[-1].seconds})
    text = report(results)
    directory.save_results(text, [row._asdict() for row in results])
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
