"""Embeddings of labels and of other conditions, and how a network adds one to the embedding of times.

A label reads its row of a table. A vector of numbers goes through a two-layer MLP. Conditions of any other structure
have a subclass of `AbstractConditionEmbedding`. The result is one vector, and `ConditionEmbedding` computes

    c = e(r, t) + e(condition)

which modulates the network; without a condition, c is the embedding of the times alone.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Key

from .._custom_types import at_least_float32, Condition, Label, TimeLike
from .._validate import as_count, check_counts, described, on_host_if_known
from ._linear import Linear
from ._time_embedding import TimePairEmbedding


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
    `key`. If JAX traces the label, one outside [0, labels] gives NaN, where an ordinary lookup would return another
    row: check labels on the host, where an error can name them.

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
        check_counts(labels=labels, width=width)
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
        return self.table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


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
        check_counts(size=size, width=width)
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


def null_label_of(embedding: LabelEmbedding | None) -> int:
    """The label that means "no label". **Raises:** `ValueError` without labels."""
    if embedding is None:
        raise ValueError("labels must be given for a null label to exist, got None")
    return embedding.null_label


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
        return null_label_of(self.label)

    def __call__(self, r: TimeLike, t: TimeLike, condition: Condition) -> Float[Array, " width"]:
        embedded = self.times(r, t)
        added = embedded_condition(condition, self.label, self.condition, embedded.shape[0])
        return embedded if added is None else embedded + added
