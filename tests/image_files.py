"""Files of images with labels as scripts read them: those of MNIST and of CIFAR-10."""

import gzip
import os

import numpy as np


def save_idx(path, values, opened=open):
    """Numbers from 0 to 255, in an IDX file."""
    values = np.asarray(values, np.uint8)
    with opened(path, "wb") as file:
        file.write(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


def save_mnist(folder, train, test, suffix=""):
    """The four files of a data set like MNIST, of images of one channel and their labels; zipped for a suffix."""
    os.makedirs(folder)
    for part, (x, label) in (("train", train), ("t10k", test)):
        opened = gzip.open if suffix else open
        save_idx(f"{folder}/{part}-images-idx3-ubyte{suffix}", x, opened)
        save_idx(f"{folder}/{part}-labels-idx1-ubyte{suffix}", label, opened)


def save_files(folder, train=300, test=100, side=8, seed=9):
    """The files of MNIST with random images, ten classes in turn."""
    draws = np.random.default_rng(seed)
    drawn = ((draws.integers(0, 256, (count, side, side), np.uint8), np.arange(count) % 10) for count in (train, test))
    save_mnist(folder, *drawn)


def save_cifar10(folder, x, label=0, test=None):
    """The binary files of CIFAR-10: five parts of the images, and `test`, a pair of other images and labels, in one
    more."""
    os.makedirs(folder)
    for number, part in enumerate(np.split(_records(x, label), 5), start=1):
        part.tofile(f"{folder}/data_batch_{number}.bin")
    if test is not None:
        _records(*test).tofile(f"{folder}/test_batch.bin")


def _records(x, label):
    first = np.broadcast_to(np.asarray(label, np.uint8), len(x))
    return np.concatenate([first[:, None], x.reshape(len(x), -1)], axis=1)
