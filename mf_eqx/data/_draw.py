"""Random rows drawn on the device, for data that fit into its memory as a whole."""

import functools

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Int, Key, Num

from .._batch import Batch
from .._validate import as_count


class DrawRows(eqx.Module):
    """A function from a key to a `Batch` of rows drawn with replacement, for `mf_eqx.scan_steps`.

    **Arguments:** `x` all rows; `label` of each row, or None; `batch` how many rows are drawn.

    **Raises:** `ValueError` if there are no rows, if the numbers of labels and rows differ, or if `batch` is not an
    integer >= 1.
    """

    x: Num[Array, "rows *data"]
    label: Int[Array, " rows"] | None
    batch: int = eqx.field(converter=functools.partial(as_count, "batch"))

    def __check_init__(self):
        if self.x.ndim < 1 or len(self.x) == 0:
            raise ValueError(f"x must have at least one row, got shape {self.x.shape}")
        if self.label is not None and self.label.shape != self.x.shape[:1]:
            rows = len(self.x)
            raise ValueError(f"label must have one value for each of the {rows} rows, got shape {self.label.shape}")

    def __call__(self, key: Key[jax.Array, ""]) -> Batch:
        chosen = jr.randint(key, (self.batch,), 0, len(self.x))
        return Batch(self.x[chosen], None if self.label is None else self.label[chosen])
