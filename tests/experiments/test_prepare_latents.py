"""Images become latents part by part: the tokenizer's moments, whatever happens on the way."""

import functools
import json
import os
import pathlib
import re
import shutil

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from fields import filled
from image_files import save_mnist
from processes import Killed

from mf_eqx import checkpoint, data, run, vae

TESTS = pathlib.Path(__file__).parents[1]
TINY = vae.AutoencoderSize(widths=(4, 8), blocks=1, latent=3, groups=2)
SIZE = 16
FLAGS = f"--images images --vae vae --size {SIZE} --batch 4"
SIDES = [(16, 24), (20, 16), (16, 16), (17, 16), (16, 19), (24, 16), (16, 16), (16, 30), (18, 16), (16, 22), (16, 16)]
"""Height and width of each image: the smaller side is that of the latents' images, so that cropping is all."""
CLASSES = ["bird", "cat", "dog"]


def pictures():
    """Bytes of each image, with the name of its file."""
    draws = np.random.default_rng(4)
    for number, sides in enumerate(SIDES):
        yield f"{CLASSES[number % 3]}/{number}.png", draws.integers(0, 256, (*sides, 3), np.uint8)


def cropped(picture):
    """The centre, channels first, as floats in [-1, 1]."""
    top, left = ((side - SIZE) // 2 for side in picture.shape[:2])
    centre = picture[top : top + SIZE, left : left + SIZE]
    return centre.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def prepare_latents(experiment):
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    return experiment("prepare_latents")


@pytest.fixture(scope="module")
def files(prepare_latents, tmp_path_factory):
    """A folder with images of three classes and a small tokenizer as diffusers keeps it."""
    from PIL import Image

    root = tmp_path_factory.mktemp("files")
    for name, picture in pictures():
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / "images" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "vae")
        import diffusers_files

        diffusers_files.write_folder(root / "vae", TINY)
    return root


@pytest.fixture
def convert(prepare_latents, files, tmp_path, monkeypatch):
    """The command, in a folder of its own that has copies of all files."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def convert(arguments):
        run.main(prepare_latents.main, prepare_latents.Config(), argv=f"{FLAGS} {arguments}".split())

    return convert


@pytest.fixture
def refused(convert, refusal_of):
    """The last line of the command, after those of the progress."""
    return functools.partial(refusal_of, convert, progress=True)


@functools.cache
def expected(root):
    """Moments and labels of all images in the order of their paths, by the tokenizer alone."""
    tokenizer = vae.load_autoencoder(root / "vae", TINY)
    named = sorted(pictures())
    moments = jax.jit(jax.vmap(tokenizer.encode))(np.stack([cropped(picture) for _, picture in named]))
    label = [CLASSES.index(name.partition("/")[0]) for name, _ in named]
    return np.concatenate([moments.mean, moments.std], axis=1), np.array(label)


def grey_tokenizer():
    return filled(lambda: vae.Autoencoder(TINY._replace(channels=1), key=jr.key(0)))


def tree(folder):
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is kept


def test_latents_are_the_moments_of_the_cropped_images_in_half_precision(convert, prepare_latents, files, capsys):
    convert("--to latents --parts 3")
    moments, label = expected(files)
    source = prepare_latents.open_latents("latents")
    assert (source.dtype, source.row_shape, source.labels) == (np.float16, (6, 8, 8), 3)
    rows = source.take(np.arange(len(SIDES)))
    # Half a unit in the last place, and what the order of additions changes in float32.
    np.testing.assert_allclose(rows.x.astype(np.float32), moments, rtol=2.0**-11 + 1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows.label, label)
    out = capsys.readouterr().out
    assert re.search(r"latents: 3 of 3 parts, 11 images encoded now, \d+\.\d s, \d+\.\d img/s\n", out), out
    assert "images: 11 images, resized and cropped to 16 x 16; passed over: nothing\n" in out


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 3, SIZE, SIZE), np.float32),
        np.zeros((2, 1, SIZE, SIZE), np.uint8),
        np.zeros((2, 3), np.uint8),
        np.zeros((2, 3, 8, 7), np.uint8),
    ],
)
def test_source_of_what_is_no_images_is_refused(x, prepare_latents):
    tokenizer = eqx.filter_eval_shape(vae.Autoencoder, TINY, key=jr.key(0))
    rule = (
        r"arrays: images must be uint8 of shape \(3, height, width\), with multiples of the tokenizer's factor 2, got "
    )
    with pytest.raises(ValueError, match=rule):
        prepare_latents.LatentSource(data.ArraySource(x), np.arange(2), tokenizer, batch=2, threads=1)


def test_latents_do_not_depend_on_parts_and_batch(convert, prepare_latents):
    rows = []
    for number, flags in enumerate(("--parts 1 --batch 4", "--parts 11 --batch 3 --threads 1")):
        convert(f"--to {number} {flags}")
        rows.append(prepare_latents.open_latents(str(number)).take(np.arange(len(SIDES))))
    np.testing.assert_allclose(*(row.x.astype(np.float32) for row in rows), rtol=2.0**-10, atol=1e-5)
    np.testing.assert_array_equal(rows[0].label, rows[1].label)


def test_larger_images_are_resized_before_they_are_cropped(convert, prepare_latents, files):
    from PIL import Image

    name, picture = sorted(pictures())[0]
    Image.fromarray(picture.repeat(2, axis=0).repeat(2, axis=1)).save(f"images/{name}")  # halved by a box, the same
    convert("--to latents --parts 1")
    found = prepare_latents.open_latents("latents").take(np.array([0])).x
    np.testing.assert_allclose(found.astype(np.float32), expected(files)[0][:1], rtol=2.0**-11 + 1e-5, atol=1e-5)


def test_training_images_of_idx_files_are_encoded_in_grey_and_test_images_are_left_out(
    convert, prepare_latents, refused
):
    x = np.random.default_rng(1).integers(0, 256, (9, 8, 12), np.uint8)
    save_mnist("mnist", (x, np.arange(9)), (x[:2], np.arange(2)))
    tokenizer = grey_tokenizer()
    statistics = vae.LatentStatistics((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    vae.save_autoencoder("grey", tokenizer, statistics)
    for flags, message in (
        ("--size 16", "--size must be left out, or 8 12 for"),
        ("--size 8 12 --holdout 0.1", "--holdout"),
    ):
        assert message in refused(f"--images mnist --vae grey --to latents {flags}")
    convert("--images mnist --vae grey --to latents --parts 2 --size")
    source, notes = prepare_latents.open_latents("latents"), prepare_latents.read_notes("latents")
    rows = source.take(np.arange(9))
    moments = jax.jit(jax.vmap(tokenizer.encode))(x[:, None].astype(np.float32) / 127.5 - 1)
    expected = np.concatenate([moments.mean, moments.std], axis=1)
    assert rows.x.shape == (9, 6, 4, 6) and [*rows.label] == [*range(9)]
    np.testing.assert_allclose(rows.x.astype(np.float32), expected, rtol=2.0**-11 + 1e-5, atol=1e-5)
    assert notes.of_tokenizer() == checkpoint.Tokenizer(tokenizer.size, tokenizer.digest(), statistics)


def test_images_that_are_held_out_of_a_folder_are_not_encoded(convert, prepare_latents, refused):
    convert("--to latents --parts 1 --holdout 0.3")
    train, test, names = prepare_latents.image_sources.open_parts(("images",), (), size=(SIZE,), holdout=0.3)
    source, notes = prepare_latents.open_latents("latents"), prepare_latents.read_notes("latents")
    assert (len(source), len(test), notes.holdout, notes.class_names) == (8, 3, 0.3, [*names])
    network = vae.load_autoencoder("vae")
    encode = eqx.filter_jit(eqx.filter_vmap(network.encode))
    mean = encode(train.take(np.arange(8)).x.astype(np.float32) / 127.5 - 1).mean
    np.testing.assert_allclose(source.take(np.arange(8)).x[:, :3], mean, atol=2e-3)
    assert "holdout is 0.3, not 0.0" in refused("--to latents --parts 1")


def test_grey_images_of_any_sides_are_encoded(convert, prepare_latents, refused):
    vae.save_autoencoder("grey", grey_tokenizer(), vae.LatentStatistics())
    assert refused("--to x --parts 1 --vae grey").split("; ")[1].startswith("--grey makes images grey")
    convert("--to latents --parts 1 --grey --vae grey --size 8 12")
    notes = prepare_latents.read_notes("latents")
    assert prepare_latents.open_latents("latents").row_shape == (6, 4, 6)
    assert (notes.size, notes.grey) == ([8, 12], True)


def test_folder_tells_what_it_was_made_of(convert, capsys):
    convert("--to latents --parts 2")
    notes = json.loads(pathlib.Path("latents/latents.json").read_text())
    assert (notes["rows"], notes["labels"], notes["size"], notes["parts"]) == (11, 3, [SIZE] * 2, 2)
    assert notes["images"] == os.path.realpath("images") and len(notes["vae"]) == 64
    assert notes["tokenizer"] == {"widths": [4, 8], "blocks": 1, "latent": 3, "groups": 2, "channels": 3}
    assert notes["statistics"] == {"mean": [0.0], "std": [1 / vae.SCALE]}


def test_statistics_are_those_of_the_config_and_no_others(convert, prepare_latents, capsys, refused):
    path = pathlib.Path("vae/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_mean": [1, 2, 3], "scaling_factor": 0.5}))
    convert("--to latents --parts 2 --last-part 0")
    found = prepare_latents.read_notes("latents").of_tokenizer().statistics
    assert found == vae.LatentStatistics((1.0, 2.0, 3.0), (2.0,))
    shown = "latents: mean 1 2 3, std 2, by latents_mean, scaling_factor of vae/config.json\n"
    assert shown in capsys.readouterr().out
    file = "vae/diffusion_pytorch_model.safetensors"
    convert(f"--to latents --parts 2 --last-part 0 --vae {file}")  # a file is what its folder is
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 1.0}))
    assert "latents.json statistics is " in refused("--to latents --parts 2")
    path.unlink()
    rule = "taken for one of Stable Diffusion's size, since no config.json is beside it"
    assert rule in refused(f"--to latents --parts 2 --vae {file}")


# Parts


@pytest.mark.parametrize("parts_before", [0, 1, 2])
def test_killed_between_parts_and_run_again_gives_the_undisturbed_bytes(convert, monkeypatch, parts_before, capsys):
    convert("--to whole --parts 3")
    write, written = data.write_shards, []

    def killed(source, folder, **options):
        if len(written) == parts_before:
            raise Killed
        written.append(folder)
        write(source, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_shards", killed)
        with pytest.raises(Killed):
            convert("--to again --parts 3")
    assert len(list(pathlib.Path("again").glob("part_*"))) == parts_before
    capsys.readouterr()
    convert("--to again --parts 3")
    assert re.search(rf"again: 3 of 3 parts, {11 - 4 * parts_before} images encoded now", capsys.readouterr().out)
    assert tree("again") == tree("whole")


def test_killed_within_a_part_and_run_again_gives_the_undisturbed_bytes(convert, prepare_latents, monkeypatch):
    convert("--to whole --parts 3")
    encode, calls = prepare_latents.encode, []

    def killed(*given):
        calls.append(None)
        if len(calls) == 2:
            raise Killed
        return encode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_latents, "encode", killed)
        with pytest.raises(Killed):
            convert("--to again --parts 3")
    convert("--to again --parts 3")
    assert tree("again") == tree("whole")


def test_several_processes_with_parts_of_their_own_make_the_same_folder(convert, capsys):
    convert("--to whole --parts 4")
    capsys.readouterr()
    convert("--to shared --parts 4 --first-part 3")
    convert("--to shared --parts 4 --first-part 0 --last-part 0")
    assert sorted(os.listdir("shared")) == ["latents.json", "part_0000", "part_0003"]
    assert "shared: 2 of 4 parts, 3 images encoded now" in capsys.readouterr().out
    convert("--to shared --parts 4 --first-part 1 --last-part 2")
    assert tree("shared") == tree("whole")


def test_finished_folder_is_left_as_it_is(convert, capsys):
    convert("--to latents --parts 2")
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("latents").rglob("*")}
    capsys.readouterr()
    convert("--to latents --parts 2")
    assert "2 of 2 parts, 0 images encoded now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path("latents").rglob("*")} == before


def test_missing_parts_are_named(convert, prepare_latents):
    convert("--to latents --parts 6 --first-part 5")
    message = "latents: must have all 6 parts, lacks part_0000, part_0001, part_0002 and 2 more: run prepare_latents"
    with pytest.raises(ValueError, match=message):
        prepare_latents.open_latents("latents")


# Refusals


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--parts 3", "parts is 2, not 3"),
        ("--parts 2 --size 8", "size is [16, 16], not [8, 8]"),
        ("--parts 2 --bfloat16", "bfloat16 is False, not True"),
    ],
)
def test_other_settings_are_refused(convert, refused, flags, name):
    convert("--to latents --parts 2 --last-part 0")
    before = tree("latents")
    line = refused(f"--to latents {flags}")
    assert f"to must be new or of the same latents, but in latents/latents.json {name}" in line
    assert tree("latents") == before


def test_other_images_and_weights_are_refused(convert, refused):
    convert("--to latents --parts 2 --last-part 0")
    shutil.copytree("images", "others")
    assert "latents.json images is " in refused("--to latents --parts 2 --images others")
    path = pathlib.Path("vae/diffusion_pytorch_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert "latents.json vae is " in refused("--to latents --parts 2")


def test_folder_of_something_else_is_refused(refused):
    assert "images has files and no latents.json" in refused("--to images --parts 2")


def test_notes_that_cannot_be_read_are_refused(convert, prepare_latents, refused):
    convert("--to latents --parts 1")
    pathlib.Path("latents/latents.json").write_text('{"rows": 11')
    message = "latents/latents.json: must be the notes of prepare_latents.py, but cannot be read"
    assert message in refused("--to latents --parts 1")
    with pytest.raises(ValueError, match=message):
        prepare_latents.open_latents("latents")


@pytest.mark.parametrize(
    "changed",
    [
        {"parts": "1"},
        {"parts": 10**12},
        {"rows": None},
        {"size": 8},
        {"size": [8]},
        {"size": "88"},
        {"grey": 1},
        {"holdout": 1},
        {"tokenizer": 3},
        {"tokenizer": {"widths": [4, 8], "blocks": 1, "latent": 3, "groups": 2}},
        {"tokenizer": TINY._replace(latent="3")._asdict()},
        {"statistics": {"std": [0.0]}},
        {"statistics": {"mean": [1.0, 2.0]}},
        {"statistics": {"mean": "123"}},
        {"statistics": 3},
        {"vae": 7},
    ],
    ids=str,
)
def test_notes_of_wrong_types_are_refused(changed, prepare_latents, tmp_path):
    of_latents = (None, vae.LatentStatistics().as_json(), False, 0.0)
    notes = prepare_latents.LatentNotes("images", 1, None, [8, 8], 1, "0", TINY._asdict(), False, *of_latents)
    (tmp_path / "latents.json").write_text(json.dumps(notes._asdict()))
    assert prepare_latents.read_notes(tmp_path).of_tokenizer() == checkpoint.Tokenizer(TINY, "0")
    (tmp_path / "latents.json").write_text(json.dumps(notes._asdict() | changed))
    with pytest.raises(ValueError, match=r"latents\.json: must be the notes of prepare_latents\.py, but"):
        prepare_latents.read_notes(tmp_path)


def test_broken_image_is_named_and_its_part_is_not_there(convert, refused):
    content = pathlib.Path("images/dog/8.png").read_bytes()  # the last one
    pathlib.Path("images/dog/8.png").write_bytes(content[:100])
    assert "images/dog/8.png: must be a whole image, or be moved elsewhere, got: " in refused("--to latents --parts 3")
    assert sorted(os.listdir("latents")) == ["latents.json", "part_0000", "part_0001"]
    pathlib.Path("images/dog/8.png").write_bytes(content)
    convert("--to latents --parts 3")
    assert len(list(pathlib.Path("latents").glob("part_*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "to must be given, got none"),
        ("--to x --images missing", "--images: No such file or directory: 'missing'"),
        ("--to x --images vae", "vae: must hold images"),
        (
            "--to x --parts 1 --vae images",
            "images: must be a folder with diffusion_pytorch_model.safetensors, got no such",
        ),
        ("--to x --parts 1 --vae missing", "missing"),
        ("--to x --parts 12", "parts must be at most the 11 images of images, got 12"),
        ("--to x --parts 0", "--parts must be >= 1, got 0"),
        ("--to x --parts 3 --first-part 3", "--first-part must be at most last_part, and both below 3, got 3 and 2"),
        ("--to x --parts 3 --last-part 3", "--first-part must be at most last_part, and both below 3, got 0 and 3"),
        ("--to x --parts 3 --first-part 2 --last-part 1", "both below 3, got 2 and 1"),
        (
            "--to x --parts 1 --size 15",
            r"images must be uint8 of .* with multiples of the tokenizer's factor 2, got uint8 of shape \(3, 15, 15\)",
        ),
        ("--to x --holdout 1", r"--holdout must lie in \[0, 1\), got 1.0"),
        ("--to x --parts 1 --size", "--size must be given for a folder of images, in pixels, got none for images"),
        ("--to x --size 8 8 8", "--size must be a side, or height and width, got 3 numbers"),
        ("--to x --size 0", "--size must be >= 1, got 0"),
        ("--to x --batch 0", "--batch must be >= 1, got 0"),
        ("--to x --threads 0", "--threads must be >= 1, got 0"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(refused, arguments, message):
    before = set(os.listdir())
    line = refused(arguments)
    assert re.search(message, line), line
    assert set(os.listdir()) == before
