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
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.random as jr

from .._train_state import TrainState
from ._cell_run import CellRun, raise_if_stopped
from ._cell_training import directory_name, folder_of, steps_done, Training
from ._directory import as_json, made_by, RunDirectory
from ._parallel import in_parallel
from ._plan import devices, memory, parameters
from ._processes import Stopped, StopSignals, tell
from ._progress import Progress
from ._settings import CellSettings
from ._stopwatch import added, Stopwatch
from ._table import table

_Cell = TypeVar("_Cell")
_Result = TypeVar("_Result")

_SHOWN = ("boundary_error", "identity_error")
"""Metrics of the progress line."""


def announce(config: CellSettings, trainings: Mapping[_Cell, Training | None], directory: RunDirectory) -> None:
    """Print which trainings are finished or begun, if any are. A dry run prints what would be trained, and ends.

    **Arguments:** as for `train_cells`.

    **Raises:** `SystemExit` after `config.dry_run` has printed its plan.
    """
    config, trainings = _checked(config, trainings)
    requested = _to_train(trainings.values())
    done = [steps_done(training, folder_of(training, directory)) for training in requested]
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

    **Raises:** `Stopped` after SIGTERM or SIGINT; `NonFinite` after `config.most_faults` steps in a row without a
    finite loss and gradient; `CheckpointError`; `Moved` if the directory was moved; `ValueError` if a setting is
    invalid, if two trainings have the same name or one has only dots, or if a checkpoint belongs to another training;
    any error of `judge`.
    """
    config, trainings = _checked(config, trainings)
    steps = sum(training.steps for training in _to_train(trainings.values()))
    with StopSignals() as signals, Progress(steps, shown=_SHOWN) as progress:
        machine = made_by()
        runs = {
            cell: CellRun(config, training, directory, signals, progress, machine)
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
            raise_if_stopped(signals, 0)
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
    names = [directory_name(training) for training in _to_train(trainings.values())]
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


def _describe(config: CellSettings, trainings: Sequence[Training], done: Sequence[int]) -> str:
    """A text with the configuration, the trainings, and the memory of the largest one, whose step is compiled."""
    states = [eqx.filter_eval_shape(training.make_state) for training in trainings]
    rows = [
        (directory_name(training), type(state.field).__name__, parameters(state), training.steps, steps)
        for training, state, steps in zip(trainings, states, done, strict=True)
    ]
    lines = [json.dumps(as_json(config), indent=2), "", devices()]
    if trainings:
        training, state = max(zip(trainings, states, strict=True), key=lambda pair: parameters(pair[1]))
        batch = eqx.filter_eval_shape(training.draw, jax.eval_shape(lambda: jr.key(0)))
        lines += ["", table(rows, ("cell", "network", "parameters", "steps", "done")), ""]
        lines += [f"{config.workers} at a time; {directory_name(training)}: {memory(training.step, state, batch)}"]
    return "\n".join(lines)


def _summarise(directory: RunDirectory, cells: Iterable[CellRun], before: float) -> None:
    """Add to summary.json how the time was spent, in the threads and before they started."""
    start, done = (sum(getattr(cell, name) for cell in cells) for name in ("start", "done"))
    if done > start:
        seconds = added(cell.seconds for cell in cells)
        with_before = {"start": seconds["start"] + before, "wall": seconds["wall"] + before}
        directory.add_session(start, done, {**seconds, **with_before})
