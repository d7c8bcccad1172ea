"""Many small trainings of one run, side by side: the cells of a table.

    trainings = {cell: run.Training(name, step, make_field, draw, steps, key) for cell in ...}
    with run.opened(config) as directory:
        run.announce(config, trainings, directory)                                 a dry run ends here
        results = run.train_cells(config, trainings, judge, directory)

directory/cells/NAME/metrics.jsonl   a line per part of a training
                     checkpoints/
          summary.json               how the time was spent, summed over all cells

Each training runs in parts, and each part is one call of `mf_eqx.scan_steps`. A training can be stopped after each
part; the same command continues from there, with results that are bit-identical to those of an uninterrupted run. A
finished training is not repeated, only judged. Each checkpoint records the training that it belongs to, and any other
training refuses it.
"""

import contextlib
import dataclasses
import gc
import json
import math
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._batch import Batch
from .._field import AbstractField
from .._mean import Metrics
from .._train import scan_steps, TrainStep
from .._train_state import init_state, TrainState
from ..checkpoint import Checkpoints
from ._directory import as_json, made_by, missing_lines, RunDirectory
from ._lock import check_in_place
from ._parallel import in_parallel
from ._plan import devices, memory, parameters
from ._processes import Stopped, StopSignals, tell
from ._progress import Progress
from ._settings import CellSettings, difference, recipe
from ._stopwatch import added, Stopwatch
from ._table import table
from ._train import NonFinite

_Cell = TypeVar("_Cell")
_Result = TypeVar("_Result")

_PARTS = ("start", "compile", "save", "log", "judge")
_SAVING = threading.Lock()
"""A lock, since Orbax can save from one thread at a time only: of two, one would find its files already there."""


class Training(NamedTuple):
    """A small training.

    **Arguments:** `name` any text, from which the name of the directory is made; `step` without parallelism;
    `make_field` makes the network; `draw` a function from a key to a `Batch`, as for `mf_eqx.scan_steps`, a Module
    rather than a lambda; `steps` the number of all steps; `key` of all random numbers; `settings` everything else that
    the training depends on, texts and numbers or a dataclass of them, by default the script's own fields: a checkpoint
    with other settings is refused.
    """

    name: str
    step: TrainStep
    make_field: Callable[[], AbstractField]
    draw: Callable[[Key[Array, ""]], Batch]
    steps: int
    key: Key[Array, ""]
    settings: Any = None

    def make_state(self) -> TrainState:
        """The state before the first step."""
        step = self.step
        return init_state(self.make_field(), step.optimizer, step.averages, step.objective, key=self.key)


def announce(config: CellSettings, trainings: Mapping[_Cell, Training | None], directory: RunDirectory) -> None:
    """Print which trainings are finished or begun, if any are. A dry run prints what would be trained, and ends.

    **Arguments:** as for `train_cells`.

    **Raises:** `SystemExit` after `config.dry_run` has printed its plan.
    """
    config, trainings = _checked(config, trainings)
    requested = _to_train(trainings.values())
    done = [_steps_done(training, _folder(training, directory)) for training in requested]
    if config.dry_run:
        tell(_describe(config, requested, done))
        raise SystemExit(0)
    if any(done):
        finished = sum(number == training.steps for number, training in zip(done, requested, strict=True))
        begun = sum(number > 0 for number in done) - finished
        tell(f"{directory.root}: continues; of {len(requested)} trainings, {finished} are finished and {begun} begun")


def train_cells(
    config: CellSettings,
    trainings: Mapping[_Cell, Training | None],
    judge: Callable[[_Cell, TrainState | None], _Result],
    directory: RunDirectory,
    *,
    note: Callable[[_Cell, _Result], str] | None = None,
    shown: Sequence[str] = ("boundary_error", "identity_error"),
) -> dict[_Cell, _Result]:
    """The result of each cell, computed in `config.workers` threads.

    A training continues from its newest valid checkpoint. After a signal, or an error in one cell, the other cells
    stop at the end of their current part, and save it.

    **Arguments:**

    - `config`: the settings of the run.
    - `trainings`: the training of each cell, by any key that identifies the cell; None for a cell that is only judged.
      They start in this order. If trainings compile the same program, put others between them: two threads that start
      them together would both compile it. But put at most about thirty between them, since compiled programs are
      dropped when there are many.
    - `judge`: a function from a cell and its last state (None without a training) to its result. It is called in the
      threads, for every cell, each time the command runs.
    - `directory`: from `opened`.
    - `note`: a function from a cell and its result to a line that is printed. It is called in the main thread, as cells
      are finished.
    - `shown`: metrics of the progress line.

    **Raises:** `Stopped` after SIGTERM or SIGINT; `NonFinite` after `config.most_faults` steps in a row without a
    finite loss and gradient; `CheckpointError`; `Moved` if the directory was moved; `ValueError` if a setting is
    invalid, if two trainings have the same name or one has only dots, or if a checkpoint belongs to another training;
    any error of `judge`.
    """
    config, trainings = _checked(config, trainings)
    steps = sum(training.steps for training in _to_train(trainings.values()))
    with StopSignals() as signals, Progress(steps, shown=shown) as progress:
        machine = made_by()
        runs = {
            cell: _CellRun(config, training, directory, signals, progress, machine)
            for cell, training in trainings.items()
        }
        before = Stopwatch(began=directory.opened).seconds()["wall"]
        results: dict[_Cell, _Result] = {}
        parts = in_parallel(
            lambda cell: runs[cell].run(lambda state: judge(cell, state)),
            list(trainings),
            workers=config.workers,
            progress=progress,
        )
        try:
            with contextlib.closing(parts):  # an error in `note` must end the threads, too
                for cell, result in parts:
                    results[cell] = result
                    if note is not None:
                        progress.note(note(cell, result))
            _raise_if_stopped(signals, 0)
        except Stopped as stopped:
            raise Stopped(stopped.signal, sum(cell_run.done for cell_run in runs.values())) from None
        finally:
            with contextlib.suppress(OSError):  # a full disk was reported by the write that failed before
                _summarise(directory, runs.values(), before)
    return {cell: results[cell] for cell in trainings}


def _checked(
    config: CellSettings, trainings: Mapping[_Cell, Training | None]
) -> tuple[CellSettings, dict[_Cell, Training | None]]:
    """The validated configuration and trainings; in a test run, these do two steps at most."""
    config.check()
    names = [_name(training) for training in _to_train(trainings.values())]
    if len(set(names)) < len(names):
        raise ValueError(f"names of trainings must differ, got {max(names, key=names.count)} twice")
    if not config.test_run:
        return config, dict(trainings)
    shortened = {
        cell: training and training._replace(steps=min(training.steps, 2)) for cell, training in trainings.items()
    }
    return dataclasses.replace(config, save_every=1, log_every=1), shortened


def _to_train(trainings: Iterable[Training | None]) -> list[Training]:
    """The trainings, without the cells that are only judged."""
    return [training for training in trainings if training is not None]


def _name(training: Training) -> str:
    """The name of the training's directory."""
    name = re.sub(r"[^\w.+-]+", "_", training.name)
    if not name.strip("."):
        raise ValueError(f"names of trainings must have more than dots, got {training.name!r}")
    return name


def _folder(training: Training, directory: RunDirectory) -> RunDirectory:
    return RunDirectory(directory.root / "cells" / _name(training))


def _identity(config: CellSettings, training: Training) -> dict[str, Any]:
    """Everything that a training depends on, as values that JSON can hold."""
    settings = recipe(config) if training.settings is None else as_json(training.settings)
    key = [str(jr.key_impl(training.key)), np.asarray(jr.key_data(training.key)).tolist()]
    return {"name": training.name, "settings": settings, "steps": training.steps, "key": key}


def _steps_done(training: Training, folder: RunDirectory) -> int:
    """The number of steps that need not be repeated, if their checkpoint is valid."""
    return min(max(Checkpoints(folder.root / "checkpoints").steps(), default=0), training.steps)


def _describe(config: CellSettings, trainings: Sequence[Training], done: Sequence[int]) -> str:
    """A text with the configuration, the trainings, and the memory of the largest one, whose step is compiled."""
    states = [eqx.filter_eval_shape(training.make_state) for training in trainings]
    rows = [
        (_name(training), type(state.field).__name__, parameters(state), training.steps, steps)
        for training, state, steps in zip(trainings, states, done, strict=True)
    ]
    lines = [json.dumps(as_json(config), indent=2), "", devices()]
    if trainings:
        training, state = max(zip(trainings, states, strict=True), key=lambda pair: parameters(pair[1]))
        batch = eqx.filter_eval_shape(training.draw, jax.eval_shape(lambda: jr.key(0)))
        lines += ["", table(rows, ("cell", "network", "parameters", "steps", "done")), ""]
        lines += [f"{config.workers} at a time; {_name(training)}: {memory(training.step, state, batch)}"]
    return "\n".join(lines)


def _raise_if_stopped(signals: StopSignals, step: int) -> None:
    if (signal := signals.received()) is not None:
        raise Stopped(signal, step)


@dataclasses.dataclass
class _CellRun:
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
            _raise_if_stopped(self.signals, 0)
            state = None if self.training is None else (yield from self._train(self.training))
            with self.watch.part("judge"):
                return judge(state)
        finally:
            self.seconds = self.watch.seconds()
            drop_programs_if_many()

    def _train(self, training: Training) -> Generator[tuple[int, Metrics], None, TrainState]:
        """Yields the number of steps and the metrics of each part, and returns the last state."""
        self.folder = _folder(training, self.directory)
        self.checkpoints = Checkpoints(self.folder.root / "checkpoints", keep_last=self.config.keep_last)
        self.notes = {"training": _identity(self.config, training), "made_by": self.made_by}
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
        _raise_if_stopped(self.signals, self.done)
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


def drop_programs_if_many() -> None:
    """Forget all compiled programs if they take half of the memory mappings that Linux allows a process.

    XLA needs hundreds of mappings for each program of a CPU. Of the default number, 65,530, some eighty training steps
    take all, and then XLA ends the process ("Unable to allocate section memory").
    """
    try:
        used = Path("/proc/self/maps").read_bytes().count(b"\n")
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:  # another system
        return
    if used > allowed / 2:
        jax.clear_caches()
        gc.collect()


def _summarise(directory: RunDirectory, cells: Iterable[_CellRun], before: float) -> None:
    """Add to summary.json how the time was spent, in the threads and before they started."""
    start, done = (sum(getattr(cell, name) for cell in cells) for name in ("start", "done"))
    if done > start:
        seconds = added(cell.seconds for cell in cells)
        with_before = {"start": seconds["start"] + before, "wall": seconds["wall"] + before}
        directory.add_session(start, done, {**seconds, **with_before})
