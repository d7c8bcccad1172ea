"""Weights as files: exactly what was written comes back, or a refusal that names the file."""

import functools
import json
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from devices import run_on_devices
from fields import filled, refilled

import mf_eqx as mfx
from mf_eqx import checkpoint, nn, run, vae
from mf_eqx._leaves import digest_of_arrays
from mf_eqx.checkpoint._notes import notes_of_json

pytest.importorskip("safetensors")

DEEP = functools.reduce(lambda inner, _: [inner], range(64), [])
CONFIG = {"width": 8, "labels": 3, "name": "päth"}


def make_field(config):
    return mfx.MLP(2, width=config["width"], depth=2, labels=config["labels"], key=jr.key(0))


@pytest.fixture(scope="module")
def field():
    return refilled(make_field(CONFIG))


@pytest.fixture
def path(field, tmp_path):
    path = tmp_path / "new" / "ema.safetensors"
    checkpoint.save_weights(path, field, CONFIG)
    return path


def assert_equal(found, field):
    assert jax.tree.structure(found) == jax.tree.structure(field)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(field), strict=True):
        if eqx.is_array(b):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_weights_come_back_bit_by_bit_in_the_field_of_their_configuration(path, field):
    asked = []
    assert_equal(checkpoint.load_weights(path, lambda config: asked.append(config) or make_field(config)), field)
    assert asked == [CONFIG]


NETWORKS = {
    "labels": lambda: mfx.MLP(2, width=8, depth=2, labels=3, fourier_features=2, key=jr.key(0)),
    "guidance": lambda: mfx.InContextDiT(
        (1, 8), mfx.InContextDiTSize(3, 8, 2, 2, 1), labels=3, guidance=True, key=jr.key(0)
    ),
    "vectors": lambda: mfx.DiT((1, 8), mfx.DiTSize(2, 8, 2, 2), condition=5, early_blocks=1, key=jr.key(0)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("state", [False, True])
def test_what_is_no_network_is_not_saved(state, tmp_path):
    network = mfx.MLP(2, width=4, depth=1, key=jr.key(0))
    field = mfx.init_state(network, optax.sgd(0.1), key=jr.key(0)) if state else {"weight": np.ones(2)}
    with pytest.raises(ValueError, match=r"field must be a network, got (TrainState|dict), which cannot be called"):
        checkpoint.save_weights(tmp_path / "weights.safetensors", field)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_package_needs_nothing_but_its_file(name, tmp_path):
    field = filled(NETWORKS[name])
    checkpoint.save_weights(tmp_path / "a", field)
    assert_equal(checkpoint.load_weights(tmp_path / "a"), field)


def test_a_network_is_filled_in_another_precision(path, field):
    weights = checkpoint.read_weights(path)
    found = weights.fill(lambda: weights.make_network(dtype=jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.first.weight, field.first.weight)


def test_a_network_is_loaded_in_another_precision(path, field):
    found = checkpoint.load_weights(path, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.first.weight, field.first.weight)


def test_options_of_networks_of_the_package_are_refused_beside_a_function(path):
    with pytest.raises(ValueError, match="dtype must be left out where make_field makes the field"):
        checkpoint.load_weights(path, make_field, dtype=jnp.bfloat16)


@pytest.mark.parametrize("given", ["network", "function of a configuration", "number"])
def test_what_does_not_make_a_field_is_refused(unchecked, path, field, given):
    weights = checkpoint.read_weights(path)
    make = {"network": field, "function of a configuration": make_field, "number": 3}[given]
    with pytest.raises(ValueError, match=r"make_field must be a function of no arguments, such as .*, got"):
        weights.fill(make)
    if given != "function of a configuration":
        with pytest.raises(ValueError, match="make_field must be a function of one argument, the configuration, got"):
            checkpoint.load_weights(path, make)


def test_a_network_that_is_saved_without_its_description_because_of_its_dtype_is_named(field, tmp_path):
    half = nn.cast(field, jnp.float16)
    with pytest.warns(UserWarning, match="a: the network is not described, since its parameters are not all float32"):
        checkpoint.save_weights(tmp_path / "a", half, CONFIG)
    found = checkpoint.load_weights(tmp_path / "a", lambda config: nn.cast(make_field(config), jnp.float16))
    assert_equal(found, half)


class Own(nn.AbstractConditionEmbedding):
    """A condition embedding that only its owner knows."""

    weight: jax.Array

    def __call__(self, condition):
        return condition["a"] @ self.weight


def test_a_network_with_a_part_of_your_own_is_made_by_your_function_alone(tmp_path):
    def make(config):
        return mfx.MLP(2, width=4, depth=1, condition=Own(jnp.ones((3, 4))), key=jr.key(0))

    field = filled(lambda: make({}))
    checkpoint.save_weights(tmp_path / "a", field)
    assert_equal(checkpoint.load_weights(tmp_path / "a", make), field)
    with pytest.raises(
        ValueError,
        match=r"a: must describe its network, an MLP.*; one of your own is loaded by load_weights\(path, mak",
    ):
        checkpoint.load_weights(tmp_path / "a")


NOTES = checkpoint.Notes(
    pixels=(-1, 1),
    tokenizer=checkpoint.Tokenizer(vae.SD_VAE, "0" * 64, vae.LatentStatistics((0.5, 0.0, 1.0, -3.0), (2.0,))),
    class_names=("a", "b", "c"),
    trained=mfx.Trained(True, null_velocity=True, null_average=False, guidance=mfx.GuidanceRange(1.0, 8.0, 0.5)),
    steps=7,
    decay=0.99,
    mean=(1.5, -2.0),
    std=3,
)


@pytest.mark.parametrize(
    "notes", [NOTES, checkpoint.Notes(), checkpoint.Notes(tokenizer=checkpoint.Tokenizer(vae.SD_VAE))]
)
def test_notes_come_back(notes, field, tmp_path):
    checkpoint.save_weights(tmp_path / "a", field, notes=notes)
    assert checkpoint.read_weights(tmp_path / "a").notes == notes


TOKENIZER = NOTES.as_json()["tokenizer"]


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"trained": {"average": True, "null_velocity": True, "null_average": False}}, "Trained lacks velocity, ends_"),
        ({"tokenizer": {name: TOKENIZER[name] for name in ("size", "digest")}}, "'statistics'"),
        ({"tokenizer": {**TOKENIZER, "size": {"widths": [4, 8]}}}, "AutoencoderSize lacks blocks, latent, groups, cha"),
    ],
    ids=range(3),
)
def test_notes_that_say_less_than_they_must_are_refused(notes, message):
    with pytest.raises(ValueError, match=f"notes must be those of checkpoint.Notes, but cannot be read: {message}"):
        notes_of_json(notes)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"pixels": (1, -1)}, r"pixels must be two finite numbers, the lower one first, got \(1, -1\)"),
        ({"pixels": (0, np.inf)}, "pixels must be two finite numbers"),
        ({"class_names": ()}, r"class_names must be a tuple of at least one text, got \(\)"),
        ({"trained": mfx.Trained(1, 0, None)}, "trained must be of bools, got"),
        ({"trained": mfx.Trained(*[True] * 6, mfx.GuidanceRange(True, 8.0))}, "guidance must be of numbers, got"),
        ({"trained": mfx.Trained(*[True] * 6, mfx.GuidanceRange(2.0, 1.0))}, "guidance must satisfy 0 < smallest <="),
        ({"trained": mfx.Trained(*[True] * 6, mfx.GuidanceRange(1.0, 8.0, 2.0))}, "guidance must satisfy .* a middle"),
        ({"tokenizer": checkpoint.Tokenizer(vae.SD_VAE, 7)}, "digest must be a text or None, got 7"),
        ({"tokenizer": checkpoint.Tokenizer((8,))}, r"size must be an instance of AutoencoderSize, got \(8,\)"),
        (
            {"tokenizer": checkpoint.Tokenizer(vae.SD_VAE._replace(latent=0))},
            "latent must be an integer >= 1, got 0",
        ),
        (
            {"tokenizer": checkpoint.Tokenizer(vae.SD_VAE, None, 0.18215)},
            "statistics must be an instance of LatentStatistics, got 0.18215",
        ),
        (
            {"tokenizer": checkpoint.Tokenizer(vae.SD_VAE, None, vae.LatentStatistics((1.0, 2.0, 3.0)))},
            "statistics must be of 4 channels, or one number for all, got 3",
        ),
        ({"steps": True}, "steps must be an integer >= 0, got True"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"mean": ()}, r"mean must be finite numbers, at least one, got \(\)"),
        ({"mean": (0.0, np.nan)}, "mean must be finite numbers"),
        ({"std": 0.0}, "std must be > 0 and finite, got 0.0"),
    ],
    ids=range(17),
)
def test_notes_that_say_nothing_are_refused(notes, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.Notes(**notes)


def test_samples_go_back_to_the_unit_of_the_data():
    x = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    found = checkpoint.Notes(mean=(1.0, -2.0), std=3.0).in_unit_of_data(x)
    np.testing.assert_allclose(found, 3 * x + np.array([1, -2], np.float32)[:, None], rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(checkpoint.Notes().in_unit_of_data(x), x)
    with pytest.raises(ValueError, match="mean must have one number or 2, as rows of x, got 3"):
        checkpoint.Notes(mean=(1.0, 2.0, 3.0)).in_unit_of_data(x)


def test_samples_of_integers_go_back_to_the_unit_of_the_data_in_floating_point():
    notes = checkpoint.Notes(mean=(0.5,), std=0.25)
    found = notes.in_unit_of_data(np.arange(4).reshape(2, 2))
    np.testing.assert_array_equal(found, np.array([[0.5, 0.75], [1, 1.25]], np.float32))
    assert found.dtype == np.float32


def test_samples_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"x must have rows of at least one axis, got shape \(3,\)"):
        checkpoint.Notes(std=2.0).in_unit_of_data(np.zeros(3))


def test_class_names_are_as_many_as_labels(field, tmp_path):
    with pytest.raises(ValueError, match="class_names must be 3, one for each label, got 2"):
        checkpoint.save_weights(tmp_path / "a", field, notes=checkpoint.Notes(class_names=("a", "b")))
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_file_is_left_in_its_directory(path):
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_weights_are_the_same_bytes_each_time(path, field):
    content = path.read_bytes()
    for _ in range(20):  # in the library's own order one of six each time
        checkpoint.save_weights(path, field, CONFIG)
        assert path.read_bytes() == content


def test_header_of_weights_ends_where_arrays_may_begin(path):
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_other_programs_can_read_every_leaf_by_its_path(path, field):
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(arrays[".first.weight"], field.first.weight)
    assert len(arrays) == len(jax.tree.leaves(eqx.filter(field, eqx.is_array)))


class Kinds(mfx.AbstractField):
    """A field of arrays of one dtype."""

    leaves: tuple

    def __init__(self, dtype):
        self.leaves = tuple(jnp.arange(6).astype(dtype).reshape(shape) for shape in ((2, 3), (6,), (3, 1, 2)))
        self.leaves += (jnp.asarray(1, dtype), jnp.zeros((0, 3), dtype))

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "uint16", "bool", "complex64"])
def test_arrays_of_every_kind_come_back(dtype, tmp_path):
    checkpoint.save_weights(tmp_path / "kinds", Kinds(dtype))
    assert_equal(checkpoint.load_weights(tmp_path / "kinds", lambda config: Kinds(dtype)), Kinds(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_arrays_that_could_not_be_read_again_are_not_written(dtype, tmp_path):
    message = rf"field must have arrays of dtypes that .*, got .leaves\[0\] in {dtype}, .* and 2 more: cast them"
    with pytest.raises(ValueError, match=message):
        checkpoint.save_weights(tmp_path / "kinds", Kinds(dtype))
    assert not list(tmp_path.iterdir())


@pytest.mark.rehearsal
def test_weights_load_onto_devices_as_the_rule_says(tmp_path):
    found = run_on_devices("export_on_devices.py", tmp_path / "weights")
    assert found == {"equal": True, "placed": True, "spread": True, "saved_alike": True}


def test_other_structure_is_refused_by_its_leaves(path):
    def make_other(config):
        return mfx.MLP(2, width=config["width"], depth=2, key=jr.key(0))  # without labels

    message = r"ema.safetensors: must hold the expected arrays, but it has the unexpected .embedding"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_weights(path, make_other)


def test_other_shapes_are_refused_by_their_leaves(path):
    with pytest.raises(ValueError, match=r"it differs: .*\.weight is float32 \(.*8.*\), not float32 \(.*16.*\)"):
        checkpoint.load_weights(path, lambda config: make_field({**config, "width": 16}))


def test_other_dtypes_are_refused_by_their_leaves(path):
    with pytest.raises(ValueError, match=r"it differs: .* is float32 \(.*\), not bfloat16"):
        checkpoint.load_weights(path, lambda config: mfx.nn.cast(make_field(config), jnp.bfloat16))


def damaged(content):
    """A whole file, damaged in many ways, each with a word for it."""
    rng = np.random.default_rng(0)
    length = int.from_bytes(content[:8], "little") + 8
    for cut in (0, 1, 7, 8, 9, length - 1, length, length + 1, len(content) // 2, len(content) - 1):
        yield f"cut to {cut}", content[:cut]
    yield "extended", content + b"\0"
    yield "empty header", bytes(8) + content[8:]
    yield "longest header", b"\xff" * 8 + content[8:]
    places = [*range(8), *rng.integers(8, length, 60), *rng.integers(length, len(content), 20), len(content) - 1]
    for place in map(int, places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield f"bit flipped in byte {place}", bytes(flipped)
    for start in map(int, rng.integers(0, len(content) - 16, 20)):
        yield f"zeros from {start}", content[:start] + bytes(16) + content[start + 16 :]


def test_a_damaged_file_is_refused_by_name_or_loads_what_was_written(path, field):
    content = path.read_bytes()
    refused = total = 0
    for what, other in damaged(content):
        path.write_bytes(other)
        total += other != content
        try:
            found = checkpoint.load_weights(path, make_field)
        except ValueError as error:
            assert str(error).startswith(f"{path}: must "), what
            refused += 1
        else:
            assert_equal(found, field)  # a word that nobody reads
    assert refused >= total - 5


def test_a_field_of_another_configuration_is_not_believed(path):
    content = path.read_bytes()
    assert content.count(b'\\"width\\": 8') == 2  # in the configuration, and in the description of the network
    path.write_bytes(content.replace(b'\\"width\\": 8', b'\\"width\\": 9', 1))
    with pytest.raises(ValueError, match="sha256 differs: the file is damaged"):
        checkpoint.load_weights(path, make_field)


def test_a_file_of_another_program_is_refused(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: must be a file of save_weights"):
        checkpoint.load_weights(tmp_path / "other", make_field)


def test_a_bfloat16_file_of_another_program_is_refused_by_its_format(tmp_path):
    tensor = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor}).encode()
    (tmp_path / "other").write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f")
    with pytest.raises(ValueError, match="must be a file of save_weights in the format 'mf_eqx weights 2', got 'pt'"):
        checkpoint.load_weights(tmp_path / "other", make_field)


def test_an_empty_file_is_refused_as_such(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty: must be a file of save_weights, but it is empty$"):
        checkpoint.load_weights(tmp_path / "empty")


def forged(path, arrays, **metadata):
    """A file with these words beside its arrays, and the digest that belongs to them: of our format, unless they say
    otherwise."""
    import safetensors.numpy

    found = digest_of_arrays(dict(sorted(arrays.items())), metadata.get("about", ""))
    content = {"format": "mf_eqx weights 2", "sha256": found} | metadata
    path.write_bytes(safetensors.numpy.save(arrays, {name: word for name, word in content.items() if word is not None}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "mf_eqx weights 1"}, r"in the format 'mf_eqx weights 2', got 'mf_eqx weights 1'"),
        ({"format": None}, "in the format 'mf_eqx weights 2', got None"),
        ({"format": "9" * 999}, f"in the format 'mf_eqx weights 2', got '{'9' * 59}$"),
        ({"about": "{}", "sha256": None}, "sha256 differs"),
        ({}, "but its configuration cannot be read: Expecting"),
        ({"about": "{"}, "but its configuration cannot be read: Expecting"),
        ({"about": "[" * 100_000}, "but its configuration cannot be read: it is nested more than 64 times"),
        ({"about": '{"a":' * 100_000}, "but its configuration cannot be read: it is nested more than 64 times"),
        ({"about": "1" * 10_000}, "but its configuration cannot be read: Exceeds the limit"),
        ({"about": "[1]"}, "whose configuration is a JSON object, got list"),
    ],
    ids=range(10),
)
def test_a_file_of_another_format_or_configuration_is_refused(metadata, message, tmp_path):
    forged(tmp_path / "forged", {"a": np.zeros(3, np.float32)}, **metadata)
    with pytest.raises(ValueError, match=f"forged: must .*{message}"):
        checkpoint.load_weights(tmp_path / "forged", make_field)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ([], "whose configuration is a JSON object, got list"),
        ({"network": None}, "with objects for network, config and notes, got"),
        ({"network": "DiT", "config": {}}, "with objects for network, config and notes, got"),
        ({"config": {}, "notes": [1]}, "with objects for network, config and notes, got"),
        ({"config": {}, "notes": {"steps": -1}}, "forged: steps must be an integer >= 0, got -1"),
        ({"config": {}, "notes": {"colour": 1}}, "forged: notes must be those of .*, but cannot be read: .*colour"),
        ({"config": {}, "notes": {"trained": {}}}, "forged: notes must be those of .*, but cannot be read: .*average"),
        ({"config": {}, "notes": {"tokenizer": 7}}, "forged: notes must be those of .*, but cannot be read"),
    ],
    ids=range(8),
)
def test_a_file_that_says_what_no_file_says_is_refused(about, message, tmp_path):
    forged(tmp_path / "forged", {}, about=json.dumps(about))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_weights(tmp_path / "forged")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"network": "VGG"}, "forged: network must be one of MLP, DiT, InContextDiT, UNet, got 'VGG'"),
        ({"network": "MLP", "size": 2, "wings": 2}, "forged: description of a MLP has unknown arguments: wings"),
        ({"network": "MLP", "size": [2]}, "forged: size must be of integers >= 1|forged: description must be that of"),
    ],
    ids=range(3),
)
def test_a_file_of_a_network_that_cannot_be_made_is_refused(network, message, tmp_path):
    about = {"network": network, "config": {}}
    forged(tmp_path / "forged", {}, about=json.dumps(about))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_weights(tmp_path / "forged")


@pytest.mark.parametrize(
    "header", [b"{}", b'{"__metadata__":null}', b'{"__metadata__":' + b"[" * 100_000, b"[" * 100_000]
)
def test_a_header_of_nothing_or_of_endless_depth_is_refused(header, tmp_path):
    (tmp_path / "forged").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="forged: must be a file of save_weights"):
        checkpoint.load_weights(tmp_path / "forged", make_field)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        checkpoint.load_weights(tmp_path / "none.safetensors", make_field)


def test_a_failed_save_leaves_the_file_before_as_it_was(path, field, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left.*{path.name}'"):
        checkpoint.save_weights(path, field, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_on_disk_before_it_gets_its_name(path, field, monkeypatch):
    """Or a machine that loses power may keep the name of a file without its content."""
    size, synced, fsync = path.stat().st_size, [], os.fsync
    path.unlink()

    def look(descriptor):
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", look)
    checkpoint.save_weights(path, field, CONFIG)
    assert synced == [(size, False)] and path.stat().st_size == size


def test_notes_may_be_lists(unchecked):
    lists = checkpoint.Notes(pixels=[-1, 1], class_names=["a", "b"], mean=[0.5])
    assert lists == checkpoint.Notes(pixels=(-1, 1), class_names=("a", "b"), mean=(0.5,))


def test_a_configuration_that_json_cannot_hold_leaves_nothing(field, tmp_path):
    with pytest.raises(ValueError, match=r"config, with the notes, must be JSON .*, but .* not JSON serializable"):
        checkpoint.save_weights(tmp_path / "a", field, {"path": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config_and_notes", "message"),
    [
        (lambda: [{"deep": DEEP}], "it is nested more than 64 times"),
        (lambda: [{"many": "," * (1 << 21)}], "it has more than 1,048,576 values"),
        (lambda: [{"long": "a" * (1 << 26)}], "it has 67,108,.* bytes, more than 67,108,864"),
        (lambda: [{}, checkpoint.Notes(class_names=("a",) * (1 << 21))], "it has more than 1,048,576 values"),
    ],
    ids=range(4),
)
def test_a_configuration_or_notes_that_could_not_be_read_again_leave_nothing(config_and_notes, message, tmp_path):
    with pytest.raises(ValueError, match=f"config, with the notes, must be JSON that can be read again, but {message}"):
        checkpoint.save_weights(tmp_path / "a", Kinds("float32"), *config_and_notes())
    assert not list(tmp_path.iterdir())


def test_a_configuration_whose_quotes_make_the_header_too_long_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"config, with the notes, must fit into a safetensors header: .*too large"):
        checkpoint.save_weights(tmp_path / "a", Kinds("float32"), {"long": '"' * 33_000_000})
    assert not list(tmp_path.iterdir())


# Without the extra


@pytest.mark.parametrize("call", ["save", "load"])
def test_without_its_package_the_package_is_named(call, field, path, monkeypatch):
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "safetensors"), "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(run.MissingDependency, match="pip install safetensors"):
        checkpoint.save_weights(path, field) if call == "save" else checkpoint.load_weights(path)
