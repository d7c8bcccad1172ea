r"""The Frechet distance as a loss: between the features of generated samples and those of the data,

$$|\mu - \mu_*|^2 + \mathrm{tr}\big(\Sigma + \Sigma_* - 2\, (\Sigma\, \Sigma_*)^{1/2}\big),$$

with $\mu, \Sigma$ over a population of samples (`RunningPopulation`, `QueuedPopulation`), of which the current batch
alone is differentiated. It vanishes, and so does its gradient, where the moments are equal, whatever the distributions.

Samples of all conditions are compared together: that each has its own condition is not asked for.

Several spaces of features ("FD-SIM" has three) are several losses of one `SampleObjective`.

Source: Representation Frechet Loss for Visual Generation, Yang, Geng, Ju, Tian, Wang, 2026, arXiv 2604.28190.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._batch import Batch
from .._custom_types import at_least_float32, Scalar
from .._mean import Mean, Metrics
from .._validate import check_finite, check_kind
from .population import AbstractPopulation, RunningPopulation
from .sample_objective import AbstractSampleLoss
from .trace_of_root import trace_of_root


class FrechetLoss(AbstractSampleLoss):
    """The Frechet distance of generated samples to the data, for a `SampleObjective`.

    **Arguments:**

    - `mean`, `covariance`: of the features of the data, for example those of `mf_eqx.metrics.stream_moments`. The
      loss is computed in their dtype, eigenvalues in float64 on all devices but TPUs.
    - `features`: the function from one sample to a vector, by default the flattened sample.
    - `population`: of the generated samples. It starts empty, and moments of fewer samples than features are useless:
      let the learning rate rise slowly meanwhile.

    **Metrics:** `frechet_distance`, the loss.

    **Raises:** `ValueError` if the moments are not finite, do not fit each other, or if the covariance is not symmetric
    or has negative eigenvalues.
    """

    mean: Float[Array, " features"]
    trace: Float[Array, ""]
    factor: Float[Array, "features features"]
    features: Callable[[Float[Array, "*data"]], Float[Array, " features"]]
    population: AbstractPopulation

    def __init__(
        self,
        mean: Any,
        covariance: Any,
        features: Callable[[Float[Array, "*data"]], Float[Array, " features"]] = jnp.ravel,
        population: Any = RunningPopulation(),
    ):
        check_kind("population", population, AbstractPopulation)
        wide = np.asarray(covariance, np.float64)
        check_finite("mean", np.asarray(mean, np.float64))
        check_finite("covariance", wide)
        if np.ndim(mean) != 1 or wide.shape != 2 * np.shape(mean):
            found = f"{np.shape(mean)} and {wide.shape}"
            raise ValueError(f"mean and covariance must be of shapes (dim,) and (dim, dim), got {found}")
        self.mean = _as_floats(mean)
        self.trace = jnp.asarray(np.trace(wide), self.mean.dtype)
        self.factor = jnp.asarray(_factor(wide), self.mean.dtype)
        self.features, self.population = features, population

    def init(self) -> PyTree[Array]:
        return self.population.init(self.mean)

    def __call__(self, x: Float[Array, "rows *data"], batch: Batch, state: Any) -> tuple[Scalar, Metrics, Any]:
        # Near the mean of the data, a mean outer product minus that of the mean loses no digits.
        y = jax.vmap(self.features)(x).astype(self.mean.dtype) - self.mean
        moments, state = self.population.add(state, y)
        covariance = moments.product - jnp.outer(moments.mean, moments.mean)
        cross = trace_of_root(covariance, self.factor)
        loss = jnp.sum(moments.mean**2) + jnp.trace(covariance) + self.trace - 2 * cross
        return loss, {"frechet_distance": Mean(loss, jnp.ones((), loss.dtype))}, state


def _as_floats(values: Any) -> Float[Array, "..."]:
    values = jnp.asarray(values)
    return at_least_float32(values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float))


def _factor(covariance: Float[np.ndarray, "dim dim"]) -> Float[np.ndarray, "dim dim"]:
    """F with F F^T = C, on the host, once. Moments that were stored in float32 may have small errors."""
    if (asymmetry := np.abs(covariance - covariance.T).max()) > 1e-5 * np.abs(covariance).max():
        raise ValueError(f"covariance must be symmetric, got entries that differ by {asymmetry} from the transpose")
    values, vectors = np.linalg.eigh(covariance)
    if values.min() < -1e-5 * np.abs(values).max():
        raise ValueError(f"covariance must be positive semi-definite, got the eigenvalue {values.min()}")
    return vectors * np.sqrt(np.maximum(values, 0))
