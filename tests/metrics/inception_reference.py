"""The Inception of the FID literature in torch, with weights from names: what `test_inception.py` is held against.

    python tests/metrics/inception_reference.py

writes `inception.npz` beside it. Written from the papers' table and the descriptions of pytorch-fid and torch-fidelity;
where torch-fidelity is installed, a test holds the package against that, too.
"""

import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_tensors import random_tensor

FROZEN = Path(__file__).with_name("inception.npz")


def tensor(name, shape):
    """One tensor of the file: convolutions that keep the size of their input, and moments that matter."""
    noise = random_tensor(name, shape, scale=1.4 if len(shape) > 1 else 1.0)
    if name.endswith("running_var"):
        return np.float32(1) + np.abs(noise)
    return noise + np.float32(name.endswith("bn.weight"))


def pixels(rows=2, size=299):
    """Images as bytes: smooth shapes with noise, so that pooling sees differences."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(b"pixels")))
    coarse = generator.integers(0, 200, (rows, 3, -(-size // 16), -(-size // 16)))
    smooth = np.kron(coarse, np.ones((1, 1, 16, 16), np.int64))[..., :size, :size]
    return (smooth + generator.integers(0, 56, smooth.shape)).astype(np.uint8)


def reference(x):
    """Pooled features and logits, by torch, of a batch (rows, 3, 299, 299)."""
    import torch
    import torch.nn.functional as F

    def weights(name, *shape):
        return torch.from_numpy(tensor(name, shape))

    def conv(x, name, out, kernel, stride=1, padding=0):
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        x = F.conv2d(x, weights(f"{name}.conv.weight", out, x.shape[1], *kernel), stride=stride, padding=padding)
        gamma, beta, mean, var = (
            weights(f"{name}.bn.{part}", out) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-3))

    def mean_pool(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block_a(x, name, pool):
        one = conv(x, f"{name}.branch1x1", 64, 1)
        five = conv(conv(x, f"{name}.branch5x5_1", 48, 1), f"{name}.branch5x5_2", 64, 5, padding=2)
        three = conv(conv(x, f"{name}.branch3x3dbl_1", 64, 1), f"{name}.branch3x3dbl_2", 96, 3, padding=1)
        three = conv(three, f"{name}.branch3x3dbl_3", 96, 3, padding=1)
        return torch.cat([one, five, three, conv(mean_pool(x), f"{name}.branch_pool", pool, 1)], 1)

    def block_b(x, name):
        three = conv(x, f"{name}.branch3x3", 384, 3, stride=2)
        double = conv(conv(x, f"{name}.branch3x3dbl_1", 64, 1), f"{name}.branch3x3dbl_2", 96, 3, padding=1)
        return torch.cat([three, conv(double, f"{name}.branch3x3dbl_3", 96, 3, stride=2), F.max_pool2d(x, 3, 2)], 1)

    def along(x, name, out, axis):
        kernel, padding = ((1, 7), (0, 3)) if axis == "row" else ((7, 1), (3, 0))
        return conv(x, name, out, kernel, padding=padding)

    def block_c(x, name, inner):
        one = conv(x, f"{name}.branch1x1", 192, 1)
        seven = conv(x, f"{name}.branch7x7_1", inner, 1)
        seven = along(along(seven, f"{name}.branch7x7_2", inner, "row"), f"{name}.branch7x7_3", 192, "column")
        double = conv(x, f"{name}.branch7x7dbl_1", inner, 1)
        for number, (out, axis) in enumerate(
            [(inner, "column"), (inner, "row"), (inner, "column"), (192, "row")], start=2
        ):
            double = along(double, f"{name}.branch7x7dbl_{number}", out, axis)
        return torch.cat([one, seven, double, conv(mean_pool(x), f"{name}.branch_pool", 192, 1)], 1)

    def block_d(x, name):
        three = conv(conv(x, f"{name}.branch3x3_1", 192, 1), f"{name}.branch3x3_2", 320, 3, stride=2)
        seven = along(conv(x, f"{name}.branch7x7x3_1", 192, 1), f"{name}.branch7x7x3_2", 192, "row")
        seven = along(seven, f"{name}.branch7x7x3_3", 192, "column")
        return torch.cat([three, conv(seven, f"{name}.branch7x7x3_4", 192, 3, stride=2), F.max_pool2d(x, 3, 2)], 1)

    def split(x, name):
        row = conv(x, f"{name}a", 384, (1, 3), padding=(0, 1))
        return torch.cat([row, conv(x, f"{name}b", 384, (3, 1), padding=(1, 0))], 1)

    def block_e(x, name, pooled):
        one = conv(x, f"{name}.branch1x1", 320, 1)
        three = split(conv(x, f"{name}.branch3x3_1", 384, 1), f"{name}.branch3x3_2")
        double = conv(conv(x, f"{name}.branch3x3dbl_1", 448, 1), f"{name}.branch3x3dbl_2", 384, 3, padding=1)
        double = split(double, f"{name}.branch3x3dbl_3")
        return torch.cat([one, three, double, conv(pooled, f"{name}.branch_pool", 192, 1)], 1)

    with torch.no_grad():
        x = torch.from_numpy(x)
        x = conv(conv(x, "Conv2d_1a_3x3", 32, 3, stride=2), "Conv2d_2a_3x3", 32, 3)
        x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3, padding=1), 3, 2)
        x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3), 3, 2)
        for name, pool in [("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)]:
            x = block_a(x, name, pool)
        x = block_b(x, "Mixed_6a")
        for name, inner in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)]:
            x = block_c(x, name, inner)
        x = block_d(x, "Mixed_7a")
        x = block_e(x, "Mixed_7b", mean_pool(x))
        x = block_e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        pooled = x.mean((2, 3))
        return pooled.numpy(), (pooled @ weights("fc.weight", 1008, 2048).T).numpy()


def network_input(pixels):
    return (pixels.astype(np.float32) - 128) / 128


if __name__ == "__main__":
    pooled, logits = reference(network_input(pixels()))
    np.savez(FROZEN, pooled=pooled, logits=logits)
