"""Gradients of an objective, computed for one kind of rows after the other, for one micro-batch after the other, and
separately for each device. So only the intermediate results of one kind of rows in one micro-batch are needed at a
time, and devices that have whole parameters communicate only once. (On a GPU XLA uses the same memory for all kinds of
rows, on a CPU each kind has its own.) With FSDP, kinds of rows and micro-batches add to one array of gradients of the
blocks in a loop, unless their parameters are of less than float32.

This requires only that the loss is a mean over rows: it is then the mean over parts of equal size, and the sum over
kinds of rows of their mean loss times their share. An objective that is not such a mean (`AbstractObjective.divisor` is
None) is differentiated on the whole batch at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key, PyTree

from ._abstract_objective import AbstractObjective
from ._batch import Batch
from ._custom_types import at_least_float32, Scalar
from ._fsdp import gathered_in_turn, summed
from ._mean import Mean, Metrics
from ._row import Context
from ._sharding import Parallelism
from ._validate import described, is_pair, with_checked_scalar
from .nn import Stack


class Differentiation(eqx.Module):
    """How an objective is differentiated.

    **Arguments:** `objective`; `key` of the step; `context` of the step; the others as in `TrainStep`.
    """

    objective: AbstractObjective
    accumulation: int
    parallelism: Parallelism | None
    key: Key[Array, ""]
    context: Context

    def __call__(self, field: eqx.Module, batch: Batch, state: Any) -> tuple[Metrics, PyTree[Any], Any]:
        """Metrics, gradients, and the objective's state after the step."""
        if self.objective.divisor is not None and self.parallelism is not None and self.parallelism.divides:
            return *self._blocks_in_turn(field, batch, self.parallelism), state
        return self._whole(field, batch, state)

    def _whole(self, field: eqx.Module, batch: Batch, state: Any) -> tuple[Metrics, PyTree[Any], Any]:
        """All parameters are gathered on every device before the computation starts."""
        if self.parallelism is not None:
            field, context, state = self.parallelism.gather((field, self.context, state))
            self = dataclasses.replace(self, context=context)
        if self.objective.divisor is None:
            return self._at_once(field, batch, state)
        return *self._devices(field, batch), state

    def _at_once(self, field: eqx.Module, batch: Batch, state: Any) -> tuple[Metrics, PyTree[Any], Any]:
        @functools.partial(eqx.filter_grad, has_aux=True)
        def gradient(field: eqx.Module) -> tuple[Scalar, tuple[Metrics, Any]]:
            return self._evaluate(self.objective, field, batch, state)

        gradients, (metrics, state) = gradient(field)
        return metrics, gradients, state

    def _evaluate(
        self, objective: AbstractObjective, field: eqx.Module, batch: Batch, state: Any
    ) -> tuple[Scalar, tuple[Metrics, Any]]:
        """The result of the objective. **Raises:** `ValueError` if it is no loss, metrics and state: the gradient of a
        loss for each row would be that of their sum, and metrics that are no means would be summed over devices."""
        result = objective.evaluate(field, batch, state, key=self.key, context=self.context)
        name = type(objective).__name__
        if not is_pair(result) or not is_pair(result[1]):
            raise ValueError(f"{name}.evaluate must return (loss, (metrics, state)), got {described(result)}")
        loss, (metrics, state) = result
        loss = with_checked_scalar(loss, f"the loss of {name}", differentiable=True)
        if not isinstance(metrics, dict) or not all(isinstance(metric, Mean) for metric in metrics.values()):
            raise ValueError(f"the metrics of {name} must be a dictionary of Mean, got {described(metrics)}")
        if "loss" not in metrics or np.shape(metrics["loss"].total) != ():
            raise ValueError(
                f"the metrics of {name} must have the loss as a Mean of one total, got {described(metrics)}"
            )
        return jnp.asarray(loss), (metrics, state)

    def _blocks_in_turn(self, field: eqx.Module, batch: Batch, parallelism: Parallelism) -> tuple[Metrics, PyTree[Any]]:
        """Each device differentiates its own rows, and has a part of each large parameter: see `_fsdp`."""
        divided, static = eqx.partition((field, self.context), eqx.is_array)
        whole, other = eqx.partition((self.objective, self.key), eqx.is_array)
        specs = jax.tree.map(lambda leaf: parallelism.of_shape(leaf.shape).spec, divided)
        trained = eqx.filter(field, eqx.is_inexact_array)
        trained_specs = jax.tree.map(lambda leaf: parallelism.of_shape(leaf.shape).spec, trained)

        def differentiate(divided: Any, whole: Any, rows: Batch) -> tuple[Metrics, PyTree[Any]]:
            parts, context = eqx.combine(divided, static)
            objective, key = eqx.combine(whole, other)
            context = gathered_in_turn(context, specs[1])
            field, transpose = eqx.filter_vjp(lambda parts: gathered_in_turn(parts, specs[0]), parts)
            alone = Differentiation(objective, self.accumulation, None, key, context)
            metrics, gradients = alone._micro_batches(field, rows, 1 / parallelism.shards)
            (gradients,) = transpose(gradients)
            return jax.lax.psum(metrics, ("data", "fsdp")), summed(gradients, trained_specs)

        everywhere = PartitionSpec()
        return jax.shard_map(
            differentiate,
            mesh=parallelism.mesh,
            in_specs=(specs, everywhere, parallelism.rows.spec),
            out_specs=(everywhere, trained_specs),
            check_vma=False,
        )(divided, whole, batch)

    def _devices(self, field: eqx.Module, batch: Batch) -> tuple[Metrics, PyTree[Any]]:
        """Each device's rows are differentiated separately, and the results are summed over devices once, at the end.
        Otherwise the compiler would sum over devices wherever a gradient arises: in every iteration of a backward loop,
        and once for each kind of rows."""
        if self.parallelism is None or self.parallelism.shards == 1:
            return self._micro_batches(field, batch, 1.0)
        shards = self.parallelism.shards
        arrays, static = eqx.partition((field, self), eqx.is_array)

        # Not a vmap over the devices' parts: it makes a grouped convolution of the gradient of a convolution's weight,
        # which XLA's partitioner gets wrong for some kernels of one pixel.
        def differentiate(arrays: Any, rows: Batch) -> tuple[Metrics, PyTree[Any]]:
            field, alone = eqx.combine(arrays, static)
            return jax.lax.psum(alone._micro_batches(field, rows, 1 / shards), ("data", "fsdp"))

        everywhere = PartitionSpec()
        return jax.shard_map(
            differentiate,
            mesh=self.parallelism.mesh,
            in_specs=(everywhere, self.parallelism.rows.spec),
            out_specs=everywhere,
            check_vma=False,
        )(arrays, batch)

    def _micro_batches(self, field: eqx.Module, batch: Batch, scale: float) -> tuple[Metrics, PyTree[Any]]:
        """The rows of a device are differentiated one micro-batch after the other. Metrics, and gradients of `scale`
        times the loss."""
        several = self.accumulation > 1 or len(self.objective.parts(batch)) > 1
        trained, rest = eqx.partition(field, eqx.is_inexact_array)
        blocks, others = eqx.partition(trained, _in_loops(field) if several else False)
        sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), blocks)

        def differentiate(rows: Batch) -> tuple[Metrics, PyTree[Any]]:
            return self._kinds(blocks, others, rest, rows, sums, scale / self.accumulation)

        if self.accumulation == 1:
            metrics, gradients = differentiate(batch)
        else:
            metrics, gradients = _sum_over(differentiate, _in_parts(batch, self.accumulation))
        gradients = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradients, others)
        return metrics, eqx.combine(jax.tree.map(lambda ref: ref[...], sums), gradients)

    def _kinds(
        self, blocks: Any, others: Any, rest: Any, batch: Batch, sums: PyTree[Any], scale: float
    ) -> tuple[Metrics, PyTree[Any]]:
        """One kind of rows is differentiated after the other: a barrier makes the parameters for each kind wait for the
        sums of the kinds before. Without it, the compiler would run both forward passes before either backward pass. A
        loop with a branch for each kind would keep a GPU's host busy, and compile for longer.

        Metrics, and gradients of `others` in at least float32. Those of `blocks` are added to `sums`.
        """
        found: Any = None
        for part, rows in self.objective.parts(batch):
            if found is not None:
                before = found, jax.tree.map(lambda ref: ref[...], sums)
                (blocks, others), (found, _) = jax.lax.optimization_barrier(((blocks, others), before))

            def loss(blocks: Any, others: Any, part: AbstractObjective = part, rows: Batch = rows) -> Any:
                field = eqx.combine(blocks, others, rest)
                loss, (metrics, _) = self._evaluate(part, field, rows, None)
                return loss, metrics

            transpose: Any
            value, transpose, metrics = jax.vjp(loss, blocks, others, has_aux=True)
            share = rows.index.shape[0] / batch.index.shape[0]
            as_values = jax.tree.map(lambda _: jax.ad.GradValue(), others)  # pyright: ignore[reportPrivateImportUsage]
            _, gradients = transpose.with_refs(sums, as_values)(jnp.full_like(value, share * scale))
            gradients = jax.tree.map(at_least_float32, gradients)
            found = jax.tree.map(jnp.add, found, (metrics, gradients)) if found else (metrics, gradients)
        return found


def _in_loops(field: eqx.Module) -> PyTree[bool]:
    """Which parameters belong to blocks that a `nn.Stack` gathers in a loop. Not those of other loops: JAX cannot vmap
    a step with such sums, and 0.10 cannot transpose `weight[0]` of an array that is bound to one. Not those of less
    than float32, in which sums would be rounded: such sums have the dtype of the parameters."""

    def in_loop(node: Any) -> bool:
        if not isinstance(node, Stack) or node.gather is None or not node.has_loop:
            return False
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(eqx.filter(node, eqx.is_inexact_array))]
        return all(np.promote_types(dtype, np.float32) == dtype for dtype in dtypes)

    return jax.tree.map(in_loop, field, is_leaf=lambda node: isinstance(node, Stack))


def _in_parts(batch: Batch, parts: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)


def _sum_over(function: Callable[[Any], Any], items: Any) -> Any:
    """The sum of the function's results for the items along the leading axis, computed one by one in a loop."""

    def add(sums: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(item)), None

    first = jax.tree.map(lambda leaf: leaf[0], items)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, items)[0]
