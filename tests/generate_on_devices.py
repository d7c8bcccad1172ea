"""Run by `test_generate.py` in a process of its own, which sees eight forced CPU devices; prints what it samples."""

import json

import jax
import numpy as np
from test_generate import first_samples, make_generator

import mf_eqx as mfx

placed = mfx.Parallelism().place(np.arange(8, dtype=np.int32))
spread = not make_generator()(placed).sharding.is_fully_replicated
print(json.dumps({"devices": jax.device_count(), "spread": spread, "samples": first_samples(8).ravel().tolist()}))
