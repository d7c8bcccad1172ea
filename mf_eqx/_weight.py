r"""Loss weights: functions from the error of one example, and from its row, to its weight in the loss.

With $\|\Delta\|^2$ the squared error *summed* over all dimensions of one example, its loss is
$\mathrm{sg}(w)\,\|\Delta\|^2$.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ._custom_types import Scalar, ScalarLike
from ._row import Row
from ._schedule import as_schedule, at_step, Schedule
from ._validate import as_float, check_kind, check_positive, with_checked_scalar


class AbstractWeight(eqx.Module):
    """The weight w of one example as a function of its squared error and of its row."""

    @abc.abstractmethod
    def __call__(self, error: Scalar, row: Row) -> Scalar:
        r"""The weight. No gradient passes through it.

        **Arguments:** `error` $\|\Delta\|^2$, summed over the dimensions; `row` the example, with its times, which
        may be exactly 0 and 1, and the training step.
        """


def weight_of(weight: AbstractWeight, error: Scalar, row: Row) -> Scalar:
    """The weight, behind stop-gradient. **Raises:** `ValueError` unless it is a scalar."""
    value = with_checked_scalar(weight(error, row), f"a weight of {type(weight).__name__}")
    return jax.lax.stop_gradient(_floating(value, error))


def _floating(weight: ArrayLike, error: Float[Array, "..."]) -> Float[Array, "..."]:
    """`weight`, or an integer or boolean one in the precision of the error."""
    weight = jnp.asarray(weight)
    return weight if jnp.issubdtype(weight.dtype, jnp.floating) else weight.astype(error.dtype)


def _divisor(mean: bool, row: Row | None) -> int:
    """The number of dimensions for an error that is their mean, 1 for a sum."""
    if mean and row is None:
        raise ValueError("row must be given for a weight of the mean error, got None")
    return row.z.size if mean and row is not None else 1


class ConstantWeight(AbstractWeight):
    """Plain squared error, w = `value`: p = 0 in the paper. It adds no bias, so it is the weight for comparisons with
    exact fields.

    **Arguments:** `value` > 0; `mean` whether the loss is that of the mean squared error over dimensions, and not of
    the sum.
    """

    value: float = eqx.field(default=1.0, converter=as_float("value"))
    mean: bool = False

    def __check_init__(self):
        check_positive("value", self.value)

    def __call__(self, error: ScalarLike, row: Row | None = None) -> Scalar:
        return jnp.full(jnp.shape(error), self.value / _divisor(self.mean, row), jnp.result_type(error, float))


class AdaptiveWeight(AbstractWeight):
    r"""The adaptive weight of Eq. 22, $w = 1 / (\|\Delta\|^2 + c)^p$.

    **Arguments:** `power` the paper's p, >= 0; `offset` its c, > 0; both finite; `mean` whether $\|\Delta\|^2$ is the
    mean over dimensions here and in the loss, and not the sum. Values in use: p = 1, c = 0.01
    (ImageNet, the defaults); p = 0.75, c = 1e-3 (CIFAR-10); p = 0.5 resembles Pseudo-Huber. With p = 1 the weighted
    loss stays at about 1 throughout training: monitor the raw errors instead. Any p > 0 biases the field wherever the
    conditional variance dominates the error.

    The gradient of a row is proportional to $\|\Delta\|^{1 - 2p}$ where the error is large beside c, so with p >= 0.5
    it does not fade as the error falls. Methods whose rows with r < t do not use v (`Facts.uses_velocity`) have small
    errors there, free of the noise of v, even where u is wrong: u = 0 solves the equations of most. So such rows can
    win over those with r = t. On Fashion-MNIST `Shortcut`, `SplitMeanFlow`, `LagrangianSelfDistillation` and
    `EulerianSelfDistillation` learnt nothing with p = 0.5, and learn with p = 0 (`ConstantWeight`).
    """

    power: float = eqx.field(default=1.0, converter=as_float("power"))
    offset: float = eqx.field(default=0.01, converter=as_float("offset"))
    mean: bool = False

    def __check_init__(self):
        check_positive("power", self.power, or_zero=True)
        check_positive("offset", self.offset)

    def __call__(self, error: ScalarLike, row: Row | None = None) -> Scalar:
        divisor = _divisor(self.mean, row)
        return jax.lax.stop_gradient((jnp.asarray(error) / divisor + self.offset) ** -self.power / divisor)


class GapCurriculum(AbstractWeight):
    r"""Rows with a short gap t - r first, those with a long one later:

    $$w = w_0 \, \big(p + (1 - p)\, (1 - (t - r))^k\big), \qquad p: 0 \to 1.$$

    Rows with r = t keep the weight $w_0$ from the start; with p = 1 all do. The target of u over a long gap depends,
    through the field's own derivative, on the field over shorter gaps: until these are learnt, it amplifies their
    errors.

    **Arguments:** `weight` $w_0$; `done` p in [0, 1], the part of the curriculum that is done, or a schedule of it,
    such as `optax.linear_schedule(0.0, 1.0, steps)`; `power` k, > 0.

    A method with a loss of its own does not use it.

    The order, v first, short gaps then, long gaps last, is that of Understanding, Accelerating, and Improving MeanFlow
    Training, Kim, Go, Bogensperger, Erbach, Kalischek, Tombari, Schindler, Narnhofer, 2025, arXiv 2511.19065. The form
    of the factor is ours.
    """

    weight: AbstractWeight
    done: Schedule = eqx.field(converter=as_schedule("done", 0.0, 1.0))
    power: float = eqx.field(default=4.0, converter=as_float("power"))

    def __check_init__(self):
        check_kind("weight", self.weight, AbstractWeight)
        check_positive("power", self.power)

    def __call__(self, error: ScalarLike, row: Row) -> Scalar:
        done = at_step(self.done, row.context).astype(row.t.dtype)
        factor = done + (1 - done) * (1 - (row.t - row.r)) ** self.power
        error = jnp.asarray(error)
        weight = _floating(self.weight(error, row), error)
        return jax.lax.stop_gradient(weight * factor.astype(weight.dtype))
