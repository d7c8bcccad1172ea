"""SiT in torch, batched, with the names of its state dictionaries.

Ma et al. 2024 (arXiv 2401.08740), whose transformer is DiT (Peebles and Xie 2023, arXiv 2212.09748). Time runs from
noise at 0 to data at 1.
"""

import math

import torch
from torch.nn import Conv2d, Embedding, Linear, Module, ModuleDict, ModuleList, Parameter, Sequential, SiLU
from torch.nn.functional import gelu, layer_norm, pixel_shuffle, scaled_dot_product_attention


def modulated(x, shift, scale):
    normal = layer_norm(x, x.shape[-1:], eps=1e-6)
    return normal * (1 + scale[:, None]) + shift[:, None]


class Block(Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = ModuleDict({"qkv": Linear(width, 3 * width), "proj": Linear(width, width)})
        self.mlp = ModuleDict({"fc1": Linear(width, 4 * width), "fc2": Linear(4 * width, width)})
        self.adaLN_modulation = Sequential(SiLU(), Linear(width, 6 * width))

    def forward(self, x, c):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.mixed(modulated(x, shift_1, scale_1))
        hidden = gelu(self.mlp["fc1"](modulated(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.mlp["fc2"](hidden)

    def mixed(self, x):
        parts = self.attn["qkv"](x).unflatten(-1, (3, self.heads, -1))  # rows, tokens, 3, heads, size
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return self.attn["proj"](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiT(Module):
    """On images of `grid` patches."""

    def __init__(self, channels, grid, depth, width, heads, patch, labels):
        super().__init__()
        self.channels, self.grid, self.patch = channels, grid, patch
        self.pos_embed = Parameter(torch.zeros(1, grid[0] * grid[1], width), requires_grad=False)
        self.x_embedder = ModuleDict({"proj": Conv2d(channels, width, patch, stride=patch)})
        self.t_embedder = ModuleDict({"mlp": Sequential(Linear(256, width), SiLU(), Linear(width, width))})
        self.y_embedder = ModuleDict({"embedding_table": Embedding(labels + 1, width)})
        self.blocks = ModuleList([Block(width, heads) for _ in range(depth)])
        last = Linear(width, patch * patch * 2 * channels)
        self.final_layer = ModuleDict(
            {"linear": last, "adaLN_modulation": Sequential(SiLU(), Linear(width, 2 * width))}
        )

    def forward(self, z, t, label):
        """The velocity towards the data, at times t of z (rows, channels, height, width)."""
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=t.dtype) / 128)
        times = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        c = times + self.y_embedder["embedding_table"](label)
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        return self.image(self.final_layer["linear"](modulated(x, shift, scale)))[:, : self.channels]

    def image(self, x):
        """Of tokens whose features are (row, column, channel): torch's shuffle wants (channel, row, column)."""
        features = x.unflatten(-1, (self.patch**2, 2 * self.channels)).transpose(2, 3).flatten(2)
        return pixel_shuffle(features.transpose(1, 2).unflatten(2, self.grid), self.patch)
