"""Fashion-MNIST in one evaluation: 70,000 real images that come as a Debian package.

    apt install dataset-fashion-mnist                          30 MB, to /usr/share/datasets/fashion-mnist
    python experiments/fashion.py --preset quick               seven minutes on one CPU core
    python experiments/fashion.py                              73 minutes on one CPU core
    python experiments/fashion.py --preset guided              with guidance inside the target: 94 minutes
    python experiments/fashion.py --preset gpu                 a large network, for a GPU, not run yet
    python experiments/fashion.py --preset quick --network unet     20 minutes on one CPU core
    python experiments/fashion.py --identity-share 0           Flow Matching with the same network
    python experiments/fashion.py --method Shortcut            another method; --identity mine.py:Mix one of your own
    python experiments/fashion.py --data folder                the same four IDX files from elsewhere, gzipped or not

This is images.py with these data: 60,000 images to train on and 10,000 to test with, of 28 x 28 pixels in grey, ten
balanced classes. The same command continues a run that was stopped, or killed. RESULTS.md has the figures.

Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, Xiao, Rasul, Vollgraf, 2017, arXiv
1708.07747.
"""

import dataclasses
from pathlib import Path

import images

from mf_eqx import run

PLACE, CLASSES = images.image_sources.FASHION_MNIST, images.image_sources.FASHION_CLASSES
"""Where the package has the files, and what the labels mean."""
Config = images.Config


def check_files(paths: tuple[str, ...], flag: str = "data") -> None:
    """Refuses all but a folder with the four files."""
    found = [images.image_sources.mnist_files(Path(paths[0]), part) for part in ("train", "t10k")] if paths else []
    if len(paths) != 1 or [*map(len, found)] != [2, 2]:
        rule = "must be a folder with the four IDX files of Fashion-MNIST (train-images-idx3-ubyte and so on, or .gz)"
        hint = f"apt install dataset-fashion-mnist brings them to {PLACE}"
        raise ValueError(f"--{flag} {rule}, got {' '.join(paths) or 'none'}: {hint}")


def main(config: Config) -> None:
    """Train on Fashion-MNIST, then judge what the network generates in one evaluation."""
    check_files(config.data)
    images.main(config, CLASSES)


PRESETS = {
    name: (about, dataclasses.replace(config, data=(PLACE,))) for name, (about, config) in images.PRESETS.items()
}

if __name__ == "__main__":
    run.main(main, PRESETS, description=__doc__)
