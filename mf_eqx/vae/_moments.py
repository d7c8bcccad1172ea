r"""What is known of latents: the posterior of one image, and mean and deviation over a whole data set.

A field learns latents of mean 0 and standard deviation 1 in each channel c,

$$z_c = (\ell_c - m_c) / s_c, \qquad \ell = \mu + \sigma \epsilon,$$

and what it generates is brought back by $\ell_c = s_c z_c + m_c$ before it is decoded. No method of the tokenizer
applies these numbers.
"""

import dataclasses
import numbers
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._custom_types import Scalar
from .._validate import as_tuple

SCALE = 0.18215
"""The factor by which latents of `SD_VAE` are multiplied, so that their standard deviation is about 1 (Rombach et al.
2022, App. G): `LatentStatistics()` divides by 1 / `SCALE`. Other weights of the same size may require another factor,
which is `scaling_factor` in their config.json."""

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Moments(eqx.Module):
    r"""The posterior of an image, $q(\ell | x) = N(\mu, \operatorname{diag} \sigma^2)$, not standardised.

    **Arguments:** `mean` $\mu$ and `std` $\sigma$, each (latent, height, width).
    """

    mean: Float[Array, "latent height width"]
    std: Float[Array, "latent height width"]

    def sample(self, *, key: Key[Array, ""]) -> Float[Array, "latent height width"]:
        r"""A latent, $\mu + \sigma \epsilon$ with $\epsilon$ standard normal."""
        return self.mean + self.std * jr.normal(key, self.mean.shape, self.mean.dtype)

    def divergence(self) -> Scalar:
        r"""The Kullback-Leibler divergence from the standard normal distribution, in nats, summed over the latent:
        $\mathrm{KL}(q \| N(0, I)) = \tfrac12 \sum (\mu^2 + \sigma^2 - 1 - \log \sigma^2)$. It requires $\sigma > 0$."""
        return 0.5 * jnp.sum(self.mean**2 + self.std**2 - 1 - 2 * jnp.log(self.std))


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of the latents of a data set, for each channel, or one number for all channels.

    `LatentStatistics()` are those that Stable Diffusion 1 and 2 assume of their latents: 0 and 1 / `SCALE`.

    **Arguments:** `mean` m; `std` s > 0; each a tuple or a list of numbers, kept as a tuple of floats.

    **Raises:** `ValueError` for what is no tuple or list of numbers, for numbers out of the range of float32, or if
    `mean` and `std` are both of several channels, but not of the same number.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1 / SCALE,)

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, as_float_tuple(name, getattr(self, name)))
        if min(self.std) < _SMALLEST:
            raise ValueError(f"std must be > 0 in float32, got {self.std!r:.80}")
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ValueError(f"mean must have as many numbers as std, got {len(self.mean)} and {len(self.std)}")

    @classmethod
    def of(
        cls,
        mean: Float[Array | np.ndarray, "images latent height width"],
        std: Float[Array | np.ndarray, "images latent height width"],
    ) -> "LatentStatistics":
        r"""Those of all latents that are drawn from the posteriors of these images, over images and places: m the mean
        of $\mu$, s the root of the variance of $\mu$ plus the mean of $\sigma^2$.

        **Arguments:** `mean` $\mu$ and `std` $\sigma$ of each image, of the same shape.

        **Raises:** `ValueError` if their shapes differ or have another number of axes, if there are no values, if they
        are not finite, or if a channel is the same in all images and places.
        """
        mu, sigma = (np.asarray(values, np.float64) for values in (mean, std))
        if mu.shape != sigma.shape or mu.ndim != 4 or not mu.size:
            rule = "have the same shape (images, latent, height, width), without a 0"
            raise ValueError(f"mean and std must {rule}, got {mu.shape} and {sigma.shape}")
        variance = mu.var(axis=(0, 2, 3)) + (sigma**2).mean(axis=(0, 2, 3))
        return cls(tuple(mu.mean(axis=(0, 2, 3)).tolist()), tuple(np.sqrt(variance).tolist()))

    def standardise(self, latent: Float[Array, "latent height width"]) -> Float[Array, "latent height width"]:
        """What a field learns: (latent - m) / s, of one latent.

        **Raises:** `ValueError` if `latent` is not (channels, height, width), with the channels of these statistics.
        """
        return (latent - self._each(self.mean, latent)) / self._each(self.std, latent)

    def restore(self, z: Float[Array, "latent height width"]) -> Float[Array, "latent height width"]:
        """The latent that a tokenizer decodes: s z + m. **Raises:** as `standardise`."""
        return self._each(self.std, z) * z + self._each(self.mean, z)

    def check_channels(self, channels: int) -> None:
        """Raises a `ValueError` unless there is one number, or as many as `channels`."""
        if (number := max(len(self.mean), len(self.std))) not in (1, channels):
            raise ValueError(f"statistics must be of {channels} channels, or one number for all, got {number}")

    def as_json(self) -> dict[str, Any]:
        """The same as lists, which JSON can hold."""
        return {"mean": [*self.mean], "std": [*self.std]}

    def _each(self, values: tuple[float, ...], latent: Float[Array, "latent height width"]) -> Float[Array, "_ 1 1"]:
        if latent.ndim != 3:
            raise ValueError(f"latent must be (channels, height, width), without a batch axis, got {latent.shape}")
        self.check_channels(latent.shape[0])
        return jnp.asarray(values, latent.dtype).reshape(-1, 1, 1)


def as_float_tuple(name: str, values: Any) -> tuple[float, ...]:
    """`values` as a tuple of floats. **Raises:** `ValueError` unless they are a tuple or a list of real numbers, at
    least one, and none too large for float32."""
    values = as_tuple(name, values, (0.0,))
    if not values or not all(_is_number(value) and abs(value) <= _LARGEST for value in values):
        raise ValueError(f"{name} must be at least one number, finite in float32, got {values!r:.80}")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
