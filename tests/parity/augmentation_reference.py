"""The geometric augmentation of EDM in NumPy and SciPy, float64, one image at a time.

Karras et al. 2020 (arXiv 2006.06676, App. B) and 2022 (arXiv 2206.00364, App. F.2). Coordinates are in pixels, (x, y)
with x to the right and y down, about the centre of the image, where pixel i of n lies at i - (n - 1) / 2. A point p of
the image moves to G p, where

    G = translate(size / 8 * shift) R(-angle) diag(2^(stretch / 5), 2^(-stretch / 5)) R(angle) 2^(scale / 5)

and R turns x towards y. The image is looked up, linearly, at twice its resolution, to which the low-pass of the wavelet
sym6 brings it and from which the same filter brings it back. Sample j of the fine image lies at pixel j / 2.
"""

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.signal import upfirdn

LOW_PASS = np.array(
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
"""Daubechies' least asymmetric wavelet with 6 vanishing moments (Ten Lectures on Wavelets, 1992), in the order of
PyWavelets' `Wavelet("sym6").dec_lo`."""

MARGIN = 3
"""Pixels around the image that the way back needs: half the filter at twice the resolution."""


def transformation(scale, stretch, angle, shift, height, width):
    """G as a matrix of homogeneous (x, y, 1)."""

    def rotation(angle):
        cos, sin = np.cos(angle), np.sin(angle)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    isotropic = np.diag([2 ** (0.2 * scale), 2 ** (0.2 * scale), 1])
    along_axes = np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch), 1])
    translation = np.array([[1, 0, 0.125 * width * shift[0]], [0, 1, 0.125 * height * shift[1]], [0, 0, 1]])
    return translation @ rotation(-angle) @ along_axes @ rotation(angle) @ isotropic


def finer(x, axis):
    """Twice as many samples: zeros in between, then the filter."""
    full = upfirdn(LOW_PASS, x, up=2, axis=axis)  # of it, sample j + 5 belongs to pixel j / 2
    return np.take(full, np.arange(5, 5 + 2 * x.shape[axis]), axis)


def coarser(x, axis):
    """Half as many, without `MARGIN` at both ends: the adjoint of `finer`."""
    full = upfirdn(LOW_PASS[::-1], x, down=2, axis=axis)
    return np.take(full, np.arange(2 * MARGIN, x.shape[axis] // 2), axis)


def apply(x, flip, scale, stretch, angle, shift):
    """The augmented image (channels, height, width)."""
    x = np.asarray(x, np.float64)[:, :, :: -1 if flip else 1]
    _, height, width = x.shape
    back = np.linalg.inv(transformation(scale, stretch, angle, shift, height, width))
    fine = np.pad(x, ((0, 0), (height - 1,) * 2, (width - 1,) * 2), mode="reflect")
    fine = finer(finer(fine, 1), 2)
    centre = np.array([(width - 1) / 2, (height - 1) / 2, 0])
    rows, columns = (np.arange(2 * (size + 2 * MARGIN)) / 2 - MARGIN for size in (height, width))
    points = np.stack([*np.meshgrid(columns, rows), np.ones((rows.size, columns.size))], -1)
    sources = (points - centre) @ back.T + centre
    where = [2 * (sources[..., 1] + height - 1), 2 * (sources[..., 0] + width - 1)]
    found = np.stack([map_coordinates(channel, where, order=1, mode="grid-constant") for channel in fine])
    return coarser(coarser(found, 1), 2)
