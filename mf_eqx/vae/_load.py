"""Weights in diffusers' layout."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from .._foreign import fill, Origin, read_safetensors
from .._json import read_json_object
from .._leaves import leaves, listed
from ._autoencoder import Autoencoder, AutoencoderSize, SD_VAE

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLED = "diffusion_pytorch_model.bin"

# Ours to theirs, word by word of a tensor's dotted name. Words that are alike are not listed.
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
# One matrix of ours is made from several of theirs, which older versions of diffusers call otherwise.
_NEW = {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}
_OLD = {"qkv": ("query", "key", "value"), "out": ("proj_attn",)}


def load_autoencoder(
    path: str | Path, size: AutoencoderSize = SD_VAE, *, dtype: DTypeLike = jnp.float32
) -> Autoencoder:
    """The tokenizer in a file or folder of diffusers' `AutoencoderKL`. Needs safetensors (extra `export`).

    **Arguments:**

    - `path`: a .safetensors file; or a folder that holds `diffusion_pytorch_model.safetensors`, itself or in `vae/`.
      In a folder config.json, if it is there, must agree with `size`. (Its `scaling_factor` is not looked at, since a
      tokenizer applies none.) Names and shapes of the attention may be those of any version of diffusers.
    - `size`: of the network in it.
    - `dtype`: compute precision, see `Autoencoder`. Parameters are float32 whatever the file holds.

    **Raises:** `FileNotFoundError` for what is not there; `ValueError` that names the file for one that is no whole
    safetensors file, a folder with pickled weights alone, a config.json of another network (with its keys), and tensors
    that are missing, left over, of another shape or not finite (with their names).
    """
    path = Path(path)
    file = _file(path)
    config = file.with_name("config.json")
    if path.is_dir() and config.exists():
        _check_config(config, size)
    network = eqx.filter_eval_shape(lambda key: Autoencoder(size, dtype=dtype, key=key), jr.key(0))
    tensors = read_safetensors(file)
    origins = {name: _origin(name, leaf.shape, tensors) for name, leaf in leaves(network).items()}
    return fill(network, origins, tensors, file)


def _file(path: Path) -> Path:
    """The file with the weights."""
    if path.exists() and not path.is_dir():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: must be a .safetensors file (nothing pickled is read), got {path.name}")
        return path
    if not path.is_dir():
        rule = f"must be a .safetensors file or a folder with {WEIGHTS}, but is not there"
        raise FileNotFoundError(errno.ENOENT, rule, str(path))
    for folder in (path, path / "vae"):
        if (folder / WEIGHTS).exists():
            return folder / WEIGHTS
    pickled = any((folder / _PICKLED).is_file() for folder in (path, path / "vae"))
    found = f"{_PICKLED} alone, which is pickled and not read" if pickled else "neither it nor vae/ with it"
    raise ValueError(f"{path}: must be a folder with {WEIGHTS}, got {found}")


def _check_config(path: Path, size: AutoencoderSize) -> None:
    # The tensors tell what a missing key would, except the number of groups, of which they know nothing.
    config = {"norm_num_groups": 32} | read_json_object(path)
    differing = [
        f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}"
        for key, value in _config(size).items()
        if key in config and config[key] != value
    ]
    if differing:
        raise ValueError(f"{path}: must describe a network of the given size, but {listed(differing)}")


def _config(size: AutoencoderSize) -> dict[str, Any]:
    """What diffusers would write for a network of this size."""
    levels = len(size.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": size.latent,
        "block_out_channels": [*size.widths],
        "layers_per_block": size.blocks,
        "norm_num_groups": size.groups,
        "act_fn": "silu",
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "up_block_types": levels * ["UpDecoderBlock2D"],
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


def _origin(name: str, shape: tuple[int, ...], tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> Origin:
    """Of the array under a path such as .encoder.down[0].blocks[1].norm1.weight."""
    words = name.removeprefix(".").replace("[", ".").replace("]", "").split(".")
    theirs = ".".join(_WORDS.get(word, word) for word in words)
    if ".attention." in theirs:
        return _attention_origin(theirs, shape, tensors)
    if words[-1] == "bias":
        return Origin((theirs,), shape[:1], lambda bias: bias.reshape(shape))  # of convolutions: (width, 1, 1)
    return Origin((theirs,), shape)


def _attention_origin(name: str, shape: tuple[int, ...], tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> Origin:
    """Of one of the arrays of `SelfAttention`, whose weights are (in, out) where theirs are (out, in)."""
    block, _, matrix, kind = name.rsplit(".", 3)
    old = any(f"{block}.{part}.{kind}" in tensors for parts in _OLD.values() for part in parts)
    names = tuple(f"{block}.{part}.{kind}" for part in (_OLD if old else _NEW)[matrix])
    width = shape[-1] // len(names)
    if kind == "bias":
        return Origin(names, (width,), lambda *parts: np.concatenate(parts))
    # Some files hold 1x1 convolutions.
    as_convolution = names[0] in tensors and tensors[names[0]].ndim == 4
    theirs = (width, width, 1, 1) if as_convolution else (width, width)
    return Origin(
        names, theirs, lambda *parts: np.concatenate([part.reshape(width, width).T for part in parts], axis=1)
    )
