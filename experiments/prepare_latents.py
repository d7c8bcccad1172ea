"""Images into latents: the moments of their posteriors, encoded once and kept as shards.

    python experiments/prepare_latents.py --images imagenet/train --vae sd-vae-ft-mse --to data/imagenet256
    python experiments/prepare_latents.py --images imagenet/train --vae sd-vae-ft-mse --to data/imagenet256 \\
        --first-part 0 --last-part 31                       one of several processes, each with parts of its own
    python experiments/prepare_latents.py --images /usr/share/datasets/fashion-mnist \\
        --vae runs/tokenizer/1a2b3c4d/vae --to data/fashion_latents        by a tokenizer of one's own (tokenizer.py)

Images are those of images.py: folders of one class each, the training images of MNIST or CIFAR-10, shards. Those of
folders are cropped as ADM does, without flips: to 256 x 256 pixels, or to --size, which a tokenizer of one's own needs.
With --holdout the images that tokenizer.py and images.py hold out of a folder are left out here, too. All others are
encoded by the tokenizer of latent diffusion, whose size its config.json says, and kept as float16: mean, then standard
deviation, (8, 32, 32) for 256 pixels. Training samples the posterior at every read, and standardises it by the
statistics of the tokenizer's config.json.

The folder has one folder of shards per part. A part is whole or not there: the same command again does what is
missing. ImageNet's 1,281,167 images take 21 GB.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import image_sources
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mf_eqx import checkpoint, data, run
from mf_eqx.vae import (
    Autoencoder,
    AutoencoderSize,
    download_autoencoder,
    latent_statistics_origin,
    LatentStatistics,
    load_autoencoder,
    read_latent_statistics,
    SD_VAE,
)

NOTES = "latents.json"
"""What all parts were made of."""
PAPER_SIDE = 256
"""Of the paper's images, in pixels."""
HUB = "hub"
"""The name of the paper's tokenizer where it is published."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A conversion of images to latents."""

    images: tuple[str, ...] = ()
    """Folder with a folder of images for each class; CIFAR-10, its folder or archive; a folder with IDX files as of
    MNIST; an IDX file of images and one of labels; a folder of shards. Of data with test images only the others are
    taken."""
    vae: str = ""
    """Weights of the tokenizer: a folder as diffusers and tokenizer.py have it; a .safetensors file, with config.json
    beside it unless it is of Stable Diffusion; or "hub" to download the paper's."""
    to: str = ""
    """Folder of the latents, new or begun by the same command."""
    size: tuple[int, ...] = ()
    """Side in pixels, or height and width, to which images in folders are cropped; multiples of the tokenizer's factor
    (8). By default 256 for a tokenizer of Stable Diffusion's size; for images in folders and any other tokenizer it
    must be given, best as in the tokenizer's training."""
    grey: bool = False
    """Images in grey, as of tokenizer.py: the mean over the colours."""
    holdout: float = 0.0
    """Share of the images that is left out if there are no test images, in [0, 1): give that of tokenizer.py, which is
    0.1 by default, for test images that nothing was trained on."""
    parts: int = 64
    """Into how many parts the images are divided."""
    first_part: int = 0
    """First of the parts to do."""
    last_part: int = -1
    """Last of the parts to do; -1 for the last of all."""
    batch: int = 32
    """Images that are encoded at once, on all devices together; a multiple of their number."""
    threads: int = 8
    """Threads that decode images."""
    bfloat16: bool = False
    """Compute in bfloat16: faster, and moments off by about 1%."""

    def __post_init__(self):
        run.check_sizes(self, size=1 << 16, parts=1 << 16, batch=1 << 20, threads=1024)
        for name, bound in {"parts": 1, "first_part": 0, "last_part": -1, "batch": 1, "threads": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if len(self.size) > 2:
            raise ValueError(f"size must be a side, or height and width, got {len(self.size)} numbers")
        if min(self.size, default=1) < 1:
            raise ValueError(f"size must be >= 1, got {min(self.size)}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must lie in [0, 1), got {self.holdout}")
        last = self.parts - 1 if self.last_part < 0 else self.last_part
        if not self.first_part <= last < self.parts:
            rule = f"at most last_part, and both below {self.parts}"
            raise ValueError(f"first_part must be {rule}, got {self.first_part} and {last}")
        if self.batch % (devices := jax.device_count()):
            raise ValueError(f"batch must be a multiple of the {devices} devices, got {self.batch}")


class LatentSource(data.AbstractSource):
    """The moments of some of the images of a source, encoded when they are asked for: mean, then standard deviation.

    **Arguments:** `images`, bytes; `rows` which of them; `tokenizer`; `batch` how many are encoded at once, on all
    devices; `threads` that decode.

    **Raises:** `ValueError` if `images` are not uint8 of the tokenizer's channels, with sides that its factor divides.
    """

    def __init__(
        self,
        images: data.AbstractSource,
        rows: Int[np.ndarray, " rows"],
        tokenizer: Autoencoder,
        *,
        batch: int,
        threads: int,
    ):
        channels, *sides = images.row_shape
        wanted, factor = tokenizer.size.channels, tokenizer.factor
        if images.dtype != np.uint8 or (channels, len(sides)) != (wanted, 2) or any(side % factor for side in sides):
            rule = f"uint8 of shape ({wanted}, height, width), with multiples of the tokenizer's factor {factor}"
            found = f"{images.dtype} of shape {images.row_shape}"
            hint = "; --grey makes images grey" if (wanted, channels) == (1, 3) else ""
            raise ValueError(f"{images.name}: images must be {rule}, got {found}{hint}")
        self._images, self._rows, self._tokenizer, self._batch, self._threads = images, rows, tokenizer, batch, threads
        self.row_shape = (2 * tokenizer.size.latent, *(side // factor for side in sides))
        self.name, self.dtype, self.labels = images.name, np.dtype(np.float16), images.labels

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Int[np.ndarray, " rows"]) -> data.Rows:
        pieces = np.array_split(self._rows[rows], range(self._batch, len(rows), self._batch))
        parts, labels = [], []
        for got in self._decoded(pieces):
            missing = self._batch - len(got.x)
            x = np.concatenate([got.x, np.zeros((missing, *got.x.shape[1:]), np.uint8)]) if missing else got.x
            parts.append(np.asarray(encode(self._tokenizer, on_devices(x)))[: len(got.x)])
            labels.append(got.label)
        label = None if self.labels is None else np.concatenate(labels)
        return data.Rows(np.concatenate(parts), label)

    def _decoded(self, pieces: list[Int[np.ndarray, " rows"]]) -> Iterator[data.Rows]:
        """Batches of images, the next two being decoded meanwhile."""

        def decode(rows: Int[np.ndarray, " rows"]) -> list[concurrent.futures.Future[data.Rows]]:
            return [pool.submit(self._images.take, row[None]) for row in rows]

        pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        try:
            upcoming = collections.deque(map(decode, pieces[:2]))
            for number in range(len(pieces)):
                got = [future.result() for future in upcoming.popleft()]
                upcoming.extend(map(decode, pieces[number + 2 : number + 3]))
                labels = [row.label for row in got if row.label is not None]
                yield data.Rows(np.concatenate([row.x for row in got]), np.concatenate(labels) if labels else None)
        finally:
            pool.shutdown(cancel_futures=True)


def on_devices(x: UInt8[np.ndarray, "rows colours height width"]) -> UInt8[Array, "rows colours height width"]:
    """Images, spread over this process's devices."""
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))


@eqx.filter_jit
def encode(
    tokenizer: Autoencoder, x: UInt8[Array, "rows colours height width"]
) -> Float[Array, "rows channels lower narrower"]:
    """Mean and standard deviation of each image's posterior, float16."""
    moments = jax.vmap(tokenizer.encode)(x.astype(jnp.float32) / 127.5 - 1)
    return jnp.concatenate([moments.mean, moments.std], axis=1).astype(jnp.float16)


def part_folder(to: str, number: int) -> Path:
    return Path(to) / f"part_{number:04}"


class LatentNotes(NamedTuple):
    """What every part of a folder of latents is made of."""

    images: str
    rows: int
    labels: int | None
    size: list[int]
    """Height and width."""
    parts: int
    vae: str
    """SHA-256 of the tokenizer."""
    tokenizer: dict[str, Any]
    """Its size."""
    bfloat16: bool
    class_names: list[str] | None
    """Of the labels."""
    statistics: dict[str, Any]
    """By which training standardises latents."""
    grey: bool
    holdout: float
    """Share of the images that was left out."""

    def of_tokenizer(self) -> checkpoint.Tokenizer:
        """What weights that are trained on these latents say of the tokenizer."""
        widths, *numbers = (self.tokenizer[name] for name in AutoencoderSize._fields)
        statistics = LatentStatistics(**{name: tuple(values) for name, values in self.statistics.items()})
        return checkpoint.Tokenizer(AutoencoderSize(tuple(widths), *numbers), self.vae, statistics)


def read_notes(folder: str | Path) -> LatentNotes:
    """What a folder of latents is made of.

    **Raises:** `OSError` if it cannot be read; `ValueError` that names the file if it says something else.
    """
    path = Path(folder) / NOTES
    try:
        notes = LatentNotes(**run.read_json_object(path))
        if type(notes.size) is not list or len(notes.size) != 2:
            raise ValueError(f"size must be height and width, got {notes.size!r:.40}")
        for name, most in {"rows": 1 << 40, "size": 1 << 16, "parts": 1 << 16}.items():
            values = notes.size if name == "size" else [getattr(notes, name)]
            if bad := [value for value in values if type(value) is not int or not 1 <= value <= most]:
                raise ValueError(f"{name} must be an integer in [1, {most}], got {bad[0]!r:.40}")
        if type(notes.grey) is not bool or type(notes.holdout) not in (int, float) or not 0 <= notes.holdout < 1:
            rule = "grey must be true or false, and holdout a number in [0, 1)"
            raise ValueError(f"{rule}, got {notes.grey!r:.40} and {notes.holdout!r:.40}")
        checkpoint.Notes(tokenizer=notes.of_tokenizer())  # refuses what cannot be
        return notes
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: must be the notes of prepare_latents.py, but cannot be read: {error}") from error


def begin(config: Config, made_of: LatentNotes) -> None:
    """The folder of all parts, new or of the same images and weights; several processes may begin it at once."""
    path = Path(config.to) / NOTES
    if not path.exists():
        if path.parent.exists() and any(path.parent.iterdir()):
            raise ValueError(f"to must be new, empty, or a folder of latents, but {config.to} has files and no {NOTES}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent.with_name(f".{path.parent.name}.{os.getpid()}.notes")
        run.write_whole(beside, (json.dumps(made_of._asdict(), indent=1) + "\n").encode())
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(beside, path)
        beside.unlink()
    saved = read_notes(config.to)._asdict()
    flags = [name for name in saved if name in Config.__dataclass_fields__]
    for name in dict.fromkeys([*flags, *saved]):  # what a flag says before what follows from it
        if (found := saved[name]) != (wanted := json.loads(json.dumps(getattr(made_of, name)))):
            raise ValueError(
                f"to must be new or of the same latents, but in {path} {name} is {found!r}, not {wanted!r}"
            )


def tokenizer_path(path: str) -> str | Path:
    """Where a tokenizer lies; "hub" downloads that of the paper, once."""
    return download_autoencoder() if path == HUB else path


def open_tokenizer(path: str, size: AutoencoderSize) -> Autoencoder:
    """The tokenizer of this size in a folder or file."""
    return load_autoencoder(tokenizer_path(path), size)


def open_images(config: Config, of: AutoencoderSize) -> tuple[data.AbstractSource, Sequence[str] | None]:
    """The images that are encoded by a tokenizer of this size, and the names of their classes if they have any."""
    paths, size = config.images, config.size or ((PAPER_SIDE,) if of == SD_VAE else ())
    if config.holdout and not image_sources.has_test_images(Path(paths[0])):
        train, _, names = image_sources.open_parts(paths, (), size=size, holdout=config.holdout, grey=config.grey)
        return train, names
    source = image_sources.open_images(paths, size=size)
    if config.holdout:
        image_sources.check_holdout(paths, (), config.holdout)
    image_sources.check_size(source, config.size)
    every = np.arange(len(source))
    return (image_sources.Part(source, every, source.name, grey=True) if config.grey else source), source.class_names


def notes_on(
    config: Config,
    images: data.AbstractSource,
    names: Sequence[str] | None,
    tokenizer: Autoencoder,
    statistics: LatentStatistics,
) -> LatentNotes:
    return LatentNotes(
        images=" ".join(str(Path(path).resolve()) for path in config.images),
        rows=len(images),
        labels=images.labels,
        size=[*images.row_shape[1:]],
        parts=config.parts,
        vae=tokenizer.digest(),
        tokenizer=tokenizer.size._asdict(),
        bfloat16=config.bfloat16,
        class_names=None if names is None else [*names],
        statistics=statistics.as_json(),
        grey=config.grey,
        holdout=config.holdout,
    )


def main(config: Config) -> None:
    """Encode images by the tokenizer and keep the moments of their posteriors."""
    began = time.perf_counter()
    for name in ("images", "vae", "to"):
        if not getattr(config, name):
            raise ValueError(f"{name} must be given, got none")
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    for path in config.images:
        os.stat(path)  # before anything is downloaded
    path = tokenizer_path(config.vae)
    tokenizer, statistics = load_autoencoder(path, dtype=dtype), read_latent_statistics(path)
    images, names = open_images(config, tokenizer.size)
    if config.parts > len(images):
        raise ValueError(f"parts must be at most the {len(images)} images of {images.name}, got {config.parts}")
    shown = [f"{name} {' '.join(f'{v:.4g}' for v in values)}" for name, values in statistics.as_json().items()]
    print(f"latents: {', '.join(shown)}, by {latent_statistics_origin(path)}")
    rows = np.array_split(np.arange(len(images)), config.parts)
    last = config.last_part if config.last_part >= 0 else config.parts - 1
    how: dict[str, Any] = {"batch": config.batch, "threads": config.threads}
    left = {
        number: LatentSource(images, rows[number], tokenizer, **how)
        for number in range(config.first_part, last + 1)
        if not part_folder(config.to, number).exists()
    }
    begin(config, notes_on(config, images, names, tokenizer, statistics))
    total, done = sum(map(len, left.values())), 0
    with run.Progress(total, work=run.Work(rows=1), doing="compiling the encoder") as progress:
        for number, source in left.items():

            def update(written: int, done: int = done) -> None:
                progress.update(done + written, {})

            data.write_shards(source, part_folder(config.to, number), progress=update)
            done += len(source)
    finished = sum(part_folder(config.to, number).exists() for number in range(config.parts))
    seconds = time.perf_counter() - began
    rate = f"{seconds:.1f} s, {total / seconds:.1f} img/s"
    print(f"{config.to}: {finished} of {config.parts} parts, {total:,} images encoded now, {rate}")


def open_latents(folder: str) -> data.AbstractSource:
    """The latents of all parts, for training.

    **Raises:** `ValueError` that names the parts which are missing.
    """
    saved = read_notes(folder)
    parts = [part_folder(folder, number) for number in range(saved.parts)]
    if missing := [part.name for part in parts if not part.exists()]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{folder}: must have all {len(parts)} parts, lacks {shown}: run prepare_latents.py again")
    source = data.JoinedSource([data.ShardSource(part) for part in parts], name=folder)
    if len(source) != saved.rows:
        raise ValueError(f"{folder}: must have {saved.rows} rows as {NOTES} says, got {len(source)}")
    return source


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
