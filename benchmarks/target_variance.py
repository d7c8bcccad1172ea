"""How much of the target's variance do references remove (`mf_eqx.StableTarget`): at which times, in which dimension?

    python benchmarks/target_variance.py                                  toys in 2 to 64 dimensions, digits
    python benchmarks/target_variance.py --images IMAGES.gz LABELS.gz     also images from IDX files, at three sizes

The conditional velocity v of a row is the velocity v* of the whole data set at the row's state, which is what can be
learnt, plus noise. For each time t the first table has the share of noise in the target,

    E|v - v*|² / E|v|²,

and the second the share of that noise which is left when v comes from n references besides the row's own x,

    E|v_n - v*|² / E|v - v*|².

Nothing is trained. With labels the data set is that of the first label, as in a training in which rows are compared
with references of their own label. README.md beside this file has figures.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

import mf_eqx as mfx
from mf_eqx import data, exact, run

PATH = mfx.LinearInterpolant()
LARGEST = 1 << 14


@dataclasses.dataclass(frozen=True)
class Config:
    """A table of data sets and times."""

    images: tuple[str, ...] = ()
    """IDX files of images and of labels, for example of Fashion-MNIST; also averaged over blocks of 2 x 2 and 4 x 4."""
    copies: tuple[int, ...] = (1, 2, 4, 8, 32)
    """Copies of the eight Gaussians, in two dimensions each."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Times t in (0, 1]."""
    numbers: tuple[int, ...] = (16, 128, 512, 2048)
    """Numbers n of references."""
    data_rows: int = 6000
    """Rows of a data set, or as many as it has; at most 16,384."""
    rows: int = 256
    """Number of rows over which the variance is averaged."""
    name: str | None = None
    """Name of the run below runs/target_variance/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, data_rows=LARGEST, rows=1 << 16, copies=512, numbers=LARGEST)
        if len(self.images) not in (0, 2):
            raise ValueError(f"images must be two files, of images and of labels, got {len(self.images)}")
        if missing := [path for path in self.images if not Path(path).is_file()]:
            raise ValueError(f"images must be files, found none at {missing[0]}")
        for name in ("copies", "times", "numbers"):
            if not getattr(self, name) or not min(getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive numbers, got {getattr(self, name)}")
        if max(self.times) > 1:
            raise ValueError(f"times must lie in (0, 1], got {max(self.times)}")
        for name in ("data_rows", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def data_sets(config: Config) -> Iterator[tuple[str, Float[np.ndarray, "rows dim"]]]:
    """Data of one label by name, flat."""
    for copies in config.copies:
        mixture = exact.StackedMixture(exact.eight_gaussians(), copies)
        yield f"eight Gaussians x {copies}", np.asarray(exact.draw(mixture, config.data_rows, jr.key(0)))
    with run.optional("sklearn"):
        from sklearn.datasets import load_digits
    x, label = load_digits(return_X_y=True)
    yield "digits, label 0", (x[label == 0] / 8 - 1).astype(np.float32)
    if config.images:
        source = data.read_idx(*config.images)
        assert source.label is not None
        x = np.asarray(source.x)[np.asarray(source.label) == 0][:, 0] / 127.5 - 1
        rows, height, width = x.shape
        for side in (4, 2, 1):
            kept = x[:, : height // side * side, : width // side * side]
            blocks = kept.reshape(rows, height // side, side, width // side, side).mean(axis=(2, 4))
            yield f"images {height // side}x{width // side}, label 0", blocks.reshape(rows, -1).astype(np.float32)


@eqx.filter_jit
def noise(
    references: Float[Array, "references dim"], x: Float[Array, "rows dim"], t: float, numbers: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """E|v - v*|², E|v|², and E|v_n - v*|² for each n."""

    def of_row(x, index):
        eps = jr.normal(jr.fold_in(jr.key(1), index), x.shape)

        def velocity(number):
            target = mfx.StableTarget(references, number=number)
            return target.velocity(PATH, x, eps, jnp.asarray(t), key=jr.fold_in(jr.key(2), index))

        best, conditional = velocity(None), eps - x
        squares = [jnp.sum((velocity(number) - best) ** 2) for number in numbers]  # none for a small data set
        return jnp.sum((conditional - best) ** 2), jnp.sum(conditional**2), jnp.asarray(squares)

    # A few rows at a time: each draws references of its own.
    found = jax.lax.map(lambda row: of_row(*row), (x, jnp.arange(len(x))), batch_size=8)
    return jax.tree.map(lambda values: jnp.mean(values, axis=0), found)


def main(config: Config) -> None:
    """Measure the noise in targets."""
    began = time.perf_counter()
    directory = run.RunDirectory.create(config, config.name)
    shares, left, records = [], [], []
    for name, values in data_sets(config):
        references = jnp.asarray(values[: config.data_rows])
        x, dim = references[: config.rows], references.shape[1]
        numbers = tuple(number for number in config.numbers if number <= len(references))
        measured = [noise(references, x, t, numbers) for t in config.times]
        share = [float(of_v / square) for of_v, square, _ in measured]
        remaining = np.array([np.asarray(of_n) / max(float(of_v), 1e-12) for of_v, _, of_n in measured])
        shares.append((name, dim, len(references), *(f"{value:.2g}" for value in share)))
        for i, number in enumerate(numbers):
            # Where there is no noise, nothing can be removed.
            shown = [f"{r:.2g}" if s > 1e-3 else None for r, s in zip(remaining[:, i], share, strict=True)]
            left.append((name if i == 0 else "", number, *shown))
        records.append({"data": name, "dim": dim, "noise": share, "numbers": numbers, "left": remaining.tolist()})
        print(f"{name}: {dim} dimensions, {len(references)} references", flush=True)
    times = [f"t = {t:g}" for t in config.times]
    text = f"Share of noise in the target:\n\n{run.table(shares, ('data', 'dimensions', 'rows', *times))}\n\n"
    text += f"Of this noise, left by n references:\n\n{run.table(left, ('data', 'n', *times))}"
    directory.save_results(text, records)
    print(f"{text}\n\n{time.perf_counter() - began:.0f} seconds. Results are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
