"""Spaces of features to train in: differentiable functions of one image, and the moments of the data in them.

They are those of image_judge.py, but for rounding. Only the classifier is another one of the same kind, trained from
another seed, so that the one that judges is never trained with.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import image_classifier
import image_judge
import image_sources
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mf_eqx import data, metrics, run

Name: TypeAlias = Literal["pixels", "classifier", "lite0"]
CLASSIFIER_SEED = 1
"""Of the classifier that is trained with; the one that judges has 0."""
LITE0_FEATURES = 1280
AT_ONCE = 100
"""Images whose features are computed at once."""


class Space(NamedTuple):
    """A name, and the function from an image in [-1, 1] to its features."""

    name: str
    features: Callable[[Float[Array, "channels height width"]], Float[Array, " features"]]


class Averaged(eqx.Module):
    """An image, or its means over squares of pixels that are just large enough for so many numbers."""

    most: int

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels _ _"]:
        channels, height, width = x.shape
        side = min(math.ceil(math.sqrt(x.size / self.most)), height, width)
        rows, columns = height // side, width // side
        squares = x[:, : rows * side, : columns * side].reshape(channels, rows, side, columns, side)
        return jnp.mean(squares, axis=(2, 4))


class Pixels(eqx.Module):
    """Pixels in [0, 1], averaged over squares where there are many."""

    averaged: Averaged = Averaged(image_judge.MOST_FEATURES)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, " features"]:
        return (self.averaged(x).reshape(-1) + 1) / 2


class OfClassifier(eqx.Module):
    """The last hidden layer of a classifier."""

    classifier: image_classifier.Classifier
    averaged: Averaged = Averaged(image_classifier.MOST_NUMBERS)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, " features"]:
        return self.classifier(self.averaged(x))[0]


class LabelProbability(eqx.Module):
    """The probability that the classifier of a space gives an image its label."""

    space: OfClassifier

    def __call__(self, x: Float[Array, "channels height width"], label: Int[Array, ""]) -> Float[Array, ""]:
        return jax.nn.softmax(self.space.classifier(self.space.averaged(x))[1])[label]


class Lite0(eqx.Module):
    """The pooled features of EfficientNet-Lite0."""

    network: metrics.EfficientNetLite0
    protocol: metrics.Protocol

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, " features"]:
        return self.network(self.protocol(x[None])).pooled[0]


def size(name: Name, shape: tuple[int, ...]) -> int:
    """How many features images of this shape have in a space."""
    if name == "pixels":
        return jax.eval_shape(Pixels(), jax.ShapeDtypeStruct(shape, np.float32)).size
    return LITE0_FEATURES if name == "lite0" else image_classifier.FEATURES


def make_space(name: Name, train: data.AbstractSource, folder: Path, *, steps: int) -> Space:
    """The space of this name.

    **Arguments:** `name`; `train` images, and `steps` that a classifier is trained with; `folder` where it is kept.
    """
    if name == "pixels":
        return Space(name, Pixels())
    if name == "lite0":
        return Space(name, Lite0(metrics.load_efficientnet_lite0(), metrics.LITE0.without_rounding()))

    how: dict[str, Any] = {"steps": steps, "seed": CLASSIFIER_SEED}

    def train_it() -> None:
        image_classifier.trained(train, folder, **how)

    run.once(train_it)  # by the first process; all others read its file
    return Space(name, OfClassifier(image_classifier.trained(train, folder, **how)))


def digest(space: Space) -> str:
    """Of all numbers by which features are computed: a run does not go on with other ones."""
    found = hashlib.sha256(space.name.encode())
    for leaf in jax.tree.leaves(eqx.filter(space.features, eqx.is_array)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


@eqx.filter_jit
def _features(space: Space, x: Float[Array, "rows channels height width"]) -> Float[Array, "rows features"]:
    return jax.vmap(space.features)(x)


def moments(space: Space, source: data.AbstractSource, count: int) -> metrics.FeatureMoments:
    """Those of so many images of a source, in equal distances."""
    x = source.take(image_sources.spread(len(source), count)).x
    parts = [_features(space, jnp.asarray(part / np.float32(127.5) - 1)) for part in image_sources.in_parts(x, AT_ONCE)]
    features = np.concatenate([*map(np.asarray, parts)])[:count]
    return metrics.AccumulatedMoments.of(features).moments()
