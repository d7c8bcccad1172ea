"""What `ablations.py` trains on Fashion-MNIST, and how one-step samples are judged: by distances in two feature spaces,
that of EfficientNet-Lite0, which never saw such images, and that of a classifier trained on them; and by the classes
that this classifier reads.

All images are on the device as bytes; only rows that are drawn are turned into floats. The features of real images are
computed once, before the first cell.
"""

import math
from pathlib import Path

import fashion
import image_classifier
import image_judge
import image_samples
import image_sources
import jax.numpy as jnp
import numpy as np
from ablation_recipes import CpuSeconds, digest_of, Judge, Numbers, Recipe
from ablation_tables import Setting
from jaxtyping import Array, install_import_hook, Key

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import data

SIZE = mfx.DiTSize(depth=4, width=128, heads=4, patch=7)
"""Large patches, so that more steps fit into the time (RESULTS.md has the comparison)."""
JUDGED = 2000
"""Samples that are judged, and test images that they are compared with."""


def fashion_mnist(
    steps: int = 4000,
    files: str = fashion.PLACE,
    *,
    judged: int = JUDGED,
    classifier_steps: int = image_classifier.STEPS,
) -> Recipe:
    """Fashion-MNIST, judged by the Frechet distance in features of EfficientNet-Lite0.

    **Arguments:** `steps` of a cell; `files` a folder with the four IDX files; `judged` the number of samples, and of
    test images that they are compared with; `classifier_steps` of the classifier that judges.

    **Raises:** `ValueError` if `files` is not such a folder.
    """
    fashion.check_files((files,), "files")
    numbers = Numbers(steps, batch=16, width=SIZE.width, learning_rate=2e-3, decay=0.997, clip=None)
    parts = fashion.images.open_data(fashion.Config(data=(files,)), fashion.CLASSES)
    rows = parts.train.take(np.arange(len(parts.train)))
    parts.train.digest = digest_of(parts.train)  # part of the name of their classifier's file
    count = min(judged, len(parts.test), len(parts.train))
    sampler = image_samples.Sampler("", mfx.sample, (1,), 1, len(fashion.CLASSES), fashion.CLASSES)

    def open_judge(folder: Path) -> Judge:
        return make_judge(parts, sampler, count, classifier_steps, folder)

    def make_field(variables: mfx.nn.TimeVariables, key: Key[Array, ""]) -> mfx.AbstractField:
        shape = parts.train.row_shape
        return mfx.DiT(shape, SIZE, labels=len(fashion.CLASSES), time_variables=variables, key=key)

    draw = data.DrawRows(jnp.asarray(rows.x), jnp.asarray(rows.label), numbers.batch)
    distance = "Frechet distance of one-step samples in features of EfficientNet-Lite0"
    beside = (
        "FD classifier: the same in the classifier's features; W2: sliced Wasserstein distance; lite0: EfficientNet-"
        "Lite0; covered: share of test images with a sample near them; right class: share of samples in which the "
        "classifier reads the class that was asked for."
    )
    size = {"depth": SIZE.depth, "heads": SIZE.heads, "patch": SIZE.patch}  # the width is among the numbers
    judging = {"judged": count, "classifier_steps": classifier_steps}
    details = {**size, **judging, "images": digest_of(parts.train, parts.test)}
    options = {"details": details, "prepare": data.FromPixels(), "sampler": sampler, "beside": beside}
    options |= {"ordered": ("distance", "FD classifier", "W2 lite0", "W2 classifier"), "has_floor": True}
    return Recipe(
        len(fashion.CLASSES), make_field, draw, open_judge, distance, numbers, CpuSeconds(0.042, 41), **options
    )


def make_judge(
    parts: image_sources.Parts, sampler: image_samples.Sampler, count: int, classifier_steps: int, folder: Path
) -> Judge:
    """The judge of `count` samples with the labels of test images. Its classifier is read from `folder`, or trained and
    saved there.

    **Raises:** `MissingDependency` without the weights of EfficientNet-Lite0, before the classifier is trained.
    """
    space = image_judge.lite0_space()
    classifier = image_classifier.trained(parts.train, folder, steps=classifier_steps)
    judge = image_judge.Judge([space], classifier, parts.train, parts.test, count)
    assert judge.label is not None
    label = judge.label

    def score(field: mfx.AbstractField, setting: Setting) -> dict[str, float]:
        x = sampler(field, label, 1, image_samples.JUDGED_SEED)
        return figures(*judge.samples("", [(1, x)], search=False))

    return Judge(score, figures(*judge.real_images()))


def figures(found: image_judge.Result, read: image_judge.Result | None = None) -> dict[str, float]:
    """Distances and coverage of a result, and what the classifier reads in it, or in `read` if given."""
    read = found if read is None else read
    distances, sliced, covered = found.frechet or {}, found.sliced_wasserstein or {}, found.coverage or {}
    first, *others = distances
    values = {
        "distance": distances[first],
        **{f"FD {space}": distances[space] for space in others},
        **{f"W2 {space}": sliced.get(space) for space in distances},
        **{f"covered {space}": covered.get(space) for space in distances},
        f"covered {first}, lowest class": image_judge.least(found.coverage_by_class),
        "right class": read.agreement,
        "right class, lowest class": image_judge.least(read.agreement_by_class),
    }
    return {name: math.nan if value is None else value for name, value in values.items()}
