"""Does a step ever wait for its data? Rows per second of every source, and the time that a training loop waits.

    python benchmarks/loader_throughput.py --quick         40 seconds on 2 busy CPU cores
    python benchmarks/loader_throughput.py                 CIFAR-10's size, 268 seconds on one of them

The rows are random pixels (3 x 32 x 32 bytes, with labels) that the script writes itself in every format; images are
PNG files. "take" reads random batches in one thread, "stream" is the whole pipeline: order, reading, checks, transfer.
The last three columns are of a training loop on that stream, with the step of a small DiT: the milliseconds per step
for which the loop waited because no batch was ready, the milliseconds of a whole step, and the share of waiting.

Files lie in the system's cache after the first pass: this measures code, not disks. README.md beside this file has
figures.
"""

import dataclasses
import importlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx
from mf_eqx import data, run

SHAPE, LABELS = (3, 32, 32), 10
SIZE = mfx.DiTSize(depth=2, width=128, heads=4, patch=4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sources to read."""

    rows: int = 50000
    """Rows of the data set."""
    images: int = 2000
    """Rows of the image folder, whose files take long to write."""
    batch: int = 256
    """Rows per batch."""
    batches: int = 200
    """Batches to read from each source."""
    steps: int = 30
    """Training steps on each source."""
    threads: int = 2
    """Threads that read ahead."""
    quick: bool = False
    """A tenth of the rows, batches of 64, 40 of them, 10 steps."""
    name: str | None = None
    """Name of the run below runs/loader_throughput/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, rows=10**7, images=10**7, batches=10**5, threads=1024)
        for name in ("rows", "images", "batch", "batches", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.quick and self.rows < 640:
            raise ValueError(f"rows must be >= 640 with quick, which takes a tenth of them, got {self.rows}")
        if self.batch > min(self.rows, self.images):
            raise ValueError(f"batch must be at most rows and images, {min(self.rows, self.images)}, got {self.batch}")
        if self.batch % 4:
            raise ValueError(f"batch must be a multiple of 4, got {self.batch}")


def shrunk(config: Config) -> Config:
    """What `--quick` runs."""
    sizes = {"rows": config.rows // 10, "images": 200, "batch": 64, "batches": 40}
    return dataclasses.replace(config, **sizes, steps=10, quick=False)


def make_sources(config: Config, folder: Path) -> Iterator[data.AbstractSource]:
    """The same rows in every format."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (config.rows, *SHAPE), np.uint8)
    label = rng.integers(0, LABELS, config.rows).astype(np.int32)
    memory = data.ArraySource(x, label, labels=LABELS, name="arrays in memory")
    yield memory
    np.save(folder / "x.npy", x)
    np.save(folder / "label.npy", label)
    yield named("one .npy file", data.NpySource(folder / "x.npy", folder / "label.npy", labels=LABELS))
    data.write_shards(memory, folder / "shards")
    yield named("shards with a manifest", data.ShardSource(folder / "shards"))
    write_array_record(folder / "x.array_record", x, label)
    yield named("ArrayRecord", data.ArrayRecordSource(folder / "x.array_record", labels=LABELS))
    write_images(folder / "images", x[: config.images], label)
    yield named("PNG files", data.ImageFolderSource(folder / "images", size=SHAPE[1]))


def named(name: str, source: data.AbstractSource) -> data.AbstractSource:
    source.name = name
    return source


def write_array_record(path: Path, x: np.ndarray, label: np.ndarray) -> None:
    with run.optional("array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row, value in zip(x, label, strict=True):
        content = io.BytesIO()
        np.savez(content, x=row, label=value)
        writer.write(content.getvalue())
    writer.close()


def write_images(folder: Path, x: np.ndarray, label: np.ndarray) -> None:
    with run.optional("PIL"):
        from PIL import Image
    for number, (row, value) in enumerate(zip(x, label, strict=False)):
        path = folder / str(value) / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.transpose(1, 2, 0)).save(path)


class Result(NamedTuple):
    """What was measured of one source."""

    source: str
    take: float
    """Rows per second."""
    stream: float
    """Rows per second."""
    wait: float
    """Milliseconds per step."""
    step: float
    """Milliseconds per step, with the wait."""


class StepAndState(NamedTuple):
    """A step and its state, compiled once."""

    step: mfx.TrainStep
    make_state: Callable[[], mfx.TrainState]


def make_training() -> StepAndState:
    prepare = data.InTurn([data.FromPixels(), data.RandomFlip()])
    optimizer = optax.adam(1e-4)
    step = mfx.TrainStep(mfx.Objective(), optimizer, prepare=prepare)
    field = mfx.DiT(SHAPE, SIZE, labels=LABELS, key=jr.key(0))
    return StepAndState(step, lambda: mfx.init_state(field, optimizer, key=jr.key(1)))


def measured(config: Config, source: data.AbstractSource, training: StepAndState) -> Result:
    rng = np.random.default_rng(1)
    chosen = [rng.integers(0, len(source), config.batch) for _ in range(config.batches)]
    take = seconds_of(lambda: [source.take(rows) for rows in chosen]) / config.batches
    stream = data.Stream(source, config.batch, threads=config.threads)
    batches = stream.batches()
    next(batches)  # threads have started
    through = seconds_of(lambda: jax.block_until_ready(list(itertools.islice(batches, config.batches))))
    wait, step = train(config, stream, training)
    rate = config.batch / take, config.batch * config.batches / through
    return Result(source.name, *rate, 1e3 * wait / config.steps, 1e3 * step / config.steps)


def seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def train(config: Config, stream: data.Stream, training: StepAndState) -> tuple[float, float]:
    """Seconds of waiting, and of everything, in a loop of steps after the first two."""
    state, wait, began = training.make_state(), 0.0, 0.0
    for number, batch in enumerate(waiting := Waiting(stream.batches(0, config.steps + 2))):
        if number == 2:
            jax.block_until_ready(state.step)
            wait, began = waiting.seconds, time.perf_counter()
        state, _ = training.step(state, batch)
        jax.block_until_ready(state.step)
    return waiting.seconds - wait, time.perf_counter() - began


class Waiting:
    """An iterator, and the seconds that were spent in it."""

    def __init__(self, batches: Iterator[mfx.Batch]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> mfx.Batch:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - began


def main(config: Config) -> None:
    """Read every source, and train on it."""
    began = time.perf_counter()
    importlib.import_module("grain")  # now rather than in the first measurement
    config = shrunk(config) if config.quick else config
    directory = run.RunDirectory.create(config, config.name)
    training = make_training()
    results = []
    with tempfile.TemporaryDirectory() as folder, run.Progress(5, doing="writing the data") as progress:
        for source in make_sources(config, Path(folder)):
            results.append(measured(config, source, training))
            progress.update(len(results), {"rows_per_second": results[-1].stream})
    headers = ("source", "take, rows/s", "stream, rows/s", "wait, ms per step", "step, ms", "share of waiting")
    rows = [
        (r.source, f"{r.take:,.0f}", f"{r.stream:,.0f}", f"{r.wait:.2f}", f"{r.step:.0f}", f"{r.wait / r.step:.2%}")
        for r in results
    ]
    text = run.table(rows, headers)
    directory.save_results(text, [row._asdict() for row in results])
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
