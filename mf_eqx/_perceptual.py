r"""Losses between images in the features of a network, beside the loss of velocities.

$$\mathcal L = c\, \mathrm{sg}(w(S))\, S, \qquad S = \| F(x) - F(z_t - t\, u(z_t, r, t)) \|^2, \qquad t < t_1$$

with F the features of both images, cropped and resized alike at random. $z_t - t\, u(z_t, r, t)$ is what a step of the
whole length t, with the average velocity of [r, t], makes of the state: an image that is close to x for small t.

Source: One-step Latent-free Image Generation with Pixel Mean Flows, 2026, arXiv 2601.22158.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from ._custom_types import Scalar
from ._row import Row
from ._validate import as_float, check_counts, check_positive
from ._weight import AbstractWeight, AdaptiveWeight, weight_of

_CROP = 0x43524F50  # folded into a row's key


class PerceptualTerm(eqx.Module):
    r"""A term of an objective on images: the distance of x and $z_t - t\, u(z_t, r, t)$ in features.

    **Arguments:**

    - `features`: F, any function of one image, channels first, with values like those of the data, that returns a
      PyTree of arrays. Their sum of squared differences is S: for LPIPS, the normalised activations of each layer,
      times the square root of its weights. A network must be an `equinox.Module` in inference mode; it is not trained.
    - `size`: height and width to which crops are resized.
    - `coefficient`: c, >= 0: in the paper 0.4 for LPIPS and 0.1 for features of a ConvNeXt.
    - `before`: $t_1$: rows with t >= before have no such term; 0.8 in the paper.
    - `smallest_crop`: the sides of a crop are those of the image times one draw from [smallest_crop, 1]; its place is
      uniform. 1 for no crop. This way to draw crops is our choice.
    - `weight`: w; the paper's by default.

    **Raises:** `ValueError` for values out of range.
    """

    features: Callable[[Float[Array, "channels height width"]], PyTree[Array]]
    size: tuple[int, int]
    coefficient: float = eqx.field(default=0.4, converter=as_float("coefficient"))
    before: float = eqx.field(default=0.8, converter=as_float("before"))
    smallest_crop: float = eqx.field(default=0.5, converter=as_float("smallest_crop"))
    weight: AbstractWeight = AdaptiveWeight()

    def __check_init__(self):
        if not callable(self.features):
            raise ValueError(f"features must be a function of an image, got {self.features!r:.100}")
        check_counts(size=self.size)
        if len(self.size) != 2:
            raise ValueError(f"size must be a height and a width, got {self.size}")
        check_positive("coefficient", self.coefficient, or_zero=True)
        if not 0 < self.before <= 1:
            raise ValueError(f"before must lie in (0, 1], got {self.before}")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop must lie in (0, 1], got {self.smallest_crop}")

    def __call__(self, row: Row, u: Float[Array, "*data"]) -> Scalar:
        """The term of one row, which has its x and a key.

        **Arguments:** `row`; `u` the field's u(z, r, t).

        **Raises:** `ValueError` unless the data are images, and the row has x and key.
        """
        if row.z.ndim != 3:
            raise ValueError(f"data must be images, channels first, for a perceptual term, got shape {row.z.shape}")
        if row.x is None or row.key is None:
            raise ValueError("row must have x and a key for a perceptual term, got one without")
        crop = self._crop(row.z.shape, jr.fold_in(row.key, _CROP))
        wanted, found = (self.features(crop(image)) for image in (row.x, row.z - row.t * u))
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), wanted, found)
        error = jnp.sum(jnp.stack(jax.tree.leaves(squares)))
        weighted = self.coefficient * weight_of(self.weight, error, row) * error
        return jnp.where(row.t < self.before, weighted, 0)

    def _crop(self, shape: tuple[int, ...], key: Key[Array, ""]) -> Callable[[Any], Any]:
        """The function that cuts a part out of an image and resizes it, the same for every image."""
        scale_key, place_key = jr.split(key)
        part = jr.uniform(scale_key, minval=self.smallest_crop, maxval=1.0)
        sides, wanted = jnp.array(shape[1:], jnp.float32), jnp.array(self.size, jnp.float32)
        first = jr.uniform(place_key, (2,)) * (1 - part) * sides
        scale = wanted / (part * sides)

        def cropped(image: Float[Array, "channels height width"]) -> Float[Array, "channels new_height new_width"]:
            resized = (image.shape[0], *self.size)
            how = {"scale": scale, "translation": -first * scale, "method": "linear"}
            return jax.image.scale_and_translate(image, resized, (1, 2), **how)

        return cropped
