"""A stack of equal blocks: one set of stacked parameters, one traced and compiled block, whatever the depth."""

from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key

_Block = TypeVar("_Block", bound=eqx.Module)

Remat: TypeAlias = bool | Callable[..., Any]
"""False: keep every intermediate for the backward pass; True: keep only each block's input; or one of
`jax.checkpoint_policies` for something between."""


class Stack(eqx.Module, Generic[_Block]):
    """`depth` blocks applied one after the other by `jax.lax.scan`.

    **Arguments:**

    - `make_block`: key to block; all blocks must have the same structure.
    - `depth`: how many.
    - `remat`: what the backward pass recomputes, see `Remat`.
    - `unroll`: blocks per loop iteration, True for no loop at all. Compile time grows with it, and XLA's FLOP count is
      only right without a loop.
    - `key`.
    """

    blocks: _Block
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        make_block: Callable[[Key[Array, ""]], _Block],
        depth: int,
        *,
        remat: Remat = False,
        unroll: int | bool = 1,
        key: Key[Array, ""],
    ):
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        self.blocks = eqx.filter_vmap(make_block)(jr.split(key, depth))
        self.remat = remat
        # A number: True == 1, so that a jitted function would take an unrolled stack for a scanned one.
        self.unroll = depth if unroll is True else 1 if unroll is False else unroll

    def __call__(
        self, apply: Callable[[_Block, Float[Array, "*state"]], Float[Array, "*state"]], x: Float[Array, "*state"]
    ) -> Float[Array, "*state"]:
        """`x` after all blocks; `apply(block, x)` runs one of them."""
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x: Float[Array, "*state"], block: Any) -> tuple[Float[Array, "*state"], None]:
            return apply(eqx.combine(block, rest), x), None

        if self.remat is not False:
            body = jax.checkpoint(body, policy=None if self.remat is True else self.remat)
        return jax.lax.scan(body, x, arrays, unroll=self.unroll)[0]
