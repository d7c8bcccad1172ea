"""Compiled programs and their cost: seconds to compile, memory, operations."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's analysis of a compiled program, and the time that its compilation took.

    Bytes are those of one device. On XLA:CPU `flops` and `bytes_accessed` count the body of a loop once: compare steps
    by `relative_cost`.

    **Arguments:**

    - `trace_seconds`: from Python to a JAX program.
    - `lower_seconds`: from the JAX program to StableHLO.
    - `compile_seconds`: from StableHLO to machine code.
    - `program_lines`: length of the StableHLO text.
    - `donated_bytes`: arguments whose memory is reused for outputs.
    - `temporary_bytes`: memory for intermediate results. Memory inside a library's kernel for several products (XLA:CPU
      has such kernels since JAX 0.12) is not counted.
    - `flops`: floating-point operations.
    - `bytes_accessed`: memory traffic, counted at the boundaries of fused loops.
    """

    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    program_lines: int
    argument_bytes: int
    output_bytes: int
    donated_bytes: int
    temporary_bytes: int
    flops: float
    bytes_accessed: float


class Program(Generic[_Result]):
    """A function compiled for given shapes by `compile_program`, with its `cost`.

    It can be called any number of times, with inputs of these shapes.
    """

    def __init__(self, executable: Any, cost: Cost, assemble: Callable[[Any], _Result]):
        self._executable, self.cost, self._assemble = executable, cost, assemble

    @property
    def text(self) -> str:
        """The compiled program as XLA prints it."""
        return self._executable.as_text()

    def __call__(self, *inputs: PyTree[Any]) -> _Result:
        return self._assemble(self._executable(*eqx.partition(inputs, eqx.is_array)[0]))


def compile_program(
    function: Callable[..., _Result],
    *inputs: PyTree[Any],
    donate: Sequence[int] = (),
    options: dict[str, str | bool] | None = None,
) -> Program[_Result]:
    """Compile a function without running it.

    **Arguments:** `function` of PyTrees, not jitted (donations of a jitted function are lost: give them as `donate`);
    `inputs` whose leaves are arrays, or `jax.ShapeDtypeStruct`s in place of arrays, so that nothing has to be allocated
    (all other leaves are constants); `donate` the positions of inputs whose memory the outputs may reuse; `options` of
    XLA.
    """
    dynamic, static = eqx.partition(inputs, _has_shape)
    constant = None

    def arrays_to_arrays(*dynamic: Any) -> Any:
        nonlocal constant
        results, constant = eqx.partition(function(*eqx.combine(dynamic, static)), eqx.is_array)
        return results

    began = time.perf_counter()
    traced = jax.jit(arrays_to_arrays, donate_argnums=tuple(donate)).trace(*dynamic)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    ended = time.perf_counter()
    operations, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert memory is not None
    cost = Cost(
        trace_seconds=after_trace - began,
        lower_seconds=after_lower - after_trace,
        compile_seconds=ended - after_lower,
        program_lines=lowered.as_text().count("\n"),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=operations.get("flops", float("nan")),
        bytes_accessed=operations.get("bytes accessed", float("nan")),
    )
    return Program(compiled, cost, lambda results: eqx.combine(results, constant))


def product_flops(function: Callable[..., Any], *inputs: PyTree[Any]) -> int:
    """Floating-point operations of all matrix products and convolutions of a function, two per multiply-add.

    The body of a loop is counted once per iteration; of several branches, the most expensive one is counted.
    Operations that a compiler would remove as unused are counted, too.

    **Arguments:** as for `compile_program`. **Raises:** `ValueError` for a loop without a fixed number of iterations.
    """
    dynamic, static = eqx.partition(inputs, _has_shape)

    def arrays_only(*dynamic: Any) -> Any:
        return eqx.filter(function(*eqx.combine(dynamic, static)), eqx.is_array)

    return _product_flops(jax.make_jaxpr(arrays_only)(*dynamic).jaxpr)


def _has_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _product_flops(jaxpr: Any) -> int:
    return sum(_flops_of_equation(equation) for equation in jaxpr.eqns)


def _flops_of_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
        return 2 * int(inner) * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        kernel, (out_axis, *_) = equation.invars[1].aval, parameters["dimension_numbers"].rhs_spec
        return 2 * (kernel.size // kernel.shape[out_axis]) * equation.outvars[0].aval.size
    inner = [_product_flops(program) for program in _programs(parameters)]
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError("function must have a fixed number of iterations in all loops, got a while loop with products")
    return max(inner, default=0) if name == "cond" else sum(inner)


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in jax.tree.leaves(tuple(parameters.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns"):
            yield program
