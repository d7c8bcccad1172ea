import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx.metrics import resize_half_pixel, resize_tensorflow1


def images(*shape):
    return np.random.default_rng(3).integers(0, 256, shape).astype(np.float32)


def by_definition(image, size):
    """TensorFlow 1's bilinear resize of one channel, pixel by pixel, in float64."""
    height, width = image.shape
    new = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[top, left] * (left + 1 - x) + image[top, right] * (x - left)
            below = image[bottom, left] * (left + 1 - x) + image[bottom, right] * (x - left)
            new[i, j] = above * (top + 1 - y) + below * (y - top)
    return new


@pytest.mark.parametrize(("shape", "size"), [((5, 7), 12), ((9, 4), 3), ((6, 6), 6), ((1, 3), 4), ((32, 32), 99)])
def test_tensorflow_resize_follows_its_definition(shape, size):
    image = images(*shape)
    # Levels reach 255, of which float32 resolves 2e-5; places of pixels are rounded to float32 as in the kernel.
    np.testing.assert_allclose(resize_tensorflow1(jnp.asarray(image), size), by_definition(image, size), atol=2e-3)


@pytest.mark.parametrize("width", [32, 256, 299, 400])
def test_tensorflow_resize_to_299_follows_its_definition_along_a_row(width):
    image = images(2, width)
    ours = resize_tensorflow1(jnp.asarray(image))[0]
    np.testing.assert_allclose(ours, by_definition(np.tile(image[:1], (2, 1)), 299)[0], atol=1e-2)


def test_tensorflow_resize_keeps_the_first_pixel_and_repeats_the_last():
    image = images(8, 8)
    new = resize_tensorflow1(jnp.asarray(image), 16)
    assert new[0, 0] == image[0, 0] and new[-1, -1] == image[-1, -1] and new[-1, -2] == image[-1, -1]


def test_resizes_take_channels_and_rows_as_they_come():
    x = jnp.asarray(images(2, 3, 5, 6))
    for resize in (resize_tensorflow1, resize_half_pixel):
        whole, parts = resize(x, 9), jax.vmap(jax.vmap(lambda one, resize=resize: resize(one, 9)))(x)
        np.testing.assert_allclose(whole, parts, atol=1e-4)


@pytest.mark.parametrize(("width", "size"), [(32, 299), (7, 12)])
def test_half_pixel_resize_puts_centres_on_centres_where_it_grows(width, size):
    row = images(width)
    expected = np.interp((np.arange(size) + 0.5) * width / size - 0.5, np.arange(width), row)
    new = resize_half_pixel(jnp.broadcast_to(row, (width, width)), size)
    np.testing.assert_allclose(new, np.tile(expected, (size, 1)), atol=1e-3)


def test_half_pixel_resize_averages_where_it_shrinks():
    # A triangle of half-width 2 around 0.5, 2.5, 4.5, ...: weights 1, 3, 3, 1 of 8.
    row = images(8)
    expected = (row[1] + 3 * row[2] + 3 * row[3] + row[4]) / 8
    np.testing.assert_allclose(resize_half_pixel(jnp.broadcast_to(row, (8, 8)), 4)[:, 1], expected, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 64, 48), (1, 3, 400, 320)])
def test_half_pixel_resize_is_that_of_torch(shape):
    torch = pytest.importorskip("torch")
    x = images(*shape)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x), (299, 299), mode="bilinear", align_corners=False, antialias=True
    )
    # Places near 300 are rounded to 3e-5, times steps of up to 255 between neighbours.
    np.testing.assert_allclose(resize_half_pixel(jnp.asarray(x)), theirs, atol=5e-3)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 64, 48), (1, 3, 400, 320)])
def test_tensorflow_resize_is_that_of_torch_fidelity(shape):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = images(*shape)
    resized = theirs.interpolate_bilinear_2d_like_tensorflow1x(torch.from_numpy(x), (299, 299), align_corners=False)
    np.testing.assert_allclose(resize_tensorflow1(jnp.asarray(x)), resized, atol=5e-5)


RESIZES = pytest.mark.parametrize("resize", [resize_tensorflow1, resize_half_pixel])


@RESIZES
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_integers_are_refused(unchecked, resize, dtype):
    """Interpolated in uint8, shares of a pixel would be 0."""
    with pytest.raises(ValueError, match="x must be floating point, got "):
        resize(jnp.ones((3, 8, 8), dtype), 4)


@RESIZES
@pytest.mark.parametrize("shape", [(3, 0, 8), (3, 8, 0), (8,)])
def test_images_without_pixels_are_refused(unchecked, resize, shape):
    with pytest.raises(ValueError, match=r"x must be \(..., height, width\), neither of them 0, got"):
        resize(jnp.zeros(shape), 4)


@RESIZES
@pytest.mark.parametrize(
    ("size", "message"), [(0, "size must be an integer >= 1, got 0"), (2.5, "size must be an integer >= 1, got 2.5")]
)
def test_size_of_no_pixels_is_refused(unchecked, resize, size, message):
    with pytest.raises(ValueError, match=message):
        resize(jnp.zeros((3, 8, 8)), size)
