"""Comparable times of several programs: all run in one process, in rounds, in an order that changes.

On a machine that is shared, or that slows down as it warms up, the times of two runs one after the other also depend on
when they ran. Here each round runs every program once, in a new random order; compare ratios of times.
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
    """Seconds of one program, one entry per round.

    **Arguments:**

    - `wall`: wall time until the device is done.
    - `cpu`: CPU time of all threads of the process. On a shared CPU it is more reliable than the wall time; with an
      accelerator it is only the time of the host.
    """

    wall: Float[np.ndarray, " rounds"]
    cpu: Float[np.ndarray, " rounds"]

    @property
    def median(self) -> float:
        """The median of `wall`."""
        return float(np.median(self.wall))

    @property
    def least(self) -> float:
        """The minimum of `wall`."""
        return float(np.min(self.wall))

    @property
    def spread(self) -> float:
        """The interquartile range of `wall`, relative to the median."""
        low, high = np.quantile(self.wall, [0.25, 0.75])
        return float(high - low) / self.median

    @property
    def median_cpu(self) -> float:
        """The median of `cpu`."""
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
    """Time several programs in rounds, each round in a new random order.

    **Arguments:** `calls` by name, each of which returns arrays to wait for; `rounds` the number of timed rounds;
    `warm_up` the number of rounds before them, which are not timed; `seed` of the order; `report` a function that is
    called after each call, with the number of calls so far, counting from `done`, and the seconds.

    **Raises:** `ValueError` unless rounds >= 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    generator, names = np.random.default_rng(seed), list(calls)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_number in range(-warm_up, rounds):
        for name in generator.permutation(names):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name]())
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if round_number >= 0:
                seconds[name].append(spent)
            done += 1
            if report is not None:
                report(done, {"seconds": spent[0]})
    return {name: Times(*np.array(pairs).T) for name, pairs in seconds.items()}


def matmul_peak(dtype: DTypeLike, *, size: int | None = None, rounds: int = 15) -> float:
    """The largest number of floating-point operations per second that square matrix products reach on this machine: the
    rate that utilisation is relative to. (On recent NVIDIA GPUs, `jax.default_matmul_precision` determines the
    precision of float32 products, TF32 by default.)

    **Arguments:** `dtype` of the factors and the product; `size` of the matrices, by default 8192, and 2048 on a CPU;
    `rounds`, of which the fastest one counts.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = jr.normal(jr.key(0), (2, size, size), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    times = time_interleaved({"product": lambda: product(a, b)}, rounds, warm_up=2)
    return 2 * size**3 / times["product"].least
