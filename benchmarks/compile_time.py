"""How long until the first step? Trace, lower and compile a MeanFlow step, against depth, scanned and unrolled.

    python benchmarks/compile_time.py --quick                  small networks, 90 seconds on one busy CPU core
    python benchmarks/compile_time.py                          B/4 and XL/2, also with remat
    python benchmarks/compile_time.py --model XL/2 --form scan --warm
    python benchmarks/compile_time.py --network mine.py:Net --shape 3 64 64 --identity mine.py:Mix

Nothing is run and no parameters are allocated: networks are shapes, so that XL/2 compiles on any machine. Each program
is compiled `repeats` times, programs in turn, without JAX's persistent cache; the first compilation of the process pays
for imports and is not counted. With --warm each is compiled once more from that cache, as in a run that is started
again. "lines" is the length of the lowered program, which for a scanned network does not grow with depth; "temporary"
is XLA's memory for intermediate results, "state" what a step donates to the next.

README.md beside this file has figures.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from steps import (
    data_shape,
    DITS,
    DTYPES,
    FLOW_MATCHING,
    FORMS,
    make_state,
    make_step,
    own_network,
    OwnNetwork,
    Setting,
    UNETS,
    variant_of,
    VARIANTS,
)

import mf_eqx as mfx
from mf_eqx import measure, nn, picture, run


@dataclasses.dataclass(frozen=True)
class Config:
    """Programs to compile: the product of model, form, remat and variant."""

    model: tuple[str, ...] = ("B/4", "XL/2")
    """Networks: tiny, S/4, S/2, B/4, B/2, M/2, L/2, XL/2, U-Net, U-Net tiny."""
    form: tuple[str, ...] = ("scan", "unroll")
    """scan (one compiled block), unroll (no loop), default (the network's own)."""
    remat: tuple[str, ...] = ("none",)
    """none, products, full."""
    variant: tuple[str, ...] = (FLOW_MATCHING, "MeanFlow", "guided")
    """Steps, by the names of `steps.py`."""
    network: str | None = None
    """A network of your own in place of `model`, `form` and `remat`, as mine.py:Net: a subclass of
    mf_eqx.AbstractField that is made as Net(shape, key=key), as Net(size, key=key) where the shape is one number. Its
    conditions are labels from 0 to 999, 1000 for "no label", which it may ignore."""
    shape: tuple[int, ...] = ()
    """Shape of one row for the network of --network, such as 3 64 64."""
    identity: str | None = None
    """A method of your own besides `variant`, as mine.py:Mix: a subclass of mf_eqx.AbstractIdentity that can be made
    without arguments."""
    batch: int = 16
    """Rows per step, a multiple of 4."""
    dtype: str = "float32"
    """Compute precision, float32 or bfloat16."""
    repeats: int = 3
    """Compilations of each program."""
    warm: bool = False
    """Compile each program once more, from JAX's persistent cache."""
    quick: bool = False
    """Take tiny and S/4 in place of `model` and MeanFlow in place of `variant`, and compile each program once."""
    name: str | None = None
    """Name of the run below runs/compile_time/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, batch=1 << 20, repeats=1000, shape=1 << 14)
        own_network(self.network, self.shape)
        run.check_among(self, model=(*DITS, *UNETS), form=FORMS, remat=nn.REMATS, variant=VARIANTS, dtype=DTYPES)
        if self.batch < 4 or self.batch % 4:
            raise ValueError(f"batch must be a positive multiple of 4, got {self.batch}")
        if self.identity is not None and self.batch % (group := variant_of(self.identity).objective.divisor):
            raise ValueError(f"batch must be a multiple of {group} for {self.identity}, got {self.batch}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be >= 1, got {self.repeats}")


class Cell(NamedTuple):
    """One program."""

    model: str | OwnNetwork
    form: str
    remat: str
    variant: str


def chosen(config: Config) -> list[Cell]:
    """The programs that are asked for."""
    own = own_network(config.network, config.shape)
    networks = (config.model, config.form, config.remat) if own is None else ((own,), ("default",), ("none",))
    variants = (*config.variant, *([] if config.identity is None else [config.identity]))
    return [Cell(*values) for values in itertools.product(*networks, variants)]


def compile_cell(config: Config, cell: Cell) -> measure.Cost:
    setting = Setting(cell.model, config.batch, config.dtype, cell.form, cell.remat)
    state = eqx.filter_eval_shape(lambda key: make_state(setting, key=key), jr.key(0))
    rows = jax.ShapeDtypeStruct((config.batch, *data_shape(cell.model)), jnp.float32)
    labels = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
    step = make_step(setting, cell.variant)

    def take(state: mfx.TrainState, x: jax.Array, label: jax.Array) -> Any:
        return step(state, mfx.Batch(x, label))

    jax.clear_caches()  # or the second time would trace nothing
    return measure.compile_program(take, state, rows, labels, donate=(0,)).cost


@contextlib.contextmanager
def persistent_cache() -> Iterator[None]:
    """JAX's persistent cache, empty at first, for programs of any size and compile time."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": folder}
        values |= {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
        before = {name: jax.config.values[name] for name in values}
        try:
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def save_figure(path: Path, costs: dict[Cell, list[measure.Cost]]) -> None:
    """A bar per program, in three parts."""
    figure = picture.new_figure(9, 0.4 * len(costs) + 1.2)
    panel, left = figure.subplots(), np.zeros(len(costs))
    for part in ("trace", "lower", "compile"):
        width = np.array([np.median([getattr(c, f"{part}_seconds") for c in many]) for many in costs.values()])
        panel.barh(range(len(costs)), width, left=left, label=part)
        left += width
    panel.set_yticks(range(len(costs)), [label(cell) for cell in costs])
    panel.invert_yaxis()
    panel.set(xlabel="seconds (median)", title="until the first step")
    panel.legend()
    panel.grid(axis="x", alpha=0.3)
    picture.save_figure(path, figure)


def label(cell: Cell) -> str:
    remat = "" if cell.remat == "none" else f", remat {cell.remat}"
    return f"{cell.model}, {cell.form}{remat}, {cell.variant}"


def results(
    config: Config, costs: dict[Cell, list[measure.Cost]], warm: dict[Cell, measure.Cost]
) -> tuple[str, list[dict[str, Any]]]:
    """What was found so far, as text and as records."""
    headers = ("step", "trace s", "lower s", "compile s", "sum", "lines", "temporary MB", "state MB", "donated")
    rows, records = [], []
    for cell, many in costs.items():
        for how, found in (("", many), (", from the cache", [warm[cell]] if cell in warm else [])):
            if found:
                rows.append((label(cell) + how, *shown(config, cell, found)))
                records += [{**cell._asdict(), "warm": bool(how), **dataclasses.asdict(cost)} for cost in found]
    return run.table(rows, headers), records


def shown(config: Config, cell: Cell, many: list[measure.Cost]) -> list[object]:
    """A row of the table: medians of the seconds, and what is the same each time."""
    seconds = [float(np.median([getattr(c, f"{p}_seconds") for c in many])) for p in ("trace", "lower", "compile")]
    cost, batch_bytes = many[0], 4 * config.batch * (math.prod(data_shape(cell.model)) + 1)
    state_bytes = cost.argument_bytes - batch_bytes
    numbers = [f"{value:.2f}" for value in (*seconds, sum(seconds))]
    megabytes = [f"{value / 1e6:.0f}" for value in (cost.temporary_bytes, state_bytes)]
    return [*numbers, cost.program_lines, *megabytes, f"{100 * cost.donated_bytes / state_bytes:.2f}%"]


def main(config: Config) -> None:
    """Compile training steps."""
    began = time.perf_counter()
    run.require("matplotlib")
    if config.quick:
        config = dataclasses.replace(config, model=("tiny", "S/4"), variant=("MeanFlow",), repeats=1)
    jax.config.update("jax_enable_compilation_cache", False)
    directory = run.RunDirectory.create(config, config.name)
    cells, warm, text = chosen(config), {}, ""
    costs: dict[Cell, list[measure.Cost]] = {cell: [] for cell in cells}
    total = len(cells) * (config.repeats + config.warm)
    with run.Progress(1 + total) as progress:
        compile_cell(config, Cell("tiny", "scan", "none", FLOW_MATCHING))
        progress.update(1, {})
        for i, cell in enumerate(cells * config.repeats):
            fills_cache = config.warm and i >= len(cells) * (config.repeats - 1)
            with persistent_cache() if fills_cache else contextlib.nullcontext():
                costs[cell].append(compile_cell(config, cell))
                if fills_cache:
                    warm[cell] = compile_cell(config, cell)
            progress.update(1 + sum(map(len, costs.values())) + len(warm), {"seconds": costs[cell][-1].compile_seconds})
            gc.collect()
            text, records = results(config, {c: many for c, many in costs.items() if many}, warm)
            directory.save_results(text, records)  # after each: an interruption loses one
    save_figure(directory.path("compile_time.png"), costs)
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Picture and results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
