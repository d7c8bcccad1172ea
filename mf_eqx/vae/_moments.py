r"""What is known of latents: the posterior of one image, and mean and deviation over a whole data set.

A field learns latents of mean 0 and standard deviation 1 in each channel c,

$$z_c = (\ell_c - m_c) / s_c, \qquad \ell = \mu + \sigma \epsilon,$$

and what it generates is brought back by $\ell_c = s_c z_c + m_c$ before it is decoded. No method of the tokenizer
applies these numbers.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._custom_types import Scalar

SCALE = 0.18215
"""The factor by which latents of `SD_VAE` are multiplied, so that their standard deviation is about 1 (Rombach et al.
2022, App. G): 1 / `LatentStatistics().std`. Other weights of the same size may require another factor, which is
`scaling_factor` in their config.json."""


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

    **Arguments:** `mean` m; `std` s > 0.

    **Raises:** `ValueError` for numbers out of range, or as many of one as neither 1 nor of the other.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1 / SCALE,)

    def __post_init__(self):
        if not self.mean or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite numbers, at least one, got {self.mean!r:.80}")
        if not self.std or not all(0 < std < math.inf for std in self.std):
            raise ValueError(f"std must be finite numbers > 0, at least one, got {self.std!r:.80}")
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

        **Raises:** `ValueError` if they are not finite, or if a channel is the same in all images and places.
        """
        mu, sigma = (np.asarray(values, np.float64) for values in (mean, std))
        variance = mu.var(axis=(0, 2, 3)) + (sigma**2).mean(axis=(0, 2, 3))
        return cls(tuple(mu.mean(axis=(0, 2, 3)).tolist()), tuple(np.sqrt(variance).tolist()))

    def standardise(self, latent: Float[Array, "latent height width"]) -> Float[Array, "latent height width"]:
        """What a field learns: (latent - m) / s."""
        return (latent - self._each(self.mean, latent)) / self._each(self.std, latent)

    def restore(self, z: Float[Array, "latent height width"]) -> Float[Array, "latent height width"]:
        """The latent that a tokenizer decodes: s z + m."""
        return self._each(self.std, z) * z + self._each(self.mean, z)

    def check_channels(self, channels: int) -> None:
        """Raises a `ValueError` unless there is one number, or as many as `channels`."""
        if (number := max(len(self.mean), len(self.std))) not in (1, channels):
            raise ValueError(f"statistics must be of {channels} channels, or one number for all, got {number}")

    def as_json(self) -> dict[str, Any]:
        """The same as lists, which JSON can hold."""
        return {"mean": [*self.mean], "std": [*self.std]}

    def _each(self, values: tuple[float, ...], latent: Float[Array, "latent height width"]) -> Float[Array, "_ 1 1"]:
        self.check_channels(latent.shape[0])
        return jnp.asarray(values, latent.dtype).reshape(-1, 1, 1)
