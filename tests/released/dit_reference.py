"""The MeanFlow authors' DiT in NumPy: float64, one example, images H W C, kernels as flax lays them out.

Written from the papers (Peebles and Xie 2023, arXiv 2212.09748; the MeanFlow paper, App. A), patch by patch and head by
head, for a dictionary of tensors with names joined by slashes.
"""

import math

import numpy as np
from released_files import positions


class Reference:
    """The network of `tensors` with this many heads."""

    def __init__(self, tensors, heads):
        self.tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
        self.heads = heads
        self.patch, _, self.channels, self.width = tensors["net/x_embedder/proj/kernel"].shape
        self.depth = sum(name.endswith("mlp/fc1/_flax_linear/bias") for name in tensors)

    def __call__(self, z, r, t, label):
        """u of z (height, width, channels)."""
        height, width, _ = z.shape
        rows, columns = height // self.patch, width // self.patch
        c = silu(self.times("t_embedder", t) + self.times("h_embedder", t - r) + self.label(label))
        x = np.stack([self.embedded(z, i, j) for i in range(rows) for j in range(columns)])
        x = x + positions(rows, columns, self.width).astype(np.float32)  # to which the released networks round it
        for block in range(self.depth):
            x = self.block(f"blocks/layers_{block}", x, c)
        shift, scale = np.split(self.dense("final_layer/adaLN_modulation/layers_1", c), 2)
        x = self.dense("final_layer/linear", norm(x) * (1 + scale) + shift)
        return self.image(x, rows, columns)

    def embedded(self, z, i, j):
        """The token of one patch."""
        p = self.patch
        patch = z[i * p : (i + 1) * p, j * p : (j + 1) * p]
        kernel, bias = (self.tensors[f"net/x_embedder/proj/{kind}"] for kind in ("kernel", "bias"))
        return np.einsum("yxc,yxcd->d", patch, kernel) + bias

    def image(self, tokens, rows, columns):
        p, c = self.patch, self.channels
        image = np.zeros((rows * p, columns * p, c))
        for token, values in enumerate(tokens):
            i, j = divmod(token, columns)
            for y in range(p):
                for x in range(p):
                    first = (y * p + x) * c
                    image[i * p + y, j * p + x] = values[first : first + c]
        return image

    def dense(self, name, x):
        kernel, bias = (self.tensors[f"net/{name}/_flax_linear/{kind}"] for kind in ("kernel", "bias"))
        return np.einsum("...i,io->...o", x, kernel) + bias

    def times(self, name, value):
        angles = value * np.exp(-math.log(10_000) * np.arange(128) / 128)
        hidden = silu(self.dense(f"{name}/mlp/layers_0", np.concatenate([np.cos(angles), np.sin(angles)])))
        return self.dense(f"{name}/mlp/layers_2", hidden)

    def label(self, label):
        return self.tensors["net/y_embedder/embedding_table/_flax_embedding/embedding"][label]

    def block(self, name, x, c):
        modulation = self.dense(f"{name}/adaLN_modulation/layers_1", c).reshape(6, -1)
        x = x + modulation[2] * self.attention(name, norm(x) * (1 + modulation[1]) + modulation[0])
        hidden = gelu(self.dense(f"{name}/mlp/fc1", norm(x) * (1 + modulation[4]) + modulation[3]))
        return x + modulation[5] * self.dense(f"{name}/mlp/fc2", hidden)

    def attention(self, name, x):
        size = self.width // self.heads
        qkv = self.dense(f"{name}/attn/qkv", x).reshape(-1, 3, self.heads, size)
        mixed = []
        for head in range(self.heads):
            q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            weights = np.exp(q @ k.T / math.sqrt(size))
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        return self.dense(f"{name}/attn/proj", np.concatenate(mixed, axis=1))

    def derivative(self, z, v, r, t, label, step=1e-5):
        """du/dt along (v, 0, 1), by central differences."""
        later, earlier = (self(z + s * v, r, t + s, label) for s in (step, -step))
        return (later - earlier) / (2 * step)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """Approximated by tanh."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    """Over the last axis, without scale and shift."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
