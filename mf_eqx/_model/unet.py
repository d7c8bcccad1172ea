r"""The DDPM++ U-Net as a field, in the form of EDM.

Residual blocks work on images, or on sequences, of decreasing size (the way down) and then on ones of increasing size
(the way up). On the way up, the input of each block that does not resample is concatenated with an output from the way
down. A block computes

    h   = conv(silu(norm(x)))                 resampled before conv if the resolution changes
    h   = conv(dropout(silu(norm(h + linear(c)))))
    x   = (skip(x) + h) / sqrt(2)
    x   = (x + attention(norm(x))) / sqrt(2)  in blocks with attention

where c is the embedding of the times, the condition, the guidance if it is an input, and the numbers that describe the
augmentation. Consecutive equal blocks form one stack: the 33 blocks of the CIFAR-10 network are 15 stacks.

Source: Score-Based Generative Modeling through Stochastic Differential Equations, Song et al., 2021, arXiv 2011.13456
(architecture); Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al., 2022, arXiv 2206.00364
(this form); MeanFlow paper, App. A (two times).
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import Initializer, normal, variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, Time, TimeLike
from .._field import AbstractField
from .._validate import as_tuple, check_data_shape, check_kind
from ..nn import (
    AbstractAttention,
    AbstractConditionEmbedding,
    cast,
    downsample,
    end_duration,
    GroupNorm,
    LabelEmbedding,
    Linear,
    Remat,
    SelfAttention,
    sinusoidal_embedding,
    Stack,
    TimeVariables,
    upsample,
    XLAAttention,
)
from ..nn._condition_embedding import as_argument, as_embedding, check_one_embedding, embedded_condition
from ..nn._norm import per_channel
from .guidance import check_has_condition, GuidanceCondition, GuidanceEmbedding, without_guidance


class UNetSize(NamedTuple):
    """The size of a U-Net.

    The network has one resolution for each of `multipliers`, first that of the data, then each half of the one before.
    The number of channels there is `width` times the multiplier. There are `blocks` blocks per resolution on the way
    down, and one more on the way up, besides the block that resamples between two resolutions. `attention` lists the
    resolutions with attention by their number of rows (of an image) or steps (of a sequence): there attention follows
    every block on the way down but the resampling one, and the last block on the way up. The middle always has
    attention.
    """

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]


UNET_CIFAR10 = UNetSize(width=128, multipliers=(2, 2, 2), blocks=4, attention=(16,))


class UNetCondition(NamedTuple):
    """The condition of a U-Net: an integer label, or another condition in its place, and numbers that describe how the
    image was augmented (None for no augmentation, as when sampling)."""

    label: Condition = None
    augmentation: Float[Array, " numbers"] | None = None


def _xavier_uniform(scale: float = 1.0, *, out_axis: int = -1, in_axis: int = -2) -> Initializer:
    """Xavier-uniform numbers times `scale`."""
    return variance_scaling(scale**2, "fan_avg", "uniform", in_axis=in_axis, out_axis=out_axis)


def _convolution(
    sides: int, inputs: int, outputs: int, kernel: int, *, scale: float = 1.0, key: Key[Array, ""]
) -> eqx.nn.Conv:
    """A convolution over `sides` axes that keeps their sizes. Fan-in and fan-out include the kernel's positions; the
    bias is zero."""
    # Only its shapes, since the numbers that it would draw itself are not used.
    convolution = eqx.filter_eval_shape(eqx.nn.Conv, sides, inputs, outputs, kernel, padding=kernel // 2, key=key)
    weight = _xavier_uniform(scale, in_axis=1, out_axis=0)(key, (outputs, inputs, *[kernel] * sides), jnp.float32)
    bias = jnp.zeros((outputs, *[1] * sides), jnp.float32)
    return eqx.tree_at(lambda c: (c.weight, c.bias), convolution, (weight, bias))


def _group_norm(channels: int) -> GroupNorm:
    """Groups of at least four channels, at most 32 of them; statistics in float32."""
    groups = min(32, channels // 4)
    if channels % groups:
        raise ValueError(f"width must give channels that are multiples of {groups} (group norm), got {channels}")
    return GroupNorm(groups, channels)


_ALMOST_ZERO = 1e-5
"""Factor on the initial weights of the last layer of every branch, so that a fresh block hardly changes its input."""
_ROOT_HALF = 0.5**0.5
"""Factor that keeps the variance of a sum of two terms."""


class _BlockPlan(NamedTuple):
    """One block: its input channels, the channels from the way down that are concatenated with them, its output
    channels, whether attention follows, and the factor on the size: 1, 2 or 1/2."""

    inputs: int
    down_channels: int
    outputs: int
    attention: bool = False
    factor: float = 1


def _down_plans(size: UNetSize, rows: int) -> Iterator[_BlockPlan]:
    channels = size.width
    for level, multiplier in enumerate(size.multipliers):
        if level > 0:
            yield _BlockPlan(channels, 0, channels, factor=0.5)
        for _ in range(size.blocks):
            outputs = multiplier * size.width
            yield _BlockPlan(channels, 0, outputs, (rows >> level) in size.attention)
            channels = outputs


def _up_plans(size: UNetSize, rows: int) -> Iterator[_BlockPlan]:
    down_channels = [size.width, *(plan.outputs for plan in _down_plans(size, rows))]
    channels = down_channels[-1]
    for level, multiplier in reversed(list(enumerate(size.multipliers))):
        if level < len(size.multipliers) - 1:
            yield _BlockPlan(channels, 0, channels, factor=2)
        for number in range(size.blocks + 1):
            outputs, last = multiplier * size.width, number == size.blocks
            yield _BlockPlan(channels, down_channels.pop(), outputs, last and (rows >> level) in size.attention)
            channels = outputs


class ResidualAttention(eqx.Module):
    """(x + attention(norm(x))) / sqrt(2), with one head over all channels of every pixel or step."""

    norm: GroupNorm
    attention: SelfAttention

    def __init__(self, channels: int, attention: AbstractAttention, *, key: Key[Array, ""]):
        self.norm = _group_norm(channels)
        qkv_key, out_key = jr.split(key)
        self.attention = eqx.tree_at(
            lambda attention: (attention.qkv.weight, attention.out.weight),
            SelfAttention(channels, 1, attention=attention, key=key),
            (
                _xavier_uniform(0.2**0.5)(qkv_key, (channels, 3 * channels), jnp.float32),
                _xavier_uniform(_ALMOST_ZERO)(out_key, (channels, channels), jnp.float32),
            ),
        )

    def __call__(self, x: Float[Array, "channels *sides"]) -> Float[Array, "channels *sides"]:
        tokens = self.norm(x).reshape(x.shape[0], -1).T
        return (x + self.attention(tokens).T.reshape(x.shape)) * _ROOT_HALF


class UNetBlock(eqx.Module):
    """A residual block. Its equations are in the module's docstring."""

    norm_1: GroupNorm
    conv_1: eqx.nn.Conv
    condition: Linear
    norm_2: GroupNorm
    conv_2: eqx.nn.Conv
    skip: eqx.nn.Conv | None
    attention: ResidualAttention | None
    plan: _BlockPlan = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        plan: _BlockPlan,
        sides: int,
        embedded: int,
        dropout: float,
        attention: AbstractAttention,
        *,
        key: Key[Array, ""],
    ):
        inputs, outputs = plan.inputs + plan.down_channels, plan.outputs
        conv_1_key, condition_key, conv_2_key, skip_key, attention_key = jr.split(key, 5)
        self.norm_1 = _group_norm(inputs)
        self.conv_1 = _convolution(sides, inputs, outputs, 3, key=conv_1_key)
        self.condition = Linear(embedded, outputs, key=condition_key)
        self.norm_2 = _group_norm(outputs)
        self.conv_2 = _convolution(sides, outputs, outputs, 3, scale=_ALMOST_ZERO, key=conv_2_key)
        same = inputs == outputs and plan.factor == 1
        self.skip = None if same else _convolution(sides, inputs, outputs, 1, key=skip_key)
        self.attention = ResidualAttention(outputs, attention, key=attention_key) if plan.attention else None
        self.plan = plan
        self.dropout = float(dropout)

    def __call__(
        self,
        x: Float[Array, "channels *sides"],
        c: Float[Array, " embedded"],
        key: Key[Array, ""] | None,
        from_down: Float[Array, "channels3 *sides"] | None = None,
    ) -> Float[Array, "channels2 *sides2"]:
        x = x if from_down is None else jnp.concatenate([x, from_down])
        h = self.conv_1(self._resampled(jax.nn.silu(self.norm_1(x))))
        h = jax.nn.silu(self.norm_2(h + per_channel(self.condition(c), h)))
        h = self.conv_2(eqx.nn.Dropout(self.dropout)(h, key=key, inference=key is None))
        skip = x if self.skip is None else self.skip(self._resampled(x))
        x = (skip + h) * _ROOT_HALF
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Float[Array, "channels *sides"]) -> Float[Array, "channels *sides2"]:
        return x if self.plan.factor == 1 else downsample(x) if self.plan.factor < 1 else upsample(x)


class UNetEmbedding(eqx.Module):
    """The embedding on which every block is conditioned. The sines and cosines of the times are concatenated; a vector
    for the label or another condition and one that is linear in the numbers of the augmentation are added; two linear
    layers with SiLU follow. It is computed in float32 or better.

    **Arguments:** `width` of the result; `labels`, `condition`, `guidance`, `augmentation` as for `UNet`; `variables`
    its `time_variables`; `key`.
    """

    label: LabelEmbedding | None
    condition: AbstractConditionEmbedding | None
    guidance: GuidanceEmbedding | None
    augmentation: Float[Array, "numbers features"] | None
    hidden: Linear
    out: Linear
    variables: TimeVariables = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        labels: int | None,
        condition: int | AbstractConditionEmbedding | None,
        guidance: bool,
        augmentation: int,
        variables: TimeVariables,
        *,
        key: Key[Array, ""],
    ):
        features = len(variables(jnp.zeros(()), jnp.ones(()))) * width // 2
        label_key, augmentation_key, hidden_key, out_key = jr.split(key, 4)
        self.label = None if labels is None else LabelEmbedding(labels, features, init=normal(0.2), key=label_key)
        self.condition = as_embedding(condition, features, init=_xavier_uniform(), key=label_key)
        check_one_embedding(self.label, self.condition)
        check_has_condition(guidance, labels, condition)
        self.guidance = None
        if guidance:
            self.guidance = GuidanceEmbedding(features, size=256, init=normal(0.02), key=jr.fold_in(label_key, 1))
        numbers = (augmentation, features)
        self.augmentation = _xavier_uniform()(augmentation_key, numbers, jnp.float32) if augmentation else None
        self.hidden = Linear(features, width, key=hidden_key)
        self.out = Linear(width, width, key=out_key)
        self.variables = variables

    def __call__(self, r: Time, t: Time, given: GuidanceCondition | Condition) -> Float[Array, " width"]:
        condition = without_guidance(given, self.guidance is not None)
        condition = condition if isinstance(condition, UNetCondition) else UNetCondition(condition)
        self._check(condition)
        x = jnp.concatenate([self._embedded(value) for value in self.variables(r, t)])
        added = embedded_condition(condition.label, self.label, self.condition, x.shape[0])
        x = x if added is None else x + added
        if self.guidance is not None:
            x = x + self.guidance(given)
        if self.augmentation is not None and condition.augmentation is not None:
            x = x + condition.augmentation @ self.augmentation
        return jax.nn.silu(self.out(jax.nn.silu(self.hidden(x))))

    def _embedded(self, value: Time) -> Float[Array, " features"]:
        """The sines of a time, then its cosines."""
        size = self.out.weight.shape[0] // 2
        return jnp.roll(sinusoidal_embedding(value, size, endpoint=True), size // 2)

    def _check(self, condition: UNetCondition) -> None:
        numbers = 0 if self.augmentation is None else len(self.augmentation)
        if condition.augmentation is not None and jnp.shape(condition.augmentation) != (numbers,):
            raise ValueError(f"augmentation must have shape ({numbers},), got {jnp.shape(condition.augmentation)}")


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
        levels = {name: as_tuple(name, getattr(size, name), (16,)) for name in ("multipliers", "attention")}
        size = size._replace(**levels)
        _check_arguments(data_shape, size, augmentation, dropout, dtype)
        channels, rows, sides = data_shape[0], data_shape[1], len(data_shape) - 1
        embedded = 4 * size.width
        embedding_key, first_key, down_key, middle_key, up_key, last_key = jr.split(key, 6)

        def block(plan: _BlockPlan, key: Key[Array, ""]) -> UNetBlock:
            return UNetBlock(plan, sides, embedded, dropout, attention, key=key)

        def stacks(plans: Iterator[_BlockPlan], key: Key[Array, ""]) -> tuple[Stack[UNetBlock], ...]:
            """One stack for each run of consecutive equal blocks."""
            runs = [(plan, len(list(run))) for plan, run in itertools.groupby(plans)]
            return tuple(
                Stack(lambda key, plan=plan: block(plan, key), depth, remat=remat, unroll=unroll, key=key)
                for (plan, depth), key in zip(runs, jr.split(key, len(runs)), strict=True)
            )

        conditions = labels, condition, guidance, augmentation
        self.embedding = UNetEmbedding(embedded, *conditions, time_variables, key=embedding_key)
        self.first = _convolution(sides, channels, size.width, 3, key=first_key)
        self.down = stacks(_down_plans(size, rows), down_key)
        deepest = size.multipliers[-1] * size.width
        middle = [_BlockPlan(deepest, 0, deepest, attention) for attention in (True, False)]
        self.middle = stacks(iter(middle), middle_key)
        self.up = stacks(_up_plans(size, rows), up_key)
        outputs = size.multipliers[0] * size.width
        self.norm = _group_norm(outputs)
        self.last = _convolution(sides, outputs, channels, 3, scale=_ALMOST_ZERO, key=last_key)
        self.data_shape = tuple(data_shape)
        self.size = size
        self.dtype = jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label".

        **Raises:** `ValueError` without labels.
        """
        if self.embedding.label is None:
            raise ValueError("labels must be given for a null label to exist, got None")
        return self.embedding.label.null_label

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
        if z.shape != self.data_shape:
            raise ValueError(f"z must have the data_shape {self.data_shape}, got {z.shape}")
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


def _check_arguments(
    data_shape: tuple[int, ...], size: UNetSize, augmentation: int, dropout: float, dtype: DTypeLike
) -> None:
    check_data_shape(data_shape)
    if size.width < 4 or size.width % 4:
        raise ValueError(f"width must be a positive multiple of 4, got {size.width}")
    if size.blocks < 1:
        raise ValueError(f"blocks must be >= 1, got {size.blocks}")
    if not size.multipliers or min(size.multipliers) < 1:
        raise ValueError(f"multipliers must be at least one number >= 1, got {size.multipliers}")
    rows = [data_shape[1] >> level for level in range(len(size.multipliers))]
    if unknown := [number for number in size.attention if number not in rows]:
        raise ValueError(f"attention must be among the resolutions {rows} of data_shape {data_shape}, got {unknown}")
    multiple = 2 ** (len(rows) - 1)
    if any(side % multiple for side in data_shape[1:]):
        rule = f"multipliers must be fewer, or the sides of data_shape divisible by {multiple}"
        raise ValueError(f"{rule}, got {len(rows)} multipliers and {data_shape}")
    if augmentation < 0:
        raise ValueError(f"augmentation must be >= 0, got {augmentation}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got {dtype}")
