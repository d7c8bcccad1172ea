"""The networks of improved and of pixel MeanFlow of the authors' JAX code: trees of parameters under `net`.

    {h, omega, cfg_t_start, cfg_t_end}_embedder/mlp/layers_{0,2}/_flax_linear/{kernel, bias}
    {time, class, omega, t_min, t_max}_tokens                            (tokens, width)
    {shared_blocks, u_heads, v_heads}_0/attn/{q,k,v,out}_proj/_flax_linear/kernel
    {shared_blocks, u_heads, v_heads}_0/{attn/{q,k}_norm, norm1, norm2}/kernel
    {shared_blocks, u_heads, v_heads}_0/{mlp/w{1,2,3}/_flax_linear/kernel, attn_scale, mlp_scale}
    {u,v}_final_layer/{norm/kernel, linear/_flax_linear/{kernel, bias}}

    improved MeanFlow                                      pixel MeanFlow
    x_embedder/proj/{kernel, bias}                         x_embedder/{proj1, proj2}/{kernel, bias}
    y_embedder/embedding_table/_flax_embedding/embedding   y_embedder/embedding_table/embedding
                                                           pos_embed, of (tokens, width)

Convolutions are (row, column, in, out), other kernels (in, out). Tokens, positions and the table of labels may have a
further first axis of length one. A patch is flattened as (row, column, channel) in both codes. The trees that the
authors sample with lack the blocks of the velocity head, but may hold its last layer: a field without a velocity head
ignores all tensors of that head, and no others.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from .._foreign import fill, Origin
from .._leaves import leaves
from .._model import IMF_B2, IMF_L2, InContextDiT, InContextDiTSize, PMF_H16, TokenCounts
from ..nn import duration
from ._measure import count, heads_of, numbers, shape_of
from ._msgpack import flat

_FLAX = "_flax_linear/kernel"
_BLOCK = {
    "norm_1.weight": "norm1/kernel",
    "attention.queries.weight": f"attn/q_proj/{_FLAX}",
    "attention.keys.weight": f"attn/k_proj/{_FLAX}",
    "attention.values.weight": f"attn/v_proj/{_FLAX}",
    "attention.out.weight": f"attn/out_proj/{_FLAX}",
    "attention.query_norm.weight": "attn/q_norm/kernel",
    "attention.key_norm.weight": "attn/k_norm/kernel",
    "gate_1": "attn_scale",
    "norm_2.weight": "norm2/kernel",
    "mlp.gate.weight": f"mlp/w1/{_FLAX}",
    "mlp.hidden.weight": f"mlp/w3/{_FLAX}",
    "mlp.out.weight": f"mlp/w2/{_FLAX}",
    "gate_2": "mlp_scale",
}
_STACKS = {"trunk": "shared_blocks", "average_head.stack": "u_heads", "velocity_head.stack": "v_heads"}
_HEADS = {"average_head": "u_final_layer", "velocity_head": "v_final_layer"}
_LAST = {"norm.weight": "norm/kernel", "out.weight": f"linear/{_FLAX}", "out.bias": "linear/_flax_linear/bias"}
_NUMBERS = {
    "times[0]": ("time", "h"),
    "guidance.scale": ("omega", "omega"),
    "guidance.start": ("t_min", "cfg_t_start"),
    "guidance.end": ("t_max", "cfg_t_end"),
}
_PIXELS = "net/x_embedder/proj1/kernel"
_WIDTHS = {size.width: size.heads for size in (IMF_B2, IMF_L2, PMF_H16)}


class InContextDiTArguments(NamedTuple):
    """The arguments of the `InContextDiT` in a file, which takes guidance; only height and width of its data are not
    known."""

    channels: int
    size: InContextDiTSize
    labels: int
    tokens: TokenCounts
    velocity_head: bool


def measure_in_context_dit(
    tensors: Mapping[str, Any], path: str | Path, *, heads: int | None = None
) -> InContextDiTArguments:
    """The size of the network in a tree of the authors' JAX code. It has a velocity head if the tree has blocks of one.

    **Arguments:** `tensors` the result of `read_flax` for one set of weights, nested or by names joined with slashes;
    `path` of the file, for error messages; `heads` the number of attention heads, None for that of the published
    network of this width.

    **Raises:** `ValueError` if tensors that determine the size are missing, or no published network has this width.
    """
    by_name = _without_first_axes(flat(tensors, path))
    pixels = _PIXELS in by_name
    patch, _, channels, outputs = shape_of(by_name, _PIXELS if pixels else "net/x_embedder/proj/kernel", 4, path)
    rows, width = shape_of(by_name, _table(pixels), 2, path)
    names = ("class", "omega", "t_min", "t_max", "time")
    counts = TokenCounts(*(shape_of(by_name, f"net/{name}_tokens", 2, path)[0] for name in names))
    mlp = shape_of(by_name, f"net/u_heads_0/mlp/w1/{_FLAX}", 2, path)[1]
    trunk, head = (count(by_name, rf"net/{name}_(\d+)/.*") for name in ("shared_blocks", "u_heads"))
    number = heads_of(width, heads, path, _WIDTHS)
    size = InContextDiTSize(trunk + head, width, number, patch, head, None if mlp == 8 * width // 3 else mlp)
    if pixels:
        size = size._replace(bottleneck=outputs, learned_positions=True, grid=True)
    return InContextDiTArguments(channels, size, rows - 1, counts, bool(numbers(by_name, r"net/v_heads_(\d+)/.*")))


def fill_in_context_dit(field: InContextDiT, tensors: Mapping[str, Any], path: str | Path) -> InContextDiT:
    """`field` with the weights of a tree of the authors' JAX code.

    **Arguments:** `field` with labels and guidance, which embeds t - r; its structure is used, its values are replaced;
    `tensors`, `path` as for `measure_in_context_dit`. Without a velocity head, the tensors of that head are ignored.

    **Raises:** `ValueError` that names every tensor which is missing, unexpected, of another shape, or not finite.
    """
    _check_field(field)
    by_name = _without_first_axes(flat(tensors, path))
    ignored = () if field.has_velocity_head else set(_velocity_names(field))
    return fill(field, dict(origins(field)), by_name, path, ignored=ignored)


def _check_field(field: InContextDiT) -> None:
    """Refuses a field whose inputs or positions differ from those of the released networks."""
    embedding, size = field.embedding, field.arguments["size"]
    if embedding.variables is not duration or embedding.time_scale != 1:
        raise ValueError(f"field must embed t - r at scale 1, got {embedding.variables} at {embedding.time_scale}")
    if embedding.label is None or embedding.guidance is None:
        raise ValueError("field must have labels and guidance, as the released networks have, got it without")
    options = (size.bottleneck is not None, size.learned_positions, size.grid)
    if len(set(options)) > 1:
        raise ValueError(f"field must have bottleneck, learned_positions and grid, or none of them, got {size}")


def origins(field: InContextDiT) -> Iterator[tuple[str, Origin]]:
    """The path and the `Origin` of every array of a field."""
    pixels = field.positions is not None
    names = _names(pixels)
    for path, leaf in leaves(field).items():
        stack, _, rest = path[1:].partition(".blocks.")
        if rest:
            blocks = tuple(f"net/{_STACKS[stack]}_{i}/{_BLOCK[rest]}" for i in range(leaf.shape[0]))
            yield path, Origin(blocks, leaf.shape[1:], lambda *tensors: np.stack(tensors))
        else:
            yield path, _reshaped(names[path[1:]], _shape(field, path[1:], leaf.shape), leaf.shape)


def _names(pixels: bool) -> dict[str, str]:
    """The tensor of each array that is in no block."""
    found = {"embedding.condition.vectors": "class_tokens", "embedding.condition.embedding.table": _table(pixels)[4:]}
    layers = {"bottleneck": "proj1", "patches": "proj2"} if pixels else {"patches": "proj"}
    for ours, theirs in layers.items():
        found |= {f"{ours}.weight": f"x_embedder/{theirs}/kernel", f"{ours}.bias": f"x_embedder/{theirs}/bias"}
    for ours, (tokens, embedder) in _NUMBERS.items():
        found[f"embedding.{ours}.vectors"] = f"{tokens}_tokens"
        for layer, number in (("hidden", 0), ("out", 2)):
            theirs, to = f"{embedder}_embedder/mlp/layers_{number}/_flax_linear", f"embedding.{ours}.embedding.{layer}"
            found |= {f"{to}.weight": f"{theirs}/kernel", f"{to}.bias": f"{theirs}/bias"}
    for ours, theirs in _HEADS.items():
        found |= {f"{ours}.{array}": f"{theirs}/{tensor}" for array, tensor in _LAST.items()}
    return {array: f"net/{name}" for array, name in (found | {"positions": "pos_embed"}).items()}


def _table(pixels: bool) -> str:
    return f"net/y_embedder/embedding_table/{'' if pixels else '_flax_embedding/'}embedding"


def _shape(field: InContextDiT, array: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor of an array that is in no block."""
    if array not in ("bottleneck.weight", "patches.weight"):
        return shape
    if field.bottleneck is not None and array == "patches.weight":
        return (1, 1, *shape)
    return (field.patch, field.patch, field.data_shape[0], shape[-1])


def _reshaped(name: str, tensor: tuple[int, ...], array: tuple[int, ...]) -> Origin:
    return Origin((name,), tensor, lambda values: values.reshape(array))


def _velocity_names(field: InContextDiT) -> Iterator[str]:
    """The names of all tensors of a velocity head."""
    for block in range(field.average_head.stack.depth):
        yield from (f"net/v_heads_{block}/{tensor}" for tensor in _BLOCK.values())
    yield from (f"net/v_final_layer/{tensor}" for tensor in _LAST.values())


def _without_first_axes(tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Tokens, positions and the table of labels without a first axis of length one."""
    pattern = r"net/(\w+_tokens|pos_embed|y_embedder/.*)"

    def has_one(name: str, tensor: np.ndarray) -> bool:
        return tensor.ndim == 3 and len(tensor) == 1 and re.fullmatch(pattern, name) is not None

    return {name: tensor[0] if has_one(name, tensor) else tensor for name, tensor in tensors.items()}
