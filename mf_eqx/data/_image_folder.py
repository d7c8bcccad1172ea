"""Images in folders, a folder for each class, decoded when they are asked for.

Needs Pillow, from the extra `images`.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from .._optional import optional
from ._file import PathLike, read_regular
from ._source import AbstractSource, Rows

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}
"""Pillow's modes of 8 bits or less per channel; converting deeper ones to RGB would clip their values."""
_MOST_PIXELS = 1 << 27
_LARGEST_FILE = 1 << 27
"""Bytes before decoding."""


class ImageFolderSource(AbstractSource):
    """Images in root/class/**/image.png, or without classes in root/image.png; also .jpg, .jpeg, .webp, .bmp.

    Rows are in the order of their paths below `root`, bytes of shape (3, size, size) in RGB. An image is halved by a
    box filter as long as its smaller side is at least twice `size`, then resized by a bicubic filter so that the
    smaller side is `size`, and its centre is taken (what ADM does with ImageNet). Transparency is dropped, a
    description of how the camera was held is not looked at, and of an animation the first image is taken. Names that
    start with a dot and files of other kinds are left alone.

    **Attributes:** `class_names` of the labels, sorted; None without classes.

    **Arguments:** `root`; `size` in pixels, of both sides.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names folder or file: no images, a class without
    any, images both beside and in folders; when it is read, an image that is no ordinary file, broken, of more than 8
    bits per channel or too large (128 MiB, or 2^27 pixels). `MissingDependency` if Pillow is missing.

    Reference: Prafulla Dhariwal and Alex Nichol, "Diffusion models beat GANs on image synthesis", 2021,
    arXiv:2105.05233.
    """

    def __init__(self, root: PathLike, *, size: int):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        _pillow()
        self._root, self._size = Path(root), size
        self.name, self.row_shape, self.dtype = str(root), (3, size, size), np.dtype(np.uint8)
        folders = sorted(entry.name for entry in self._root.iterdir() if entry.is_dir() and _is_shown(entry.name))
        beside = sorted(entry.name for entry in self._root.iterdir() if not entry.is_dir() and _is_image(entry.name))
        if folders and beside:
            raise ValueError(f"{root}: must hold images or folders of them, got {beside[0]} beside {folders[0]}")
        self.class_names = folders or None
        self.labels = len(folders) or None
        found = {name: _images(self._root, name) for name in folders}
        if empty := [name for name in folders if not found[name]]:
            raise ValueError(f"{self._root / empty[0]}: must hold images, {', '.join(sorted(_SUFFIXES))}, got none")
        labelled = [(path, label) for label, name in enumerate(folders) for path in found[name]]
        self._paths, self._label = _in_order(labelled or [(name, 0) for name in beside])
        if not self._paths:
            raise ValueError(f"{root}: must hold images, {', '.join(sorted(_SUFFIXES))}, or folders of them, got none")

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = np.empty((len(rows), *self.row_shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            x[place] = _read_image(self._root / self._paths[row], self._size)
        return Rows(x, None if self.labels is None else self._label[rows])


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return _is_shown(name) and os.path.splitext(name)[1].lower() in _SUFFIXES


def _images(root: Path, folder: str) -> list[str]:
    """Paths below `root` of all images in one of its folders, however deep."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(root / folder, onerror=refuse):
        folders[:] = filter(_is_shown, folders)
        below = Path(place).relative_to(root)
        found += [(below / name).as_posix() for name in files if _is_image(name)]
    return found


def _in_order(labelled: list[tuple[str, int]]) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    labelled = sorted(labelled)
    return [path for path, _ in labelled], np.array([label for _, label in labelled], np.int32)


def _pillow() -> Any:
    with optional("PIL", extra="images"):
        from PIL import Image
    return Image


def _read_image(path: Path, size: int) -> UInt8[np.ndarray, "3 size size"]:
    content = read_regular(path, _LARGEST_FILE)
    try:
        with _pillow().open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_image(image, size)
            cropped = _cropped(image.convert("RGB"), size)
    except Exception as error:  # decoders fail in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: must be a whole image, got: {reason}") from error
    return np.asarray(cropped).transpose(2, 0, 1)


def _check_image(image: Any, size: int) -> None:
    """Refuses, from the header alone, what would lose its values or fill memory."""
    width, height = image.size
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, of more than 8 bits per channel")
    # A long image grows when its smaller side is brought to `size`.
    scale = size / min(width, height)
    if (pixels := round(width * height * max(1.0, scale**2))) > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, {pixels:,} at size {size}, more than {_MOST_PIXELS:,}")


def _cropped(image: Any, size: int) -> Any:
    """The centre of an image whose smaller side is brought to `size`."""
    resampling = _pillow().Resampling
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))
