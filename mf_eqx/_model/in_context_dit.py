"""The in-context diffusion transformer of improved MeanFlow as a field.

The condition and the times become tokens in front of the patches of an image or of a sequence. A label or a number
becomes several tokens, each the sum of a learned vector and the embedding. All tokens pass through the same blocks
(`in_context_block.py`), without modulation.

The first blocks are the trunk. The other blocks and a last layer are the head, which makes u of the tokens that leave
the trunk. A network may have a second head of the same size on the same trunk, the velocity head, which makes v; it is
not needed for sampling. The gates and the last layers start at zero, so that a fresh network outputs zero.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012; options for pixels: One-step Latent-free Image Generation with Pixel Mean Flows, 2026, arXiv
2601.22158; initialisation, and what the papers leave open, as in the authors' released code.
"""

import functools
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._field import AbstractFieldWithVelocity
from .._validate import check_floating, check_z
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    AbstractConditionTokens,
    cast,
    duration,
    Linear,
    Remat,
    rotary_angles,
    rotary_line_angles,
    Stack,
    TimeVariables,
    XLAAttention,
)
from ..nn._attention import head_size
from ..nn._condition_embedding import null_label_of
from . import patches
from .guidance import GuidanceCondition
from .in_context_block import InContextBlock, InContextHead, stack_blocks
from .in_context_embedding import InContextEmbedding, TokenCounts
from .in_context_size import as_size, InContextDiTSize


class InContextDiT(AbstractFieldWithVelocity):
    """A diffusion transformer over images, latents or sequences, channels first, which takes its condition as tokens.

    **Arguments:**

    - `data_shape`: (channels, height, width) of images or (channels, length) of sequences; all sides multiples of the
      patch, not necessarily equal.
    - `size`: an `InContextDiTSize`, such as `IMF_B2`, or one of your own.
    - `labels`: None, or the number of labels. With labels, the condition is an integer in [0, labels], where `labels`
      means "no label" (`null_label`).
    - `condition`: None, or what the field is conditioned on if it is no label: the size of a vector; an
      `mf_eqx.nn.AbstractConditionEmbedding` of your own; or an `mf_eqx.nn.AbstractConditionTokens` of your own, for
      texts, several labels, or conditions of any other structure, which makes any number of tokens.
    - `guidance`: whether the field takes the guidance as an input. The condition is then a `GuidanceCondition`, whose
      `condition` is the label or the other condition.
    - `velocity_head`: whether there is a velocity head. It learns v on rows with r = t, and under `ImprovedMeanFlow` on
      all rows; guidance and `ImprovedMeanFlow` take its values. Sampling does not use it, and
      `without_velocity_head` drops it.
    - `tokens`: how many tokens stand for each number or label.
    - `time_variables`: the variables that become tokens, one of the functions of Tab. 1c in `mf_eqx.nn`; t - r alone by
      default, as in the paper.
    - `time_scale`: factor on the time variables before their sinusoidal embedding. It does not multiply the guidance
      scale and the interval of a `GuidanceCondition`.
    - `dtype`: compute precision of the blocks, float32 or bfloat16 (float64 for tests). Parameters, embeddings, and the
      result stay float32 or better, and so do the statistics of norms.
    - `attention`: an `mf_eqx.nn.AbstractAttention`, as for `DiT`.
    - `remat`, `unroll`: the trade-off of memory, run time and compile time, see `mf_eqx.nn.Stack`.
    - `key`.

    **Raises:** `ValueError` if a size is below 1 or does not fit the others, if `dtype` is not floating point, if
    `labels` and `condition` are both given, or `guidance` without either; when called, if `z` does not have the
    data_shape, or if the condition does not fit the field.

    With guidance, 1000 labels and a (4, 32, 32) input: B/2 88,935,184 parameters, M/2 173,908,240, L/2 409,054,224,
    XL/2 610,415,632; with a velocity head B/2 145,596,960, M/2 230,570,016, L/2 509,752,352, XL/2 711,113,760.
    `PMF_B16`, `PMF_L16` and `PMF_H16` with a (3, 256, 256) input and a velocity head: 175,474,304, 511,789,696 and
    1,113,259,520.
    """

    bottleneck: Linear | None
    patches: Linear
    positions: Float[Array, "tokens width"] | None
    embedding: InContextEmbedding
    trunk: Stack[InContextBlock]
    average_head: InContextHead
    velocity_head: InContextHead | None
    data_shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    grid: bool = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(
        self,
        data_shape: tuple[int, ...],
        size: InContextDiTSize,
        *,
        labels: int | None = None,
        condition: int | AbstractConditionEmbedding | AbstractConditionTokens | None = None,
        guidance: bool = False,
        velocity_head: bool = False,
        tokens: TokenCounts = TokenCounts(),
        time_variables: TimeVariables = duration,
        time_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        attention: AbstractAttention = XLAAttention(),
        remat: Remat = False,
        unroll: int | bool = 1,
        key: Key[Array, ""],
    ):
        size = as_size(data_shape, size)
        data_shape = tuple(map(int, data_shape))
        check_floating("dtype", dtype)
        patch_key, embedding_key, trunk_key, average_key, velocity_key = jr.split(key, 5)
        values = data_shape[0] * size.patch ** (len(data_shape) - 1)
        stack = functools.partial(stack_blocks, size=size, attention=attention, remat=remat, unroll=unroll)
        outputs, bottleneck_key = size.bottleneck, jr.fold_in(patch_key, 1)
        self.bottleneck = None if outputs is None else Linear(values, outputs, key=bottleneck_key)
        self.patches = Linear(values if outputs is None else outputs, size.width, key=patch_key)
        self.embedding = InContextEmbedding(
            size.width,
            labels=labels,
            condition=condition,
            guidance=guidance,
            counts=tokens,
            variables=time_variables,
            time_scale=time_scale,
            key=embedding_key,
        )
        self.trunk = stack(size.depth - size.head_depth, key=trunk_key)
        self.average_head = InContextHead(size, values, stack, key=average_key)
        self.velocity_head = InContextHead(size, values, stack, key=velocity_key) if velocity_head else None
        self.positions = None
        if size.learned_positions:
            length = self.embedding.length + math.prod(patches.grid(data_shape, size.patch))
            self.positions = 0.02 * jr.normal(jr.fold_in(patch_key, 2), (length, size.width), jnp.float32)
        self.data_shape, self.patch, self.grid = data_shape, size.patch, bool(size.grid)
        self.dtype = jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label". **Raises:** `ValueError` without labels."""
        return null_label_of(self.embedding.label)

    @property
    def has_velocity_head(self) -> bool:
        return self.velocity_head is not None

    def without_velocity_head(self) -> "InContextDiT":
        """The same network without its velocity head: u stays as it is."""
        return eqx.tree_at(lambda field: field.velocity_head, self, None, is_leaf=lambda node: node is None)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of which this field is made, as for `DiT`."""
        embedding, block = self.embedding, self.trunk.blocks
        head_depth = self.average_head.stack.depth
        label, width, mlp = embedding.label, self.patches.weight.shape[1], block.mlp.out.weight.shape[1]
        size = InContextDiTSize(
            self.trunk.depth + head_depth,
            width,
            block.attention.heads,
            self.patch,
            head_depth,
            None if mlp == 8 * width // 3 else mlp,
            None if self.bottleneck is None else self.bottleneck.weight.shape[1],
            self.positions is not None,
            self.grid,
        )
        return {
            "data_shape": self.data_shape,
            "size": size,
            "labels": None if label is None else label.null_label,
            "condition": embedding.condition_argument,
            "guidance": embedding.guidance is not None,
            "velocity_head": self.has_velocity_head,
            "tokens": embedding.counts,
            "time_variables": embedding.variables,
            "time_scale": embedding.time_scale,
        }

    def __call__(
        self,
        z: Float[Array, "channels *sides"],
        r: TimeLike,
        t: TimeLike,
        condition: GuidanceCondition | Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "channels *sides"]:
        return self._output(self.average_head, *self._shared(z, r, t, condition), z)

    def velocity(
        self,
        z: Float[Array, "channels *sides"],
        t: TimeLike,
        condition: GuidanceCondition | Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "channels *sides"]:
        """v(z, t) by the velocity head, without the blocks of the head for u.

        **Raises:** as the call; and `ValueError` for a network without a velocity head.
        """
        return self._output(self._velocity_head(), *self._shared(z, t, t, condition), z)

    def with_velocity(
        self,
        z: Float[Array, "channels *sides"],
        r: TimeLike,
        t: TimeLike,
        condition: GuidanceCondition | Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "channels *sides"], Float[Array, "channels *sides"]]:
        """The pair (u(z, r, t), v(z, t)), at one evaluation of the trunk.

        Both heads get the same tokens, which depend on r. Only training makes v independent of r.

        **Raises:** as `velocity`.
        """
        head, shared = self._velocity_head(), self._shared(z, r, t, condition)
        return self._output(self.average_head, *shared, z), self._output(head, *shared, z)

    def _velocity_head(self) -> InContextHead:
        if self.velocity_head is None:
            raise ValueError("velocity_head must be True for a field that is asked for its velocity, got False")
        return self.velocity_head

    def _shared(
        self, z: Float[Array, "channels *sides"], r: TimeLike, t: TimeLike, condition: Condition
    ) -> tuple[Float[Array, "tokens width"], Float[np.ndarray, "tokens pairs"]]:
        """All tokens after the trunk, and the angles of their positions."""
        check_z(z, self.data_shape)
        r, t = as_times(r, t, z)
        prefix = self.embedding(r, t, condition).astype(self.dtype)
        of_data = patches.cut(z.astype(self.dtype), self.patch)
        if self.bottleneck is not None:
            of_data = cast(self.bottleneck, self.dtype)(of_data)
        tokens = jnp.concatenate([prefix, cast(self.patches, self.dtype)(of_data)])
        if self.positions is not None:
            tokens = tokens + self.positions.astype(self.dtype)
        angles = self._angles(len(tokens))
        return self.trunk(lambda block, x: cast(block, self.dtype)(x, angles), tokens), angles

    def _angles(self, length: int) -> Float[np.ndarray, "tokens pairs"]:
        """The angles of the rotary positions of a sequence of `length` tokens."""
        size = head_size(self.patches.weight.shape[1], self.trunk.blocks.attention.heads)
        if not self.grid:
            return rotary_line_angles(length, size)
        rows, columns = patches.grid(self.data_shape, self.patch)
        angles = rotary_angles(rows, columns, size)
        return np.pad(angles, ((length - len(angles), 0), (0, 0)))

    def _output(
        self,
        head: InContextHead,
        tokens: Float[Array, "tokens width"],
        angles: Float[np.ndarray, "tokens pairs"],
        z: Float[Array, "channels *sides"],
    ) -> Float[Array, "channels *sides"]:
        """What a head makes of the tokens of the trunk, in the shape of z."""
        tokens = head.stack(lambda block, x: cast(block, self.dtype)(x, angles), tokens)
        count = math.prod(patches.grid(self.data_shape, self.patch))
        values = cast(head.out, self.dtype)(cast(head.norm, self.dtype)(tokens[-count:]))
        return patches.join(values, self.data_shape, self.patch).astype(np.promote_types(z.dtype, jnp.float32))
