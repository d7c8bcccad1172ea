"""Where the time of a run goes."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

PARTS = ("start", "compile", "data", "save", "preview", "log")

_COMPILING = "/jax/core/compile/"
"""How the names begin that JAX gives to what it does before a program runs: tracing, lowering, compiling."""
_HERE = threading.local()


@dataclasses.dataclass
class Stopwatch:
    """Seconds by what they were spent on; what is left of the wall time went into steps.

    **Arguments:** `clock` seconds since any fixed time; `began` when it was started, by default now; `parts` that there
    are.
    """

    clock: Callable[[], float] = time.perf_counter
    began: float | None = None
    parts: tuple[str, ...] = PARTS

    def __post_init__(self):
        self._began = self.clock() if self.began is None else self.began
        self._seconds: dict[str, float] = dict.fromkeys(self.parts, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside for this part."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[name] += self.clock() - began

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts for `compile` what JAX itself spends on it inside, in this thread: with many steps in one program, the
        first of them cannot be told from what came before."""
        _listen()
        _HERE.spans = spans = []
        try:
            yield
        finally:
            _HERE.spans = None
            self._seconds["compile"] += sum(end - begin for begin, end in spans)

    def seconds(self) -> dict[str, float]:
        """So far: of each part, of `steps`, and of `wall`, the sum of all."""
        wall = self.clock() - self._began
        return {**self._seconds, "steps": wall - sum(self._seconds.values()), "wall": wall}


def added(all_seconds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of what several watches say, part by part."""
    sums: dict[str, float] = {}
    for seconds in all_seconds:
        sums |= {name: sums.get(name, 0.0) + value for name, value in seconds.items()}
    return sums


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_hear)


def _hear(event: str, duration_secs: float, **_: object) -> None:
    """JAX says how long something took, right after it, in the thread that did it."""
    spans = getattr(_HERE, "spans", None)
    if spans is not None and event.startswith(_COMPILING):
        end = time.perf_counter()
        begin = end - duration_secs
        spans[:] = [span for span in spans if span[1] <= begin]  # what is traced inside another program is told before
        spans.append((begin, end))
