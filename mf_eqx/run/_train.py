"""The training loop of every script: it can be killed at any moment and continues where it was.

    with run.opened(config) as directory:
        state = run.train(config, step, make_state, stream, directory, steps=config.steps)

When the same command is run again, it finds the directory by the configuration, loads the newest valid checkpoint, and
continues with the next step, on the same rows and with the same random numbers. On the same number of devices, the last
state is bit-identical to that of a run that was never interrupted. A larger number of steps continues a finished run,
if the configuration, without its settings, is the same: where a schedule depends on the number, make it a field of the
configuration that is no `setting`.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._batch import Batch
from .._mean import Mean, Metrics, total
from .._model import number_of_labels
from .._train import TrainStep
from .._train_state import Faults, TrainState
from ..checkpoint import CheckpointError, Checkpoints, Restored
from ..data import Stream
from ._directory import made_by, missing_lines, RunDirectory
from ._lock import check_in_place
from ._loggers import Logger, TensorBoardLogger, WandbLogger
from ._plan import check_disk, plan_of_training, work_of_step
from ._processes import agree, is_first, once, Stopped, StopSignals, tell, together
from ._progress import Progress
from ._settings import difference, recipe, Settings
from ._start import description_of, started
from ._stopwatch import Stopwatch
from ._values import fetch

Preview = Callable[[TrainState, Path], None]
"""Draws a picture of a state into a file."""


_MUST_AGREE = {"config": "configuration", "data": "data", "training": "training"}
"""Notes of a checkpoint that must be the same in a run that continues from it."""
_MEANS_OVER = 100
"""The largest number of steps over which the progress line averages metrics."""


class NonFinite(RuntimeError):
    """A run that stopped because too many steps in a row had no finite loss and gradient."""


def train(
    config: Settings,
    step: TrainStep,
    make_state: Callable[[], TrainState],
    stream: Stream,
    directory: RunDirectory,
    *,
    steps: int,
    name: str = "",
    preview: Preview | None = None,
    shown: Sequence[str] = ("loss", "boundary_error", "identity_error"),
    loggers: Sequence[Logger] = (),
    start: str = "",
) -> TrainState:
    """Train up to a number of steps, from the newest valid checkpoint or from the beginning, which may be the weights
    or a checkpoint of another run.

    Files in `directory`: `checkpoints/`, `metrics.jsonl` (a line every `config.log_every` steps, the same in a run that
    was interrupted; lines that are lost are not restored, which is reported when the run continues), `previews/`,
    `summary.json` (how the time was spent).

    **Arguments:**

    - `config`: its settings are used here; all other fields are saved with each checkpoint, and must be the same when
      the run continues.
    - `step`: made with `parallelism(config)` and `config.accumulation`.
    - `make_state`: makes the state before the first step; it is only traced. Use an `eqx.Partial` if it needs large
      arrays, such as weights to start from.
    - `stream`: the stream of batches, made with the same parallelism.
    - `directory`: from `opened`.
    - `steps`: number of the last step, at least that of the newest checkpoint; with `config.test_run`, 2 at most.
    - `name`: the name of this training, if one run has several: checkpoints of another training are refused.
    - `preview`: draws a picture of a state into a PNG file. It is called in all processes, since the state is
      distributed over them; the first process keeps its file, the others write to a temporary directory.
    - `shown`: metrics of the progress line, of those that there are.
    - `loggers`: destinations of metrics besides metrics.jsonl, TensorBoard and Weights & Biases.
    - `start`: empty, or what a run begins from that has no checkpoint yet: a file of `save_weights`, or a directory of
      checkpoints, also that of a run. From weights it gets the network. From a checkpoint it gets the network, the
      averages if there are as many, and the optimiser's state if it has the same arrays, without the steps that its
      schedules have counted. All else is new: the number of steps, the order of the data, the random numbers.

    **Returns:** the last state.

    **Raises:** `Stopped` after SIGTERM or SIGINT, with the state saved; `NonFinite` after `config.most_faults` steps
    in a row without a finite loss and gradient; `CheckpointError`; `Moved` if the directory was moved; `Separated` if
    another process has ended; `ValueError` if a checkpoint is of another configuration or of other data, if more steps
    are done than asked for, if `start` is of another network, if the disk is too small for the checkpoints, or if a
    setting, the batch size or the labels of the data are invalid; `SystemExit` after `config.dry_run` has printed its
    plan.
    """
    config.check()
    step.check_batch_size(stream.batch)
    _check_labels(step, make_state, stream)
    if config.test_run:
        config, steps = dataclasses.replace(config, save_every=1, log_every=1, preview_every=1), min(steps, 2)
    if config.dry_run:
        tell(plan_of_training(config, step, make_state, stream, steps))
        if start:
            started(start, make_state, step)
        raise SystemExit(0)
    with together(), contextlib.ExitStack() as closing:
        for logger in loggers:
            closing.callback(logger.close)
        training = _Training(
            config=config,
            step=step,
            make_state=make_state,
            stream=stream,
            directory=directory,
            steps=steps,
            name=name,
            preview=preview,
            shown=shown,
            loggers=loggers,
            origin=start,
        )
        return training.run(closing)


def _check_labels(step: TrainStep, make_state: Callable[[], TrainState], stream: Stream) -> None:
    """Refuses data with the null label, and with labels that the network lacks."""
    if (labels := stream.source.labels) is None:
        return
    dropout = getattr(step.objective, "label_dropout", None)
    null = None if dropout is None else dropout.null
    known = number_of_labels(eqx.filter_eval_shape(make_state).field)
    for most, meaning in [(null, "the null label"), (known, "those of the network")]:
        if isinstance(most, int) and labels > most:
            raise ValueError(f"{stream.source.name}: labels must be at most {most}, {meaning}, got {labels}")


def _loggers(config: Settings, directory: RunDirectory, start: int) -> Iterator[Logger]:
    """The loggers that are selected by flags."""
    if config.tensorboard and is_first():
        yield TensorBoardLogger(directory.root / "tensorboard", start)
    if config.wandb and is_first():
        yield WandbLogger(config.wandb, str(directory.root), directory.root, recipe(config))


@dataclasses.dataclass(kw_only=True)
class _Training:
    """One call of `train`: its inputs and its progress."""

    config: Settings
    step: TrainStep
    make_state: Callable[[], TrainState]
    stream: Stream
    directory: RunDirectory
    steps: int
    name: str
    preview: Preview | None
    shown: Sequence[str]
    loggers: Sequence[Logger]
    origin: str

    def __post_init__(self):
        config, folder = self.config, self.directory.root / "checkpoints"
        self.checkpoints = Checkpoints(folder, keep_last=config.keep_last, keep_every=config.keep_every or None)
        self.notes = {
            "config": recipe(config),
            "data": self.stream.fingerprint(),
            "steps": self.steps,
            "training": self.name,
            "network": description_of(eqx.filter_eval_shape(self.make_state).field),
            "made_by": made_by(),
        }
        self.watch, self.signals = Stopwatch(), StopSignals()
        self.unlogged: list[Metrics] = []
        self.start = self.number = self.faults = self.most_in_row = self.lines = 0

    def run(self, closing: contextlib.ExitStack) -> TrainState:
        """Train, and return the last state. The stack closes the loggers that are made here."""
        with self.signals:
            with self.watch.part("start"):
                agree("config and data", {"notes": self.notes, "intervals": self._intervals})
                state = self._begin()
                for logger in _loggers(self.config, self.directory, self.start):
                    closing.callback(logger.close)
                    self.loggers = [*self.loggers, logger]
                work = work_of_step(self.step, self.make_state, self.stream)
            self.progress = Progress(
                self.steps,
                start=self.start,
                shown=self.shown,
                window=min(self.config.log_every, _MEANS_OVER),
                work=work,
                silent=not is_first(),
            )
            try:
                with self.progress:
                    for batch in self._batches():
                        state = self._advance(state, batch)
                    self._finish_saving()
            finally:
                # Whoever catches an error may start again at once. Other processes may have ended: no waiting for them.
                if jax.process_count() == 1:
                    with contextlib.suppress(CheckpointError):
                        self._finish_saving()
                with contextlib.suppress(OSError):  # a full disk was reported by the write that failed before
                    self._summarise()
        return state

    def _summarise(self) -> None:
        if is_first() and self.number > self.start:
            self.directory.add_session(self.start, self.number, self.watch.seconds())

    # Before the first step

    def _begin(self) -> TrainState:
        """The state to continue from."""
        self.checkpoints.clean()
        mesh = self.step.parallelism
        restored = self.checkpoints.load(self.make_state, mesh, check=self._check_notes)
        if restored is not None:
            self._continue(restored)
        if self.start < self.steps:
            once(self._check_disk)
        once(lambda: self._restore_log(restored))
        if restored is not None:
            return restored.state
        make_state = self.make_state
        if self.origin:
            make_state = started(self.origin, make_state, self.step)
        return eqx.filter_jit(make_state)() if mesh is None else mesh.make(make_state)

    def _check_disk(self) -> None:
        state, saved = eqx.filter_eval_shape(self.make_state), self.checkpoints.steps()
        check_disk(self.directory.root, self.config, state, saved, self.start, self.steps)

    def _restore_log(self, restored: Restored[TrainState] | None) -> None:
        """Remove from the log what was written after the restored step, and report lines that are missing before it."""
        self.lines = self.directory.drop_records_after(self.start)
        written = self.lines if restored is None else restored.notes["lines"]
        if written != self.lines:
            tell(missing_lines(self.directory, self.lines, written, self.start))

    def _check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another configuration or of other data."""
        current = json.loads(json.dumps(self.notes))
        for name, subject in _MUST_AGREE.items():
            if change := difference(notes.get(name, ""), current[name], name):
                rule = f"{subject} must be that of the run so far"
                raise ValueError(f"{self.checkpoints.directory}: {rule}, but {change}")

    def _continue(self, restored: Restored[TrainState]) -> None:
        for number, reason in restored.passed_over.items():
            tell(f"{self.checkpoints.path(number)}: passed over, because {reason}")
        if changed := difference(restored.notes["made_by"], self.notes["made_by"]):
            tell(f"{self.directory.root}: the setup has changed since it was saved: {changed}")
        done = restored.step == self.steps
        if restored.step > self.steps:
            rule = f"steps must be at least the {restored.step} that are done in {self.directory.root}"
            raise ValueError(f"{rule}, got {self.steps}")
        tell(f"{self.directory.root}: {'finished' if done else 'continues after'} step {restored.step} of {self.steps}")
        self.start = self.number = restored.step
        self.unlogged = _unpacked(restored.notes["pending"])
        self.faults, self.most_in_row = int(restored.state.faults.total), int(restored.state.faults.most_in_row)
        if done and int(restored.state.faults.in_row) >= self.config.most_faults:
            raise NonFinite(f"{self.directory.root}: its last steps had no finite loss, gradient or update")

    # A step

    def _batches(self) -> Iterator[Batch]:
        """The remaining batches. The time spent waiting for them is recorded."""
        batches = self.stream.batches(self.start, self.steps)
        for _ in range(self.start, self.steps):
            with self.watch.part("data"):
                batch = next(batches)
            yield batch

    def _advance(self, state: TrainState, batch: Batch) -> TrainState:
        """One step, and everything that is due after it. The state returned is usually still being computed."""
        with self.watch.part("compile") if self.number == self.start else contextlib.nullcontext():
            state, metrics = self.step(state, batch)
            self.number += 1
            self.progress.update(self.number, metrics)  # waits for the first step
        self.unlogged.append(metrics)
        signal = self.signals.received()
        if signal is not None or any(map(self._is_due, self._intervals)):
            jax.block_until_ready(state.step)  # so that the time of steps is not counted for what follows
        if self._is_due(self.config.log_every):
            self._log()
        if signal is not None or self._is_due(self.config.log_every):
            self._check_faults(state, jax.device_get(state.faults))
        if self._is_due(self.config.preview_every):
            self._draw_preview(state)
        if signal is not None or self._is_due(self.config.save_every):
            self._save(state)
        if signal is not None:
            self._finish_saving()
            raise Stopped(signal, self.number)
        return state

    @property
    def _intervals(self) -> tuple[int, ...]:
        return self.config.log_every, self.config.preview_every, self.config.save_every

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.number % every == 0 or self.number == self.steps)

    def _log(self) -> None:
        """A line of metrics."""
        with self.watch.part("log"):
            sums = jax.device_get(total(self.unlogged))
            self.unlogged = []
            if is_first():
                self.directory.log(self.number, sums)
                self.lines += 1
            for logger in self.loggers:
                logger.log(self.number, fetch(sums))

    def _check_faults(self, state: TrainState, faults: Faults) -> None:
        """Reports steps without a finite loss and gradient, and stops after too many in a row."""
        counted, most, last = int(faults.total), int(faults.most_in_row), int(faults.last)
        if counted > self.faults:
            self.progress.note(f"no finite loss and gradient in step {last}, skipped ({counted} such steps so far)")
            self.faults = counted
        limit = self.config.most_faults
        if int(faults.in_row) >= limit or most >= max(limit, self.most_in_row + 1):
            self._save(state)
            self._finish_saving()
            path = self.checkpoints.path(self.number)
            raise NonFinite(
                f"{most} steps in a row up to step {last} had no finite loss and gradient; {path} is finite"
            )
        self.most_in_row = most

    def _draw_preview(self, state: TrainState) -> None:
        if self.preview is not None:
            with self.watch.part("preview"):
                name = f"previews/{self.number:08}.png"
                if is_first():
                    self.preview(state, self.directory.path(name))
                else:
                    with tempfile.TemporaryDirectory() as folder:
                        self.preview(state, Path(folder) / "preview.png")

    def _save(self, state: TrainState) -> None:
        """Start to save the state, with the metrics that are not yet in the log."""
        with self.watch.part("save"):
            check_in_place(self.directory.root)
            pending = _packed(self.unlogged)
            self.unlogged = _unpacked(pending)
            self.checkpoints.save(self.number, state, {**self.notes, "pending": pending, "lines": self.lines})

    def _finish_saving(self) -> None:
        with self.watch.part("save"):
            self.checkpoints.wait()


def _packed(metrics: Sequence[Metrics]) -> dict[str, Any]:
    """The sum of metrics as values that JSON can hold. Decimal numbers represent float32 exactly."""
    if not metrics:
        return {}
    sums = jax.device_get(total(metrics))
    return {
        name: [np.asarray(part).tolist() for part in (mean.total, mean.count)] + [str(np.asarray(mean.total).dtype)]
        for name, mean in sums.items()
    }


def _unpacked(pending: Mapping[str, Any]) -> list[Metrics]:
    if not pending:
        return []
    return [
        {
            name: Mean(np.asarray(value, dtype), np.asarray(count, dtype))
            for name, (value, count, dtype) in pending.items()
        }
    ]
