"""A tiny script of several small trainings, which tests run as a process: kill it, stop it, start it again."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import mf_eqx as mfx
from mf_eqx import run
from mf_eqx.checkpoint import digests
from mf_eqx.run import _cell_run


@dataclasses.dataclass(frozen=True)
class Config(run.CellSettings):
    """Tiny trainings."""

    steps: int = 12
    """Training steps of each."""
    cells: int = 3
    """How many."""


class Square(mfx.AbstractMeanObjective):
    """Mean squared output, at random times. An objective of the package would take seconds to compile."""

    def __call__(self, field, batch, *, key, context=None):
        times = jr.uniform(key, batch.x.shape[:1])
        losses = jax.vmap(lambda x, t: jnp.sum(field(x, t, t) ** 2))(batch.x, times)
        return jnp.mean(losses), {"loss": mfx.Mean(jnp.sum(losses), jnp.asarray(float(losses.size)))}


class Hidden(mfx.AbstractField):
    """A perceptron of one hidden layer."""

    inner: jax.Array
    outer: jax.Array

    def __init__(self, key):
        inner_key, outer_key = jr.split(key)
        self.inner, self.outer = jr.normal(inner_key, (4, 2)), jr.normal(outer_key, (2, 4))

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.outer @ jax.nn.silu(self.inner @ z + t)


class Draw(eqx.Module):
    """Standard normal rows, or NaN."""

    scale: jax.Array | float = 1.0

    def __call__(self, key):
        return mfx.Batch(self.scale * jr.normal(key, (8, 2)))


STEP = mfx.TrainStep(Square(), optax.adam(1e-2))


def training(seed=0, steps=12, name=None, draw=None, settings=None):
    """Of a seed."""
    field_key, key = jr.split(jr.key(seed))
    name = f"seed {seed}" if name is None else name
    return run.Training(name, STEP, functools.partial(Hidden, field_key), draw or Draw(), steps, key, settings)


def digest(state):
    return hashlib.sha256(json.dumps(digests(state)).encode()).hexdigest()


def judge(cell, state):
    return "nothing" if state is None else digest(state)


def main(config):
    """Train several networks."""
    pause, scan_steps = float(os.environ.get("PAUSE", "0")), _cell_run.scan_steps

    def slow(*arguments):
        if pause:
            pathlib.Path(os.environ["RUNS"], "a_part_has_begun").touch()
        time.sleep(pause)  # for signals to arrive at a known step
        return scan_steps(*arguments)

    _cell_run.scan_steps = slow
    trainings = {seed: training(seed, config.steps) for seed in range(config.cells)} | {"judged": None}
    with run.opened(config, root=os.environ.get("RUNS", "runs")) as directory:
        run.announce(config, trainings, directory)
        found = run.train_cells(config, trainings, judge, directory, note=lambda cell, _: f"# {cell} is done")
        directory.save_results("", [{"cell": cell, "digest": value} for cell, value in found.items()])
        run.tell("digest " + json.dumps(list(found.values())))


if __name__ == "__main__":
    run.main(main, Config())
