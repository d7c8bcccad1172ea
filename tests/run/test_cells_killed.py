"""A script of several small trainings as a process: stopped, killed, run twice. It ends as the undisturbed one."""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import cell_trainer
import pytest
from processes import COMPILED_ONCE, Ended, ended, LONGEST, signalled_until_it_ends, TESTS, tree

from mf_eqx import run
from mf_eqx.run import _cell_run

for package in ("orbax.checkpoint", "tyro"):
    pytest.importorskip(package)
pytestmark = pytest.mark.rehearsal

# Six parts of each of three trainings, two at a time; every second part is saved.
FLAGS = ("--steps", 12, "--log-every", 2, "--save-every", 4, "--workers", 2)


def start(root, *flags, pause=0.0):
    """The trainer, which pauses before each part for so many seconds."""
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "RUNS": str(root), "PAUSE": str(pause)}
    environment |= COMPILED_ONCE
    command = [sys.executable, str(TESTS / "cell_trainer.py"), *map(str, (*FLAGS, *flags))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(root, *flags):
    """The end of a trainer in this process, which has nothing to train."""
    out, err = io.StringIO(), io.StringIO()
    quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with pytest.MonkeyPatch.context() as patch, quiet[0], quiet[1]:
        patch.setattr(_cell_run, "scan_steps", lambda *_: pytest.fail("trained"))
        patch.setattr(sys, "argv", ["cell_trainer.py"])
        patch.setenv("RUNS", str(root))
        try:
            run.main(cell_trainer.main, cell_trainer.Config(), argv=[*map(str, (*FLAGS, *flags))])
            code = 0
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def directory(root):
    (path,) = (pathlib.Path(root) / "cell_trainer").iterdir()
    return path


def logged(root):
    """The metrics of every cell, byte by byte."""
    return {path.parent.name: path.read_bytes() for path in pathlib.Path(root).rglob("metrics.jsonl")}


def results(root):
    return (directory(root) / "results.json").read_bytes()


def saved(root, cell):
    """Steps of a cell's checkpoints."""
    folder = directory(root) / "cells" / cell / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def wait_for(root, cell, lines, process):
    """Return when a cell has logged so many lines."""
    limit = time.monotonic() + LONGEST
    while logged(root).get(cell, b"").count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < limit, f"{cell} has not {lines} lines"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    found = ended(start(root))
    return found.digest, logged(root), results(root), root


def assert_continues(root, undisturbed, told):
    # With all three begun nothing is left to train, so that this process can run it.
    found = finished(root) if told[0] == "3" else ended(start(root))
    assert (found.digest, logged(root), results(root)) == undisturbed[:3]
    assert f"continues; of 3 trainings, {told} begun" in found.out


@pytest.mark.slow
@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_what_is_under_way_and_the_same_command_ends_as_if_nothing_had_been(
    by, code, undisturbed, tmp_path
):
    process = start(tmp_path, pause=0.4)
    wait_for(tmp_path, "seed_1", 3, process)
    process.send_signal(by)
    found = ended(process)
    assert found.code == code
    (line,) = found.told
    steps = {cell: len(lines.splitlines()) * 2 for cell, lines in logged(tmp_path).items()}
    assert line == f"cell_trainer.py: stopped by {by.name} after step {sum(steps.values())}; the same command continues"
    assert set(steps) == {"seed_0", "seed_1"}
    for cell, number in steps.items():
        assert saved(tmp_path, cell)[-1] == number < 12  # and not only what the interval asks for
    assert_continues(tmp_path, undisturbed, "0 are finished and 2")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path, "--log-every", 4, pause=LONGEST)
    limit = time.monotonic() + LONGEST
    while not (tmp_path / "a_part_has_begun").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    assert signalled_until_it_ends(process).code == -signal.SIGTERM


def test_a_killed_run_ends_as_if_nothing_had_been_and_loses_one_interval(undisturbed, tmp_path):
    process = start(tmp_path, pause=0.4)
    wait_for(tmp_path, "seed_1", 3, process)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    assert saved(tmp_path, "seed_1") == [4]
    assert_continues(tmp_path, undisturbed, "0 are finished and 2")


def test_a_dry_run_tells_what_is_done_and_changes_nothing(undisturbed):
    root = undisturbed[3]
    before = tree(root)
    found = finished(root, "--dry-run")
    assert found.code == 0 and not found.told
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.out.splitlines() if line[:1] == "|"]
    assert rows[2:] == [[f"seed_{seed}", "Hidden", "16", "12", "12"] for seed in range(3)]
    assert "2 at a time; seed_0: memory per device: " in found.out
    assert tree(root) == before


def test_the_same_command_again_trains_nothing_and_ends_the_same(undisturbed):
    root = undisturbed[3]
    summary = (directory(root) / "summary.json").read_bytes()
    assert_continues(root, undisturbed, "3 are finished and 0")
    assert (directory(root) / "summary.json").read_bytes() == summary
