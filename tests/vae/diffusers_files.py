"""Tokenizers as diffusers writes them: names and shapes of all tensors, from diffusers' rules and not from ours."""

import json

import numpy as np
from random_tensors import random_tensor

from mf_eqx import vae

TINY = vae.AutoencoderSize(widths=(4, 8, 8), blocks=1, latent=3, groups=2)
MIDDLES = ("encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0")
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def conv(name, in_width, width, kernel=3):
    yield f"{name}.weight", (width, in_width, kernel, kernel)
    yield f"{name}.bias", (width,)


def vectors(name, width):
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def resnet(name, in_width, width):
    yield from vectors(f"{name}.norm1", in_width)
    yield from conv(f"{name}.conv1", in_width, width)
    yield from vectors(f"{name}.norm2", width)
    yield from conv(f"{name}.conv2", width, width)
    if in_width != width:
        yield from conv(f"{name}.conv_shortcut", in_width, width, 1)


def middle(name, width):
    for i in range(2):
        yield from resnet(f"{name}.resnets.{i}", width, width)
    yield from vectors(f"{name}.attentions.0.group_norm", width)
    for part in OLD_NAMES:
        yield f"{name}.attentions.0.{part}.weight", (width, width)
        yield f"{name}.attentions.0.{part}.bias", (width,)


def levels(name, sampler, widths, blocks):
    in_width = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            yield from resnet(f"{name}.{i}.resnets.{j}", in_width, width)
            in_width = width
        if i < len(widths) - 1:
            yield from conv(f"{name}.{i}.{sampler}.0.conv", width, width)


def shapes(size):
    """The shape of every tensor by its name."""
    first, last, latent = size.widths[0], size.widths[-1], size.latent
    return dict(
        [
            *conv("encoder.conv_in", 3, first),
            *levels("encoder.down_blocks", "downsamplers", size.widths, size.blocks),
            *middle("encoder.mid_block", last),
            *vectors("encoder.conv_norm_out", last),
            *conv("encoder.conv_out", last, 2 * latent),
            *conv("quant_conv", 2 * latent, 2 * latent, 1),
            *conv("post_quant_conv", latent, latent, 1),
            *conv("decoder.conv_in", latent, last),
            *middle("decoder.mid_block", last),
            *levels("decoder.up_blocks", "upsamplers", size.widths[::-1], size.blocks + 1),
            *vectors("decoder.conv_norm_out", first),
            *conv("decoder.conv_out", first, 3),
        ]
    )


def is_scale(name):
    """Whether it is the scale of a normalisation, which should not be near zero."""
    return "norm" in name and name.endswith("weight")


def tensors(size):
    """Random ones. Those of queries and keys are larger, so that attention prefers some places to others."""
    return {
        name: is_scale(name) + random_tensor(name, shape, scale=3.0 if "to_q" in name or "to_k" in name else 1.0)
        for name, shape in shapes(size).items()
    }


def with_old_names(tensors, *, convolutions):
    """As older versions wrote the attention: other names, and 1x1 convolutions or matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in OLD_NAMES.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        renamed[name] = tensor
    return renamed


def config(size):
    """What config.json of sd-vae-ft-mse holds, for `size`."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": list(size.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(size.widths),
        "in_channels": 3,
        "latent_channels": size.latent,
        "layers_per_block": size.blocks,
        "norm_num_groups": size.groups,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * len(size.widths),
    }


def write_file(path, tensors):
    """As a file of safetensors; returns its path."""
    import safetensors.numpy

    path.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(t) for name, t in tensors.items()}))
    return path


def write_folder(folder, size=TINY, **changes):
    """In diffusers' layout; `changes` of config.json, None for a key that is not there. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "diffusion_pytorch_model.safetensors", tensors(size))
    content = {key: value for key, value in (config(size) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder
