"""Run by `checkpoint/test_export.py` on eight devices: weights from one device onto a mesh, and back."""

import json
import pathlib
import sys

import jax
import jax.random as jr
import numpy as np
from fields import refilled

import mf_eqx as mfx
from mf_eqx import checkpoint


def make_field(config):
    return mfx.MLP(2, width=config["width"], depth=1, key=jr.key(0))


if __name__ == "__main__":
    path, config = pathlib.Path(sys.argv[1]), {"width": 32}
    field, mesh = refilled(make_field(config)), mfx.Parallelism(fsdp=4, least_size=512)
    checkpoint.save_weights(path, field, config)
    found = checkpoint.load_weights(path, make_field, mesh)
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(field), strict=True))
    checkpoint.save_weights(path, found, config)
    again = jax.tree.leaves(checkpoint.load_weights(path, make_field))
    result = {
        "equal": all(bool(np.array_equal(a, b)) for a, b in pairs),
        "placed": all(a.sharding.is_equivalent_to(mesh.of_shape(a.shape), a.ndim) for a, _ in pairs),
        "spread": any(not a.sharding.is_fully_replicated for a, _ in pairs),
        "saved_alike": all(bool(np.array_equal(a, b)) for a, (_, b) in zip(again, pairs, strict=True)),
    }
    print(json.dumps(result))
