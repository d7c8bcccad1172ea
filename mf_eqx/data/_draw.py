"""Random rows drawn on the device, for data that fit into its memory as a whole."""

import functools

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Key, Num, PyTree, Shaped

from .._batch import Batch
from .._leaves import by_name
from .._validate import as_count


class DrawRows(eqx.Module):
    """A function from a key to a `Batch` of rows drawn with replacement, for `mf_eqx.scan_steps`.

    **Arguments:** `x` all rows; `condition` the label of each row, or a PyTree of arrays with the same leading axis, or
    None; `batch` how many rows are drawn.

    **Raises:** `ValueError` if there are no rows, if an array of the condition has another number of rows, or if
    `batch` is not an integer >= 1.
    """

    x: Num[Array, "rows *data"]
    condition: PyTree[Shaped[Array, "..."]]
    batch: int = eqx.field(converter=functools.partial(as_count, "batch"))

    def __check_init__(self):
        if self.x.ndim < 1 or len(self.x) == 0:
            raise ValueError(f"x must have at least one row, got shape {self.x.shape}")
        for name, leaf in by_name("condition", self.condition).items():
            if leaf.shape[:1] != self.x.shape[:1]:
                rule = f"must have a leading axis of the {len(self.x)} rows"
                raise ValueError(f"{name} {rule}, got shape {leaf.shape}")

    def __call__(self, key: Key[jax.Array, ""]) -> Batch:
        chosen = jr.randint(key, (self.batch,), 0, len(self.x))
        return Batch(self.x[chosen], jax.tree.map(lambda leaf: leaf[chosen], self.condition))
