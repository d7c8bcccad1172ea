r"""EDM's augmentation of small images: geometry with a label, so that samples stay as they should be.

Every image is mirrored with probability 1/2 and then, each by a coin of its own, scaled, stretched along a random axis
and shifted. The numbers of all that are given to the network as a condition; zeros mean "as it was", and that is what
it is asked for when sampling. So it learns from augmented images without ever generating one.

The three motions are one affine map, so that the image is interpolated once, between pixels of twice the resolution:

    reflect at the borders -> twice the pixels (sym6 low-pass) -> bilinear at the mapped places -> half (same filter)

Source: Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al., 2022, arXiv 2206.00364, App.
F.2; after Training Generative Adversarial Networks with Limited Data, Karras et al., 2020, arXiv 2006.06676, App. B.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Key

from .._batch import Batch
from .._custom_types import Scalar
from .._model import UNetCondition
from .._validate import check_positive

_SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)
"""The low-pass of the wavelet sym6 (Daubechies, Ten Lectures on Wavelets, 1992); its squares sum to 1."""


class Augmentation(NamedTuple):
    """What happens to one image. Numbers whose coin fell are zero, and then nothing happens.

    `flip` left to right; `scale` w: the picture grows by 2^(0.2 w); `stretch` w: it grows by 2^(0.2 w) along the
    direction `angle` (from the right, counterclockwise) and shrinks by as much across it; `shift` w to the right and
    down by 0.125 w of the image's size.
    """

    flip: Bool[Array, ""]
    scale: Scalar
    stretch: Scalar
    angle: Scalar
    shift: Float[Array, "2"]


class EDMAugmentation(eqx.Module):
    r"""Mirroring, scaling, stretching and shifting at random, told to the network: a part for `TrainStep(prepare=...)`.

    The row's condition, a label or None, becomes a `mf_eqx.UNetCondition` with the six numbers (flip, scale w, stretch
    w cos a, w sin a, shift w to the right, w down); give the network `augmentation=6`. Images are (channels, height,
    width) in floating point, zero in the middle of their range; of pixels `FromPixels` makes such images.

    **Arguments:**

    - `probability` of each of scaling, stretching and shifting: 0.12 in the paper.
    - `flip` probability of mirroring.
    - `scale`: standard deviation of the binary logarithm of scale and stretch. `shift`: that of shifts, as a share of
      the image's size. `turned`: probability that a stretch has a random direction, else it lies along the rows.

    **Raises:** `ValueError` if a probability lies outside [0, 1], `scale` or `shift` is negative or not finite; when
    called, if images are not floating point or have another shape.
    """

    probability: float = 0.12
    flip: float = 0.5
    scale: float = 0.2
    shift: float = 0.125
    turned: float = 0.5

    def __check_init__(self):
        for name in ("probability", "flip", "turned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("scale", "shift"):
            check_positive(name, getattr(self, name), or_zero=True)

    def __call__(self, row: Batch, key: Key[Array, ""]) -> Batch:
        drawn = self.draw(key)
        x = self.apply(jnp.asarray(row.x), drawn)
        return Batch(x, UNetCondition(row.condition, self.label(drawn)), row.index)

    def draw(self, key: Key[Array, ""]) -> Augmentation:
        """What happens to one image, at random."""
        flip_key, number_key, coin_key, angle_key, turned_key = jr.split(key, 5)
        numbers = jr.normal(number_key, (4,))
        scale_coin, stretch_coin, shift_coin = jr.bernoulli(coin_key, self.probability, (3,))
        coins = jnp.stack([scale_coin, stretch_coin, shift_coin, shift_coin])
        scale, stretch, right, down = jnp.where(coins, numbers, 0)
        angle = jr.uniform(angle_key, minval=-jnp.pi, maxval=jnp.pi)
        angle = jnp.where(jr.bernoulli(turned_key, self.turned), angle, 0)
        return Augmentation(jr.bernoulli(flip_key, self.flip), scale, stretch, angle, jnp.stack([right, down]))

    def label(self, drawn: Augmentation) -> Float[Array, "6"]:
        """The numbers that the network is told."""
        stretch = drawn.stretch * jnp.stack([jnp.cos(drawn.angle), jnp.sin(drawn.angle)])
        return jnp.concatenate([jnp.stack([drawn.flip.astype(jnp.float32), drawn.scale]), stretch, drawn.shift])

    def apply(
        self, x: Float[Array, "channels height width"], drawn: Augmentation
    ) -> Float[Array, "channels height width"]:
        """The augmented image."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point for EDMAugmentation (FromPixels makes it so), got {x.dtype}")
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"x must be (channels, height, width) for EDMAugmentation, none of them 0, got {x.shape}")
        x = jnp.where(drawn.flip, x[..., ::-1], x)
        return _moved(x, self._origins(drawn, *x.shape[1:]))

    def _origins(self, drawn: Augmentation, height: int, width: int) -> Float[Array, "3 3"]:
        """Where a place of the new image comes from: the inverse map on (right, down, 1), from the image's centre."""
        size = jnp.exp2(self.scale * drawn.scale)
        along, across = jnp.exp2(self.scale * drawn.stretch), jnp.exp2(-self.scale * drawn.stretch)
        right, down = self.shift * drawn.shift * jnp.array([width, height], drawn.shift.dtype)
        turn = _rotation(-drawn.angle)
        stretched = turn @ jnp.diag(jnp.stack([1 / along, 1 / across, 1.0])) @ turn.T
        shifted = jnp.eye(3).at[:2, 2].set(jnp.stack([-right, -down]))
        return jnp.diag(jnp.stack([1 / size, 1 / size, 1.0])) @ stretched @ shifted


def _rotation(angle: Scalar) -> Float[Array, "3 3"]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.eye(3).at[:2, :2].set(jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])]))


def _moved(
    x: Float[Array, "channels height width"], origins: Float[Array, "3 3"]
) -> Float[Array, "channels height width"]:
    """The image of which every place shows what `x` has at its origin."""
    _, height, width = x.shape
    padded = jnp.pad(x, ((0, 0), (height - 1, height - 1), (width - 1, width - 1)), mode="reflect")
    fine = _doubled(_doubled(padded).mT).mT
    down, right = np.meshgrid(_places(height), _places(width), indexing="ij")
    # In full precision also where products of float32 are rounded by default: a thousandth would be a visible shift.
    places = jnp.stack([right, down, np.ones_like(right)], axis=-1)
    found = jnp.matmul(places, origins.T, precision="highest")
    rows, columns = (2 * found[..., 1] + padded.shape[1] - 1, 2 * found[..., 0] + padded.shape[2] - 1)
    moved = jax.vmap(lambda channel: map_coordinates(channel, [rows, columns], order=1))(fine)
    return _halved(_halved(moved).mT).mT


_BORDER = len(_SYM6) // 4
"""Pixels around the new image that the last filter needs."""


def _places(size: int) -> Float[np.ndarray, " places"]:
    """Where the rows or columns of the new image lie at twice the resolution, in pixels from its middle. The filter has
    its centre near its sixth tap, so that every other of them lies on a pixel."""
    return (np.arange(2 * (size + 2 * _BORDER)) / 2 - _BORDER - (size - 1) / 2).astype(np.float32)


def _doubled(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows 2*columns"]:
    """Zeros between the columns, and the low-pass; together with `_halved` it keeps the mean."""
    return _filtered(x, _SYM6[::-1], padding=[(6, 6)], lhs_dilation=(2,), window_strides=(1,))


def _halved(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows columns2"]:
    """The low-pass and every other column, without the border."""
    return _filtered(x, _SYM6, padding=[(5, 5)], window_strides=(2,))[..., _BORDER:-_BORDER]


def _filtered(x: Float[Array, "channels rows columns"], taps: Float[np.ndarray, " taps"], **options: Any) -> Array:
    """Along the last axis: channels and rows are so many signals of one dimension."""
    signals = x.reshape(-1, 1, x.shape[-1])
    kernel = jnp.asarray(taps.reshape(1, 1, -1), x.dtype)
    return jax.lax.conv_general_dilated(signals, kernel, precision="highest", **options).reshape(*x.shape[:-1], -1)
