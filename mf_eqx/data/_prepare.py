"""What happens to a row on the device, before the objective sees it: parts for `TrainStep(prepare=...)`.

Each is a function `(row, key) -> row`. The key is folded from the step and the row's index in the global batch, so that
augmentation is the same however rows are spread over devices.

Each says which dtype it takes and refuses all others when the step is traced. Ranges are not checked, since values are
known on the device alone: floating-point images are taken to lie in [-1, 1]. `FromPixels` comes before whatever
augments images in floating point.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Key

from .._batch import Batch
from .._custom_types import at_least_float32
from .._validate import check_positive


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
    """Pixels 0 to 255, uint8, as float32 in [-1, 1]: x / 127.5 - 1.

    **Raises:** `ValueError` if x is not uint8, when called.
    """

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        x = jnp.asarray(row.x)
        if x.dtype != jnp.uint8:
            raise ValueError(f"x must be uint8 for FromPixels, pixels 0 to 255, got {x.dtype}")
        # Clipped, because a compiler may multiply by 1 / 127.5, rounded, instead of dividing.
        return Batch(jnp.clip(x.astype(jnp.float32) / 127.5 - 1, -1, 1), row.condition, row.index)


class RandomFlip(eqx.Module):
    """The last axis reversed with a probability: images mirrored left to right, of any dtype, which is kept.

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

    **Arguments:** `scale` s, > 0 and finite: `mf_eqx.vae.SCALE` for the tokenizer of Stable Diffusion.

    **Raises:** `ValueError` for another `scale`; when called, if x is not floating point or has an odd number of
    channels.
    """

    scale: float

    def __check_init__(self):
        check_positive("scale", self.scale)

    def __call__(self, row: Batch, key: Key[jax.Array, ""]) -> Batch:
        x = jnp.asarray(row.x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point for SamplePosterior, means and deviations, got {x.dtype}")
        if x.ndim < 1 or x.shape[0] % 2:
            raise ValueError(f"x must have an even number of channels for SamplePosterior, got shape {x.shape}")
        mean, std = jnp.split(at_least_float32(x), 2)
        eps = jr.normal(key, mean.shape, mean.dtype)
        return Batch(self.scale * (mean + std * eps), row.condition, row.index)
