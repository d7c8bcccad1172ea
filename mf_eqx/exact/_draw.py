"""Batches of new random data, for trainings in which no row is used twice."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._batch import Batch
from .._validate import check_counts
from ._base import AbstractDistribution
from ._gaussian_mixture import GaussianMixture


class Draw(eqx.Module):
    """A function from a key to a `Batch` of samples from a distribution, for `mf_eqx.scan_steps`.

    **Arguments:** `distribution`; `batch` number of rows, at least one.
    """

    distribution: AbstractDistribution
    batch: int

    def __check_init__(self):
        check_counts(batch=self.batch)

    def __call__(self, key: Key[Array, ""]) -> Batch:
        return Batch(draw(self.distribution, self.batch, key))


class DrawLabelled(eqx.Module):
    """A function from a key to a `Batch` of samples with labels, from a mixture whose components have labels.

    **Arguments:** `distribution`; `batch` number of rows, at least one.
    """

    distribution: GaussianMixture
    batch: int

    def __check_init__(self):
        check_counts(batch=self.batch)

    def __call__(self, key: Key[Array, ""]) -> Batch:
        return Batch(*jax.vmap(lambda key: self.distribution.labelled_sample(key=key))(jr.split(key, self.batch)))


@eqx.filter_jit
def draw(distribution: AbstractDistribution, number: int, key: Key[Array, ""]) -> Float[Array, "rows dim"]:
    """Samples from a distribution.

    **Arguments:** `distribution`; `number` of samples, at least one; each new number is compiled again; `key`.
    """
    check_counts(number=number)
    return jax.vmap(lambda key: distribution.sample(key=key))(jr.split(key, number))
