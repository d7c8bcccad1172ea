"""The ImageNet network of the MeanFlow authors' JAX code: a tree of parameters, named as in DiT's code.

    net/x_embedder/proj/kernel                                  (patch, patch, channels, width)
    net/{t,h}_embedder/mlp/layers_{0,2}/_flax_linear/kernel     embeddings of t and of h = t - r
    net/y_embedder/embedding_table/_flax_embedding/embedding    (labels + 1, width)
    net/blocks/layers_0/attn/qkv/_flax_linear/kernel            (width, 3 width): q, k, v; each of them split into heads
    net/blocks/layers_0/{attn/proj, mlp/fc1, mlp/fc2, adaLN_modulation/layers_1}/_flax_linear/kernel
    net/final_layer/{linear, adaLN_modulation/layers_1}/_flax_linear/kernel

with a `bias` beside each `kernel`. Kernels are (in, out), as in `mf_eqx`. A patch is flattened as (row, column,
channel) at the input and at the output, in both codes, so that its kernel is only reshaped; images are (height, width,
channels) in the authors' code. The position embedding is not stored. Apart from the wrappers, the names are those of
the torch code, so that one table serves both (`LAYERS`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .._foreign import fill, Origin
from .._leaves import leaves
from .._model import DiT
from .._validate import check_kind
from ..nn import end_duration
from ._msgpack import flat

Shape: TypeAlias = tuple[int, ...]
Convert: TypeAlias = Callable[[np.ndarray], np.ndarray]

LAYERS = {
    "patches": "x_embedder.proj",
    "embedding.times.hidden[0]": "t_embedder.mlp.0",
    "embedding.times.out[0]": "t_embedder.mlp.2",
    "embedding.times.hidden[1]": "h_embedder.mlp.0",
    "embedding.times.out[1]": "h_embedder.mlp.2",
    "embedding.label": "y_embedder.embedding_table",
    "stack.blocks.attention.qkv": "blocks.*.attn.qkv",
    "stack.blocks.attention.out": "blocks.*.attn.proj",
    "stack.blocks.hidden": "blocks.*.mlp.fc1",
    "stack.blocks.out": "blocks.*.mlp.fc2",
    "stack.blocks.modulation": "blocks.*.adaLN_modulation.1",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
"""The name of each layer in `mf_eqx.DiT`, and its name in DiT's code."""


def fill_dit(field: DiT, tensors: Mapping[str, Any], path: str | Path) -> DiT:
    """`field` with the weights of a tree of the authors' JAX code.

    **Arguments:** `field` with labels, which embeds (t, t - r); its structure is used, its values are replaced;
    `tensors` the result of `read_flax` for `params` or `ema_params`, nested or by names joined with slashes; `path` of
    the file, for error messages.

    **Raises:** `ValueError` that names every tensor which is missing, unexpected, of another shape, or not finite.
    """
    check_is_as_released(field)
    return fill(field, dict(origins(field, flax_name, _converted)), flat(tensors, path), path)


def check_is_as_released(field: DiT) -> None:
    """Refuses a field whose inputs differ from those of the released networks."""
    check_kind("field", field, DiT)
    if len(field.data_shape) != 3:
        raise ValueError(f"field must be one of images, as the released network is, got data_shape {field.data_shape}")
    if field.guidance is not None or field.stack.blocks.attention.query_norm is not None:
        raise ValueError("field must have no guidance and no qk_norm, as the released network has none")
    times = field.embedding.times
    if times.variables is not end_duration or times.time_scale != 1:
        raise ValueError(f"field must embed (t, t - r) at scale 1, got {times.variables} at {times.time_scale}")
    if field.embedding.label is None:
        raise ValueError("field must have labels, as the released network has, got none")


def origins(
    field: DiT, name: Callable[[str, str], str], converted: Callable[[DiT, str, Shape], tuple[Shape, Convert]]
) -> Iterator[tuple[str, Origin]]:
    """The path and the `Origin` of every array of a DiT.

    **Arguments:** `field`; `name` a function from the layer's name in DiT's code and the kind of an array here
    ("weight", "bias", "table") to the name of the tensor; `converted` a function from the field, the array's name here
    and its shape in one block to the shape of the tensor and the conversion of the tensor to the array.
    """
    for path, leaf in leaves(field).items():
        layer, kind = path[1:].rsplit(".", 1)
        tensor = name(LAYERS[layer], kind)
        if layer.startswith("stack."):
            shape, convert = converted(field, path[1:], leaf.shape[1:])
            blocks = tuple(tensor.replace("*", str(i)) for i in range(field.stack.depth))
            yield path, Origin(blocks, shape, _stacked(convert))
        else:
            yield path, Origin((tensor,), *converted(field, path[1:], leaf.shape))


def _stacked(convert: Convert) -> Callable[..., np.ndarray]:
    """A conversion of the tensors of all blocks to one array."""
    return lambda *blocks: np.stack([convert(block) for block in blocks])


def flax_name(layer: str, kind: str) -> str:
    """The name of a tensor in flax: lists become `layers_0`, ..., and every layer except the convolution of patches has
    one more wrapper."""
    name = re.sub(r"\.(\d+|\*)", r"/layers_\1", layer).replace(".", "/")
    if kind == "table":
        return f"net/{name}/_flax_embedding/embedding"
    wrapper = "" if layer == LAYERS["patches"] else "/_flax_linear"
    return f"net/{name}{wrapper}/{'kernel' if kind == 'weight' else kind}"


def _converted(field: DiT, path: str, shape: Shape) -> tuple[Shape, Convert]:
    if path != "patches.weight":
        return shape, lambda array: array
    kernel = (field.patch, field.patch, field.data_shape[0], shape[-1])
    return kernel, lambda array: array.reshape(shape)
