import errno
import fcntl
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys

import pytest
from processes import tree

from mf_eqx import run
from mf_eqx.run._lock import in_place, locked

psutil = pytest.importorskip("psutil")

HOLD = """
import os, pathlib, signal, sys, time
from mf_eqx.run._lock import locked
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for folder in sys.stdin:
    if os.fork() == 0:
        with locked(pathlib.Path(folder.strip())):
            print(os.getpid(), flush=True)
            time.sleep(600)
"""


@pytest.fixture(scope="module")
def parent():
    """Another process, of which a child holds the lock of each directory that it is told."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD], text=True, env=environment, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def holder(parent, tmp_path):
    """Another process that holds the lock."""
    print(tmp_path, file=parent.stdin, flush=True)
    process = psutil.Process(int(parent.stdout.readline()))
    yield process
    if process.is_running():
        process.kill()


@pytest.mark.rehearsal
def test_a_held_lock_is_refused_with_its_owner_and_free_again_when_that_is_killed(holder, tmp_path):
    with pytest.raises(run.InUse) as error, locked(tmp_path):
        pass
    owner = f"process {holder.pid} on {socket.gethostname()}"
    assert str(error.value) == f"{tmp_path}: is in use by {owner}; wait for it, or take another name"
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_lock_is_refused_within_one_process_too(tmp_path):
    with locked(tmp_path), pytest.raises(run.InUse, match=f"process {os.getpid()} "), locked(tmp_path):
        pass


def test_a_refusal_leaves_the_owner_as_written(tmp_path):
    with locked(tmp_path):
        before = (tmp_path / ".lock").read_bytes()
        with pytest.raises(run.InUse), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_bytes() == before


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_folders_are_locked_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass


def test_a_deleted_file_lets_nobody_in(holder, tmp_path):
    (tmp_path / ".lock").unlink()
    with pytest.raises(run.InUse, match=f"{tmp_path}: is in use by another process; wait for it"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_replaced_file_lets_nobody_in(holder, tmp_path):
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("somebody")
    with pytest.raises(run.InUse, match="is in use by somebody; wait for it"), locked(tmp_path):
        pass


def test_where_directories_cannot_be_locked_the_file_is(holder, tmp_path, monkeypatch):
    flock = fcntl.flock

    def on_nfs(descriptor, how):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", on_nfs)
    with pytest.raises(run.InUse, match=f"process {holder.pid} "), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path), pytest.raises(run.InUse, match=f"process {os.getpid()} "), locked(tmp_path):
        pass


# A directory that is moved


def moved(root):
    root.rename(root.with_name("moved"))


def replaced(root):
    moved(root)
    root.mkdir()


def deleted(root):
    shutil.rmtree(root)


ACTIONS = {
    "log": lambda directory: directory.log(1, {"loss": 1.0}),
    "path": lambda directory: directory.path("previews/1.png"),
    "results": lambda directory: directory.save_results("text", []),
    "session": lambda directory: directory.add_session(0, 1, {"steps": 1.0, "wall": 1.0}),
    "records": lambda directory: directory.drop_records_after(0),
    "ledger": lambda directory: run.Ledger(directory.root / "ledger.jsonl").put({}, {}),
    "part": lambda directory: run.RunDirectory(directory.root / "cells" / "a").log(1, {"loss": 1.0}),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Of a run, as scripts name it: relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    run.RunDirectory(tmp_path / "runs" / "a").log(1, {"loss": 1.0})
    return pathlib.Path("runs", "a")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("move", [moved, replaced, deleted])
def test_nothing_is_written_to_where_a_directory_was_before_it_was_moved(move, action, root):
    with pytest.raises(run.Moved, match=f"{root.absolute()}: was moved or deleted while"), locked(root):
        move(root)
        before = tree(root.parent)
        try:
            ACTIONS[action](run.RunDirectory(root))
        finally:
            assert tree(root.parent) == before
    assert tree(root.parent) == before


def test_a_directory_above_may_not_be_moved_either(root):
    with pytest.raises(run.Moved), locked(root):
        moved(root.parent)
        run.RunDirectory(root).path("a")
    assert not root.parent.exists()


@pytest.mark.parametrize("error", [None, FileNotFoundError])
def test_a_move_is_told_at_the_end_at_the_latest_and_in_place_of_what_came_of_it(error, root):
    with pytest.raises(run.Moved), locked(root), in_place(root):
        moved(root)
        if error is not None:
            raise error


def test_an_error_in_a_directory_that_stays_is_that_error(root):
    with pytest.raises(FileNotFoundError), locked(root), in_place(root):
        raise FileNotFoundError


def test_other_directories_may_be_moved(root, tmp_path):
    (tmp_path / "runs" / "ab").mkdir()
    with locked(root), locked(root.with_name("ab")):
        root.with_name("ab").rename(root.with_name("b"))
        run.RunDirectory(root).log(2, {})
        root.with_name("b").rename(root.with_name("ab"))


def test_after_a_run_its_directory_may_be_moved(root):
    with locked(root):
        pass
    moved(root)
    run.RunDirectory(root).log(1, {})
    with locked(root):
        run.RunDirectory(root).log(2, {})
