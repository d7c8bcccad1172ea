r"""Operations of matrix products and convolutions, counted in a program as JAX traces it.

XLA counts the body of a loop once, so its figures cannot compare networks whose blocks are a loop. Here the body counts
once per iteration, so that a scanned network costs what an unrolled one costs. What no result needs is left out, as a
compiler leaves it out: JAX traces, for example, a backward pass of whatever a loss does not use.

The cost of a method is then the operations of its gradient in units of Flow Matching's,

    objective = mfx.Objective(mfx.MeanFlow())                                  a quarter of the rows has r < t
    measure.relative_cost(objective, mfx.DiT((4, 32, 32), mfx.DIT_B4, key=key), mfx.Batch(x))             1.084

by the paper's count 1 + T / 12, where T is the tangent pass of a network in units of its forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._batch import Batch
from .._field import AbstractField, stopped
from .._objective import AbstractObjective, Objective
from .._row import Context
from ._program import has_shape


def relative_cost(objective: AbstractObjective, field: AbstractField, batch: Batch) -> float:
    """What a training step of an objective costs, in units of Flow Matching's with the same network: the operations of
    matrix products and convolutions in loss and gradient. The optimiser, which costs the same in both, is left out.

    Nothing is computed, only traced: seconds for the largest networks.

    **Arguments:** `objective`, for a `TrainStep` its `objective`; `field` the network, for example made by
    `equinox.filter_eval_shape` without allocating it; `batch` arrays or their shapes, as the objective gets it, after
    `TrainStep.prepare`.

    **Returns:** the ratio, 1 for Flow Matching. If the cost changes during training, it is the largest.

    **Raises:** `ValueError` if the batch does not meet the requirements of the objective, if the network has no matrix
    products, or for a loop without a fixed number of iterations.
    """
    flow_matching = Objective(identity=None, identity_share=0)
    if (base := _gradient_flops(flow_matching, field, batch)) == 0:
        raise ValueError(f"field must have matrix products or convolutions, got {type(field).__name__} without any")
    return _gradient_flops(objective, field, batch) / base


def _gradient_flops(objective: AbstractObjective, field: AbstractField, batch: Batch) -> int:
    """Operations of the products in loss and gradient."""

    def gradient(field: AbstractField, batch: Batch) -> Any:
        context = Context(jnp.zeros((), jnp.int32), stopped(field))

        def loss(field: AbstractField) -> Any:
            return objective.evaluate(field, batch, objective.init(), key=jr.key(0), context=context)[0]

        return eqx.filter_value_and_grad(loss)(field)

    return product_flops(gradient, field, batch)


def product_flops(function: Callable[..., Any], *inputs: PyTree[Any]) -> int:
    """Floating-point operations of all matrix products and convolutions of a function, two per multiply-add.

    The body of a loop is counted once per iteration; of several branches, the most expensive one is counted. (So the
    count is too large for a `TrainStep`, a loop over branches: count the gradient of its objective.) Products that no
    result of the function depends on are not counted.

    **Arguments:** as for `compile_program`. **Raises:** `ValueError` for a loop without a fixed number of iterations.
    """
    dynamic, static = eqx.partition(inputs, has_shape)

    def arrays_only(*dynamic: Any) -> Any:
        return eqx.filter(function(*eqx.combine(dynamic, static)), eqx.is_array)

    program = jax.make_jaxpr(arrays_only)(*dynamic).jaxpr
    return _count(program, [True] * len(program.outvars))[0]


def _count(program: Any, needed: Sequence[bool]) -> tuple[int, list[bool]]:
    """The operations for the results that are needed, and which inputs these need."""
    live, flops = {id(value) for value, is_needed in zip(program.outvars, needed, strict=True) if is_needed}, 0
    for equation in reversed(program.eqns):
        results = [id(value) in live for value in equation.outvars]
        if not any(results):
            continue
        count, inputs = _count_equation(equation, results)
        flops += count
        live |= {id(value) for value, is_needed in zip(equation.invars, inputs, strict=True) if is_needed}
    return flops, [id(value) in live for value in program.invars]


def _count_equation(equation: Any, needed: Sequence[bool]) -> tuple[int, list[bool]]:
    """As `_count`, for one equation of a program."""
    name, parameters, every = equation.primitive.name, equation.params, [True] * len(equation.invars)
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
        return 2 * int(inner) * equation.outvars[0].aval.size, every
    if name == "conv_general_dilated":
        kernel, (out_axis, *_) = equation.invars[1].aval, parameters["dimension_numbers"].rhs_spec
        return 2 * (kernel.size // kernel.shape[out_axis]) * equation.outvars[0].aval.size, every
    if name == "scan":
        return _count_scan(parameters, needed)
    programs = list(_programs(parameters))
    if name == "cond":
        counts, inputs = zip(*(_count(program, needed) for program in programs), strict=True)
        return max(counts), [True, *map(any, zip(*inputs, strict=True))]
    if len(programs) == 1 and (len(programs[0].invars), len(programs[0].outvars)) == (len(every), len(needed)):
        return _count(programs[0], needed)
    flops = sum(_count(program, [True] * len(program.outvars))[0] for program in programs)
    if name == "while" and flops:
        raise ValueError("function must have a fixed number of iterations in all loops, got a while loop with products")
    return flops, every


def _count_scan(parameters: dict[str, Any], needed: Sequence[bool]) -> tuple[int, list[bool]]:
    """As `_count`, for a loop. What an iteration hands to the next is needed if the next needs it."""
    (program,) = _programs(parameters)
    constants, carried = parameters["num_consts"], parameters["num_carry"]
    needed = list(needed)
    while True:
        flops, inputs = _count(program, needed)
        handed_on = [a or b for a, b in zip(needed[:carried], inputs[constants : constants + carried], strict=True)]
        if handed_on == needed[:carried]:
            break
        needed[:carried] = handed_on
    return parameters["length"] * flops, [*inputs[:constants], *handed_on, *inputs[constants + carried :]]


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in jax.tree.leaves(tuple(parameters.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns"):
            yield program
