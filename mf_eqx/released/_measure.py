"""The sizes of released networks, from the names and shapes of their tensors. Only the number of attention heads cannot
be derived from these."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .._model import DIT_B2, DIT_L2, DIT_S2, DIT_XL2, DiTSize, UNetSize
from ._dit import flax_name, LAYERS
from ._msgpack import flat

_HEADS = {size.width: size.heads for size in (DIT_S2, DIT_B2, DIT_L2, DIT_XL2)}
"""The number of attention heads in the published network of each width."""


def measure_dit(tensors: Mapping[str, Any], path: str | Path, *, heads: int | None = None) -> tuple[int, DiTSize, int]:
    """Channels, size and number of labels of a DiT in a tree of the authors' JAX code.

    **Arguments:** `tensors` as for `fill_dit`; `path` of the file, for error messages; `heads` the number of attention
    heads, None for that of the published network of this width.

    **Raises:** `ValueError` if tensors that determine the size are missing, or no published network has this width.
    """
    by_name = flat(tensors, path)
    patch, _, channels, width = shape_of(by_name, flax_name(LAYERS["patches"], "weight"), 4, path)
    rows, _ = shape_of(by_name, flax_name(LAYERS["embedding.label"], "table"), 2, path)
    depth = count(by_name, r"net/blocks/layers_(\d+)/.*")
    return channels, DiTSize(depth, width, heads_of(width, heads, path), patch), rows - 1


def measure_sit(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], path: str | Path, *, heads: int | None = None
) -> tuple[int, DiTSize, int]:
    """Channels, size and number of labels of a SiT.

    **Arguments:** `tensors` as for `fill_sit`; `path`, `heads` as for `measure_dit`.

    **Raises:** as `measure_dit`.
    """
    width, channels, patch, _ = shape_of(tensors, f"{LAYERS['patches']}.weight", 4, path)
    rows, _ = shape_of(tensors, f"{LAYERS['embedding.label']}.weight", 2, path)
    depth = count(tensors, r"blocks\.(\d+)\..*")
    return channels, DiTSize(depth, width, heads_of(width, heads, path), patch), rows - 1


def measure_unet(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], path: str | Path
) -> tuple[tuple[int, int, int], UNetSize, int]:
    """Shape of the (square) images, size, and number of augmentation parameters of a U-Net in EDM's naming.

    **Arguments:** `tensors` as for `fill_unet`; `path` of the file, for error messages.

    **Raises:** `ValueError` if tensors that determine the size are missing.
    """
    levels = sorted(numbers(tensors, r"enc\.(\d+)x\1_.*"), reverse=True) or [0]
    rows = levels[0]
    width, channels, _, _ = shape_of(tensors, f"enc.{rows}x{rows}_conv.weight", 4, path)
    outputs = [shape_of(tensors, f"{_block(level)}.conv1.weight", 4, path)[0] for level in levels]
    size = UNetSize(
        width,
        multipliers=tuple(output // width for output in outputs),
        blocks=count(tensors, rf"enc\.{rows}x{rows}_block(\d+)\..*"),
        attention=tuple(level for level in levels if _has(tensors, f"{_block(level)}.qkv")),
    )
    augmentation = shape_of(tensors, "map_augment.weight", 2, path)[1] if _has(tensors, "map_augment") else 0
    return (channels, rows, rows), size, augmentation


def _block(rows: int) -> str:
    return f"enc.{rows}x{rows}_block0"


def _has(tensors: Mapping[str, Any], layer: str) -> bool:
    return any(name.startswith(f"{layer}.") for name in tensors)


def shape_of(tensors: Mapping[str, np.ndarray], name: str, axes: int, path: str | Path) -> tuple[int, ...]:
    """The shape of a tensor that determines the size; it must be there, with so many axes."""
    if name not in tensors:
        raise ValueError(f"{path}: must hold the tensors of the network, but it lacks {name}")
    shape = tensors[name].shape
    if len(shape) != axes or min(shape) < 1:
        raise ValueError(f"{path}: {name} must have {axes} axes, none of them empty, got shape {shape}")
    return shape


def numbers(tensors: Mapping[str, Any], pattern: str) -> set[int]:
    """The different numbers that the one group of `pattern` finds in the names that match all of it."""
    return {int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name))}


def count(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many `numbers` there are, but at least 1, as a depth must be: the first missing tensor is named later."""
    return max(len(numbers(tensors, pattern)), 1)


def heads_of(width: int, heads: int | None, path: str | Path, published: Mapping[int, int] = _HEADS) -> int:
    """The number of attention heads: `heads` if given, else that of the published network of this width."""
    number = published.get(width) if heads is None else heads
    if number is None:
        raise ValueError(f"{path}: heads must be given, as no published network has width {width}, got none")
    if number < 1 or width % number:
        raise ValueError(f"{path}: heads must divide the width {width}, got {number}")
    return number
