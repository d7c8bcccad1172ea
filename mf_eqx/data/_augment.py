r"""EDM's augmentation of small images: geometric transformations, whose parameters are a condition of the network.

Every image is mirrored with probability 1/2. Then scaling, stretching along a random axis and shifting are each applied
with a given probability, independently of each other. The parameters of these transformations are given to the network
as a condition; zeros mean that the image is not transformed, and sampling uses zeros. So the network learns from
augmented images and generates images without augmentation.

Scaling, stretching and shifting form one affine map, so that the image is interpolated only once, at twice the
resolution:

    reflect at borders -> upsample by 2 (sym6 low-pass) -> bilinear at mapped positions -> downsample (same filter)

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
from .._validate import as_float, check_positive

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
"""The low-pass filter of the wavelet sym6 (Daubechies, Ten Lectures on Wavelets, 1992); its squares sum to 1."""


class Augmentation(NamedTuple):
    """The transformation of one image. The number of a transformation that is not applied is zero.

    `flip`: mirrored left to right; `scale` w: enlarged by 2^(0.2 w); `stretch` w: enlarged by 2^(0.2 w) along the
    direction `angle` (counterclockwise from the right) and reduced by the same factor perpendicular to it; `shift` w:
    moved to the right and down by 0.125 w of the image's size. (0.2 and 0.125 are the defaults of `EDMAugmentation`.)
    """

    flip: Bool[Array, ""]
    scale: Scalar
    stretch: Scalar
    angle: Scalar
    shift: Float[Array, "2"]


class EDMAugmentation(eqx.Module):
    r"""Random mirroring, scaling, stretching and shifting, with the parameters in the network's condition: a part for
    `TrainStep(prepare=...)`.

    The row's condition, a label or None, becomes a `mf_eqx.UNetCondition` with the six numbers (flip, scale w, stretch
    w cos a, w sin a, shift w to the right, w down); make the network with `augmentation=6`. Images are (channels,
    height, width) in floating point, with zero in the middle of their range; `FromPixels` makes such images of pixels.

    **Arguments:**

    - `probability`: of scaling, of stretching and of shifting, each on its own; 0.12 in the paper.
    - `flip`: probability of mirroring.
    - `scale`: standard deviation of the binary logarithm of the scale and of the stretch.
    - `shift`: standard deviation of shifts, as a fraction of the image's size.
    - `turned`: probability that a stretch has a random direction; otherwise it is along the rows.

    **Raises:** `ValueError` if a probability lies outside [0, 1], `scale` or `shift` is negative or not finite; when
    called, if images are not floating point or have another shape, or if rows have an eps.
    """

    probability: float = eqx.field(default=0.12, converter=as_float("probability"))
    flip: float = eqx.field(default=0.5, converter=as_float("flip"))
    scale: float = eqx.field(default=0.2, converter=as_float("scale"))
    shift: float = eqx.field(default=0.125, converter=as_float("shift"))
    turned: float = eqx.field(default=0.5, converter=as_float("turned"))

    def __check_init__(self):
        for name in ("probability", "flip", "turned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("scale", "shift"):
            check_positive(name, getattr(self, name), or_zero=True)

    def __call__(self, row: Batch, key: Key[Array, ""]) -> Batch:
        if row.eps is not None:
            raise ValueError("eps must be None for EDMAugmentation, which moves x alone, got an array")
        drawn = self.draw(key)
        x = self.apply(jnp.asarray(row.x), drawn)
        return Batch(x, UNetCondition(row.condition, self.label(drawn)), row.index)

    def draw(self, key: Key[Array, ""]) -> Augmentation:
        """A random transformation for one image."""
        flip_key, number_key, coin_key, angle_key, turned_key = jr.split(key, 5)
        numbers = jr.normal(number_key, (4,))
        scale_coin, stretch_coin, shift_coin = jr.bernoulli(coin_key, self.probability, (3,))
        coins = jnp.stack([scale_coin, stretch_coin, shift_coin, shift_coin])
        scale, stretch, right, down = jnp.where(coins, numbers, 0)
        angle = jr.uniform(angle_key, minval=-jnp.pi, maxval=jnp.pi)
        angle = jnp.where(jr.bernoulli(turned_key, self.turned), angle, 0)
        return Augmentation(jr.bernoulli(flip_key, self.flip), scale, stretch, angle, jnp.stack([right, down]))

    def label(self, drawn: Augmentation) -> Float[Array, "6"]:
        """The six numbers of the network's condition."""
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
        return _warped(x, self._inverse_map(drawn, *x.shape[1:]))

    def _inverse_map(self, drawn: Augmentation, height: int, width: int) -> Float[Array, "3 3"]:
        """The inverse map: from a position in the new image to its position in `x`, both (right, down, 1) relative to
        the image's centre."""
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


def _warped(
    x: Float[Array, "channels height width"], inverse_map: Float[Array, "3 3"]
) -> Float[Array, "channels height width"]:
    """The image whose value at each position p is that of `x` at `inverse_map` @ p."""
    _, height, width = x.shape
    padded = jnp.pad(x, ((0, 0), (height - 1, height - 1), (width - 1, width - 1)), mode="reflect")
    fine = _upsampled(_upsampled(padded).mT).mT
    down, right = np.meshgrid(_positions(height), _positions(width), indexing="ij")
    # In full precision, although accelerators round the factors of float32 products by default: a relative error of a
    # thousandth would be a visible shift.
    positions = jnp.stack([right, down, np.ones_like(right)], axis=-1)
    sources = jnp.matmul(positions, inverse_map.T, precision="highest")
    rows, columns = (2 * sources[..., 1] + padded.shape[1] - 1, 2 * sources[..., 0] + padded.shape[2] - 1)
    warped = jax.vmap(lambda channel: map_coordinates(channel, [rows, columns], order=1))(fine)
    return _downsampled(_downsampled(warped).mT).mT


_BORDER = len(_SYM6) // 4
"""Pixels around the new image that the last filter requires."""


def _positions(size: int) -> Float[np.ndarray, " positions"]:
    """Positions of the rows or columns of the new image at twice the resolution, in pixels from its middle. The filter
    is taken to be centred at its sixth tap: so every other position, from the first on, is that of a pixel."""
    return (np.arange(2 * (size + 2 * _BORDER)) / 2 - _BORDER - (size - 1) / 2).astype(np.float32)


def _upsampled(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows 2*columns"]:
    """Twice as many columns: zeros between them, then the low-pass filter. With `_downsampled` it keeps the mean."""
    return _filtered(x, _SYM6[::-1], padding=[(6, 6)], lhs_dilation=(2,), window_strides=(1,))


def _downsampled(x: Float[Array, "channels rows columns"]) -> Float[Array, "channels rows columns2"]:
    """Half as many columns: the low-pass filter, then every other column, without the border."""
    return _filtered(x, _SYM6, padding=[(5, 5)], window_strides=(2,))[..., _BORDER:-_BORDER]


def _filtered(x: Float[Array, "channels rows columns"], taps: Float[np.ndarray, " taps"], **options: Any) -> Array:
    """A filter along the last axis: each row of each channel is a one-dimensional signal."""
    signals = x.reshape(-1, 1, x.shape[-1])
    kernel = jnp.asarray(taps.reshape(1, 1, -1), x.dtype)
    return jax.lax.conv_general_dilated(signals, kernel, precision="highest", **options).reshape(*x.shape[:-1], -1)
