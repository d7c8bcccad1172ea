"""Images in folders, one folder for each class, decoded when they are read.

Requires Pillow, from the extra `images`.
"""

import collections
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int, UInt8

from .._files import read_regular
from .._leaves import listed
from .._optional import optional
from .._validate import as_count, Count
from ._file import PathLike, printable
from ._source import AbstractSource, Rows

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}
"""Pillow's modes of 8 bits or less per channel; converting deeper ones to RGB would clip their values."""
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PIXELS = 1 << 27
_LARGEST_FILE = 1 << 27
"""In bytes, before decoding."""


class ImageFolderSource(AbstractSource):
    """Images in root/class/**/image.png, or without classes in root/image.png; also .jpg, .jpeg, .webp, .bmp.

    Rows are in the order of their paths below `root`, uint8 of shape (3, height, width) in RGB. An image is halved by a
    box filter as long as both its sides are at least twice those of the result, then resized by a bicubic filter so
    that it just covers the result, then cropped to its centre (as ADM does with ImageNet, for squares). Images of fewer
    than 8 bits per channel are scaled to 0 to 255. Transparency is dropped, colours are converted to RGB without their
    colour profile, the EXIF orientation is ignored, and only the first image of an animation is used.

    Links to images and to folders are followed. Names that start with a dot and files of other types are skipped.

    **Attributes:** `class_names` of the labels, sorted, or None without classes; `paths` of the rows below `root`;
    `passed_over` the number of skipped files of each type: by suffix in lower case, "without suffix", or "hidden" for
    names that start with a dot (a hidden folder counts as one).

    **Arguments:** `root` the folder; `size` of the resulting images in pixels: of both sides, or (height, width).

    **Raises:** `OSError` if a file cannot be opened or a folder cannot be listed; `ValueError` that names folder or
    file: no images, a class without images, images beside folders of images, a broken link, or a link to a folder that
    contains it; when rows are read, an image that is not an ordinary file, is damaged, has more than 8 bits per channel
    or is too large (128 MiB, or 2^27 pixels). `MissingDependency` if Pillow is missing.

    Reference: Prafulla Dhariwal and Alex Nichol, "Diffusion models beat GANs on image synthesis", 2021,
    arXiv:2105.05233.
    """

    def __init__(self, root: PathLike, *, size: Count | tuple[Count, Count]):
        sides = tuple(as_count("size", side) for side in (size if isinstance(size, tuple) else (size, size)))
        if len(sides) != 2:
            raise ValueError(f"size must be one number or (height, width), got {size}")
        height, width = sides
        _pillow()
        self._root, self._size = Path(root), (height, width)
        self.name, self.row_shape, self.dtype = str(root), (3, height, width), np.dtype(np.uint8)
        passed_over = collections.Counter()
        folders, images_in_root = _folders_and_images(self._root, passed_over)
        if folders and images_in_root:
            raise ValueError(
                f"{root}: must hold images or folders of them, got {images_in_root[0]} beside {folders[0]}"
            )
        self.class_names = tuple(map(printable, folders)) or None
        self.labels = len(folders) or None
        images = {name: _images_below(self._root, name, passed_over) for name in folders}
        self.passed_over = dict(sorted(passed_over.items()))
        suffixes = ", ".join(sorted(_SUFFIXES))
        if empty := [name for name in folders if not images[name]]:
            self._refuse(self._root / empty[0], f"images, {suffixes}")
        labelled = [(path, label) for label, name in enumerate(folders) for path in images[name]]
        self.paths, self._label = _sorted_by_path(labelled or [(name, 0) for name in images_in_root])
        if not self.paths:
            self._refuse(self._root, f"images, {suffixes}, or folders of them")

    def _refuse(self, folder: Path, wanted: str) -> NoReturn:
        """Raises the error that there are no images, with the files that were skipped."""
        found = f"passed over in {self.name}: {self.passed_over_as_text()}"
        advice = "" if folder == self._root else " (a folder of no class must be moved elsewhere)"
        raise ValueError(f"{folder}: must hold {wanted}, got none{advice}; {found}")

    def passed_over_as_text(self) -> str:
        """The numbers of skipped files by type, as one line of text."""
        kinds = sorted(self.passed_over, key=lambda kind: -self.passed_over[kind])
        return listed([f"{self.passed_over[kind]:,} {kind}" for kind in kinds], 8) or "nothing"

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = np.empty((len(rows), *self.row_shape), np.uint8)
        for position, row in enumerate(rows.tolist()):
            x[position] = _read_image(self._root / self.paths[row], self._size)
        return Rows(x, None if self.labels is None else self._label[rows])


def _folders_and_images(folder: Path, passed_over: collections.Counter[str]) -> tuple[list[str], list[str]]:
    """Names of folders and of images in a folder, both sorted; all other files are counted in `passed_over`."""
    folders, images = [], []
    for entry in _visible_entries(folder, passed_over):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            folders.append(entry.name)
        elif suffix in _SUFFIXES:
            images.append(entry.name)
        else:
            passed_over[printable(suffix) or "without suffix"] += 1
    return sorted(folders), sorted(images)


def _visible_entries(folder: Path, passed_over: collections.Counter[str]) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder whose names do not start with a dot; the others are counted in `passed_over`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                passed_over["hidden"] += 1
                continue
            if entry.is_symlink():
                _check_link(entry)
            yield entry


def _check_link(entry: os.DirEntry[str]) -> None:
    try:
        entry.stat()
    except OSError as error:
        raise ValueError(f"{entry.path}: must be a link to a file or folder, got: {error.strerror}") from error


def _images_below(root: Path, folder: str, passed_over: collections.Counter[str]) -> list[str]:
    """Paths below `root` of all images in one of its folders, at any depth and also behind links."""
    paths, pending = [], [(folder, (_identity(root),))]
    while pending:
        path, parents = pending.pop()
        identity = _identity(root / path)
        if identity in parents:
            raise ValueError(f"{root / path}: must not be a link to a folder that it lies in, got a cycle")
        folders, images = _folders_and_images(root / path, passed_over)
        paths += [f"{path}/{name}" for name in images]
        pending += [(f"{path}/{name}", (*parents, identity)) for name in folders]
    return paths


def _identity(folder: Path) -> tuple[int, int]:
    """Numbers that identify a folder, the same for every path that leads to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _sorted_by_path(labelled: list[tuple[str, int]]) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    labelled = sorted(labelled)
    return [path for path, _ in labelled], np.array([label for _, label in labelled], np.int32)


def _pillow() -> Any:
    with optional("PIL"):
        from PIL import Image
    return Image


def _read_image(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "3 height width"]:
    content = read_regular(path, _LARGEST_FILE)
    try:
        _check_depth(content)
        with _pillow().open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_image(image, size)
            cropped = _cropped(image.convert("RGB"), size)
    except Exception as error:  # decoders fail in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, _pillow().UnidentifiedImageError):  # its message names the buffer instead of the file
            reason = f"nothing that Pillow recognises as {', '.join(_FORMATS)}"
        raise ValueError(f"{path}: must be a whole image, or be moved elsewhere, got: {reason}") from error
    return np.asarray(cropped).transpose(2, 0, 1)


def _check_depth(content: bytes) -> None:
    """Refuses a PNG file of 16 bits per channel. Pillow reduces colour images to 8 bits and reports a mode of 8 bits;
    so the depth is read from the header, which comes first in the file."""
    if not content.startswith(_PNG):
        return
    if content[12:16] != b"IHDR":
        raise ValueError("a PNG file that does not start with its header")
    if content[24:25] > b"\x08":
        raise ValueError(f"{content[24]} bits per channel, more than 8")


def _check_image(image: Any, size: tuple[int, int]) -> None:
    """Refuses, by its header alone, an image whose values would be clipped or that would fill the memory."""
    width, height = image.size
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, of more than 8 bits per channel")
    # A long image can have more pixels than before once it is resized to cover the result.
    if (pixels := round(width * height * max(1.0, _scale(image, size) ** 2))) > _MOST_PIXELS:
        result = " x ".join(map(str, size))
        raise ValueError(f"{width} x {height} pixels, {pixels:,} to cover {result}, more than {_MOST_PIXELS:,}")


def _scale(image: Any, size: tuple[int, int]) -> float:
    """The factor by which an image just covers `size`, (height, width)."""
    return max(size[0] / image.height, size[1] / image.width)


def _cropped(image: Any, size: tuple[int, int]) -> Any:
    """The centre of an image that just covers `size`, (height, width)."""
    resampling, (height, width) = _pillow().Resampling, size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize(tuple(side // 2 for side in image.size), resampling.BOX)
    scale = _scale(image, size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
