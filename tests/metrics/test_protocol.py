import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import data
from mf_eqx.metrics import (
    ADM,
    CIFAR_TRAIN,
    CIFAR_TRAIN_HALF_PIXEL,
    floor_to_pixels,
    LITE0,
    Protocol,
    resize_half_pixel,
    resize_tensorflow1,
    round_to_pixels,
    TORCH_FIDELITY,
)

LEVELS = np.arange(256)
PROTOCOLS = [ADM, TORCH_FIDELITY, CIFAR_TRAIN, CIFAR_TRAIN_HALF_PIXEL, LITE0]
INPUTS = {protocol.name: (299, 72 / 128) for protocol in PROTOCOLS} | {LITE0.name: (96, 73 / 128)}
"""The side of a network's input, and what becomes of the pixel 200."""
SAMPLES = np.linspace(-1.2, 1.2, 10_007).astype(np.float32)


def test_rounding_gives_the_nearest_level():
    exact = np.clip(127.5 * SAMPLES.astype(np.float64) + 128, 0, 255)
    # Where float32 cannot tell on which side of a step a sample lies, either level is right.
    sure = np.abs(exact - np.round(exact)) > 1e-4
    np.testing.assert_array_equal(np.asarray(round_to_pixels(jnp.asarray(SAMPLES)))[sure], np.floor(exact)[sure])


def test_flooring_lowers_as_many_levels_of_mapped_pixels_as_the_docstring_says():
    p, from_pixels = np.arange(256, dtype=np.uint8), data.FromPixels()

    def of_package(p):
        return from_pixels(mfx.Batch(p, None, np.array(0)), jax.random.key(0)).x

    for mapped, known in (
        (jnp.asarray(2 * (p.astype(np.float32) / 255) - 1), {63}),
        (of_package(p), {32, 47}),
        (jax.jit(of_package)(p), {32, 47}),
    ):
        lower = np.asarray(p, int) - np.asarray(floor_to_pixels(mapped), int)
        assert set(lower) == {0, 1} and lower.sum() in known


def test_flooring_gives_the_level_below():
    exact = 255 * np.clip(SAMPLES.astype(np.float64) / 2 + 0.5, 0, 1)
    sure = (np.abs(exact - np.round(exact)) > 1e-4) | (exact == 0) | (exact == 255)
    np.testing.assert_array_equal(np.asarray(floor_to_pixels(jnp.asarray(SAMPLES)))[sure], np.floor(exact)[sure])


def test_rounding_keeps_pixels_that_were_samples():
    samples = jnp.asarray(LEVELS / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(round_to_pixels(samples), LEVELS)


def test_pixels_survive_the_division_by_255_of_the_authors_code_and_the_product_of_torchmetrics():
    floored = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal((floored / np.float32(255) * np.float32(255)).astype(np.uint8), LEVELS)


def test_bfloat16_samples_are_not_rounded_to_bfloat16_levels():
    x = jnp.asarray([0.5], jnp.bfloat16)
    assert round_to_pixels(x)[0] == 191 and floor_to_pixels(x)[0] == 191


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_constant_pixels_reach_the_network_as_they_are(protocol):
    pixels = jnp.full((1, 3, 8, 8), 200, jnp.uint8)
    side, value = INPUTS[protocol.name]
    np.testing.assert_allclose(protocol(pixels), np.full((1, 3, side, side), value), rtol=1e-6)


@pytest.mark.parametrize("x", [jnp.arange(64, dtype=jnp.uint8), jnp.linspace(-1.2, 1.2, 64)], ids=["pixels", "samples"])
def test_grey_images_are_three_equal_channels(x):
    grey = x.reshape(1, 1, 8, 8)
    for protocol in (ADM, LITE0):
        found = protocol(grey)
        np.testing.assert_array_equal(found[:, :1], found[:, 1:2])
        np.testing.assert_array_equal(found[:, :1], found[:, 2:])
        # Some CPUs add up the products of three channels in another order than those of one.
        np.testing.assert_allclose(found, protocol(jnp.repeat(grey, 3, axis=1)), atol=1e-6)


def test_samples_go_the_way_of_their_pixels():
    x = jax.random.uniform(jax.random.key(0), (2, 3, 8, 8), minval=-1.2, maxval=1.2)
    for protocol in PROTOCOLS:
        np.testing.assert_array_equal(protocol(x), protocol(protocol.quantise(x)))


def test_without_rounding_has_a_derivative_everywhere_and_the_same_pixels_up_to_half_a_level():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8)), jnp.float32)
    smooth = LITE0.without_rounding()
    assert float(jnp.abs(smooth(x) - LITE0(x)).max()) < 0.6 / 128  # the rounding to half a level, and float32's
    slope = jax.grad(lambda x: jnp.sum(smooth(x)))(1.5 * x)
    np.testing.assert_allclose(slope, 3 * 144 * 127.5 / 128, rtol=0.3)  # 96 x 96 / 8 x 8 pixels of three channels each
    assert not jax.grad(lambda x: jnp.sum(LITE0(x)))(x).any()
    assert smooth.name != LITE0.name


def test_protocols_have_names_of_their_own():
    assert len({protocol.name for protocol in PROTOCOLS}) == len(PROTOCOLS)


def test_adm_and_torch_fidelity_are_one_function():
    assert (ADM.quantise, ADM.resize) == (TORCH_FIDELITY.quantise, TORCH_FIDELITY.resize)


def test_cifar_protocols_differ_in_the_resize_alone():
    assert CIFAR_TRAIN.quantise is CIFAR_TRAIN_HALF_PIXEL.quantise is floor_to_pixels
    assert (CIFAR_TRAIN.resize, CIFAR_TRAIN_HALF_PIXEL.resize) == (resize_tensorflow1, resize_half_pixel)


def test_protocol_of_a_user_is_made_from_public_parts():
    mine = Protocol("mine", round_to_pixels, lambda x: x[..., :1, :1] + jnp.zeros((299, 299)))
    np.testing.assert_array_equal(mine(jnp.ones((1, 3, 4, 4))), np.full((1, 3, 299, 299), 127 / 128))


@pytest.mark.parity
@pytest.mark.parametrize(("antialias", "protocol"), [(False, CIFAR_TRAIN), (True, CIFAR_TRAIN_HALF_PIXEL)])
def test_input_of_the_network_is_that_of_torchmetrics(antialias, protocol):
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    x = np.random.default_rng(0).uniform(-1.1, 1.1, (2, 3, 32, 32)).astype(np.float32)
    y = torch.floor(torch.clamp(torch.from_numpy(x) * 0.5 + 0.5, 0, 1) * 255) / 255.0

    class Seen(Exception):
        pass

    def first(given):
        raise Seen(given)

    network = fid.NoTrainInceptionV3.__new__(fid.NoTrainInceptionV3)
    torch.nn.Module.__init__(network)
    network.features_list, network.use_antialias = ["2048"], antialias
    object.__setattr__(network, "Conv2d_1a_3x3", first)
    with pytest.raises(Seen) as seen:
        network._torch_fidelity_forward((y * 255).byte())
    np.testing.assert_allclose(protocol(jnp.asarray(x)), seen.value.args[0].numpy(), atol=2e-5)


@pytest.mark.parametrize("quantise", [round_to_pixels, floor_to_pixels])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_what_is_no_samples_is_not_made_pixels(unchecked, quantise, dtype):
    with pytest.raises(ValueError, match=r"x must be samples in floating point, in \[-1, 1\], got "):
        quantise(jnp.ones((3, 4, 4), dtype))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, bool])
def test_images_that_are_neither_samples_nor_pixels_are_refused(unchecked, dtype):
    with pytest.raises(ValueError, match="x must be samples in floating point or pixels in uint8, got "):
        ADM(jnp.ones((3, 4, 4), dtype))


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 4, 4, 3), (4, 4)])
def test_images_that_are_neither_grey_nor_in_colour_are_refused(unchecked, shape):
    with pytest.raises(
        ValueError, match=r"x must be images \(\.\.\., channels, height, width\) with 1 or 3 channels, got "
    ):
        ADM(jnp.ones(shape))
