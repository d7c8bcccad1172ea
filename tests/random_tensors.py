"""Weights for networks of several frameworks: the same numbers wherever they are made, from the name alone."""

import zlib

import numpy as np


def random_tensor(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Normal numbers of standard deviation `scale` / sqrt(fan-in), in float32.

    The fan-in is that of torch's layout (out, in, ...); for vectors it is 1, and a tenth of `scale` is taken. NumPy
    promises this stream of bits for all its versions.
    """
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    numbers = generator.standard_normal(shape)
    fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 100.0
    return (scale * numbers / np.sqrt(fan_in)).astype(np.float32)
