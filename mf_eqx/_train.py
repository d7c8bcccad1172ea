r"""The training step.

    state, metrics = step(state, batch)

is a pure function of its arguments: the step's key is folded from the state's key and the step number, each row's key
from the row's index in the global batch. Nothing else is random, so a state that is saved and restored continues as if
nothing had happened.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Key, PyTree

from ._abstract_objective import AbstractObjective
from ._batch import Batch, check_batch
from ._custom_types import at_least_float32, Scalar
from ._ema import as_averages, ExponentialAverage
from ._field import AbstractField, check_field
from ._gradient import Differentiation
from ._leaves import leaves, listed, shapes
from ._mean import Mean, Metrics
from ._optimizer import check_optimizer, is_number, standard_promotion, update_optimizer
from ._row import Context
from ._sharding import Parallelism
from ._times import check_divisible
from ._train_state import check_learnable, TrainState
from ._validate import as_count, check_kind

_Tree = TypeVar("_Tree")
_Network = TypeVar("_Network", bound=eqx.Module)

_DRAW = 0x44524157  # folded into the key of a step's data, to differ from the keys that the step itself uses


class TrainStep(eqx.Module):
    """One optimisation step, jitted once, with the state's memory reused for the new state.

    **Arguments:**

    - `objective`: what is minimised.
    - `optimizer`: an optax transformation. Its update also gets the step's loss and gradient, as `value` and `grad`.
      Transformations that make one update from several steps (`optax.MultiSteps`) are refused, and so are those that
      need the loss as a function of the parameters (line searches, estimates of the Hessian). Rules that depend on a
      whole array must know the axis along which a `mf_eqx.nn.Stack` stacks its blocks: see `mf_eqx.nn.per_block`.
      Give labels and masks (`optax.multi_transform`, `optax.masked`) as functions of the parameters: a PyTree of them
      that has the structure of a field can be called, so that optax would call it.
    - `averages`: of the parameters, updated after each step.
    - `teacher`: None, or what the objective gets as `Context.teacher`: one of the averages, given by its number, or a
      frozen field, which is neither trained nor averaged nor part of the state. It must be None if the objective learns
      another network than a field.
    - `prepare`: None, or a function `(row, key) -> row` applied to each row of the batch on the device, before the
      objective: augmentation, dequantisation, posterior sampling. `row` is a `Batch` without its leading axis.
    - `accumulation`: number of equal parts into which the rows of each device are divided. The parts are differentiated
      one after the other: memory for intermediate results falls as 1 / accumulation, results stay the same.
    - `parallelism`: None for one device, or how state and batch are spread. The rows of each device are differentiated
      separately, and the results are summed in one all-reduce; with `fsdp`, blocks of parameters are gathered in turn
      and the sums of their gradients divided in turn, see `Parallelism`.

    A step whose loss, gradient, update or new objective state is not finite leaves field, optimiser state, averages and
    the objective's state unchanged. The step number still increases, so that the next step gets other rows, and
    `TrainState.faults` counts the step. (If no step is finite, the data may have labels that the network lacks.) To
    check the update, the optimiser's update is computed twice: with Adam this costs 2 to 3% of a step at batch 16 on a
    CPU; with Muon its matrix products are computed twice.

    **Returns** (when called with a state and a batch): the new state and the metrics, those of the objective and
    `gradient_norm`. The old state is donated; using it again raises an error.

    **Raises:** `ValueError` if the number of rows that are differentiated at once is not a multiple of the objective's
    `divisor`, if the state's field is not of the kind that the objective learns, if the objective needs a teacher and
    there is none, or if optimiser, averages or objective change the structure or a dtype of the state.
    """

    objective: AbstractObjective
    optimizer: optax.GradientTransformation
    averages: tuple[ExponentialAverage, ...] = eqx.field(default=(), converter=as_averages)
    prepare: Callable[[Batch, Key[Array, ""]], Batch] | None = None
    accumulation: int = 1
    parallelism: Parallelism | None = None
    teacher: int | np.integer | AbstractField | None = None

    def __check_init__(self):
        check_kind("objective", self.objective, AbstractObjective)
        check_optimizer(self.optimizer)
        as_count("accumulation", self.accumulation)
        if self.accumulation > 1 and self.objective.divisor is None:
            raise ValueError(f"accumulation must be 1 for a loss that is no mean over rows, got {self.accumulation}")
        if self.objective.divisor is not None and jax.tree.leaves(jax.eval_shape(self.objective.init)):
            raise ValueError("objective must have divisor None if it has a state, which parts of a batch cannot share")
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError("teacher must be one of the averages or a frozen field for this objective, got None")
        if isinstance(self.teacher, bool):
            raise ValueError(f"teacher must be the number of an average, a field or None, got {self.teacher}")
        if self.teacher is not None and not issubclass(self.objective.learns, AbstractField):
            name = type(self.objective).__name__
            raise ValueError(f"teacher must be None for {name}, which learns no field, got {self.teacher!r:.100}")
        if isinstance(self.teacher, int | np.integer) and not 0 <= self.teacher < len(self.averages):
            raise ValueError(f"teacher must be the number of one of {len(self.averages)} averages, got {self.teacher}")
        if self.teacher is not None and not isinstance(self.teacher, int | np.integer):
            check_field(self.teacher)

    def __call__(self, state: TrainState[_Network], batch: Batch) -> tuple[TrainState[_Network], Metrics]:
        check_kind("state", state, TrainState)
        check_batch("batch", batch)
        if len(state.averages) != len(self.averages):
            raise ValueError(f"averages must be as many as the state's {len(state.averages)}, got {len(self.averages)}")
        self.check_batch_size(batch.index.shape[0])
        return _train_step((self, batch), state)

    def check_batch_size(self, rows: int) -> None:
        """Raises a `ValueError` if a global batch of `rows` rows cannot be divided evenly."""
        shards = 1 if self.parallelism is None else self.parallelism.shards
        reason = "divisor of the objective"
        check_divisible(rows, self.objective.divisor or 1, reason, shards=shards, accumulation=self.accumulation)

    def context(self, state: TrainState) -> Context:
        """The context that the objective gets in this state."""
        teacher = state.averages[self.teacher] if isinstance(self.teacher, int | np.integer) else self.teacher
        return Context(state.step, teacher)


def scan_steps(
    train_step: TrainStep, state: TrainState, draw: Callable[[Key[Array, ""]], Batch], steps: int
) -> tuple[TrainState, Metrics]:
    """Several steps as one program (`jax.lax.scan`), on batches drawn on the device. This is for small networks, where
    the time between separate steps would matter.

    **Arguments:** `train_step`; `state`, donated; `draw` a function from a key to a `Batch`, better a Module than a
    lambda, since the program is compiled again for each new lambda; `steps` number of steps, the program is compiled
    again for each new number.

    **Returns:** the new state and the metrics of all steps combined.

    **Raises:** `ValueError` unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return _scan_steps((train_step, draw, steps), state)


@eqx.filter_jit(donate="all-except-first")
def _train_step(constant: tuple[TrainStep, Batch], state: TrainState[_Network]) -> tuple[TrainState[_Network], Metrics]:
    train_step, batch = constant
    check_learnable(state.field, train_step.objective.learns)
    _check_numbers(state)
    if jax.tree.structure(state.objective) != jax.tree.structure(jax.eval_shape(train_step.objective.init)):
        name = type(train_step.objective).__name__
        raise ValueError(f"init_state must be given the objective of the step, {name}; got another one, or none")
    prepare_key, objective_key = jr.split(jr.fold_in(state.key, state.step))
    if (prepare := train_step.prepare) is not None:
        batch = jax.vmap(lambda row: prepare(row, jr.fold_in(prepare_key, row.index)))(batch)
        check_batch("the result of prepare", batch)
    differentiate = Differentiation(
        train_step.objective,
        train_step.accumulation,
        train_step.parallelism,
        objective_key,
        train_step.context(state),
    )
    metrics, gradients, objective_state = differentiate(state.field, batch, state.objective)
    gradients = jax.tree.map(jnp.conj, gradients)  # of complex parameters: the direction in which the loss rises
    # Twice the gradients, since XLA:CPU would find the squares of the gradients here and in Adam's update, compute them
    # once, and keep all of them in memory from here to there.
    with standard_promotion():
        norm = optax.tree.norm(jax.tree.map(lambda gradient: 2 * at_least_float32(gradient), gradients)) / 2
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    state = _update_if_finite(train_step, state, jnp.asarray(metrics["loss"].value), gradients, objective_state, finite)
    return _spread(train_step, state), {**metrics, "gradient_norm": Mean(norm, jnp.ones(()))}


def _update_if_finite(
    train_step: TrainStep,
    state: TrainState,
    loss: Scalar,
    gradients: PyTree[Any],
    objective_state: PyTree[Any],
    finite: Bool[Array, ""],
) -> TrainState:
    """The state after the step. Field, optimiser state, averages and the objective's state are updated if loss and
    gradient are `finite`, and the update and the new objective state are finite too.

    A branch (`lax.cond`) updates them in place; a selection leaf by leaf would keep both states in memory and read
    both. So the update is computed once before the branch, to check it, and again in the branch.
    """
    step = state.step + 1
    arrays, rest = eqx.partition((state.field, state.opt_state, state.averages, state.objective), eqx.is_array)

    def propose(arrays: PyTree[Any]) -> tuple[PyTree[Any], PyTree[Any]]:
        field, opt_state, *_ = eqx.combine(arrays, rest)
        parameters = eqx.filter(field, eqx.is_inexact_array)
        return update_optimizer(train_step.optimizer, loss, gradients, opt_state, parameters)

    def update(arrays: PyTree[Any]) -> PyTree[Any]:
        field, _, averages, _ = eqx.combine(arrays, rest)
        updates, opt_state = propose(arrays)
        with standard_promotion():
            parameters: Any = optax.apply_updates(eqx.filter(field, eqx.is_inexact_array), updates)
        field = eqx.combine(parameters, field)
        rules = zip(train_step.averages, averages, strict=True)
        averages = tuple(rule.update(average, field, step) for rule, average in rules)
        after = eqx.filter((field, opt_state, averages, objective_state), eqx.is_array)
        for (culprit, name), old, new in zip(_CULPRITS, arrays, after, strict=True):
            _check_same_structure(culprit, name, old, new)
        return after

    for leaf in jax.tree.leaves((propose(arrays)[0], eqx.filter(objective_state, eqx.is_inexact_array))):
        finite &= jnp.all(jnp.isfinite(leaf))
    after = eqx.combine(jax.lax.cond(finite, update, lambda arrays: arrays, arrays), rest)
    field, opt_state, averages, objective_state = after
    return TrainState(field, opt_state, averages, step, state.key, state.faults.after(step, finite), objective_state)


def _check_numbers(state: TrainState) -> None:
    """Refuses Python numbers in place of arrays: the step would be compiled again for each new number."""
    for path, leaf in jax.tree.leaves_with_path((state.opt_state, state.step, state.faults)):
        if is_number(leaf):
            name = ("opt_state", "step", "faults")[path[0].idx] + jax.tree_util.keystr(path[1:])
            raise ValueError(f"state.{name} must be an array of its dtype, got the Python number {leaf}")


_CULPRITS = (("optimizer", "field"), ("optimizer", "opt_state"), ("average", "averages"), ("objective", "objective"))
"""What makes a part of a state anew, and the name of that part."""


def _check_same_structure(culprit: str, name: str, before: PyTree[Any], after: PyTree[Any]) -> None:
    old, new = shapes(leaves(before)), shapes(leaves(after))
    if changed := sorted(leaf for leaf in old.keys() | new.keys() if old.get(leaf) != new.get(leaf)):
        found = listed([f"state.{name}{leaf}" for leaf in changed])
        raise ValueError(f"{culprit} must keep structure, shapes and dtypes of the state, but it changes {found}")


def _spread(train_step: TrainStep, tree: _Tree) -> _Tree:
    """The same arrays, divided over devices by the rule of `Parallelism`."""
    return tree if train_step.parallelism is None else train_step.parallelism.spread(tree)


@eqx.filter_jit(donate="all-except-first")
def _scan_steps(
    constant: tuple[TrainStep, Callable[[Key[Array, ""]], Batch], int], state: TrainState
) -> tuple[TrainState, Metrics]:
    train_step, draw, steps = constant
    arrays, rest = eqx.partition(state, eqx.is_array)

    def scan_step(arrays: TrainState, _: None) -> tuple[TrainState, Metrics]:
        state = eqx.combine(arrays, rest)
        batch = draw(jr.fold_in(jr.fold_in(state.key, state.step), _DRAW))
        state, metrics = train_step(state, batch)
        return eqx.filter(state, eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(scan_step, arrays, length=steps)
    return eqx.combine(arrays, rest), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metrics)
