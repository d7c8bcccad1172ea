import dataclasses
import os
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import checkpoint, data, metrics, released, run, vae
from mf_eqx._files import append, check_writable, read_regular, remove, remove_temporary_files, whole_file, write_whole


def test_file_and_its_folders_are_made(tmp_path):
    write_whole(tmp_path / "a" / "b" / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"
    assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_an_array_is_read_back(tmp_path):
    run.save_array(tmp_path / "a" / "x.npy", np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "x.npy"), [[0, 3], [1, 4], [2, 5]])


def test_an_array_on_a_full_disk_is_named_and_its_file_keeps_what_it_had(full_disk, tmp_path):
    run.save_array(tmp_path / "x.npy", np.ones(1))
    with full_disk(200), pytest.raises(OSError, match=r"File too large: .*x\.npy'"):
        run.save_array(tmp_path / "x.npy", np.zeros(100))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.ones(1))


def test_an_array_of_python_objects_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        run.save_array(tmp_path / "x.npy", np.array([{}]))
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_file_is_what_it_was_after_an_error(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "new", "new/folder/file"):
        check_writable(tmp_path / path)
    with pytest.raises(NotADirectoryError, match="file"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        check_writable(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("read_only", "path"), [("folder", "folder/file"), ("folder", "folder/new/file"), ("folder/file", "folder/file")]
)
def test_a_file_needs_the_right_to_write_it_and_its_folder(read_only, path, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    check_writable(tmp_path / path)
    monkeypatch.setattr(os, "access", lambda found, _: found != tmp_path / read_only)  # root may write everywhere
    with pytest.raises(PermissionError, match=f"{read_only}'"):
        check_writable(tmp_path / path)


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    seen, path = [], tmp_path / "file"
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_whole(path, b"content")
    assert seen == [False]


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    for name, target in (("a", "folder"), ("b", "folder/file"), ("c", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        remove(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").exists()


def test_a_directory_is_removed_with_what_it_holds_but_for_what_links_in_it_point_to(tmp_path):
    write_whole(tmp_path / "elsewhere" / "file", b"content")
    write_whole(tmp_path / "folder" / "inner" / "file", b"content")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "🙂" * 63], ids=["ascii", "two bytes", "four bytes"])
def test_a_file_may_have_the_longest_name(name, tmp_path):
    write_whole(tmp_path / name, b"content")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {name: b"content"}


def test_two_writers_of_one_file_do_not_tear_it(tmp_path):
    with whole_file(tmp_path / "file") as first:
        first.write(b"first")
        with whole_file(tmp_path / "file") as second:
            second.write(b"the second")
        assert (tmp_path / "file").read_bytes() == b"the second"
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"first"}


KILLED = """
import os, pathlib, sys
from mf_eqx._files import write_whole
pathlib.Path.replace = lambda *_: os._exit(9)
write_whole(sys.argv[1], b"content")
"""


@pytest.mark.rehearsal
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "run" / "part" / "summary.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment).returncode == 9
    (tmp_path / "run" / "folder.part").mkdir()
    for name in ("partly", "a.parts"):
        (tmp_path / "run" / name).write_text("")
    assert len(list(path.parent.iterdir())) == 1
    remove_temporary_files(tmp_path / "run")
    assert not list(path.parent.iterdir())
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["a.parts", "folder.part", "part", "partly"]


# What is no ordinary file


def checkpoint_read(folder, name):
    """Reads checkpoints of which one file is a pipe."""
    pytest.importorskip("orbax.checkpoint")
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(1, jnp.zeros(3))
    checkpoints.wait()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    checkpoints.load(lambda: jnp.zeros(3))


def tokenizer_read(folder):
    (folder / "diffusion_pytorch_model.safetensors").touch()
    vae.load_autoencoder(folder)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str


def run_opened(folder):
    (folder / ".lock").touch()
    with run.opened(Config(folder.name), root=folder.parent.parent, script=folder.parent.name):
        pass


READERS = {
    "load_weights": ("a", lambda folder: checkpoint.load_weights(folder / "a", lambda config: None)),
    "load_inception": ("a", lambda folder: metrics.load_inception(folder / "a")),
    "convert_inception": ("a", lambda folder: metrics.convert_inception(folder / "a", folder / "b")),
    "load_moments": ("a", lambda folder: metrics.load_moments(folder / "a")),
    "load_autoencoder": ("a.safetensors", lambda folder: vae.load_autoencoder(folder / "a.safetensors")),
    "load_autoencoder_of_folder": ("diffusion_pytorch_model.safetensors", vae.load_autoencoder),
    "config_of_autoencoder": ("config.json", tokenizer_read),
    "read_flax": ("a", lambda folder: released.read_flax(folder / "a")),
    "read_cifar10": ("a", lambda folder: data.read_cifar10(folder / "a")),
    "read_cifar10_of_folder": ("data_batch_1.bin", data.read_cifar10),
    "read_idx": ("a", lambda folder: data.read_idx(folder / "a")),
    "NpySource": ("a", lambda folder: data.NpySource(folder / "a")),
    "manifest_of_shards": ("manifest.json", data.ShardSource),
    "record_of_checkpoint": (None, lambda folder: checkpoint_read(folder, "00000001.json")),
    "arrays_of_checkpoint": (None, lambda folder: checkpoint_read(folder, "00000001/_CHECKPOINT_METADATA")),
    "records": ("metrics.jsonl", lambda folder: run.RunDirectory(folder).records()),
    "drop_records_after": ("metrics.jsonl", lambda folder: run.RunDirectory(folder).drop_records_after(1)),
    "log": ("metrics.jsonl", lambda folder: run.RunDirectory(folder).log(1, {})),
    "config_of_run": ("config.json", run_opened),
    "starts_of_run": ("starts.jsonl", run_opened),
    "Ledger": ("a", lambda folder: run.Ledger(folder / "a")),
    "read_json_object": ("a", lambda folder: run.read_json_object(folder / "a")),
    "sha256_of_file": ("a", lambda folder: run.sha256_of_file(folder / "a")),
    "write_whole": ("a", lambda folder: write_whole(folder / "a", b"")),
    "add_session": ("summary.json", lambda folder: run.RunDirectory(folder).add_session(0, 1, {"steps": 1, "wall": 1})),
    "append": ("a", lambda folder: append(folder / "a", b"")),
}


def outcome(call):
    """What a call ends with within a minute: its result, an error, or "it waits"."""
    ended = []

    def end():
        try:
            ended.append(call())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(60)
    return ended[0] if ended else "it waits"


@pytest.mark.parametrize("reader", READERS)
def test_pipe_in_place_of_a_file_is_refused_without_waiting(reader, tmp_path):
    name, read = READERS[reader]
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    if name is not None:
        os.mkfifo(folder / name)
    found = outcome(lambda: read(folder))
    if isinstance(found, run.MissingDependency):
        pytest.skip(str(found))
    assert isinstance(found, ValueError | OSError | checkpoint.CheckpointError), found
    assert "ordinary file" in str(found) or "No such device" in str(found)
    assert "\n" not in str(found)
    assert name is None or not (folder / name).is_file()  # a device such as /dev/null must not be replaced by a file


def test_larger_file_than_may_be_read_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_regular(tmp_path / "a", 11) == bytes(11)
    with pytest.raises(ValueError, match="a: must hold at most 10 bytes, got 11"):
        read_regular(tmp_path / "a", 10)
