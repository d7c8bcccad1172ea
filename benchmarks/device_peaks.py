"""What can this device do? The rates of large matrix products and copies, which utilisation is relative to.

    python benchmarks/device_peaks.py           1 GiB and products of 8192 x 8192; less on a CPU
    python benchmarks/device_peaks.py --size 4096 --megabytes 512

Products are timed in bfloat16, and in float32 both with the device's fast form (TF32 on NVIDIA GPUs) and with full
precision. A copy reads an array and writes one of the same size; both count. Each rate is that of the fastest round.

README.md beside this file has figures.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mf_eqx import measure, run


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    size: int = 0
    """Rows of the square matrices; 0 for 8192, or 2048 on a CPU."""
    megabytes: int = 0
    """Of the array that is copied; 0 for 1024, or 64 on a CPU."""
    rounds: int = 15
    """Rounds that are timed."""
    name: str | None = None
    """Name of the run below runs/device_peaks/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, size=1 << 16, megabytes=1 << 16)
        for name, least in {"size": 0, "megabytes": 0, "rounds": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


PRODUCTS = {
    "products in bfloat16": (jnp.bfloat16, "default"),
    "products in float32, fast": (jnp.float32, "tensorfloat32"),
    "products in float32": (jnp.float32, "highest"),
}
COPIES = "copies"


def copy_rate(megabytes: int, rounds: int) -> float:
    """Bytes read and written per second."""
    array, more = jnp.zeros(megabytes << 18, jnp.float32), jax.jit(lambda array: array + 1)
    times = measure.time_interleaved({COPIES: lambda: more(array)}, rounds, warm_up=2)
    return 2 * array.nbytes / times[COPIES].least


def measured(config: Config) -> dict[str, float]:
    """Operations or bytes per second, by name."""
    rates = {}
    for name, (dtype, precision) in PRODUCTS.items():
        with jax.default_matmul_precision(precision):
            rates[name] = measure.matmul_peak(dtype, size=config.size or None, rounds=config.rounds)
    on_cpu = jax.default_backend() == "cpu"
    rates[COPIES] = copy_rate(config.megabytes or (64 if on_cpu else 1024), config.rounds)
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
