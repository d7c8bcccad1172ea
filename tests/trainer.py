"""A tiny training script, which tests run as a process: kill it, stop it, feed it bad things, start it again."""

import dataclasses
import functools
import hashlib
import json
import os
import time

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mf_eqx as mfx
from mf_eqx import data, run
from mf_eqx.checkpoint import digests


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    """A tiny run."""

    steps: int = 20
    """Training steps."""
    batch: int = 16
    """Rows per step."""
    width: int = 16
    """Of the network."""
    depth: int = 1
    """Its blocks."""
    half: bool = False
    """Compute in bfloat16."""
    sgd: bool = False
    """Instead of Adam, which hides a wrong scale of gradients."""
    share: float = 0.5
    """Of rows that carry the identity."""
    bad_steps: tuple[int, ...] = ()
    """Steps, counted from 0, whose rows become NaN on the device."""

    def __post_init__(self):
        self.check()
        mfx.check_batch_size(self.batch, mfx.Objective(identity_share=self.share).identity_share)


class Half(mfx.AbstractField):
    """A field computed in bfloat16; its parameters stay float32."""

    layers: eqx.nn.MLP

    def __init__(self, width, *, key):
        self.layers = eqx.nn.MLP(5, 2, width, depth=1, key=key)

    def __call__(self, z, r, t, condition=None, *, key=None):
        x = jnp.concatenate([z, jnp.stack([r, t, condition / 3])]).astype(jnp.bfloat16)
        return mfx.nn.cast(self.layers, jnp.bfloat16)(x).astype(z.dtype)


class Spoil(eqx.Module):
    """NaN instead of rows that are marked."""

    def __call__(self, row, key):
        x, spoiled = row.x[:2], row.x[2] > 0
        return mfx.Batch(jnp.where(spoiled, jnp.nan, x), row.condition, row.index)


class Marked(data.AbstractSource):
    """Points in the plane; the third number marks the rows of bad steps. Not shuffled, so that a step has its rows."""

    def __init__(self, config):
        rng = np.random.default_rng(0)
        self.x = np.concatenate([rng.standard_normal((96, 2)), np.zeros((96, 1))], axis=1).astype(np.float32)
        self.label = (np.arange(96) % 3).astype(np.int32)
        for step in config.bad_steps:
            self.x[(step * config.batch + np.arange(config.batch)) % 96, 2] = 1
        if broken := os.environ.get("BROKEN_ROW"):
            self.x[int(broken)] = np.nan
        self.name, self.row_shape, self.dtype, self.labels = "points", (3,), self.x.dtype, 3

    def __len__(self):
        return 96

    def take(self, rows):
        return data.Rows(self.x[rows], self.label[rows])


@functools.cache
def parts(width, half, sgd, share, accumulation, parallelism, depth=1):
    """The step and the function that makes the first state, the same objects for the same arguments: compiled once."""
    optimizer = optax.sgd(0.05) if sgd else optax.adam(1e-2)
    averages = [mfx.ExponentialAverage(0.9)]
    objective = mfx.Objective(
        identity_share=share, label_dropout=mfx.LabelDropout(0.1, 3), guidance=mfx.Guidance(1.5, 0.0)
    )
    step = mfx.TrainStep(objective, optimizer, averages, Spoil(), accumulation, parallelism)

    def make_state():
        key = jr.key(1)
        field = Half(width, key=key) if half else mfx.MLP(2, width=width, depth=depth, labels=3, key=key)
        return mfx.init_state(field, optimizer, averages, key=jr.key(0))

    return step, make_state


def train(config, directory, *, source=None, preview=None, steps=None, **options):
    """The last state of a run in an open directory."""
    parallelism = run.parallelism(config)
    options_of_parts = config.width, config.half, config.sgd, config.share, config.accumulation
    step, make_state = parts(*options_of_parts, parallelism, config.depth)

    def picture(state, path):
        path.write_bytes(b"a picture")
        time.sleep(float(os.environ.get("PAUSE", "0")))  # for signals to arrive at a known step
        while os.path.exists(os.environ.get("HOLD", "")):
            time.sleep(0.02)

    source = Marked(config) if source is None else source
    stream = data.Stream(source, config.batch, parallelism=parallelism, shuffle=not config.bad_steps)
    return run.train(
        config,
        step,
        make_state,
        stream,
        directory,
        steps=config.steps if steps is None else steps,
        preview=picture if preview is None else preview,
        **options,
    )


def main(config):
    """Train on points."""
    with run.opened(config, root=os.environ.get("RUNS", "runs")) as directory:
        found = digests(train(config, directory))
        run.tell("digest " + hashlib.sha256(json.dumps(found).encode()).hexdigest())
        if linger := os.environ.get("LINGER"):
            directory.path("trained").touch()
            time.sleep(float(linger))


if __name__ == "__main__":
    run.main(main, Config())
