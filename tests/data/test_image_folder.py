"""Images in folders are rows in a fixed order, cropped as by ADM; a broken one is refused by name."""

import io
import os
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx._optional import MissingDependency
from mf_eqx.data import _image_folder, ArraySource, ShardSource, write_shards
from mf_eqx.data._image_folder import ImageFolderSource

Image = pytest.importorskip("PIL.Image")

RANDOM = np.random.default_rng(5)


def pixels(height=8, width=8):
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return image


def one(tmp_path, size, name="a.png"):
    """The only image of a folder."""
    assert (tmp_path / name).exists()
    (x,) = read_all(ImageFolderSource(tmp_path, size=size)).x
    return x.transpose(1, 2, 0)


def box(image):
    """Means of 2 x 2 pixels, of columns and then of rows, rounded half up after each as Pillow does."""
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].astype(int)
    columns = (even[:, ::2] + even[:, 1::2] + 1) // 2
    return ((columns[::2] + columns[1::2] + 1) // 2).astype(np.uint8)


def test_classes_are_sorted_folders(tmp_path):
    images = {name: saved(tmp_path / name, pixels()) for name in ("dog/b.png", "cat/z.png", "dog/a/c.png", "ant/q.bmp")}
    source = ImageFolderSource(tmp_path, size=8)
    rows = read_all(source)
    assert source.class_names == ("ant", "cat", "dog") and source.labels == 3
    assert rows.label.tolist() == [0, 1, 2, 2]
    wanted = [images[name] for name in ("ant/q.bmp", "cat/z.png", "dog/a/c.png", "dog/b.png")]
    np.testing.assert_array_equal(rows.x.transpose(0, 2, 3, 1), wanted)


def test_label_belongs_to_the_folder_whatever_the_order_of_paths(tmp_path):
    for name in ("a-b/x.png", "a/x.png"):  # "-" comes before "/", and "a" before "a-b"
        saved(tmp_path / name, pixels())
    source = ImageFolderSource(tmp_path, size=8)
    assert source.class_names == ("a", "a-b") and read_all(source).label.tolist() == [1, 0]


def test_images_beside_each_other_have_no_labels(tmp_path):
    images = [saved(tmp_path / name, pixels()) for name in ("a.png", "b.PNG")]
    source = ImageFolderSource(tmp_path, size=8)
    assert source.labels is None and source.class_names is None
    np.testing.assert_array_equal(read_all(source).x.transpose(0, 2, 3, 1), images)


def test_hidden_and_other_files_are_passed_over_and_counted_by_kind(tmp_path):
    saved(tmp_path / "a" / "x.png", pixels())
    names = ("readme.txt", ".hidden.png", "a/notes.TXT", "a/deep/y.gif", "a/LICENSE", "a/._x.png", ".git/x.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    source = ImageFolderSource(tmp_path, size=8)
    assert source.paths == ["a/x.png"]
    assert source.passed_over == {".gif": 1, ".txt": 2, "hidden": 3, "without suffix": 1}
    assert source.passed_over_as_text() == "3 hidden, 2 .txt, 1 .gif, 1 without suffix"


def test_nothing_is_passed_over_where_there_are_images_alone(tmp_path):
    saved(tmp_path / "x.png", pixels())
    source = ImageFolderSource(tmp_path, size=8)
    assert source.passed_over == {} and source.passed_over_as_text() == "nothing"


# Links


def test_images_behind_links_are_read_wherever_they_are(tmp_path):
    """A class, a folder in a class, a folder in a folder, and an image."""
    images = {name: saved(tmp_path / "elsewhere" / name, pixels()) for name in ("1/a.png", "2/b.png", "3/c.png")}
    for name, target in [("r/one", "1"), ("r/two/in", "2"), ("r/two/deep/in", "3"), ("r/two/z.png", "1/a.png")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / target)
    source = ImageFolderSource(tmp_path / "r", size=8)
    assert source.paths == ["one/a.png", "two/deep/in/c.png", "two/in/b.png", "two/z.png"]
    wanted = [images[name] for name in ("1/a.png", "3/c.png", "2/b.png", "1/a.png")]
    np.testing.assert_array_equal(read_all(source).x.transpose(0, 2, 3, 1), wanted)
    assert source.take(np.arange(4)).label.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("target", ["r", "r/a", "r/a/deep", "."])
def test_link_back_to_a_folder_that_it_lies_in_is_refused(target, tmp_path):
    saved(tmp_path / "r" / "a" / "deep" / "x.png", pixels())
    (tmp_path / "r" / "a" / "deep" / "back").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"a/deep/back.*: must not be a link to a folder that it lies in"):
        ImageFolderSource(tmp_path / "r", size=8)


@pytest.mark.parametrize("name", ["gone", "a/gone", "a/gone.png", "a/deep/gone.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_link_that_leads_nowhere_is_refused_by_name(name, target, tmp_path):
    saved(tmp_path / "a" / "deep" / "x.png", pixels())
    (tmp_path / name).symlink_to(tmp_path / (name if target == "itself" else target))
    with pytest.raises(ValueError, match=f"{name}: must be a link to a file or folder, got: "):
        ImageFolderSource(tmp_path, size=8)


def test_hidden_link_may_lead_anywhere(tmp_path):
    saved(tmp_path / "a" / "x.png", pixels())
    (tmp_path / "a" / ".gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / ".back").symlink_to(tmp_path)
    assert ImageFolderSource(tmp_path, size=8).passed_over == {"hidden": 2}


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 100}), ("webp", {"lossless": True})])
def test_other_formats_are_decoded(suffix, options, tmp_path):
    image = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    saved(tmp_path / f"a.{suffix}", image, **options)
    np.testing.assert_allclose(one(tmp_path, 8, f"a.{suffix}"), image, atol=2)


@pytest.mark.parametrize("factor", [2, 4])
def test_large_image_is_halved_by_means(factor, tmp_path):
    image = saved(tmp_path / "a.png", pixels(8 * factor, 8 * factor))
    while len(image) > 8:
        image = box(image)
    np.testing.assert_array_equal(one(tmp_path, 8), image)


@pytest.mark.parametrize("shape", [(8, 14), (15, 8)])
def test_centre_of_a_long_image_is_taken(shape, tmp_path):
    image = saved(tmp_path / "a.png", pixels(*shape))
    top, left = ((side - 8) // 2 for side in shape)
    np.testing.assert_array_equal(one(tmp_path, 8), image[top : top + 8, left : left + 8])


def test_smaller_side_is_brought_to_size_by_a_bicubic_filter(tmp_path):
    image = saved(tmp_path / "a.png", pixels(20, 30))
    # After a halving to 10 x 15, a factor 0.8: 8 x 12.
    wanted = np.asarray(Image.fromarray(box(image)).resize((12, 8), Image.Resampling.BICUBIC))[:, 2:10]
    np.testing.assert_array_equal(one(tmp_path, 8), wanted)


def test_an_image_covers_a_result_of_two_sides(tmp_path):
    image = saved(tmp_path / "a.png", pixels(20, 36))
    # After a halving to 10 x 18, the rows decide: a factor 0.9 makes 9 x 16.
    wanted = np.asarray(Image.fromarray(box(image)).resize((16, 9), Image.Resampling.BICUBIC))[:, 5:11]
    np.testing.assert_array_equal(one(tmp_path, (9, 6)), wanted)
    # Here the columns decide: all stay, and so do the rows, of which the middle ones are taken.
    np.testing.assert_array_equal(one(tmp_path, (11, 36)), image[4:15])


def test_small_image_is_enlarged(tmp_path):
    saved(tmp_path / "a.png", np.full((3, 5, 3), 7, np.uint8))
    np.testing.assert_array_equal(one(tmp_path, 8), np.full((8, 8, 3), 7))


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (np.full((8, 8), 9, np.uint8), (9, 9, 9)),
        (np.full((8, 8, 4), (1, 2, 3, 0), np.uint8), (1, 2, 3)),
        (np.ones((8, 8), bool), (255, 255, 255)),
    ],
)
def test_grey_and_transparent_images_become_rgb(image, wanted, tmp_path):
    saved(tmp_path / "a.png", image)
    np.testing.assert_array_equal(one(tmp_path, 8), np.broadcast_to(wanted, (8, 8, 3)))


def test_threads_share_a_source(tmp_path):
    for number in range(6):
        saved(tmp_path / f"{number}.png", pixels())
    source = ImageFolderSource(tmp_path, size=8)
    wanted, orders = read_all(source).x, [np.random.default_rng(seed).permutation(6) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for order, got in zip(orders, threads.map(source.take, orders), strict=True):
            np.testing.assert_array_equal(got.x, wanted[order])


# Refusals


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        ImageFolderSource(tmp_path / "none", size=8)
    assert str(missing.value.filename) == str(tmp_path / "none")


def test_missing_pillow_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependency, match=r"PIL is not installed: pip install 'mf_eqx\[images\]'"):
        ImageFolderSource(tmp_path, size=8)


def test_no_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        ImageFolderSource(tmp_path, size=0)


@pytest.mark.parametrize("size", [2.5, True])
def test_size_that_is_no_integer_is_refused(unchecked, size, tmp_path):
    with pytest.raises(ValueError, match=f"size must be an integer >= 1, got {size}"):
        ImageFolderSource(tmp_path, size=size)


@pytest.mark.parametrize("size", [(8,), (8, 8, 8)])
def test_size_of_another_number_of_sides_is_refused(unchecked, size, tmp_path):
    with pytest.raises(ValueError, match=rf"size must be one number or \(height, width\), got \({size[0]},"):
        ImageFolderSource(tmp_path, size=size)


def test_names_in_another_encoding_become_names_that_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / name).mkdir()
    except OSError:
        pytest.skip("names of files are any bytes on few systems")
    image = saved(tmp_path / name / "x.png", pixels())
    (tmp_path / name / f"x.{name}").touch()
    source = ImageFolderSource(tmp_path, size=8)
    assert source.class_names == (r"caf\udce9",) and source.passed_over_as_text() == r"1 .caf\udce9"
    write_shards(ArraySource(np.zeros((1, 2)), np.zeros(1, int), class_names=(name,)), tmp_path / "shards")
    assert ShardSource(tmp_path / "shards").class_names == source.class_names
    np.testing.assert_array_equal(read_all(source).x.transpose(0, 2, 3, 1), [image])


def test_no_images_are_refused_with_what_there_is(tmp_path):
    (tmp_path / "readme.txt").write_text("text")
    rule = "must hold images, .bmp, .jpeg, .jpg, .png, .webp, or folders of them, got none; passed over in .*: 1 .txt"
    with pytest.raises(ValueError, match=rule):
        ImageFolderSource(tmp_path, size=8)


def test_class_without_images_is_refused(tmp_path):
    saved(tmp_path / "a" / "x.png", pixels())
    saved(tmp_path / "b" / "deep" / "y.gif", pixels())
    with pytest.raises(
        ValueError, match=r"/b: must hold images, .*, got none \(a folder of no class .*\); passed over in .*: 1 .gif"
    ):
        ImageFolderSource(tmp_path, size=8)


def test_images_beside_folders_are_refused(tmp_path):
    saved(tmp_path / "a" / "x.png", pixels())
    saved(tmp_path / "y.png", pixels())
    with pytest.raises(ValueError, match=r"must hold images or folders of them, got y.png beside a"):
        ImageFolderSource(tmp_path, size=8)


def png(width, height, depth=8, colour=0, content=b"", before=b""):
    """A PNG file; without content it has nothing but a header that tells its size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    first = chunk(b"tEXt", before) if before else b""
    whole = first + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


CHANNELS = {"grey": (0, 1), "colour": (2, 3), "grey and alpha": (4, 2), "colour and alpha": (6, 4)}
"""The codes of PNG, and how many channels they have."""


@pytest.mark.parametrize(("colour", "channels"), CHANNELS.values(), ids=CHANNELS)
def test_png_of_16_bits_per_channel_is_refused(colour, channels, tmp_path):
    rows = (bytes([0]) + RANDOM.integers(0, 256, 2 * channels * 8).astype(np.uint8).tobytes() for _ in range(8))
    (tmp_path / "a.png").write_bytes(png(8, 8, 16, colour, b"".join(rows)))
    source = ImageFolderSource(tmp_path, size=8)
    with pytest.raises(
        ValueError, match=r"a.png: must be a whole image, or be moved elsewhere, got: 16 bits per channel, more than 8$"
    ):
        source.take(np.array([0]))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_fewer_bits_is_spread_over_all_levels(depth, tmp_path):
    levels = np.arange(8) % 2**depth
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = bytes([0, *(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))])
    (tmp_path / "a.png").write_bytes(png(8, 8, depth, 0, 8 * row))
    np.testing.assert_array_equal(one(tmp_path, 8)[0, :, 0], levels * 255 // (2**depth - 1))


def twelve_bits():
    """A JPEG file whose header tells 12 bits per channel."""
    stream = io.BytesIO()
    Image.fromarray(pixels()).save(stream, "JPEG")
    content = bytearray(stream.getvalue())
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "nothing that Pillow recognises as PNG, JPEG, WEBP, BMP$"),
        (b"hello", "nothing that Pillow recognises as PNG, JPEG, WEBP, BMP$"),
        (b"GIF89a" + bytes(100), "nothing that Pillow recognises as PNG, JPEG, WEBP, BMP$"),
        (twelve_bits(), "nothing that Pillow recognises as PNG, JPEG, WEBP, BMP$"),
        (png(8, 8, before=b"a\0b"), "a PNG file that does not start with its header"),
        (png(0, 8), "nothing that Pillow recognises as PNG, JPEG, WEBP, BMP$"),
        (png(60_000, 60_000), r"Image size \(3600000000 pixels\) exceeds limit"),
        (png(1, 100_000), r"1 x 100000 pixels, 6,400,000 to cover 8 x 8, more than 1,000,000"),
        (png(8, 8, depth=16), "16 bits per channel, more than 8"),
        (png(8, 8), "image file is truncated"),
    ],
    ids=range(10),
)
def test_broken_image_is_refused_by_name(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(_image_folder, "_MOST_PIXELS", 1_000_000)
    (tmp_path / "a.png").write_bytes(content)
    source = ImageFolderSource(tmp_path, size=8)
    with pytest.raises(ValueError, match=f"a.png: must be a whole image, or be moved elsewhere, got: {message}"):
        source.take(np.array([0]))


def test_large_file_behind_a_link_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate((1 << 27) + 1)
    (tmp_path / "x.png").symlink_to(tmp_path / "large")
    source = ImageFolderSource(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"x.png: must hold at most 134,217,728 bytes, got 134,217,729"):
        source.take(np.array([0]))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux has such files")
def test_file_that_does_not_tell_its_length_is_refused_when_it_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(_image_folder, "_LARGEST_FILE", 100)
    (tmp_path / "x.png").symlink_to("/proc/self/status")
    source = ImageFolderSource(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"x.png: must hold at most 100 bytes, got more"):
        source.take(np.array([0]))


@pytest.mark.parametrize("name", ["x.png", "class/x.png"])
def test_device_in_place_of_an_image_is_refused(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/dev/null")
    source = ImageFolderSource(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"x.png: must be an ordinary file, got a pipe, a device or the like"):
        source.take(np.array([0]))


@pytest.mark.parametrize("name", ["y.png", "class/y.png"])
def test_pipe_in_place_of_an_image_is_refused_without_waiting(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    source, found = ImageFolderSource(tmp_path, size=8), []

    def read():
        with pytest.raises(ValueError, match=r"y.png: must be an ordinary file, got a pipe, a device or the like"):
            source.take(np.array([0]))
        found.append("refused")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert found == ["refused"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
@QUICK
@given(data=st.data())
def test_flipped_byte_gives_an_image_or_is_refused(data, form, tmp_path_factory):
    stream = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, form)
    content = stream.getvalue()
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(flipped(content, data.draw(flips(len(content)))))
    opens_or_is_refused(lambda: ImageFolderSource(folder, size=8))


@QUICK
@given(data=st.data())
def test_truncated_image_is_whole_or_refused(data, tmp_path_factory):
    stream, image = io.BytesIO(), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(image).save(stream, "PNG")
    folder = tmp_path_factory.getbasetemp() / "truncated"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(stream.getvalue()[: data.draw(st.integers(0, len(stream.getvalue()) - 1))])
    # The last bytes are checksums and an end mark, which Pillow does not wait for.
    if opens_or_is_refused(lambda: ImageFolderSource(folder, size=8)):
        np.testing.assert_array_equal(one(folder, 8), image)
