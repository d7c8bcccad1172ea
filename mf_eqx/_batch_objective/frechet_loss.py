r"""The Frechet distance as a loss: between the features of generated samples and those of the data,

$$|\mu - \mu_*|^2 + \mathrm{tr}\big(\Sigma + \Sigma_* - 2\, (\Sigma\, \Sigma_*)^{1/2}\big),$$

with $\mu, \Sigma$ over a population of samples (`RunningPopulation`, `QueuedPopulation`), of which the current batch
alone is differentiated. It vanishes, and so does its gradient, where the moments are equal, whatever the distributions.

Samples of all conditions are compared together, so that the loss does not see whether a sample fits its condition.

The root needs the eigenvalues of a matrix of features x features in each step. With `refresh` k it is replaced in k - 1
of k steps by its tangent at the last $\Sigma$ whose eigenvalues were computed. As the root is concave in $\Sigma$, the
distance becomes a lower bound, if that $\Sigma$ had full rank. Take k small beside the number of steps that the
population remembers.

Several spaces of features are several losses of one `SampleObjective`. With `relative` each is divided by its own
value, as the authors do where they add spaces, so that none outweighs the others by its unit.

Source: Representation Frechet Loss for Visual Generation, Yang, Geng, Ju, Tian, Wang, 2026, arXiv 2604.28190.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._batch import Batch
from .._custom_types import as_floats, at_least_float32, Scalar
from .._mean import Mean, Metrics
from .._validate import as_count, check_finite, check_kind, Count
from .population import AbstractPopulation, PopulationMoments, RunningPopulation
from .sample_objective import AbstractSampleLoss
from .trace_of_root import root_and_slope, trace_of_root


class Tangent(eqx.Module):
    r"""The tangent of the trace of the root at one covariance, $\sum_{ij} G_{ij} \Sigma_{ij} + c$: `slope` G, `offset`
    c."""

    slope: Float[Array, "features features"]
    offset: Float[Array, ""]

    @classmethod
    def at(cls, covariance: Float[Array, "features features"], factor: Float[Array, "features rank"]) -> "Tangent":
        root, slope = root_and_slope(covariance, factor)
        return cls(slope, root - jnp.sum(slope * covariance))

    def __call__(self, covariance: Float[Array, "features features"]) -> Float[Array, ""]:
        return jnp.sum(self.slope * covariance) + self.offset


class TangentState(eqx.Module):
    """The state with `refresh` > 1: that of the population, the last tangent, the distance where it was made, and the
    number of steps so far."""

    population: PyTree[Array]
    tangent: Tangent
    distance: Float[Array, ""]
    step: Int[Array, ""]


class FrechetLoss(AbstractSampleLoss):
    """The Frechet distance of generated samples to the data, for a `SampleObjective`.

    **Arguments:**

    - `mean`, `covariance`: of the features of the data, for example those of `mf_eqx.metrics.stream_moments`. The
      loss is computed in their dtype, eigenvalues in float64 on all devices but TPUs.
    - `features`: the function from one sample to a vector, by default the flattened sample.
    - `population`: the generated samples that moments are taken of; it must hold more samples than there are features.
      Fill it before the first step by `SampleObjective.fill`: the first gradients would be too large otherwise.
    - `relative`: whether the loss is the distance divided by its own value behind stop-gradient, with `refresh` > 1 by
      that of the last step with eigenvalues. It is then about 1, and its gradient about that of the logarithm.
    - `refresh`: the number of steps from one computation of eigenvalues to the next; 1 for every step. The first step
      after the population was filled has them.

    **Metrics:** `frechet_distance`, the distance; with `refresh` > 1 that of the last step with eigenvalues, while the
    loss is a lower bound, which may be negative.

    **Raises:** `ValueError` if the moments are not finite, do not fit each other, or if the covariance is not symmetric
    or has negative eigenvalues, and unless `refresh` is an integer >= 1.
    """

    mean: Float[Array, " features"]
    trace: Float[Array, ""]
    factor: Float[Array, "features features"]
    features: Callable[[Float[Array, "*data"]], Float[Array, " features"]]
    population: AbstractPopulation
    relative: bool
    refresh: int

    def __init__(
        self,
        mean: Any,
        covariance: Any,
        features: Callable[[Float[Array, "*data"]], Float[Array, " features"]] = jnp.ravel,
        population: Any = RunningPopulation(),
        relative: bool = False,
        refresh: Count = 1,
    ):
        check_kind("population", population, AbstractPopulation)
        wide = np.asarray(covariance, np.float64)
        check_finite("mean", np.asarray(mean, np.float64))
        check_finite("covariance", wide)
        if np.ndim(mean) != 1 or wide.shape != 2 * np.shape(mean):
            found = f"{np.shape(mean)} and {wide.shape}"
            raise ValueError(f"mean and covariance must be of shapes (dim,) and (dim, dim), got {found}")
        self.mean = at_least_float32(as_floats("mean", mean))
        self.trace = jnp.asarray(np.trace(wide), self.mean.dtype)
        self.factor = jnp.asarray(_factor(wide), self.mean.dtype)
        self.features, self.population, self.relative = features, population, relative
        self.refresh = as_count("refresh", refresh)

    def init(self) -> PyTree[Array]:
        population = self.population.init(self.mean)
        if self.refresh == 1:
            return population
        zero = jnp.zeros_like(self.trace)
        return TangentState(population, Tangent(jnp.zeros_like(self.factor), zero), zero, jnp.zeros((), jnp.int32))

    def batches_to_fill(self, rows: int) -> int:
        return self.population.batches_to_fill(rows)

    def __call__(self, x: Float[Array, "rows *data"], batch: Batch, state: Any) -> tuple[Scalar, Metrics, Any]:
        # Features are centred at the mean of the data, so that E[y y^T] - E[y] E[y]^T loses no digits.
        y = jax.vmap(self.features)(x).astype(self.mean.dtype) - self.mean
        if self.refresh == 1:
            moments, state = self.population.add(state, y)
            distance = self._distance(moments, lambda covariance: trace_of_root(covariance, self.factor))
            exact = jax.lax.stop_gradient(distance)
        else:
            moments, population = self.population.add(state.population, y)
            filled = self.population.batches_to_fill(len(y))
            is_due = (state.step == 0) | ((state.step - filled) % self.refresh == 0)
            fixed = jax.lax.stop_gradient(_covariance(moments))
            tangent = jax.lax.cond(is_due, lambda: Tangent.at(fixed, self.factor), lambda: state.tangent)
            distance = self._distance(moments, tangent)
            exact = jnp.where(is_due, jax.lax.stop_gradient(distance), state.distance)
            state = TangentState(population, tangent, exact, state.step + 1)
        least = jnp.finfo(distance.dtype).eps * self.trace  # near 0 a distance is rounding
        loss = distance / jnp.maximum(exact, least) if self.relative else distance
        return loss, {"frechet_distance": Mean(exact, jnp.ones((), exact.dtype))}, state

    def _distance(self, moments: PopulationMoments, root: Callable[[Any], Float[Array, ""]]) -> Scalar:
        covariance = _covariance(moments)
        return jnp.sum(moments.mean**2) + jnp.trace(covariance) + self.trace - 2 * root(covariance)


def _covariance(moments: PopulationMoments) -> Float[Array, "features features"]:
    return moments.product - jnp.outer(moments.mean, moments.mean)


def _factor(covariance: Float[np.ndarray, "dim dim"]) -> Float[np.ndarray, "dim dim"]:
    """F with F F^T = C, on the host, once. Moments that were stored in float32 may have small errors."""
    if (asymmetry := np.abs(covariance - covariance.T).max()) > 1e-5 * np.abs(covariance).max():
        raise ValueError(f"covariance must be symmetric, got entries that differ by {asymmetry} from the transpose")
    values, vectors = np.linalg.eigh(covariance)
    if values.min() < -1e-5 * np.abs(values).max():
        raise ValueError(f"covariance must be positive semi-definite, got the eigenvalue {values.min()}")
    return vectors * np.sqrt(np.maximum(values, 0))
