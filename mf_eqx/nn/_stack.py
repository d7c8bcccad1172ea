"""A stack of equal blocks: one set of stacked parameters, one traced and compiled block at any depth."""

import copy
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Generic, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from .._validate import as_count

_Block = TypeVar("_Block", bound=eqx.Module)

Remat: TypeAlias = bool | Callable[..., Any]
"""False: keep every intermediate for the backward pass; True: keep only each block's input; or `products_saveable`, or
one of `jax.checkpoint_policies`, for a choice between the two."""


DEEPEST_UNROLLED = 12
"""The largest depth that has no loop by default: that of the presets S and B."""


def known_unroll(depth: int, remat: Remat = False) -> int:
    """The fastest known number of blocks per loop iteration for a stack of `depth` transformer blocks: `depth` (no
    loop) if JAX has one device, a CPU or a GPU, without remat and up to a depth of 12; otherwise 1. It was measured for
    DiT-B/4, and is assumed for other networks up to its depth.

    In a loop, what the backward pass needs of a block is copied into arrays for all blocks, and back. A MeanFlow step
    without the loop: on an H200 (batch 256, bfloat16, jax 0.11) it takes 0.77 of the time and 0.75 of the temporary
    memory, and compiles in 77 s instead of 20; on a CPU (batch 16, float32, jax 0.12) each block moves 0.6 of the
    bytes, and a step takes 0.93 of the time on two cores, the same time on one, and compiles for two to three times as
    long. Compile time grows with depth (XL/2 on a CPU: 45 s instead of 11), and XLA:CPU of jax 0.10 does not honour
    remat without a loop (XLA:GPU does; the time has not been measured). Give the number yourself where the time to
    compile matters most, or to lower for another device than this one.
    """
    on_one_device = jax.default_backend() in ("cpu", "gpu") and jax.device_count() == 1
    return depth if on_one_device and remat is False and depth <= DEEPEST_UNROLLED else 1


def products_saveable(primitive: Any, *shapes: Any, **parameters: Any) -> bool:
    """A policy for `remat`: keep products with weights, which are the outputs of linear layers and convolutions, and
    nothing that is made of parameters alone. Attention, norms and activations are computed again.

    On an H200 it costs a Flow Matching step of DiT-B/4 (batch 256, bfloat16) no time and takes 0.58 of the memory.
    """
    is_linear = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *shapes, **parameters)
    return is_linear or primitive.name == "conv_general_dilated"


REMATS = MappingProxyType({"none": False, "products": products_saveable, "full": True})
"""What the backward pass recomputes, by names for command lines; each keeps less in memory than the one before."""


class Stack(eqx.Module, Generic[_Block]):
    """`depth` blocks applied one after the other by `jax.lax.scan`.

    A field must use the arrays of `blocks` only by calling the stack or its `scan`: in a step with `Parallelism.fsdp`
    they are parts, which become whole there.

    **Arguments:**

    - `make_block`: function from a key to a block; all blocks must have the same structure.
    - `depth`: number of blocks.
    - `remat`: what the backward pass recomputes, see `Remat`.
    - `unroll`: blocks per loop iteration: an integer >= 1, or False for 1; True, or any number from `depth` on, for no
      loop at all. None: `known_unroll` decides when the stack is
      called, but a stack with `gathering` always has a loop. Compile time grows with it, and XLA's FLOP count is only
      right without a loop.
    - `key`.

    **Raises:** `ValueError` if `depth`, `remat` or `unroll` is none of these.
    """

    blocks: _Block
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int | None = eqx.field(static=True)
    gather: Callable[[Any], Any] | None = eqx.field(static=True)

    def __init__(
        self,
        make_block: Callable[[Key[Array, ""]], _Block],
        depth: int,
        *,
        remat: Remat = False,
        unroll: int | bool | None = 1,
        key: Key[Array, ""],
    ):
        depth = as_count("depth", depth)
        if not isinstance(remat, bool) and not callable(remat):
            raise ValueError(f"remat must be True, False or a policy of jax.checkpoint, got {remat!r:.80}")
        self.blocks = eqx.filter_vmap(make_block)(jr.split(key, depth))
        self.depth = depth
        self.remat = remat
        # A number, because True == 1: a jitted function would reuse a scanned stack's program for an unrolled one.
        unroll = depth if unroll is True else 1 if unroll is False else unroll
        self.unroll = None if unroll is None else as_count("unroll", unroll)
        self.gather = None

    def gathering(self, gather: Callable[[Any], Any]) -> "Stack[_Block]":
        """The same stack, of whose blocks each device holds a part: `gather(arrays)` makes the arrays of one block
        whole before the block is applied, and again in the backward pass.

        With `remat=False` the outputs of linear layers and convolutions are kept for the backward pass. Whole
        parameters, attention, norms and activations are computed again: about half the memory of a stack that keeps
        everything. A policy of your own decides alone.
        """
        stack = copy.copy(self)
        object.__setattr__(stack, "gather", gather)
        return stack

    @property
    def _unroll(self) -> int:
        if self.unroll is not None:
            return self.unroll
        return known_unroll(self.depth, self.remat) if self.gather is None else 1

    @property
    def has_loop(self) -> bool:
        """Whether the blocks are applied in a loop."""
        return self._unroll < self.depth

    def __call__(
        self, apply: Callable[[_Block, Float[Array, "*state"]], Float[Array, "*state"]], x: Float[Array, "*state"]
    ) -> Float[Array, "*state"]:
        """`x` after all blocks; `apply(block, x)` runs one of them."""
        return self.scan(lambda block, x, _: (apply(block, x), None), x, None)[0]

    def scan(
        self,
        apply: Callable[[_Block, Float[Array, "..."], Any], tuple[Float[Array, "..."], PyTree[Array]]],
        x: Float[Array, "..."],
        inputs: PyTree[Array],
    ) -> tuple[Float[Array, "..."], PyTree[Array]]:
        """`x` after all blocks, and the additional outputs of the blocks, stacked.

        A stack of one block makes no loop, so the block may change the shape of `x`.

        **Arguments:** `apply(block, x, input)` runs one block and returns (x, output); `x`; `inputs` a tree of arrays
        whose leading axis has one entry for each block.
        """
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x: Float[Array, "..."], block_and_input: Any) -> tuple[Float[Array, "..."], PyTree[Array]]:
            block, block_input = block_and_input
            block = block if self.gather is None else self.gather(block)
            return apply(eqx.combine(block, rest), x, block_input)

        policy = products_saveable if self.remat is False and self.gather is not None else self.remat
        if policy is not False:
            body = jax.checkpoint(body, policy=None if policy is True else policy)
        if self.depth == 1:
            x, output = body(x, jax.tree.map(lambda leaf: leaf[0], (arrays, inputs)))
            return x, jax.tree.map(lambda leaf: leaf[None], output)
        return jax.lax.scan(body, x, (arrays, inputs), unroll=self._unroll)
