"""Augmentation against `augmentation_reference.py`; what that gives is frozen in `augmentation.npz`.

PYTHONPATH=tests python tests/parity/test_augmentation_parity.py     writes the file anew
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_tensors import random_tensor

import mf_eqx as mfx
from mf_eqx import data

FROZEN = Path(__file__).with_name("augmentation.npz")
SIDES = [(16, 16), (9, 14)]  # height, width
DRAWS = 6


def image(height, width):
    """In [-1, 1], rough."""
    numbers = random_tensor("image", (3, height, width), scale=np.sqrt(height * width))
    return np.clip(0.5 * numbers, -1, 1)


def drawn(i):
    """(flip, scale, stretch, angle, shift): each motion alone, then together, then so far that the border is left."""
    scale, stretch, angle, right, down = random_tensor(f"draw {i}", (1, 5), scale=np.sqrt(5))[0]
    if i < 3:
        scale, stretch, right, down = (
            number * (i == motion) for number, motion in zip((scale, stretch, right, down), (0, 1, 2, 2), strict=True)
        )
    if i == DRAWS - 1:
        scale, right = -5.0, 4.0
    return bool(i % 2), scale, stretch, 2 * angle, (right, down)


def now():
    import augmentation_reference as reference

    return {
        f"{height}x{width}": np.stack([reference.apply(image(height, width), *drawn(i)) for i in range(DRAWS)])
        for height, width in SIDES
    }


def ours(i):
    flip, *numbers, shift = drawn(i)
    arrays = (jnp.asarray(number, jnp.float32) for number in (*numbers, shift))
    return data.Augmentation(jnp.asarray(flip), *arrays)


@pytest.mark.parametrize("sides", SIDES)
def test_augmented_images_are_those_of_the_reference(sides):
    apply = jax.jit(data.EDMAugmentation().apply)
    expected = np.load(FROZEN, allow_pickle=False)["{}x{}".format(*sides)]
    x = jnp.asarray(image(*sides))
    for i in range(DRAWS):
        np.testing.assert_allclose(apply(x, ours(i)), expected[i], rtol=0, atol=1e-4)
        assert np.abs(expected[i] - x).max() > 0.1


def test_random_draws_give_the_images_of_the_reference():
    pytest.importorskip("scipy")
    import augmentation_reference as reference

    pipe, x = data.EDMAugmentation(probability=0.6), image(12, 10)
    apply, draw = jax.jit(pipe.apply), jax.jit(pipe.draw)
    for key in jax.random.split(jax.random.key(0), 8):
        numbers = draw(key)
        expected = reference.apply(x, *(np.asarray(number, np.float64) for number in numbers))
        np.testing.assert_allclose(apply(jnp.asarray(x), numbers), expected, rtol=0, atol=1e-4)


def test_frozen_file_is_what_the_reference_gives_now():
    pytest.importorskip("scipy")
    held = np.load(FROZEN, allow_pickle=False)
    made = now()
    assert made.keys() == set(held.files)
    for name, expected in made.items():
        np.testing.assert_allclose(held[name], expected, atol=1e-12)


def test_low_pass_of_the_reference_is_the_wavelet_s():
    # Orthonormal to its even shifts, six vanishing moments of the high-pass, and the most symmetric of those filters.
    pytest.importorskip("scipy")
    from augmentation_reference import LOW_PASS as taps

    shifted = [taps[2 * k :] @ taps[: len(taps) - 2 * k] for k in range(6)]
    np.testing.assert_allclose(shifted, [1, 0, 0, 0, 0, 0], atol=1e-11)
    places = np.arange(12) - 5.5
    moments = [((-1.0) ** np.arange(12) * taps) @ places**power for power in range(6)]
    np.testing.assert_allclose(moments, 0, atol=1e-7)
    np.testing.assert_allclose(taps.sum(), np.sqrt(2), rtol=1e-11)
    centre = (taps**2) @ np.arange(12)
    assert 4.5 < centre < 5.5  # the other six taps' order would put it beyond the middle


def test_row_s_condition_has_the_label_of_what_happened_to_its_image():
    pytest.importorskip("scipy")
    import augmentation_reference as reference

    pipe, x = data.EDMAugmentation(probability=1.0), image(12, 10)
    row = jax.jit(pipe)(mfx.Batch(jnp.asarray(x), jnp.asarray(3), jnp.asarray(5)), jax.random.key(1))
    flip, scale, along, across, right, down = np.asarray(row.condition.augmentation, np.float64)
    # w at the angle a has the label of -w at a + pi, and another image: so it is in EDM, too.
    stretch, angle = np.hypot(along, across), np.arctan2(across, along)
    candidates = [
        reference.apply(x, flip > 0.5, scale, sign * stretch, angle + (sign < 0) * np.pi, (right, down))
        for sign in (1, -1)
    ]
    errors = [np.abs(np.asarray(row.x) - candidate).max() for candidate in candidates]
    assert min(errors) < 1e-4 < max(errors)
    assert int(row.condition.label) == 3 and int(row.index) == 5


if __name__ == "__main__":
    np.savez_compressed(FROZEN, **now())
