"""A residual multilayer perceptron as a field, for data of low dimension."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import xavier_uniform, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Label, TimeLike
from .._field import AbstractField
from .._validate import check_sizes
from ..nn import (
    cast,
    ConditionEmbedding,
    end_duration,
    LabelEmbedding,
    Linear,
    Stack,
    TimePairEmbedding,
    TimeVariables,
)


class MLPBlock(eqx.Module):
    """x + out(silu(hidden(x) + condition(c))): the condition enters every block."""

    hidden: Linear
    condition: Linear
    out: Linear

    def __init__(self, width: int, *, key: Key[Array, ""]):
        hidden_key, condition_key, out_key = jr.split(key, 3)
        self.hidden = Linear(width, width, key=hidden_key)
        self.condition = Linear(width, width, key=condition_key)
        self.out = Linear(width, width, key=out_key)

    def __call__(self, x: Float[Array, " width"], c: Float[Array, " width"]) -> Float[Array, " width"]:
        return x + self.out(jax.nn.silu(self.hidden(x) + self.condition(c)))


class MLP(AbstractField):
    """A residual MLP on vectors. It is smooth (all activations are SiLU), and so is du/dt. A fresh MLP outputs zero.

    **Arguments:**

    - `size`: dimensions of the data.
    - `width`: size of the hidden layers.
    - `depth`: number of residual blocks, of two layers each.
    - `labels`: number of labels, or None. The condition is then an integer label in [0, labels], `labels` being "no
      label".
    - `time_variables`: the variables that are embedded, one of the functions of Tab. 1c in `mf_eqx.nn`.
    - `time_scale`: factor on times before the sinusoidal embedding, see `mf_eqx.nn.TimePairEmbedding`; with 10 the
      argument of the fastest sine changes by 10 radians over [0, 1].
    - `dtype`: compute precision of the layers, such as bfloat16; by default the promoted dtype of parameters and data.
      Parameters, times and their embedding, and the result stay float32 or better.
    - `key`.

    **Raises:** `ValueError` if a size is below 1, or if `dtype` is not floating point; when called, if the condition is
    not one integer label for a field with labels or None for a field without labels.
    """

    first: Linear
    embedding: ConditionEmbedding
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
        time_variables: TimeVariables = end_duration,
        time_scale: float = 10.0,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_sizes(size=size, width=width, depth=depth)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be floating point, got {dtype}")
        first_key, time_key, label_key, stack_key, out_key = jr.split(key, 5)
        self.first = Linear(size, width, key=first_key)
        times = TimePairEmbedding(
            width, variables=time_variables, size=32, time_scale=time_scale, init=xavier_uniform(), key=time_key
        )
        self.embedding = ConditionEmbedding(
            times, None if labels is None else LabelEmbedding(labels, width, key=label_key)
        )
        self.stack = Stack(lambda key: MLPBlock(width, key=key), depth, key=stack_key)
        self.out = Linear(width, size, init=zeros, key=out_key)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.embedding.null_label

    def __call__(
        self,
        z: Float[Array, " size"],
        r: TimeLike,
        t: TimeLike,
        condition: Label | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, " size"]:
        r, t = as_times(r, t, z)
        dtype = np.promote_types(self.out.weight.dtype, z.dtype) if self.dtype is None else self.dtype
        c = jax.nn.silu(self.embedding(r, t, condition)).astype(dtype)
        x = self.stack(lambda block, x: cast(block, dtype)(x, c), cast(self.first, dtype)(z.astype(dtype)))
        return cast(self.out, dtype)(x).astype(np.promote_types(np.promote_types(dtype, z.dtype), np.float32))
