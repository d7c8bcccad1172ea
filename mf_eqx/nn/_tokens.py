r"""Conditions as tokens: in-context conditioning.

A transformer may take its condition as tokens in front of those of the data, in place of modulations of every block.
For a condition with one embedding, such as a label or a number, `ConditionTokens` makes n tokens

$$w_i + e(c), \qquad i = 1, \dots, n,$$

with learned vectors $w_i$. For conditions that are sequences themselves, such as the tokens of a text, or that have
several parts, subclass `AbstractConditionTokens`.

Source: Scalable Diffusion Models with Transformers, Peebles, Xie, 2023, arXiv 2212.09748 ("in-context conditioning");
several tokens for each condition as in Improved Mean Flows, Geng et al., 2025, arXiv 2512.02012.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar
from .._validate import check_counts
from ._condition_embedding import AbstractConditionEmbedding
from ._linear import Linear
from ._time_embedding import check_even_size, sinusoidal_embedding


class AbstractConditionTokens(eqx.Module):
    """A function of the condition of one example. A network puts the tokens that it returns in front of those of the
    data.

    Subclass it for conditions of any structure. Its floating-point arrays are parameters of the network.
    """

    @abc.abstractmethod
    def __call__(self, condition: Any) -> Float[Array, "tokens width"]:
        """The tokens of a condition.

        **Arguments:** `condition` a PyTree without batch axis, never None.

        **Returns:** tokens of the network's width. Their number may depend on the shapes in `condition`, but not on
        values.
        """


class ConditionTokens(AbstractConditionTokens):
    """`count` tokens of one condition: the sum of its embedding and a learned vector for each token.

    **Arguments:** `count` number of tokens; `width` of a token; `embedding` of the condition, a vector of this width;
    `key`. The vectors start as normal numbers with standard deviation 1 / sqrt(width).

    **Raises:** `ValueError` if `count` or `width` is below 1; when called, if the embedding has another width.
    """

    vectors: Float[Array, "tokens width"]
    embedding: AbstractConditionEmbedding

    def __init__(self, count: int, width: int, embedding: AbstractConditionEmbedding, *, key: Key[Array, ""]):
        check_counts(count=count, width=width)
        self.vectors = width**-0.5 * jr.normal(key, (count, width), jnp.float32)
        self.embedding = embedding

    def __call__(self, condition: Any) -> Float[Array, "tokens width"]:
        vector = self.embedding(condition)
        if vector.shape != (wanted := self.vectors.shape[1:]):
            raise ValueError(
                f"condition must be embedded as shape {wanted}, got {vector.shape} of {type(self.embedding).__name__}"
            )
        return self.vectors + vector


class ScalarEmbedding(AbstractConditionEmbedding):
    """The embedding of one number, such as a time or a guidance scale: `sinusoidal_embedding`, linear, SiLU, linear.
    It is computed in float32 or better.

    **Arguments:** `width` of the result; `size` of the sinusoidal embedding, even; `init` for the weights, normal with
    standard deviation 0.02 as in DiT; `key`.

    **Raises:** `ValueError` if `width` is below 1, or `size` not even and positive; when called, unless the condition
    is one number.
    """

    hidden: Linear
    out: Linear

    def __init__(
        self,
        width: int,
        *,
        size: int = 256,
        init: jax.nn.initializers.Initializer = normal(0.02),
        key: Key[Array, ""],
    ):
        check_even_size(size)
        hidden_key, out_key = jr.split(key)
        self.hidden = Linear(size, width, init=init, key=hidden_key)
        self.out = Linear(width, width, init=init, key=out_key)

    def __call__(self, condition: Any) -> Float[Array, " width"]:
        number = as_scalar("condition", condition, self.hidden.weight)
        return self.out(jax.nn.silu(self.hidden(sinusoidal_embedding(number, self.hidden.weight.shape[0]))))
