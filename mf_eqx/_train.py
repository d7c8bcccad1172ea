r"""The training state and its one step.

    state, metrics = step(state, batch)

is a pure function of its arguments: the step's key is folded from the state's key and the step number, each row's key
from the row's index in the global batch. Nothing else is random, so a state that is saved and restored continues as if
nothing had happened.
"""

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool, Int, Key, PyTree

from ._custom_types import Scalar
from ._ema import ExponentialAverage
from ._field import AbstractField
from ._identity import Context
from ._leaves import leaves, shapes, some
from ._objective import AbstractObjective, Batch, Mean, Metrics, Objective
from ._optimizer import check_optimizer, copy, init_optimizer, is_number, standard_promotion, update_optimizer
from ._sharding import Parallelism
from ._times import check_batch_size

_Tree = TypeVar("_Tree")

_DRAW = 0x44524157  # folds the key of a step's data away from those that the step itself splits off


class Faults(eqx.Module):
    """Steps whose loss, gradient or update was not finite, and which therefore changed nothing.

    **Arguments:** `total` of them; `in_row` up to the last step, 0 after a good one; `most_in_row` so far; `last` one's
    number, from 1, or 0.
    """

    total: Int[Array, ""]
    in_row: Int[Array, ""]
    most_in_row: Int[Array, ""]
    last: Int[Array, ""]

    def after(self, step: Int[Array, ""], finite: Bool[Array, ""]) -> "Faults":
        """The counters after the step of that number."""
        total = jnp.where(finite, self.total, self.total + 1)
        in_row = jnp.where(finite, 0, self.in_row + 1)
        most = jnp.maximum(self.most_in_row, in_row)
        return Faults(total, in_row, most, jnp.where(finite, self.last, step))


class TrainState(eqx.Module):
    """Everything that training changes.

    **Arguments:** `field` being learnt; `opt_state` of the optimiser; `averages` of the field, each a complete field;
    `step` number of finished steps; `key` of the whole run, never changed; `faults` counted so far.
    """

    field: AbstractField
    opt_state: PyTree[Any]
    averages: tuple[AbstractField, ...]
    step: Int[Array, ""]
    key: Key[Array, ""]
    faults: Faults


def init_state(
    field: AbstractField,
    optimizer: optax.GradientTransformation,
    averages: Sequence[ExponentialAverage] = (),
    *,
    key: Key[Array, ""],
) -> TrainState:
    """The state before the first step.

    **Arguments:** `field` freshly made or trained before; `optimizer` and `averages` the same as the `TrainStep`'s;
    `key` of the run. All arrays are copied, those of the optimiser's state too, because steps donate the state.

    **Raises:** `ValueError` if the field holds one parameter twice, which training would change apart, or if a step
    cannot serve the optimiser, see `TrainStep`.
    """
    _check_untied(field)
    field = jax.tree.map(copy, field)
    opt_state = init_optimizer(optimizer, eqx.filter(field, eqx.is_inexact_array))
    none = Faults(*(jnp.zeros((), jnp.int32) for _ in range(4)))
    averaged = tuple(average.init(field) for average in averages)
    return TrainState(field, opt_state, averaged, jnp.zeros((), jnp.int32), copy(key), none)


def _check_untied(field: AbstractField) -> None:
    """Refuses one array in two places: its copies would be trained apart, though the field ties them."""
    names: dict[int, str] = {}
    for path, leaf in jax.tree.leaves_with_path(eqx.filter(field, eqx.is_inexact_array)):
        name = jax.tree_util.keystr(path)
        if (first := names.setdefault(id(leaf), name)) != name:
            raise ValueError(
                f"field must hold each parameter once, got the same array at {first} and {name}: "
                "tie them by eqx.nn.Shared, or copy the array to train them apart"
            )


class TrainStep(eqx.Module):
    """One optimisation step, jitted once, with the state's memory reused for the new state.

    **Arguments:**

    - `objective`: what is minimised.
    - `optimizer`: an optax transformation. Its update is given the step's loss and gradient besides (`value`, `grad`).
      Refused are those that make one update of several steps (`optax.MultiSteps`), and those that need the loss as a
      function of the parameters: line searches, estimates of the Hessian. Rules per leaf must know where the blocks of
      a `mf_eqx.nn.Stack` lie: see `mf_eqx.nn.per_block`.
    - `averages`: of the parameters, updated after each step. The first is the `teacher` of the objective's context.
    - `prepare`: None, or a function `(row, key) -> row` applied to each row of the batch on the device, before the
      objective: augmentation, dequantisation, posterior sampling. `row` is a `Batch` without its leading axis.
    - `accumulation`: equal parts that the rows of each device are differentiated in, one after the other: memory for
      intermediate results falls as 1 / accumulation, results stay the same.
    - `parallelism`: None for one device, or how state and batch are spread. Each device's rows are differentiated
      apart, and meet in one all-reduce.
    - `unroll`: False to differentiate one kind of rows (r < t, r = t) after the other in a loop, which holds the
      intermediate results of one of them at a time. True for no loop: for convolutions on CPUs, which XLA runs without
      its fast kernels inside of loops (jax-ml/jax, issue 12868).

    A step whose loss, gradient or update is not finite leaves field, optimiser and averages as they were; the step
    number goes on, so that the next one meets other rows, and `TrainState.faults` counts. For that the optimiser's
    update is computed twice: with Adam 2 to 3% of a step at batch 16 on a CPU; Muon's products count twice.

    **Returns** (when called with a state and a batch): the new state and the metrics, those of the objective and
    `gradient_norm`. The old state is donated; using it again raises an error.

    **Raises:** `ValueError` unless every part is a whole number of groups of rows, or if the optimiser changes the
    structure or a dtype of its state.
    """

    objective: AbstractObjective
    optimizer: optax.GradientTransformation
    averages: tuple[ExponentialAverage, ...] = eqx.field(default=(), converter=tuple)
    prepare: Callable[[Batch, Key[Array, ""]], Batch] | None = None
    accumulation: int = 1
    parallelism: Parallelism | None = None
    unroll: bool = False

    def __check_init__(self):
        check_optimizer(self.optimizer)
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be >= 1, got {self.accumulation}")

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if len(state.averages) != len(self.averages):
            raise ValueError(f"averages must be as many as the state's {len(state.averages)}, got {len(self.averages)}")
        self.check_batch_size(batch.index.shape[0])
        return _train_step((self, batch), state)

    def check_batch_size(self, rows: int) -> None:
        """Refuses a global batch that cannot be spread evenly: `ValueError` with the numbers."""
        share = self.objective.identity_share if isinstance(self.objective, Objective) else Fraction(1)
        shards = 1 if self.parallelism is None else self.parallelism.shards
        check_batch_size(rows, share, shards=shards, accumulation=self.accumulation)


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
    _check_numbers(state)
    prepare_key, objective_key = jr.split(jr.fold_in(state.key, state.step))
    if (prepare := train_step.prepare) is not None:
        batch = jax.vmap(lambda row: prepare(row, jr.fold_in(prepare_key, row.index)))(batch)
    field, teacher = _gathered(train_step, (state.field, state.averages[0] if state.averages else None))
    metrics, gradients = _differentiate(train_step, field, batch, objective_key, Context(state.step, teacher))
    with standard_promotion():
        norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    state = _update_if_finite(train_step, state, jnp.asarray(metrics["loss"].value), gradients, finite)
    return _spread(train_step, state), {**metrics, "gradient_norm": Mean(norm, jnp.ones(()))}


def _update_if_finite(
    train_step: TrainStep, state: TrainState, loss: Scalar, gradients: PyTree[Any], finite: Bool[Array, ""]
) -> TrainState:
    """The state after the step: with field, optimiser and averages updated if all was `finite` and the update is, too.

    In a branch they are updated in their own memory; selecting leaf by leaf would hold both states, and pass over both.
    So the update is looked at before the branch, and computed again in it.
    """
    step = state.step + 1
    arrays, rest = eqx.partition((state.field, state.opt_state, state.averages), eqx.is_array)

    def propose(arrays: PyTree[Any]) -> tuple[PyTree[Any], PyTree[Any]]:
        field, opt_state, _ = eqx.combine(arrays, rest)
        parameters = eqx.filter(field, eqx.is_inexact_array)
        return update_optimizer(train_step.optimizer, loss, gradients, opt_state, parameters)

    def update(arrays: PyTree[Any]) -> PyTree[Any]:
        field, _, averages = eqx.combine(arrays, rest)
        updates, opt_state = propose(arrays)
        with standard_promotion():
            parameters: Any = optax.apply_updates(eqx.filter(field, eqx.is_inexact_array), updates)
        field = eqx.combine(parameters, field)
        rules = zip(train_step.averages, averages, strict=True)
        averages = tuple(rule.update(average, field, step) for rule, average in rules)
        after = eqx.filter((field, opt_state, averages), eqx.is_array)
        _check_kept(arrays, after)
        return after

    for leaf in jax.tree.leaves(propose(arrays)[0]):
        finite &= jnp.all(jnp.isfinite(leaf))
    field, opt_state, averages = eqx.combine(jax.lax.cond(finite, update, lambda arrays: arrays, arrays), rest)
    return TrainState(field, opt_state, averages, step, state.key, state.faults.after(step, finite))


def _check_numbers(state: TrainState) -> None:
    """Refuses Python's numbers where arrays belong: the step would be compiled anew for each."""
    for path, leaf in jax.tree.leaves_with_path((state.opt_state, state.step, state.faults)):
        if is_number(leaf):
            name = ("opt_state", "step", "faults")[path[0].idx] + jax.tree_util.keystr(path[1:])
            raise ValueError(f"state.{name} must be an array of its dtype, got the Python number {leaf}")


def _check_kept(before: PyTree[Any], after: PyTree[Any]) -> None:
    old, new = shapes(leaves(before)), shapes(leaves(after))
    if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise ValueError(
            f"optimizer must keep structure, shapes and dtypes of its state, but it changes {some(changed)}"
        )


def _gathered(train_step: TrainStep, tree: _Tree) -> _Tree:
    """The same arrays, whole on every device: once a step, before anything is computed from them."""
    return tree if train_step.parallelism is None else train_step.parallelism.gather(tree)


def _spread(train_step: TrainStep, tree: _Tree) -> _Tree:
    """The same arrays, each device keeping what the rule gives it."""
    return tree if train_step.parallelism is None else train_step.parallelism.spread(tree)


def _differentiate(
    train_step: TrainStep, field: AbstractField, batch: Batch, key: Key[Array, ""], context: Context
) -> tuple[Metrics, PyTree[Any]]:
    """Metrics and gradients of the mean over all rows.

    Each device's rows are differentiated apart and the results meet once, at the end. Otherwise the compiler sums over
    devices wherever a gradient arises: in every turn of a backward loop, and once for each kind of rows.
    """

    def differentiate(rows: Batch) -> tuple[Metrics, PyTree[Any]]:
        return _differentiate_in_turn(train_step, field, rows, key, context)

    if train_step.parallelism is None:
        return differentiate(batch)
    metrics, gradients = jax.vmap(differentiate)(_in_parts(batch, train_step.parallelism.shards))
    metrics = jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics)
    return metrics, _spread(train_step, jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients))


def _in_parts(batch: Batch, parts: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)


def _differentiate_in_turn(
    train_step: TrainStep, field: AbstractField, batch: Batch, key: Key[Array, ""], context: Context
) -> tuple[Metrics, PyTree[Any]]:
    """One part of the rows of a device after the other."""
    parts = train_step.accumulation
    if parts == 1:
        return _differentiate_kinds(train_step, field, batch, key, context)

    def differentiate(rows: Batch) -> tuple[Metrics, PyTree[Any]]:
        metrics, gradients = _differentiate_kinds(train_step, field, rows, key, context)
        return metrics, jax.tree.map(lambda g: g / parts, gradients)

    return _sum_over(differentiate, _in_parts(batch, parts))


def _sum_over(function: Callable[[Any], Any], items: Any) -> Any:
    """The sum of what the function returns for each item along the leading axis, one after the other in a loop."""

    def add(sums: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(item)), None

    one = jax.tree.map(lambda leaf: leaf[0], items)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, one))
    return jax.lax.scan(add, nothing, items)[0]


def _differentiate_kinds(
    train_step: TrainStep, field: AbstractField, batch: Batch, key: Key[Array, ""], context: Context
) -> tuple[Metrics, PyTree[Any]]:
    """One kind of rows after the other, so that intermediate results of only one kind are held at a time.

    In a loop: of a sum, the compiler would run both forward passes before either backward pass.
    """
    objective = train_step.objective
    parts = objective.parts(batch) if isinstance(objective, Objective) else [(objective, batch)]

    def differentiate(part: AbstractObjective, rows: Batch) -> tuple[Metrics, PyTree[Any]]:
        share = rows.index.shape[0] / batch.index.shape[0]

        @functools.partial(eqx.filter_grad, has_aux=True)
        def gradient(field: AbstractField) -> tuple[Scalar, Metrics]:
            loss, metrics = part(field, rows, key=key, context=context)
            return share * loss, metrics

        gradients, metrics = gradient(field)
        return metrics, gradients

    kinds = [functools.partial(differentiate, *part) for part in parts]
    if len(kinds) == 1:
        return kinds[0]()
    if train_step.unroll:
        return functools.reduce(functools.partial(jax.tree.map, jnp.add), (kind() for kind in kinds))
    return _sum_over(lambda kind: jax.lax.switch(kind, kinds), jnp.arange(len(kinds)))


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
