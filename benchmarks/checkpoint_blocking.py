"""How long does a checkpoint stop a training? Seconds that a save blocks, writes and loads, against the state's size.

    python benchmarks/checkpoint_blocking.py --quick            33 seconds on 2 busy CPU cores
    python benchmarks/checkpoint_blocking.py                    up to 1.6 GB of state, 113 seconds

A state here is parameters, Adam's two moments and one average, all float32: 16 bytes per parameter. "blocks" is what
`Checkpoints.save` takes before training goes on: digests on the device, the copy to the host, the start of writing;
"written" is when everything is on disk. "load" includes comparing structure and digests. "digests" is the time of
computing all digests once, which Orbax alone would not do; it is a part of "blocks" and of "load".

README.md beside this file has figures.
"""

import dataclasses
import importlib
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx
from mf_eqx import checkpoint, run


@dataclasses.dataclass(frozen=True)
class Config:
    """States to save."""

    megabytes: tuple[int, ...] = (10, 100, 400, 1600)
    """Sizes of the state."""
    rounds: int = 5
    """Timed saves of each state."""
    quick: bool = False
    """10 and 100 MB, three rounds."""
    name: str | None = None
    """Name of the run below runs/checkpoint_blocking/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, megabytes=10**5)
        if not self.megabytes or min(self.megabytes) < 1:
            raise ValueError(f"megabytes must be at least one number >= 1, got {self.megabytes}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")


class Result(NamedTuple):
    """Seconds, medians over rounds."""

    bytes: int
    leaves: int
    blocks: float
    written: float
    load: float
    digests: float


def make_state(megabytes: int) -> mfx.TrainState:
    """A DiT of about this size, in twelve blocks."""
    width = 4 * max(1, round((megabytes * 1e6 / 16 / (12 * 18)) ** 0.5 / 4))
    optimizer, averages = optax.adam(1e-4), [mfx.ExponentialAverage(0.9999)]
    field = mfx.DiT((4, 16, 16), mfx.DiTSize(12, width, 4, 4), labels=10, key=jr.key(0))
    return mfx.init_state(field, optimizer, averages, key=jr.key(1))


def measured(config: Config, megabytes: int, folder: Path) -> Result:
    state = make_state(megabytes)
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    checkpoints = checkpoint.Checkpoints(folder / str(megabytes), keep_last=1)
    jax.block_until_ready(arrays)
    found = []
    for step in range(config.rounds + 1):
        began = time.perf_counter()
        checkpoints.save(step, state)
        blocked = time.perf_counter()
        checkpoints.wait()
        written = time.perf_counter()
        checkpoint.digests(state)
        digested = time.perf_counter()
        checkpoints.load(lambda: make_state(megabytes))
        found.append((blocked - began, written - began, time.perf_counter() - digested, digested - written))
    size = sum(leaf.nbytes for leaf in arrays if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    return Result(size, len(arrays), *map(float, np.median(found[1:], axis=0)))  # the first compiles


def main(config: Config) -> None:
    """Save and load states."""
    began = time.perf_counter()
    importlib.import_module("orbax.checkpoint")  # now rather than in the first measurement
    if config.quick:
        config = dataclasses.replace(config, megabytes=(10, 100), rounds=3)
    directory = run.RunDirectory.create(config, config.name)
    results = []
    with (
        tempfile.TemporaryDirectory(dir=directory.root) as folder,
        run.Progress(len(config.megabytes), doing="saving") as progress,
    ):
        for megabytes in config.megabytes:
            results.append(measured(config, megabytes, Path(folder)))
            progress.update(len(results), {"blocks": results[-1].blocks})
    headers = ("state", "leaves", "blocks, s", "written, s", "load, s", "digests, s", "digests, GB/s")
    rows = [
        (f"{r.bytes / 1e6:,.0f} MB", r.leaves, *(f"{s:.3f}" for s in r[2:]), f"{r.bytes / 1e9 / r.digests:.2f}")
        for r in results
    ]
    text = run.table(rows, headers)
    directory.save_results(text, [row._asdict() for row in results])
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
