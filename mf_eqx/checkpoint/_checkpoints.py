"""Checkpoints of a training state, written by Orbax and believed only after a look.

directory/00000500/            the arrays of one step, complete: written under another name, then renamed
          00000500.json        its record
          00000500.damaged/    what stood there and was passed over, when step 500 was reached again

Orbax writes arrays atomically, in the background, and reads them back onto any mesh. What it does not do is done here:
the record has the path, shape, dtype and digest of every leaf, and is itself under a checksum. Loading first compares
the structure, leaf by leaf, then reads, then compares digests; a step that fails is passed over for the newest good one
before it.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .._files import remove
from .._json import parse_json, read_json_object
from .._leaves import compare, fill_shapes, leaves, listed, shapes, without_key_dtype
from .._sharding import Parallelism
from ._digest import digests

_State = TypeVar("_State")

_FORMAT = 1
_DAMAGED, _DOOMED = ".damaged", ".deleted"
_QUIET = threading.Lock()


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that could be read; the message says which and why."""


class _Damage(Exception):
    """Why one step cannot be used."""


@dataclasses.dataclass(frozen=True)
class Restored(Generic[_State]):
    """What was loaded.

    **Arguments:** `step` its number; `state`; `notes` that were saved with it; `passed_over` newer steps that could not
    be used, each with the reason.
    """

    step: int
    state: _State
    notes: dict[str, Any]
    passed_over: dict[int, str]


class Checkpoints:
    """The checkpoints in one directory.

    **Arguments:**

    - `directory`: made by the first save.
    - `keep_last`: how many of the newest are kept.
    - `keep_every`: steps that are multiples of it are kept for ever; None for none.

    What can be lost: a save is complete by a rename in the background, for which nobody has to wait, and the next one
    begins only then. So a process that saves every k steps and is killed comes back at its last save if that was
    complete, else at the one before. It loses less than k steps and those that it took while a state was being written;
    2 k at most, where writing takes as long as k steps. Two things cost more: a step that is saved again, because it
    was passed over, is moved aside first and not found until its new save is complete; and a machine that loses power
    may spoil the newest step, too, which leaves none with keep_last = 1.

    One process tree at a time may save: `run.train` locks the run's directory. All processes of a multi-process run
    call every method together.

    **Raises:** `ValueError` unless keep_last >= 1 and keep_every >= 1.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, keep_every: int | None = None):
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pending: tuple[int, Any] | None = None
        self._passed_over: set[int] = set()

    def steps(self) -> list[int]:
        """The steps on disk, in ascending order, whether they can be read or not: also links that point nowhere now."""
        if not self.directory.is_dir():
            return []
        named = [path for path in self.directory.iterdir() if path.name.isdecimal() and _is_folder(path)]
        return sorted(int(path.name) for path in named if path == self.path(int(path.name)))

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / f"{step:08}"

    def _record_path(self, step: int) -> Path:
        return self.path(step).with_suffix(".json")

    def save(self, step: int, state: PyTree[Any], notes: Mapping[str, Any] | None = None) -> None:
        """Start to write a state. Returns when it may be donated, usually long before all is on disk.

        Waits for the save before. What stands at this step already is moved aside first, and so is what `load` passed
        over.

        **Arguments:** `step` number of finished steps; `state` any PyTree, of which arrays are written; `notes` that
        JSON can hold, to be read by whoever loads: configuration, versions, where the data stand.

        **Raises:** `CheckpointError` if this one cannot be begun or the one before could not be finished.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        arrays = leaves(state)
        record = {"format": _FORMAT, "step": step, "leaves": shapes(arrays), "digests": digests(state)}
        with self._failing(step, "saved"):
            sealed = _sealed({**record, "notes": notes or {}})
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for gone in {step, *self._passed_over}:
                    self._move_aside(gone)
                remove(self._record_path(step))  # and never write to where a link points
                with self._record_path(step).open("x", encoding="utf-8") as file:
                    file.write(sealed)
                    file.flush()
                    os.fsync(file.fileno())
            self._passed_over.clear()
            plain_arrays = {name: without_key_dtype(leaf) for name, leaf in arrays.items()}
            self._pending = (step, ocp.save_async(str(self.path(step)), plain_arrays))

    def wait(self) -> None:
        """Return when the last save is on disk; then remove what is not to be kept.

        **Raises:** `CheckpointError` if it failed: no space left, say.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        with self._failing(step, "saved"):
            response.result()
        if jax.process_index() == 0:
            with self._failing(step, "kept alone"):
                self._prune(step)

    def load(
        self,
        make_state: Callable[[], _State],
        parallelism: Parallelism | None = None,
        *,
        step: int | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Restored[_State] | None:
        """The newest state that is what it was when it was saved; None if there never was one. Nothing is written.

        **Arguments:** `make_state` as for `Parallelism.make`: only shapes are taken of what it returns, and whatever is
        no array; `parallelism` of the state, which need not be the one that it was saved with; `step` for this one and
        no other; `check` a function that is shown a step's notes and raises `ValueError` if they do not fit.

        Leaves in float64 need `jax_enable_x64` set for all threads, by `jax.config.update`.

        **Raises:** `ValueError` that names the leaves if the saved state has other ones, or others of these shapes and
        dtypes; `CheckpointError` if there are checkpoints and none can be used.
        """
        wanted = eqx.filter_eval_shape(make_state)
        passed_over: dict[int, str] = {}
        for candidate in reversed(_of_first(self.steps())) if step is None else [step]:
            try:
                state, notes = self._usable(candidate, wanted, parallelism, check)
            except _Damage as damage:
                passed_over[candidate] = str(damage)
                self._passed_over.add(candidate)
            else:
                return Restored(candidate, state, notes, passed_over)
        if passed_over:
            reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed_over.items())
            message = f"no checkpoint can be used ({reasons}); remove or rename this directory to begin anew"
            raise CheckpointError(f"{self.directory}: {message}")
        return None

    def clean(self) -> None:
        """Remove what a killed run left half written or half deleted, and of what was moved aside all but the newest.
        Only whoever may save may clean."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for path in self.directory.iterdir():
                if _is_folder(path) and (".orbax-checkpoint-tmp" in path.name or path.suffix == _DOOMED):
                    remove(path)
            for old in sorted(self.directory.glob(f"*{_DAMAGED}"))[:-1]:
                remove(old)
            for path in self.directory.iterdir():
                if path.suffix == ".json" and path.stem.isdecimal() and not os.path.lexists(path.with_suffix("")):
                    remove(path)

    def _usable(
        self,
        step: int,
        wanted: _State,
        parallelism: Parallelism | None,
        check: Callable[[Mapping[str, Any]], None] | None,
    ) -> tuple[_State, dict[str, Any]]:
        """State and notes of a step, unless something is wrong with it."""
        with _same_everywhere():
            record = self._record(step)
            if check is not None:
                check(record["notes"])
            compare(record["leaves"], shapes(leaves(wanted)), self.path(step))
        state = fill_shapes(wanted, self._read(step, wanted, parallelism))
        if wrong := [name for name, digest in digests(state).items() if record["digests"][name] != digest]:
            raise _Damage(f"{listed(wrong)} not as saved, by the digest")
        return state, record["notes"]

    def _record(self, step: int) -> dict[str, Any]:
        """What was written beside the arrays."""
        try:
            sealed = read_json_object(self._record_path(step))
            text, checksum = sealed["record"], sealed["sha256"]
            matches = _sha256(text) == checksum
            record = parse_json(text.encode(), finite=False) if matches else {}
        except Exception as error:
            raise _Damage(f"its record cannot be read: {_in_short(error)}") from error
        if not matches:
            raise _Damage("its record does not have its checksum")
        _check_record(record)
        if record["format"] != _FORMAT:
            raise ValueError(f"{self.path(step)}: format must be {_FORMAT}, got {record['format']}")
        if record["step"] != step:
            raise _Damage(f"its record is of step {record['step']}")
        return record

    def _read(self, step: int, wanted: PyTree[Any], parallelism: Parallelism | None) -> dict[str, Any]:
        """The arrays, whatever they hold."""
        from orbax.checkpoint import v1 as ocp

        path = self.path(step)
        targets = {name: _target(without_key_dtype(leaf), parallelism) for name, leaf in leaves(wanted).items()}
        arrays, reason = {}, None
        with _same_everywhere():
            if odd := _irregular(path):
                raise _Damage(f"it has what is no ordinary file: {listed(odd)}")
            with _quiet():
                try:
                    arrays = ocp.load(str(path), targets)
                except Exception as error:  # damaged files raise whatever their reader stumbles over
                    reason = f"it cannot be read: {_in_short(error)}"
            if reason is not None:
                raise _Damage(reason)
        return arrays

    @contextlib.contextmanager
    def _failing(self, step: int, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process is gone
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.path(step)}: step {step} could not be {what}: {reason}") from error

    def _prune(self, newest: int) -> None:
        """Remove old steps. Steps after the newest save are no business of ours: they were passed over."""
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep_last]:
            if self._keep_every is None or step % self._keep_every:
                doomed = self.path(step).with_suffix(_DOOMED)
                remove(doomed)
                self.path(step).rename(doomed)  # at once, so that half a step never looks like one
                remove(self._record_path(step))
                remove(doomed)

    def _move_aside(self, step: int) -> None:
        if os.path.lexists(self.path(step)):
            aside = self.path(step).with_suffix(_DAMAGED)
            remove(aside)
            self.path(step).rename(aside)
        remove(self._record_path(step))


def _check_record(record: Any) -> None:
    """Refuses, as damage, a record that lacks one of its parts or has another type there."""
    wanted = {"format": int, "step": int, "leaves": dict, "digests": dict, "notes": dict}
    if not isinstance(record, dict):
        raise _Damage(f"its record is a {type(record).__name__}")
    if wrong := [name for name, kind in wanted.items() if type(record.get(name)) is not kind]:
        raise _Damage(f"its record has no {listed(wrong)}, or of another type")
    if record["leaves"].keys() != record["digests"].keys():
        raise _Damage("its record has digests of other leaves")
    for name, leaf in record["leaves"].items():
        if type(leaf) is not list or [*map(type, leaf)] != [list, str]:
            raise _Damage(f"its record has no shape and dtype of {name}")


def _irregular(folder: Path) -> list[str]:
    """What is in a folder, at any depth, and is neither an ordinary file nor a folder: Orbax would wait for a pipe."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return [str(path.relative_to(folder)) for path in paths if path.exists() and not path.is_file()]


def _is_folder(path: Path) -> bool:
    """Whether it is a directory, or a link to what was one: steps may be moved to another disk. Of links, only the
    links are ever renamed and removed."""
    return path.is_dir() or path.is_symlink()


def _sealed(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return json.dumps({"record": text, "sha256": _sha256(text)})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _same_everywhere() -> Iterator[None]:
    """A context that fails in all processes if in one: all must do the same next, or they wait for each other for ever.

    **Raises:** the error, where there was one; `_Damage` elsewhere if it was that, `ValueError` if not.
    """
    error: Exception | None = None
    try:
        yield
    except (_Damage, ValueError) as raised:
        error = raised
    verdict = 0 if error is None else 1 if isinstance(error, _Damage) else 2
    if jax.process_count() > 1:
        verdict = int(multihost_utils.process_allgather(np.array(verdict)).max())
    if error is not None and (verdict == 2) == isinstance(error, ValueError):
        raise error
    if verdict:
        raise (
            ValueError("another process refuses the checkpoint") if verdict == 2 else _Damage("another process says so")
        )


def _of_first(steps: list[int]) -> list[int]:
    """What the first process sees: directories may look different from different machines."""
    if jax.process_count() == 1:
        return steps
    number = int(multihost_utils.broadcast_one_to_all(np.array(len(steps))))
    mine = np.zeros(number, np.int64)
    mine[: len(steps[:number])] = steps[:number]
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and warnings of what reads: what is wrong is said once, by us. One thread at a time."""
    with _QUIET:
        yield from _quietly()


def _quietly() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    try:
        sys.unraisablehook = lambda _: None
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                gc.collect()  # asyncio tells of abandoned tasks when it drops them: now, not later
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _target(leaf: jax.ShapeDtypeStruct, parallelism: Parallelism | None) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = one if parallelism is None else parallelism.of_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
