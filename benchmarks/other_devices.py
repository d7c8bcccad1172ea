"""GPUs and TPUs that are not here, as XLA's compilers for them want them described.

A compiler comes with the plugin of its platform, which needs no device to compile: `jax.experimental.topologies`.
"""

import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Gpu(NamedTuple):
    """What XLA asks of an NVIDIA GPU, from NVIDIA's data sheets and CUDA's tables of compute capabilities."""

    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    units: int
    """For float32 in each of them."""
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes per second."""
    cache: int
    """Bytes of the L2 cache."""
    clock: float
    """GHz."""
    shared_memory: int
    """Bytes for each multiprocessor; a block of threads has at most 1 KiB less."""

    def description(self, name: str) -> str:
        """As XLA's `GpuTargetConfigProto`, in the text form of protocol buffers."""
        major, minor = self.capability
        device = {
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": 2048,
            "fpus_per_core": self.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_block_limit": 2**16,
            "registers_per_core_limit": 2**16,
            "shared_memory_per_block": 48 * KIB,
            "shared_memory_per_block_optin": self.shared_memory - KIB,
            "shared_memory_per_core": self.shared_memory,
            "core_count": self.cores,
            "clock_rate_ghz": self.clock,
            "l2_cache_size": self.cache,
            "device_memory_size": self.memory,
            "memory_bandwidth": self.bandwidth,
        }
        facts = " ".join(f"{field}: {value}" for field, value in device.items())
        return (
            f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 8 }} '
            f'device_description_str: "{name}"'
        )


class Tpu(NamedTuple):
    """A TPU by its name in Google's library."""

    memory: int
    """Bytes of one chip that the compiler gives to a program."""
    layouts: dict[int, str]
    """The shape of the network between so many chips."""


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
GPUS = {
    "a100": Gpu((8, 0), 108, 64, 81_920 * MIB, 2_040 * 10**9, 40 * MIB, 1.41, 164 * KIB),
    "h100": Gpu((9, 0), 132, 128, 81_559 * MIB, 3_350 * 10**9, 50 * MIB, 1.98, 228 * KIB),
    "h200": Gpu((9, 0), 132, 128, 143_771 * MIB, 4_800 * 10**9, 60 * MIB, 1.98, 228 * KIB),
}
TPUS = {
    "v5e": Tpu(63 * GIB // 4, FLAT),
    "v5p": Tpu(95 * GIB, CUBIC),
    "v6e": Tpu(125 * GIB // 4, FLAT),
}
COMPILERS_ALONE = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""For the plugins: no libraries of CUDA are needed, no TPU is taken, no metadata server is asked."""


def without_devices() -> None:
    """From now on JAX looks for no GPU or TPU in this process. For the time before anything asks for a device."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(COMPILERS_ALONE)


class Target(NamedTuple):
    """So many devices of a kind."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.number} x {self.name}"

    @property
    def memory(self) -> int:
        """Bytes of one device."""
        return (GPUS.get(self.name) or TPUS[self.name]).memory

    @property
    def by_default(self) -> int:
        """Bytes of it that JAX takes by default."""
        return self.memory * 3 // 4 if self.name in GPUS else self.memory

    def devices(self) -> list[Any]:
        """As JAX describes them. **Raises:** `ValueError` if their compiler is not installed."""
        without_devices()
        try:
            if self.name in GPUS:
                config = GPUS[self.name].description(self.name)
                found = topologies.get_topology_desc(
                    platform="cuda", target_config=config, topology=f"1x1x{self.number}"
                )
            else:
                layout = TPUS[self.name].layouts[self.number]
                found = topologies.get_topology_desc(f"{self.name}:{layout}", platform="tpu")
        except (NotImplementedError, RuntimeError) as error:
            is_missing = isinstance(error, NotImplementedError) or "not installed" in str(error)
            what = "needs its compiler, pip install -e '.[compilers]'" if is_missing else "is not known to its compiler"
            raise ValueError(f"device {self.name} {what}: {error}") from error
        return list(found.devices)

    def lowering(self) -> AbstractContextManager[Any]:
        """In it Pallas lowers its kernels for this GPU."""
        device = jax.sharding.AbstractDevice(f"NVIDIA {self.name.upper()}", None, "gpu")
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def target(text: str) -> Target:
    """From h100 or v5e:8. **Raises:** `ValueError` for what is not known."""
    name, _, number = text.partition(":")
    if name not in (*GPUS, *TPUS) or (number and not number.isdecimal()):
        known = ", ".join((*GPUS, *TPUS))
        raise ValueError(f"device must be one of {known}, or several of them as in h100:8; got {text}")
    allowed = tuple(TPUS[name].layouts) if name in TPUS else (1, 2, 4, 8)
    found = Target(name, int(number) if number else allowed[0])
    if found.number not in allowed:
        raise ValueError(f"device must be {', '.join(map(str, allowed))} of {name}, got {found.number}")
    return found
