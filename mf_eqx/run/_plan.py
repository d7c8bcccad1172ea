"""What a run requires, before it runs: operations, memory, disk, and the placement of its arrays."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from .._batch import Batch
from .._sharding import arrays_of
from .._train import TrainStep
from .._train_state import TrainState
from ..data import Stream
from ..measure import compile_program, product_flops
from ._directory import as_json
from ._progress import Work
from ._settings import Settings
from ._table import table

_PEAK_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "B200": 2250,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Peak rates of dense products in bfloat16 (V100: float16), by the makers' data sheets."""


def peak_flops() -> float | None:
    """Peak operations per second of all devices together; None if the devices are not known."""
    kind = jax.devices()[0].device_kind
    known = [name for name in _PEAK_TFLOPS if f"{name} " in f"{kind.replace('-', ' ')} "]
    return jax.device_count() * _PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def work_of_step(step: TrainStep, make_state: Callable[[], TrainState], stream: Stream) -> Work:
    """The work that the progress line counts. Operations are counted if the peak is known: it takes seconds."""
    if (peak := peak_flops()) is None:
        return Work(stream.batch)
    try:
        flops = flops_of_step(step, eqx.filter_eval_shape(make_state), batch_shapes(stream))
    except ValueError:  # a loop with an unknown number of iterations
        return Work(stream.batch)
    return Work(stream.batch, flops, peak)


def flops_of_step(step: TrainStep, state: TrainState, batch: Batch) -> int:
    """Floating-point operations of the products in one step's gradient.

    **Arguments:** `step`; `state` and `batch` arrays or their shapes.
    """

    def gradient(state: TrainState, batch: Batch, key: Any) -> Any:
        if step.prepare is not None:
            batch = jax.vmap(step.prepare)(batch, jr.split(key, batch.index.shape[0]))

        def loss(field: Any) -> Any:
            return step.objective.evaluate(field, batch, state.objective, key=key, context=step.context(state))[0]

        return eqx.filter_grad(loss)(state.field)

    return product_flops(gradient, state, batch, jax.eval_shape(lambda: jr.key(0)))


def batch_shapes(stream: Stream) -> Batch:
    """The shapes of a global batch."""

    source, rows = stream.source, stream.batch

    def make() -> Batch:
        label = None if source.labels is None else jnp.zeros(rows, jnp.int32)
        other = jax.tree.map(lambda like: jnp.zeros((rows, *like.shape), like.dtype), source.row_condition)
        condition = other if label is None else label
        return Batch(jnp.zeros((rows, *source.row_shape), source.dtype), condition, jnp.arange(rows, dtype=jnp.int32))

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=stream.sharding), jax.eval_shape(make)
    )


def plan_of_training(
    config: Settings, step: TrainStep, make_state: Callable[[], TrainState], stream: Stream, steps: int
) -> str:
    """A text with the configuration, parameters, placement of arrays, and memory. The step is compiled, not run."""
    state = eqx.filter_eval_shape(make_state)
    lines = [
        json.dumps(as_json(config), indent=2),
        "",
        f"{type(state.field).__name__} with {parameters(state):,} parameters, {steps:,} steps of {stream.batch} rows "
        f"from {stream.source.name} ({len(stream.source):,} rows)",
        devices(),
        "",
        *_placements(step, state),
        "",
        memory(step, state, batch_shapes(stream)),
    ]
    return "\n".join(lines)


def check_disk(folder: Path, config: Settings, state: TrainState, saved: Sequence[int], start: int, steps: int) -> None:
    """Refuses a disk that has no space for what a run will write.

    These are the checkpoints that will exist at the same time, of which there is one more while the newest is written,
    and the averages, which most scripts export at the end.

    **Arguments:** `folder` of the run; `config`; `state` its shapes; `saved` the steps of the checkpoints that there
    are already; `start` and `steps` the numbers of the first and the last step of this session.
    """
    each, number = bytes_of(state), _more_checkpoints(config, saved, start, steps)
    needed = number * each + bytes_of(state.averages)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        what = f"{number} more checkpoints of {size(each)} each, and for the averages"
        raise ValueError(f"{folder}: must have {size(needed)} of disk space for {what}, got {size(free)}")


def _more_checkpoints(config: Settings, saved: Sequence[int], start: int, steps: int) -> int:
    """How many more checkpoints there will be at once. Their number is largest while the last one is written: the
    `keep_last` before it are there, and of the older ones the multiples of `keep_every`."""
    first, last = start - start % config.save_every + config.save_every, config.keep_last
    new = range(first, steps, config.save_every)  # before the last one
    before, forever = len(saved) + len(new), 0
    if config.keep_every:
        newest, both = new[-last - 1] if len(new) > last else first - 1, math.lcm(config.save_every, config.keep_every)
        forever = sum(step % config.keep_every == 0 for step in saved[: max(before - last, 0)])
        forever += newest // both - (first - 1) // both
    return max(forever + min(last, before) + 1 - len(saved), 1)


def bytes_of(tree: Any) -> int:
    """The number of bytes of all arrays of a tree, or of arrays of these shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays_of(tree)))


def parameters(state: TrainState) -> int:
    """The number of learnt parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(state.field, _is_inexact)))


def devices() -> str:
    """A line that describes the devices."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)"


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _placements(step: TrainStep, state: TrainState) -> list[str]:
    """The table of shardings, large leaves first; leaves with the same shape, dtype and sharding share one line."""
    if step.parallelism is None:
        return ["all arrays are on one device"]
    mesh = " x ".join(f"{name} {size}" for name, size in step.parallelism.mesh.shape.items())
    groups: dict[Any, list[Any]] = {}
    for placement in step.parallelism.table(state):
        groups.setdefault((placement.shape, placement.dtype, placement.spec), []).append(placement)
    ordered = sorted(groups.values(), key=lambda group: -sum(leaf.bytes_per_device for leaf in group))
    rows = [
        (group[0].leaf, len(group), group[0].shape, group[0].dtype, group[0].spec, size(group[0].bytes_per_device))
        for group in ordered
    ]
    return [f"mesh: {mesh}", "", table(rows, ("leaf", "count", "shape", "dtype", "sharding", "bytes per device, each"))]


def memory(step: TrainStep, state: TrainState, batch: Batch) -> str:
    """A line on bytes per device, by XLA's analysis of the compiled step."""
    placed = state if step.parallelism is None else _with_shardings(state, step.parallelism.of_tree(state))
    cost = compile_program(step, placed, batch, donate=(0,)).cost
    total = cost.argument_bytes + cost.output_bytes - cost.donated_bytes + cost.temporary_bytes
    return (
        f"memory per device: {size(total)}, of which state and batch {size(cost.argument_bytes)}, intermediate results "
        f"{size(cost.temporary_bytes)}; the whole state: {size(bytes_of(state))}, and so each checkpoint on disk"
    )


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: (
            leaf if sharding is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        ),
        tree,
        shardings,
        is_leaf=lambda leaf: leaf is None,
    )


def size(count: int | float) -> str:
    """A readable number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
