"""Run by `test_generate.py` in a process of its own, which sees eight forced CPU devices, or in two of them that make
up one run; prints what it samples."""

import json
import sys

import jax
import numpy as np
from test_generate import guided_samples, make_generator

import mf_eqx as mfx

if len(sys.argv) > 1:
    coordinator, number = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(coordinator, num_processes=2, process_id=number)
    (samples,) = make_generator().batches(16, 16, mfx.Parallelism())
    parts = sorted(samples.addressable_shards, key=lambda shard: shard.index[0].start)
    print(json.dumps(np.concatenate([part.data for part in parts]).ravel().tolist()))
else:
    placed = mfx.Parallelism().place(np.arange(8, dtype=np.int32))
    spread = not make_generator()(placed).sharding.is_fully_replicated
    print(json.dumps({"devices": jax.device_count(), "spread": spread, "samples": guided_samples().ravel().tolist()}))
