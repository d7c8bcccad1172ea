r"""Embeddings of times, labels, other conditions, and positions.

Which variables a network gets in place of (r, t) is a choice of Tab. 1c; the JVP is always that of u(., r, t). Each
choice is a function `(r, t) -> numbers`; every number gets its own sinusoidal embedding and two-layer MLP, and the
results are summed.
"""

import abc
import functools
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar, as_times, at_least_float32, Condition, Label, ScalarLike, Time, TimeLike
from .._validate import as_count, check_finite, check_sizes, described, on_host_if_known
from ._linear import Linear

TimeVariables: TypeAlias = Callable[[Time, Time], tuple[Time, ...]]


def end_start(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, r): FID 61.75 in Tab. 1c."""
    r, t = as_times(r, t)
    return t, r


def end_duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, t - r): FID 61.06 in Tab. 1c, the paper's default."""
    r, t = as_times(r, t)
    return t, t - r


def end_start_duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """(t, r, t - r): FID 63.98 in Tab. 1c."""
    r, t = as_times(r, t)
    return t, r, t - r


def duration(r: TimeLike, t: TimeLike) -> tuple[Time, ...]:
    """t - r alone: FID 63.13 in Tab. 1c."""
    r, t = as_times(r, t)
    return (t - r,)


def sinusoidal_embedding(
    value: ScalarLike, size: int, *, max_period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, " size"]:
    r"""Cosines, then sines, of $value \cdot P^{-k / (size/2)}$ for k = 0 .. size/2 - 1, in float32 or better.

    As in the authors' ImageNet code and in DiT.

    **Arguments:** `value` a time; `size` even; `max_period` the P above, 10,000 everywhere; `endpoint` whether k is
    divided by size/2 - 1 instead, so that the last frequency is 1 / P, as in the authors' CIFAR-10 code.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and positive, got {size}")
    half, value = size // 2, as_scalar("value", value)
    frequencies = max_period ** (-np.arange(half) / max(half - endpoint, 1))
    angles = at_least_float32(value) * jnp.asarray(frequencies, np.promote_types(value.dtype, np.float32))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class TimePairEmbedding(eqx.Module):
    r"""Embedding of (r, t): per variable a sinusoidal embedding, linear, SiLU, linear; summed over the variables.

    It stays in float32 also under bfloat16 compute: with the angles in bfloat16, du/dt would be inaccurate.

    **Arguments:**

    - `width` of the result; `size` of each sinusoidal embedding, even (256 in the paper's DiT).
    - `variables`: `end_duration` (default), `end_start`, `end_start_duration`, `duration`, or a function of your own.
    - `time_scale`: factor on the times before the sinusoidal embedding. 1 in the authors' MeanFlow code; in DiT, whose
      time is an integer step, about 1000, which makes du/dt less accurate.
    - `init`: for the weights; normal with standard deviation 0.02 in DiT.
    """

    hidden: tuple[Linear, ...]
    out: tuple[Linear, ...]
    variables: TimeVariables = eqx.field(static=True)
    size: int = eqx.field(static=True)
    time_scale: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        variables: TimeVariables = end_duration,
        size: int = 256,
        time_scale: float = 1.0,
        init: jax.nn.initializers.Initializer = normal(0.02),
        key: Key[Array, ""],
    ):
        check_sizes(width=width)
        check_finite("time_scale", time_scale)
        if size < 2 or size % 2:
            raise ValueError(f"size must be even and positive, got {size}")
        count = len(variables(jnp.zeros(()), jnp.ones(())))
        hidden_keys, out_keys = jr.split(key, (2, count))
        self.hidden = tuple(Linear(size, width, init=init, key=key) for key in hidden_keys)
        self.out = tuple(Linear(width, width, init=init, key=key) for key in out_keys)
        self.variables = variables
        self.size = size
        self.time_scale = float(time_scale)

    def __call__(self, r: TimeLike, t: TimeLike) -> Float[Array, " width"]:
        r, t = as_times(r, t, self.hidden[0].weight)

        def embed(value: Time, hidden: Linear, out: Linear) -> Float[Array, " width"]:
            return out(jax.nn.silu(hidden(sinusoidal_embedding(self.time_scale * value, self.size))))

        # Without a start value such as 0.0, which would make a float32 field float64 where float64 is enabled.
        return functools.reduce(operator.add, map(embed, self.variables(r, t), self.hidden, self.out))


class AbstractConditionEmbedding(eqx.Module):
    """A function that makes a vector of the condition of one example, which a network adds to the embedding of times.

    Subclass it for conditions of any structure, such as a dictionary of arrays, or tokens whose embeddings are
    averaged. Its floating-point arrays are parameters of the network.
    """

    @abc.abstractmethod
    def __call__(self, condition: Any) -> Float[Array, " width"]:
        """The vector of a condition.

        **Arguments:** `condition` a PyTree without batch axis, never None.

        **Returns:** a vector of the width for which the network asks: `condition_width` (by default `width`) of an
        `MLP`, the width of a `DiTSize`.
        """


class LabelEmbedding(AbstractConditionEmbedding):
    """A table with one row per label and one more for "no label".

    **Arguments:** `labels` number of labels; `width` of a row; `init` normal with standard deviation 0.02 as in DiT;
    `key`. If JAX traces the label, a label outside [0, labels] reads another row without an error, as in any lookup:
    check labels on the host.

    **Raises:** `ValueError` if `labels` or `width` is below 1; when called, unless the label is one integer of shape ()
    and, where its value is known, in [0, labels].
    """

    table: Float[Array, "labels+1 width"]

    def __init__(
        self,
        labels: int,
        width: int,
        *,
        init: jax.nn.initializers.Initializer = normal(0.02),
        key: Key[Array, ""],
    ):
        check_sizes(labels=labels, width=width)
        self.table = init(key, (labels + 1, width), jnp.float32)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.table.shape[0] - 1

    def __call__(self, label: Label) -> Float[Array, " width"]:
        value = on_host_if_known(label)
        is_array = isinstance(label, jax.Array | np.ndarray | np.generic)
        array: Any = label if is_array or value is None or value.dtype == object else value
        dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", None)
        if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.integer):
            found = described(array) if dtype is None else f"{dtype} of shape {shape}"
            raise ValueError(
                f"condition must be one integer label of shape () (functions are per example: jax.vmap makes batches), "
                f"got {found}"
            )
        if value is not None and not 0 <= value <= self.null_label:
            raise ValueError(f"condition must be a label in [0, {self.null_label}], got {value}")
        return self.table[label]


class VectorEmbedding(AbstractConditionEmbedding):
    """The embedding of a vector of numbers: linear, SiLU, linear, as of times. It is computed in float32 or better.

    The numbers should be of order 1: normalise what is measured in other units.

    **Arguments:** `size` how many numbers the vector has; `width` of the result; `init` for the weights, normal with
    standard deviation 0.02 as in DiT; `key`.

    **Raises:** `ValueError` if `size` or `width` is below 1; when called, unless the condition is one array of real
    numbers of shape (size,).
    """

    hidden: Linear
    out: Linear

    def __init__(
        self,
        size: int,
        width: int,
        *,
        init: jax.nn.initializers.Initializer = normal(0.02),
        key: Key[Array, ""],
    ):
        check_sizes(size=size, width=width)
        hidden_key, out_key = jr.split(key)
        self.hidden = Linear(size, width, init=init, key=hidden_key)
        self.out = Linear(width, width, init=init, key=out_key)

    def __call__(self, condition: Any) -> Float[Array, " width"]:
        size, is_array = self.hidden.weight.shape[0], isinstance(condition, jax.Array | np.ndarray)
        if not is_array or condition.shape != (size,) or jnp.issubdtype(condition.dtype, jnp.complexfloating):
            raise ValueError(
                f"condition must be one vector of shape ({size},) (functions are per example: jax.vmap makes batches), "
                f"got {described(condition)}"
            )
        is_real = jnp.issubdtype(condition.dtype, jnp.floating)
        vector = at_least_float32(condition) if is_real else jnp.asarray(condition, self.hidden.weight.dtype)
        return self.out(jax.nn.silu(self.hidden(vector)))


def as_embedding(
    condition: int | AbstractConditionEmbedding | None,
    width: int,
    *,
    init: jax.nn.initializers.Initializer = normal(0.02),
    key: Key[Array, ""],
) -> AbstractConditionEmbedding | None:
    """The embedding that the argument `condition` of a network stands for: an int is the size of a vector."""
    if condition is None or isinstance(condition, AbstractConditionEmbedding):
        return condition
    if isinstance(condition, int | np.integer):
        return VectorEmbedding(as_count("condition", condition), width, init=init, key=key)
    rule = "the size of a vector, an nn.AbstractConditionEmbedding, or None"
    raise ValueError(f"condition must be {rule}, got {type(condition).__name__}")


def as_argument(embedding: AbstractConditionEmbedding | None) -> int | AbstractConditionEmbedding | None:
    """The inverse of `as_embedding`: the argument `condition` that it makes this embedding of."""
    return embedding.hidden.weight.shape[0] if type(embedding) is VectorEmbedding else embedding


def embedded_condition(
    condition: Condition,
    label: LabelEmbedding | None,
    other: AbstractConditionEmbedding | None,
    width: int,
) -> Float[Array, " width"] | None:
    """The condition embedded by `label` or by `other`, whichever is given; None if neither is.

    **Raises:** `ValueError` if there is an embedding but no condition, or a condition but no embedding, or if the
    result is not a vector of `width`.
    """
    embedding = label if other is None else other
    if embedding is None:
        if condition is not None:
            rule = "None for a field made without labels and condition"
            raise ValueError(f"condition must be {rule}, got {described(condition)}")
        return None
    if condition is None:
        rule = "a label for a field with labels" if other is None else f"given for a field with {type(other).__name__}"
        raise ValueError(f"condition must be {rule}, got None")
    vector = embedding(condition)
    if vector.shape != (width,):
        raise ValueError(
            f"condition must be embedded as shape ({width},), got {vector.shape} of {type(embedding).__name__}"
        )
    return vector


def check_one_embedding(label: LabelEmbedding | None, condition: AbstractConditionEmbedding | None) -> None:
    """Raises a `ValueError` if both embeddings are given."""
    if label is not None and condition is not None:
        rule = "labels must be None with a condition, whose embedding may hold a LabelEmbedding"
        raise ValueError(f"{rule}; got {label.null_label}")


class ConditionEmbedding(eqx.Module):
    """The embedding that modulates a network: that of (r, t), plus that of the label or of another condition.

    **Arguments:** `times`; `label` or None for a network without labels; `condition` the embedding of another
    condition, or None. At most one of the latter two.

    **Raises:** `ValueError` if both are given; when called, if the condition does not fit them.
    """

    times: TimePairEmbedding
    label: LabelEmbedding | None = None
    condition: AbstractConditionEmbedding | None = None

    def __check_init__(self):
        check_one_embedding(self.label, self.condition)

    @property
    def null_label(self) -> int:
        """The label that means "no label".

        **Raises:** `ValueError` without labels.
        """
        if self.label is None:
            raise ValueError("labels must be given for a null label to exist, got None")
        return self.label.null_label

    def __call__(self, r: TimeLike, t: TimeLike, condition: Condition) -> Float[Array, " width"]:
        embedded = self.times(r, t)
        added = embedded_condition(condition, self.label, self.condition, embedded.shape[0])
        return embedded if added is None else embedded + added


def sinusoidal_positions(height: int, width: int, size: int) -> Float[np.ndarray, "tokens size"]:
    r"""Fixed 2-D position embedding, tokens row by row.

    The first half of the features encodes the column, the second the row; each half holds size/4 sines, then size/4
    cosines, of position x 10000^(-k / (size/4)). A constant, not a parameter.

    **Arguments:** `height`, `width` of the grid of tokens; `size` a positive multiple of 4.
    """
    check_sizes(height=height, width=width)
    if size < 4 or size % 4:
        raise ValueError(f"size must be a positive multiple of 4, got {size}")
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    frequencies = 10_000.0 ** (-np.arange(size // 4) / (size // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    return np.concatenate([encode(columns), encode(rows)], axis=-1).astype(np.float32)


def sinusoidal_line_positions(length: int, size: int) -> Float[np.ndarray, "tokens size"]:
    r"""Fixed 1-D position embedding: size/2 sines, then size/2 cosines, of position x 10000^(-k / (size/2)). A
    constant, not a parameter.

    **Arguments:** `length` number of tokens; `size` a positive multiple of 2.
    """
    check_sizes(length=length)
    if size < 2 or size % 2:
        raise ValueError(f"size must be a positive multiple of 2, got {size}")
    angles = np.arange(length).reshape(-1, 1) * 10_000.0 ** (-np.arange(size // 2) / (size // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
