"""What happens to a row on the device, before the objective sees it: parts for `TrainStep(prepare=...)`.

Each is a function `(row, key) -> row`. The key is folded from the step and the row's index in the global batch, so that
augmentation is the same however rows are spread over devices.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Key

from .._objective import Batch


class InTurn(eqx.Module):
    """Several functions, one after the other, each with a key of its own.

    **Arguments:** `parts` the first to be applied first.
    """

    parts: tuple[Callable[[Batch, Key[jax.Array, ""]], Batch], ...] = eqx.field(converter=tuple)

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        for number, part in enumerate(self.parts):
            row = part(row, jr.fold_in(key, number))
        return row


class WithoutLabel(eqx.Module):
    """The row without its condition: data with labels for a field that has none."""

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        return Batch(row.x, None, row.index)


class FromPixels(eqx.Module):
    """Pixels 0 to 255 as float32 in [-1, 1]: x / 127.5 - 1."""

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        # Clipped, because a compiler may multiply by 1 / 127.5, rounded, instead of dividing.
        x = jnp.clip(jnp.asarray(row.x, jnp.float32) / 127.5 - 1, -1, 1)
        return Batch(x, row.condition, row.index)


class RandomFlip(eqx.Module):
    """The last axis reversed with a probability: images mirrored left to right.

    **Arguments:** `probability` in [0, 1].
    """

    probability: float = 0.5

    def __check_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        x = jnp.asarray(row.x)
        return Batch(jnp.where(jr.bernoulli(key, self.probability), x[..., ::-1], x), row.condition, row.index)


class SamplePosterior(eqx.Module):
    r"""A latent drawn anew at every read, $s (\mu + \sigma \epsilon)$, from rows of moments: the channels of the mean
    $\mu$, then those of the standard deviation $\sigma$, as `experiments/prepare_latents.py` keeps them.

    **Arguments:** `scale` s, `mf_eqx.vae.SCALE` for the tokenizer of Stable Diffusion.
    """

    scale: float

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        mean, std = jnp.split(jnp.asarray(row.x, jnp.float32), 2)
        return Batch(self.scale * (mean + std * jr.normal(key, mean.shape)), row.condition, row.index)
