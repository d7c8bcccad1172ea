"""Sinusoidal position embeddings: constants that a network adds to its tokens, so that attention can tell them apart.

For rotations of queries and keys by their positions, see `rotary_angles`.
"""

import numpy as np
from jaxtyping import Float

from .._validate import check_counts


def sinusoidal_positions(height: int, width: int, size: int) -> Float[np.ndarray, "tokens size"]:
    r"""Fixed 2-D position embedding, tokens row by row.

    The first half of the features encodes the column, the second the row; each half holds size/4 sines, then size/4
    cosines, of position x 10000^(-k / (size/4)). A constant, not a parameter.

    **Arguments:** `height`, `width` of the grid of tokens; `size` a positive multiple of 4.
    """
    check_counts(height=height, width=width)
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
    check_counts(length=length)
    if size < 2 or size % 2:
        raise ValueError(f"size must be a positive multiple of 2, got {size}")
    angles = np.arange(length).reshape(-1, 1) * 10_000.0 ** (-np.arange(size // 2) / (size // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
