r"""The Frechet distance as a loss: between the features of generated samples and those of the data,

$$|\mu - \mu_*|^2 + \mathrm{tr}\big(\Sigma + \Sigma_* - 2\, (\Sigma_*^{1/2} \Sigma\, \Sigma_*^{1/2})^{1/2}\big),$$

with $\mu, \Sigma$ as running averages over steps, $m \leftarrow d\, m + (1 - d)\, m_{batch}$; the gradient goes through
the current batch alone. The loss changes the distribution of one-step samples, and does not train the field at other
(r, t): it is for a field that is already trained. Evaluate the result with other features than these.

Source: arXiv 2604.28190 (FD-loss).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._batch import Batch
from .._custom_types import at_least_float32, Scalar
from .._field import AbstractField
from .._mean import Mean, Metrics
from .._objective import AbstractObjective
from .._row import Context
from .._sample import sample
from .._validate import check_finite


def _as_floats(values: Any) -> Float[Array, "..."]:
    values = jnp.asarray(values)
    return at_least_float32(values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float))


def _product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    return jnp.matmul(a, b, precision="highest")  # on recent GPUs float32 products are TF32 otherwise


class RunningMoments(eqx.Module):
    """Running averages over steps, starting from zero: of 1 (`weight`), and of the mean (`mean`) and the mean outer
    product (`product`) of a batch's features minus the mean of the data's features."""

    weight: Float[Array, ""]
    mean: Float[Array, " features"]
    product: Float[Array, "features features"]


class FrechetLoss(AbstractObjective):
    r"""The Frechet distance of one-step samples.

    Its state, `RunningMoments`, is part of the training state: pass the objective to `init_state` too. The loss is not
    a mean over rows, so the whole batch is differentiated at once, without accumulation.

    **Arguments:** `mean`, `covariance` of the features of the data; `features` the function from one sample to a
    vector, by default the flattened sample; `decay` d of the running averages, in [0, 1): 0.999 in the paper.

    The loss is computed in the dtype of the moments. In float32, eigenvalues below about 1e-6 of the largest are lost,
    and so is their part of the gradient: pass float64 moments if the device supports them.
    """

    mean: Float[Array, " features"] = eqx.field(converter=_as_floats)
    covariance: Float[Array, "features features"] = eqx.field(converter=_as_floats)
    features: Callable[[Float[Array, "*data"]], Float[Array, " features"]] = jnp.ravel
    decay: float = eqx.field(default=0.999, converter=float)

    def __check_init__(self):
        check_finite("mean", self.mean)
        check_finite("covariance", self.covariance)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    @property
    def divisor(self) -> None:
        return None

    @property
    def needs_teacher(self) -> bool:
        return False

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        return [(self, batch)]

    def init(self) -> RunningMoments:
        return jax.tree.map(jnp.zeros_like, RunningMoments(jnp.zeros((), self.mean.dtype), self.mean, self.covariance))

    def evaluate(
        self, field: AbstractField, batch: Batch, state: Any, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, RunningMoments]]:
        def generated(example: Batch) -> Float[Array, " features"]:
            eps = jr.normal(jr.fold_in(key, example.index), example.x.shape, at_least_float32(example.x).dtype)
            return self.features(sample(field, eps, example.condition)).astype(self.mean.dtype) - self.mean

        y = jax.vmap(generated)(batch)
        new = RunningMoments(jnp.ones((), y.dtype), jnp.mean(y, axis=0), _product(y.T, y) / len(y))
        state = jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, state, new)
        mean = state.mean / state.weight
        loss = self._distance(mean, state.product / state.weight - jnp.outer(mean, mean))
        return loss, ({"loss": Mean(loss, jnp.ones(()))}, jax.lax.stop_gradient(state))

    def _distance(self, mean: Float[Array, " features"], covariance: Float[Array, "features features"]) -> Scalar:
        values, vectors = jnp.linalg.eigh(self.covariance)
        root = _product(vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors.T)
        squares = jnp.linalg.eigvalsh(_product(root, _product(covariance, root)))
        cross = jnp.sum(jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny)))
        return jnp.sum(mean**2) + jnp.trace(covariance) + jnp.trace(self.covariance) - 2 * cross
