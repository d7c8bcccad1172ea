"""Reading of weights in diffusers' layout."""

from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from .._foreign import fill, Origin, read_safetensors
from .._leaves import leaves
from ._autoencoder import Autoencoder, AutoencoderSize, SD_VAE
from ._layout import CONFIG, read_size, weights_file

# From names in `Autoencoder` to names in diffusers, for each word of a dotted name. Words that do not change are not
# listed.
_WORDS = {
    "to_moments": "quant_conv",
    "from_latent": "post_quant_conv",
    "down": "down_blocks",
    "up": "up_blocks",
    "middle": "mid_block",
    "mixer": "attentions.0",
    "blocks": "resnets",
    "shortcut": "conv_shortcut",
    "shrink": "downsamplers.0.conv",
    "enlarge": "upsamplers.0.conv",
    "norm": "conv_norm_out",
}
# The matrices of diffusers from which a matrix of `SelfAttention` is made. Older versions of diffusers use other names.
_NEW_NAMES = {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}
_OLD_NAMES = {"qkv": ("query", "key", "value"), "out": ("proj_attn",)}


def load_autoencoder(
    path: str | Path, size: AutoencoderSize | None = None, *, dtype: DTypeLike = jnp.float32
) -> Autoencoder:
    """The tokenizer in a file or folder of diffusers' `AutoencoderKL`.

    **Arguments:**

    - `path`: a .safetensors file; or a folder that holds `diffusion_pytorch_model.safetensors`, directly or in `vae/`,
      such as `save_autoencoder` writes. Names and shapes of the attention may be those of any version of diffusers.
    - `size`: of the network in the file. None for the size that the config.json beside it says, and for `SD_VAE` where
      there is none; a config.json must agree with a size that is given. (What it says of the scale of latents is for
      `read_latent_statistics`: a tokenizer applies no scale.)
    - `dtype`: compute precision, see `Autoencoder`. Parameters are float32 for every dtype in the file.

    **Raises:** `FileNotFoundError` if `path` does not exist; `ValueError` that names the file if it is not a complete
    safetensors file, if a folder has only pickled weights, if config.json is that of another network (with its keys),
    or if tensors are missing, unexpected, of another shape or not finite (with their names).
    """
    file = weights_file(Path(path))
    known = read_size(file, size)
    network = eqx.filter_eval_shape(lambda key: Autoencoder(known or SD_VAE, dtype=dtype, key=key), jr.key(0))
    tensors = read_safetensors(file)
    origins = {path: origin_of(path, leaf.shape, tensors) for path, leaf in leaves(network).items()}
    assumed = f" (taken for one of Stable Diffusion's size, since no {CONFIG} is beside it)"
    return fill(network, origins, tensors, f"{file}{assumed if known is None else ''}")


def origin_of(name: str, shape: tuple[int, ...], tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> Origin:
    """The origin of the array with a path such as .encoder.down[0].blocks[1].norm1.weight."""
    words = name.removeprefix(".").replace("[", ".").replace("]", "").split(".")
    tensor = ".".join(_WORDS.get(word, word) for word in words)
    if ".attention." in tensor:
        return _attention_origin(tensor, shape, tensors)
    if words[-1] == "bias":
        return Origin((tensor,), shape[:1], lambda bias: bias.reshape(shape))  # convolutions: (width, 1, 1)
    return Origin((tensor,), shape)


def _attention_origin(name: str, shape: tuple[int, ...], tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> Origin:
    """The origin of an array of `SelfAttention`, whose weights are (in, out); those of diffusers are (out, in)."""
    block, _, matrix, kind = name.rsplit(".", 3)
    old = any(f"{block}.{part}.{kind}" in tensors for parts in _OLD_NAMES.values() for part in parts)
    names = tuple(f"{block}.{part}.{kind}" for part in (_OLD_NAMES if old else _NEW_NAMES)[matrix])
    width = shape[-1] // len(names)
    if kind == "bias":
        return Origin(names, (width,), lambda *parts: np.concatenate(parts))
    # Some files hold 1x1 convolutions instead of linear layers.
    as_convolution = names[0] in tensors and tensors[names[0]].ndim == 4
    tensor_shape = (width, width, 1, 1) if as_convolution else (width, width)
    return Origin(
        names, tensor_shape, lambda *parts: np.concatenate([part.reshape(width, width).T for part in parts], axis=1)
    )
