r"""The training state and its one step.

    state, metrics = step(state, batch)

is a pure function of its arguments: the step's key is folded from the state's key and the step number, each row's key
from the row's index in the global batch. Nothing else is random, so a state that is saved and restored continues as if
nothing had happened.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Int, Key, PyTree

from ._ema import ExponentialAverage
from ._field import AbstractField
from ._identity import Context
from ._objective import AbstractObjective, Batch, Mean, Metrics, Objective

_DRAW = 0x44524157  # folds the key of a step's data away from those that the step itself splits off


class TrainState(eqx.Module):
    """Everything that training changes.

    **Arguments:** `field` being learnt; `opt_state` of the optimiser; `averages` of the field, each a complete field;
    `step` number of finished steps; `key` of the whole run, never changed.
    """

    field: AbstractField
    opt_state: PyTree[Any]
    averages: tuple[AbstractField, ...]
    step: Int[Array, ""]
    key: Key[Array, ""]


def init_state(
    field: AbstractField,
    optimizer: optax.GradientTransformation,
    averages: Sequence[ExponentialAverage] = (),
    *,
    key: Key[Array, ""],
) -> TrainState:
    """The state before the first step.

    **Arguments:** `field` freshly made or trained before; `optimizer` and `averages` the same as the `TrainStep`'s;
    `key` of the run. Both are copied, because steps donate the state.
    """
    field, key = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, (field, key))
    opt_state = optimizer.init(eqx.filter(field, eqx.is_inexact_array))
    return TrainState(field, opt_state, tuple(a.init(field) for a in averages), jnp.zeros((), jnp.int32), key)


class TrainStep(eqx.Module):
    """One optimisation step, jitted once, with the state's memory reused for the new state.

    **Arguments:**

    - `objective`: what is minimised.
    - `optimizer`: an optax transformation.
    - `averages`: of the parameters, updated after each step. The first is the `teacher` of the objective's context.
    - `prepare`: None, or a function `(row, key) -> row` applied to each row of the batch on the device, before the
      objective: augmentation, dequantisation, posterior sampling. `row` is a `Batch` without its leading axis.
    - `shards`: devices that share the batch; each one's rows are differentiated apart, and meet in one all-reduce.

    **Returns** (when called with a state and a batch): the new state and the metrics, those of the objective and
    `gradient_norm`. The old state is donated; using it again raises an error.
    """

    objective: AbstractObjective
    optimizer: optax.GradientTransformation
    averages: tuple[ExponentialAverage, ...] = eqx.field(default=(), converter=tuple)
    prepare: Callable[[Batch, Key[Array, ""]], Batch] | None = None
    shards: int = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if len(state.averages) != len(self.averages):
            raise ValueError(f"averages must be as many as the state's {len(state.averages)}, got {len(self.averages)}")
        if batch.index.shape[0] % self.shards:
            raise ValueError(f"batch must be a multiple of shards = {self.shards}, got {batch.index.shape[0]}")
        return _train_step((self, batch), state)


def scan_steps(
    train_step: TrainStep, state: TrainState, draw: Callable[[Key[Array, ""]], Batch], steps: int
) -> tuple[TrainState, Metrics]:
    """Several steps as one program (`jax.lax.scan`), on batches drawn on the device: for networks so small that the
    time between steps would count.

    **Arguments:** `train_step`; `state`, donated; `draw` a function from a key to a `Batch`, a Module rather than a
    lambda, since each new lambda is compiled anew; `steps` how many, compiled anew for each number.

    **Returns:** the new state and the metrics of all steps together.

    **Raises:** `ValueError` unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return _scan_steps((train_step, draw, steps), state)


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept: tuple[TrainStep, Batch], state: TrainState) -> tuple[TrainState, Metrics]:
    train_step, batch = kept
    prepare_key, objective_key = jr.split(jr.fold_in(state.key, state.step))
    if (prepare := train_step.prepare) is not None:
        batch = jax.vmap(lambda row: prepare(row, jr.fold_in(prepare_key, row.index)))(batch)
    context = Context(state.step, state.averages[0] if state.averages else None)
    metrics, gradients = _differentiate(train_step, state.field, batch, objective_key, context)
    parameters = eqx.filter(state.field, eqx.is_inexact_array)
    updates, opt_state = train_step.optimizer.update(gradients, state.opt_state, parameters)
    field = eqx.apply_updates(state.field, updates)
    step = state.step + 1
    averages = tuple(
        rule.update(average, field, step) for rule, average in zip(train_step.averages, state.averages, strict=True)
    )
    metrics["gradient_norm"] = Mean(optax.tree.norm(gradients), jnp.ones(()))
    return TrainState(field, opt_state, averages, step, state.key), metrics


def _differentiate(
    train_step: TrainStep, field: AbstractField, batch: Batch, key: Key[Array, ""], context: Context
) -> tuple[Metrics, PyTree[Any]]:
    """Metrics and gradients of the mean over all rows.

    Each shard's rows are differentiated apart and the results meet once, at the end. Otherwise the compiler sums over
    devices wherever a gradient arises: in every turn of a backward loop, and once for each kind of rows.
    """
    if train_step.shards == 1:
        return _differentiate_shard(train_step.objective, field, batch, key, context)
    shards = jax.tree.map(lambda leaf: leaf.reshape(train_step.shards, -1, *leaf.shape[1:]), batch)
    metrics, gradients = jax.vmap(lambda shard: _differentiate_shard(train_step.objective, field, shard, key, context))(
        shards
    )
    return jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics), jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)


def _differentiate_shard(
    objective: AbstractObjective, field: AbstractField, batch: Batch, key: Key[Array, ""], context: Context
) -> tuple[Metrics, PyTree[Any]]:
    """One kind of rows after the other, so that intermediate results of only one kind are held at a time.

    In a loop: of a sum, the compiler would run both forward passes before either backward pass.
    """
    parts = objective.parts(batch) if isinstance(objective, Objective) else [(objective, batch)]

    def differentiate(part: AbstractObjective, rows: Batch) -> tuple[Metrics, PyTree[Any]]:
        (_, metrics), gradients = eqx.filter_value_and_grad(part, has_aux=True)(field, rows, key=key, context=context)
        share = rows.index.shape[0] / batch.index.shape[0]
        return metrics, jax.tree.map(lambda g: share * g, gradients)

    kinds = [functools.partial(differentiate, *part) for part in parts]
    if len(kinds) == 1:
        return kinds[0]()

    def add(sums: Any, kind: Int[Array, ""]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.lax.switch(kind, kinds)), None

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(kinds[0]))
    return jax.lax.scan(add, nothing, jnp.arange(len(kinds)))[0]


@eqx.filter_jit(donate="all-except-first")
def _scan_steps(
    kept: tuple[TrainStep, Callable[[Key[Array, ""]], Batch], int], state: TrainState
) -> tuple[TrainState, Metrics]:
    train_step, draw, steps = kept
    changing, fixed = eqx.partition(state, eqx.is_array)

    def one(changing: TrainState, _: None) -> tuple[TrainState, Metrics]:
        state = eqx.combine(changing, fixed)
        batch = draw(jr.fold_in(jr.fold_in(state.key, state.step), _DRAW))
        state, metrics = train_step(state, batch)
        return eqx.filter(state, eqx.is_array), metrics

    changing, metrics = jax.lax.scan(one, changing, length=steps)
    return eqx.combine(changing, fixed), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metrics)
