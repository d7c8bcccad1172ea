r"""The two bilinear resizes for the input of Inception; they differ in the position of a pixel.

TensorFlow 1 (`resize_tensorflow1`) takes the value of output pixel $i$ at the position $p_i = i\, n / m$ in an input
of $n$ pixels, so that pixel 0 stays at pixel 0 and the last output pixels repeat the last input pixel:

$$y_i = (1 - \lambda_i)\, x_{\lfloor p_i \rfloor} + \lambda_i\, x_{\min(\lfloor p_i \rfloor + 1,\, n - 1)},
  \qquad \lambda_i = p_i - \lfloor p_i \rfloor.$$

All newer libraries (`resize_half_pixel`) use positions of pixel centres, $p_i = (i + 1/2)\, n / m - 1/2$. From 32
pixels to 299 the two results are shifted against each other by almost half an input pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._validate import as_count, check_floating, Count


def resize_tensorflow1(
    x: Float[Array, "*rows height width"], size: Count = 299
) -> Float[Array, "*rows new_height new_width"]:
    r"""Bilinear interpolation as the graph of the FID literature does it: TensorFlow 1's `resize_bilinear` with
    `align_corners=False`, without half-pixel centres and without a filter against aliasing.

    $$y_i = (1 - \lambda_i)\, x_{l_i} + \lambda_i\, x_{\min(l_i + 1,\, n - 1)}, \qquad l_i + \lambda_i = i\, n / m$$

    along the width, then along the height, in the order and the precision of TensorFlow's kernel.

    **Arguments:** `x` images in floating point, channels among the leading axes; `size` m of both new axes.

    **Raises:** `ValueError` for images of another dtype or without pixels, or if `size` is no integer >= 1.

    **Reference:** the kernel's definition, `tensorflow/core/kernels/image/resize_bilinear_op.cc` and
    `image_resizer_state.h` (`LegacyScaler`); torch-fidelity implements the same in PyTorch.
    """
    _check(x)
    size = as_count("size", size)
    return _interpolated(_interpolated(x, size, -1), size, -2)


def resize_half_pixel(
    x: Float[Array, "*rows height width"], size: Count = 299
) -> Float[Array, "*rows new_height new_width"]:
    """Bilinear interpolation between pixel centres, with a triangle filter as wide as the step if the image shrinks.

    This is `interpolate(mode="bilinear", align_corners=False, antialias=True)` of PyTorch. It is the default of
    torchmetrics since version 1.8 (July 2025); earlier versions resize like `resize_tensorflow1`.

    **Arguments, Raises:** as for `resize_tensorflow1`.
    """
    _check(x)
    size = as_count("size", size)
    shape = (*x.shape[:-2], size, size)
    return jax.image.resize(x, shape, "linear", antialias=True, precision=jax.lax.Precision.HIGHEST)


def _check(x: Float[Array, "*rows height width"]) -> None:
    check_floating("x", x.dtype)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x must be (..., height, width), neither of them 0, got {x.shape}")


def _interpolated(x: Float[Array, "*axes"], size: int, axis: int) -> Float[Array, "*new_axes"]:
    low, high, share = _nodes(x.shape[axis], size)
    share = jnp.asarray(share.reshape(-1, *[1] * (-axis - 1)), x.dtype)
    before = jnp.take(x, low, axis)
    return before + (jnp.take(x, high, axis) - before) * share


def _nodes(old: int, new: int) -> tuple[Int[np.ndarray, " new"], Int[np.ndarray, " new"], Float[np.ndarray, " new"]]:
    """The two pixels around each new pixel, and its distance from the first; in float32, as in TensorFlow's kernel."""
    position = np.arange(new, dtype=np.float32) * np.float32(np.float32(old) / np.float32(new))
    low = np.minimum(position.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), position - low.astype(np.float32)
