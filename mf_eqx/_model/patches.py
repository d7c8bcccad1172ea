"""Images and sequences as patches, which are the tokens of transformers."""

import math

from jaxtyping import Array, Float


def grid(data_shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    """How many patches there are along each side."""
    return tuple(side // patch for side in data_shape[1:])


def cut(z: Float[Array, "channels *sides"], patch: int) -> Float[Array, "patches values"]:
    """Patches row by row, each as its values in the order (row, column, channel)."""
    numbers = grid(z.shape, patch)
    parts = z.reshape(z.shape[0], *(size for number in numbers for size in (number, patch)))
    return parts.transpose(_axes(len(numbers))).reshape(math.prod(numbers), -1)


def join(
    patches: Float[Array, "patches values"], data_shape: tuple[int, ...], patch: int
) -> Float[Array, "channels *sides"]:
    """The image or sequence of `data_shape` of which these are the patches."""
    numbers = grid(data_shape, patch)
    parts = patches.reshape(*numbers, *[patch] * len(numbers), data_shape[0])
    axes = _axes(len(numbers))
    return parts.transpose([axes.index(axis) for axis in range(parts.ndim)]).reshape(data_shape)


def _axes(sides: int) -> list[int]:
    """Where the axes of patches come from in (channels, grid, patch, grid, patch): those of the grid, those within a
    patch, and the channels last."""
    return [*range(1, 2 * sides, 2), *range(2, 2 * sides + 1, 2), 0]


def check_patch(data_shape: tuple[int, ...], patch: int) -> None:
    """Raises a `ValueError` unless the sides are multiples of the patch."""
    if any(side % patch for side in data_shape[1:]):
        raise ValueError(f"patch must divide the sides of data_shape {data_shape}, got {patch}")
