"""Weights that the authors of papers released, in the layouts of their own code.

    path = "checkpoint"
    tree = released.read_flax(path, "ema_params")                       a file or folder of the authors' JAX code
    channels, size, labels = released.measure_dit(tree, path)
    field = mfx.DiT((channels, 32, 32), size, labels=labels, key=key)
    field = released.fill_dit(field, tree, path)

    sets = released.read_state_dicts(path, "map_layer0.weight")         a file of torch: {"model.net_ema": ..., ...}
    field = released.fill_unet(field, sets["model.net_ema"], path)

`measure_...` returns the size of the network in a file, and `fill_...` copies the weights into a field. Every tensor is
checked: an error names each tensor that is missing, unexpected, of another shape or not finite. Nothing in a file is
executed.

Import this part explicitly (`from mf_eqx import released`). `experiments/import_weights.py` converts released files
into files of `mf_eqx.checkpoint.save_weights`.
"""

from ._dit import fill_dit as fill_dit
from ._in_context_dit import (
    fill_in_context_dit as fill_in_context_dit,
    InContextDiTArguments as InContextDiTArguments,
    measure_in_context_dit as measure_in_context_dit,
)
from ._measure import measure_dit as measure_dit, measure_sit as measure_sit, measure_unet as measure_unet
from ._msgpack import read_flax as read_flax
from ._sit import fill_sit as fill_sit
from ._state_dict import read_state_dicts as read_state_dicts
from ._unet import fill_unet as fill_unet
