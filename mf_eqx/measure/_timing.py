"""Times that can be compared: everything in one process, in rounds, in an order that changes.

On a machine that others use too, or that slows down as it warms up, two runs one after the other compare the hours and
not the programs. Here each round runs everything once, in a new random order; compare ratios.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one thing, one entry per round."""

    wall: Float[np.ndarray, " rounds"]
    """By the clock, until the device is done."""
    cpu: Float[np.ndarray, " rounds"]
    """Of all threads of the process. On a CPU that others use too it says more than the clock; on an accelerator it
    only says what the host does."""

    @property
    def median(self) -> float:
        """Of `wall`."""
        return float(np.median(self.wall))

    @property
    def least(self) -> float:
        """Of `wall`."""
        return float(np.min(self.wall))

    @property
    def spread(self) -> float:
        """Distance of the quartiles of `wall`, relative to the median."""
        low, high = np.quantile(self.wall, [0.25, 0.75])
        return float(high - low) / self.median

    @property
    def median_cpu(self) -> float:
        """Of `cpu`."""
        return float(np.median(self.cpu))


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    seed: int = 0,
    report: Callable[[int, Mapping[str, float]], None] | None = None,
    done: int = 0,
) -> dict[str, Times]:
    """Time several things in rounds, each round in a new random order.

    **Arguments:** `calls` by name, each returning arrays to wait for; `rounds` to time; `warm_up` rounds before them,
    not timed; `seed` of the order; `report` called after each with the number of calls so far, counting from
    `done`, and the seconds.

    **Raises:** `ValueError` unless rounds >= 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    generator, names = np.random.default_rng(seed), list(calls)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        for name in generator.permutation(names):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name]())
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if turn >= 0:
                seconds[name].append(spent)
            done += 1
            if report is not None:
                report(done, {"seconds": spent[0]})
    return {name: Times(*np.array(pairs).T) for name, pairs in seconds.items()}


def matmul_peak(dtype: DTypeLike, *, size: int | None = None, rounds: int = 15) -> float:
    """The most floating-point operations per second that square matrix products reach here: what utilisation is
    measured against. (float32 on recent NVIDIA GPUs is what `jax.default_matmul_precision` says, TF32 by default.)

    **Arguments:** `dtype` of the factors and the product; `size` of the matrices, by default 8192, and 2048 on a CPU;
    `rounds` of which the fastest counts.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = jr.normal(jr.key(0), (2, size, size), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    times = time_interleaved({"product": lambda: product(a, b)}, rounds, warm_up=2)
    return 2 * size**3 / times["product"].least
