"""The size of a U-Net, and the blocks on its way down and on its way up that follow from it."""

from collections.abc import Iterator
from typing import NamedTuple

from .._validate import as_count, as_tuple, check_counts, check_data_shape


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


def as_size(data_shape: tuple[int, ...], size: UNetSize) -> UNetSize:
    """`size` of tuples and of numbers of Python.

    **Raises:** `ValueError` unless they are counts, and data of this shape can be resampled to all resolutions.
    """
    check_data_shape(data_shape)
    levels = {name: as_tuple(name, getattr(size, name), (16,)) for name in ("multipliers", "attention")}
    check_counts(**levels)
    levels = {name: tuple(map(int, values)) for name, values in levels.items()}
    size = size._replace(width=as_count("width", size.width), blocks=as_count("blocks", size.blocks), **levels)
    if size.width % 4:
        raise ValueError(f"width must be a positive multiple of 4, got {size.width}")
    if not size.multipliers:
        raise ValueError(f"multipliers must be at least one number >= 1, got {size.multipliers}")
    rows = [data_shape[1] >> level for level in range(len(size.multipliers))]
    if unknown := [number for number in size.attention if number not in rows]:
        raise ValueError(f"attention must be among the resolutions {rows} of data_shape {data_shape}, got {unknown}")
    multiple = 2 ** (len(rows) - 1)
    if any(side % multiple for side in data_shape[1:]):
        rule = f"multipliers must be fewer, or the sides of data_shape divisible by {multiple}"
        raise ValueError(f"{rule}, got {len(rows)} multipliers and {data_shape}")
    return size


class BlockPlan(NamedTuple):
    """One block: its input channels, the channels from the way down that are concatenated with them, its output
    channels, whether attention follows, and the factor on the size: 1, 2 or 1/2."""

    inputs: int
    down_channels: int
    outputs: int
    attention: bool = False
    factor: float = 1


def down_plans(size: UNetSize, rows: int) -> Iterator[BlockPlan]:
    """The blocks on the way down, from data with this many rows (of an image) or steps (of a sequence)."""
    channels = size.width
    for level, multiplier in enumerate(size.multipliers):
        if level > 0:
            yield BlockPlan(channels, 0, channels, factor=0.5)
        for _ in range(size.blocks):
            outputs = multiplier * size.width
            yield BlockPlan(channels, 0, outputs, (rows >> level) in size.attention)
            channels = outputs


def up_plans(size: UNetSize, rows: int) -> Iterator[BlockPlan]:
    """The blocks on the way up, to data with this many rows or steps."""
    down_channels = [size.width, *(plan.outputs for plan in down_plans(size, rows))]
    channels = down_channels[-1]
    for level, multiplier in reversed(list(enumerate(size.multipliers))):
        if level < len(size.multipliers) - 1:
            yield BlockPlan(channels, 0, channels, factor=2)
        for number in range(size.blocks + 1):
            outputs, last = multiplier * size.width, number == size.blocks
            yield BlockPlan(channels, down_channels.pop(), outputs, last and (rows >> level) in size.attention)
            channels = outputs
