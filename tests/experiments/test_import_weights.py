"""Released files become files of ours by one command, which `load_weights` reads; bad input ends in one line."""

import hashlib
import os
import re
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from random_tensors import random_tensor

import mf_eqx as mfx
from mf_eqx import checkpoint, released, run, vae

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def import_weights(experiment):
    pytest.importorskip("safetensors")
    return experiment("import_weights")


@pytest.fixture(scope="module")
def files():
    """How the tests of `released` make trees and files."""
    pytest.importorskip("msgpack")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "released")
        import released_files

        yield released_files


@pytest.fixture
def convert(import_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def convert(arguments):
        run.main(import_weights.main, import_weights.Config(), argv=arguments.split())

    return convert


def load(path):
    """The field in a file of ours, and the file's words."""
    weights = checkpoint.read_weights(path)
    return weights.fill(weights.make_network), weights


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


DIT = "--dit state --to dit.safetensors --heads 2 --image-size 8 12"


@pytest.fixture
def flax_file(files, tmp_path):
    parts = {"params": files.flax_tensors("trained"), "ema_params": files.flax_tensors("average")}
    return files.write_state(tmp_path / "state", **parts)


@pytest.mark.parametrize(("flags", "part", "seed"), [("", "ema_params", "average"), ("params", "params", "trained")])
def test_dit_is_imported(flags, part, seed, convert, flax_file, files, capsys):
    convert(DIT + f" --weights {flags}" * bool(flags))
    field, weights = load("dit.safetensors")
    assert_equal(field, released.fill_dit(field, files.flax_tensors(seed), "dit"))
    assert field.data_shape == (4, 8, 12) and field.null_label == 5
    digest = sha256(flax_file)
    assert weights.config["source"] == {"kind": "dit", "weights": part, "sha256": digest}
    assert weights.notes == checkpoint.Notes(pixels=(-1, 1), tokenizer=checkpoint.Tokenizer(vae.SD_VAE))
    first, second = capsys.readouterr().out.splitlines()
    count = sum(leaf.size for leaf in jax.tree.leaves(field))
    size = "{'depth': 3, 'width': 16, 'heads': 2, 'patch': 2}"
    assert first == f"dit.safetensors: DiT of {size}, {count:,} parameters"
    assert second == f"from {part} in state, sha256 {digest}"


IN_CONTEXT = "--to imf.safetensors --heads 2 --image-size 8 12"


def write_imf(files):
    files.write_state(Path("imf"), params=files.in_context_tensors("p"), ema_params=files.in_context_tensors("e"))


def write_pmf(files):
    """A train state with two averages."""
    trees = {decay: files.nested(files.in_context_tensors(decay, **files.PIXELS)) for decay in ("250", "500")}
    files.write_flax(Path("pmf"), {"step": 7, "ema_params": trees})


@pytest.mark.parametrize(("flags", "has_head"), [("", True), ("--no-velocity-head", False)])
def test_improved_mean_flow_is_imported(flags, has_head, convert, files, capsys):
    write_imf(files)
    convert(f"--imf imf {IN_CONTEXT} {flags}")
    field, weights = load("imf.safetensors")
    assert_equal(field, released.fill_in_context_dit(field, files.in_context_tensors("e"), "imf"))
    assert field.data_shape == (4, 8, 12) and field.null_label == 5 and field.has_velocity_head == has_head
    assert weights.config["source"] == {"kind": "imf", "weights": "ema_params", "sha256": sha256("imf")}
    assert weights.notes == checkpoint.Notes(pixels=(-1, 1), tokenizer=checkpoint.Tokenizer(vae.SD_VAE))
    assert "imf.safetensors: InContextDiT of {'depth': 4, 'width': 16," in capsys.readouterr().out


def test_pixel_mean_flow_is_imported_as_a_field_that_predicts_data(convert, files):
    write_pmf(files)
    convert(f"--pmf pmf {IN_CONTEXT} --weights ema_params/500")
    field, weights = load("imf.safetensors")
    assert isinstance(field, mfx.XPrediction) and field.smallest_time == 0.05 and field.has_velocity_head
    expected = released.fill_in_context_dit(field.field, files.in_context_tensors("500", **files.PIXELS), "pmf")
    assert_equal(field.field, expected)
    assert weights.config["source"]["weights"] == "ema_params/500"


def test_imported_pixel_mean_flow_is_sampled_by_its_labels(convert, experiment, files):
    write_pmf(files)
    convert(f"--pmf pmf {IN_CONTEXT} --weights ema_params/500")
    generate = experiment("generate")
    flags = "--weights imf.safetensors --to made.npy --label 0 4 --number 6 --guidance-scale 2 --seed 3"
    run.main(generate.main, generate.Config(), argv=flags.split())
    field = checkpoint.load_weights("imf.safetensors")
    guided = mfx.WithGuidance(field, 2.0, (0.0, 1.0))
    generator = mfx.Generator(guided, jr.key(3), field.data_shape, condition=np.array([0, 4]))
    (expected,) = generator.batches(6, 6, mfx.Parallelism())  # the program that the script has compiled
    np.testing.assert_allclose(np.load("made.npy"), expected, rtol=1e-4, atol=1e-5)


def test_folder_of_orbax_is_imported_as_the_file_is(convert, files):
    orbax = pytest.importorskip("orbax.checkpoint")
    tree = files.nested(files.in_context_tensors("e"))
    orbax.PyTreeCheckpointer().save(Path("checkpoint_7").absolute(), {"step": 7, "ema_params": tree})
    convert(f"--imf checkpoint_7 {IN_CONTEXT}")
    field, weights = load("imf.safetensors")
    assert_equal(field, released.fill_in_context_dit(field, tree, "imf"))
    assert len(weights.config["source"]["sha256"]) == 64


def save_unet(path, *prefixes):
    """A file of torch with the CIFAR-10 network of the parity tests, small, with each prefix."""
    torch = pytest.importorskip("torch")
    with np.load(TESTS / "parity" / "unet.npz", allow_pickle=False) as held:
        shapes = [tuple(map(int, shape.split(","))) for shape in held["shapes"].tolist()]
        names = held["names"].tolist()
    row = np.array([1, 3, 3, 1], np.float32) / 8
    tensors = {
        prefix: {
            name: np.outer(row, row)[None, None] if "filter" in name else random_tensor(prefix + name, shape)
            for name, shape in zip(names, shapes, strict=True)
        }
        for prefix in prefixes
    }
    model = {f"{prefix}.{name}": torch.from_numpy(t) for prefix, held in tensors.items() for name, t in held.items()}
    torch.save({"model": model, "epoch": 3}, path)
    return tensors


@pytest.mark.parametrize(("flags", "part"), [("", "net_ema"), ("--weights net_ema1", "net_ema1")])
def test_unet_is_imported(flags, part, convert, capsys):
    tensors = save_unet("unet.pth", "net", "net_ema", "net_ema1")
    convert(f"--unet unet.pth --to unet.safetensors {flags}")
    field, weights = load("unet.safetensors")
    assert_equal(field, released.fill_unet(field, tensors[part], "unet"))
    size = {"width": 8, "multipliers": [1, 2], "blocks": 2, "attention": [4]}
    source = {"kind": "unet", "weights": f"model.{part}", "sha256": sha256("unet.pth")}
    known = {"network": "UNet", "data_shape": [3, 8, 8], "augmentation": 6, "dropout": 0.2, "size": size}
    assert weights.network.items() >= known.items() and weights.config == {"source": source}
    assert weights.notes == checkpoint.Notes(pixels=(-1, 1))
    assert f"from model.{part} in unet.pth, sha256 {source['sha256']}" in capsys.readouterr().out


@pytest.mark.parametrize(("nested", "name"), [(False, ""), (True, "ema")])
def test_sit_is_imported(nested, name, convert, files, capsys):
    torch = pytest.importorskip("torch")
    held, other = (
        {name: torch.from_numpy(tensor) for name, tensor in files.sit_tensors(seed).items()} for seed in ("a", "b")
    )
    torch.save({"ema": held, "model": other} if nested else held, "sit.pt")
    convert("--sit sit.pt --to start.safetensors --heads 2 --image-size 8 12 --seed 4")
    field, weights = load("start.safetensors")
    assert_equal(field, released.fill_sit(field, files.sit_tensors("a"), "sit", key=jr.key(4)))
    assert weights.config["source"] == {"kind": "sit", "weights": name, "sha256": sha256("sit.pt")}
    assert weights.notes.trained == mfx.Trained(average=False, null_velocity=True, null_average=False)
    assert f"from {name or 'the only weights'} in sit.pt" in capsys.readouterr().out


def test_inception_is_converted(import_weights, convert, capsys, monkeypatch):
    # The network itself has tests of its own, and 95 MB.
    calls = []
    monkeypatch.setattr(import_weights.metrics, "convert_inception", lambda *paths: calls.append(paths))
    Path("inception.pth").write_bytes(b"weights")
    convert("--inception inception.pth --to inception.safetensors")
    assert calls == [("inception.pth", "inception.safetensors")]
    assert f"sha256 {sha256('inception.pth')}" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dit state --to a", "state: heads must be given, as no published network has width 16, got none"),
        ("--dit state --to a --heads 3", "state: heads must divide the width 16, got 3"),
        (f"{DIT} --weights ema", "state: must hold a dictionary named ema, got ema_params, opt_state, params"),
        ("--dit state --to a --heads 2 --image-size 7 8", "patch must divide the sides of data_shape"),
    ],
)
def test_flags_that_do_not_fit_the_file_end_in_one_line(flags, message, convert, flax_file, refusal_of):
    assert message in refusal_of(convert, flags)
    assert os.listdir() == ["state"]


def test_a_renamed_tensor_ends_in_one_line(convert, files, tmp_path, refusal_of):
    tensors = files.flax_tensors()
    tensors["net/new"] = tensors.pop("net/x_embedder/proj/bias")
    files.write_state(tmp_path / "state", ema_params=tensors)
    line = refusal_of(convert, DIT)
    assert "it lacks net/x_embedder/proj/bias; has the unexpected net/new" in line
    assert os.listdir() == ["state"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pmf pmf", "--weights must be one of ema_params/250, ema_params/500 for pmf, got ema_params"),
        ("--imf imf --weights ema_params/9", "--weights must be one of ema_params for imf, got ema_params/9"),
        ("--imf pmf --weights ema_params/250", "--imf must be a file of this method, got one for --pmf: pmf"),
        ("--pmf imf", "--pmf must be a file of this method, got one for --imf: imf"),
        (
            "--pmf pmf --weights ema_params/250 --image-size 8 8",
            r"differs: net/pos_embed is \(33, 16\), not \(25, 16\)",
        ),
    ],
)
def test_files_and_flags_of_in_context_networks_that_do_not_fit_end_in_one_line(
    flags, message, convert, files, refusal_of
):
    write_imf(files)
    write_pmf(files)
    assert re.search(message, refusal_of(convert, f"{IN_CONTEXT} {flags}"))
    assert sorted(os.listdir()) == ["imf", "pmf"]


def test_weights_that_are_not_there_are_refused_with_those_that_are(convert, refusal_of):
    save_unet("unet.pth", "net", "net_ema1")
    for flags, found in (("", "none"), ("--weights ema", "ema")):
        line = refusal_of(convert, f"--unet unet.pth --to a {flags}")
        assert f"--weights must be one of 'model.net', 'model.net_ema1' for unet.pth, got {found}" in line
    assert os.listdir() == ["unet.pth"]


@pytest.mark.parametrize("flag", ["--unet", "--sit", "--inception"])
def test_a_file_with_code_is_refused_and_not_executed(flag, convert, refusal_of):
    torch = pytest.importorskip("torch")
    torch.save({"a": Evil()}, "file")
    assert "file: must be a file of torch.save with tensors alone" in refusal_of(convert, f"{flag} file --to a")
    assert os.listdir() == ["file"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--to a", "exactly one of --dit, --imf, --pmf, --unet, --sit, --inception must be given, got none"),
        ("--dit a --sit b --to c", "exactly one of .* must be given, got --dit and --sit"),
        ("--dit a", "--to must be given with --dit, got none"),
        ("--unet a --to b --heads 2", "--heads must be given with --dit or --imf or --pmf or --sit, got --unet"),
        ("--unet a --to b --image-size 8 8", "--image-size must be given with --dit or .* or --sit, got --unet"),
        ("--dit a --to b --seed 1", "--seed must be given with --sit, got --dit"),
        ("--inception a --to b --weights c", "--weights must be given with --dit or .* or --unet, got --inception"),
        ("--dit a --to b --no-velocity-head", "--velocity-head must be given with --imf or --pmf, got --dit"),
        ("--dit a --to b --heads 0", "--heads must be >= 1, got 0"),
        ("--dit a --to b --image-size 0 8", "--image-size must be positive, got"),
        ("--sit a --to b --seed -1", "--seed must be >= 0, got -1"),
        ("--dit missing --to a", "--dit: No such file or directory: 'missing'"),
        ("--sit missing --to a", "--sit: No such file or directory: 'missing'"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, convert, refusal_of):
    assert re.search(message, refusal_of(convert, arguments))
    assert os.listdir() == []
