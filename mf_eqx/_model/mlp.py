r"""A residual multilayer perceptron as a field, for data of low dimension.

Networks learn smooth functions of their inputs first. Where the field has detail much finer than the range of z, its
Fourier features help,

$$\gamma(z) = (z, \cos 2\pi B^\top z, \sin 2\pi B^\top z), \qquad B_{ij} \sim N(0, s^2),$$

whose frequencies B, in cycles per unit of z, are drawn once. The paper keeps them fixed; here they are parameters that
start there.

Source: Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains, Tancik, Srinivasan,
Mildenhall, Fridovich-Keil, Raghavan, Singhal, Ramamoorthi, Barron, Ng, 2020, arXiv 2006.10739.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import xavier_uniform, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, at_least_float32, Condition, TimeLike
from .._field import AbstractField
from .._validate import as_count, check_counts, check_floating, check_positive, check_z
from ..nn import (
    AbstractConditionEmbedding,
    cast,
    ConditionEmbedding,
    end_duration,
    LabelEmbedding,
    Linear,
    Stack,
    TimePairEmbedding,
    TimeVariables,
)
from ..nn._condition_embedding import as_argument, as_embedding
from .guidance import check_has_condition, embed, GuidanceCondition, GuidanceEmbedding


class MLPBlock(eqx.Module):
    """x + out(silu(hidden(x) + condition(c))): the condition enters every block."""

    hidden: Linear
    condition: Linear
    out: Linear

    def __init__(self, width: int, condition_width: int, *, key: Key[Array, ""]):
        hidden_key, condition_key, out_key = jr.split(key, 3)
        self.hidden = Linear(width, width, key=hidden_key)
        self.condition = Linear(condition_width, width, key=condition_key)
        self.out = Linear(width, width, key=out_key)

    def __call__(self, x: Float[Array, " width"], c: Float[Array, " condition"]) -> Float[Array, " width"]:
        return x + self.out(jax.nn.silu(self.hidden(x) + self.condition(c)))


class MLP(AbstractField):
    """A residual MLP on vectors. It is smooth (all activations are SiLU), and so is du/dt. A fresh MLP outputs zero.

    **Arguments:**

    - `size`: dimensions of the data.
    - `width`: size of the hidden layers.
    - `depth`: number of residual blocks, of two layers each.
    - `labels`: None, or the number of labels. With labels, the condition is an integer in [0, labels], where `labels`
      means "no label".
    - `condition`: None, or what the field is conditioned on if it is no label: the size of a vector, which
      `mf_eqx.nn.VectorEmbedding` embeds; or an `mf_eqx.nn.AbstractConditionEmbedding` of your own, for conditions of
      any structure.
    - `guidance`: whether the field takes the guidance as an input. The condition is then a `GuidanceCondition`, whose
      `condition` is the label or the other condition.
    - `time_variables`: the variables that are embedded, one of the functions of Tab. 1c in `mf_eqx.nn`.
    - `time_scale`: factor on times before the sinusoidal embedding, see `mf_eqx.nn.TimePairEmbedding`; with 10 the
      argument of the fastest sine changes by 10 radians over [0, 1].
    - `condition_width`: width of the embedding of times and condition, by default `width`. In two dimensions a quarter
      is enough, and saves up to half of the operations.
    - `fourier_features`: the number of frequencies, each of which adds a sine and a cosine of z to the inputs; 0 for z
      alone.
    - `fourier_scale`: standard deviation of the frequencies at the start (the paper's sigma), in cycles per unit of z.
      Detail of size d needs frequencies of about 1 / 2 d; larger ones make du/dt noisy.
    - `dtype`: compute precision of the layers, such as bfloat16; by default the promoted dtype of parameters and data.
      Parameters, times and their embedding, Fourier features, and the result stay float32 or better.
    - `key`.

    **Raises:** `ValueError` if a size is below 1, `fourier_features` below 0, `fourier_scale` not positive and finite,
    or `dtype` not floating point, if `labels` and `condition` are both given, or `guidance` without either; when
    called, if z does not have the size, or if the condition is not one integer label for a field with labels, a vector
    of its size for a field with vectors, or None without either.
    """

    frequencies: Float[Array, "size features"] | None
    first: Linear
    embedding: ConditionEmbedding
    guidance: GuidanceEmbedding | None
    stack: Stack[MLPBlock]
    out: Linear
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        width: int = 128,
        depth: int = 3,
        labels: int | None = None,
        condition: int | AbstractConditionEmbedding | None = None,
        guidance: bool = False,
        time_variables: TimeVariables = end_duration,
        time_scale: float = 10.0,
        condition_width: int | None = None,
        fourier_features: int = 0,
        fourier_scale: float = 0.5,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        inner = width if condition_width is None else condition_width
        check_counts(size=size, width=width, depth=depth, condition_width=inner)
        as_count("fourier_features", fourier_features, 0)
        check_positive("fourier_scale", fourier_scale)
        check_has_condition(guidance, labels, condition)
        if dtype is not None:
            check_floating("dtype", dtype)
        first_key, time_key, label_key, stack_key, out_key = jr.split(key, 5)
        self.frequencies = None
        if fourier_features:
            directions = jr.normal(jr.fold_in(first_key, 1), (size, fourier_features), jnp.float32)
            self.frequencies = fourier_scale * directions
        self.first = Linear(size + 2 * fourier_features, width, key=first_key)
        times = TimePairEmbedding(
            inner, variables=time_variables, size=32, time_scale=time_scale, init=xavier_uniform(), key=time_key
        )
        self.embedding = ConditionEmbedding(
            times,
            None if labels is None else LabelEmbedding(labels, inner, key=label_key),
            as_embedding(condition, inner, init=xavier_uniform(), key=label_key),
        )
        self.guidance = None
        if guidance:
            self.guidance = GuidanceEmbedding(inner, size=32, init=xavier_uniform(), key=jr.fold_in(time_key, 1))
        self.stack = Stack(lambda key: MLPBlock(width, inner, key=key), depth, key=stack_key)
        self.out = Linear(width, size, init=zeros, key=out_key)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.embedding.null_label

    @property
    def data_shape(self) -> tuple[int]:
        """(size,)."""
        return (self.out.weight.shape[1],)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of which this field is made, as for `DiT`, and without `fourier_scale`, which says only where
        the frequencies start."""
        times, label = self.embedding.times, self.embedding.label
        return {
            "size": self.out.weight.shape[1],
            "width": self.out.weight.shape[0],
            "depth": self.stack.depth,
            "labels": None if label is None else label.null_label,
            "condition": as_argument(self.embedding.condition),
            "guidance": self.guidance is not None,
            "time_variables": times.variables,
            "time_scale": times.time_scale,
            "condition_width": self.stack.blocks.condition.weight.shape[1],
            "fourier_features": 0 if self.frequencies is None else self.frequencies.shape[1],
        }

    def __call__(
        self,
        z: Float[Array, " size"],
        r: TimeLike,
        t: TimeLike,
        condition: GuidanceCondition | Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, " size"]:
        check_z(z, self.data_shape)
        r, t = as_times(r, t, z)
        dtype = np.promote_types(self.out.weight.dtype, z.dtype) if self.dtype is None else self.dtype
        c = jax.nn.silu(embed(self.embedding, self.guidance, r, t, condition)).astype(dtype)
        x = cast(self.first, dtype)(self._inputs(z).astype(dtype))
        x = self.stack(lambda block, x: cast(block, dtype)(x, c), x)
        return cast(self.out, dtype)(x).astype(np.promote_types(np.promote_types(dtype, z.dtype), np.float32))

    def _inputs(self, z: Float[Array, " size"]) -> Float[Array, " inputs"]:
        """z beside its Fourier features, whose angles are too large for bfloat16."""
        if self.frequencies is None:
            return z
        angles = 2 * jnp.pi * (at_least_float32(z) @ at_least_float32(self.frequencies))
        return jnp.concatenate([z, jnp.cos(angles), jnp.sin(angles)])
