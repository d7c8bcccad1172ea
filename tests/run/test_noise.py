"""What is left out of stderr, and that nothing else is."""

import asyncio
import inspect
import logging
import sys
import types

import pytest

from mf_eqx.run import _noise


def ignored(function, *arguments):
    """An error as it reaches `sys.unraisablehook` from C++: its traceback begins in the function that is called."""
    try:
        function(*arguments)
    except Exception as error:
        assert error.__traceback__ is not None
        return types.SimpleNamespace(exc_value=error, exc_traceback=error.__traceback__.tb_next)


def closed(library=asyncio):
    loop = library.new_event_loop()
    loop.close()
    return loop


def fail(error):
    raise error


def from_python():
    closed().call_soon_threadsafe(print)


@pytest.fixture
def shown(monkeypatch):
    """What reaches the hook that was there before."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    absl = logging.getLogger("absl")
    before = list(absl.filters)
    _noise.suppress_noise.__wrapped__()
    yield found
    absl.filters[:] = before


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_a_late_call_of_an_event_loop_is_left_out(library, shown):
    sys.unraisablehook(ignored(closed(pytest.importorskip(library)).call_soon_threadsafe, print))
    assert shown == []


@pytest.mark.parametrize(
    "arguments",
    [(fail, RuntimeError("Event loop is closed")), (fail, ValueError("other")), (from_python,)],
    ids=["raised elsewhere", "another error", "called by Python"],
)
def test_all_other_errors_are_shown_as_ever(arguments, shown):
    error = ignored(*arguments)
    sys.unraisablehook(error)
    assert shown == [error]


def test_orbax_does_not_log_the_errors_of_its_threads(shown, caplog):
    absl = logging.getLogger("absl")
    try:
        fail(OSError("no space"))
    except OSError:
        absl.exception("[process=%d] _SignalingThread.run() raised an exception: %s", 0, "no space")
        absl.exception("something else")
    absl.error("_SignalingThread.run() raised nothing")
    assert [record.getMessage() for record in caplog.records] == [
        "something else",
        "_SignalingThread.run() raised nothing",
    ]


def test_orbax_still_says_it_in_these_words():
    future = pytest.importorskip("orbax.checkpoint._src.futures.future")
    assert "_SignalingThread.run()" in inspect.getsource(future) and "raised an exception" in inspect.getsource(future)
