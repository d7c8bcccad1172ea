"""Weights and samplers as files: exactly what was written comes back, or a refusal that names the file."""

import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from devices import run_on_devices
from fields import refilled

import mf_eqx as mfx
from mf_eqx import checkpoint, metrics, nn, run
from mf_eqx._leaves import digest

pytest.importorskip("safetensors")

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


# Weights


def test_weights_come_back_bit_by_bit_in_the_field_of_their_configuration(path, field):
    asked = []
    assert_equal(checkpoint.load_weights(path, lambda config: asked.append(config) or make_field(config)), field)
    assert asked == [CONFIG]


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
    assert content.count(b'\\"width\\": 8') == 1
    path.write_bytes(content.replace(b'\\"width\\": 8', b'\\"width\\": 9'))
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
    with pytest.raises(ValueError, match="must be a file of save_weights in the format 'mf_eqx weights 1', got 'pt'"):
        checkpoint.load_weights(tmp_path / "other", make_field)


def forged(path, arrays, **metadata):
    """A file with these words beside its arrays, and the digest that belongs to them."""
    import safetensors.numpy

    text = metadata.get("config", "")
    content = {"format": "mf_eqx weights 1", "sha256": digest(dict(sorted(arrays.items())), text)} | metadata
    path.write_bytes(safetensors.numpy.save(arrays, {name: word for name, word in content.items() if word is not None}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "{}", "format": "mf_eqx weights 2"}, r"in the format 'mf_eqx weights 1', got 'mf_eqx weights 2'"),
        ({"config": "{}", "format": None}, "in the format 'mf_eqx weights 1', got None"),
        ({"config": "{}", "format": "9" * 999}, f"in the format 'mf_eqx weights 1', got '{'9' * 59}$"),
        ({"config": "{}", "sha256": None}, "sha256 differs"),
        ({}, "but its configuration cannot be read: 'config'"),
        ({"config": "{"}, "but its configuration cannot be read: Expecting"),
        ({"config": "[" * 100_000}, "but its configuration cannot be read: it is nested more than 64 times"),
        ({"config": '{"a":' * 100_000}, "but its configuration cannot be read: it is nested more than 64 times"),
        ({"config": "1" * 10_000}, "but its configuration cannot be read: Exceeds the limit"),
        ({"config": "[1]"}, "whose configuration is a JSON object, got list"),
    ],
    ids=range(10),
)
def test_a_file_of_another_format_or_configuration_is_refused(metadata, message, tmp_path):
    forged(tmp_path / "forged", {"a": np.zeros(3, np.float32)}, **metadata)
    with pytest.raises(ValueError, match=f"forged: must .*{message}"):
        checkpoint.load_weights(tmp_path / "forged", make_field)


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
    with pytest.raises(OSError, match="No space left"):
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


def test_a_configuration_that_json_cannot_hold_leaves_nothing(field, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save_weights(tmp_path / "a", field, {"path": object()})
    assert not list(tmp_path.iterdir())


# Samplers

FRESH = """
import json, pathlib, sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(pathlib.Path("sampler").read_bytes()))
given = np.load("given.npz")
labels = {name: np.arange(len(given[name]), dtype=np.int32) % 3 for name in given}
np.savez("made.npz", **{name: exported.call(given[name], labels[name]) for name in given})
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in ("mf_eqx", "equinox", "optax"))))
"""


@pytest.fixture(scope="module")
def exported(field, tmp_path_factory):
    """The directory of a sampler that a fresh process has called with one row and with five."""
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("sampler")
    checkpoint.export_sampler(
        folder / "sampler", field, (2,), jnp.asarray(0), times=(1.0, 0.5, 0.0), platforms=("cpu",)
    )
    np.savez(folder / "given.npz", one=normal(1), five=normal(5))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


def normal(rows):
    return np.asarray(jr.normal(jr.key(rows), (rows, 2)))


def test_a_sampler_runs_without_the_package(exported):
    assert exported[1] == []


@pytest.mark.parametrize(("name", "rows"), [("one", 1), ("five", 5)])
def test_a_sampler_makes_of_any_number_of_rows_what_sample_makes(name, rows, exported, field):
    made = np.load(exported[0] / "made.npz")[name]
    expected = jax.vmap(lambda eps, label: mfx.sample(field, eps, label, times=(1.0, 0.5, 0.0)))(
        normal(rows), jnp.arange(rows) % 3
    )
    assert made.shape == (rows, 2)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)  # float32, compiled apart
    assert np.abs(made - normal(rows)).max() > 0.01


def test_a_sampler_without_a_condition_takes_noise_alone(field, tmp_path):
    pytest.importorskip("flatbuffers")
    plain = refilled(mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "plain", plain, (2,), platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "plain").read_bytes())).call(normal(3))
    np.testing.assert_allclose(called, jax.vmap(lambda eps: mfx.sample(plain, eps))(normal(3)), rtol=1e-5, atol=1e-6)


def test_a_sampler_takes_conditions_of_any_structure(tmp_path):
    pytest.importorskip("flatbuffers")

    class Sum(nn.AbstractConditionEmbedding):
        table: jax.Array

        def __call__(self, condition):
            return condition["a"] @ self.table[:3] + self.table[condition["b"][0]].sum(axis=0)

    field = refilled(mfx.MLP(2, width=8, depth=1, condition=Sum(jr.normal(jr.key(1), (9, 8))), key=jr.key(0)))
    condition = {"a": jr.normal(jr.key(2), (4, 3)), "b": (jnp.arange(8).reshape(4, 2),)}
    one = jax.tree.map(lambda leaf: leaf[0], condition)
    checkpoint.export_sampler(tmp_path / "tree", field, (2,), one, platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "tree").read_bytes())).call(normal(4), condition)
    expected = jax.vmap(lambda eps, condition: mfx.sample(field, eps, condition))(normal(4), condition)
    np.testing.assert_allclose(called, expected, rtol=1e-5, atol=1e-6)


def test_a_sampler_takes_vectors(tmp_path):
    pytest.importorskip("flatbuffers")
    field = refilled(mfx.MLP(2, width=8, depth=1, condition=3, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "vector", field, (2,), np.zeros(3, np.float32), platforms=("cpu",))
    vectors = np.asarray(jr.normal(jr.key(2), (4, 3)))
    called = jax.export.deserialize(bytearray((tmp_path / "vector").read_bytes())).call(normal(4), vectors)
    expected = jax.vmap(lambda eps, vector: mfx.sample(field, eps, vector))(normal(4), vectors)
    np.testing.assert_allclose(called, expected, rtol=1e-5, atol=1e-6)


def test_a_sampler_returns_what_postprocess_makes_of_each_sample(tmp_path):
    pytest.importorskip("flatbuffers")
    field = refilled(mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "pixels", field, (2,), postprocess=metrics.round_to_pixels, platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "pixels").read_bytes())).call(normal(40))
    expected = metrics.round_to_pixels(jax.vmap(lambda eps: mfx.sample(field, eps))(normal(40)))
    assert called.dtype == np.uint8 and np.ptp(called) > 100
    # Samples that are compiled apart may differ in the last bit, and so fall on both sides of a border between levels.
    assert np.abs(np.asarray(called, int) - np.asarray(expected, int)).max() <= 1


def test_a_sampler_is_the_same_bytes_wherever_it_is_written_from(field, tmp_path):
    pytest.importorskip("flatbuffers")
    checkpoint.export_sampler(tmp_path / "a", field, (2,), jnp.asarray(0), platforms=("cpu",))
    code = "\n\ndef save(path, field): checkpoint.export_sampler(path, field, (2,), jnp.asarray(0), platforms=('cpu',))"
    exec(compile(code, "elsewhere.py", "exec"), there := {"checkpoint": checkpoint, "jnp": jnp})
    there["save"](tmp_path / "b", field)
    content = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == content and b".py" not in content


def test_a_sampler_is_written_for_every_platform_by_default(field, tmp_path):
    pytest.importorskip("flatbuffers")
    checkpoint.export_sampler(tmp_path / "sampler", field, (2,), jnp.asarray(0))
    assert jax.export.deserialize(bytearray((tmp_path / "sampler").read_bytes())).platforms == ("cpu", "cuda", "tpu")


# Without the extra


@pytest.mark.parametrize("call", ["save", "load", "export"])
def test_without_its_package_the_extra_is_named(call, field, path, monkeypatch):
    for name in [
        *(n for n in sys.modules if n.partition(".")[0] in ("safetensors", "flatbuffers")),
        "safetensors",
        "flatbuffers",
    ]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(run.MissingDependency, match=r"pip install 'mf_eqx\[export\]'"):
        if call == "save":
            checkpoint.save_weights(path, field)
        elif call == "load":
            checkpoint.load_weights(path, make_field)
        else:
            checkpoint.export_sampler(path, field, (2,), jnp.asarray(0))
