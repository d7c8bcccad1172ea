r"""Rotary positions, and the self-attention that uses them.

Neighbouring features of a head, (2k, 2k + 1), are a complex number, which is rotated by an angle proportional to the
position:

$$x_{2k} + i\, x_{2k+1} \;\leftarrow\; e^{i p \theta_k} (x_{2k} + i\, x_{2k+1}), \qquad \theta_k = b^{-2k / d}$$

with d the size of a head. The product of a query and a key rotated this way depends on the difference of their
positions alone.

Source: RoFormer: Enhanced Transformer with Rotary Position Embedding, Su, Lu, Pan, Murtadha, Wen, Liu, 2021, arXiv
2104.09864.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._custom_types import at_least_float32
from .._validate import check_counts
from ._attention import AbstractAttention, head_size, XLAAttention
from ._linear import Linear
from ._norm import RMSNorm


def rotary_line_angles(length: int, size: int, *, base: float = 10_000.0) -> Float[np.ndarray, "tokens pairs"]:
    r"""The angles $p\, b^{-2k / d}$ of positions p = 0, 1, ... on a line: a constant, not a parameter.

    **Arguments:** `length` number of tokens; `size` of a head, the d above, a positive multiple of 2; `base` the b.
    """
    check_counts(length=length)
    return _angles(np.arange(length), _checked(size, 2), base)


def rotary_angles(height: int, width: int, size: int, *, base: float = 10_000.0) -> Float[np.ndarray, "tokens pairs"]:
    """The angles of positions in a grid, tokens row by row: a constant, not a parameter.

    The first half of a head is rotated by the row, the second half by the column, each as on a line with d = `size` /
    2.

    **Arguments:** `height`, `width` of the grid of tokens; `size` of a head, a positive multiple of 4; `base` as above.
    """
    check_counts(height=height, width=width)
    half = _checked(size, 4) // 2
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([_angles(positions.ravel(), half, base) for positions in (rows, columns)], axis=-1)


def rotate(
    x: Float[Array, "tokens heads size"], angles: Float[np.ndarray, "tokens pairs"]
) -> Float[Array, "tokens heads size"]:
    """Every pair of neighbouring features, rotated by its angle, in float32 or better.

    **Arguments:** `x` queries or keys; `angles` by `rotary_line_angles` or `rotary_angles`, or your own: a token
    whose angles are zero stays as it is.
    """
    wide = at_least_float32(x)
    real, imaginary = wide[..., 0::2], wide[..., 1::2]
    cos, sin = (jnp.asarray(part, wide.dtype)[:, None] for part in (np.cos(angles), np.sin(angles)))
    rotated = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _checked(size: int, multiple: int) -> int:
    if size < multiple or size % multiple:
        raise ValueError(f"size must be a positive multiple of {multiple}, got {size}")
    return size


def _angles(positions: np.ndarray, size: int, base: float) -> Float[np.ndarray, "tokens pairs"]:
    return positions[:, None] * base ** (-2 * np.arange(size // 2) / size)


class RotarySelfAttention(eqx.Module):
    """Multi-head self-attention with rotary positions and normalised queries and keys. Its four matrices are separate
    and have no biases. Its output is multiplied by a `gate`, if given.

    In every head, one `RMSNorm` normalises the queries and another the keys. Then both are rotated.

    **Arguments:** `width` of the tokens, a multiple of 2 `heads`; `init` for the matrices; `attention` an
    `AbstractAttention`; `key`.

    **Raises:** `ValueError` unless `width` and `heads` are >= 1 and `width` is a multiple of 2 `heads`.
    """

    queries: Linear
    keys: Linear
    values: Linear
    out: Linear
    query_norm: RMSNorm
    key_norm: RMSNorm
    attention: AbstractAttention
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        init: jax.nn.initializers.Initializer = jax.nn.initializers.xavier_uniform(),
        attention: AbstractAttention = XLAAttention(),
        key: Key[Array, ""],
    ):
        size = head_size(width, heads)
        if size % 2:
            raise ValueError(f"width must give heads of even size (rotary positions), got width {width}, heads {heads}")
        self.queries, self.keys, self.values, self.out = (
            Linear(width, width, bias=False, init=init, key=key) for key in jr.split(key, 4)
        )
        self.query_norm, self.key_norm = RMSNorm(size), RMSNorm(size)
        self.attention = attention
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        angles: Float[np.ndarray, "tokens pairs"],
        gate: Float[Array, " width"] | None = None,
    ) -> Float[Array, "tokens width"]:
        """**Arguments:** `x` tokens; `angles` as for `rotate`; `gate`."""
        query, key, value = (
            layer(x).reshape(x.shape[0], self.heads, -1) for layer in (self.queries, self.keys, self.values)
        )
        query, key = rotate(self.query_norm(query), angles), rotate(self.key_norm(key), angles)
        return self.out(self.attention(query, key, value).reshape(x.shape), gate)
