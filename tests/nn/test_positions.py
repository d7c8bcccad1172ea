import numpy as np
import pytest

from mf_eqx import nn


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 5)])
def test_positions_encode_the_column_in_the_first_half_and_the_row_in_the_second(height, width):
    size = 16
    quarter = size // 4
    expected = np.zeros((height * width, size))
    for row in range(height):
        for column in range(width):
            token = row * width + column  # tokens row by row
            for k in range(quarter):
                frequency = 10_000 ** (-k / quarter)
                expected[token, k] = np.sin(column * frequency)
                expected[token, quarter + k] = np.cos(column * frequency)
                expected[token, 2 * quarter + k] = np.sin(row * frequency)
                expected[token, 3 * quarter + k] = np.cos(row * frequency)
    positions = nn.sinusoidal_positions(height, width, size)
    assert positions.dtype == np.float32
    np.testing.assert_allclose(positions, expected, atol=1e-7)


def test_positions_refuse_a_size_without_quarters():
    with pytest.raises(ValueError, match="size must be a positive multiple of 4, got 6"):
        nn.sinusoidal_positions(2, 2, 6)


def test_line_positions_are_sines_then_cosines():
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(3) / 3)
    found = nn.sinusoidal_line_positions(5, 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-7)


@pytest.mark.parametrize("size", [0, 5])
def test_line_positions_refuse_a_size_without_halves(size):
    with pytest.raises(ValueError, match=f"size must be a positive multiple of 2, got {size}"):
        nn.sinusoidal_line_positions(2, size)
