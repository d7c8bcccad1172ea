"""Samples of images, of chosen labels from chosen noise, and pictures of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

import mf_eqx as mfx
from mf_eqx import data, picture

PICTURE_SEED, JUDGED_SEED = 2**31 - 1, 2**31 - 2
"""Seeds of the noise: that of all pictures, and that of all judged images."""
GENERATED_AT_ONCE = 50
"""Images in one call, so that one compiled program makes any number of them."""


class Sampler(NamedTuple):
    """How images of a field are made: by which method, in which numbers of evaluations, of which classes. Previews and
    grids are made in `shown` evaluations."""

    name: str
    method: Callable[..., Any]
    evaluations: tuple[int, ...]
    shown: int
    labels: int | None = None
    class_names: Sequence[str] | None = None
    guidance: tuple[float, tuple[float, float]] | None = None
    """Scale and interval, for a network that takes guidance as an input."""
    decode: Callable[[Float[Array, "rows *data"]], Float[Array, "rows channels height width"]] | None = None
    """From what the field generates to images, for a field of latents."""
    data_shape: tuple[int, ...] | None = None
    """Shape of what the field generates, for a field that does not tell it."""

    @property
    def all_names(self) -> Sequence[str]:
        """The names of the classes, or their numbers where they have no names."""
        return self.class_names or [*map(str, range(self.labels or 0))]

    def __call__(
        self, field: mfx.AbstractField, label: Int[np.ndarray, " rows"], evaluations: int, seed: int
    ) -> Float[np.ndarray, "rows channels height width"]:
        """An image for each label, from the noise of this seed."""
        times, key = mfx.uniform_times(evaluations), jr.key(seed)
        shape = self.data_shape or field.data_shape  # pyright: ignore[reportAttributeAccessIssue]
        field = field if self.guidance is None else mfx.WithGuidance(field, *self.guidance)
        options = {"method": self.method, "unroll": jax.default_backend() == "cpu"}  # XLA:CPU is slow in loops
        generator = mfx.Generator(field, key, shape, times, labels=self.labels, **options)
        made, rows = [], GENERATED_AT_ONCE
        for start in range(0, len(label), rows):
            keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, start + np.arange(rows))
            eps = jax.vmap(lambda key: jr.normal(key, shape))(keys)
            wanted = jnp.asarray(np.resize(label[start:], rows))  # the last part is filled up
            x = generator.from_noise(eps, None if self.labels is None else wanted)
            made.append(np.asarray(x if self.decode is None else self.decode(x)))
        return np.concatenate(made)[: len(label)]

    def columns(self) -> tuple[Int[np.ndarray, " columns"], list[str] | None]:
        """The labels of a picture's columns, at most ten, and their names."""
        if self.labels is None:
            return np.zeros(8, np.int32), None
        count = min(self.labels, 10)
        label = (np.arange(count) * self.labels // count).astype(np.int32)
        return label, [self.all_names[int(i)] for i in label]


def save_samples(sampler: Sampler, field: mfx.AbstractField, path: Path, rows: int) -> None:
    """A column of images for each class."""
    label, names = sampler.columns()
    x = sampler(field, np.tile(label, rows), sampler.shown, PICTURE_SEED)
    picture.save_image_grid(path, x.reshape(rows, len(label), *x.shape[1:]), -1, 1, column_labels=names)


def save_comparison(samplers: Sequence[Sampler], field: mfx.AbstractField, test: data.Rows, path: Path) -> None:
    """A test image of each class, white if there is none, and samples of the same classes, from the same noise
    for each sampler and number of evaluations."""
    first = samplers[0]
    label, names = first.columns()
    known = np.zeros(len(test.x), np.int32) if first.labels is None or test.label is None else test.label
    found = [test.x[known == c] for c in label]
    white = np.full_like(test.x[0], 255)  # where the test images lack a class
    rows = {"test images": np.stack([x[i % len(x)] if len(x) else white for i, x in enumerate(found)]) / 127.5 - 1}
    for sampler in samplers:
        for number in sampler.evaluations:
            name = counted(number) if len(samplers) == 1 else f"{sampler.name}, {counted(number)}"
            rows[name] = sampler(field, label, number, PICTURE_SEED)
    picture.save_image_grid(path, np.stack([*rows.values()]), -1, 1, row_labels=[*rows], column_labels=names)


def counted(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' if evaluations > 1 else ''}"
