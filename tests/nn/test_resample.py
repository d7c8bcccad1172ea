"""Halving and doubling images are the depthwise convolutions that they stand for."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import nn

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
SHAPES = [(3, 8, 6), (1, 2, 2), (2, 4, 10)]


def image(shape):
    return jr.normal(jr.key(0), shape, jnp.float64)


def depthwise(x, **options):
    """The filter over each channel of its own, by XLA's convolution."""
    kernel = jnp.broadcast_to(FILTER, (len(x), 1, 4, 4))
    return jax.lax.conv_general_dilated(x[None], kernel, feature_group_count=len(x), **options)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_downsampling_is_a_convolution_with_stride_two(x64, shape):
    x = image(shape)
    expected = depthwise(x, window_strides=(2, 2), padding=[(1, 1)] * 2)
    np.testing.assert_allclose(nn.downsample(x), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3)])
def test_upsampling_is_four_times_a_transposed_convolution_with_stride_two(x64, shape):
    x = image(shape)
    expected = 4 * depthwise(x, window_strides=(1, 1), padding=[(2, 2)] * 2, lhs_dilation=(2, 2))
    np.testing.assert_allclose(nn.upsample(x), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_upsampling_is_four_times_the_transpose_of_downsampling(x64, shape):
    channels, height, width = shape
    (transposed,) = jax.linear_transpose(nn.downsample, jnp.zeros((channels, 2 * height, 2 * width)))(image(shape))
    np.testing.assert_allclose(nn.upsample(image(shape)), 4 * transposed, rtol=1e-13, atol=1e-14)


def test_both_keep_the_brightness_of_a_plain_image_away_from_its_borders():
    ones = jnp.ones((1, 8, 8))
    np.testing.assert_allclose(nn.downsample(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(nn.upsample(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)


@pytest.mark.parametrize("resample", [nn.downsample, nn.upsample])
def test_resampling_keeps_bfloat16(resample):
    assert resample(jnp.ones((1, 4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (1, 1)])
def test_odd_sides_cannot_be_halved(height, width):
    with pytest.raises(ValueError, match=f"height and width must be even, got {height} and {width}"):
        nn.downsample(jnp.ones((1, height, width)))
