r"""The Inception-v3 of the FID literature: the TensorFlow graph of 2015-12-05, not the network of torchvision.

It has the shape of Inception-v3 with three differences that change every number: average pooling inside the blocks
divides by the number of pixels inside the image, not by nine; the last block pools by the maximum; and there are 1008
classes.
Batch normalisation uses stored moments,

$$y = \gamma\, \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-3}}} + \beta,$$

which is stored here as a scale and a shift for each channel (`_convolutions.py`).

    convert_inception("pt_inception-2015-12-05-6726825d.pth", "inception.safetensors")      once; may need torch
    inception = load_inception("inception.safetensors")

The network is defined by a table: chains of convolutions and pools, and forks whose branches are concatenated. Each
convolution stores its name in the PyTorch ports, so the same table also serves to load their weights.

It is batched, (rows, 3, 299, 299), and nothing here is trained. Products run in float32 on every device ("highest"):
an accelerator's default would round their factors to 10 bits or fewer.

Sources: Rethinking the Inception Architecture for Computer Vision, Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, 2015,
arXiv 1512.00567; the differences and the names of tensors are those of pytorch-fid and torch-fidelity.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._files import write_whole
from .._foreign import fill, Origin, read_safetensors, read_torch
from .._optional import optional
from ._convolutions import norm_origins, random_weights


class Features(NamedTuple):
    """The outputs of a network for images.

    **Arguments:** `pooled` features, from which distances are computed; `logits` of classes, for the Inception Score.
    """

    pooled: Float[Array | np.ndarray, "rows features"]
    logits: Float[Array | np.ndarray, "rows classes"]


class _Convolution(eqx.Module):
    """A convolution without bias, followed by normalisation and ReLU."""

    weight: Float[Array, "out in height width"]
    scale: Float[Array, " out"]
    shift: Float[Array, " out"]
    name: str = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    padding: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows in height width"]) -> Float[Array, "rows out new_height new_width"]:
        strides = (self.stride, self.stride)
        x = jax.lax.conv_general_dilated(x, self.weight, strides, self.padding, precision="highest")
        return jax.nn.relu(x * self.scale[:, None, None] + self.shift[:, None, None])


class _MaxPool(eqx.Module):
    """The maximum of each 3 x 3 window."""

    stride: int = eqx.field(static=True)
    padding: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows size height width"]) -> Float[Array, "rows size new_height new_width"]:
        strides = (1, 1, self.stride, self.stride)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), strides, self.padding)


class _AveragePool(eqx.Module):
    """The mean over those pixels of each 3 x 3 window that lie inside the image, as in TensorFlow; torchvision counts
    padding as zeros."""

    def __call__(self, x: Float[Array, "rows size height width"]) -> Float[Array, "rows size height width"]:
        total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 3, 3), (1, 1, 1, 1), "SAME")
        return total / np.outer(_window_counts(x.shape[-2]), _window_counts(x.shape[-1]))


def _window_counts(size: int) -> Float[np.ndarray, " size"]:
    """The number of pixels inside the image in the window of three around each pixel."""
    return np.convolve(np.ones(size, np.float32), np.ones(3, np.float32), "same")[:size]


class _Chain(eqx.Module):
    """Layers one after the other."""

    layers: tuple[eqx.Module, ...]

    def __call__(self, x: Float[Array, "rows in height width"]) -> Float[Array, "rows out new_height new_width"]:
        return functools.reduce(lambda x, layer: layer(x), self.layers, x)  # pyright: ignore[reportCallIssue]


class _Fork(eqx.Module):
    """Branches that are applied to the same input, with their channels concatenated."""

    branches: tuple[eqx.Module, ...]

    def __call__(self, x: Float[Array, "rows in height width"]) -> Float[Array, "rows out new_height new_width"]:
        return jnp.concatenate([branch(x) for branch in self.branches], axis=1)  # pyright: ignore[reportCallIssue]


class Inception(eqx.Module):
    """Inception-v3 of the FID literature, evaluated on float32 of shape (rows, 3, 299, 299) with values
    (pixel - 128) / 128, as a `Protocol` computes them from images.

    It returns 2048 features, the mean over the last 8 x 8 positions, and 1008 logits *without* the bias of the last
    layer, as in the original code of the Inception Score (torch-fidelity calls them `logits_unbiased`).

    **Arguments:** `key` of random weights, for rehearsals and measurements of speed. `load_inception` loads real ones.

    **Raises:** `ValueError`, when called, for another dtype or shape.
    """

    body: _Chain
    weight: Float[Array, "classes features"]

    def __init__(self, *, key: Key[Array, ""]):
        self.body, self.weight = random_weights(eqx.filter_eval_shape(_zeros), key)

    def __call__(self, x: Float[Array, "rows 3 299 299"]) -> Features:
        if x.dtype != self.weight.dtype or x.ndim != 4 or x.shape[1:] != (3, 299, 299):
            rule = f"{self.weight.dtype} of shape (rows, 3, 299, 299)"
            raise ValueError(f"x must be {rule}, got {x.dtype} of shape {x.shape}")
        pooled = jnp.mean(self.body(x), axis=(2, 3))
        return Features(pooled, jnp.matmul(pooled, self.weight.T, precision="highest"))


def _zeros() -> tuple[_Chain, Float[Array, "classes features"]]:
    return _Chain((*_stem(), *_blocks())), jnp.zeros((1008, 2048), jnp.float32)


def _stem() -> Sequence[eqx.Module]:
    layer = functools.partial(_layer, "")
    return (
        layer("Conv2d_1a_3x3", 3, 32, 3, stride=2, padding="VALID"),
        layer("Conv2d_2a_3x3", 32, 32, 3, padding="VALID"),
        layer("Conv2d_2b_3x3", 32, 64, 3),
        _MaxPool(2, "VALID"),
        layer("Conv2d_3b_1x1", 64, 80, 1),
        layer("Conv2d_4a_3x3", 80, 192, 3, padding="VALID"),
        _MaxPool(2, "VALID"),
    )


def _blocks() -> Sequence[eqx.Module]:
    return (
        _block_a("Mixed_5b.", 192, 32),
        _block_a("Mixed_5c.", 256, 64),
        _block_a("Mixed_5d.", 288, 64),
        _block_b("Mixed_6a.", 288),
        _block_c("Mixed_6b.", 768, 128),
        _block_c("Mixed_6c.", 768, 160),
        _block_c("Mixed_6d.", 768, 160),
        _block_c("Mixed_6e.", 768, 192),
        _block_d("Mixed_7a.", 768),
        _block_e("Mixed_7b.", 1280, _AveragePool()),
        _block_e("Mixed_7c.", 2048, _MaxPool(1, "SAME")),
    )


def _block_a(name: str, size: int, pool_size: int) -> _Fork:
    """At 35 x 35 positions: branches with 1 x 1, 5 x 5, twice 3 x 3, and a pool."""
    layer = functools.partial(_layer, name)
    wide = _Chain((layer("branch5x5_1", size, 48), layer("branch5x5_2", 48, 64, 5)))
    pool = _Chain((_AveragePool(), layer("branch_pool", size, pool_size)))
    return _Fork((layer("branch1x1", size, 64), wide, _Chain(_double_3x3(layer, size)), pool))


def _block_b(name: str, size: int) -> _Fork:
    """From 35 x 35 to 17 x 17."""
    layer = functools.partial(_layer, name)
    once = layer("branch3x3", size, 384, 3, stride=2, padding="VALID")
    twice = _Chain(_double_3x3(layer, size, stride=2, padding="VALID"))
    return _Fork((once, twice, _MaxPool(2, "VALID")))


def _double_3x3(layer, size: int, stride: int = 1, padding: str = "SAME") -> tuple[_Convolution, ...]:
    return (
        layer("branch3x3dbl_1", size, 64),
        layer("branch3x3dbl_2", 64, 96, 3),
        layer("branch3x3dbl_3", 96, 96, 3, stride=stride, padding=padding),
    )


def _block_c(name: str, size: int, inner: int) -> _Fork:
    """At 17 x 17 positions: branches with 1 x 1, with 7 x 7 as a row and a column, with that twice, and a pool."""
    layer = functools.partial(_layer, name)
    row, column = (1, 7), (7, 1)
    once = (
        layer("branch7x7_1", size, inner),
        layer("branch7x7_2", inner, inner, row),
        layer("branch7x7_3", inner, 192, column),
    )
    twice = (
        layer("branch7x7dbl_1", size, inner),
        layer("branch7x7dbl_2", inner, inner, column),
        layer("branch7x7dbl_3", inner, inner, row),
        layer("branch7x7dbl_4", inner, inner, column),
        layer("branch7x7dbl_5", inner, 192, row),
    )
    pool = _Chain((_AveragePool(), layer("branch_pool", size, 192)))
    return _Fork((layer("branch1x1", size, 192), _Chain(once), _Chain(twice), pool))


def _block_d(name: str, size: int) -> _Fork:
    """From 17 x 17 to 8 x 8."""
    layer = functools.partial(_layer, name)
    small = (layer("branch3x3_1", size, 192), layer("branch3x3_2", 192, 320, 3, stride=2, padding="VALID"))
    large = (
        layer("branch7x7x3_1", size, 192),
        layer("branch7x7x3_2", 192, 192, (1, 7)),
        layer("branch7x7x3_3", 192, 192, (7, 1)),
        layer("branch7x7x3_4", 192, 192, 3, stride=2, padding="VALID"),
    )
    return _Fork((_Chain(small), _Chain(large), _MaxPool(2, "VALID")))


def _block_e(name: str, size: int, pool: eqx.Module) -> _Fork:
    """At 8 x 8 positions: branches with 3 x 3 as a row beside a column."""
    layer = functools.partial(_layer, name)

    def cross(first: str, second: str, in_size: int) -> _Fork:
        return _Fork((layer(first, in_size, 384, (1, 3)), layer(second, in_size, 384, (3, 1))))

    once = (layer("branch3x3_1", size, 384), cross("branch3x3_2a", "branch3x3_2b", 384))
    twice = (
        layer("branch3x3dbl_1", size, 448),
        layer("branch3x3dbl_2", 448, 384, 3),
        cross("branch3x3dbl_3a", "branch3x3dbl_3b", 384),
    )
    pooled = (pool, layer("branch_pool", size, 192))
    return _Fork((layer("branch1x1", size, 320), _Chain(once), _Chain(twice), _Chain(pooled)))


def _layer(
    prefix: str,
    name: str,
    in_size: int,
    out_size: int,
    kernel: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> _Convolution:
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = jnp.zeros((out_size, in_size, *kernel), jnp.float32)
    scale = shift = jnp.zeros(out_size, jnp.float32)
    return _Convolution(weight, scale, shift, prefix + name, stride, padding)


def load_inception(path: str | Path) -> Inception:
    """Inception with the weights of a safetensors file, its tensors named as the torch ports name them
    (`Mixed_5b.branch1x1.conv.weight`, ...). Make one with `convert_inception`.

    The bias of the last layer and counters of batches are not needed, but may be present.

    **Raises:** `OSError` if the file cannot be read; `ValueError` that names it if it is not a safetensors file, or if
    tensors are missing, extra, of another shape or not finite.
    """
    return _inception_with(read_safetensors(path), path)


def convert_inception(torch_file: str | Path, safetensors_file: str | Path) -> None:
    """Convert Inception's weights from a torch file to safetensors. This needs torch, except for files from before
    torch 1.6; nothing in the file is executed.

    pytorch-fid (`pt_inception-2015-12-05-6726825d.pth`) and torch-fidelity
    (`weights-inception-2015-12-05-6726825d.pth`) publish the same weights under the same names; a common prefix such as
    `inception.` is removed.

    **Arguments:** `torch_file` to read; `safetensors_file` to write, completely or not at all.

    **Raises:** as for `load_inception`, for the torch file; `MissingDependency` without torch, where it is needed.
    """
    with optional("safetensors"):
        import safetensors.numpy
    tensors = _without_prefix({str(name): value for name, value in read_torch(torch_file).items()})
    _inception_with(tensors, torch_file)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if not _is_counter(name)}
    write_whole(safetensors_file, safetensors.numpy.save(arrays, {"source": Path(torch_file).name}))


def _inception_with(tensors: dict, path: str | Path) -> Inception:
    inception = eqx.filter_eval_shape(lambda: Inception(key=jr.key(0)))
    ignored = {"fc.bias", *filter(_is_counter, tensors)}
    return fill(inception, _origins(inception), tensors, path, ignored=ignored)


def _without_prefix(tensors: dict) -> dict:
    """The tensors without the prefix that their names have if the network was saved as a part of another one."""
    last_layer = next((name for name in tensors if name.endswith("fc.weight")), "fc.weight")
    return {name.removeprefix(last_layer.removesuffix("fc.weight")): tensor for name, tensor in tensors.items()}


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _origins(inception: Inception) -> dict[str, Origin]:
    """The tensors of the file from which each array is computed."""
    paths = jax.tree.leaves_with_path(inception.body, is_leaf=lambda node: isinstance(node, _Convolution))
    origins = {".weight": Origin(("fc.weight",), inception.weight.shape)}
    for path, layer in paths:
        place = f".body{jax.tree_util.keystr(path)}"
        origins[f"{place}.weight"] = Origin((f"{layer.name}.conv.weight",), layer.weight.shape)
        origins |= norm_origins(place, f"{layer.name}.bn", len(layer.scale))
    return origins
