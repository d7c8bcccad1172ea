"""The four files of a data set like MNIST, with images that are drawn."""

import numpy as np


def save_files(folder, train=300, test=100, side=8, seed=9):
    """Random images and labels, ten classes in turn."""
    draws = np.random.default_rng(seed)
    folder.mkdir()
    for part, count in (("train", train), ("t10k", test)):
        x = draws.integers(0, 256, (count, side, side), np.uint8)
        sizes = b"".join(size.to_bytes(4, "big") for size in x.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + sizes + x.tobytes())
        label = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + sizes[:4] + label.tobytes())
