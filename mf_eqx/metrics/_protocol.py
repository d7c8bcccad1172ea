r"""The preprocessing of images for a network of features. A FID without it has no meaning, so a protocol is an object
with a name, and the name is reported with every result.

From a sample x in [-1, 1] to the network's input (rows are leading axes, images are C H W):

$$x \;\to\; \text{pixels in } \{0, \dots, 255\} \;\to\; 299 \times 299 \text{ in float32} \;\to\; (\cdot - 128) / 128.$$

Grey images, of one channel, become three equal channels.

| protocol | pixels of a sample | resize | reference |
|---|---|---|---|
| `ADM` | $\lfloor \mathrm{clip}(127.5 x + 128, 0, 255) \rfloor$ | TensorFlow 1 | ADM's moments of ImageNet |
| `TORCH_FIDELITY` | the same: what a PNG of `torchvision.utils.save_image` holds | TensorFlow 1 | any images |
| `CIFAR_TRAIN` | $\lfloor 255\, \mathrm{clip}(x/2 + 1/2, 0, 1) \rfloor$ | TensorFlow 1 | 50,000 training images |
| `CIFAR_TRAIN_HALF_PIXEL` | as `CIFAR_TRAIN` | pixel centres, filtered | as `CIFAR_TRAIN` |

`ADM` and `TORCH_FIDELITY` are the same function: the resize of torch-fidelity does not round, and was written to equal
TensorFlow's. Their names differ because their references differ. The two CIFAR protocols round *down*, which darkens an
image by half a level on average. They differ in the resize: the authors' code requires torchmetrics without a version,
and that package changed its resize in version 1.8. Numbers published before July 2025 are `CIFAR_TRAIN`.

`LITE0` is for `EfficientNetLite0`: pixels as in `ADM`, the half-pixel resize to 96 x 96, then $(\cdot - 127) / 128$.
The side is a compromise between time and what the features tell apart, measured on Fashion-MNIST
(experiments/RESULTS.md).

Another protocol is another object: `Protocol("mine", round_to_pixels, resize_half_pixel)`. Rounding has no derivative:
features that are trained with come from `Protocol.without_rounding`.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from .._custom_types import at_least_float32
from .._validate import check_finite
from ._resize import resize_half_pixel, resize_tensorflow1

_SIDE = 96


def round_to_pixels(x: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    r"""Samples in [-1, 1] as pixels, the nearest level: $\lfloor \mathrm{clip}(127.5 x + 128, 0, 255) \rfloor$.

    DiT, EDM and the authors' ImageNet code store samples this way. (ADM's own sampler adds 127.5, which rounds down.)

    **Arguments:** `x` in floating point; values outside [-1, 1] are clipped, and NaN becomes 0.

    **Raises:** `ValueError` if x is not floating point.
    """
    _check_samples(x)
    return jnp.clip(127.5 * at_least_float32(x) + 128, 0, 255).astype(jnp.uint8)


def floor_to_pixels(x: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    r"""Samples in [-1, 1] as pixels, the level below: $\lfloor 255\, \mathrm{clip}(x/2 + 1/2, 0, 1) \rfloor$.

    The authors' CIFAR-10 code does the same (it then divides by 255, and torchmetrics multiplies again: both are exact
    in float32 for all 256 levels). Pixels that are mapped to [-1, 1] and back may change, depending on how the
    map rounds: of the 256 levels, 63 become one lower after 2 (p / 255) - 1, 47 after `data.FromPixels`, and 32 after
    `data.FromPixels` in a jitted function, where a compiler multiplies by 1 / 127.5. Give real images as uint8, as they
    are in the file, without flips.

    **Arguments, Raises:** as for `round_to_pixels`.
    """
    _check_samples(x)
    return jnp.floor(255 * jnp.clip(0.5 * at_least_float32(x) + 0.5, 0, 1)).astype(jnp.uint8)


def unrounded_pixels(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Samples in [-1, 1] on the scale of pixels, neither rounded nor clipped: 127.5 x + 127.5. Its derivative is the
    same everywhere, so that a loss also sees by how much a sample leaves the range.

    **Raises:** `ValueError` if x is not floating point.
    """
    _check_samples(x)
    return 127.5 * at_least_float32(x) + 127.5


def _check_samples(x: Float[Array, "*axes"]) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be samples in floating point, in [-1, 1], got {x.dtype}")


class Protocol(eqx.Module):
    """The conversion of images to the input of a network.

    **Arguments:** `name`, printed with every number and compared with that of the reference; `quantise` converts
    samples in [-1, 1] to pixels; `resize` resizes pixels, as floats in [0, 255], to the size that the network takes;
    `centre` the pixel that becomes 0: the input is (pixel - centre) / 128.

    **Raises:** `ValueError` if `centre` is not finite; when called, for images that are neither uint8 nor floating
    point, have no pixels, or neither one channel nor three.
    """

    name: str
    quantise: Callable[[Float[Array, "*axes"]], UInt8[Array, "*axes"] | Float[Array, "*axes"]]
    resize: Callable[[Float[Array, "*rows height width"]], Float[Array, "*rows new_height new_width"]]
    centre: float = 128.0

    def __check_init__(self):
        check_finite("centre", self.centre)

    def __call__(
        self, x: Float[Array, "*rows channels height width"] | UInt8[Array, "*rows channels height width"]
    ) -> Float[Array, "*rows 3 new_height new_width"]:
        """The network's input, from samples in [-1, 1] or from pixels in uint8, in colour or grey."""
        if x.dtype != jnp.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be samples in floating point or pixels in uint8, got {x.dtype}")
        if x.ndim < 3 or x.shape[-3] not in (1, 3):
            raise ValueError(f"x must be images (..., channels, height, width) with 1 or 3 channels, got {x.shape}")
        pixels = x if x.dtype == jnp.uint8 else self.quantise(x)
        resized = (self.resize(pixels.astype(jnp.float32)) - self.centre) / 128
        return jnp.broadcast_to(resized, (*x.shape[:-3], 3, *resized.shape[-2:]))

    def without_rounding(self) -> "Protocol":
        """The same protocol for losses, which need a derivative: samples are neither rounded nor clipped."""
        return dataclasses.replace(self, name=f"{self.name}, not rounded", quantise=unrounded_pixels)


def _resize_lite0(x: Float[Array, "*rows height width"]) -> Float[Array, "*rows new_height new_width"]:
    return resize_half_pixel(x, _SIDE)


ADM = Protocol("ADM", round_to_pixels, resize_tensorflow1)
TORCH_FIDELITY = Protocol("torch-fidelity", round_to_pixels, resize_tensorflow1)
CIFAR_TRAIN = Protocol("CIFAR-train", floor_to_pixels, resize_tensorflow1)
CIFAR_TRAIN_HALF_PIXEL = Protocol("CIFAR-train, half-pixel resize", floor_to_pixels, resize_half_pixel)
LITE0 = Protocol(f"lite0, {_SIDE} pixels", round_to_pixels, _resize_lite0, 127.0)
