"""Writing of weights in diffusers' layout."""

import json
from pathlib import Path

import jax
import numpy as np

from .._files import write_whole
from .._leaves import leaves, on_host
from .._optional import optional
from ._autoencoder import Autoencoder
from ._layout import CONFIG, config_of, WEIGHTS
from ._load import origin_of
from ._moments import LatentStatistics


def save_autoencoder(folder: str | Path, tokenizer: Autoencoder, statistics: LatentStatistics) -> None:
    """Write a tokenizer as diffusers' `AutoencoderKL` keeps it, so that `load_autoencoder` and diffusers read it:
    `diffusion_pytorch_model.safetensors`, and `config.json` with size and statistics. Equal arguments always give the
    same bytes. One process writes, but all must call this function.

    **Arguments:** `folder`, made if it is not there; `tokenizer` with arrays in float32; `statistics` of its latents.

    **Raises:** `ValueError` for statistics of another number of channels; `OSError` if files cannot be written.
    """
    with optional("safetensors"):
        import safetensors.numpy
    statistics.check_channels(tokenizer.size.latent)
    tensors = {}
    for name, leaf in leaves(tokenizer).items():
        origin, array = origin_of(name, leaf.shape, {}), on_host(leaf)
        for tensor, part in zip(origin.names, np.split(array, len(origin.names), axis=-1), strict=True):
            tensors[tensor] = np.ascontiguousarray(part.T if part.ndim == 2 else part.reshape(origin.shape))
    if jax.process_index() == 0:
        of_latents = {"latents_mean": [*statistics.mean], "latents_std": [*statistics.std], "scaling_factor": 1.0}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder, WEIGHTS), safetensors.numpy.save(tensors, {"format": "pt"}))
        text = json.dumps(config_of(tokenizer.size) | of_latents, indent=2) + "\n"
        write_whole(Path(folder, CONFIG), text.encode())
