r"""The in-context diffusion transformer of improved MeanFlow as a field.

The condition and the times become tokens in front of the patches of an image or of a sequence. A label or a number
becomes several tokens, each the sum of a learned vector and the embedding. All tokens pass through the same blocks,
without modulation:

    x = x + gate_1 * attention(norm_1(x))     rotary positions over the whole sequence; normalised queries and keys
    x = x + gate_2 * mlp(norm_2(x))           SwiGLU

The first blocks are the trunk. The other blocks and a last layer are the head, which makes u of the tokens that leave
the trunk. A network may have a second head of the same size on the same trunk, the velocity head, which makes v; it is
not needed for sampling. The gates and the last layers start at zero, so that a fresh network outputs zero.

Source: Improved Mean Flows: On the Challenges of Fastforward Generative Models, Geng, Lu, Wu, Shechtman, Kolter, He,
2025, arXiv 2512.02012; options for pixels: One-step Latent-free Image Generation with Pixel Mean Flows, 2026, arXiv
2601.22158; initialisation, and what the papers leave open, as in the authors' released code.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import variance_scaling, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._field import AbstractFieldWithVelocity
from .._validate import check_data_shape, check_kind, check_sizes
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    AbstractConditionTokens,
    cast,
    duration,
    Linear,
    Remat,
    RMSNorm,
    rotary_angles,
    rotary_line_angles,
    RotarySelfAttention,
    Stack,
    SwiGLU,
    TimeVariables,
    XLAAttention,
)
from ..nn._attention import head_size
from . import patches
from .guidance import GuidanceCondition
from .in_context_embedding import InContextEmbedding, TokenCounts


class InContextDiTSize(NamedTuple):
    """The size of an in-context DiT: `depth` blocks, of which the last `head_depth` are the head's; tokens of `width`;
    attention `heads`; `patch`, the side of a square of pixels or the number of steps in a piece of a sequence. A
    velocity head has `head_depth` blocks more. `mlp`, the width inside the MLPs, is 8/3 of `width` by default.

    Three further options are those of pixel MeanFlow. With `bottleneck`, a linear layer of so many outputs comes before
    the one that makes tokens of patches. With `learned_positions`, a learned vector is added to every token of the
    sequence, the condition's included. With `grid`, for images, the rotary positions are the rows and columns of the
    patches, and the tokens in front of them have none.
    """

    depth: int
    width: int
    heads: int
    patch: int
    head_depth: int = 8
    mlp: int | None = None
    bottleneck: int | None = None
    learned_positions: bool = False
    grid: bool = False


IMF_B2 = InContextDiTSize(depth=12, width=768, heads=12, patch=2)
IMF_M2 = InContextDiTSize(depth=24, width=768, heads=12, patch=2)
IMF_L2 = InContextDiTSize(depth=32, width=1024, heads=16, patch=2)
IMF_XL2 = InContextDiTSize(depth=48, width=1024, heads=16, patch=2)

_PMF = InContextDiTSize(16, 768, 12, 16, bottleneck=128, learned_positions=True, grid=True)
PMF_B16 = _PMF
PMF_L16 = _PMF._replace(depth=32, width=1024, heads=16)
PMF_H16 = _PMF._replace(depth=48, width=1280, heads=16, bottleneck=256)

_INIT = variance_scaling(0.32**2, "fan_in", "normal")
"""How the matrices of blocks start: normal with standard deviation 0.32 / sqrt(fan in)."""


class InContextBlock(eqx.Module):
    """A block without modulation. Its equations are in the module's docstring."""

    norm_1: RMSNorm
    attention: RotarySelfAttention
    gate_1: Float[Array, " width"]
    norm_2: RMSNorm
    mlp: SwiGLU
    gate_2: Float[Array, " width"]

    def __init__(self, size: InContextDiTSize, attention: AbstractAttention, *, key: Key[Array, ""]):
        attention_key, mlp_key = jr.split(key)
        width = size.width
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.attention = RotarySelfAttention(width, size.heads, init=_INIT, attention=attention, key=attention_key)
        self.mlp = SwiGLU(width, 8 * width // 3 if size.mlp is None else size.mlp, init=_INIT, key=mlp_key)
        self.gate_1, self.gate_2 = jnp.zeros(width, jnp.float32), jnp.zeros(width, jnp.float32)

    def __call__(
        self, x: Float[Array, "tokens width"], angles: Float[np.ndarray, "tokens pairs"]
    ) -> Float[Array, "tokens width"]:
        x = x + self.attention(self.norm_1(x), angles, self.gate_1)
        return x + self.mlp(self.norm_2(x), self.gate_2)


class InContextHead(eqx.Module):
    """The blocks and the layer that turn the tokens of the trunk into the `values` of each patch.

    `make_stack(depth, key=key)` makes blocks.
    """

    stack: Stack[InContextBlock]
    norm: RMSNorm
    out: Linear

    def __init__(
        self,
        size: InContextDiTSize,
        values: int,
        make_stack: Callable[..., Stack[InContextBlock]],
        *,
        key: Key[Array, ""],
    ):
        self.stack = make_stack(size.head_depth, key=key)
        self.norm, self.out = RMSNorm(size.width), Linear(size.width, values, init=zeros, key=key)


def _make_stack(
    depth: int,
    *,
    size: InContextDiTSize,
    attention: AbstractAttention,
    remat: Remat,
    unroll: int | bool,
    key: Key[Array, ""],
) -> Stack[InContextBlock]:
    def block(key: Key[Array, ""]) -> InContextBlock:
        return InContextBlock(size, attention, key=key)

    return Stack(block, depth, remat=remat, unroll=unroll, key=key)


def _check(data_shape: tuple[int, ...], size: InContextDiTSize, dtype: DTypeLike) -> None:
    check_data_shape(data_shape)
    check_kind("size", size, InContextDiTSize)
    check_sizes(size=size[:5])
    check_sizes(**{name: size._asdict()[name] for name in ("mlp", "bottleneck") if size._asdict()[name] is not None})
    patches.check_patch(data_shape, size.patch)
    if size.head_depth >= size.depth:
        raise ValueError(f"head_depth must be below the depth {size.depth}, got {size.head_depth}")
    if size.grid and len(data_shape) != 3:
        raise ValueError(f"grid must be False for sequences, got {size.grid} for data_shape {data_shape}")
    if size.grid and head_size(size.width, size.heads) % 4:
        rule = "width must give heads whose size is a multiple of 4 (rotary positions in a grid)"
        raise ValueError(f"{rule}, got width {size.width}, heads {size.heads}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got {dtype}")


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
        _check(data_shape, size, dtype)
        patch_key, embedding_key, trunk_key, average_key, velocity_key = jr.split(key, 5)
        values = data_shape[0] * size.patch ** (len(data_shape) - 1)
        stack = functools.partial(_make_stack, size=size, attention=attention, remat=remat, unroll=unroll)
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
        self.data_shape, self.patch, self.grid = tuple(data_shape), size.patch, bool(size.grid)
        self.dtype = jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label". **Raises:** `ValueError` without labels."""
        if (label := self.embedding.label) is None:
            raise ValueError("labels must be given for a null label to exist, got None")
        return label.null_label

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
        if z.shape != self.data_shape:
            raise ValueError(f"z must have the data_shape {self.data_shape}, got {z.shape}")
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
