"""Run by `test_checkpoints.py` in a process of its own, which sees eight forced CPU devices: what is saved on some of
them is loaded on others. Prints whether it came back."""

import json
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mf_eqx as mfx
from mf_eqx.checkpoint import Checkpoints

LAYOUTS = {"1 device": (1, 1), "2 devices": (2, 1), "8 devices": (8, 1), "1 x fsdp 8": (8, 8), "4 x fsdp 2": (8, 2)}


def make_state(seed=0):
    bits = jr.bits(jr.key(seed), (512, 8), jnp.uint32)
    return {
        "large": jax.lax.bitcast_convert_type(bits, jnp.float32),
        "half": jnp.arange(96, dtype=jnp.bfloat16).reshape(3, 32) + seed,
        "small": jnp.arange(3) + seed,
        "key": jr.key(seed),
    }


def bits(state):
    state = {**state, "key": jr.key_data(state["key"])}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def parallelism(devices, fsdp):
    return mfx.Parallelism(fsdp=fsdp, least_size=64, devices=jax.devices()[:devices])


def came_back(found, layout):
    rule = None if layout is None else layout.of_tree(make_state())
    placed = rule is None or all(
        jax.tree.leaves(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, found.state, rule))
    )
    same = bits(found.state) == bits(make_state(found.step))
    return {"bits": same, "placed": placed, "step": found.step, "passed_over": found.passed_over}


if __name__ == "__main__":
    assert jax.device_count() == 8
    checkpoints, shared = Checkpoints(sys.argv[1]), parallelism(8, 4)
    for step in (1, 2):
        checkpoints.save(step, shared.make(lambda step=step: make_state(step)))
    checkpoints.wait()
    layouts = {name: parallelism(*layout) for name, layout in LAYOUTS.items()}
    result = {
        name: came_back(checkpoints.load(make_state, layout), layout)
        for name, layout in {**layouts, "none": None}.items()
    }
    content = np.asarray(make_state(2)["large"])[500:, 6:].tobytes()  # of the last device's part
    files = [path for path in checkpoints.path(2).rglob("*") if path.is_file() and content in path.read_bytes()]
    for path in files:
        path.write_bytes(path.read_bytes().replace(content, content[:-1] + bytes([content[-1] ^ 1])))
    found = checkpoints.load(make_state, shared)
    result["damaged"] = [found.step, found.passed_over.get(2)]
    print(json.dumps(result))
