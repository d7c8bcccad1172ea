"""Real data sets into the one form that training reads: shards of plain arrays with a manifest.

    python experiments/prepare_data.py --cifar10 cifar-10-binary.tar.gz --to data/cifar10
    python experiments/prepare_data.py --cifar10 cifar-10-batches-bin --split test --to data/cifar10_test
    python experiments/prepare_data.py --idx train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --to data/mnist
    python experiments/prepare_data.py --idx /usr/share/datasets/fashion-mnist --split test --to data/fashion_test
    python experiments/prepare_data.py --images imagenet/train --size 64 --to data/imagenet64
    python experiments/prepare_data.py --npy x_0.npy x_1.npy --npy-label y_0.npy y_1.npy --to data/latents
    python experiments/prepare_data.py --npy actions.npy --npy-condition observations.npy --to data/robot
    python experiments/prepare_data.py --array-record train.array_record --labels 10 --to data/train
    python experiments/prepare_data.py --verify data/cifar10

Nothing is downloaded, extracted to disk or unpickled. Every value is checked on the way: shapes, dtypes (uint8 or
floating point), finite numbers, labels in range. For a folder of images, the files that are passed over are printed.
The folder appears when all of it is written. Values stay as they are, bytes for images. Each row gets a checksum, which
training compares whenever it reads the row; `--verify` compares all files at once.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import image_sources
import jax

from mf_eqx import data, run


@dataclasses.dataclass(frozen=True)
class Config:
    """A conversion. Exactly one of cifar10, idx, images, npy, array_record and verify is given."""

    cifar10: str | None = None
    """CIFAR-10: its folder or its archive, binary or Python version."""
    split: Literal["train", "test"] = "train"
    """Which part of CIFAR-10, or of a folder of IDX files."""
    idx: tuple[str, ...] = ()
    """IDX files as of MNIST: images, then labels if there are any; gzipped or not. Or a folder of them, such as that of
    Fashion-MNIST, which Debian's package dataset-fashion-mnist brings."""
    images: str | None = None
    """Folder with a folder of images for each class, or with images (labels: none)."""
    size: tuple[int, ...] = ()
    """Side in pixels, or height and width, to which images are resized and cropped; with images alone."""
    npy: tuple[str, ...] = ()
    """Files in the format .npy with rows, in this order."""
    npy_label: tuple[str, ...] = ()
    """A file in the format .npy with labels for each of npy."""
    npy_condition: tuple[str, ...] = ()
    """A file in the format .npy with conditions that are no labels, such as vectors, for each of npy."""
    array_record: tuple[str, ...] = ()
    """ArrayRecord files whose records are .npy, or .npz with x and label."""
    labels: int | None = None
    """Number of different labels. By default, for idx and npy, the largest label plus one, and 10 for Fashion-MNIST in
    the folder of its package; must be given for array_record if its records have labels."""
    to: str | None = None
    """New folder for the shards."""
    rows_per_shard: int = 4096
    """Rows in each shard but the last."""
    verify: str | None = None
    """Folder of shards to compare with its manifest, byte by byte; nothing is written."""

    def __post_init__(self):
        run.check_sizes(self, size=1 << 16)
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be >= 1, got {self.rows_per_shard}")
        if self.labels is not None and self.labels < 1:
            raise ValueError(f"labels must be >= 1, got {self.labels}")
        if not all(side >= 1 for side in self.size) or len(self.size) > 2:
            raise ValueError(f"size must be a side >= 1, or height and width, got {' '.join(map(str, self.size))}")
        if len(self.idx) > 2:
            raise ValueError(f"idx must be a file of images and at most one of labels, got {len(self.idx)} files")


KINDS = ("cifar10", "idx", "images", "npy", "array_record", "verify")
"""The fields of which exactly one is given."""
NEEDED_BY = {
    "size": ("images",),
    "npy_label": ("npy",),
    "npy_condition": ("npy",),
    "labels": ("idx", "npy", "array_record"),
    "to": KINDS[:-1],
}
"""For which kinds a field may be given."""
MOST_NAMES = 10
"""Of classes that are printed."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_flags(config: Config) -> None:
    """Refuses no kind of source or several, and flags that say nothing of it."""
    given = [name for name in KINDS if getattr(config, name)]
    if len(given) != 1:
        found = " and ".join(map(flag, given)) or "none"
        raise ValueError(f"exactly one of {', '.join(map(flag, KINDS))} must be given, got {found}")
    (kind,) = given
    for name, kinds in NEEDED_BY.items():
        if getattr(config, name) and kind not in kinds:
            raise ValueError(f"{flag(name)} must be given with {' or '.join(map(flag, kinds))}, got {flag(kind)}")
    has_parts = kind == "cifar10" or (kind == "idx" and Path(config.idx[0]).is_dir())
    if config.split != "train" and not has_parts:
        raise ValueError(f"--split must be left out but for CIFAR-10 and a folder of IDX files, got {config.split}")
    for name in ["to"] * (kind != "verify") + ["size"] * (kind == "images"):
        if not getattr(config, name):
            raise ValueError(f"{flag(name)} must be given with {flag(kind)}, got none")


def idx_files(config: Config) -> Sequence[str | Path]:
    """The files that are given, or those in the folder that is given."""
    folder = Path(config.idx[0])
    if not folder.is_dir():
        return config.idx
    if not (found := image_sources.mnist_files(folder, "train" if config.split == "train" else "t10k")):
        raise ValueError(f"{folder}: must hold IDX files as of MNIST for --split {config.split}, got none")
    return found


def open_source(config: Config) -> data.AbstractSource:
    """The source that is asked for."""
    if config.cifar10:
        return data.read_cifar10(config.cifar10, train=config.split == "train")
    if config.idx:
        return image_sources.read_idx(idx_files(config), config.labels)
    if config.images:
        height, width = (*config.size, *config.size)[:2]
        return data.ImageFolderSource(config.images, size=(height, width))
    if config.npy:
        condition = config.npy_condition or None
        return data.NpySource(config.npy, config.npy_label or None, condition=condition, labels=config.labels)
    return data.ArrayRecordSource(config.array_record, labels=config.labels)


def report(source: data.AbstractSource) -> str:
    """What a source holds, in one line."""
    arrays = jax.tree_util.tree_leaves_with_path(source.row_condition)
    numbers = [(source.row_shape, source.dtype), *((leaf.shape, leaf.dtype) for _, leaf in arrays)]
    size = len(source) * sum(math.prod(shape) * dtype.itemsize for shape, dtype in numbers)
    labels = "no labels" if source.labels is None else f"{source.labels} labels"
    if names := source.class_names:
        labels += f" ({', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''})"
    found = [f"condition{jax.tree_util.keystr(path)} {leaf.dtype} of shape {leaf.shape}" for path, leaf in arrays]
    conditions = ", ".join(found) or labels
    return f"{len(source):,} rows of shape {source.row_shape}, {source.dtype}, {conditions}, {size:,} bytes"


def main(config: Config) -> None:
    """Convert a data set into shards, or compare shards with their manifest."""
    began = time.perf_counter()
    check_flags(config)
    source = data.ShardSource(config.verify) if config.verify else open_source(config)
    if isinstance(source, data.ImageFolderSource):
        print(f"{source.name}: {len(source):,} images; passed over: {source.passed_over_as_text()}")
    with run.Progress(len(source), doing="comparing rows" if config.verify else "writing rows") as progress:

        def update(rows: int) -> None:
            progress.update(rows, {})

        if isinstance(source, data.ShardSource):
            source.verify(progress=update)
        else:
            data.write_shards(source, config.to or "", rows_per_shard=config.rows_per_shard, progress=update)
    what = f"{config.verify}: as written," if config.verify else f"{config.to}:"
    print(f"{what} {report(source)}, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
