"""How the time of a run is spent."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

PARTS = ("start", "compile", "data", "save", "preview", "log")

_COMPILING = "/jax/core/compile/"
"""The prefix of JAX's names of all events before a program runs: tracing, lowering, compiling."""
_OF_THREAD = threading.local()


@dataclasses.dataclass
class Stopwatch:
    """Seconds that were spent on each part of a run; the rest of the wall time was spent on steps.

    **Arguments:** `clock` seconds since any fixed time; `began` when it was started, by default now; `parts` the names
    of the parts.
    """

    clock: Callable[[], float] = time.perf_counter
    began: float | None = None
    parts: tuple[str, ...] = PARTS

    def __post_init__(self):
        self._began = self.clock() if self.began is None else self.began
        self._seconds: dict[str, float] = dict.fromkeys(self.parts, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time is added to this part."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[name] += self.clock() - began

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A context that adds to `compile` the time for compiling that JAX reports in this thread. If one program does
        many steps, the first one cannot be timed separately from the compilation."""
        _register_listener()
        _OF_THREAD.spans = spans = []
        try:
            yield
        finally:
            _OF_THREAD.spans = None
            self._seconds["compile"] += sum(end - begin for begin, end in spans)

    def seconds(self) -> dict[str, float]:
        """The seconds so far of each part, of `steps`, and of `wall`, the sum of all."""
        wall = self.clock() - self._began
        return {**self._seconds, "steps": wall - sum(self._seconds.values()), "wall": wall}


def added(all_seconds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The seconds of several stopwatches, added part by part."""
    sums: dict[str, float] = {}
    for seconds in all_seconds:
        sums |= {name: sums.get(name, 0.0) + value for name, value in seconds.items()}
    return sums


@functools.cache
def _register_listener() -> None:
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **_: object) -> None:
    """JAX calls this with an event's duration, right after the event and in its thread."""
    spans = getattr(_OF_THREAD, "spans", None)
    if spans is not None and event.startswith(_COMPILING):
        end = time.perf_counter()
        begin = end - duration_secs
        spans[:] = [span for span in spans if span[1] <= begin]  # an inner program's tracing is reported first
        spans.append((begin, end))
