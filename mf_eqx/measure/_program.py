"""Compiled programs and their cost: seconds to compile, memory, operations."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's analysis of a compiled program, and the time that its compilation took.

    Bytes are those of one device. On XLA:CPU `flops` and `bytes_accessed` count the body of a loop once: to compare
    steps, take `product_flops` or `relative_cost`.
    """

    trace_seconds: float
    """From Python to a JAX program."""
    lower_seconds: float
    """From the JAX program to StableHLO."""
    compile_seconds: float
    """From StableHLO to machine code."""
    program_lines: int
    """Length of the StableHLO text."""
    argument_bytes: int
    output_bytes: int
    donated_bytes: int
    """Arguments whose memory is reused for outputs."""
    temporary_bytes: int
    """Memory for intermediate results. Memory inside a library's kernel for several products (XLA:CPU has such kernels
    since JAX 0.12) is not counted."""
    flops: float
    """Floating-point operations."""
    bytes_accessed: float
    """Memory traffic, counted at the boundaries of fused loops."""


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
    dynamic, static = eqx.partition(inputs, has_shape)
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


def has_shape(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
