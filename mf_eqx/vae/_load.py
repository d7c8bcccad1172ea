"""Reading of weights in diffusers' layout."""

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
from ._moments import LatentStatistics, SCALE

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLED = "diffusion_pytorch_model.bin"

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
    """The tokenizer in a file or folder of diffusers' `AutoencoderKL`. Requires safetensors (extra `export`).

    **Arguments:**

    - `path`: a .safetensors file; or a folder that holds `diffusion_pytorch_model.safetensors`, directly or in `vae/`,
      such as `save_autoencoder` writes. Names and shapes of the attention may be those of any version of diffusers.
    - `size`: of the network in the file. None for the size that the folder's config.json says, and for `SD_VAE` where
      there is none; a config.json must agree with a size that is given. (What it says of the scale of latents is for
      `read_latent_statistics`: a tokenizer applies no scale.)
    - `dtype`: compute precision, see `Autoencoder`. Parameters are float32 for every dtype in the file.

    **Raises:** `FileNotFoundError` if `path` does not exist; `ValueError` that names the file if it is not a complete
    safetensors file, if a folder has only pickled weights, if config.json is that of another network (with its keys),
    or if tensors are missing, unexpected, of another shape or not finite (with their names).
    """
    path = Path(path)
    file = _file(path)
    config = file.with_name("config.json")
    if path.is_dir() and config.exists():
        size = size or _size_in(config)
        _check_config(config, size)
    size = size or SD_VAE
    network = eqx.filter_eval_shape(lambda key: Autoencoder(size, dtype=dtype, key=key), jr.key(0))
    tensors = read_safetensors(file)
    origins = {name: origin_of(name, leaf.shape, tensors) for name, leaf in leaves(network).items()}
    return fill(network, origins, tensors, file)


def read_latent_statistics(path: str | Path) -> LatentStatistics:
    """What the config.json of a folder says of latents: `latents_mean` (or `shift_factor`), and `latents_std` over
    `scaling_factor`; 0 and 1 / `SCALE` for what is not there, and for a file or a folder without config.json.

    **Arguments:** `path` as for `load_autoencoder`.

    **Raises:** as `load_autoencoder`; `ValueError` that names the file for values that are no statistics.
    """
    path = Path(path)
    config = _file(path).with_name("config.json")
    if not path.is_dir() or not config.exists():
        return LatentStatistics()
    found = {name: value for name, value in read_json_object(config).items() if value is not None}
    try:
        mean = found.get("latents_mean", [found.get("shift_factor", 0.0)])
        std = [value / found.get("scaling_factor", SCALE) for value in found.get("latents_std", [1.0])]
        return LatentStatistics(tuple(map(float, mean)), tuple(map(float, std)))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{config}: must say how latents are scaled, but cannot be read: {error}") from error


def _file(path: Path) -> Path:
    """The file with the weights."""
    if path.exists() and not path.is_dir():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: must be a .safetensors file (nothing pickled is read), got {path.name}")
        return path
    if not path.is_dir():
        rule = f"must be a .safetensors file or a folder with {WEIGHTS}, but does not exist"
        raise FileNotFoundError(errno.ENOENT, rule, str(path))
    for folder in (path, path / "vae"):
        if (folder / WEIGHTS).exists():
            return folder / WEIGHTS
    pickled = any((folder / _PICKLED).is_file() for folder in (path, path / "vae"))
    found = f"only {_PICKLED}, which is pickled and not read" if pickled else "no such file in it or in vae/"
    raise ValueError(f"{path}: must be a folder with {WEIGHTS}, got {found}")


_KEYS = {
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "latent": "latent_channels",
    "groups": "norm_num_groups",
    "channels": "in_channels",
}
"""The fields of an `AutoencoderSize` in config.json."""


def _size_in(path: Path) -> AutoencoderSize:
    """The size that a config.json says; of `SD_VAE` what it does not say."""
    config = read_json_object(path)
    found = {name: config[key] for name, key in _KEYS.items() if key in config}
    is_whole = [
        all(type(number) is int and number >= 1 for number in (value if isinstance(value, list) else [value]))
        and isinstance(value, list) == (name == "widths")
        for name, value in found.items()
    ]
    if not all(is_whole):
        raise ValueError(f"{path}: must have integers >= 1 for {', '.join(_KEYS.values())}, got {found}")
    return SD_VAE._replace(**found)._replace(widths=tuple(found.get("widths", SD_VAE.widths)))


def _check_config(path: Path, size: AutoencoderSize) -> None:
    # A key may be missing: the check of the tensors' names and shapes replaces it, except for the number of groups, on
    # which no shape depends.
    config = {"norm_num_groups": 32} | read_json_object(path)
    differing = [
        f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}"
        for key, value in config_of(size).items()
        if key in config and config[key] != value
    ]
    if differing:
        raise ValueError(f"{path}: must describe a network of the given size, but {listed(differing)}")


def config_of(size: AutoencoderSize) -> dict[str, Any]:
    """The config.json that diffusers would write for a network of this size."""
    levels = len(size.widths)
    return {
        "_class_name": "AutoencoderKL",
        **{key: [*value] if isinstance(value := getattr(size, name), tuple) else value for name, key in _KEYS.items()},
        "out_channels": size.channels,
        "act_fn": "silu",
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "up_block_types": levels * ["UpDecoderBlock2D"],
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


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
