"""The CIFAR-10 network: a state dict of torch, named as in EDM's code.

    map_layer0   map_layer1   map_augment      the embedding
    enc.32x32_conv   enc.32x32_block0 ...   enc.16x16_down   ...   dec.8x8_in0   ...   dec.16x16_up   ...
    dec.32x32_aux_norm   dec.32x32_aux_conv
    in each block: norm0 conv0 affine norm1 conv1 [skip] [norm2 qkv proj]

Linear weights are (out, in) in torch. The 3C outputs of qkv hold all of q, then all of k, then all of v: the MeanFlow
authors use EDM's network with another attention, since in EDM's own q, k and v of each channel alternate. The two
orders have the same shapes; the source for the authors' order is two copies of their code on GitHub, which keep EDM's
version as a comment. Resampling blocks also hold their filter, which is not a parameter: it must equal that of
`mf_eqx.UNet`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped

from .._foreign import fill, Origin
from .._leaves import leaves
from .._model import UNet
from .._validate import check_kind
from ..nn import end_duration

_Shape: TypeAlias = tuple[int, ...]
_Rule: TypeAlias = Callable[[_Shape], tuple[_Shape, Callable[[np.ndarray], np.ndarray]]]
"""From the shape of an array in `mf_eqx.UNet` to the shape of the tensor, and the conversion of the tensor to the
array."""

_FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def fill_unet(
    field: UNet, tensors: Mapping[str, Shaped[np.ndarray, "..."]], path: str | Path, *, alternating: bool = False
) -> UNet:
    """`field` with the weights of a state dict in EDM's naming.

    **Arguments:** `field` without labels; its structure is used, its values are replaced; `tensors` by their names,
    without the prefix of the average (`net_ema.` and so on); `path` of the file, for error messages; `alternating` True
    for networks of EDM itself, in which the outputs of qkv alternate between q, k and v.

    **Raises:** `ValueError` that names every tensor which is missing, unexpected, of another shape, or not finite, and
    for a resampling filter other than (1, 3, 3, 1).
    """
    check_kind("field", field, UNet)
    embedding = field.embedding
    if any(part is not None for part in (embedding.label, embedding.condition, embedding.guidance)):
        raise ValueError("field must have no labels, no condition and no guidance, as the released network has none")
    if not alternating and embedding.variables is not end_duration:
        raise ValueError(f"field must embed (t, t - r), as the released network does, got {embedding.variables}")
    filters = [name for name in tensors if name.endswith(".resample_filter")]
    for name in filters:
        if tensors[name].shape != (1, 1, 4, 4) or not np.allclose(tensors[name], _FILTER, atol=1e-6):
            raise ValueError(f"{path}: {name} must be the filter (1, 3, 3, 1) in two dimensions, got another")
    return fill(field, dict(_origins(field, alternating)), tensors, path, ignored=filters)


def _same(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    return shape, lambda array: array


def _transposed(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    return shape[::-1], np.transpose


def _channels(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    """The bias of a convolution."""
    return shape[:1], lambda bias: bias[:, None, None]


def _pointwise(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    """The weight of a 1x1 convolution, which is a linear layer in `mf_eqx.UNet`."""
    return (*shape[::-1], 1, 1), lambda weight: weight[..., 0, 0].T


def _alternating_weight(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    return (*shape[::-1], 1, 1), lambda weight: _deinterleaved(weight[..., 0, 0]).T


def _alternating_bias(shape: _Shape) -> tuple[_Shape, Callable[[np.ndarray], np.ndarray]]:
    return shape, _deinterleaved


def _deinterleaved(rows: np.ndarray) -> np.ndarray:
    """Rows of all of q, then all of k, then all of v, from rows that alternate between q, k and v."""
    return rows.reshape(-1, 3, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


_BLOCK: dict[str, tuple[str, _Rule, _Rule]] = {
    "norm_1": ("norm0", _same, _same),
    "conv_1": ("conv0", _same, _channels),
    "condition": ("affine", _transposed, _same),
    "norm_2": ("norm1", _same, _same),
    "conv_2": ("conv1", _same, _channels),
    "skip": ("skip", _same, _channels),
    "attention.norm": ("norm2", _same, _same),
    "attention.attention.qkv": ("qkv", _pointwise, _same),
    "attention.attention.out": ("proj", _pointwise, _same),
}
"""The name of each layer in `mf_eqx.UNet`, its name in EDM's code, and the rules for its weight and its bias."""
_ALTERNATING = {**_BLOCK, "attention.attention.qkv": ("qkv", _alternating_weight, _alternating_bias)}


def _origins(field: UNet, alternating: bool) -> Iterator[tuple[str, Origin]]:
    rows, names = field.data_shape[1], _block_names(field)
    inner = _ALTERNATING if alternating else _BLOCK
    outer: dict[str, tuple[str, _Rule, _Rule]] = {
        "embedding.hidden": ("map_layer0", _transposed, _same),
        "embedding.out": ("map_layer1", _transposed, _same),
        "first": (f"enc.{rows}x{rows}_conv", _same, _channels),
        "norm": (f"dec.{rows}x{rows}_aux_norm", _same, _same),
        "last": (f"dec.{rows}x{rows}_aux_conv", _same, _channels),
    }
    for path, leaf in leaves(field).items():
        if path == ".embedding.augmentation":
            yield path, Origin(("map_augment.weight",), leaf.shape[::-1], np.transpose)
            continue
        layer, kind = path[1:].rsplit(".", 1)
        if match := re.fullmatch(r"(\w+\[\d+\])\.blocks\.(.+)", layer):
            edm_name, *rules = inner[match[2]]
            shape, convert = rules[kind == "bias"](leaf.shape[1:])
            tensors = tuple(f"{block}.{edm_name}.{kind}" for block in names[match[1]])
            yield path, Origin(tensors, shape, _stacked(convert))
        else:
            edm_name, *rules = outer[layer]
            yield path, Origin((f"{edm_name}.{kind}",), *rules[kind == "bias"](leaf.shape))


def _stacked(convert: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *blocks: np.stack([convert(block) for block in blocks])


def _block_names(field: UNet) -> dict[str, tuple[str, ...]]:
    """The names in EDM's code of the blocks in each stack of `mf_eqx.UNet`."""
    rows, names = field.data_shape[1], {}
    for part, side, stacks in (("down", "enc", field.down), ("middle", "dec", field.middle), ("up", "dec", field.up)):
        number = 0
        for position, stack in enumerate(stacks):
            block_names = []
            for _ in range(stack.depth):
                if (factor := stack.blocks.plan.factor) != 1:
                    rows, number = int(rows * factor), 0
                    block_names.append(f"{side}.{rows}x{rows}_{'down' if factor < 1 else 'up'}")
                else:
                    block_names.append(f"{side}.{rows}x{rows}_{'in' if part == 'middle' else 'block'}{number}")
                    number += 1
            names[f"{part}[{position}]"] = tuple(block_names)
    return names
