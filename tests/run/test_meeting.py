"""How processes meet: here each is a thread."""

import contextlib
import dataclasses
import socket
import threading
import time

import pytest
from processes import free_address, LONGEST

from mf_eqx.run._meeting import _receive, meet, Missing, Place

SHORT = 1  # second that some wait in vain
LONG = 120  # seconds that nobody waits who comes to those who are there


@pytest.fixture
def address():
    """Host and port that nobody listens at."""
    host, port = free_address().split(":")
    return host, int(port)


@dataclasses.dataclass
class Process:
    """A process that meets others, in a thread: what it returns or raises."""

    place: Place
    result: object = None

    def __post_init__(self):
        self.thread = threading.Thread(target=self.meet)
        self.thread.start()

    def meet(self):
        try:
            self.result = meet(self.place)
        except Exception as error:
            self.result = error

    def ended(self):
        self.thread.join(LONGEST)
        assert not self.thread.is_alive()
        return self.result


def met(address, *places, wait=LONG):
    """What becomes of processes, each given by how many it expects and which it is."""
    processes = [Process(Place(*address, *place, wait)) for place in places]
    return [process.ended() for process in processes]


def said(result, kind):
    assert type(result) is kind, result
    return str(result)


def connect(address):
    """A connection to whoever listens there."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(address, timeout=LONGEST)


# All come


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_meet_and_the_first_one_learns_where_to_listen(count, address):
    found = met(address, *((count, process) for process in range(count)))
    assert found == ["{}:{}".format(*address)] + [None] * (count - 1)


@pytest.mark.parametrize("last", [0, 1])
def test_processes_wait_for_one_that_comes_late(last, address):
    early = Process(Place(*address, 2, 1 - last, LONG))
    early.thread.join(1.5)
    assert early.thread.is_alive()
    late = Process(Place(*address, 2, last, LONG))
    assert {early.ended(), late.ended()} == {"{}:{}".format(*address), None}


def test_a_port_is_free_again_after_a_meeting(address):
    for _ in range(3):
        assert met(address, (2, 0), (2, 1)) == ["{}:{}".format(*address), None]


def test_an_address_of_ipv6_is_one(address):
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        assert met(("[::1]", address[1]), (2, 0), (2, 1)) == [f"[::1]:{address[1]}", None]
        return
    pytest.skip("no IPv6")


def test_the_first_process_listens_at_its_address_alone(address):
    psutil = pytest.importorskip("psutil")
    first = Process(Place(*address, 2, 0, LONG))
    connect(address).close()
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert address in [tuple(each) for each in listening]
    assert all(each.ip == "127.0.0.1" for each in listening if each.port == address[1])
    assert met(address, (2, 1)) == [None]
    first.ended()


def test_strangers_are_in_no_way(address):
    first = Process(Place(*address, 2, 0, LONG))
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"mf_eqx one of two\n", b"\xff" * 2000, b"mf_eqx 1 of 2 2\n"):
        with connect(address) as stranger, contextlib.suppress(OSError):
            stranger.sendall(text)
            if not text.endswith(b"\n"):
                stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    assert met(address, (2, 1)) == [None]
    first.ended()


def test_one_that_was_ended_while_it_waited_may_come_again(address):
    first = Process(Place(*address, 3, 0, LONG))
    with connect(address) as ended:
        ended.sendall(b"mf_eqx 1 of 3\n")
    assert met(address, (3, 1), (3, 2)) == [None, None]
    first.ended()


# Not all come


def test_one_that_never_comes_is_named_to_all_others(address):
    place = Place(*address, 4, 0, 9)
    with socket.create_server(address) as listener, socket.create_connection(address) as other:
        other.sendall(b"mf_eqx 2 of 4\n")
        with pytest.raises(Missing) as error:
            _receive(listener, place, time.monotonic())  # whoever is there by now has come
        assert str(error.value) == f"process 1, 3 of 4 did not come to {place} within 9 seconds"
        assert other.recv(1000).decode() == f"mf_eqx missing: {error.value}\n"


@pytest.mark.parametrize(("verdict", "kind"), [("missing", Missing), ("wrong", ValueError)])
def test_a_process_ends_as_the_first_one_says(verdict, kind, address):
    with socket.create_server(address) as first:
        process = Process(Place(*address, 4, 2, LONG))
        guest, _ = first.accept()
        with guest:
            guest.sendall(f"mf_eqx {verdict}: the reason\n".encode())
            assert said(process.ended(), kind) == "the reason"


def test_of_many_that_never_come_a_few_are_named(address):
    (found,) = met(address, (10**8, 0), wait=SHORT)
    assert said(found, Missing).startswith(f"process 1, 2, 3, 4, 5, 6, 7, 8, ... of {10**8} did not come to ")


def test_when_the_first_never_comes_the_others_say_so(address):
    (found,) = met(address, (2, 1), wait=SHORT)
    assert said(found, Missing).startswith("process 1 of 2 waited 1 seconds at {}:{}, but ".format(*address))


def test_one_that_comes_after_the_others_have_begun_ends_by_itself(address):
    with socket.create_server(address) as other:  # as JAX's, whatever it says
        other.listen()
        (found,) = met(address, (2, 1), wait=SHORT)
    assert said(found, Missing).startswith("process 1 of 2 waited 1 seconds at {}:{}, but ".format(*address))


# They do not fit each other


def test_one_that_comes_twice_ends_all(address):
    found = met(address, (3, 0), (3, 1), (3, 1))
    assert [said(each, ValueError) for each in found] == ["process must differ from all others, got 1 twice"] * 3


def test_a_second_first_process_is_refused_and_the_others_meet(address):
    first = Process(Place(*address, 2, 0, LONG))
    connect(address).close()
    (second,) = met(address, (2, 0))
    assert said(second, ValueError).endswith("got {}:{}: Address already in use".format(*address))
    assert met(address, (2, 1)) == [None]
    first.ended()


@pytest.mark.parametrize(("expected", "place"), [(2, (3, 1)), (2, (3, 2)), (3, (2, 1))])
def test_another_number_of_processes_ends_all(expected, place, address):
    rule = "processes must be the same in all processes"
    message = "{}, got {} in process 0 and {} in process {}".format(rule, expected, *place)
    assert [said(each, ValueError) for each in met(address, (expected, 0), place)] == [message] * 2


# Addresses


def refused(host, port=1):
    (found,) = met((host, port), (2, 0))
    return said(found, ValueError)


def test_a_port_in_use_is_refused_at_once(address):
    with socket.create_server(address):
        message = "coordinator must be a free port of the first process's machine, got {}:{}: Address already in use"
        assert refused(*address) == message.format(*address)


def test_a_port_that_is_in_use_at_all_addresses_is_refused_at_once(address):
    with socket.create_server(("0.0.0.0", address[1])):
        assert "Address already in use" in refused(*address)


def test_an_address_of_another_machine_is_refused(address):
    assert f"got 192.0.2.1:{address[1]}: Cannot assign requested address" in refused("192.0.2.1", address[1])


def test_an_unknown_host_is_refused():
    assert "coordinator must be HOST:PORT of a known host, got nowhere.invalid:1: " in refused("nowhere.invalid")


def test_a_name_by_which_a_machine_means_itself_is_refused(address, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", address[1]))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    message = f"must be reachable from all processes, got me:{address[1]}, which is 127.0.1.1 here: give an address, "
    assert message + f"or localhost:{address[1]} if all" in refused("me", address[1])


def test_localhost_is_this_machine(address):
    assert met(("localhost", address[1]), (2, 0), (2, 1))[1] is None
