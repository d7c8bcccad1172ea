"""The DDPM++ U-Net as a field, in the form of EDM.

Residual blocks (`unet_block.py`) work on images, or on sequences, of decreasing size (the way down) and then on ones of
increasing size (the way up). On the way up, the input of each block that does not resample is concatenated with an
output from the way down. All blocks are conditioned on one vector (`unet_embedding.py`): the embedding of the times,
the condition, the guidance if it is an input, and the numbers that describe the augmentation. Consecutive equal blocks
form one stack: the 33 blocks of the CIFAR-10 network are 15 stacks.

Source: Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021, arXiv 2011.13456
(architecture); Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al., 2022, arXiv 2206.00364
(this form); MeanFlow paper, App. A (two times).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._field import AbstractField
from .._validate import as_float, check_floating, check_kind, check_z
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    cast,
    end_duration,
    GroupNorm,
    Remat,
    Stack,
    TimeVariables,
    XLAAttention,
)
from ..nn._condition_embedding import as_argument, null_label_of
from .guidance import GuidanceCondition
from .unet_block import ALMOST_ZERO, make_convolution, make_group_norm, UNetBlock
from .unet_embedding import UNetCondition, UNetEmbedding
from .unet_size import as_size, BlockPlan, down_plans, UNetSize, up_plans


class UNet(AbstractField):
    """A convolutional field over images or sequences, channels first. A fresh U-Net outputs almost zero.

    **Arguments:**

    - `data_shape`: (channels, height, width) of images or (channels, length) of sequences; all sides multiples of
      2^(n-1), with n the number of resolutions.
    - `size`: a `UNetSize`, such as `UNET_CIFAR10`, or one of your own.
    - `labels`: None, or the number of labels. With labels, the condition is an integer in [0, labels], where `labels`
      means "no label" (`null_label`), alone or in a `UNetCondition`.
    - `condition`: None, or what the field is conditioned on if it is no label: the size of a vector, which
      `mf_eqx.nn.VectorEmbedding` embeds; or an `mf_eqx.nn.AbstractConditionEmbedding` of your own (of 2 `width` per
      time variable), for conditions of any structure. They are given alone or as the `label` of a `UNetCondition`.
    - `guidance`: whether the field takes the guidance as an input. The condition is then a `GuidanceCondition`, whose
      `condition` is the label, the other condition, or a `UNetCondition`.
    - `augmentation`: how many numbers describe the augmentation of an image (6 in the CIFAR-10 experiment); 0 for none.
      If it is not 0, the condition is a `UNetCondition`, or None for an image without augmentation.
    - `dropout`: rate within residual blocks. It needs a `key` in the call, and is off without one. The mask is the
      same in u and in its JVP.
    - `time_variables`: the variables that are embedded, one of the functions of Tab. 1c in `mf_eqx.nn`.
    - `dtype`: compute precision of the blocks, float32 or bfloat16 (float64 for tests). Parameters, times and their
      embedding, and the result stay float32 or better, and so do the statistics of norms.
    - `attention`: an `mf_eqx.nn.AbstractAttention`.
    - `remat`, `unroll`: the trade-off of memory, run time and compile time, see `mf_eqx.nn.Stack`. By default equal
      blocks are unrolled, because XLA:CPU runs convolutions inside of loops without its fast kernels (four blocks of 64
      channels at 32 x 32 pixels, forward: 6.5 s in a loop, 0.07 s without). `unroll=1` halves the compile time (on a
      CPU: 88 against 165 s for a step of width 32), and doubles the memory: a MeanFlow step of 1,024 rows of the
      network below in bfloat16, compiled for an H100, needs 129 GB instead of 65.
    - `key`.

    **Raises:** `ValueError` if a size is below 1 or does not fit the others, if `labels` and `condition` are both
    given, or `guidance` without either; when called, if `z` does not have the data_shape, or if the condition is not
    what the field takes: one integer label, a vector of its size, or neither; and a `GuidanceCondition` for a field
    with guidance, none for others.

    `UNet((3, 32, 32), UNET_CIFAR10, augmentation=6, dropout=0.2, key=key)` is the paper's network for CIFAR-10:
    55,932,419 parameters, 55,929,347 without `augmentation`.
    """

    embedding: UNetEmbedding
    first: eqx.nn.Conv
    down: tuple[Stack[UNetBlock], ...]
    middle: tuple[Stack[UNetBlock], ...]
    up: tuple[Stack[UNetBlock], ...]
    norm: GroupNorm
    last: eqx.nn.Conv
    data_shape: tuple[int, ...] = eqx.field(static=True)
    size: UNetSize = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(
        self,
        data_shape: tuple[int, ...],
        size: UNetSize,
        *,
        labels: int | None = None,
        condition: int | AbstractConditionEmbedding | None = None,
        guidance: bool = False,
        augmentation: int = 0,
        dropout: float = 0.0,
        time_variables: TimeVariables = end_duration,
        dtype: DTypeLike = jnp.float32,
        attention: AbstractAttention = XLAAttention(),
        remat: Remat = False,
        unroll: int | bool = True,
        key: Key[Array, ""],
    ):
        check_kind("size", size, UNetSize)
        size = as_size(data_shape, size)
        data_shape = tuple(map(int, data_shape))
        _check_arguments(augmentation, dropout, dtype)
        channels, rows, sides = data_shape[0], data_shape[1], len(data_shape) - 1
        embedded = 4 * size.width
        embedding_key, first_key, down_key, middle_key, up_key, last_key = jr.split(key, 6)

        def block(plan: BlockPlan, key: Key[Array, ""]) -> UNetBlock:
            return UNetBlock(plan, sides, embedded, dropout, attention, key=key)

        def stacks(plans: Iterator[BlockPlan], key: Key[Array, ""]) -> tuple[Stack[UNetBlock], ...]:
            """One stack for each run of consecutive equal blocks."""
            runs = [(plan, len(list(run))) for plan, run in itertools.groupby(plans)]
            return tuple(
                Stack(lambda key, plan=plan: block(plan, key), depth, remat=remat, unroll=unroll, key=key)
                for (plan, depth), key in zip(runs, jr.split(key, len(runs)), strict=True)
            )

        conditions = labels, condition, guidance, augmentation
        self.embedding = UNetEmbedding(embedded, *conditions, time_variables, key=embedding_key)
        self.first = make_convolution(sides, channels, size.width, 3, key=first_key)
        self.down = stacks(down_plans(size, rows), down_key)
        deepest = size.multipliers[-1] * size.width
        middle = [BlockPlan(deepest, 0, deepest, attention) for attention in (True, False)]
        self.middle = stacks(iter(middle), middle_key)
        self.up = stacks(up_plans(size, rows), up_key)
        outputs = size.multipliers[0] * size.width
        self.norm = make_group_norm(outputs)
        self.last = make_convolution(sides, outputs, channels, 3, scale=ALMOST_ZERO, key=last_key)
        self.data_shape = data_shape
        self.size = size
        self.dtype = jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label".

        **Raises:** `ValueError` without labels.
        """
        return null_label_of(self.embedding.label)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of which this field is made, as for `DiT`."""
        embedding = self.embedding
        return {
            "data_shape": self.data_shape,
            "size": self.size,
            "labels": None if embedding.label is None else embedding.label.null_label,
            "condition": as_argument(embedding.condition),
            "guidance": embedding.guidance is not None,
            "augmentation": 0 if embedding.augmentation is None else embedding.augmentation.shape[0],
            "dropout": self.middle[0].blocks.dropout,
            "time_variables": embedding.variables,
        }

    def __call__(
        self,
        z: Float[Array, "channels *sides"],
        r: TimeLike,
        t: TimeLike,
        condition: GuidanceCondition | UNetCondition | Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "channels *sides"]:
        check_z(z, self.data_shape)
        r, t = as_times(r, t, z)
        c = self.embedding(r, t, condition).astype(self.dtype)
        keys = iter([None] * self._stacks if key is None else jr.split(key, self._stacks))

        x = cast(self.first, self.dtype)(z.astype(self.dtype))
        down_outputs = [x]
        for stack in self.down:
            x, outputs = self._apply_stack(stack, x, c, next(keys))
            down_outputs += outputs
        for stack in self.middle:
            x, _ = self._apply_stack(stack, x, c, next(keys))
        for stack in self.up:
            concatenates = stack.blocks.plan.down_channels > 0
            from_down = [down_outputs.pop() for _ in range(stack.depth)] if concatenates else None
            x, _ = self._apply_stack(stack, x, c, next(keys), from_down)
        x = cast(self.last, self.dtype)(jax.nn.silu(cast(self.norm, self.dtype)(x)))
        return x.astype(np.promote_types(z.dtype, jnp.float32))

    @property
    def _stacks(self) -> int:
        return len(self.down) + len(self.middle) + len(self.up)

    def _apply_stack(
        self,
        stack: Stack[UNetBlock],
        x: Float[Array, "channels *sides"],
        c: Float[Array, " embedded"],
        key: Key[Array, ""] | None,
        from_down: list[Float[Array, "channels3 *sides"]] | None = None,
    ) -> tuple[Float[Array, "channels2 *sides2"], list[Float[Array, "channels2 *sides2"]]]:
        """The features after a stack, and those after each of its blocks; `from_down` has those from the way down for
        each block."""

        def apply(block: UNetBlock, x: Array, inputs: tuple[Array | None, Array | None]) -> tuple[Array, Array]:
            x = cast(block, self.dtype)(x, c, *inputs)
            return x, x

        keys = None if key is None else jr.split(key, stack.depth)
        x, outputs = stack.scan(apply, x, (keys, None if from_down is None else jnp.stack(from_down)))
        return x, list(outputs)


def _check_arguments(augmentation: int, dropout: float, dtype: DTypeLike) -> None:
    if augmentation < 0:
        raise ValueError(f"augmentation must be >= 0, got {augmentation}")
    if not 0 <= as_float("dropout")(dropout) < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    check_floating("dtype", dtype)
