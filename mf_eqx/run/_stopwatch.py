"""Where the time of a run goes."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

PARTS = ("start", "compile", "data", "save", "preview", "log")


@dataclasses.dataclass
class Stopwatch:
    """Seconds by what they were spent on; what is left of the wall time went into steps.

    **Arguments:** `clock` seconds since any fixed time.
    """

    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        self._began = self.clock()
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside for this part."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[name] += self.clock() - began

    def seconds(self) -> dict[str, float]:
        """So far: of each part, of `steps`, and of `wall`, the sum of all."""
        wall = self.clock() - self._began
        return {**self._seconds, "steps": wall - sum(self._seconds.values()), "wall": wall}
