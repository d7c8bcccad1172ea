"""What can this device do? The rates of large matrix products and copies, which utilisation is relative to.

    python benchmarks/device_peaks.py           1 GiB and products of 8192 x 8192; less on a CPU
    python benchmarks/device_peaks.py --size 4096 --megabytes 512

Products are timed in bfloat16, and in float32 both with the device's fast form (TF32 on NVIDIA GPUs) and with full
precision. A copy reads an array and writes one of the same size; both count. A round is several calls in a row, each
with the result of the one before, and one wait: a fast device would otherwise stand idle while Python makes the next
call. Each rate is that of the fastest round.

README.md beside this file has figures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from mf_eqx import measure, run


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    size: int = 0
    """Rows of the square matrices; 0 for 8192, or 2048 on a CPU."""
    megabytes: int = 0
    """Size in MiB of the array that is copied; 0 for 1024, or 64 on a CPU."""
    calls: int = 0
    """Products or copies in one round; 0 for 16, or 1 on a CPU."""
    rounds: int = 15
    """Rounds that are timed."""
    name: str | None = None
    """Name of the run below runs/device_peaks/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, size=1 << 16, megabytes=1 << 16, calls=1 << 10)
        for name, least in {"size": 0, "megabytes": 0, "calls": 0, "rounds": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


PRODUCTS = {
    "products in bfloat16": (jnp.bfloat16, "default"),
    "products in float32, fast": (jnp.float32, "tensorfloat32"),
    "products in float32": (jnp.float32, "highest"),
}
COPIES = "copies"


def seconds(
    function: Callable[..., Any], array: Any, calls: int, rounds: int, constants: tuple[Any, ...] = ()
) -> float:
    """Of one call, in the fastest round."""
    call = jax.jit(function)

    def chain() -> jax.Array:
        result = array
        for _ in range(calls):
            result = call(result, *constants)
        return result

    return measure.time_interleaved({"": chain}, rounds, warm_up=2)[""].least / calls


def measured(config: Config) -> dict[str, float]:
    """Operations or bytes per second, by name."""
    on_cpu, rates = jax.default_backend() == "cpu", {}
    size, calls = config.size or (2048 if on_cpu else 8192), config.calls or (1 if on_cpu else 16)
    for name, (dtype, precision) in PRODUCTS.items():
        a, b = (jr.normal(key, (size, size), jnp.float32).astype(dtype) for key in jr.split(jr.key(0)))
        factor = (b / size**0.5).astype(dtype)  # products of products keep their size
        with jax.default_matmul_precision(precision):
            rates[name] = 2 * size**3 / seconds(jnp.matmul, a, calls, config.rounds, (factor,))
    array = jnp.zeros((config.megabytes or (64 if on_cpu else 1024)) << 18, jnp.float32)
    rates[COPIES] = 2 * array.nbytes / seconds(lambda x: x + 1, array, calls, config.rounds)
    return rates


def main(config: Config) -> None:
    """Time products and copies."""
    directory = run.RunDirectory.create(config, config.name)
    rates = measured(config)
    rows = [(name, f"{rate / 1e12:.3g}", "TB/s" if name == COPIES else "TFLOP/s") for name, rate in rates.items()]
    text = run.table(rows, ("", "rate", ""))
    directory.save_results(text, [{"what": name, "rate": rate} for name, rate in rates.items()])
    print(f"{text}\n\nResults are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
