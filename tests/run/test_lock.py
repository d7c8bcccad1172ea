import os
import socket
import subprocess
import sys

import pytest

from mf_eqx import run
from mf_eqx.run._lock import locked

HOLD = """
import pathlib, sys
from mf_eqx.run._lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


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
