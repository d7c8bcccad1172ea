import os
import subprocess
import sys

import pytest

from mf_eqx._files import remove, remove_parts, write_whole


def test_file_and_its_folders_are_made(tmp_path):
    write_whole(tmp_path / "a" / "b" / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"
    assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == ["file"]


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


KILLED = """
import os, pathlib, sys
from mf_eqx._files import write_whole
pathlib.Path.replace = lambda *_: os._exit(9)
write_whole(sys.argv[1], b"content")
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "run" / "part" / "summary.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment).returncode == 9
    (tmp_path / "run" / "folder.part").mkdir()
    for name in ("partly", "a.parts"):
        (tmp_path / "run" / name).write_text("")
    assert len(list(path.parent.iterdir())) == 1
    remove_parts(tmp_path / "run")
    assert not list(path.parent.iterdir())
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["a.parts", "folder.part", "part", "partly"]
