"""Rows drawn on the device, for data so small that all of them lie there."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Int, Key, Num

from .._objective import Batch


class DrawRows(eqx.Module):
    """A function from a key to a `Batch` of rows with replacement, as of `mf_eqx.scan_steps`.

    **Arguments:** `x` all rows; `label` of each; `batch` how many are drawn.
    """

    x: Num[Array, "rows *data"]
    label: Int[Array, " rows"]
    batch: int

    def __call__(self, key: Key[jax.Array, ""]) -> Batch:
        chosen = jr.randint(key, (self.batch,), 0, len(self.x))
        return Batch(self.x[chosen], self.label[chosen])
