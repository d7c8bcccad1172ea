"""How fast does it generate? Latents or images per second by one evaluation, over batch sizes.

    python benchmarks/sampling_throughput.py --quick                    under a minute on 2 CPU cores
    python benchmarks/sampling_throughput.py --model B/4 XL/2 --dtype bfloat16 --batch 1 16 256 1024
    python benchmarks/sampling_throughput.py --evaluations 1 2 4

x = eps - u(eps, 0, 1) for a batch of labelled noise, jitted. Guidance is inside the network, so that one evaluation is
all there is. Batch sizes and models are timed in rounds of changing order. Operations are those of matrix products and
convolutions; utilisation is held against what a large matrix product reaches on the same machine. The decoder from
latents to pixels is not part of it.

README.md beside this file has figures.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from steps import ATTENTIONS, check_device, count_passes, data_shape, DTYPES, LABELS, make_field, MODELS, Setting, UNETS

import mf_eqx as mfx
from mf_eqx import measure, picture, run


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks and batch sizes."""

    model: tuple[str, ...] = ("S/4", "B/4")
    """Networks: MLP, tiny, S/4, S/2, B/4, B/2, M/2, L/2, XL/2, U-Net, U-Net tiny."""
    batch: tuple[int, ...] = (1, 4, 16, 64)
    """Samples at a time."""
    evaluations: tuple[int, ...] = (1,)
    """Evaluations of the network per sample, on a uniform time grid."""
    dtype: str = "float32"
    """Compute precision, float32 or bfloat16."""
    attention: str = "xla"
    """xla, cudnn (NVIDIA GPUs, bfloat16), chunked (blocks of keys) or pallas (NVIDIA GPUs); an MLP has none."""
    rounds: int = 7
    """Rounds that are timed."""
    quick: bool = False
    """Take tiny and S/4 and batches of 1, 4, 16, whatever else is asked for."""
    name: str | None = None
    """Name of the run below runs/sampling_throughput/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, batch=1 << 20, evaluations=10**4)
        run.check_among(self, model=MODELS, dtype=DTYPES, attention=ATTENTIONS)
        for name in ("batch", "evaluations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive numbers, got {getattr(self, name)}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention cudnn must come with dtype bfloat16, got {self.dtype}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")


class Cell(NamedTuple):
    """What is timed."""

    model: str
    batch: int
    evaluations: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.evaluations} evaluation{'s' * (self.evaluations > 1)}"


def make_call(config: Config, cell: Cell, field: mfx.AbstractField) -> Any:
    """A function without arguments that generates one batch."""

    shape, times = data_shape(cell.model), mfx.uniform_times(cell.evaluations)
    unroll = cell.model in UNETS and jax.default_backend() == "cpu"  # convolutions in loops are slow there
    generator = mfx.Generator(field, jr.key(0), shape, times, LABELS, unroll=unroll)
    eps = jr.normal(jr.key(1), (cell.batch, *shape))
    return functools.partial(generator.from_noise, eps, jnp.arange(cell.batch) % LABELS)


def save_figure(path: Path, rates: dict[Cell, float]) -> None:
    """Samples per second against the batch size."""
    figure = picture.new_figure(6, 4)
    panel = figure.subplots()
    for model, evaluations in dict.fromkeys((cell.model, cell.evaluations) for cell in rates):
        points = sorted((c.batch, r) for c, r in rates.items() if (c.model, c.evaluations) == (model, evaluations))
        name = f"{model}, {evaluations} evaluation{'s' * (evaluations > 1)}"
        panel.plot(*zip(*points, strict=True), ".-", label=name)
    panel.set(xscale="log", yscale="log", xlabel="batch", ylabel="samples per second (median)")
    panel.set_xscale("log", base=2)
    panel.legend()
    panel.grid(alpha=0.3, which="both")
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Time sampling."""
    began = time.perf_counter()
    run.require("matplotlib")
    if config.quick:
        config = dataclasses.replace(config, model=("tiny", "S/4"), batch=(1, 4, 16))
    check_device(config.attention)
    directory = run.RunDirectory.create(config, config.name)
    peak = measure.matmul_peak(DTYPES[config.dtype])
    fields = {
        model: make_field(Setting(model, 1, config.dtype, attention=config.attention), key=jr.key(0))
        for model in config.model
    }
    cells = [Cell(*values) for values in itertools.product(config.model, config.batch, config.evaluations)]
    calls = {str(cell): make_call(config, cell, fields[cell.model]) for cell in cells}
    with run.Progress(len(cells) * (config.rounds + 1)) as progress:
        times = measure.time_interleaved(calls, config.rounds, report=progress.update)
    rows, rates, records = [], {}, []
    for cell in cells:
        measured = times[str(cell)]
        rates[cell] = cell.batch / measured.median
        flops = cell.batch * cell.evaluations * count_passes(cell.model).forward
        used = flops / measured.median / peak
        milliseconds = f"{1e3 * measured.median:.2f}"
        rows.append((*cell, milliseconds, f"{100 * measured.spread:.0f}%", rates[cell], f"{100 * used:.0f}%"))
        records.append({**cell._asdict(), "wall_seconds": measured.wall.tolist(), "flops": flops, "matmul_peak": peak})
    headers = ("network", "batch", "evaluations", "ms", "spread", "samples/s", "of peak")
    text = f"{run.table(rows, headers)}\n\nMatrix products reach {peak / 1e9:.0f} GFLOP/s here."
    directory.save_results(text, records)
    save_figure(directory.path("sampling_throughput.png"), rates)
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Picture and results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
