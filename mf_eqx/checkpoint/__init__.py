"""States on disk: checkpoints from which a run continues, and exports for users who only sample.

    checkpoints = checkpoint.Checkpoints("runs/first/checkpoints", keep_last=2, keep_every=10_000)
    restored = checkpoints.load(make_state, parallelism)         None if there is no checkpoint yet
    checkpoints.clean()                                          removes what a killed run left half written
    checkpoints.save(step, state)                                returns before everything is written

    checkpoint.save_weights("ema.safetensors", state.averages[0], notes=checkpoint.Notes(pixels=(-1, 1)))
    field = checkpoint.load_weights("ema.safetensors")

Import this part explicitly (`from mf_eqx import checkpoint`); Orbax is imported where it is used.
"""

from ._checkpoints import CheckpointError as CheckpointError, Checkpoints as Checkpoints, Restored as Restored
from ._digest import digests as digests
from ._export import export_sampler as export_sampler
from ._notes import Notes as Notes, Tokenizer as Tokenizer
from ._weights import (
    load_weights as load_weights,
    read_weights as read_weights,
    save_weights as save_weights,
    Weights as Weights,
)
