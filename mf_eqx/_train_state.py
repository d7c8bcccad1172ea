"""The training state: what a step changes, and what it is before the first step."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key, PyTree

from ._abstract_objective import AbstractObjective
from ._ema import as_averages, ExponentialAverage
from ._field import AbstractField, check_field
from ._optimizer import copy, init_optimizer
from ._validate import check_key, check_kind

_Network = TypeVar("_Network", bound=eqx.Module)


class Faults(eqx.Module):
    """Counts of faults: steps whose loss, gradient, update or objective state was not finite. Such a step changes the
    step number and these counts alone.

    **Arguments:** `total` number of faults; `in_row` number of consecutive faults up to the last step, 0 after a finite
    step; `most_in_row` largest value of `in_row` so far; `last` step number of the last fault, counted from 1, or 0 if
    there was none.
    """

    total: Int[Array, ""]
    in_row: Int[Array, ""]
    most_in_row: Int[Array, ""]
    last: Int[Array, ""]

    def after(self, step: Int[Array, ""], finite: Bool[Array, ""]) -> "Faults":
        """The counts after the step with this number."""
        total = jnp.where(finite, self.total, self.total + 1)
        in_row = jnp.where(finite, 0, self.in_row + 1)
        most = jnp.maximum(self.most_in_row, in_row)
        return Faults(total, in_row, most, jnp.where(finite, self.last, step))


class TrainState(eqx.Module, Generic[_Network]):
    """Everything that training changes.

    **Arguments:** `field` to be learnt, an `AbstractField` or another network of the kind that the objective `learns`;
    `opt_state` of the optimiser; `averages` of the field, each a complete field;
    `step` number of finished steps; `key` of the whole run, never changed; `faults` so far; `objective` the state of
    an objective that has one, see `AbstractObjective.init`.
    """

    field: _Network
    opt_state: PyTree[Any]
    averages: tuple[_Network, ...]
    step: Int[Array, ""]
    key: Key[Array, ""]
    faults: Faults
    objective: PyTree[Any] = None


def init_state(
    field: _Network,
    optimizer: optax.GradientTransformation,
    averages: Sequence[ExponentialAverage] = (),
    objective: AbstractObjective | None = None,
    *,
    key: Key[Array, ""],
) -> TrainState[_Network]:
    """The state before the first step.

    **Arguments:** `field` freshly made or trained before; `optimizer` and `averages` the same as the `TrainStep`'s;
    `objective` also the same if it has a state, or learns another network than a field; `key` of the run. All arrays
    are copied, including those of the optimiser's state, because steps donate the state.

    **Raises:** `ValueError` if the field cannot be called as an `AbstractField` is, or is not of the kind that the
    objective learns, if it holds no parameter, or one parameter twice, since training would change the two copies
    separately, if `key` is one of `rbg` or `unsafe_rbg`, whose rows depend on the batch that they are drawn in, if
    `averages` is not a list, or if a step does not support the optimiser, see `TrainStep`.
    """
    check_learnable(field, AbstractField if objective is None else objective.learns)
    check_key(key)
    _check_trainable(field)
    _check_untied(field)
    field = jax.tree.map(copy, field)
    opt_state = init_optimizer(optimizer, eqx.filter(field, eqx.is_inexact_array))
    no_faults = Faults(*(jnp.zeros((), jnp.int32) for _ in range(4)))
    averaged = tuple(average.init(field) for average in as_averages(averages))
    objective_state = jax.tree.map(copy, objective.init()) if objective is not None else None
    return TrainState(field, opt_state, averaged, jnp.zeros((), jnp.int32), copy(key), no_faults, objective_state)


def check_learnable(field: eqx.Module, kind: type[eqx.Module]) -> None:
    """Refuses a network that is not of the kind that an objective learns."""
    if kind is not AbstractField:
        check_kind("field", field, kind)
    if issubclass(kind, AbstractField):
        check_field(field)


def _check_trainable(field: eqx.Module) -> None:
    """Refuses a field in which nothing can be trained."""
    if not jax.tree.leaves(eqx.filter(field, eqx.is_inexact_array)):
        raise ValueError(
            "field must hold a parameter, an array of floating point numbers in one of its fields (arrays in the "
            f"closure of a function are none), got {field!r:.100}"
        )


def _check_untied(field: eqx.Module) -> None:
    """Refuses one array in two places: its two copies would be trained separately, though the field ties them."""
    names: dict[int, str] = {}
    for path, leaf in jax.tree.leaves_with_path(eqx.filter(field, eqx.is_inexact_array)):
        name = jax.tree_util.keystr(path)
        if (first := names.setdefault(id(leaf), name)) != name:
            raise ValueError(
                f"field must hold each parameter once, got the same array at {first} and {name}: "
                "tie them by eqx.nn.Shared, or copy the array to train them separately"
            )
