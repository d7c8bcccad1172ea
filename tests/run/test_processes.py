import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mf_eqx import run
from mf_eqx.run import _processes


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with. All processes are there; the first one is at 10.0.0.1."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *flags, **options: calls.append((flags, options)))
    monkeypatch.setattr(_processes, "meet", lambda place: None if place.process else f"10.0.0.1:{place.port}")
    monkeypatch.setattr(_processes, "_on_signal", lambda *_: None)
    yield calls
    _processes._witness.dismiss()


def connect(text, **environment):
    _processes.connect(text.split(), environment)


# How processes find each other


@pytest.mark.parametrize("text", ["", "--steps 3 --preset guided", "--help"])
def test_one_process_alone_joins_nobody(text, joined):
    connect(text)
    assert joined == []


@pytest.mark.parametrize(
    "text",
    [
        "--coordinator a:1 --processes 4 --process 2",
        "--steps 3 --process=2 --width 8 --processes=4 --coordinator=a:1 --compare",
    ],
)
def test_flags_join_as_they_say_wherever_they_stand(text, joined):
    connect(text)
    ((flags, options),) = joined
    assert flags == ("a:1", 4, 2)
    assert options["heartbeat_timeout_seconds"] <= 30  # how long a dead process may go unnoticed


def test_the_coordinator_listens_where_the_processes_have_met_and_nowhere_else(joined):
    connect("--coordinator a:1 --processes 4 --process 0")
    assert joined[0][1]["coordinator_bind_address"] == "10.0.0.1:1"


@pytest.mark.parametrize(("flag", "seconds"), [("", 300), ("--wait 7", 7), ("--wait=86400", 86400)])
@pytest.mark.parametrize("place", ["--coordinator a:1 --processes 4 --process 2", ""])
def test_the_wait_for_others_is_bounded(flag, seconds, place, joined):
    connect(f"{place} {flag}", OMPI_COMM_WORLD_SIZE="4")
    assert joined[0][1]["initialization_timeout"] == seconds


@pytest.mark.parametrize("seconds", ["0", "-1", "86401", "1.5", "inf", "long", "9" * 5000])
def test_a_wait_that_is_none_is_refused(seconds, joined):
    with pytest.raises(ValueError, match=r"wait must lie in \[1, 86400\], got|integer string"):
        connect(f"--coordinator a:1 --processes 4 --process 2 --wait {seconds}")
    assert joined == []


@pytest.mark.parametrize(
    "text",
    [
        "--coordinator a:1",
        "--processes 2",
        "--process 0",
        "--coordinator a:1 --processes 2",
        "--processes 2 --process 0",
    ],
)
def test_some_of_the_flags_without_the_others_are_refused(text, joined):
    with pytest.raises(ValueError, match="coordinator, processes and process must be given together"):
        connect(text)
    assert joined == []


@pytest.mark.parametrize(
    ("processes", "process"), [("2", "2"), ("2", "3"), ("0", "0"), ("2", "-1"), ("two", "0"), ("2", "x"), ("2.0", "0")]
)
def test_a_process_that_is_none_of_them_is_refused(processes, process, joined):
    with pytest.raises(ValueError, match=f"process must lie in .* got process {process} of processes {processes}"):
        _processes.connect(["--coordinator=a:1", f"--processes={processes}", f"--process={process}"], {})
    assert joined == []


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http", "host:0", "host:65536", "host:-1"])
def test_a_coordinator_without_host_and_port_is_refused(address, joined):
    with pytest.raises(ValueError, match=f"coordinator must be HOST:PORT, got '{address}'"):
        connect(f"--coordinator {address} --processes 2 --process 0")
    assert joined == []


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # an allocation, of which only a step starts several
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_launcher_of_several_processes_is_noticed(environment, several, joined):
    connect("--steps 3", **environment)
    assert [flags for flags, _ in joined] == ([()] if several else [])


def test_flags_go_before_the_launcher(joined):
    connect("--coordinator a:1 --processes 2 --process 1", OMPI_COMM_WORLD_SIZE="4")
    assert [flags for flags, _ in joined] == [("a:1", 2, 1)]


ABORT = """
import os, sys, jax
from mf_eqx.run import _processes
sys.argv = ["script.py"]
jax.distributed.initialize = lambda *_, **__: os.abort()
_processes._join(wait=1)
"""


@pytest.mark.rehearsal
def test_a_process_that_jax_aborts_has_an_exit_code_of_its_own_and_a_last_line():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", ABORT], capture_output=True, text=True, env=environment)
    assert found.returncode == 6
    assert found.stderr.splitlines()[-1].startswith("script.py: error: process ")


# What they do together


def test_alone_an_action_is_done_once_and_its_error_is_its_own():
    done = []
    _processes.once(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(KeyError, match="mine"):
        _processes.once(lambda: {}["mine"])


def test_other_processes_do_nothing_and_hear_of_a_refusal(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(_processes, "anywhere", lambda here: True)
    with pytest.raises(_processes.RefusedElsewhere, match="the first process could not go on"):
        _processes.once(lambda: pytest.fail("done"))


def test_only_the_first_process_tells(monkeypatch, capsys):
    run.tell("first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run.tell("second")
    assert capsys.readouterr().out == "first\n"
    assert not run.is_first()


def gone():
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo:\n  connection\tclosed " + "x" * 1000)


def test_what_jax_raises_when_another_process_is_gone_is_a_separation_in_one_line(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(_processes.Separated) as error, _processes.together():
        gone()
    text = str(error.value)
    assert text.startswith("process 0 of 2 could not go on, probably because another one has ended; the same command")
    assert "(UNAVAILABLE: Gloo: connection closed xxx" in text and len(text) < 400


def test_alone_nothing_is_a_separation():
    with pytest.raises(jax.errors.JaxRuntimeError), _processes.together():
        gone()


def test_other_errors_are_no_separation(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(KeyError), _processes.together():
        raise KeyError


def test_a_local_tree_is_the_same_on_one_device():
    tree = {"x": jnp.arange(3.0), "name": "text", "none": None}
    found = run.local(tree)
    assert found["x"].tolist() == [0, 1, 2] and found["x"].devices() == {jax.local_devices()[0]}
    assert (found["name"], found["none"]) == ("text", None)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_kept_until_it_is_asked_for(number):
    before = signal.getsignal(number)
    with _processes.StopSignals() as signals:
        assert signals.received() is None
        os.kill(os.getpid(), number)
        assert signals.received() == signals.received() == number
    assert signal.getsignal(number) == before


def test_a_stop_says_signal_and_step():
    stopped = run.Stopped(signal.SIGTERM, 7)
    assert str(stopped) == "stopped by SIGTERM after step 7; the same command continues"
    assert stopped.signal == 15


def test_a_handler_that_is_put_back_is_called_again():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        handler = _processes._on_signal(signal.SIGTERM, None)
        assert _processes._on_signal(signal.SIGTERM, handler) is None
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
