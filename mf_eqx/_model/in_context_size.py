"""The sizes of in-context DiTs: those of improved MeanFlow for latents, those of pixel MeanFlow, and your own."""

from typing import NamedTuple

from .._validate import as_count, check_data_shape, check_kind
from ..nn._attention import head_size
from . import patches


class InContextDiTSize(NamedTuple):
    """The size of an in-context DiT: `depth` blocks, of which the last `head_depth` are the head's; tokens of `width`;
    attention `heads`; `patch`, the side of a square of pixels or the number of steps in a piece of a sequence. A
    velocity head has `head_depth` blocks more. `mlp`, the width inside the MLPs, is 8/3 of `width` by default.

    Three further options are those of pixel MeanFlow. With `bottleneck`, a linear layer of so many outputs comes before
    the one that makes tokens of patches. With `learned_positions`, a learned vector is added to every token of the
    sequence, the condition's included. With `grid`, for images, the rotary positions are the rows and columns of the
    patches, and the tokens in front of them have none.
    """

    depth: int
    width: int
    heads: int
    patch: int
    head_depth: int = 8
    mlp: int | None = None
    bottleneck: int | None = None
    learned_positions: bool = False
    grid: bool = False


IMF_B2 = InContextDiTSize(depth=12, width=768, heads=12, patch=2)
IMF_M2 = InContextDiTSize(depth=24, width=768, heads=12, patch=2)
IMF_L2 = InContextDiTSize(depth=32, width=1024, heads=16, patch=2)
IMF_XL2 = InContextDiTSize(depth=48, width=1024, heads=16, patch=2)

_PMF = InContextDiTSize(16, 768, 12, 16, bottleneck=128, learned_positions=True, grid=True)
PMF_B16 = _PMF
PMF_L16 = _PMF._replace(depth=32, width=1024, heads=16)
PMF_H16 = _PMF._replace(depth=48, width=1280, heads=16, bottleneck=256)


def as_size(data_shape: tuple[int, ...], size: InContextDiTSize) -> InContextDiTSize:
    """`size` of numbers of Python. **Raises:** `ValueError` unless they fit one another and data of this shape."""
    check_data_shape(data_shape)
    check_kind("size", size, InContextDiTSize)
    numbers = {name: value for name, value in size._asdict().items() if name not in ("learned_positions", "grid")}
    optional = {"mlp", "bottleneck"}
    counts = {
        name: as_count(name, value) for name, value in numbers.items() if not (name in optional and value is None)
    }
    size = size._replace(**counts)
    patches.check_patch(data_shape, size.patch)
    if size.head_depth >= size.depth:
        raise ValueError(f"head_depth must be below the depth {size.depth}, got {size.head_depth}")
    if size.grid and len(data_shape) != 3:
        raise ValueError(f"grid must be False for sequences, got {size.grid} for data_shape {data_shape}")
    if size.grid and head_size(size.width, size.heads) % 4:
        rule = "width must give heads whose size is a multiple of 4 (rotary positions in a grid)"
        raise ValueError(f"{rule}, got width {size.width}, heads {size.heads}")
    return size
