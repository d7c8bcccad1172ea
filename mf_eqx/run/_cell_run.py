"""One cell of a run of many, in its thread: its training in parts, then its judgement."""

import dataclasses
import math
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import jax

from .._mean import Metrics
from .._train import scan_steps
from .._train_state import TrainState
from ..checkpoint import Checkpoints
from ._cell_training import folder_of, inputs_of, Training
from ._directory import missing_lines, RunDirectory
from ._lock import check_in_place
from ._processes import Stopped, StopSignals
from ._programs import drop_programs_if_many
from ._progress import Progress
from ._settings import CellSettings, difference
from ._stopwatch import Stopwatch
from ._train import NonFinite

_Result = TypeVar("_Result")

_PARTS = ("start", "compile", "save", "log", "judge")
_SAVING = threading.Lock()
"""A lock, since Orbax can save from one thread at a time only: of two, one would find its files already there."""


@dataclasses.dataclass
class CellRun:
    """One cell in its thread: its inputs and its progress."""

    config: CellSettings
    training: Training | None
    directory: RunDirectory
    signals: StopSignals
    progress: Progress
    made_by: dict[str, Any]
    start: int = 0
    done: int = 0
    saved: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self, judge: Callable[[TrainState | None], _Result]) -> Generator[tuple[int, Metrics], None, _Result]:
        """Yields the number of steps and the metrics of each part, and returns the result."""
        self.watch = Stopwatch(parts=_PARTS)
        try:
            raise_if_stopped(self.signals, 0)
            state = None if self.training is None else (yield from self._train(self.training))
            with self.watch.part("judge"):
                return judge(state)
        finally:
            self.seconds = self.watch.seconds()
            drop_programs_if_many()

    def _train(self, training: Training) -> Generator[tuple[int, Metrics], None, TrainState]:
        """Yields the number of steps and the metrics of each part, and returns the last state."""
        self.folder = folder_of(training, self.directory)
        self.checkpoints = Checkpoints(self.folder.root / "checkpoints", keep_last=self.config.keep_last)
        self.notes = {"training": inputs_of(self.config, training), "made_by": self.made_by}
        with self.watch.part("start"):
            state = self._begin(training)
        if self.start:
            yield self.start, {}
        while self.done < training.steps:
            before = self.done
            state, metrics = self._part(training, state)
            try:
                yield self.done - before, metrics
            except GeneratorExit:  # another cell ends the run
                self._save(state)
                raise
        self._check_faults(state)
        return state

    def _begin(self, training: Training) -> TrainState:
        """The state to continue from."""
        self.checkpoints.clean()
        restored = self.checkpoints.load(training.make_state, check=self._check_notes)
        if restored is not None:
            for number, reason in restored.passed_over.items():
                self.progress.note(f"{self.checkpoints.path(number)}: passed over, because {reason}")
            self.start = self.done = self.saved = restored.step
            changed = difference(restored.notes["made_by"], self.made_by)
            if changed and self.start < training.steps:
                self.progress.note(f"{self.folder.root}: the setup has changed since it was saved: {changed}")
        self.lines = self.folder.drop_records_after(self.start)
        written = self.lines if restored is None else restored.notes["lines"]
        if written != self.lines:
            self.progress.note(missing_lines(self.folder, self.lines, written, self.start))
        return training.make_state() if restored is None else restored.state

    def _check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another or of an unknown training."""
        if change := difference(notes.get("training", {}), self.notes["training"]):
            raise ValueError(f"{self.checkpoints.directory}: checkpoints must be of this training, but {change}")

    def _part(self, training: Training, state: TrainState) -> tuple[TrainState, Metrics]:
        """One part of the steps, and everything that is due after it."""
        # All parts but the last are equal: each different number of steps compiles another program.
        size = math.ceil(training.steps / math.ceil(training.steps / self.config.log_every))
        before, after = self.done, min((self.done // size + 1) * size, training.steps)
        with self.watch.compiling():
            state, metrics = scan_steps(training.step, state, training.draw, after - before)
            jax.block_until_ready(metrics)
        self.done = after
        with self.watch.part("log"):
            self.folder.log(self.done, metrics)
            self.lines += 1
        is_due = self.done // self.config.save_every > before // self.config.save_every
        if is_due or self.done == training.steps or self.signals.received() is not None:
            self._save(state)
        self._check_faults(state)
        raise_if_stopped(self.signals, self.done)
        return state, metrics

    def _save(self, state: TrainState) -> None:
        if self.saved < self.done:
            with self.watch.part("save"), _SAVING:
                check_in_place(self.folder.root)
                self.checkpoints.save(self.done, state, {**self.notes, "lines": self.lines})
                self.checkpoints.wait()
            self.saved = self.done

    def _check_faults(self, state: TrainState) -> None:
        if (bad := int(state.faults.in_row)) >= self.config.most_faults:
            self._save(state)
            raise NonFinite(
                f"{bad} steps in a row up to step {self.done} had no finite loss and gradient; "
                f"{self.checkpoints.path(self.done)} is finite"
            )


def raise_if_stopped(signals: StopSignals, step: int) -> None:
    """**Raises:** `Stopped` after a signal."""
    if (signal := signals.received()) is not None:
        raise Stopped(signal, step)
