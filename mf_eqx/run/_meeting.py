"""The rendezvous of the processes of a run, before JAX connects them.

JAX ends a process by a signal, inside C++, if another process is missing, if two have the same number, if they expect
different numbers of processes, or if the port is taken. So the processes meet first, at the address that JAX will use:
each sends its number and waits; when all have connected, or something is wrong, the first process answers all of them.

    process 2  ->  process 0    mf_eqx 2 of 8
    process 0  ->  process 2    mf_eqx go: all are there
                                mf_eqx wrong: process must differ from all others, got 2 twice
                                mf_eqx missing: process 5 of 8 did not come to 10.0.0.1:1234 within 300 seconds
"""

import contextlib
import ipaddress
import itertools
import re
import socket
import time
from collections.abc import Container, Iterator
from typing import NamedTuple

WAIT, LONGEST_WAIT = 300, 86_400
"""Seconds to wait for the other processes: the default and the maximum."""
_GREETING = re.compile(r"mf_eqx (\d{1,9}) of (\d{1,9})\n")
_ANSWER = re.compile(r"mf_eqx (go|wrong|missing): (.+)\n")
_LONGEST_LINE = 1000
_SECONDS_TO_GREET, _SECONDS_TO_CONNECT, _SECONDS_TO_RETRY = 5.0, 10.0, 0.2
_MOST_NAMED = 8
"""How many missing processes a message names at most."""


class Missing(RuntimeError):
    """A process of a run that did not connect in time."""


class Place(NamedTuple):
    """The arguments of one process: the address, the number of processes, its own number, and the seconds to wait."""

    host: str
    port: int
    processes: int
    process: int
    wait: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def meet(place: Place) -> str | None:
    """Wait until all processes have connected.

    **Returns:** in the first process, the numeric address that it may listen at; None in all others.

    **Raises:** `ValueError` if the first process cannot listen at the address, and in all processes if two have the
    same number or expect different numbers of processes; `Missing` after `place.wait` seconds.
    """
    deadline = time.monotonic() + place.wait
    if place.process:
        _connect(place, deadline)
        return None
    with _listener(place) as listener:
        host, port = listener.getsockname()[:2]
        _receive(listener, place, deadline)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# The first process


def _listener(place: Place) -> socket.socket:
    """A socket that listens at the address, and at no other one."""
    host, last_error = place.host.strip("[]"), None
    try:
        addresses = socket.getaddrinfo(host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"coordinator must be HOST:PORT of a known host, got {place}: {error.strerror}") from error
    for family, kind, protocol, _, address in addresses:
        _check_reachable(host, str(address[0]), place)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier run does not block the port
            listener.bind(address)
            listener.listen()
        except OSError as error:
            listener.close()
            last_error = error
        else:
            return listener
    reason = last_error and last_error.strerror
    raise ValueError(f"coordinator must be a free port of the first process's machine, got {place}: {reason}")


def _check_reachable(host: str, address: str, place: Place) -> None:
    """Refuses a name that stands for the machine itself: processes elsewhere would connect to their own machine."""
    if host != "localhost" and ipaddress.ip_address(address).is_loopback and not _is_numeric(host):
        raise ValueError(
            f"coordinator must be reachable from all processes, got {place}, which is {address} here: give an address, "
            f"or localhost:{place.port} if all processes are on this machine"
        )


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _receive(listener: socket.socket, place: Place, deadline: float) -> None:
    """Wait for all other processes, and answer them."""
    answer = "go: all are there"
    with contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        try:
            for connection in _connections(listener, place, deadline):
                connections.append(stack.enter_context(connection))
        except (ValueError, Missing) as error:
            answer = f"{'wrong' if isinstance(error, ValueError) else 'missing'}: {error}"
            raise
        finally:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(f"mf_eqx {answer}\n".encode())


def _connections(listener: socket.socket, place: Place, deadline: float) -> Iterator[socket.socket]:
    """Connections of processes in the order in which they come, until all processes are waiting."""
    waiting: dict[int, socket.socket] = {}
    while len(waiting := {i: each for i, each in waiting.items() if _is_open(each)}) < place.processes - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise Missing(_missing_message(waiting, place)) from None
        greeting = _GREETING.fullmatch(_line(connection, min(deadline, time.monotonic() + _SECONDS_TO_GREET)))
        if greeting is None:  # not a process of a run
            connection.close()
            continue
        yield connection
        process, processes = map(int, greeting.groups())
        if processes != place.processes:
            rule = "processes must be the same in all processes"
            raise ValueError(f"{rule}, got {place.processes} in process 0 and {processes} in process {process}")
        if (process in waiting and _is_open(waiting[process])) or not 0 < process < processes:
            raise ValueError(f"process must differ from all others, got {process} twice")
        waiting[process] = connection


def _is_open(connection: socket.socket) -> bool:
    """Whether the process is still connected: one that was killed is not."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _missing_message(waiting: Container[int], place: Place) -> str:
    absent = (process for process in range(1, place.processes) if process not in waiting)
    named = [str(process) for process in itertools.islice(absent, _MOST_NAMED + 1)]
    names = ", ".join(named if len(named) <= _MOST_NAMED else [*named[:_MOST_NAMED], "..."])
    return f"process {names} of {place.processes} did not come to {place} within {place.wait} seconds"


# All other processes


def _connect(place: Place, deadline: float) -> None:
    """Send the number of this process, again and again until the first process answers."""
    problem = "no process listens there"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            answer = _answer_of_first(place, remaining, deadline)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            if answer is not None:
                return _raise_unless_go(*answer.groups())
            problem = "the process that listens there does not answer that all have connected"
        time.sleep(min(_SECONDS_TO_RETRY, max(deadline - time.monotonic(), 0)))
    raise Missing(f"process {place.process} of {place.processes} waited {place.wait} seconds at {place}, but {problem}")


def _answer_of_first(place: Place, remaining: float, deadline: float) -> re.Match[str] | None:
    """The first process's answer; None if it is not a valid answer."""
    address = (place.host.strip("[]"), place.port)
    with socket.create_connection(address, timeout=min(remaining, _SECONDS_TO_CONNECT)) as connection:
        connection.sendall(f"mf_eqx {place.process} of {place.processes}\n".encode())
        return _ANSWER.fullmatch(_line(connection, deadline))


def _raise_unless_go(verdict: str, reason: str) -> None:
    if verdict == "wrong":
        raise ValueError(reason)
    if verdict == "missing":
        raise Missing(reason)


# All processes


def _line(connection: socket.socket, deadline: float) -> str:
    """The text received up to the end of a line; less if it comes too late or is too long."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) < _LONGEST_LINE:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (more := connection.recv(_LONGEST_LINE - len(received))):
                break
            received += more
    return received.decode("ascii", "replace")
