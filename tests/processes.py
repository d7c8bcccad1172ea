"""The trainer of the tests as a process, or as several."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parent
LONGEST = 180  # seconds that anything may take here
PROGRAMS = tempfile.TemporaryDirectory()  # that one process has compiled, for the next
COMPILED_ONCE = {"JAX_COMPILATION_CACHE_DIR": PROGRAMS.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


class Killed(BaseException):
    """In place of the end of a process: what no script can catch by mistake."""


class Ended(NamedTuple):
    """A process that has ended: its exit code, what it wrote, and the lines of it that are no progress."""

    code: int
    out: str
    err: str

    @property
    def told(self):
        lines = self.err.splitlines()
        return [line for line in lines if not line.lstrip()[:1].isdigit() and not line.startswith("\r")]

    @property
    def digest(self):
        assert self.code == 0, self.err[-3000:]
        (line,) = (line for line in self.out.splitlines() if line.startswith("digest "))
        return line


def start(root, *flags, devices=1, pause=0.0, **options):
    """A trainer whose runs are below `root`, after each preview pausing for so many seconds."""
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla, "PYTHONPATH": path}
    environment |= {"RUNS": str(root), "PAUSE": str(pause)}
    if "preexec_fn" not in options and "--coordinator" not in flags:  # a process of its own, with room on the disk
        environment |= COMPILED_ONCE
    command = [sys.executable, str(TESTS / "trainer.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def ended(process, timeout=LONGEST):
    """What becomes of a process."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def trained(root, *flags, **options):
    """A trainer from its start to its end."""
    return ended(start(root, *flags, **options))


def free_address():
    """HOST:PORT on this machine that nobody listens at."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_together(root, count, *flags, each=None, **options):
    """Processes of one run, each with flags of its own besides."""
    several = ("--coordinator", free_address(), "--processes", count)
    own = [()] * count if each is None else each
    return [start(root, *flags, *own[i], *several, "--process", i, **options) for i in range(count)]


def only_run(root):
    """The directory of the only run below `root`."""
    (path,) = (pathlib.Path(root) / "trainer").iterdir()
    return path


def wait_for(root, file, *processes):
    """Return when a run has written a file, and all processes are still there."""
    limit = time.monotonic() + LONGEST
    while not list(pathlib.Path(root).glob(f"trainer/*/{file}")):
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < limit, f"no {file}"
        time.sleep(0.01)


def signalled_at(step, root, *flags, by=signal.SIGTERM, pause=0.5, **options):
    """A trainer that gets a signal in the pause after a preview."""
    process = start(root, *flags, pause=pause, **options)
    wait_for(root, f"previews/{step:08}.png", process)
    process.send_signal(by)
    return ended(process)


def signalled_until_it_ends(process, by=signal.SIGTERM):
    """What becomes of a process that has heard a signal and gets others: two that arrive together would be one."""
    limit = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < limit:
        process.send_signal(by)
        time.sleep(0.3)
    return ended(process)


def metrics(root):
    return (only_run(root) / "metrics.jsonl").read_bytes()


def losses(root):
    return [json.loads(line)["loss"] for line in metrics(root).splitlines()]


def tree(root):
    """All files below a directory, with what they hold; but for locks, which name the last one that came."""
    root = pathlib.Path(root)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
