import numpy as np
import pytest

from mf_eqx import picture

image = pytest.importorskip("matplotlib.image")

SCALE, PAD, GAP = 5, 8, 4


def grid(rows: int = 2, columns: int = 3, channels: int = 1, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 16, (rows, columns, channels, height, width)).astype(np.float32)


def saved(tmp_path, images, low: float = 0.0, high: float = 16.0, **options) -> np.ndarray:
    """The colours of the saved file, as bytes."""
    picture.save_image_grid(tmp_path / "grid.png", images, low, high, **options)
    return np.round(255 * image.imread(tmp_path / "grid.png")[..., :3]).astype(np.uint8)


def large(picture: np.ndarray) -> np.ndarray:
    """One image as it must appear: (channels, height, width) from 0 to 16, every pixel a square."""
    colours = np.round(255 * picture / 16).transpose(1, 2, 0)
    return np.broadcast_to(colours, (*colours.shape[:2], 3)).repeat(SCALE, 0).repeat(SCALE, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_an_exact_square_at_its_place(tmp_path, channels):
    images = grid(channels=channels)
    file = saved(tmp_path, images, scale=SCALE)
    height, width = 4 * SCALE, 6 * SCALE
    for row in range(2):
        for column in range(3):
            top, left = PAD + row * (height + GAP), PAD + column * (width + GAP)
            np.testing.assert_array_equal(file[top : top + height, left : left + width], large(images[row, column]))


def test_picture_is_as_large_as_its_images_need(tmp_path):
    file = saved(tmp_path, grid(), scale=SCALE)
    assert file.shape == (2 * PAD + 2 * 20 + GAP, 2 * PAD + 3 * 30 + 2 * GAP, 3)


def test_images_keep_their_pixels_beside_labels_and_title(tmp_path):
    images = grid()
    file = saved(tmp_path, images, scale=SCALE, row_labels=["one", "two"], column_labels=["a", "b", "c"], title="All")
    height, width = 4 * SCALE, 6 * SCALE
    tile = file[-PAD - height : -PAD, -PAD - width : -PAD]
    np.testing.assert_array_equal(tile, large(images[1, 2]))
    assert (file[: PAD + 20] < 128).any() and (file[:, : PAD + 20] < 128).any()


def test_wide_column_labels_move_the_columns_apart(tmp_path):
    narrow = saved(tmp_path, grid(), column_labels=["a", "b", "c"])
    wide = saved(tmp_path, grid(), column_labels=["a", "b", "a label much wider than its image"])
    assert wide.shape[1] > narrow.shape[1] + 2 * 100


def test_dollar_signs_in_labels_are_no_formula(tmp_path):
    labels = ["$5_$10", "$x_$", r"$\alpha$"]
    assert saved(tmp_path, grid(), column_labels=labels, title=labels[0]).shape[2] == 3


def test_a_title_wider_than_the_images_is_not_cut(tmp_path):
    file = saved(tmp_path, grid(1, 1), title="A title that is much wider than one image")
    assert (file[:, -PAD:] == 255).all()


@pytest.mark.parametrize(("size", "expected"), [(8, 48), (28, 56), (64, 64), (200, 200)])
def test_small_images_are_enlarged_by_default(tmp_path, size, expected):
    assert saved(tmp_path, np.zeros((1, 1, 1, size, size))).shape == (expected + 2 * PAD, expected + 2 * PAD, 3)


def test_low_is_black_and_high_is_white_and_the_rest_is_cut_there(tmp_path):
    values = np.array([-2.0, -1.0, 1.0, 9.0]).reshape(1, 1, 1, 1, 4)
    file = saved(tmp_path, values, low=-1.0, high=1.0, scale=1)
    np.testing.assert_array_equal(file[PAD, PAD : PAD + 4, 0], [0, 0, 255, 255])


def test_pixels_that_are_not_finite_are_red(tmp_path):
    values = np.array([np.nan, np.inf, 0.0]).reshape(1, 1, 1, 1, 3)
    file = saved(tmp_path, values, scale=1)
    np.testing.assert_array_equal(file[PAD, PAD : PAD + 3], [[255, 0, 0], [255, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (grid(channels=2), {}, r"images must have the shape.*got \(2, 3, 2, 4, 6\)"),
        (grid(columns=0), {}, "images must have the shape"),
        (grid(), {"low": 1.0, "high": 1.0}, "low must be < high, both finite, got 1.0 and 1.0"),
        (grid(), {"low": -np.inf, "high": 1.0}, "low must be < high, both finite, got -inf and 1.0"),
        (grid(), {"low": 0.0, "high": np.nan}, "low must be < high, both finite, got 0.0 and nan"),
        (grid().astype(np.uint8), {"low": -1.0, "high": 1.0}, "low must be >= 0 for images in uint8, got -1.0"),
        (grid(), {"scale": 0}, "scale must be an integer >= 1, got 0"),
        (grid(), {"row_labels": ["a"]}, "row_labels must be 2 texts, got 1"),
        (grid(), {"column_labels": ["a"]}, "column_labels must be 3 texts, got 1"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, images, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [complex, bool, "U1", object])
def test_what_is_no_real_numbers_is_refused(unchecked, tmp_path, dtype):
    with pytest.raises(ValueError, match="images must be real numbers, got "):
        saved(tmp_path, np.zeros((1, 1, 1, 2, 2)).astype(dtype))


@pytest.mark.parametrize("scale", [2.5, True])
def test_scale_that_is_no_integer_is_refused(unchecked, tmp_path, scale):
    with pytest.raises(ValueError, match=f"scale must be an integer >= 1, got {scale}"):
        saved(tmp_path, grid(), scale=scale)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_is_saved_pixel_for_pixel(tmp_path, channels):
    pil = pytest.importorskip("PIL.Image")
    (one,) = grid(1, 1, channels)[0]
    picture.save_image(tmp_path / "image.png", one, 0, 16)
    with pil.open(tmp_path / "image.png") as file:
        assert (file.mode, file.format) == ("RGB", "PNG")
        np.testing.assert_array_equal(file, np.broadcast_to(np.round(255 * one / 16).transpose(1, 2, 0), (4, 6, 3)))


def test_one_image_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images must have the shape"):
        picture.save_image(tmp_path / "image.png", np.zeros((2, 4, 6)), 0, 1)
