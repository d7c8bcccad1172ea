"""Several processes of one run: how they find each other, and how they agree."""

import argparse
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils

from .._leaves import on_host
from . import _witness
from ._meeting import LONGEST_WAIT, meet, Place, WAIT

_Tree = TypeVar("_Tree")

_HEARTBEAT_SECONDS = 20
_PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables in which SLURM and Open MPI say how many processes they started."""
_SYNC_POINTS = itertools.count()
"""JAX requires increasing numbers, also from one training of a process to the next."""


def connect(arguments: list[str], environment: Mapping[str, str] = os.environ) -> None:
    """Connect to the other processes, if there are any: as the flags --coordinator, --processes and --process say, or
    SLURM, Open MPI or a TPU pod. This must happen before anything is computed, so these flags are read before all
    others.

    **Raises:** `ValueError` if some of the flags are given and others are not, if the first process cannot listen at
    the coordinator's address, or if two processes have the same number or expect different numbers of processes;
    `Missing` if a process does not connect within --wait seconds.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--coordinator", "--processes", "--process", "--wait"):
        parser.add_argument(flag, nargs="?")
    given = vars(parser.parse_known_args(arguments)[0])
    wait = _seconds(given.pop("wait"))
    if any(value is not None for value in given.values()):
        _connect_by_flags(**given, wait=wait)
    elif _is_launched(environment):
        _join(wait=wait)


def _seconds(given: str | None) -> int:
    if given is None:
        return WAIT
    if not (given.isdecimal() and 1 <= int(given) <= LONGEST_WAIT):
        raise ValueError(f"wait must lie in [1, {LONGEST_WAIT}], got {given}")
    return int(given)


def _connect_by_flags(coordinator: str | None, processes: str | None, process: str | None, wait: int) -> None:
    if coordinator is None or processes is None or process is None:
        raise ValueError("coordinator, processes and process must be given together, or none of them")
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes) < 10**9):
        raise ValueError(f"process must lie in [0, processes - 1], got process {process} of processes {processes}")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    address = meet(Place(host, int(port), int(processes), int(process), wait))
    _join(coordinator, int(processes), int(process), coordinator_bind_address=address, wait=wait)


def _join(*flags: str | int, wait: int, **options: Any) -> None:
    _witness.start()  # before JAX registers its exit handlers, so that the witness is dismissed after them
    _on_signal(signal.SIGABRT, ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p).value)  # the exit code is 6
    jax.distributed.initialize(
        *flags,  # pyright: ignore[reportArgumentType]
        initialization_timeout=wait,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        **options,
    )


def _is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started several processes of this program."""
    counts = [environment.get(name, "1") for name in _PROCESS_COUNTS]
    is_pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return is_pod or any(count.isdecimal() and int(count) > 1 for count in counts)


def is_one_of_several() -> bool:
    """Whether this process is connected to others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def exit_at_once(code: int) -> None:
    """End this process at once. An ordinary exit would wait for the other processes, which wait for this one; after
    this exit they notice that it has ended, and raise `Separated`."""
    sys.stdout.flush()
    sys.stderr.flush()
    _witness.dismiss()
    os._exit(code)


def agree(name: str, value: Any) -> None:
    """Refuses a run whose processes were given different values.

    **Raises:** `ValueError`, in all of them.
    """
    if jax.process_count() > 1:
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        all_digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
        if different := [i for i, other in enumerate(all_digests) if not np.array_equal(other, all_digests[0])]:
            raise ValueError(f"{name} must be the same in all processes, but process {different[0]} differs from 0")


def is_first() -> bool:
    """Whether this is the process that writes the files of the run: logs, pictures, results."""
    return jax.process_index() == 0


def tell(text: str) -> None:
    """Print a line on stdout, in the first process only."""
    if is_first():
        print(text, flush=True)


def anywhere(here: bool) -> bool:
    """Whether `here` is true in any process. All processes must call this together."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(here)).any())


def once(action: Callable[[], None]) -> None:
    """Call `action` in the first process only; all others wait for it.

    **Raises:** what the action raises, in the first process; `RefusedElsewhere` in all others.
    """
    error: BaseException | None = None
    if is_first():
        try:
            action()
        except Exception as raised:
            error = raised
    if anywhere(error is not None):
        raise error or RefusedElsewhere("the first process could not go on; its own message says why")


def local(tree: _Tree) -> _Tree:
    """The tree with all arrays whole on this process's first device, wherever they were before. All processes must call
    it together: after training, to sample and to evaluate.
    """

    def fetch(leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        return jax.device_put(on_host(leaf), jax.local_devices()[0])

    return jax.tree.map(fetch, tree)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host's memory or a device's was too small."""
    if isinstance(error, jax.errors.JaxRuntimeError):  # in a program that runs already, XLA:CPU says INTERNAL
        return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
    return isinstance(error, MemoryError)


class RefusedElsewhere(RuntimeError):
    """An error of the first process, whose own message says why."""


class Separated(RuntimeError):
    """A run of several processes of which one cannot be reached any more."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context around what all processes do together. JAX's error when one of them has ended becomes `Separated`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise Separated(
            f"process {jax.process_index()} of {jax.process_count()} could not go on, probably because another one has "
            f"ended; the same command for all continues after the last checkpoint ({reason})"
        ) from error


class Stopped(Exception):
    """A run that a signal has stopped and that has saved its state.

    **Arguments:** `signal` the number of the signal; `step` the last finished step.
    """

    def __init__(self, signal: int, step: int):
        self.signal, self.step = signal, step

    def __str__(self) -> str:
        return f"stopped by {_name(self.signal)} after step {self.step}; the same command continues"


class StopSignals:
    """A context around a training loop in which SIGTERM and SIGINT are recorded until the current step is done. A
    second signal ends the process at once.

    With several processes, JAX forwards a SIGTERM from any of them to all, so that all stop after the same step; SIGINT
    is converted to SIGTERM. In this case JAX handles SIGTERM, and a second one has no effect. After training, SIGTERM
    ends the process.
    """

    _jax_handler: ClassVar[int | None] = None
    """JAX's handler of SIGTERM, stored while it is not installed; None if there is none."""

    def __init__(self):
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # With several processes, JAX itself handles SIGTERM.
        numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        for number in numbers:
            self._before[number] = signal.signal(number, self._receive)
        if jax.process_count() > 1 and StopSignals._jax_handler is not None:
            _on_signal(signal.SIGTERM, StopSignals._jax_handler)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() > 1:
            StopSignals._jax_handler = _on_signal(signal.SIGTERM, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:  # not by print, which may be what was interrupted
            os.write(1, f"{_name(number)}: this step is finished and saved; a second signal ends at once\n".encode())

    def received(self) -> int | None:
        """The signal that stops the run after this step, or None. All processes must call this together."""
        if jax.process_count() == 1:
            return self._received
        is_reached = multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))
        return (self._received or signal.SIGTERM) if is_reached else None


def _on_signal(number: int, handler: int | None) -> int | None:
    """Make a C function the handler of a signal (None: the signal ends the process), and return the previous handler.
    Python's own `signal` does not know handlers that were not set from Python."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return library.signal(number, handler)


def _name(number: int) -> str:
    return signal.Signals(number).name
