r"""Moments of features over more samples than one batch has: what a Frechet distance needs, since that of a few samples
is far too large.

Gradients go through the current batch alone. Older samples come from older parameters, and the more of them there are,
the longer ago they were generated.
"""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._validate import as_count, as_float, Count


class PopulationMoments(NamedTuple):
    """The mean of features, and the mean of their outer products."""

    mean: Float[Array, " features"]
    product: Float[Array, "features features"]


class AbstractPopulation(eqx.Module):
    """The samples over which moments are taken, those of the current batch among them."""

    @abc.abstractmethod
    def init(self, example: Float[Array, " features"]) -> PyTree[Array]:
        """The state before the first batch, for features of the shape and dtype of `example`."""

    @abc.abstractmethod
    def batches_to_fill(self, rows: int) -> int:
        """The number of batches of `rows` rows that fill the population: after them, a new batch has the weight that it
        keeps for the rest of the training."""

    @abc.abstractmethod
    def add(self, state: Any, y: Float[Array, "rows features"]) -> tuple[PopulationMoments, Any]:
        """The moments with a new batch of features `y`, and the state after it."""


class RunningMoments(eqx.Module):
    """Sums over steps, in which a batch of k steps ago has the factor (1 - d) d^k: of the moments of batches (`mean`,
    `product`), and of the factors alone (`weight`)."""

    weight: Float[Array, ""]
    mean: Float[Array, " features"]
    product: Float[Array, "features features"]


class RunningPopulation(AbstractPopulation):
    r"""The weighted mean of the moments of all batches, in which a batch of k steps ago has the weight $d^k$: the
    effective number of samples is about that of 1 / (1 - d) batches.

    **Arguments:** `decay` d in [0, 1).

    **Raises:** `ValueError` for another d.
    """

    decay: float = eqx.field(default=0.999, converter=as_float("decay"))

    def __check_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def init(self, example: Float[Array, " features"]) -> RunningMoments:
        zeros = jnp.zeros_like(example)
        return RunningMoments(jnp.zeros((), example.dtype), zeros, jnp.outer(zeros, zeros))

    def batches_to_fill(self, rows: int) -> int:
        return round(3 / (1 - self.decay)) if self.decay else 0  # then the weights add up to 95% of their limit

    def add(self, state: RunningMoments, y: Float[Array, "rows features"]) -> tuple[PopulationMoments, RunningMoments]:
        new = RunningMoments(jnp.ones((), y.dtype), jnp.mean(y, axis=0), product(y.T, y) / len(y))
        state = jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, state, new)
        return PopulationMoments(state.mean / state.weight, state.product / state.weight), state


class QueuedFeatures(eqx.Module):
    """The last features, the newest first; only the first `count` of them are filled."""

    features: Float[Array, "size features"]
    count: Int[Array, ""]


class QueuedPopulation(AbstractPopulation):
    """The last samples, all with the same weight. Its memory is that of their features.

    **Arguments:** `size` number of samples, at least the rows of a batch.

    **Raises:** `ValueError` unless size >= 1; when called, for a batch with more rows.
    """

    size: Count = 50_000

    def __check_init__(self):
        as_count("size", self.size)

    def init(self, example: Float[Array, " features"]) -> QueuedFeatures:
        return QueuedFeatures(jnp.zeros((self.size, *example.shape), example.dtype), jnp.zeros((), jnp.int32))

    def batches_to_fill(self, rows: int) -> int:
        return math.ceil(self.size / rows)

    def add(self, state: QueuedFeatures, y: Float[Array, "rows features"]) -> tuple[PopulationMoments, QueuedFeatures]:
        if len(y) > self.size:
            raise ValueError(f"size must be at least the {len(y)} rows of a batch, got {self.size}")
        features = jnp.concatenate([y, state.features[: self.size - len(y)]])
        count = jnp.minimum(state.count + len(y), self.size)  # rows beyond it are zero
        mean = jnp.sum(features, axis=0) / count.astype(y.dtype)
        moments = PopulationMoments(mean, product(features.T, features) / count.astype(y.dtype))
        return moments, QueuedFeatures(features, count)


def product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """a b in full precision: on recent GPUs float32 products are TF32 otherwise."""
    return jnp.matmul(a, b, precision="highest")
