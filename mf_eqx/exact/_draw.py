"""Batches of fresh data, for trainings that never see a row twice."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._batch import Batch
from .._validate import check_sizes
from ._base import AbstractDistribution
from ._gaussian_mixture import GaussianMixture


class Draw(eqx.Module):
    """A function from a key to a `Batch` of a distribution, as of `mf_eqx.scan_steps`.

    **Arguments:** `distribution`; `batch` rows, at least one.
    """

    distribution: AbstractDistribution
    batch: int

    def __check_init__(self):
        check_sizes(batch=self.batch)

    def __call__(self, key: Key[Array, ""]) -> Batch:
        return Batch(draw(self.distribution, self.batch, key))


class DrawLabelled(eqx.Module):
    """The same with labels: rows of a mixture whose components have them.

    **Arguments:** `distribution`; `batch` rows, at least one.
    """

    distribution: GaussianMixture
    batch: int

    def __check_init__(self):
        check_sizes(batch=self.batch)

    def __call__(self, key: Key[Array, ""]) -> Batch:
        return Batch(*jax.vmap(lambda key: self.distribution.labelled_sample(key=key))(jr.split(key, self.batch)))


@eqx.filter_jit
def draw(distribution: AbstractDistribution, number: int, key: Key[Array, ""]) -> Float[Array, "rows dim"]:
    """So many samples.

    **Arguments:** `distribution`; `number` of samples, at least one, compiled anew for each; `key`.
    """
    check_sizes(number=number)
    return jax.vmap(lambda key: distribution.sample(key=key))(jr.split(key, number))
