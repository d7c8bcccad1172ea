"""A tokenizer in diffusers' layout: where its weights lie, and what the config.json beside them says."""

import errno
import json
from pathlib import Path
from typing import Any

from .._json import read_json_object
from .._leaves import listed
from ._autoencoder import AutoencoderSize, SD_VAE
from ._moments import as_float_tuple, LatentStatistics, SCALE

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
_PICKLED = "diffusion_pytorch_model.bin"
_SIZES = {
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "latent": "latent_channels",
    "groups": "norm_num_groups",
    "channels": "in_channels",
}
"""The fields of an `AutoencoderSize` in config.json."""
_OF_LATENTS = ("latents_mean", "shift_factor", "latents_std", "scaling_factor")


def weights_file(path: Path) -> Path:
    """The file with the weights of a file or folder, see `load_autoencoder`."""
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


# The size


def read_size(weights: Path, given: AutoencoderSize | None) -> AutoencoderSize | None:
    """The size that is given, or that the config.json beside the weights says; None if there is neither.

    **Raises:** `ValueError` that names config.json if it describes another network.
    """
    if not (path := weights.with_name(CONFIG)).exists():
        return given
    size = given or _size_in(path)
    # A key may be missing: the check of the tensors' names and shapes replaces it, except for the number of groups, on
    # which no shape depends.
    config = {"norm_num_groups": 32} | read_json_object(path)
    differing = [
        f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}"
        for key, value in config_of(size).items()
        if key in config and config[key] != value
    ]
    if differing:
        rule = "that can be read" if given is None else "of the given size"
        raise ValueError(f"{path}: must describe a network {rule}, but {listed(differing)}")
    return size


def _size_in(path: Path) -> AutoencoderSize:
    """The size in a config.json, with the values of `SD_VAE` for fields that it lacks."""
    config = read_json_object(path)
    found = {name: config[key] for name, key in _SIZES.items() if key in config}
    is_whole = [
        all(type(number) is int and number >= 1 for number in (value if isinstance(value, list) else [value]))
        and isinstance(value, list) == (name == "widths")
        and value != []
        for name, value in found.items()
    ]
    if not all(is_whole):
        raise ValueError(f"{path}: must have integers >= 1 for {', '.join(_SIZES.values())}, got {found}")
    size = SD_VAE._replace(**found)._replace(widths=tuple(found.get("widths", SD_VAE.widths)))
    if any(width % size.groups for width in size.widths):
        rule = f"multiples of norm_num_groups, {size.groups}"
        raise ValueError(f"{path}: block_out_channels must be {rule}, got {[*size.widths]}")
    return size


def config_of(size: AutoencoderSize) -> dict[str, Any]:
    """The config.json that diffusers would write for a network of this size."""
    levels = len(size.widths)
    return {
        "_class_name": "AutoencoderKL",
        **{key: [*value] if isinstance(value := getattr(size, name), tuple) else value for name, key in _SIZES.items()},
        "out_channels": size.channels,
        "act_fn": "silu",
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "up_block_types": levels * ["UpDecoderBlock2D"],
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


# The statistics of latents


def read_latent_statistics(path: str | Path) -> LatentStatistics:
    """What the config.json beside the weights says of latents: `latents_mean` (or `shift_factor`), and `latents_std`
    over `scaling_factor`; for what it lacks, 0, 1 and `SCALE`, as in Stable Diffusion. `latent_statistics_origin` tells
    which of them it has.

    **Arguments:** `path` as for `load_autoencoder`.

    **Raises:** as `load_autoencoder`; `ValueError` that names config.json for values that are no statistics, or not of
    the channels of its latents.
    """
    config, found = _said_of_latents(Path(path))
    if not found:
        return LatentStatistics()
    channels = _size_in(config).latent
    try:
        numbers = {
            name: as_float_tuple(name, value if name.startswith("latents") else [value])
            for name, value in found.items()
        }
        (scale,) = numbers.get("scaling_factor", (SCALE,))
        mean = numbers.get("latents_mean", numbers.get("shift_factor", (0.0,)))
        statistics = LatentStatistics(mean, tuple(std / scale for std in numbers.get("latents_std", (1.0,))))
        statistics.check_channels(channels)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{config}: must say how latents are scaled, but cannot be read: {error}") from error
    return statistics


def latent_statistics_origin(path: str | Path) -> str:
    """Where `read_latent_statistics` has its numbers from, such as "scaling_factor of vae/config.json".

    **Arguments:** `path` as for `load_autoencoder`.
    """
    config, found = _said_of_latents(Path(path))
    origins = [f"{', '.join(found)} of {config}"] if found else []
    if "scaling_factor" not in found:
        reason = f"{config} lacks it" if config.exists() else f"there is no {config}"
        origins.append(f"scaling_factor of Stable Diffusion, since {reason}")
    return ", ".join(origins)


def _said_of_latents(path: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json beside the weights, whether it is there or not, and what it says of latents."""
    config = weights_file(path).with_name(CONFIG)
    values = read_json_object(config) if config.exists() else {}
    return config, {name: values[name] for name in _OF_LATENTS if values.get(name) is not None}
