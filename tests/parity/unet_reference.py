"""The CIFAR-10 U-Net in torch, batched, with the names of EDM's state dictionaries.

DDPM++ (Song et al. 2021, arXiv 2011.13456) in the form of Karras et al. 2022 (arXiv 2206.00364), with two times
as in the MeanFlow paper. Without dropout, so that it may be differentiated.
"""

import math

import torch
from torch.nn.functional import conv2d, conv_transpose2d, silu


class Convolution(torch.nn.Conv2d):
    """With the padding that keeps the size."""

    def __init__(self, inputs, outputs, kernel=3):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)


class Resampled(Convolution):
    """A convolution of what a smooth filter left of its input, or made of it."""

    def __init__(self, inputs, outputs, kernel=3):
        super().__init__(inputs, outputs, kernel)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None])

    def filters(self):
        return self.resample_filter.expand(self.in_channels, 1, 4, 4)


class Halved(Resampled):
    def forward(self, x):
        return super().forward(conv2d(x, self.filters(), stride=2, padding=1, groups=self.in_channels))


class Doubled(Resampled):
    def forward(self, x):
        filters = 4 * self.filters()
        return super().forward(conv_transpose2d(x, filters, stride=2, padding=1, groups=self.in_channels))


def norm(channels):
    return torch.nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(torch.nn.Module):
    """A residual block, with attention after it or not.

    The output channels of `qkv` are, if `interleaved`, those of q, k and v in turn (EDM); else all of q first, then all
    of k, then of v (as in guided diffusion).
    """

    def __init__(self, inputs, outputs, embedding, convolution=Convolution, attention=False, interleaved=False):
        super().__init__()
        self.norm0 = norm(inputs)
        self.conv0 = convolution(inputs, outputs)
        self.affine = torch.nn.Linear(embedding, outputs)
        self.norm1 = norm(outputs)
        self.conv1 = Convolution(outputs, outputs)
        changes = inputs != outputs or convolution is not Convolution
        self.skip = convolution(inputs, outputs, kernel=1) if changes else torch.nn.Identity()
        self.attention, self.interleaved = attention, interleaved
        if attention:
            self.norm2 = norm(outputs)
            self.qkv = Convolution(outputs, 3 * outputs, kernel=1)
            self.proj = Convolution(outputs, outputs, kernel=1)

    def forward(self, x, embedding):
        hidden = self.conv0(silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        x = (self.skip(x) + self.conv1(silu(self.norm1(hidden)))) / math.sqrt(2)
        return (x + self.attend(x)) / math.sqrt(2) if self.attention else x

    def attend(self, x):
        rows, channels, height, width = x.shape
        parts = self.qkv(self.norm2(x)).flatten(2)
        if self.interleaved:
            query, key, value = (parts[:, first::3] for first in range(3))
        else:
            query, key, value = parts.split(channels, dim=1)
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(channels), dim=-1)
        return self.proj((value @ weights.transpose(1, 2)).reshape(rows, channels, height, width))


def sinusoid(time, count):
    """`count` sines, then as many cosines, of angles between time and time / 10000."""
    angles = time[:, None] * 10_000.0 ** -torch.linspace(0, 1, count, dtype=time.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNet(torch.nn.Module):
    """u(z, r, t | augmentation label) for a batch.

    `size` names the blocks: height and width of the images, of which the weights know nothing else. `attention` are the
    sizes at which blocks attend.
    """

    def __init__(
        self,
        size=32,
        channels=3,
        width=128,
        multipliers=(2, 2, 2),
        blocks=4,
        attention=(16,),
        augmentation=6,
        interleaved=False,
    ):
        super().__init__()
        self.width, wide = width, 4 * width
        self.map_augment = torch.nn.Linear(augmentation, wide, bias=False) if augmentation else None
        self.map_layer0 = torch.nn.Linear(wide, wide)
        self.map_layer1 = torch.nn.Linear(wide, wide)
        sizes = [size >> level for level in range(len(multipliers))]

        def block(inputs, outputs, **options):
            return Block(inputs, outputs, wide, interleaved=interleaved, **options)

        self.enc, now, kept = torch.nn.ModuleDict(), width, [width]
        self.enc[f"{size}x{size}_conv"] = Convolution(channels, width)
        for size, multiplier in zip(sizes, multipliers, strict=True):
            if size != sizes[0]:
                self.enc[f"{size}x{size}_down"] = block(now, now, convolution=Halved)
                kept.append(now)
            for i in range(blocks):
                outputs = multiplier * width
                self.enc[f"{size}x{size}_block{i}"] = block(now, outputs, attention=size in attention)
                now = outputs
                kept.append(now)

        self.dec = torch.nn.ModuleDict()
        self.dec[f"{size}x{size}_in0"] = block(now, now, attention=True)
        self.dec[f"{size}x{size}_in1"] = block(now, now)
        for size, multiplier in zip(reversed(sizes), reversed(multipliers), strict=True):
            if size != sizes[-1]:
                self.dec[f"{size}x{size}_up"] = block(now, now, convolution=Doubled)
            for i in range(blocks + 1):
                outputs = multiplier * width
                attends = i == blocks and size in attention
                self.dec[f"{size}x{size}_block{i}"] = block(now + kept.pop(), outputs, attention=attends)
                now = outputs
        self.dec[f"{size}x{size}_aux_norm"] = norm(now)
        self.dec[f"{size}x{size}_aux_conv"] = Convolution(now, channels)

    def embed(self, r, t, augmentation=None):
        x = torch.cat([sinusoid(t, self.width), sinusoid(t - r, self.width)], dim=1)
        if augmentation is not None:
            x = x + self.map_augment(augmentation)
        return silu(self.map_layer1(silu(self.map_layer0(x))))

    def forward(self, z, r, t, augmentation=None):
        embedding, kept, x = self.embed(r, t, augmentation), [], z
        for module in self.enc.values():
            x = module(x, embedding) if isinstance(module, Block) else module(x)
            kept.append(x)
        *blocks, last_norm, last_convolution = self.dec.items()
        for name, block in blocks:
            x = block(torch.cat([x, kept.pop()], dim=1) if "_block" in name else x, embedding)
        return last_convolution[1](silu(last_norm[1](x)))


def multiply_adds(network, *inputs):
    """Of one forward pass: each layer's weights as often as they meet a place, and attention's two products.

    A filter counts as one tap per weight, channel and place of the smaller image.
    """
    total = 0

    def count(module, inputs, output):
        nonlocal total
        places = math.prod(output.shape[2:])
        total += output.shape[0] * module.weight.numel() * places
        if isinstance(module, Resampled):
            small = min(places, math.prod(inputs[0].shape[2:]))
            total += output.shape[0] * 16 * small * module.in_channels

    def count_attention(module, inputs, output):
        nonlocal total
        if module.attention:
            total += 2 * output.numel() * math.prod(output.shape[2:])

    layers = (torch.nn.Conv2d, torch.nn.Linear)
    for module in network.modules():
        if isinstance(module, layers):
            module.register_forward_hook(count)
        elif isinstance(module, Block):
            module.register_forward_hook(count_attention)
    network(*inputs)
    return total
