"""A trainer as a process: killed, stopped, run twice, out of space, spread over devices and processes. It always ends
as the undisturbed one, or says in one line why not."""

import contextlib
import io
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import trainer
from processes import (
    Ended,
    ended,
    free_address,
    LONGEST,
    losses,
    metrics,
    only_run,
    signalled_at,
    signalled_until_it_ends,
    start,
    start_together,
    trained,
    tree,
    wait_for,
)

from mf_eqx import run

for package in ("grain", "orbax.checkpoint", "tyro"):
    pytest.importorskip(package)
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.rehearsal

# An interval of each kind ends where no other does.
FLAGS = ("--steps", 20, "--log-every", 3, "--save-every", 4, "--preview-every", 5)
SHARDED = (*FLAGS, "--sgd", "--width", 256, "--log-every", 1)  # one leaf is large enough for FSDP


def refused(root, *flags):
    """The end of a trainer in this process that is to be refused before it trains."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["trainer.py"])
        patch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
        patch.setenv("RUNS", str(root))
        patch.delenv("MF_EQX_TRACEBACK", raising=False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run.main(trainer.main, trainer.Config(), argv=[*map(str, flags)])
    return Ended(end.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def with_a_second(tmp_path_factory):
    """How a trainer ended, where it trained, and how a second one ended that came meanwhile and changed no file."""
    root = tmp_path_factory.mktemp("undisturbed")
    first = start(root, *FLAGS, pause=0.1)
    wait_for(root, "previews/00000005.png", first)
    first.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)  # all its threads stand still
    before = tree(root)
    second = refused(root, *FLAGS)
    assert tree(root) == before
    first.send_signal(signal.SIGCONT)
    assert f"{only_run(root)}: is in use by process {first.pid} on " in error_line(second)
    return ended(first), root, second


@pytest.fixture(scope="module")
def undisturbed(with_a_second):
    """The digest and the metrics of a run that nothing happened to, and where it is."""
    found, root, _ = with_a_second
    return found.digest, metrics(root), root


def continued(root, undisturbed, *flags, **options):
    """The end of a run after all that happened to it: that of the undisturbed one."""
    found = trained(root, *FLAGS, *flags, **options)
    assert (found.digest, metrics(root)) == undisturbed[:2]
    return found


def error_line(found):
    """The one line of a trainer that could not go on."""
    (line,) = found.told
    assert line.startswith("trainer.py: error: "), line
    return line


# Killed and stopped


@pytest.mark.parametrize(
    ("step", "by", "code"),
    [
        (13, signal.SIGTERM, 143),
        pytest.param(3, signal.SIGINT, 130, marks=pytest.mark.slow),
        *(pytest.param(step, signal.SIGTERM, 143, marks=pytest.mark.slow) for step in (4, 8, 10, 17)),
    ],
)
def test_a_run_that_is_killed_and_stopped_and_loses_a_file_ends_as_if_nothing_had_been(
    step, by, code, undisturbed, tmp_path
):
    flags = (*FLAGS, "--preview-every", 1)
    assert signalled_at(step, tmp_path, *flags, by=signal.SIGKILL, pause=0.1).code == -signal.SIGKILL
    found = signalled_at(step + 1, tmp_path, *flags, by=by)
    (after,) = re.findall(r"continues after step (\d+)", found.out) or [0]
    assert step - 8 < int(after) <= step  # at most one interval is lost, and another if its save was under way
    assert found.code == code
    assert f"{by.name}: this step is finished and saved; a second signal ends at once\n" in found.out
    assert found.told == [f"trainer.py: stopped by {by.name} after step {step + 2}; the same command continues"]
    saved = only_run(tmp_path) / "checkpoints" / f"{step + 2:08}"
    assert saved.with_suffix(".json").exists()
    for file in (saved / "state" / "d").iterdir():
        file.unlink()
    found, before = continued(tmp_path, undisturbed), (step + 1) // 4 * 4
    assert re.search(f"{saved.name}: passed over, because .*\n.*continues after step {before} of 20", found.out)
    assert not found.told


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path, *FLAGS, pause=LONGEST)
    wait_for(tmp_path, "previews/00000005.png", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    assert signalled_until_it_ends(process).code == -signal.SIGTERM


# Killed while it saves


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_any_moment_of_its_saves_ends_as_if_nothing_had_been(seed, undisturbed, tmp_path):
    process = start(tmp_path, *FLAGS, "--save-every", 1)
    wait_for(tmp_path, "checkpoints/00000003*", process)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.kill()
    process.communicate()
    continued(tmp_path, undisturbed)


# Two in one directory


def test_a_second_trainer_is_refused_and_the_first_is_undisturbed(with_a_second):
    first, _, second = with_a_second
    assert (first.code, second.code) == (0, 4)  # and the run above, of the same seed, ends with the same bytes


# Moved


@pytest.mark.slow
def test_a_directory_that_is_moved_in_the_midst_stops_the_run_and_back_in_its_place_ends_as_ever(
    undisturbed, tmp_path, monkeypatch
):
    root, elsewhere = tmp_path / "trainer" / only_run(undisturbed[2]).name, tmp_path / "elsewhere"
    hold = tmp_path / "hold"  # in its first preview
    hold.touch()
    monkeypatch.setenv("HOLD", str(hold))
    process = start(tmp_path, *FLAGS)
    wait_for(tmp_path, "previews/00000005.png", process)
    wait_for(tmp_path, "checkpoints/00000004/*", process)
    root.rename(elsewhere)
    hold.unlink()
    found = ended(process)
    assert found.code == 4
    assert f"{root}: was moved or deleted while it was trained in" in error_line(found)
    assert not root.exists()
    elsewhere.rename(root)
    assert "continues after step 4 of 20" in continued(tmp_path, undisturbed).out


# The disk


@pytest.mark.slow
def test_a_full_disk_is_one_line_with_the_step_and_with_space_again_the_run_ends_as_ever(undisturbed, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    found = trained(tmp_path, *FLAGS, preexec_fn=limit)
    assert found.code == 2
    assert "00000004: step 4 could not be saved: " in error_line(found)
    continued(tmp_path, undisturbed)


@pytest.mark.slow
def test_no_space_for_a_line_of_metrics_is_one_line(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    found = trained(tmp_path, *FLAGS, "--log-every", 1, "--save-every", 100, preexec_fn=limit)
    assert found.code == 2
    assert "File too large" in error_line(found)


@pytest.mark.parametrize("flags", ["--fsdp 1000", "--accumulation 3"])
def test_a_refused_first_start_leaves_nothing(flags, tmp_path):
    assert refused(tmp_path, *FLAGS, *flags.split()).code == 2
    assert not tree(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few checkpoints, and a function that enlarges it."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", mount], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    yield mount, lambda: subprocess.run(["mount", "-o", "remount,size=50m", mount], check=True)
    subprocess.run(["umount", mount], check=True)


FILLING = (*FLAGS, "--keep-last", 100, "--save-every", 1)


@pytest.mark.slow
def test_on_a_full_file_system_the_run_stops_and_with_space_again_ends_as_ever(undisturbed, small_disk):
    root, enlarge = small_disk
    found = trained(root, *FILLING)
    assert found.code == 2
    assert len(re.findall(r"^trainer.py: error: .*: step \d+ could not be saved: ", found.err, re.MULTILINE)) == 1
    enlarge()
    assert "continues after step" in continued(root, undisturbed).out


@pytest.mark.slow
def test_a_full_file_system_is_one_line_and_nothing_of_the_threads_that_met_it(small_disk):
    assert "could not be saved" in error_line(trained(small_disk[0], *FILLING))


def test_a_root_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    found = refused(tmp_path / "runs", *FLAGS)
    assert found.code == 2
    assert str(tmp_path / "runs") in error_line(found)


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stepz 3", "unknown argument --stepz, did you mean --steps?"),
        ("--width wide", "--width: invalid literal for int() with base 10: 'wide'"),
        ("--batch 15", "--batch must be a positive multiple of 2"),
        ("--name ../outside", "name must be a path below"),
        ("--name NAME --width 8", "name must be that of a run with this configuration, but in .* width was 16, now 8"),
        ("--processes 2", "coordinator, processes and process must be given together"),
        ("--fsdp 1000", "fsdp must divide the number of devices, .*, got 1000"),
        ("--accumulation 3", "= 6, got 16"),
        ("--processes 2 --process 0 --coordinator localhost:http", "coordinator must be HOST:PORT"),
    ],
)
def test_bad_input_ends_in_one_line_and_changes_nothing(flags, message, undisturbed):
    root = undisturbed[2]
    before = tree(root)
    found = refused(root, *FLAGS, *flags.replace("NAME", only_run(root).name).split())
    assert (found.code, found.out) == (2, "")
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), error_line(found))
    assert tree(root) == before


def test_a_damaged_configuration_is_refused_by_its_file(undisturbed, tmp_path):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    file = only_run(tmp_path) / "config.json"
    file.write_text(file.read_text()[:-30])
    before = tree(tmp_path)
    found = refused(tmp_path, *FLAGS)
    assert found.code == 2
    assert f"{file}: must be JSON, but it cannot be read" in error_line(found)
    assert tree(tmp_path) == before


# Several devices and several processes


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Losses of each step on one device."""
    root = tmp_path_factory.mktemp("one_device")
    assert trained(root, *SHARDED).code == 0
    return losses(root)


def assert_same(found, expected):
    assert len(found) == len(expected) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "fsdp"),
    [(8, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 1), (4, 1), (8, 1), (2, 2), (8, 8)])],
)
def test_losses_are_the_same_on_any_number_of_devices(devices, fsdp, one_device, tmp_path):
    assert trained(tmp_path, *SHARDED, "--fsdp", fsdp, devices=devices).code == 0
    assert_same(losses(tmp_path), one_device)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((8, 2), (1, 1)), ((1, 1), (8, 4)), ((4, 1), (2, 2))])
def test_a_run_continues_on_another_number_of_devices(before, after, one_device, tmp_path):
    found = signalled_at(10, tmp_path, *SHARDED, "--fsdp", before[1], devices=before[0])
    assert found.code == 143
    found = trained(tmp_path, *SHARDED, "--fsdp", after[1], devices=after[0])
    assert "continues after step 11 of 20" in found.out
    assert_same(losses(tmp_path), one_device)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """How both ended, their losses, and where they listened at the coordinator's port meanwhile."""
    root = tmp_path_factory.mktemp("two_processes")
    processes = start_together(root, 2, *SHARDED, "--save-every", 100, pause=0.5)
    wait_for(root, "previews/00000005.png", *processes)
    found = [each for process in processes for each in psutil.Process(process.pid).net_connections()]
    port = int(processes[0].args[processes[0].args.index("--coordinator") + 1].rpartition(":")[2])
    listening = {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}
    return [ended(process) for process in processes], losses(root), listening


def test_losses_are_the_same_with_two_processes(one_device, two_processes):
    (first, second), found, _ = two_processes
    assert (first.code, second.code) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert "digest" in first.out and "digest" not in second.out  # all is told once
    assert not second.told
    assert_same(found, one_device)


@pytest.mark.slow
def test_losses_are_the_same_with_blocks_divided_between_two_processes(tmp_path):
    flags = (*SHARDED, "--depth", 2)
    assert trained(tmp_path / "one", *flags).code == 0
    both = [ended(process) for process in start_together(tmp_path / "two", 2, *flags, "--fsdp", 2)]
    assert [process.code for process in both] == [0, 0], both[0].err[-2000:] + both[1].err[-2000:]
    assert_same(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_the_coordinator_listens_at_its_address_alone(two_processes):
    assert {address.removeprefix("::ffff:") for address in two_processes[2]} == {"127.0.0.1"}


def test_a_process_that_stays_alone_ends_in_one_line_when_it_has_waited(tmp_path):
    flags = ("--coordinator", free_address(), "--processes", 2, "--process", 0, "--wait", 1)
    found = trained(tmp_path, *flags)
    assert (found.code, found.out) == (5, "")
    assert error_line(found).startswith(f"trainer.py: error: process 1 of 2 did not come to {flags[1]}")
    assert not tree(tmp_path)


def test_a_port_in_use_ends_the_first_process_in_one_line_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        found = refused(tmp_path, "--coordinator", address, "--processes", 2, "--process", 0)
    assert (found.code, found.out) == (2, "")
    assert f"got {address}: Address already in use" in error_line(found)


@pytest.mark.slow
def test_processes_that_do_not_fit_each_other_end_in_one_line_each(tmp_path):
    flags = ("--coordinator", free_address(), "--processes", 3)
    processes = [start(tmp_path, *flags, "--process", process) for process in (0, 1, 1)]
    for found in map(ended, processes):
        assert (found.code, found.out) == (2, "")
        assert "process must differ from all others, got 1 twice" in error_line(found)


def stopped_together(root, victim, step=10, **options):
    """Both processes of a run of which one gets a SIGTERM."""
    processes = start_together(root, 2, *SHARDED, pause=1.0, **options)
    wait_for(root, f"previews/{step:08}.png", *processes)
    processes[victim].send_signal(signal.SIGTERM)
    return [ended(process) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(victim, one_device, tmp_path):
    found = stopped_together(tmp_path, victim)
    assert [process.code for process in found] == [143, 143]
    lines = {line for process in found for line in process.told if "stopped" in line}
    (line,) = lines
    (step,) = re.fullmatch(
        r"trainer.py: stopped by SIGTERM after step (\d+); the same command continues", line
    ).groups()
    assert (only_run(tmp_path) / "checkpoints" / f"{int(step):08}.json").exists()
    assert trained(tmp_path, *SHARDED).code == 0  # by one process
    assert_same(losses(tmp_path), one_device)


@pytest.mark.slow
def test_after_training_together_a_signal_ends_a_process_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LINGER", str(2 * LONGEST))
    processes = start_together(tmp_path, 2, *SHARDED)
    wait_for(tmp_path, "trained", *processes)
    time.sleep(1)  # for the one that does not write the file
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert [ended(process).code for process in processes] == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_a_run_of_one_process_continues_with_two(one_device, tmp_path):
    assert signalled_at(10, tmp_path, *SHARDED).code == 143
    found = [ended(process) for process in start_together(tmp_path, 2, *SHARDED)]
    assert [process.code for process in found] == [0, 0]
    assert "continues after step 11 of 20" in found[0].out
    assert_same(losses(tmp_path), one_device)


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_first_ends_in_one_line(tmp_path):
    found = survivor(tmp_path, victim=1)
    assert found.code == 5
    assert "process 0 of 2 could not go on, probably because another one has ended" in error_line(found)


@pytest.mark.slow
def test_when_the_coordinator_is_killed_the_last_line_says_what_it_means(tmp_path):
    found = survivor(tmp_path, victim=0)
    assert found.code == 6  # by JAX, with a stack trace
    last = found.err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"trainer.py: error: process \d+ was ended before .* the same command for all continues.*", last
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_is_killed_the_other_ends_within_a_minute_and_the_run_continues(
    victim, one_device, tmp_path
):
    assert survivor(tmp_path, victim).code != 0
    assert [ended(process).code for process in start_together(tmp_path, 2, *SHARDED)] == [0, 0]
    assert_same(losses(tmp_path), one_device)


@pytest.mark.slow
def test_a_row_that_one_of_two_processes_refuses_ends_both(tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN_ROW", "50")
    began = time.monotonic()
    found = [ended(process) for process in start_together(tmp_path, 2, "--steps", 20)]
    assert sorted(process.code for process in found) in ([2, 5], [2, 6])  # JAX ends those whose first process is gone
    assert time.monotonic() - began < 60
    (refused,) = (process for process in found if process.code == 2)
    assert "points: x must be finite, got NaN or infinity in row 50" in refused.told[-1]


@pytest.mark.slow
def test_processes_of_different_configurations_refuse_to_start(tmp_path):
    each = [("--width", 16), ("--width", 32)]
    found = [ended(process) for process in start_together(tmp_path, 2, "--steps", 20, each=each)]
    assert [process.code for process in found] == [2, 2]
    for process in found:
        assert "config must be the same in all processes, but process 1 differs from 0" in process.told[-1]
    assert not any(tmp_path.iterdir())


def survivor(root, victim):
    """What becomes of one process within a minute after the other one was killed."""
    processes = start_together(root, 2, *SHARDED, pause=1.0)
    wait_for(root, "previews/00000010.png", *processes)
    processes[victim].kill()
    found = ended(processes[1 - victim], timeout=60)
    processes[victim].communicate()
    return found


# For long


@pytest.mark.slow
def test_random_kills_for_long_end_as_if_nothing_had_been(tmp_path):
    """MF_EQX_SOAK_MINUTES of kills, by default 20; then the run is left alone."""
    minutes = float(os.environ.get("MF_EQX_SOAK_MINUTES", "20"))
    flags = ("--steps", 3000, "--log-every", 7, "--save-every", 25, "--preview-every", 40, "--keep-last", 2)
    expected = trained(tmp_path / "undisturbed", *flags).digest
    rng, root = random.Random(0), tmp_path / "killed"
    until, kills, memory, disk = time.monotonic() + 60 * minutes, 0, 0, 0
    while time.monotonic() < until:
        process = start(root, *flags, pause=0.3)
        limit = time.monotonic() + rng.uniform(1, 9)
        while time.monotonic() < limit and process.poll() is None:
            try:
                memory = max(memory, psutil.Process(process.pid).memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        by = rng.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(by)
        found = ended(process)
        kills += 1
        assert found.code in (-signal.SIGKILL, -signal.SIGTERM, 143, 0), found.err[-3000:]
        disk = max(disk, sum(path.stat().st_size for path in pathlib.Path(root).rglob("*") if path.is_file()))
    found = trained(root, *flags)
    print(f"{kills} kills, {memory / 1e6:.0f} MB of memory, {disk / 1e6:.1f} MB on disk, {found.out}")
    assert found.digest == expected
    assert metrics(root) == metrics(tmp_path / "undisturbed")
    assert memory < 1e9
    assert disk < 2e6
