"""How good saved weights are: FID, Inception Score, KID, precision and recall of what they generate, and pictures.

    python experiments/evaluate.py --weights runs/cifar10/1a2b3c4d/ema_0.99995.safetensors \\
        --inception inception.safetensors --protocol cifar_train --reference cifar-10-binary.tar.gz --evaluations 1 2
    python experiments/evaluate.py --weights ema.safetensors --vae sd-vae-ft-mse --inception inception.safetensors \\
        --protocol adm --reference VIRTUAL_imagenet256_labeled.npz --euler --evaluations 32 --guidance-scale 1 1.5 2
    python experiments/evaluate.py --weights imf.safetensors --vae sd-vae-ft-mse --inception inception.safetensors \\
        --protocol adm --reference VIRTUAL_imagenet256_labeled.npz --guidance-scale 4 6 8 \\
        --guidance-interval 0.4 0.65 0.4 0.6
    python experiments/evaluate.py --weights ema.safetensors --protocol lite0 --reference fashion-mnist/
    python experiments/evaluate.py --weights ema.safetensors --grid-only           pictures alone
    python experiments/evaluate.py ... --inception random --samples 64             a rehearsal
    python experiments/evaluate.py ... --dry-run                                   what it takes, before it is started

All devices of the machine share the work. Sample i follows from the seed and i alone, whatever the batch and the
devices. Each row of the table is kept when it is done: a sweep that was stopped, or one with more rows, does only what
is missing. `mf_eqx.metrics.convert_inception` makes inception.safetensors; the protocol lite0 needs no such file: it
takes the features of EfficientNet-Lite0, whose weights come with the extra `features`, in place of Inception's.
"""

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import equinox as eqx
import image_sources
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import saved
from jaxtyping import Array, Int, UInt8

import mf_eqx as mfx
from mf_eqx import data, metrics, picture, run

_Tree = TypeVar("_Tree")

PROTOCOLS = {
    "adm": metrics.ADM,
    "torch_fidelity": metrics.TORCH_FIDELITY,
    "cifar_train": metrics.CIFAR_TRAIN,
    "cifar_train_half_pixel": metrics.CIFAR_TRAIN_HALF_PIXEL,
    "lite0": metrics.LITE0,
}
SHAPES = {"cifar_train": (3, 32, 32), "cifar_train_half_pixel": (3, 32, 32)}
"""Of all images under a protocol that is made for one data set."""
LITE0 = "lite0"
"""The protocol of another network than Inception."""
RANDOM = "random"
"""The name of an Inception that was never trained."""
PICTURE_SEED = 2**31 - 1
"""Of the noise of all pictures."""
LEAST = 10
"""Images that the splits of the Inception Score need."""


@dataclasses.dataclass(frozen=True)
class Config:
    """An evaluation."""

    weights: str = ""
    """File of weights to judge, as cifar10.py leaves them: an average with the description of its network."""
    network: str = ""
    """For weights of a network of your own, which they do not describe: its class, as mine.py:Net, or mine.py if the
    file defines one. It is made as in the training, for the shape and the labels that images.py leaves."""
    vae: str = ""
    """Folder or .safetensors file of the tokenizer, or "hub" to download the paper's, for a network of latents."""
    inception: str = ""
    """Weights of Inception (.safetensors), or "random" for a rehearsal, whose numbers mean nothing."""
    protocol: Literal["adm", "torch_fidelity", "cifar_train", "cifar_train_half_pixel", "lite0"] | None = None
    """How images reach Inception, or with lite0 EfficientNet-Lite0; see mf_eqx.metrics. A FID means nothing beside one
    of another protocol."""
    reference: str = ""
    """What samples are compared with: archive or folder of CIFAR-10 (its training images), folder of shards, folder of
    images; or moments (.npz), which suffice for the FID alone."""
    reference_count: int | None = None
    """Number of images of the reference to take, evenly spaced; by default all."""
    save_reference: str = ""
    """File (.npz) for the moments of the reference's images; an older one is replaced."""
    samples: int = 50_000
    """Images to generate for each row of the table."""
    evaluations: tuple[int, ...] = ()
    """Numbers of equal steps from noise to data, a row for each; 1 if no times are given either."""
    times: tuple[float, ...] = ()
    """The times of the steps of one more row, falling from 1 to 0."""
    euler: bool = False
    """Step along v = u(z, t, t), as Flow Matching does, instead of by average velocities."""
    new_noise: float | None = None
    """Share of the noise before each evaluation but the first that is new, from 0 to 1 (mfx.sample_consistency). By
    default 1 for a consistency model, whose u was trained at r = 0 alone, and 0 for others."""
    guidance_scale: tuple[float, ...] = (1.0,)
    """Scales of guidance, a row for each; 1 is none. For networks that take guidance as an input, the scale is that
    input and costs nothing. For others a scale other than 1 takes two evaluations, w u(z, r, t | label) + (1 - w) u(z,
    r, t | none), and needs u without labels trained at r < t, or --euler. Keep 1 for networks that learnt one scale in
    training."""
    guidance_interval: tuple[saved.Interval, ...] = (saved.ALWAYS,)
    """Pairs of times, the first and the last at which the scale holds, a row for each scale and pair; for networks that
    take guidance as an input."""
    untrained_guidance: bool = False
    """Allow scales and intervals that were not drawn in training, for a network that takes guidance as an input."""
    labels: Literal["random", "balanced"] = "random"
    """How labels are chosen, for networks with labels: random, uniformly as in the authors' code; or balanced, i mod K
    for sample i."""
    batch: int = 256
    """Images generated at once, on all devices together."""
    decode_batch: int = 32
    """Latents decoded and judged at once, on all devices together; divides batch, or is larger."""
    bfloat16: bool = False
    """Compute the network in bfloat16; times, states, tokenizer and Inception stay in float32."""
    seed: int = 0
    """Seed of all samples. Pictures have a noise of their own."""
    grid_only: bool = False
    """Only pictures."""
    dry_run: bool = False
    """Check everything, print what would be computed, and stop."""

    def __post_init__(self):
        run.check_sizes(self, samples=10**8, evaluations=10**4, batch=1 << 20, decode_batch=1 << 20)
        for name, bound in {"batch": 1, "decode_batch": 1, "seed": 0, "samples": LEAST}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if self.reference_count is not None and self.reference_count < LEAST:
            raise ValueError(f"reference_count must be >= {LEAST}, got {self.reference_count}")
        if any(steps < 1 for steps in self.evaluations):
            raise ValueError(f"evaluations must be >= 1, got {self.evaluations}")
        saved.check_times_and_guidance(self.times, self.guidance_scale, self.guidance_interval)

    @property
    def at_once(self) -> int:
        """Images in a batch that Inception sees."""
        return min(self.decode_batch, self.batch) if self.vae else self.batch


def check_flags(config: Config) -> None:
    """Refuses flags that are missing, and those that do not go together."""
    needed = ["protocol", "reference"] if config.protocol == LITE0 else ["inception", "protocol", "reference"]
    others = {"weights": "", "inception": f", or --protocol {LITE0}, which needs no file, or --grid-only"}
    for name in ["weights"] if config.grid_only else ["weights", *needed]:
        if not getattr(config, name):
            raise ValueError(f"--{name} must be given{others.get(name, ', or --grid-only')}, got none")
    if config.protocol == LITE0 and config.inception:
        raise ValueError(f"--inception must be left out with --protocol {LITE0}, got {config.inception}")
    if config.batch % config.at_once:
        raise ValueError(f"--decode-batch must divide the batch, {config.batch}, got {config.decode_batch}")
    if config.at_once % jax.device_count():
        flag = "--decode-batch" if config.vae else "--batch"
        raise ValueError(f"{flag} must be a multiple of the {jax.device_count()} devices, got {config.at_once}")
    if config.save_reference and not config.save_reference.endswith(".npz"):
        raise ValueError(f"--save-reference must end in .npz, got {config.save_reference}")
    if config.reference.endswith(".npz") and (config.reference_count or config.save_reference):
        flag = "--reference-count" if config.reference_count else "--save-reference"
        raise ValueError(f"{flag} must be given with images as reference, got {config.reference}")
    if config.save_reference:
        run.check_writable(config.save_reference)


# What is judged, and by what


class Yardstick(NamedTuple):
    """A network of features behind a protocol, the reference (moments or images), and digests of both."""

    extractor: metrics.FeatureExtractor
    reference: metrics.FeatureMoments | data.AbstractSource
    inception_digest: str
    reference_digest: str


def open_subject(config: Config, devices: mfx.Parallelism) -> saved.Subject:
    """**Raises:** `OSError`, `ValueError` for files that hold something else, or flags that do not fit the network."""
    how = {"bfloat16": config.bfloat16, "own_network": config.network}
    subject = saved.open_subject(config.weights, config.vae, devices, **how)
    if subject.is_latent:
        raise ValueError(f"--vae must be given for a network of latents, such as {config.weights}, got none")
    if not subject.is_image:
        rule = "images of 1 or 3 channels, or latents of them, whose notes give a range of pixels"
        found = f"the shape {subject.shape} and the range {subject.notes.pixels}"
        raise ValueError(f"{config.weights}: samples must be {rule}, got {found}")
    for steps in sorted({len(row.times) - 1 for row in rows_of(config)}, reverse=True):
        saved.check_steps(subject, steps, euler=config.euler)
    saved.check_new_noise(subject, config.new_noise, euler=config.euler)
    guidance = {"euler": config.euler, "untrained": config.untrained_guidance}
    saved.check_guidance(subject, config.guidance_scale, config.guidance_interval, **guidance)
    return subject


def open_yardstick(config: Config, subject: saved.Subject, devices: mfx.Parallelism) -> Yardstick:
    """**Raises:** `OSError`, `ValueError` for files that hold something else, or a reference that does not fit."""
    assert config.protocol is not None
    protocol, wanted = PROTOCOLS[config.protocol], SHAPES.get(config.protocol, subject.shape)
    if wanted != subject.shape:
        rule = f"--protocol {config.protocol} is for images of shape {wanted}"
        raise ValueError(f"{config.weights}: {rule}, got {subject.shape}")
    if config.reference.endswith(".npz"):
        reference, digest = metrics.load_moments(config.reference), run.sha256_of_file(config.reference)
        check_made_by(config, "protocol", reference.protocol, protocol.name)
    else:
        reference = open_images(config, subject)
        digest = reference.digest or digest_of_images(reference)
    extractor = metrics.FeatureExtractor(devices.replicate(network_of(config)), protocol)
    inception_digest = extractor.digest()
    if isinstance(reference, metrics.FeatureMoments):
        check_made_by(config, "weights of the network of features", reference.weights, inception_digest)
        features, _ = eqx.filter_eval_shape(extractor, jax.ShapeDtypeStruct((1, *subject.shape), jnp.float32))
        if (size := features.pooled.shape[1]) != len(reference.mean):
            raise ValueError(f"{config.reference}: moments must be of {size} features, got {len(reference.mean)}")
    return Yardstick(extractor, reference, inception_digest, digest)


def network_of(config: Config) -> metrics.Inception | metrics.EfficientNetLite0:
    """The network of features."""
    if config.protocol == LITE0:
        return metrics.load_efficientnet_lite0()
    return metrics.Inception(key=jr.key(0)) if config.inception == RANDOM else metrics.load_inception(config.inception)


def check_made_by(config: Config, what: str, found: str | None, wanted: str) -> None:
    """Refuses moments that say that they were made otherwise."""
    if found not in (None, wanted):
        raise ValueError(f"{config.reference}: {what} must be {wanted!r} as for the samples, got {found!r}")


def open_images(config: Config, subject: saved.Subject) -> data.AbstractSource:
    """The images of the reference."""
    path, least = config.reference, max(LEAST, config.reference_count or 0)
    source = image_sources.open_images((config.reference,), size=subject.shape[1:])
    if source.dtype != np.uint8 or source.row_shape != subject.shape:
        found = f"{source.dtype} of shape {source.row_shape}"
        raise ValueError(f"{path}: images must be uint8 of shape {subject.shape} as the samples, got {found}")
    if len(source) < least:
        raise ValueError(f"{path}: must hold at least {least} images, got {len(source)}")
    return source


def digest_of_images(source: data.AbstractSource) -> str:
    """A digest of the images themselves if they are in memory; of image files, also those behind links, a digest of
    their names, sizes and times of change."""
    if isinstance(source, data.ArraySource):
        return hashlib.sha256(source.x.tobytes()).hexdigest()
    assert isinstance(source, data.ImageFolderSource)
    files = [(str(path), path.stat()) for path in (Path(source.name) / name for name in source.paths)]
    return run.digest([(name, found.st_size, found.st_mtime_ns) for name, found in files])


# Batches on all devices


def image_batches(
    source: data.AbstractSource, rows: Int[np.ndarray, " rows"], batch: int, devices: mfx.Parallelism
) -> Iterator[UInt8[Array, "batch channels height width"]]:
    """Rows of a source in equal batches on all devices; at the end the last row is repeated."""
    for start in range(0, len(rows), batch):
        wanted = rows[np.minimum(np.arange(start, start + batch), len(rows) - 1)]
        yield devices.place(jnp.asarray(source.take(wanted).x))


def counted(batches: Iterable[_Tree], progress: run.Progress, start: int = 0) -> Iterator[_Tree]:
    """The same batches, each reported when the next one is asked for."""
    for number, batch in enumerate(batches, start + 1):
        yield batch
        progress.update(number, {})


# The rows of the table


class TableRow(NamedTuple):
    """How one row is generated."""

    times: tuple[float, ...]
    scale: float
    interval: saved.Interval = saved.ALWAYS

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this row from others. The interval [0, 1] is left out, so that results from before there
        were intervals are still found."""
        interval = {} if self.interval == saved.ALWAYS else {"guidance_interval": self.interval}
        return {"times": self.times, "guidance_scale": self.scale, **interval}

    @property
    def guidance(self) -> str:
        """Scale and interval."""
        return f"{self.scale:g}" + (" in [{:g}, {:g}]".format(*self.interval) if self.interval != saved.ALWAYS else "")

    @property
    def name(self) -> str:
        steps = len(self.times) - 1
        grid = "" if self.times == mfx.uniform_times(steps) else "_at_" + "_".join(f"{t:g}" for t in self.times)
        scale = f"_guidance_{self.scale:g}" if self.scale != 1 else ""
        interval = "_in_{:g}_{:g}".format(*self.interval) if self.interval != saved.ALWAYS else ""
        return f"{steps}{grid}{scale}{interval}"


def rows_of(config: Config) -> list[TableRow]:
    grids = [mfx.uniform_times(steps) for steps in config.evaluations] + [config.times] * bool(config.times)
    guidance = [*itertools.product(config.guidance_scale, config.guidance_interval)]
    return list(dict.fromkeys(TableRow(times, *of_row) for times in grids or [(1.0, 0.0)] for of_row in guidance))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A configuration with all that it names."""

    config: Config
    devices: mfx.Parallelism
    subject: saved.Subject
    yardstick: Yardstick | None
    digest: str
    """Of the weights."""

    def common(self) -> dict[str, Any]:
        """What all rows share, and what their numbers depend on beyond rounding."""
        config, subject, yardstick = self.config, self.subject, self.yardstick
        names = ["euler", "bfloat16", *(["samples", "seed", "reference_count"] if yardstick else [])]
        known = {"weights": self.digest, **{name: getattr(config, name) for name in names}}
        if not config.euler and (share := saved.new_noise_of(subject, config.new_noise)):
            known["new_noise"] = share
        if config.network:
            known["network"] = run.own_file("network", config.network).digest
        known["vae"] = subject.tokenizer and subject.tokenizer.digest()
        if yardstick is None:
            return known
        return known | {
            "labels": config.labels if subject.labels else None,
            "protocol": yardstick.extractor.protocol.name,
            "inception": yardstick.inception_digest,
            "reference": yardstick.reference_digest,
        }

    def generator(self, row: TableRow) -> mfx.Generator:
        """What makes the samples of a row."""
        config, labels = self.config, self.subject.labels
        is_balanced = labels is not None and config.labels == "balanced"
        how = {"seed": config.seed, "scale": row.scale, "interval": row.interval, "euler": config.euler}
        how |= {"new_noise": config.new_noise, "labels": labels, "balanced": is_balanced}
        return saved.make_generator(self.subject, row.times, **how)

    def images(self, batches: Iterable[Array]) -> Iterator[Array]:
        """Samples as images, with pixels in [-1, 1] as protocols expect them."""
        low, high = self.subject.pixels
        images = saved.decoded(batches, self.subject, self.config.at_once, self.devices)
        return images if (low, high) == (-1, 1) else ((2 * x - low - high) / (high - low) for x in images)

    def made_with(self) -> dict[str, Any]:
        """What numbers do not depend on, or that is known by digests alone."""
        files = {name: getattr(self.config, name) for name in ("weights", "network", "vae", "inception", "reference")}
        versions = {"jax": jax.__version__, "equinox": eqx.__version__, "mf_eqx": mfx.__version__}
        device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
        batch = {"batch": self.config.batch, "at_once": self.config.at_once}
        about = {"network": self.subject.network, "notes": self.subject.notes.as_json()}
        return {"files": files, **about, **batch, "versions": versions, "device": device}


def read_reference(job: Evaluation, yardstick: Yardstick) -> tuple[metrics.FeatureMoments, Any]:
    """Moments of the reference, and its features if there are images."""
    source, config = yardstick.reference, job.config
    if isinstance(source, metrics.FeatureMoments):
        return source, None
    rows = image_sources.spread(len(source), config.reference_count or len(source))
    steps, work = math.ceil(len(rows) / config.at_once), run.Work(config.at_once)
    with run.Progress(steps, work=work, doing="features of the reference") as progress:
        batches = counted(image_batches(source, rows, config.at_once, job.devices), progress)
        features = metrics.collect_features(yardstick.extractor, batches, len(rows))
        progress.update(steps, {})
    if config.save_reference:
        metrics.save_moments(config.save_reference, features.moments)
    return features.moments, features.pooled


def judge(
    job: Evaluation,
    yardstick: Yardstick,
    reference: tuple[metrics.FeatureMoments, Any],
    row: TableRow,
    report: Callable[[Iterable[Array]], Iterable[Array]],
) -> dict[str, Any]:
    """The numbers of one row; `report` is told of its batches."""
    config, (moments, features), began = job.config, reference, time.perf_counter()
    batches = job.generator(row).batches(config.samples, config.batch, job.devices)
    samples = metrics.collect_features(yardstick.extractor, report(job.images(batches)), config.samples)
    seconds = time.perf_counter() - began
    size = min(1000, config.samples, config.samples if features is None else len(features))
    quality = metrics.sample_quality(samples, moments, features, size=size)
    counts = {"kid_subset": size, "reference_images": moments.count}
    rate = {"seconds": seconds, "samples_per_second": config.samples / seconds}
    return {**dataclasses.asdict(quality), **counts, **rate, **job.made_with()}


def fill(job: Evaluation, yardstick: Yardstick, ledger: run.Ledger, missing: Mapping[TableRow, dict[str, Any]]) -> None:
    """Compute the rows that are missing, each with its settings, and keep them as they come."""
    if not missing and not job.config.save_reference:
        return
    reference, size = read_reference(job, yardstick), job.config.at_once
    steps = math.ceil(job.config.samples / size)
    with run.Progress(steps * len(missing), work=run.Work(size)) as progress:
        for number, (row, settings) in enumerate(missing.items()):
            start = number * steps
            result = judge(job, yardstick, reference, row, lambda x, start=start: counted(x, progress, start))
            ledger.put(settings, result)
            progress.update(start + steps, {})


def table(job: Evaluation, results: Mapping[TableRow, dict[str, Any]]) -> str:
    """All rows, and what their numbers must not be read without."""

    def spread_of(pair: tuple[float, float] | None) -> str | None:
        return None if pair is None else "{:.4g} ± {:.2g}".format(*pair)

    headers = ["evaluations", "guidance", "FID", "IS", "KID", "precision", "recall", "images/s"]
    lines = []
    for row, found in results.items():
        scores = found["fid"], spread_of(found["inception_score"]), spread_of(found["kid"])
        known = (*scores, *(found["precision_recall"] or (None, None)), found["samples_per_second"])
        count = f"{len(row.times) - 1}" + " x 2" * (row.scale != 1 and not job.subject.takes_guidance)
        lines.append([count, row.guidance if job.subject.labels else None, *known])
    return "\n".join([run.table(lines, headers), "", *remarks(job, next(iter(results.values())))])


def remarks(job: Evaluation, found: Mapping[str, Any]) -> Iterator[str]:
    config, subject = job.config, job.subject
    known = {**subject.config, "decay": subject.notes.decay, "steps": subject.notes.steps}
    notes = [f"{name} {known[name]}" for name in ("decay", "steps", "data", "source") if known.get(name) is not None]
    yield f"{config.weights}: {', '.join(notes) or 'no notes'}, sha256 {job.digest[:16]}."
    labels = f", {config.labels} labels" if subject.labels else ""
    yield f"{config.samples:,} samples of seed {config.seed}{labels}{', Euler steps along v' * config.euler}."
    count = "an unknown number of" if found["reference_images"] is None else f"{found['reference_images']:,}"
    yield f"Protocol {found['protocol']}, against {count} images of {config.reference}."
    if config.protocol == LITE0:
        yield "FID, Inception Score and KID stand for the same formulas with the features of EfficientNet-Lite0."
    elif config.samples < 50_000:
        yield "The literature has 50,000 samples: fewer give a larger FID and a smaller Inception Score."
    if found["kid"] is None:
        yield f"No KID, precision and recall (-): they need images, and {config.reference} holds moments alone."
    elif found["kid_subset"] < 1000:
        yield f"KID of subsets of {found['kid_subset']} images; the literature has 1,000."
    if config.inception == RANDOM:
        yield "Inception has RANDOM weights: these numbers rehearse the command and mean nothing beyond that."


def plan(job: Evaluation, root: Path, rows: Iterable[TableRow], missing: Mapping[TableRow, Any]) -> str:
    """What would be computed."""
    config, subject = job.config, job.subject
    what = f"{subject.network['network']} of {subject.parameters:,} parameters, images of shape {subject.shape}"
    where = f"{config.batch} at once on {jax.device_count()} x {jax.devices()[0].device_kind}"
    work = "pictures alone" if config.grid_only else f"{config.samples:,} samples for each row, {where}"
    lines = [[row.name, "to do" if row in missing else "finished"] for row in rows]
    return "\n".join([f"{root}: {what}; {work}", "", run.table(lines, ["row", "state"])])


def save_picture(job: Evaluation, row: TableRow, path: Path) -> None:
    """Eight rows of noise, always the same; with labels, columns of up to ten of these."""
    shape, labels = job.subject.data_shape, job.subject.labels
    columns = min(labels, 10) if labels else 8
    eps = jr.normal(jr.key(PICTURE_SEED), (8, 1 if labels else columns, *shape))
    eps = jnp.broadcast_to(eps, (8, columns, *shape)).reshape(-1, *shape)
    shown = image_sources.spread(labels, columns) if labels else None
    z = job.generator(row).from_noise(eps, None if shown is None else jnp.tile(shown, 8))
    x = np.concatenate([*map(np.asarray, job.images([z]))])[: len(eps)]
    names = None if shown is None else [str(label) for label in shown]
    picture.save_image_grid(path, x.reshape(8, columns, *job.subject.shape), -1, 1, column_labels=names)


def main(config: Config) -> None:
    """Judge saved weights."""
    run.require("matplotlib")
    check_flags(config)
    devices = mfx.Parallelism()
    subject = open_subject(config, devices)
    yardstick = None if config.grid_only else open_yardstick(config, subject, devices)
    job = Evaluation(config, devices, subject, yardstick, run.sha256_of_file(config.weights))
    common = job.common()
    settings = {row: {**common, **row.settings} for row in rows_of(config)}
    with run.opened(config, shared=run.digest(common)) as directory:
        ledger = run.Ledger(directory.root / "ledger.jsonl")
        missing = {row: given for row, given in settings.items() if given not in ledger}
        if config.dry_run:
            return run.tell(plan(job, directory.root, settings, missing))
        for row in settings:
            if not (path := directory.path(f"samples_{row.name}.png")).exists():
                save_picture(job, row, path)
        if job.yardstick is not None:
            fill(job, job.yardstick, ledger, missing)
            results = {row: ledger[given] for row, given in settings.items()}
            records = [
                {**found, **settings[row], "commit": ledger.commit(settings[row])} for row, found in results.items()
            ]
            directory.save_results(table(job, results), records)
            run.tell(table(job, results))
        run.tell(f"{directory.root} has the pictures{'' if config.grid_only else ' and all numbers'}")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
