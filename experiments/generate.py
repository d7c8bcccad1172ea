"""Pictures, or arrays, of what saved weights generate.

    python experiments/generate.py --weights runs/digits/1a2b3c4d/meanflow/ema_0.997.safetensors
    python experiments/generate.py --weights ema.safetensors --label 3 7 --number 64 --evaluations 2 --to some.png
    python experiments/generate.py --weights ema.safetensors --vae sd-vae-ft-mse --number 5000 --to folder/
    python experiments/generate.py --weights imf.safetensors --guidance-scale 8 --guidance-interval 0.4 0.65
    python experiments/generate.py --weights imf.safetensors --guidance-scale 1 2 4 8      one noise over the scales
    python experiments/generate.py --weights policy.safetensors --condition observations.npy --to actions.npy
    python experiments/generate.py --weights ema.safetensors --network mine.py:Net         of a network of your own
    python experiments/generate.py ... --dry-run                  what it would make, without making it

The weights are a file of `checkpoint.save_weights`, as every recipe here leaves it. It says what the network is, what
its values are, and whether u was trained at r < t, so that the weights alone are enough. All devices of the machine
share the work. Sample i follows from the seed and i alone, whatever the batch and the devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import saved
from jaxtyping import Int, Real
from saved import check_guidance, check_steps, decoded, make_generator, open_subject, post_trained_evaluations, Subject

import mf_eqx as mfx
from mf_eqx import data, picture, run

COLUMNS, ROWS = 10, 8
"""The most columns, and the number of rows, of a picture with a column for each label. Pictures of one label or without
labels have `ROWS` columns."""
EULER_STEPS = 32
"""If u is known at r = t alone, or with --euler."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to generate."""

    weights: str = ""
    """File of weights, as the recipes leave it."""
    network: str = ""
    """For weights of a network of your own, which they do not describe: its class, as mine.py:Net, or mine.py if the
    file defines one. It is made as in the training, for the shape and the labels that images.py and toy_2d.py leave."""
    to: str = ""
    """Where to: NAME.png is one picture of all samples, NAME.npy one array, and a folder (new or empty, written
    with a slash at its end) gets a PNG file for each sample. Arrays have the values that the network makes (in the
    unit of the data, if the notes know its mean and std), float32, rows first and then channels, clipped to no
    range. An older file is replaced. By default a file in the current folder with the name of the weights: a picture
    for images and for points in the plane, else an array."""
    label: tuple[str, ...] = ()
    """Labels, each by its name (if the weights know names) or its number. Sample i has number i mod n of the n labels.
    By default all labels; in a picture at most ten of them, evenly spaced."""
    condition: str = ""
    """For weights with vectors as conditions: a .npy file with a row for each. Sample i has row i mod their number."""
    guidance_scale: tuple[float, ...] = (1.0,)
    """Scale of guidance; 1 is none. For networks that take guidance as an input, the scale is that input and costs
    nothing. For others a scale other than 1 takes two evaluations, w u(z, r, t | label) + (1 - w) u(z, r, t | none).
    Keep 1 for networks that learnt one scale in training. Several scales make one picture with a row for each; all
    images of a column are of the same noise and label."""
    guidance_interval: tuple[float, float] = saved.ALWAYS
    """The first and the last time at which the scale holds, for networks that take guidance as an input."""
    untrained_guidance: bool = False
    """Allow scales and an interval that were not drawn in training, for a network that takes guidance as an input."""
    evaluations: int | None = None
    """Number of equal steps from noise to data; by default 1, or 32 with --euler."""
    times: tuple[float, ...] = ()
    """The times of the steps, falling from 1 to 0, in place of --evaluations."""
    euler: bool = False
    """Step along v = u(z, t, t), as Flow Matching does, instead of by average velocities."""
    new_noise: float | None = None
    """Share of the noise before each evaluation but the first that is new, from 0 to 1 (mfx.sample_consistency). By
    default 1 for a consistency model, whose u was trained at r = 0 alone, and 0 for others."""
    number: int | None = None
    """Number of samples, of each scale if there are several. By default: in a picture of several scales one for each
    label, or eight if there is one label or none; otherwise one for each row of --condition; eight for each label in a
    picture of images with several labels; 1,000 points or vectors; else 64."""
    seed: int = 0
    """Seed of all samples."""
    batch: int = 256
    """Samples generated at once, on all devices together; rounded up to a multiple of their number."""
    vae: str = ""
    """Folder or .safetensors file of the tokenizer, or "hub" to download the paper's, to decode latents."""
    bfloat16: bool = False
    """Compute the network in bfloat16."""
    dry_run: bool = False
    """Check everything, print what would be made, and stop."""

    def __post_init__(self):
        run.check_sizes(self, evaluations=10**4, number=10**8, batch=1 << 20)
        for name, bound in {"evaluations": 1, "number": 1, "batch": 1, "seed": 0}.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        saved.check_times_and_guidance(self.times, self.guidance_scale, (self.guidance_interval,))
        if len(set(self.guidance_scale)) < len(self.guidance_scale):
            raise ValueError(f"guidance_scale must have each number once, got {self.guidance_scale}")
        if self.times and self.evaluations is not None:
            raise ValueError(f"evaluations must be left out with --times, got {self.evaluations}")


# What is asked for


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration with all its defaults filled in."""

    subject: Subject
    generators: tuple[mfx.Generator, ...]
    """One for each scale of guidance."""
    labels: Int[np.ndarray, " labels"] | None
    """Those that samples have in turn."""
    number: int
    batch: int
    to: str
    devices: mfx.Parallelism

    @property
    def names(self) -> list[str] | None:
        """Of the labels."""
        known = self.subject.notes.class_names
        return None if self.labels is None else [known[i] if known else str(i) for i in self.labels]

    @property
    def columns(self) -> int:
        """Of a picture of one scale."""
        return min(self.number, ROWS if self.labels is None or len(self.labels) == 1 else len(self.labels))

    def samples(self, number: int = 0) -> Iterator[Real[np.ndarray, "_ *data"]]:
        """All samples of a generator in turn, as they become ready."""
        share = math.gcd(self.batch // self.devices.shards, 8)  # decoding takes more memory than sampling
        batches = self.generators[number].batches(self.number, self.batch, self.devices)
        left, work = self.number, run.Work(self.batch)
        with run.Progress(-(-self.number // self.batch), work=work, doing="compiling the sampler") as progress:
            for number, z in enumerate(batches, 1):
                for x in decoded([z], self.subject, share * self.devices.shards, self.devices):
                    rows = self.subject.notes.in_unit_of_data(np.asarray(x)[:left])
                    left -= len(rows)
                    if len(rows):
                        yield rows
                progress.update(number, {})


def plan(config: Config, subject: Subject, devices: mfx.Parallelism) -> Job:
    """**Raises:** `ValueError` for flags that do not fit the weights, or each other."""
    euler, trained = config.euler, subject.notes.trained
    if not euler and trained is not None and not trained.average:
        run.tell(f"{subject.path}: u was trained at r = t alone (Flow Matching), so steps are those of --euler")
        euler = True
    default = EULER_STEPS if euler else post_trained_evaluations(subject.config) or 1
    times = config.times or mfx.uniform_times(config.evaluations or default)
    check_steps(subject, len(times) - 1, euler=euler)
    saved.check_new_noise(subject, config.new_noise, euler=euler)
    how = {"euler": euler, "untrained": config.untrained_guidance}
    check_guidance(subject, config.guidance_scale, (config.guidance_interval,), **how)
    to = place(config, subject)
    if len(config.guidance_scale) > 1 and not (to.endswith(".png") and subject.is_image):
        rule, found = "one scale for all but a picture of images", ", ".join(map("{:g}".format, config.guidance_scale))
        raise ValueError(f"--guidance-scale must be {rule}, got {found} for {to}")
    labels = chosen_labels(config, subject, COLUMNS if to.endswith(".png") else None)
    vectors = read_condition(config, subject)
    condition = vectors if labels is None else labels
    number = config.number or default_number(subject, labels, vectors, to, scales=len(config.guidance_scale))
    scales = len(config.guidance_scale)
    if to.endswith(".png") and number * scales > (most := 10_000):
        rule, hint = f"at most {most} in one picture", "" if scales > 1 else ": give a folder as --to"
        found = f"{number} for each of {scales} scales" if scales > 1 else number
        raise ValueError(f"--number must be {rule}, got {found}{hint}")
    if scales > 1 and number > (most := 100):  # each is a column
        raise ValueError(f"--number must be at most {most} in a picture of several scales, got {number}")
    how = {"interval": config.guidance_interval, "seed": config.seed, "euler": euler, "new_noise": config.new_noise}
    generators = tuple(
        make_generator(subject, times, scale=scale, condition=condition, **how) for scale in config.guidance_scale
    )
    shards, wanted = devices.shards, min(config.batch, number)
    batch = -(-wanted // shards) * shards
    return Job(subject, generators, labels, number, batch, to, devices)


def is_folder(to: str) -> bool:
    return to.endswith("/") or Path(to).is_dir()


def place(config: Config, subject: Subject) -> str:
    """Where samples go, of a kind that fits them."""
    is_point = subject.shape == (2,)
    to = config.to or Path(subject.path).stem + (".png" if subject.is_image or is_point else ".npy")
    if not is_folder(to) and Path(to).suffix not in (".png", ".npy"):
        raise ValueError(f"--to must end in .png, in .npy, or in / for a folder, got {to}")
    if not to.endswith(".npy") and not subject.is_image and (is_folder(to) or not is_point):
        reason = "whose samples are no images"
        if subject.is_latent:
            reason = "whose latents need --vae for pictures"
        elif subject.notes.pixels is None and len(subject.shape) == 3:
            reason = "whose notes give no range of pixels"
        raise ValueError(f"--to must end in .npy for {subject.path}, {reason}, got {to}")
    return to


def default_number(subject: Subject, labels: Any, vectors: Any, to: str, *, scales: int) -> int:
    """Of samples of each scale, if none is given."""
    if scales > 1:
        return ROWS if labels is None or len(labels) == 1 else len(labels)
    if vectors is not None:
        return len(vectors)
    if labels is not None and len(labels) > 1 and to.endswith(".png") and subject.is_image:
        return ROWS * len(labels)
    return 1000 if len(subject.shape) == 1 else 64


def chosen_labels(config: Config, subject: Subject, most: int | None) -> Int[np.ndarray, " labels"] | None:
    """The labels that samples have in turn: those of --label, or at most `most` of all."""
    count, names = subject.labels, subject.notes.class_names or ()
    if count is None:
        if config.label:
            raise ValueError(f"--label must be left out for {subject.path}, without labels, got {config.label[0]}")
        return None
    if not config.label:
        shown = min(count, most or count)
        return np.arange(shown) * count // shown
    labels = [names.index(text) if text in names else int(text) if text.isdecimal() else -1 for text in config.label]
    for text, label in zip(config.label, labels, strict=True):
        if not 0 <= label < count:
            listed = f" or be among {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
            raise ValueError(f"--label must lie in [0, {count - 1}]{listed} for {subject.path}, got {text}")
    return np.array(labels)


def read_condition(config: Config, subject: Subject) -> Any:
    """The vectors that samples have in turn, or None for a network without conditions."""
    size = subject.network.get("condition")
    if (size is None) != (not config.condition):
        rule = "left out for weights without vectors as conditions" if size is None else f"given: vectors of {size}"
        raise ValueError(f"--condition must be {rule}, such as {subject.path}, got {config.condition or 'none'}")
    if size is None:
        return None
    rows = data.NpySource(config.condition)
    if rows.row_shape != (size,):
        raise ValueError(f"--condition must have rows of shape ({size},), got {rows.row_shape} in {config.condition}")
    vectors = rows.take(np.arange(len(rows))).x.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"--condition must be finite, got values that are not in {config.condition}")
    return vectors


# What is left


def check_place(to: str) -> None:
    """Refuses a place that nothing can be written to."""
    run.check_writable(Path(to, "000000.png") if is_folder(to) else to)
    if Path(to).is_dir() and any(Path(to).iterdir()):
        raise ValueError(f"--to must be a new or empty folder, got {to}")


def save_picture(job: Job) -> None:
    """All samples in one picture, a column for each label; or a row for each scale of guidance."""
    if len(job.generators) > 1:
        return save_rows_of_scales(job)
    x, names = np.concatenate([*job.samples()]), job.names
    if job.subject.shape == (2,):
        kinds = {"": x} if names is None else {name: x[i :: len(names)] for i, name in enumerate(names)}
        limit = 1.1 * float(np.abs(x[np.isfinite(x)]).max(initial=1e-3))
        return picture.save_point_panels(job.to, kinds, limit=limit)
    low, high = job.subject.pixels
    rows = -(-len(x) // job.columns)
    white = np.full((rows * job.columns - len(x), *x.shape[1:]), high, x.dtype)  # after the last sample
    grid = np.concatenate([x, white]).reshape(rows, job.columns, *x.shape[1:])
    columns = names[: job.columns] if names and len(names) > 1 else None
    title = f"label {names[0]}" if names and not columns else None
    picture.save_image_grid(job.to, grid, low, high, column_labels=columns, title=title)


def save_rows_of_scales(job: Job) -> None:
    """The same noise in each column, a row for each scale of guidance."""
    rows = {scale_of(generator): np.concatenate([*job.samples(i)]) for i, generator in enumerate(job.generators)}
    (low, high), names = job.subject.pixels, job.names
    columns = names and [names[i % len(names)] for i in range(job.number)]
    labels = {"row_labels": [f"guidance {scale:g}" for scale in rows], "column_labels": columns}
    picture.save_image_grid(job.to, np.stack([*rows.values()]), low, high, **labels)


def scale_of(generator: mfx.Generator) -> float:
    """The scale of guidance, 1 for a field without."""
    return float(getattr(generator.field, "scale", 1.0))


def save_npy(job: Job) -> None:
    """All samples as float32, written as they become ready."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (job.number, *job.subject.shape)}
    with run.whole_file(job.to) as file:  # a memory map would end the process if no space is left
        np.lib.format.write_array_header_1_0(file, header)
        for x in job.samples():
            file.write(np.ascontiguousarray(x, "<f4").data)


def save_files(job: Job) -> None:
    """Each sample as a PNG file, called by its number and label."""
    (low, high), number = job.subject.pixels, itertools.count()
    for x in job.samples():
        for image, i in zip(x, number, strict=False):
            label = "" if job.labels is None else f"_{job.labels[i % len(job.labels)]}"
            picture.save_image(Path(job.to) / f"{i:06}{label}.png", image, low, high)


def described(job: Job) -> str:
    """What is made, of what, in one line."""
    subject, generator = job.subject, job.generators[0]
    notes = [f"{name} {value}" for name in ("steps", "decay") if (value := getattr(subject.notes, name)) is not None]
    of = ", ".join([f"{subject.network['network']} of {subject.parameters:,} parameters", *notes])
    steps = len(generator.times) - 1
    how = f"{steps} {'Euler step' if generator.method is mfx.sample_euler else 'evaluation'}{'s' * (steps > 1)}"
    if isinstance(generator.method, functools.partial):
        how += ", {new_noise:.0%} new noise before each but the first".format(**generator.method.keywords)
    field, guided = generator.field, ""
    if any(isinstance(each.field, mfx.GuidedField | mfx.WithGuidance) for each in job.generators):
        guided = f", guidance {', '.join(f'{scale_of(each):g}' for each in job.generators)}"
    if isinstance(field, mfx.WithGuidance) and (interval := tuple(map(float, field.interval))) != saved.ALWAYS:
        guided += " for t from {:g} to {:g}".format(*interval)
    what = f"{job.number:,} {'latents' if subject.is_latent else 'samples'} of shape {subject.shape}"
    where = f"{job.batch} at once on {job.devices.shards} x {jax.devices()[0].device_kind}"
    return f"{subject.path}: {of}; {what}, {how}{guided}, {where}"


def main(config: Config) -> None:
    """Generate samples of saved weights."""
    if not config.weights:
        raise ValueError("--weights must be given, got none")
    devices = mfx.Parallelism()
    how = {"bfloat16": config.bfloat16, "own_network": config.network}
    job = plan(config, open_subject(config.weights, config.vae, devices, **how), devices)
    run.tell(described(job))
    if is_folder(job.to):
        run.require("PIL")
    elif not job.to.endswith(".npy"):
        run.require("matplotlib")
    check_place(job.to)
    if config.dry_run:
        return run.tell(f"would be written to {job.to}")
    Path(job.to).parent.mkdir(parents=True, exist_ok=True)
    save = save_files if is_folder(job.to) else save_npy if job.to.endswith(".npy") else save_picture
    save(job)
    turn = f", labels in turn: {', '.join(job.names)}" if job.names else ""
    run.tell(f"{job.to}{turn if len(turn) < 200 else ''}")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
