r"""The diffusion transformer (DiT) as a field.

Patches of an image, or of a sequence in one dimension, become tokens, a transformer with adaLN-Zero blocks works on
them, and a linear layer turns each token back into a patch. The sum of the embeddings of (r, t) and of the condition
modulates every block:

    x = x + gate_1 * attention(modulate(norm(x), shift_1, scale_1))
    x = x + gate_2 * mlp(modulate(norm(x), shift_2, scale_2))

The modulations and the last layer start at zero, so that a fresh DiT outputs zero.

Source: Scalable Diffusion Models with Transformers, Peebles, Xie, 2023, arXiv 2212.09748; sizes as in the MeanFlow
paper, Tab. 4; `early_blocks` as in Decoupled MeanFlow, 2025, arXiv 2510.24474.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import normal, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, Time, TimeLike
from .._field import AbstractField
from .._validate import as_count, check_data_shape, check_floating, check_kind, check_z
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    cast,
    ConditionEmbedding,
    end_duration,
    LabelEmbedding,
    Linear,
    modulated_norm,
    Remat,
    SelfAttention,
    sinusoidal_line_positions,
    sinusoidal_positions,
    Stack,
    TimePairEmbedding,
    TimeVariables,
    XLAAttention,
)
from ..nn._condition_embedding import as_argument, as_embedding
from . import patches
from .guidance import check_has_condition, embed, GuidanceCondition, GuidanceEmbedding


class DiTSize(NamedTuple):
    """The size of a DiT: `depth` blocks, tokens of `width`, attention `heads`, `patch` the side of a square
    of pixels, or a number of steps of a sequence."""

    depth: int
    width: int
    heads: int
    patch: int


DIT_S4 = DiTSize(depth=12, width=384, heads=6, patch=4)
DIT_S2 = DiTSize(depth=12, width=384, heads=6, patch=2)
DIT_B4 = DiTSize(depth=12, width=768, heads=12, patch=4)
DIT_B2 = DiTSize(depth=12, width=768, heads=12, patch=2)
DIT_M2 = DiTSize(depth=16, width=1024, heads=16, patch=2)
DIT_L2 = DiTSize(depth=24, width=1024, heads=16, patch=2)
DIT_XL2 = DiTSize(depth=28, width=1152, heads=16, patch=2)


@jax.checkpoint
def _gelu(x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    """GELU in its tanh approximation. For the backward pass only the argument is kept, not every intermediate."""
    return jax.nn.gelu(x, approximate=True)


class DiTBlock(eqx.Module):
    """One adaLN-Zero block: attention, then an MLP of ratio 4 with tanh-approximate GELU."""

    attention: SelfAttention
    hidden: Linear
    out: Linear
    modulation: Linear

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        attention: AbstractAttention = XLAAttention(),
        key: Key[Array, ""],
    ):
        attention_key, hidden_key, out_key, modulation_key = jr.split(key, 4)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, attention=attention, key=attention_key)
        self.hidden = Linear(width, 4 * width, key=hidden_key)
        self.out = Linear(4 * width, width, key=out_key)
        self.modulation = Linear(width, 6 * width, init=zeros, key=modulation_key)

    def __call__(
        self, x: Float[Array, "tokens width"], condition: Float[Array, " width"]
    ) -> Float[Array, "tokens width"]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(self.modulation(condition), 6)
        x = x + self.attention(modulated_norm(x, shift_1, scale_1), gate_1)
        return x + self.out(_gelu(self.hidden(modulated_norm(x, shift_2, scale_2))), gate_2)


class DiT(AbstractField):
    """A diffusion transformer over images, latents or sequences, channels first.

    **Arguments:**

    - `data_shape`: (channels, height, width) of images or (channels, length) of sequences; all sides multiples of the
      patch, not necessarily equal.
    - `size`: a `DiTSize`, such as `DIT_B4`, or one of your own.
    - `labels`: None, or the number of labels. With labels, the condition is an integer in [0, labels], where `labels`
      means "no label" (`null_label`).
    - `condition`: None, or what the field is conditioned on if it is no label: the size of a vector, which
      `mf_eqx.nn.VectorEmbedding` embeds; or an `mf_eqx.nn.AbstractConditionEmbedding` of your own, for conditions of
      any structure.
    - `guidance`: whether the field takes the guidance as an input. The condition is then a `GuidanceCondition`, whose
      `condition` is the label or the other condition.
    - `time_variables`: the variables that are embedded, one of the functions of Tab. 1c in `mf_eqx.nn`.
    - `time_scale`: factor on times before the sinusoidal embedding, see `mf_eqx.nn.TimePairEmbedding`.
    - `qk_norm`: whether queries and keys are normalised, which keeps attention stable in long trainings; see
      `mf_eqx.nn.SelfAttention`.
    - `dtype`: compute precision of the blocks, float32 or bfloat16 (float64 for tests). Parameters, times and their
      embedding, and the result stay float32 or better.
    - `attention`: `mf_eqx.nn.XLAAttention` by default; `mf_eqx.nn.CudnnAttention` on NVIDIA GPUs with dtype bfloat16 is
      faster from 256 tokens on; `mf_eqx.nn.ChunkedAttention()` for many tokens (memory linear in their number, in all
      modes); `mf_eqx.nn.PallasAttention()` where it was measured to be faster, or a kernel of your own.
    - `early_blocks`: None, or the number of first blocks that get t as their only time. The others, and the last layer,
      then get r alone (Decoupled MeanFlow; two thirds of the blocks in the paper). Condition and guidance modulate all
      of them. At r = t the field is the same as without this option, so a field trained by Flow Matching can be given
      it and trained on.
    - `remat`, `unroll`: the trade-off of memory, run time and compile time, see `mf_eqx.nn.Stack`. By default there is
      no loop over the blocks where that is known to be faster, see `mf_eqx.nn.known_unroll`.
    - `key`.

    **Raises:** `ValueError` if a size is below 1 or does not fit the others, if `dtype` is not floating point, if
    `labels` and `condition` are both given, or `guidance` without either; when called, if `z` does not have the
    data_shape, or if the condition is not one integer label for a field with labels, a vector of its size for a field
    with vectors, or None without either.

    With 1000 labels and a (4, 32, 32) input: S/4 33,142,336 parameters, S/2 33,105,424, B/4 131,165,248, B/2
    131,091,472, M/2 308,019,216, L/2 459,137,040, XL/2 676,440,592.
    """

    patches: Linear
    embedding: ConditionEmbedding
    guidance: GuidanceEmbedding | None
    stack: Stack[DiTBlock]
    modulation: Linear
    out: Linear
    data_shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)
    early_blocks: int | None = eqx.field(static=True)

    def __init__(
        self,
        data_shape: tuple[int, ...],
        size: DiTSize,
        *,
        labels: int | None = None,
        condition: int | AbstractConditionEmbedding | None = None,
        guidance: bool = False,
        time_variables: TimeVariables = end_duration,
        time_scale: float = 1.0,
        qk_norm: bool = False,
        dtype: DTypeLike = jnp.float32,
        attention: AbstractAttention = XLAAttention(),
        early_blocks: int | None = None,
        remat: Remat = False,
        unroll: int | bool | None = None,
        key: Key[Array, ""],
    ):
        check_data_shape(data_shape)
        check_kind("size", size, DiTSize)
        data_shape = tuple(map(int, data_shape))
        channels, *sides = data_shape
        size = DiTSize(*(as_count(name, value) for name, value in size._asdict().items()))
        check_floating("dtype", dtype)
        patches.check_patch(data_shape, size.patch)
        if size.width % (2 * len(sides)):
            raise ValueError(f"width must be a multiple of {2 * len(sides)} (sin-cos positions), got {size.width}")
        if early_blocks is not None and as_count("early_blocks", early_blocks, 0) not in range(1, size.depth):
            raise ValueError(f"early_blocks must lie in [1, depth - 1 = {size.depth - 1}], got {early_blocks}")
        check_has_condition(guidance, labels, condition)
        patch_key, time_key, label_key, stack_key, modulation_key, out_key = jr.split(key, 6)
        values = channels * size.patch ** len(sides)
        self.patches = Linear(values, size.width, key=patch_key)
        self.embedding = ConditionEmbedding(
            TimePairEmbedding(size.width, variables=time_variables, time_scale=time_scale, key=time_key),
            None if labels is None else LabelEmbedding(labels, size.width, key=label_key),
            as_embedding(condition, size.width, key=label_key),
        )
        self.guidance = None
        if guidance:
            guidance_key = jr.fold_in(time_key, 1)
            self.guidance = GuidanceEmbedding(size.width, size=256, init=normal(0.02), key=guidance_key)
        self.stack = Stack(
            lambda key: DiTBlock(size.width, size.heads, qk_norm=qk_norm, attention=attention, key=key),
            size.depth,
            remat=remat,
            unroll=unroll,
            key=stack_key,
        )
        self.modulation = Linear(size.width, 2 * size.width, init=zeros, key=modulation_key)
        self.out = Linear(size.width, values, init=zeros, key=out_key)
        self.data_shape = data_shape
        self.patch = size.patch
        self.dtype = jnp.dtype(dtype)
        self.early_blocks = early_blocks

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.embedding.null_label

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of which this field is made, without `key` and those that say only how it computes: `dtype`,
        `attention`, `remat`, `unroll`. `DiT(**field.arguments, key=key)` is a fresh field of the same structure."""
        times, label = self.embedding.times, self.embedding.label
        attention = self.stack.blocks.attention
        return {
            "data_shape": self.data_shape,
            "size": DiTSize(self.stack.depth, self.modulation.weight.shape[0], attention.heads, self.patch),
            "labels": None if label is None else label.null_label,
            "condition": as_argument(self.embedding.condition),
            "guidance": self.guidance is not None,
            "time_variables": times.variables,
            "time_scale": times.time_scale,
            "qk_norm": attention.query_norm is not None,
            "early_blocks": self.early_blocks,
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
        check_z(z, self.data_shape)
        r, t = as_times(r, t, z)
        tokens = self._tokens(z.astype(self.dtype))
        if self.early_blocks is None:
            c = self._embedded(r, t, condition)
            tokens = self.stack(lambda block, x: cast(block, self.dtype)(x, c), tokens)
        else:
            early, c = (self._embedded(s, s, condition) for s in (t, r))
            is_early = jnp.arange(self.stack.depth) < self.early_blocks
            conditions = jnp.where(is_early[:, None], early, c)
            tokens, _ = self.stack.scan(
                lambda block, x, condition: (cast(block, self.dtype)(x, condition), None), tokens, conditions
            )
        shift, scale = jnp.split(cast(self.modulation, self.dtype)(c), 2)
        tokens = cast(self.out, self.dtype)(modulated_norm(tokens, shift, scale))
        joined = patches.join(tokens, self.data_shape, self.patch)
        return joined.astype(np.promote_types(z.dtype, jnp.float32))

    def _embedded(self, r: Time, t: Time, condition: Condition) -> Float[Array, " width"]:
        return jax.nn.silu(embed(self.embedding, self.guidance, r, t, condition)).astype(self.dtype)

    def _tokens(self, z: Float[Array, "channels *sides"]) -> Float[Array, "tokens features"]:
        grid, width = patches.grid(self.data_shape, self.patch), self.modulation.weight.shape[0]
        if len(grid) == 1:
            places = sinusoidal_line_positions(grid[0], width)
        else:
            places = sinusoidal_positions(grid[0], grid[1], width)
        return cast(self.patches, self.dtype)(patches.cut(z, self.patch)) + jnp.asarray(places, self.dtype)
