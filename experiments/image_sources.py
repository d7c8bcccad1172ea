"""Images of one's own, by their paths: what `images.py` and others train on and hold samples against.

    train, test, names = image_sources.open_parts(("photos",), (), size=(64,), holdout=0.1)

What a path means is seen in what it holds:

    a folder of images, or with a folder of images for each class      needs a size
    a folder or an archive of CIFAR-10                                 has its own test images
    a folder with the IDX files of MNIST or of a set like it           has its own test images
    one IDX file of images, or that and one of labels
    a folder of shards by prepare_data.py
"""

import dataclasses
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from mf_eqx import data, run

CIFAR10 = ("data_batch_1.bin", "data_batch_1", "test_batch.bin", "test_batch")
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where the package dataset-fashion-mnist of Debian and Ubuntu has the files."""
FASHION_CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""What its labels mean: IDX files hold no names."""
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Of the files that a folder of images may hold."""


class Part(data.AbstractSource):
    """Some rows of a source, perhaps in grey: the mean over the channels."""

    def __init__(self, source: data.AbstractSource, rows: Int[np.ndarray, " rows"], name: str, *, grey: bool = False):
        self.source, self.rows, self.grey, self.name = source, rows, grey, name
        self.row_shape = (1, *source.row_shape[1:]) if grey else source.row_shape
        self.dtype, self.labels, self.digest = source.dtype, source.labels, source.digest
        self.row_condition, self.class_names = source.row_condition, source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, " rows"]) -> data.Rows:
        taken = self.source.take(self.rows[rows])
        x = np.rint(taken.x.mean(axis=1, keepdims=True)).astype(self.dtype) if self.grey else taken.x
        return taken._replace(x=x)


class Parts(NamedTuple):
    """Images to train on, images that are held out, and the names of the classes if they have any."""

    train: data.AbstractSource
    test: data.AbstractSource
    class_names: Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class ImageSettings(run.Settings):
    """The base of the configuration of a script that trains on images: which ones."""

    data: tuple[str, ...] = ("images",)
    """A folder of images, or with a folder of them for each class; CIFAR-10, its folder or archive; a folder with IDX
    files as of MNIST; an IDX file of images and one of labels; a folder of shards."""
    test: tuple[str, ...] = ()
    """Images to judge by, which are never trained on, given like data. By default those of CIFAR-10 or MNIST, else a
    part of data."""
    holdout: float = 0.1
    """Share of the data that is held out if there are no test images, in (0, 1); the same images whatever the seed.
    Refused where there are test images."""
    size: tuple[int, ...] = ()
    """Side in pixels, or height and width, to which images in folders are resized and cropped. Other images keep their
    size, and another one is refused."""
    grey: bool = False
    """Images in grey: the mean over the colours."""

    def check_images(self) -> None:
        """Refuses fields of this class that are out of range."""
        self.check(size=1)
        run.check_sizes(self, size=1 << 14)
        if len(self.size) > 2:
            raise ValueError(f"size must be a side, or height and width, got {len(self.size)} numbers")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie in (0, 1), got {self.holdout}")

    def open_parts(self) -> Parts:
        """Images to train on and images that are held out.

        **Raises:** `ValueError` as the function of this name, and for a `size` or a `holdout` that these data have no
        use for.
        """
        parts = open_parts(self.data, self.test, size=self.size, holdout=self.holdout, grey=self.grey)
        if self.holdout != ImageSettings.holdout:
            check_holdout(self.data, self.test, self.holdout)
        check_size(parts.train, self.size)
        return parts


def open_parts(
    paths: Sequence[str], test: Sequence[str], *, size: Sequence[int], holdout: float, grey: bool = False
) -> Parts:
    """The images at `paths`. Those at `test` are held out; without, the test images that belong to CIFAR-10 or MNIST;
    for all others a random share, `holdout`, which is the same in every run.

    **Raises:** `ValueError` if there are none, too few, or some that a network of pixels cannot take.
    """
    _check_number(paths)
    for name, given in (("data", paths), ("test", test)):
        if missing := [path for path in given if not Path(path).exists()]:
            raise ValueError(f"{name} must be files or folders that exist, got {missing[0]}")
    if test and not has_test_images(Path(test[0])) and _first_file(paths, "train") == _first_file(test, "t10k"):
        raise ValueError(f"test must be other images than those that are trained on, got {test[0]} for both")
    source = open_images(paths, size=size)
    _check(source)
    every = np.arange(len(source))
    if test or has_test_images(Path(paths[0])):
        held_out = open_images(test or paths, size=size, train=False)
        _check_alike(source, held_out)
        rows = every, np.arange(len(held_out))
    else:
        held_out, order = source, np.random.default_rng(0).permutation(len(source))
        count = round(holdout * len(source))
        rows = np.sort(order[count:]), np.sort(order[:count])
    if min(map(len, rows)) < 2:
        raise ValueError(f"{source.name}: must have two images to train on and two held out, got {[*map(len, rows)]}")
    train = Part(source, rows[0], f"training images of {source.name}", grey=grey)
    return Parts(train, Part(held_out, rows[1], f"test images of {held_out.name}", grey=grey), source.class_names)


def open_images(paths: Sequence[str], *, size: Sequence[int] = (), train: bool = True) -> data.AbstractSource:
    """The images at one path, or at a path of images and one of labels. For a folder of images, it is printed how many
    files are images, and which are passed over.

    **Arguments:** `paths`; `size` for folders of images, of both sides or height and width; `train` False for the test
    images of CIFAR-10 or MNIST.
    """
    _check_number(paths)
    path = Path(paths[0])
    if len(paths) == 2 or _is_idx(path):
        return read_idx(paths)
    if (path / "manifest.json").exists():
        return data.ShardSource(path)
    if files := mnist_files(path, "train" if train else "t10k"):
        return read_idx(files)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: must be a folder of images, got one image: give the folder that it is in")
    if path.is_file() or _is_cifar10(path):
        return data.read_cifar10(path, train=train)
    if path.is_dir() and not size:
        raise ValueError(f"size must be given for a folder of images, in pixels, got none for {path}")
    height, width = (*size, *size)[:2]
    source = data.ImageFolderSource(path, size=(height, width))
    passed_over = source.passed_over_as_text()
    run.tell(f"{path}: {len(source):,} images, resized and cropped to {height} x {width}; passed over: {passed_over}")
    return source


def check_size(source: data.AbstractSource, size: Sequence[int]) -> None:
    """Refuses a size that is given for images which are not resized, and have another one."""
    sides = source.row_shape[1:]
    if size and sides != (*size, *size)[:2]:
        rule = f"{' '.join(map(str, sides))} for {source.name}, which are not resized"
        raise ValueError(f"size must be left out, or {rule}, got {' '.join(map(str, size))}")


def check_holdout(paths: Sequence[str], test: Sequence[str], holdout: float) -> None:
    """Refuses a share to hold out that is given where there are test images."""
    if test or has_test_images(Path(paths[0])):
        raise ValueError(f"holdout must be left out where there are test images, got {holdout}")


def spread(number: int, count: int) -> Int[np.ndarray, " count"]:
    """So many of the numbers below `number`, in equal distances."""
    return np.arange(count) * number // count


def has_test_images(path: Path) -> bool:
    """Whether a data set has test images of its own."""
    return bool(mnist_files(path, "t10k")) or _is_cifar10(path) or (path.is_file() and not _is_idx(path))


def _check_number(paths: Sequence[str]) -> None:
    if not 1 <= len(paths) <= 2:
        raise ValueError(f"data must be one path, or IDX files of images and of labels, got {len(paths)} paths")


def _first_file(paths: Sequence[str], part: str) -> Path:
    """What a part of the data is read from: a file of images, or a folder."""
    return (mnist_files(Path(paths[0]), part) or [Path(paths[0])])[0].resolve()


def mnist_files(folder: Path, part: str) -> list[Path]:
    """The file of the images of a part, "train" or "t10k", and that of their labels, as far as they are there."""
    found = (folder.glob(f"{part}-{what}*ubyte*") for what in ("images", "labels"))
    images, labels = (sorted(path for path in paths if path.is_file()) for paths in found)
    return [*images[:1], *labels[:1]] if images else []


def means_over_squares(
    x: UInt8[np.ndarray, "rows channels height width"], most: int
) -> Float[np.ndarray, "rows channels _ _"]:
    """Pixels in [0, 255], or their means over squares that are just large enough for at most `most` numbers."""
    count, channels, height, width = x.shape
    side = min(math.ceil(math.sqrt(x[0].size / most)), height, width)
    rows, columns = height // side, width // side
    squares = x[..., : rows * side, : columns * side].reshape(count, channels, rows, side, columns, side)
    return squares.mean(axis=(3, 5), dtype=np.float32)


def in_parts(
    x: UInt8[np.ndarray, "rows channels height width"], size: int
) -> Iterator[UInt8[np.ndarray, "_ channels height width"]]:
    """All images, `size` or fewer at once and always as many: the last part repeats the last image."""
    size = min(size, len(x))
    for start in range(0, len(x), size):
        yield x[np.minimum(np.arange(start, start + size), len(x) - 1)]


def read_idx(paths: Sequence[str | Path], labels: int | None = None) -> data.ArraySource:
    """The images at a path, and their labels if there is a path of them. The names of the classes are known of
    Fashion-MNIST where its package has it."""
    is_fashion = all(Path(path).parent == Path(FASHION_MNIST) for path in paths)
    has_names = is_fashion and len(paths) == 2 and labels in (None, len(FASHION_CLASSES))
    return data.read_idx(*paths, labels=labels, class_names=FASHION_CLASSES if has_names else None)


def _is_cifar10(path: Path) -> bool:
    return any((path / name).exists() for name in CIFAR10)


def _is_idx(path: Path) -> bool:
    """Whether a file, gzipped or not, begins as IDX files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                start = file.read(2)
        except (OSError, EOFError, zlib.error):  # damaged, as its reader will say
            return False
    return start == b"\0\0"


def _check(source: data.AbstractSource) -> None:
    shape = source.row_shape
    if source.dtype != np.uint8 or len(shape) != 3 or shape[0] not in (1, 3) or source.row_condition is not None:
        rule = "images of uint8 with 1 or 3 channels first, with labels or without"
        raise ValueError(f"{source.name}: must hold {rule}, got {source.dtype} of shape {shape}")


def _check_alike(train: data.AbstractSource, test: data.AbstractSource) -> None:
    """Refuses test images of another kind than those that are trained on."""
    _check(test)
    if test.row_shape != train.row_shape:
        raise ValueError(f"{test.name}: row_shape must be {train.row_shape} as in {train.name}, got {test.row_shape}")
    found, wanted = test.class_names, train.class_names
    if found and wanted and [*found] != [*wanted]:
        raise ValueError(f"{test.name}: class_names must be {wanted} as in {train.name}, got {found}")
    if (test.labels or 0) > (train.labels or 0):
        raise ValueError(f"{test.name}: labels must be at most {train.labels}, as in {train.name}, got {test.labels}")
