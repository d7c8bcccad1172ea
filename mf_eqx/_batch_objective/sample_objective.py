r"""Losses on a whole batch of generated samples: an objective that generates it, and what a loss on it is.

A field makes one sample for each row of the batch, from new noise and under the row's own condition, so that conditions
are drawn as the data's are. Losses compare the distribution of these samples with that of the data,

$$\sum_k w_k\, L_k(\{x_i\}, \{\text{rows of data}\}), \qquad x_i = \text{sample of } u \text{ from } \epsilon_i.$$

They change what the field generates along one grid of times, and do not train it at other (r, t): they are for a field
that is already trained, and that need not satisfy its identity afterwards. Evaluate the result in other features than
those that a loss compares.

Where losses have a population (`FrechetLoss`), it is filled before the first step, from the field as it is then:

    state = init_state(field, optimizer, averages, objective, key=key)
    count = objective.batches_to_fill(rows)
    state = dataclasses.replace(state, objective=objective.fill(field, (draw(k) for k in range(count)), key=key))
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from .._abstract_objective import AbstractObjective
from .._batch import Batch, check_batch, check_eps
from .._custom_types import at_least_float32, Scalar
from .._field import AbstractField
from .._mean import Mean, Metrics
from .._row import Context
from .._sample import as_grid, sample
from .._trained import Trained
from .._validate import check_kind, check_positive


class AbstractSampleLoss(eqx.Module):
    """A loss on a whole batch of generated samples, which may have a state, such as running moments."""

    @abc.abstractmethod
    def init(self) -> PyTree[Array]:
        """The state before the first step, None if there is none."""

    @abc.abstractmethod
    def batches_to_fill(self, rows: int) -> int:
        """How many batches of so many rows its state has to see before the first step; 0 if it needs none."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "rows *data"], batch: Batch, state: Any) -> tuple[Scalar, Metrics, Any]:
        """The loss, its metrics, and the state after the step.

        **Arguments:** `x` generated samples, one for each row of `batch` and with its condition; `batch` of data;
        `state` from `init` or the step before.
        """


def _as_losses(losses: Any) -> tuple[Any, ...]:
    return tuple(losses) if isinstance(losses, tuple | list) else (losses,)


class SampleObjective(AbstractObjective):
    """The weighted sum of losses on the same generated samples.

    The state of the losses is part of the training state: pass the objective to `init_state` too. The loss is no mean
    over rows, so the whole batch is differentiated at once, without accumulation.

    **Arguments:**

    - `losses`: one `AbstractSampleLoss`, or several, for example one for each space of features.
    - `weights`: a number for each loss, > 0; None for 1.
    - `times`: the grid of times of the samples, one step by default. All its steps are differentiated.
    - `method`: `sample`, or another function with its arguments: with `sample_euler`, a field of Flow Matching becomes
      a generator in one step.
    - `unroll`: as in `sample`.

    **Metrics:** `loss`; those of the losses, with the number of the loss at the end of the name if there are several.

    **Raises:** `ValueError` for losses of another kind, weights that are not as many and > 0, or no grid of times; when
    called, if x is not one floating-point array.
    """

    losses: tuple[AbstractSampleLoss, ...] = eqx.field(converter=_as_losses)
    weights: tuple[float, ...] | None = None
    times: tuple[float, ...] = eqx.field(converter=as_grid, default=(1.0, 0.0))
    method: Callable[..., Float[Array, "*data"]] = sample
    unroll: bool = False

    def __check_init__(self):
        if not self.losses:
            raise ValueError("losses must be at least one, got none")
        for loss in self.losses:
            check_kind("losses", loss, AbstractSampleLoss)
        if self.weights is not None:
            if len(self.weights) != len(self.losses):
                raise ValueError(f"weights must be {len(self.losses)}, one for each loss, got {len(self.weights)}")
            check_positive("weights", self.weights)

    @property
    def divisor(self) -> None:
        return None

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def trained(self) -> Trained:
        """Which values of a field it trains, for those who sample later: u at the times of its grid alone."""
        is_average = self.method is sample
        one_step = is_average and len(self.times) == 2
        only_data = one_step and self.times[-1] == 0
        return Trained(is_average, False, False, not is_average, ends_at_data=only_data, one_step=one_step)

    def parts(self, batch: Batch) -> list[tuple[AbstractObjective, Batch]]:
        return [(self, batch)]

    def init(self) -> PyTree[Array]:
        return tuple(loss.init() for loss in self.losses)

    def batches_to_fill(self, rows: int) -> int:
        """How many batches of so many rows fill the states of all its losses."""
        return max(loss.batches_to_fill(rows) for loss in self.losses)

    def fill(self, field: AbstractField, batches: Iterable[Batch], *, key: Key[Array, ""]) -> PyTree[Array]:
        """The state after samples of a field for all these batches, without training it. From an empty population the
        first gradients would be too large, by a factor of the number of batches that count in a full one (1 / (1 -
        decay) for running moments), and Adam's moments would keep this for many steps.

        **Arguments:** `field`; `batches`, as many as `batches_to_fill` says, as for `evaluate`; `key` of the noise.
        """
        state = self.init()
        for number, batch in enumerate(batches):
            state = _state_after(self, field, batch, state, jr.fold_in(key, number))
        return state

    def evaluate(
        self, field: AbstractField, batch: Batch, state: Any, *, key: Key[Array, ""], context: Context | None = None
    ) -> tuple[Scalar, tuple[Metrics, Any]]:
        x = self._samples(field, batch, key)
        total, metrics, states = jnp.zeros((), x.dtype), {}, []
        for number, loss in enumerate(self.losses):
            value, found, after = loss(x, batch, state[number])
            total = total + (1.0 if self.weights is None else self.weights[number]) * value
            metrics |= {name if len(self.losses) == 1 else f"{name}_{number}": mean for name, mean in found.items()}
            states.append(jax.lax.stop_gradient(after))
        return total, ({"loss": Mean(total, jnp.ones((), total.dtype)), **metrics}, tuple(states))

    def _samples(self, field: AbstractField, batch: Batch, key: Key[Array, ""]) -> Float[Array, "rows *data"]:
        check_batch("batch", batch)
        dtype = getattr(batch.x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"x must be one floating-point array here (TrainStep.prepare can convert it), got {dtype}")
        check_eps(batch)

        def generated(example: Batch) -> Float[Array, "*data"]:
            dtype, own_key = at_least_float32(example.x).dtype, jr.fold_in(key, example.index)
            eps = jr.normal(own_key, example.x.shape, dtype) if example.eps is None else jnp.asarray(example.eps, dtype)
            return self.method(field, eps, example.condition, times=self.times, unroll=self.unroll)

        return jax.vmap(generated)(batch)


@eqx.filter_jit
def _state_after(
    objective: SampleObjective, field: AbstractField, batch: Batch, state: Any, key: Key[Array, ""]
) -> PyTree[Array]:
    return objective.evaluate(field, batch, state, key=key)[1][1]
