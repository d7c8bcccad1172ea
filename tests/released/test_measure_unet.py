"""The size of a U-Net is seen in its tensors."""

from pathlib import Path

import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import nn, released

PARITY = Path(__file__).parents[1] / "parity"


def tensors():
    """Of the small network of the parity tests: names and shapes, one number for all values."""
    with np.load(PARITY / "unet.npz", allow_pickle=False) as held:
        names, shapes = held["names"].tolist(), held["shapes"].tolist()
    sizes = (tuple(map(int, shape.split(","))) for shape in shapes)
    return {name: np.broadcast_to(np.float32(0), size) for name, size in zip(names, sizes, strict=True)}


def test_size_is_that_of_the_network():
    size = mfx.UNetSize(width=8, multipliers=(1, 2), blocks=2, attention=(4,))
    assert released.measure_unet(tensors(), "unet") == ((3, 8, 8), size, 6)


def test_augmentation_may_be_absent():
    held = tensors()
    del held["map_augment.weight"]
    assert released.measure_unet(held, "unet")[2] == 0


@pytest.mark.parity
@pytest.mark.parametrize("augmentation", [6, 0])
def test_network_of_the_paper_is_recognised(augmentation, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(PARITY)
    import unet_reference

    with torch.device("meta"):
        network = unet_reference.UNet(augmentation=augmentation)
    held = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in network.state_dict().items()}
    assert released.measure_unet(held, "unet") == ((3, 32, 32), mfx.UNET_CIFAR10, augmentation)


@pytest.mark.parametrize("name", ["enc.8x8_conv.weight", "enc.4x4_block0.conv1.weight"])
def test_a_tensor_that_tells_is_missed_by_its_name(name):
    held = tensors()
    del held[name]
    with pytest.raises(ValueError, match=f"^unet: must hold the tensors of the network, but it lacks {name}$"):
        released.measure_unet(held, "unet")


def test_tensors_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"^unet: must hold the tensors of the network, but it lacks enc\.0x0_conv"):
        released.measure_unet({"weight": np.zeros(3)}, "unet")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"labels": 3}, "field must have no labels, no condition and no guidance"),
        ({"condition": 3}, "field must have no labels, no condition and no guidance"),
        ({"time_variables": nn.end_start}, r"field must embed \(t, t - r\)"),
    ],
)
def test_a_field_that_sees_something_else_is_refused(options, rule):
    size = mfx.UNetSize(width=8, multipliers=(1,), blocks=1, attention=())
    field = mfx.UNet((3, 4, 4), size, **options, key=jr.key(0))
    with pytest.raises(ValueError, match=rule):
        released.fill_unet(field, {}, "unet")
