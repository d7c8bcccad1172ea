"""The progress line of a run.

Metrics are on the device, and fetching one waits for the step that computes it. So each step only stores its metrics
here, and they are fetched when a line is due; the rate is measured right after that, when the device has caught up. A
line shows means over the last steps: some metrics are means over one kind of rows, and a single batch has too few of
these. The first step is waited for, because it compiles: the rate is measured from its end.
"""

import collections
import dataclasses
import functools
import io
import operator
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import ArrayLike

from .._mean import Mean
from ._values import fetch, short


@runtime_checkable
class TextOutput(Protocol):
    """The methods that a text stream must have."""

    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...
    def isatty(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one step, for rates that can be compared.

    **Arguments:**

    - `rows`: examples of a step.
    - `flops`: floating-point operations of a step.
    - `peak`: the largest number of operations per second that the machine can do.
    """

    rows: int
    flops: float | None = None
    peak: float | None = None

    def rates(self, steps_per_second: float) -> list[str]:
        """Images per second and, where it is known, model FLOPs utilisation."""
        shown = [f"{short(self.rows * steps_per_second)} img/s"]
        if self.flops and self.peak:
            shown.append(f"{self.flops * steps_per_second / self.peak:.1%} MFU")
        return shown


class Progress:
    """A line with step, rate, elapsed time, time left and metrics: updated in place on a terminal, printed at
    intervals elsewhere.

        with Progress(steps) as progress:
            for step in range(1, steps + 1):
                state, metrics = train_step(state, batch)
                progress.update(step, metrics)

    Several threads may share one `Progress`.

    **Arguments:**

    - `total`: the number of the last step.
    - `start`: the number of steps that were finished before.
    - `shown`: names of the metrics to show, of those that `update` is given; by default all that are single numbers.
    - `every`: seconds between lines; by default 0.5 on a terminal, else 10.
    - `window`: over how many of the last updates each `Mean` is taken; other numbers are those of the last update.
    - `work`: of one step, to show rows per second and utilisation.
    - `doing`: the activity to show before the first step is reported.
    - `silent`: whether to write nothing.
    - `stream`: where to write, by default stderr, so that stdout holds results only.
    - `clock`: seconds since any fixed time.

    **Raises:** `ValueError` if `total` is negative, `every` is not positive, or `window` is below 1.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        shown: Sequence[str] | None = None,
        every: int | float | None = None,
        window: int = 1,
        work: Work | None = None,
        doing: str = "compiling the first step",
        silent: bool = False,
        stream: TextOutput | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if total < 0:
            raise ValueError(f"total must be >= 0, got {total}")
        if every is not None and not every > 0:
            raise ValueError(f"every must be > 0, got {every}")
        if window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        self._total, self._shown, self._clock = total, shown, clock
        self._start, self._work, self._doing = start, work, doing
        self._stream = io.StringIO() if silent else sys.stderr if stream is None else stream
        self._in_place = self._stream.isatty()
        self._every = every or (0.5 if self._in_place else 10.0)
        self._began = self._displayed = clock()
        self._first: tuple[int, float] | None = None
        self._pending: int | None = None
        self._recent: collections.deque[Mapping[str, Mean | ArrayLike]] = collections.deque(maxlen=window)
        self._lock = threading.RLock()

    def __enter__(self) -> "Progress":
        self._began = self._displayed = self._clock()
        if self._total > self._start:
            self._write(f"{self._start}/{self._total}  {self._doing}")
        return self

    def update(self, step: int, metrics: Mapping[str, Mean | ArrayLike]) -> None:
        """Report a finished step. Cheap: nothing is fetched unless a line is due.

        **Arguments:** `step` its number, from 1; `metrics` as for `RunDirectory.log`.
        """
        with self._lock:
            self._pending = step
            shown = metrics.keys() if self._shown is None else [name for name in self._shown if name in metrics]
            self._recent.append({name: metrics[name] for name in shown})
            if self._first is None:
                jax.block_until_ready(dict(metrics))
                self._first = (step, self._clock())
                self._display()
            elif self._clock() - self._displayed >= self._every:
                self._display()

    def note(self, text: str) -> None:
        """Print `text` on a line of its own, above the progress line."""
        with self._lock:
            self._stream.write(f"\r\x1b[K{text}\n" if self._in_place else f"{text}\n")
            self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The device may be the cause of an error: fetch nothing, and leave the line as it is.
        if error is None:
            self._display()
        if self._in_place:
            self._stream.write("\n")
            self._stream.flush()

    def _display(self) -> None:
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        recent = jax.device_get(list(self._recent))
        self._recent = collections.deque(recent, self._recent.maxlen)  # on the host now: each is fetched once
        values = fetch(_averaged(recent))
        self._displayed = self._clock()
        numbers = [f"{name} {short(value)}" for name, value in values.items() if not isinstance(value, list)]
        self._write("  ".join([self._position(step), *self._times(step), *numbers]))

    def _position(self, step: int) -> str:
        return f"{step:>{len(str(self._total))}}/{self._total}  {100 * step // max(self._total, 1):>3}%"

    def _times(self, step: int) -> list[str]:
        elapsed = f"{_duration(self._displayed - self._began)} elapsed"
        assert self._first is not None
        first, when = self._first
        if step <= first or self._displayed <= when:
            return [elapsed]
        rate = (step - first) / (self._displayed - when)
        rates = [] if self._work is None else self._work.rates(rate)
        return [f"{short(rate)} steps/s", *rates, elapsed, f"{_duration((self._total - step) / rate)} left"]

    def _write(self, line: str) -> None:
        if self._in_place:
            line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        else:
            line += "\n"
        self._stream.write(line)
        self._stream.flush()


def _averaged(recent: Sequence[Mapping[str, Mean | ArrayLike]]) -> dict[str, Mean | ArrayLike]:
    """The metrics of the last update, each `Mean` among them combined with those of the updates before."""

    def combined(name: str, last: Mean | ArrayLike) -> Mean | ArrayLike:
        means = [metrics[name] for metrics in recent if isinstance(metrics.get(name), Mean)]
        return functools.reduce(operator.add, means) if isinstance(last, Mean) else last

    return {name: combined(name, last) for name, last in recent[-1].items()}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
