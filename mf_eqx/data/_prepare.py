"""Transformations of a row on the device, before the objective uses it: parts for `TrainStep(prepare=...)`.

Each is a function `(row, key) -> row`. The key is folded from the step and the row's index in the global batch, so that
augmentation does not depend on how rows are distributed over devices.

A part that requires certain dtypes raises an error for all others when the step is traced. Ranges are not checked,
since values are known only on the device: floating-point images are assumed to be in [-1, 1]. Put `FromPixels` before
parts that augment images in floating point.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Key

from .._batch import Batch
from .._custom_types import at_least_float32
from .._validate import as_float, as_tuple, check_kind
from ..vae import LatentStatistics, Moments


def _as_parts(parts: Any) -> tuple[Any, ...]:
    return as_tuple("parts", parts, ("FromPixels()", "RandomFlip()"))


class InTurn(eqx.Module):
    """Several functions, one after the other, each with a key of its own.

    **Arguments:** `parts` the functions, in the order in which they are applied.
    """

    parts: tuple[Callable[[Batch, Key[jax.Array, ""]], Batch], ...] = eqx.field(converter=_as_parts)

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        for number, part in enumerate(self.parts):
            row = part(row, jr.fold_in(key, number))
        return row


class WithoutLabel(eqx.Module):
    """The row without its condition, for training a field without labels on data that have labels."""

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        return dataclasses.replace(row, condition=None)


class FromPixels(eqx.Module):
    """Pixels 0 to 255, uint8, as float32 in [-1, 1]: x / 127.5 - 1.

    **Raises:** `ValueError`, when called, if x is not uint8.
    """

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        x = jnp.asarray(row.x)
        if x.dtype != jnp.uint8:
            raise ValueError(f"x must be uint8 for FromPixels, pixels 0 to 255, got {x.dtype}")
        # Clipped, because a compiler may multiply by the rounded value of 1 / 127.5 instead of dividing.
        return dataclasses.replace(row, x=jnp.clip(x.astype(jnp.float32) / 127.5 - 1, -1, 1))


class RandomFlip(eqx.Module):
    """The row with the last axis of x, and of eps if there is one, reversed at random, which mirrors images left to
    right. The dtype may be any and does not change.

    **Arguments:** `probability` of mirroring, in [0, 1].
    """

    probability: float = eqx.field(default=0.5, converter=as_float("probability"))

    def __check_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        mirrored = jr.bernoulli(key, self.probability)
        x, eps = jax.tree.map(lambda leaf: jnp.where(mirrored, leaf[..., ::-1], leaf), (jnp.asarray(row.x), row.eps))
        return dataclasses.replace(row, x=x, eps=eps)


class SamplePosterior(eqx.Module):
    r"""A standardised latent $(\mu + \sigma \epsilon - m) / s$, drawn anew in every step, from rows of moments: the
    channels of the mean $\mu$, then those of the standard deviation $\sigma$, as `experiments/prepare_latents.py`
    writes them.

    **Arguments:** `statistics` m and s of all latents; by default those of the tokenizer of Stable Diffusion.

    **Raises:** `ValueError`, when called, if x is not floating point, is no image, or has an odd number of channels or
    not those of the statistics.
    """

    statistics: LatentStatistics = LatentStatistics()

    def __check_init__(self):
        check_kind("statistics", self.statistics, LatentStatistics)

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        x = jnp.asarray(row.x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point for SamplePosterior, means and deviations, got {x.dtype}")
        if x.ndim != 3 or x.shape[0] % 2:
            rule = "be (channels, height, width) with an even number of channels"
            raise ValueError(f"x must {rule} for SamplePosterior, got shape {x.shape}")
        latent = Moments(*jnp.split(at_least_float32(x), 2)).sample(key=key)
        return dataclasses.replace(row, x=self.statistics.standardise(latent))


class TakeEps(eqx.Module):
    """The row with a part of its condition as its eps, so that any source can bring pairs of ends. For the data

        data.ArraySource(x, condition={"eps": eps})

    the condition of the row is then None; with further parts it is the dictionary without this one, or, if `keep` names
    one of them, such as a label, this part alone.

    **Arguments:** `name` of the part; `keep` the name of the part that becomes the condition, or None.

    **Raises:** `ValueError`, when called, if the condition is no dictionary with these names, or if the row has an eps.
    """

    name: str = "eps"
    keep: str | None = None

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        known = sorted(row.condition) if isinstance(row.condition, dict) else type(row.condition).__name__
        if not isinstance(row.condition, dict) or {self.name, self.keep or self.name} - row.condition.keys():
            rule = f"be a dictionary with {self.name}{'' if self.keep is None else f' and {self.keep}'}"
            raise ValueError(f"condition must {rule} for TakeEps, got {known}")
        if row.eps is not None:
            raise ValueError("eps must be None for TakeEps, got an array")
        rest = {name: part for name, part in row.condition.items() if name != self.name}
        condition = (rest or None) if self.keep is None else rest[self.keep]
        return dataclasses.replace(row, condition=condition, eps=row.condition[self.name])
