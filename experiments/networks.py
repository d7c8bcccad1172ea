"""The networks of the recipes, by descriptions that JSON can hold: what weights on disk say of themselves.

description = networks.describe_unet((3, 32, 32), mfx.UNET_CIFAR10, augmentation=6, dropout=0.2)
field = networks.make(description, key)
checkpoint.save_weights("ema.safetensors", field, description)
field = checkpoint.load_weights("ema.safetensors", networks.from_description)
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Key

import mf_eqx as mfx
from mf_eqx import nn

Description = dict[str, Any]


def describe_unet(
    data_shape: tuple[int, int, int],
    size: mfx.UNetSize,
    *,
    labels: int | None = None,
    augmentation: int = 0,
    dropout: float = 0.0,
) -> Description:
    """A U-Net."""
    return {
        "network": "UNet",
        "data_shape": list(data_shape),
        "size": {name: list(value) if isinstance(value, tuple) else value for name, value in size._asdict().items()},
        "labels": labels,
        "augmentation": augmentation,
        "dropout": dropout,
    }


def describe_dit(data_shape: tuple[int, int, int], size: mfx.DiTSize, *, labels: int | None) -> Description:
    """A DiT."""
    return {"network": "DiT", "data_shape": list(data_shape), "size": size._asdict(), "labels": labels}


def make(
    description: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    dtype: DTypeLike = jnp.float32,
    attention: nn.AbstractAttention = nn.XLAAttention(),
    remat: nn.Remat = False,
    unroll: int | bool | None = None,
) -> mfx.DiT | mfx.UNet:
    """A fresh network. How it computes is no part of its description; `unroll` None is the network's own default.

    **Raises:** `ValueError` for a description that makes none.
    """
    options: dict[str, Any] = {"dtype": dtype, "attention": attention, "remat": remat, "key": key}
    options |= {} if unroll is None else {"unroll": unroll}
    try:
        kind, shape, size = description["network"], tuple(description["data_shape"]), dict(description["size"])
        if kind == "DiT":
            return mfx.DiT(shape, mfx.DiTSize(**size), labels=description["labels"], **options)
        if kind == "UNet":
            size |= {name: tuple(size[name]) for name in ("multipliers", "attention")}
            given = {name: description[name] for name in ("augmentation", "dropout")}
            return mfx.UNet(shape, mfx.UNetSize(**size), labels=description.get("labels"), **given, **options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description must be that of a network, but it is not complete: {error}") from error
    raise ValueError(f"network must be DiT or UNet, got {kind!r}")


def from_description(description: dict[str, Any]) -> mfx.DiT | mfx.UNet:
    """A network of the right structure, for `checkpoint.load_weights`."""
    return make(description, jr.key(0))
