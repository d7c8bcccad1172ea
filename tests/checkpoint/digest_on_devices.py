"""Run by `test_digest.py` in a process of its own, which sees eight forced CPU devices; prints digests by layout."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import mf_eqx as mfx
from mf_eqx.checkpoint import digests

SPECS = {
    "rows": PartitionSpec(("data", "fsdp")),
    "columns": PartitionSpec(None, "fsdp"),
    "both": PartitionSpec("data", "fsdp"),
    "copies": PartitionSpec(),
}


def arrays():
    draws = np.random.default_rng(0)
    return {
        "float32": jnp.asarray(draws.standard_normal((16, 8)), jnp.float32),
        "bfloat16": jnp.asarray(draws.standard_normal((8, 4, 3)), jnp.bfloat16),
        "float64": jnp.asarray(draws.standard_normal((8, 12))),
        "bool": jnp.asarray(draws.random((8, 8)) < 0.5),
        "int8": jnp.asarray(draws.integers(-128, 128, (8, 4)), jnp.int8),
        "keys": jr.split(jr.key(0), (8, 4)),
        "zeros": jnp.zeros((8, 8)),
        "scalar": jnp.asarray(3.0),
    }


if __name__ == "__main__":
    assert jax.device_count() == 8
    jax.config.update("jax_enable_x64", True)
    mesh = mfx.Parallelism(fsdp=4).mesh
    layouts = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    layouts["one"] = SingleDeviceSharding(jax.devices()[5])

    def spread(leaf, sharding):
        return jax.device_put(
            leaf, layouts["copies"] if leaf.ndim == 0 and sharding is not layouts["one"] else sharding
        )

    result = {
        name: digests({key: spread(leaf, sharding) for key, leaf in arrays().items()})
        for name, sharding in layouts.items()
    }
    print(json.dumps(result))
