"""Images and grids of them, pixel for pixel."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real, UInt8

from .._files import write_whole
from .._optional import optional
from .._validate import as_count, Count
from ._figure import plain, save_figure

_DPI = 128
_GAP = 4
_PAD = 8
_LINE = 22
_FONT_SIZE = 8


def save_image_grid(
    path: str | Path,
    images: Real[Array | np.ndarray, "rows columns channels height width"],
    low: int | float,
    high: int | float,
    *,
    scale: Count | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Save a grid of images as PNG. Each pixel becomes a square of equal pixels: nothing is interpolated.

    **Arguments:**

    - `path`: of the file.
    - `images`: real numbers, channels first: 1 channel (grey) or 3 channels (red, green, blue).
    - `low`, `high`: the values shown as black and as full brightness. Values outside are
      clipped; pixels that are not finite are red.
    - `scale`: side of a pixel's square; by default, images become about 48 pixels wide or high.
    - `row_labels`, `column_labels`: texts at the left and at the top.
    - `title`: a text above everything.

    **Raises:** `ValueError` if `images` has another shape or dtype, if low and high are not finite or low < high does
    not hold, if low is negative for unsigned integers (pixels from 0 to 255 are not in [-1, 1]), if `scale` is not an
    integer >= 1, or if the number of labels is not that of rows or columns.
    """
    images = np.asarray(images)
    _check(images, low, high, row_labels, column_labels)
    scale = max(1, round(48 / max(images.shape[-2:]))) if scale is None else as_count("scale", scale)
    _draw(path, _to_bytes(images, low, high), scale, row_labels or (), column_labels or (), title or "")


def save_image(
    path: str | Path, image: Real[Array | np.ndarray, "channels height width"], low: int | float, high: int | float
) -> None:
    """Save one image as PNG of its own size, in red, green and blue. This requires Pillow (extra `images`).

    **Arguments:** as for `save_image_grid`.

    **Raises:** `ValueError` as `save_image_grid` does.
    """
    with optional("PIL"):
        from PIL import Image

    images = np.asarray(image)[None, None]
    _check(images, low, high, None, None)
    content = io.BytesIO()
    Image.fromarray(_to_bytes(images, low, high)[0, 0]).save(content, format="PNG")
    write_whole(path, content.getvalue())


def _check(
    images: np.ndarray,
    low: int | float,
    high: int | float,
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
) -> None:
    if images.ndim != 5 or images.shape[2] not in (1, 3) or 0 in images.shape:
        rule = "(rows, columns, channels, height, width), none of them 0, with 1 or 3 channels"
        raise ValueError(f"images must have the shape {rule}; got {images.shape}")
    if not any(jnp.issubdtype(images.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"images must be real numbers, got {images.dtype}")
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low must be < high, both finite, got {low} and {high}")
    if jnp.issubdtype(images.dtype, jnp.unsignedinteger) and low < 0:
        raise ValueError(f"low must be >= 0 for images in {images.dtype}, got {low}")
    for name, labels, size in [("row_labels", row_labels, 0), ("column_labels", column_labels, 1)]:
        if labels is not None and len(labels) != images.shape[size]:
            raise ValueError(f"{name} must be {images.shape[size]} texts, got {len(labels)}")


def _to_bytes(
    images: np.ndarray, low: int | float, high: int | float
) -> UInt8[np.ndarray, "rows columns height width 3"]:
    images = np.moveaxis(images.astype(np.float64), 2, -1)
    finite = np.isfinite(images).all(axis=-1, keepdims=True)
    brightness = np.clip((np.where(finite, images, low) - low) / (high - low), 0, 1)
    return np.where(finite, np.round(255 * brightness), [255, 0, 0]).astype(np.uint8)


def _draw(
    path: str | Path,
    images: UInt8[np.ndarray, "rows columns height width 3"],
    scale: int,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
) -> None:
    with optional("matplotlib"):
        from matplotlib.figure import Figure

    grid, down, across = _tile(images, scale, _text_width(column_labels))
    left = _PAD + (_text_width(row_labels) + _PAD if row_labels else 0)
    top = _PAD + grid.shape[0]
    width = max(left + grid.shape[1], _PAD + _text_width([title])) + _PAD
    height = top + _LINE * (bool(column_labels) + bool(title)) + _PAD
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI)
    figure.figimage(grid, left, _PAD, origin="upper")

    def put(x: int | float, y: int | float, text: str, align: str, vertical: str) -> None:
        figure.text(x / width, y / height, plain(text), fontsize=_FONT_SIZE, ha=align, va=vertical)

    for i, label in enumerate(row_labels):
        put(left - _PAD, top - i * down - (down - _GAP) / 2, label, "right", "center_baseline")
    for i, label in enumerate(column_labels):
        put(left + i * across + (across - _GAP) / 2, top + _PAD, label, "center", "baseline")
    put(_PAD, top + _PAD + _LINE * bool(column_labels), title, "left", "baseline")
    save_figure(path, figure)


def _text_width(texts: Sequence[str]) -> int:
    """The width of the longest text in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    font = FontProperties(size=_FONT_SIZE)
    return max((math.ceil(renderer.get_text_width_height_descent(text, font, False)[0]) for text in texts), default=0)


def _tile(
    images: UInt8[np.ndarray, "rows columns height width 3"], scale: int, label_width: int
) -> tuple[UInt8[np.ndarray, "picture_height picture_width 3"], int, int]:
    """One white picture with all images on it, and the distance from one to the next, down and across."""
    rows, columns, height, width, _ = images.shape
    height, width = height * scale, width * scale
    down, across = height + _GAP, max(width, label_width + _PAD if label_width else 0) + _GAP
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    grid = np.full((rows, down, columns, across, 3), 255, np.uint8)
    start = (across - _GAP - width) // 2
    grid[:, :height, :, start : start + width] = large.transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * down, columns * across, 3)[:-_GAP, :-_GAP], down, across
