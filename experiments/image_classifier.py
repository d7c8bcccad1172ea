"""A small convolutional network that reads the class of an image: trained on the training images, it judges samples.

Its accuracy on test images says how far its reading of a sample can be trusted, and its last hidden layer is a space of
features that knows the data at hand. It never sees a test image.
"""

import os
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import image_sources
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from mf_eqx import data, run

STEPS, BATCH, PEAK_RATE = 2000, 128, 2e-3
ENOUGH, IN_A_ROW = 1e-3, 100
"""A loss after which nothing is left to learn, if it stays below for so many steps: a few images are then known by
heart."""
FEATURES = 128
MOST_NUMBERS = 1 << 14
"""Of an image; means over squares of pixels are read where there are more."""
MOST_PLACES = 7
"""Rows, and columns, that the convolutions' result is averaged to where it has more."""
READ_AT_ONCE = 250
"""Images, so that one program reads all of them."""


class Classifier(eqx.Module):
    """Two convolutions of stride 2 (maxima in their place take XLA:CPU five times as long) and two linear layers."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, shape: tuple[int, int, int], labels: int, *, key: Key[Array, ""]):
        keys = jr.split(key, 4)
        places = [min(-(-side // 4), MOST_PLACES) for side in shape[1:]]
        self.first = eqx.nn.Conv2d(shape[0], 24, 5, stride=2, padding=2, key=keys[0])
        self.second = eqx.nn.Conv2d(24, 48, 3, stride=2, padding=1, key=keys[1])
        self.hidden = eqx.nn.Linear(48 * places[0] * places[1], FEATURES, key=keys[2])
        self.last = eqx.nn.Linear(FEATURES, labels, key=keys[3])

    def __call__(
        self, x: Float[Array, "channels height width"]
    ) -> tuple[Float[Array, " features"], Float[Array, " classes"]]:
        """Features and logits of an image in [-1, 1]."""
        h = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        places = tuple(min(side, MOST_PLACES) for side in h.shape[1:])
        h = h if h.shape[1:] == places else eqx.nn.AdaptiveAvgPool2d(places)(h)
        features = jax.nn.relu(self.hidden(h.reshape(-1)))
        return features, self.last(features)


def prepared(x: UInt8[np.ndarray, "rows channels height width"]) -> Float[np.ndarray, "rows channels _ _"]:
    """What the classifier sees: values in [-1, 1]."""
    return image_sources.means_over_squares(x, MOST_NUMBERS) / np.float32(127.5) - 1


def trained(source: data.AbstractSource, folder: Path, *, steps: int = STEPS, seed: int = 0) -> Classifier:
    """The classifier of these images: the one in `folder` that an earlier run left there, or a new one, which is left
    there.

    **Arguments:** `source` of labelled images of uint8; `folder`; `steps` of training; `seed` 0 for the classifier that
    judges, another one for a classifier whose features are trained with.
    """
    stream = data.Stream(source, min(BATCH, len(source)), seed=seed)
    fresh = make(source, seed)
    recipe = [stream.fingerprint(), steps, BATCH, PEAK_RATE, repr(fresh), *([seed] if seed else [])]
    path = folder / f"classifier_{run.digest(recipe)}.eqx"
    if path.exists():
        run.tell(f"{path}: the classifier of an earlier run")
        return eqx.tree_deserialise_leaves(path, fresh)
    with run.Progress(steps, doing="training a classifier") as progress:
        classifier = fit(fresh, stream, steps, lambda step, loss: progress.update(step, {"loss": loss}))
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    eqx.tree_serialise_leaves(unfinished, classifier)
    unfinished.replace(path)
    return classifier


def make(source: data.AbstractSource, seed: int = 0) -> Classifier:
    """One that has learnt nothing yet."""
    assert source.labels is not None
    channels, height, width = prepared(source.take(np.arange(1)).x).shape[1:]
    return Classifier((channels, height, width), source.labels, key=jr.key(seed))


def fit(
    classifier: Classifier, stream: data.Stream, steps: int, update: Callable[[int, Float[Array, ""]], None]
) -> Classifier:
    """Trained by Adam, with a rate that falls to 0; until each of the last `IN_A_ROW` steps had a loss below `ENOUGH`,
    or to the end."""
    optimizer = optax.adam(optax.cosine_decay_schedule(PEAK_RATE, steps))

    @eqx.filter_jit
    def step(
        classifier: Classifier, state: optax.OptState, x: Float[Array, "rows ..."], label: Int[Array, " rows"]
    ) -> tuple[Classifier, optax.OptState, Float[Array, ""]]:
        loss, gradient = eqx.filter_value_and_grad(cross_entropy)(classifier, x, label)
        change, state = optimizer.update(gradient, state)
        return eqx.apply_updates(classifier, change), state, loss

    state = optimizer.init(eqx.filter(classifier, eqx.is_array))
    losses: list[Float[Array, ""]] = []
    for number in range(steps):
        batch = stream[number]
        classifier, state, loss = step(classifier, state, jnp.asarray(prepared(batch.x)), batch.condition)
        update(number + 1, loss)
        losses.append(loss)
        if len(losses) == IN_A_ROW:  # not in every step, which would wait for its loss
            if np.max(jax.device_get(losses)) < ENOUGH:
                break
            losses = []
    return classifier


def cross_entropy(
    classifier: Classifier, x: Float[Array, "rows channels height width"], label: Int[Array, " rows"]
) -> Float[Array, ""]:
    _, logits = jax.vmap(classifier)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))


@eqx.filter_jit
def _read(
    classifier: Classifier, x: Float[Array, "rows channels height width"]
) -> tuple[Float[Array, "rows features"], Int[Array, " rows"]]:
    features, logits = jax.vmap(classifier)(x)
    return features, jnp.argmax(logits, axis=1)


def read(
    classifier: Classifier, x: UInt8[np.ndarray, "rows channels height width"]
) -> tuple[Float[np.ndarray, "rows features"], Int[np.ndarray, " rows"]]:
    """Features of images, and the class that is seen in each."""
    parts = [_read(classifier, jnp.asarray(prepared(part))) for part in image_sources.in_parts(x, READ_AT_ONCE)]
    features, label = (np.concatenate([*map(np.asarray, values)])[: len(x)] for values in zip(*parts, strict=True))
    return features, label
