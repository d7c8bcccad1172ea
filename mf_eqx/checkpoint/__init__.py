"""States on disk: checkpoints that a run continues from, and exports for those who only sample.

    checkpoints = checkpoint.Checkpoints("runs/first/checkpoints", keep_last=2, keep_every=10_000)
    found = checkpoints.load(make_state, parallelism)            None at first
    checkpoints.save(step, state)                                returns before all is written

Imported explicitly (`from mf_eqx import checkpoint`); Orbax is loaded where it is used.
"""

from ._checkpoints import CheckpointError as CheckpointError, Checkpoints as Checkpoints, Restored as Restored
from ._digest import digests as digests
from ._export import export_sampler as export_sampler, load_weights as load_weights, save_weights as save_weights
