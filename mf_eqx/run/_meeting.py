"""Where the processes of a run meet, before JAX connects them.

JAX ends a process by a signal, in the midst of C++, where another one is missing, comes twice or counts otherwise, or
where the port is taken. So they meet first, at the address where JAX will be: each says which one it is, and waits;
when all are there, or something is wrong, the first process answers them all.

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
"""Seconds for the others: by default, and at most."""
_GREETING = re.compile(r"mf_eqx (\d{1,9}) of (\d{1,9})\n")
_ANSWER = re.compile(r"mf_eqx (go|wrong|missing): (.+)\n")
_LONGEST = 1000
_SECONDS_TO_SPEAK, _SECONDS_TO_CONNECT, _SECONDS_TO_RETRY = 5.0, 10.0, 0.2
_NAMED = 8
"""How many of those who are missing are named."""


class Missing(RuntimeError):
    """A process of a run that did not come in time."""


class Place(NamedTuple):
    """What a process was given: the address to meet at, how many it expects, which it is, how many seconds it waits."""

    host: str
    port: int
    processes: int
    process: int
    wait: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def meet(place: Place) -> str | None:
    """Return when all processes are there.

    **Returns:** in the first process, the address in numbers that it may listen at; None in all others.

    **Raises:** `ValueError` if the first process cannot listen at the address, and in all processes if one comes twice
    or expects another number of them; `Missing` after `place.wait` seconds.
    """
    until = time.monotonic() + place.wait
    if place.process:
        _come(place, until)
        return None
    with _listener(place) as listener:
        host, port = listener.getsockname()[:2]
        _receive(listener, place, until)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# The first process


def _listener(place: Place) -> socket.socket:
    """A socket that listens at the address, and at no other one."""
    host, refused = place.host.strip("[]"), None
    try:
        found = socket.getaddrinfo(host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"coordinator must be HOST:PORT of a known host, got {place}: {error.strerror}") from error
    for family, kind, protocol, _, address in found:
        _check_reachable(host, str(address[0]), place)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended run are in no way
            listener.bind(address)
            listener.listen()
        except OSError as error:
            listener.close()
            refused = error
        else:
            return listener
    reason = refused and refused.strerror
    raise ValueError(f"coordinator must be a free port of the first process's machine, got {place}: {reason}")


def _check_reachable(host: str, address: str, place: Place) -> None:
    """Refuses a name by which a machine means itself: processes elsewhere would come to their own machine."""
    if host != "localhost" and ipaddress.ip_address(address).is_loopback and not _is_number(host):
        raise ValueError(
            f"coordinator must be reached from all processes, got {place}, which is {address} here: give an address, "
            f"or localhost:{place.port} if all processes are on this machine"
        )


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _receive(listener: socket.socket, place: Place, until: float) -> None:
    """Wait for all others, and answer them."""
    answer = "go: all are there"
    with contextlib.ExitStack() as open_:
        guests: list[socket.socket] = []
        try:
            for guest in _guests(listener, place, until):
                guests.append(open_.enter_context(guest))
        except (ValueError, Missing) as error:
            answer = f"{'wrong' if isinstance(error, ValueError) else 'missing'}: {error}"
            raise
        finally:
            for guest in guests:
                with contextlib.suppress(OSError):
                    guest.sendall(f"mf_eqx {answer}\n".encode())


def _guests(listener: socket.socket, place: Place, until: float) -> Iterator[socket.socket]:
    """Connections of processes as they come, until all wait that must."""
    waiting: dict[int, socket.socket] = {}
    while len(waiting := {i: guest for i, guest in waiting.items() if _waits(guest)}) < place.processes - 1:
        listener.settimeout(max(until - time.monotonic(), 0.001))
        try:
            guest, _ = listener.accept()
        except TimeoutError:
            raise Missing(_who_is_missing(waiting, place)) from None
        said = _GREETING.fullmatch(_line(guest, min(until, time.monotonic() + _SECONDS_TO_SPEAK)))
        if said is None:  # no process of a run
            guest.close()
            continue
        yield guest
        process, processes = map(int, said.groups())
        if processes != place.processes:
            raise ValueError(f"processes must be the same in all, got {place.processes}, and {processes} in {process}")
        if (process in waiting and _waits(waiting[process])) or not 0 < process < processes:
            raise ValueError(f"process must differ from all others, got {process} twice")
        waiting[process] = guest


def _waits(guest: socket.socket) -> bool:
    """Whether it has not gone: killed, say."""
    guest.setblocking(False)
    try:
        return guest.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _who_is_missing(waiting: Container[int], place: Place) -> str:
    absent = (process for process in range(1, place.processes) if process not in waiting)
    named = [str(process) for process in itertools.islice(absent, _NAMED + 1)]
    names = ", ".join(named if len(named) <= _NAMED else [*named[:_NAMED], "..."])
    return f"process {names} of {place.processes} did not come to {place} within {place.wait} seconds"


# All others


def _come(place: Place, until: float) -> None:
    """Say which process this is, again and again until the first one answers."""
    found = "nobody is there"
    while (left := until - time.monotonic()) > 0:
        try:
            answer = _asked(place, left, until)
        except OSError as error:
            found = error.strerror or str(error)
        else:
            if answer is not None:
                return _obey(*answer.groups())
            found = "who listens there does not say that all have come"
        time.sleep(min(_SECONDS_TO_RETRY, max(until - time.monotonic(), 0)))
    raise Missing(f"process {place.process} of {place.processes} waited {place.wait} seconds at {place}, but {found}")


def _asked(place: Place, left: float, until: float) -> re.Match[str] | None:
    """The first process's answer, if it is one."""
    address = (place.host.strip("[]"), place.port)
    with socket.create_connection(address, timeout=min(left, _SECONDS_TO_CONNECT)) as connection:
        connection.sendall(f"mf_eqx {place.process} of {place.processes}\n".encode())
        return _ANSWER.fullmatch(_line(connection, until))


def _obey(verdict: str, reason: str) -> None:
    if verdict == "wrong":
        raise ValueError(reason)
    if verdict == "missing":
        raise Missing(reason)


# Both


def _line(connection: socket.socket, until: float) -> str:
    """What the other side says up to the end of a line; less if it is late, or if that is too long."""
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < _LONGEST:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            if not (more := connection.recv(_LONGEST - len(said))):
                break
            said += more
    return said.decode("ascii", "replace")
