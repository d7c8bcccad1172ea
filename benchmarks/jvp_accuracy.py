"""How exact is du/dt? Every engine, precision and time scale against float64.

    python benchmarks/jvp_accuracy.py               DiT-S/4, about three minutes on one CPU core
    python benchmarks/jvp_accuracy.py --model B/4
    python benchmarks/jvp_accuracy.py --network mine.py:Net --shape 3 64 64

One network with random parameters (those that start at zero are drawn too, or du/dt would be zero) is evaluated in
float64 by a JVP, then with the same parameters in other ways. The error of a row is |du/dt - reference| / |reference|;
the table has the median over rows and the worst row.

- time scale: the factor on times before the sines. 1 ("raw times") in the authors' MeanFlow code, 1000 in the style of
  DiT, where the fastest sine turns 159 times while t goes from 0 to 1.
- bfloat16 is the precision of the blocks; times, angles and the time MLP stay float32, as in `mfx.DiT`. "bfloat16
  times" computes these in bfloat16 too, to show why no field of the package does so.
- the target v - (t - r) du/dt is float32 in the package. The line below the table says what rounding to bfloat16 does
  to the difference of numbers that are 5% apart (standard deviation), as u and its target may be late in training.

README.md beside this file has figures.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from steps import DITS, LABELS, LATENT, own_network

import mf_eqx as mfx
from mf_eqx import nn, picture, run

PRECISIONS = ("float32", "bfloat16", "bfloat16 times")
TIME_SCALES = (1.0, 1000.0)
JVP, STOPPED, DIFFERENCE = "fused JVP", "stopped JVP", "central difference"


@dataclasses.dataclass(frozen=True)
class Config:
    """A comparison of engines."""

    model: str = "S/4"
    """Network: tiny, S/4, S/2, B/4, B/2, M/2, L/2 or XL/2."""
    network: str | None = None
    """A network of your own in place of `model`, as mine.py:Net, with its own precision and times: a subclass of
    mf_eqx.AbstractField that is made as Net(shape, key=key), as Net(size, key=key) where the shape is one number. Its
    conditions are labels from 0 to 999. For the reference its parameters are made float64, and all that it computes
    has to follow."""
    shape: tuple[int, ...] = ()
    """Shape of one row for the network of --network, such as 3 64 64."""
    rows: int = 32
    """Rows (z, r, t) at which du/dt is compared."""
    steps: tuple[float, ...] = (1e-1, 3e-2, 1e-2, 5e-3, 2e-3, 1e-3, 3e-4, 1e-4)
    """Steps epsilon of the finite difference, in units of time."""
    shown_step: float = 5e-3
    """The step that stands in the table."""
    seed: int = 0
    """Seed of parameters and rows."""
    name: str | None = None
    """Name of the run below runs/jvp_accuracy/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, rows=10**5, shape=1 << 14)
        own_network(self.network, self.shape)
        run.check_among(self, model=DITS)
        if self.rows < 1:
            raise ValueError(f"rows must be >= 1, got {self.rows}")
        if not self.steps or not min(self.steps) > 0:
            raise ValueError(f"steps must be positive numbers, got {self.steps}")
        if self.shown_step not in self.steps:
            raise ValueError(f"shown_step must be one of steps, got {self.shown_step}")


# Networks


class Bfloat16Times(eqx.Module):
    """The embedding of (r, t) in bfloat16 throughout, angles included."""

    times: nn.TimePairEmbedding

    def __call__(self, r: Array, t: Array) -> Float[Array, " width"]:
        low, half = nn.cast(self.times, jnp.bfloat16), self.times.size // 2
        frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.bfloat16)

        def embed(value: Array, hidden: nn.Linear, out: nn.Linear) -> Float[Array, " width"]:
            angles = (self.times.time_scale * value.astype(jnp.bfloat16)) * frequencies
            return out(jax.nn.silu(hidden(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))))

        embedded = list(map(embed, self.times.variables(r, t), low.hidden, low.out))
        return jnp.sum(jnp.stack(embedded), axis=0).astype(jnp.float32)


class Panel(NamedTuple):
    """What is judged together: a title, a time scale, precisions."""

    title: str
    time_scale: float | None
    precisions: tuple[str, ...]


def panels(config: Config) -> list[Panel]:
    """One for each time scale of a DiT; one for a network of one's own."""
    if (own := own_network(config.network, config.shape)) is not None:
        return [Panel(str(own), None, ("its own",))]
    return [Panel(f"time scale {scale:g}", scale, PRECISIONS) for scale in TIME_SCALES]


def make_field(config: Config, precision: str, time_scale: float | None) -> Any:
    """Always the same parameters, in float32."""
    key = jr.key(config.seed)
    if (own := own_network(config.network, config.shape)) is not None:
        field: Any = run.own_network("network", *own)(key=key)
    else:
        options: Any = {"dtype": precision.partition(" ")[0], "time_scale": time_scale}
        field = mfx.DiT(LATENT, DITS[config.model], labels=LABELS, **options, key=key)
    leaves, structure = jax.tree.flatten(eqx.filter(field, eqx.is_inexact_array))
    drawn = [
        leaf if np.any(leaf) else 0.1 * jr.normal(k, leaf.shape)
        for leaf, k in zip(leaves, jr.split(key, len(leaves)), strict=True)
    ]
    field = eqx.combine(jax.tree.unflatten(structure, drawn), field)
    if precision == "bfloat16 times":
        field = eqx.tree_at(lambda f: f.embedding.times, field, Bfloat16Times(field.embedding.times))
    return field


class Rows(NamedTuple):
    """Where du/dt is compared, along conditional velocities."""

    z: Float[Array, "rows *data"]
    v: Float[Array, "rows *data"]
    r: Float[Array, " rows"]
    t: Float[Array, " rows"]
    label: Array


def make_rows(config: Config) -> Rows:
    x, eps = jr.normal(jr.key(config.seed + 1), (2, config.rows, *(config.shape or LATENT)))
    r, t = jnp.sort(jr.uniform(jr.key(config.seed + 2), (2, config.rows)), axis=0)
    z, v = jax.vmap(mfx.LinearInterpolant().state_and_velocity)(x, eps, t)
    return Rows(z, v, r, t, jnp.arange(config.rows) % LABELS)


# Derivatives


def by_engine(engine: mfx.AbstractDerivative, field: mfx.AbstractField, rows: Rows) -> np.ndarray:
    @eqx.filter_jit
    def compute(field: mfx.AbstractField, rows: Rows) -> Array:
        def one(z: Array, v: Array, r: Array, t: Array, label: Array) -> Array:
            return engine(field, z, r, t, label, tangent=(v, 0.0, 1.0), key=None)[1]

        return jax.vmap(one)(*rows)

    return np.asarray(compute(field, rows), np.float64)


@eqx.filter_jit
def differences(field: mfx.AbstractField, rows: Rows, step: Array) -> Array:
    """As `CentralDifference`, which refuses a field that computes in bfloat16."""

    def one(z: Array, v: Array, r: Array, t: Array, label: Array) -> Array:
        after, before = (field(z + s * v, r, t + s, label) for s in (step, -step))
        return (after - before) / (2 * step)

    return jax.vmap(one)(*rows)


def reference(config: Config, time_scale: float | None, rows: Rows) -> np.ndarray:
    """In float64, with the very same numbers as parameters and rows."""
    field = make_field(config, "float64", time_scale)
    with jax.enable_x64(True):
        field, rows = nn.cast(field, jnp.float64), nn.cast(rows, jnp.float64)
        z, _, r, t, label = jax.tree.map(lambda leaf: leaf[0], rows)
        if (found := jax.eval_shape(field, z, r, t, label).dtype) != jnp.float64:
            raise ValueError(f"network must compute in float64 where parameters and data are float64, got {found}")
        return by_engine(mfx.FusedJVP(), field, rows)


def effect_of_rounding_targets(u: np.ndarray, distance: float = 0.05) -> float:
    """Relative error of u - target, `distance` u apart, if both are rounded to bfloat16; median over rows."""
    target = u * (1 + distance * np.random.default_rng(0).standard_normal(u.shape))
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (u, target)]
    return float(np.median(relative(rounded[0] - rounded[1], u - target)))


# Judging


class Error(NamedTuple):
    """Of one engine, precision and time scale: median and largest over the rows."""

    engine: str
    step: float | None
    precision: str
    time_scale: float | None
    median: float
    worst: float


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, expected.ndim))
    return np.sqrt(np.sum((found - expected) ** 2, axes) / np.sum(expected**2, axes))


def judge(config: Config, precision: str, time_scale: float | None, rows: Rows, expected: np.ndarray) -> list[Error]:
    field = make_field(config, precision, time_scale)
    found: list[tuple[str, float | None, Callable[[], np.ndarray]]] = [
        (JVP, None, functools.partial(by_engine, mfx.FusedJVP(), field, rows)),
        (STOPPED, None, functools.partial(by_engine, mfx.StoppedJVP(), field, rows)),
    ]
    for step in config.steps:
        found.append(
            (DIFFERENCE, step, lambda step=step: np.asarray(differences(field, rows, jnp.float32(step)), float))
        )
    errors = []
    for engine, step, compute in found:
        error = relative(compute(), expected)
        errors.append(Error(engine, step, precision, time_scale, float(np.median(error)), float(np.max(error))))
    return errors


def save_figure(path: Path, config: Config, errors: list[Error]) -> None:
    """Per time scale: the finite difference against its step, the JVP as a level line; colours are precisions."""
    shown = panels(config)
    figure = picture.new_figure(5.2 * len(shown), 4)
    subplots = figure.subplots(1, len(shown), sharey=True, squeeze=False).flat
    for (title, scale, precisions), panel in zip(shown, subplots, strict=True):
        for i, precision in enumerate(precisions):
            chosen = [e for e in errors if (e.precision, e.time_scale) == (precision, scale)]
            curve = sorted((e.step, e.median) for e in chosen if e.step is not None)
            (level,) = [e.median for e in chosen if e.engine == JVP]
            panel.plot(*zip(*curve, strict=True), ".-", color=f"C{i}", label=f"{DIFFERENCE}, {precision}")
            panel.axhline(level, color=f"C{i}", linestyle=(4 * i, (4, 8)), label=f"{JVP}, {precision}")
        panel.set(xscale="log", yscale="log", title=title, xlabel="step of the finite difference")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error of du/dt (median)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    name = f"DiT-{config.model}" if config.network is None else "du/dt"
    figure.suptitle(f"{name}, {config.rows} rows, against float64")
    picture.save_figure(path, figure)


def main(config: Config) -> None:
    """Compare du/dt with float64."""
    began = time.perf_counter()
    run.require("matplotlib")
    directory = run.RunDirectory.create(config, config.name)
    rows, errors, rounding = make_rows(config), [], 0.0
    with run.Progress(sum(1 + len(panel.precisions) for panel in panels(config))) as progress:
        done = 0
        for _, scale, precisions in panels(config):
            expected = reference(config, scale, rows)
            rounding = effect_of_rounding_targets(expected)  # of any numbers: these are at hand
            progress.update(done := done + 1, {})
            for precision in precisions:
                errors += judge(config, precision, scale, rows, expected)
                progress.update(done := done + 1, {})
    shown = [e for e in errors if e.step in (None, config.shown_step)]
    cells = [
        (
            e.engine if e.step is None else f"{e.engine}, step {e.step:g}",
            e.precision,
            None if e.time_scale is None else f"{e.time_scale:g}",
            f"{e.median:.1e}",
            f"{e.worst:.1e}",
        )
        for e in shown
    ]
    text = run.table(cells, ("engine", "compute", "time scale", "median error", "worst row"))
    text += f"\n\nRounded to bfloat16, the difference of numbers that are 5% apart is wrong by {100 * rounding:.1f}%."
    directory.save_results(text, [e._asdict() for e in errors])
    save_figure(directory.path("jvp_accuracy.png"), config, errors)
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Picture and results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
