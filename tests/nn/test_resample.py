"""Halving and doubling images and sequences are the depthwise convolutions that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import nn

SHAPES = [(3, 8, 6), (1, 2, 2), (2, 4, 10), (3, 8), (1, 2)]


def image(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))


def depthwise(x, **options):
    """The filter over each channel of its own, by XLA's convolution."""
    line = np.array([1, 3, 3, 1]) / 8
    taps = line if x.ndim == 2 else np.outer(line, line)
    kernel = jnp.broadcast_to(taps, (len(x), 1, *taps.shape))
    return jax.lax.conv_general_dilated(x[None], kernel, feature_group_count=len(x), **options)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_downsampling_is_a_convolution_with_stride_two(x64, shape):
    x = image(shape)
    sides = x.ndim - 1
    options = {"window_strides": (2,) * sides, "padding": [(1, 1)] * sides}
    found, expected = jax.jit(lambda x: (nn.downsample(x), depthwise(x, **options)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3), (2, 3)])
def test_upsampling_is_twice_a_transposed_convolution_with_stride_two_for_each_side(x64, shape):
    x = image(shape)
    sides = x.ndim - 1
    options = {"window_strides": (1,) * sides, "padding": [(2, 2)] * sides, "lhs_dilation": (2,) * sides}
    found, expected = jax.jit(lambda x: (nn.upsample(x), 2**sides * depthwise(x, **options)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_upsampling_is_twice_the_transpose_of_downsampling_for_each_side(x64, shape):
    channels, *sides = shape
    (transposed,) = jax.linear_transpose(nn.downsample, jnp.zeros((channels, *(2 * side for side in sides))))(
        image(shape)
    )
    np.testing.assert_allclose(nn.upsample(image(shape)), 2 ** len(sides) * transposed, rtol=1e-13, atol=1e-14)


def test_both_keep_the_brightness_of_a_plain_image_away_from_its_borders():
    ones = jnp.ones((1, 8, 8))
    np.testing.assert_allclose(nn.downsample(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)
    np.testing.assert_allclose(nn.upsample(ones)[:, 1:-1, 1:-1], 1, rtol=1e-6)


@pytest.mark.parametrize("resample", [nn.downsample, nn.upsample])
def test_resampling_keeps_bfloat16(resample):
    assert resample(jnp.ones((1, 4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("sides", [(3, 4), (4, 3), (1, 1), (3,)])
def test_odd_sides_cannot_be_halved(sides):
    with pytest.raises(ValueError, match=rf"sides must be even, got \({', '.join(map(str, sides))}"):
        nn.downsample(jnp.ones((1, *sides)))
