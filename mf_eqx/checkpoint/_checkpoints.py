"""Checkpoints of a training state, written by Orbax and verified when they are loaded.

directory/00000500/            the arrays of one step, complete: written under another name, then renamed
          00000500.json        the record of this step
          00000500.damaged/    an earlier checkpoint of step 500, moved aside when step 500 was saved again

Orbax writes arrays atomically, in the background, and reads them back onto any mesh. This file adds verification: the
record has the path, shape, dtype and digest of every leaf, and a checksum of its own. Loading first compares the
structure, leaf by leaf, then reads the arrays, then compares digests. A step that fails is skipped, and the newest
usable step before it is loaded instead.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._leaves import compare, fill_shapes, leaves, listed, shapes
from .._sharding import Parallelism
from .._validate import as_count, Count
from ._agreement import Damage, from_first_process, raising_everywhere
from ._arrays import load_arrays, save_arrays, with_arrays_of_jax
from ._digest import digests
from ._record import read_record, record_text, write_record
from ._step_folders import StepFolders

_State = TypeVar("_State")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no checkpoint could be read; the message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Restored(Generic[_State]):
    """A state that was loaded from a checkpoint.

    **Arguments:** `step` its number; `state`; `notes` that were saved with it; `passed_over` the newer steps that were
    skipped because they could not be used, each with the reason.
    """

    step: int
    state: _State
    notes: dict[str, Any]
    passed_over: dict[int, str]


class Checkpoints:
    """The checkpoints in one directory.

    **Arguments:**

    - `directory`: created by the first save.
    - `keep_last`: how many of the newest checkpoints are kept.
    - `keep_every`: steps that are multiples of this number are never removed; None for no such steps.

    How many steps can be lost: a save becomes complete when its folder is renamed in the background, while the caller
    continues; the next save begins only after that. So a process that saves every k steps and is killed continues from
    its last save if that was complete, otherwise from the one before. It loses fewer than k steps plus the steps that
    it took while a state was being written: at most 2 k, if writing takes as long as k steps. More steps are lost in
    two cases. A step that is saved again, because it was skipped by `load`, is moved aside first and cannot be loaded
    until its new save is complete. And if a machine loses power, the newest checkpoint may be damaged as well, which
    leaves none if keep_last = 1.

    Only one process tree at a time may save: `run.train` locks the run's directory. All processes of a multi-process
    run must call every method together.

    **Raises:** `ValueError` unless keep_last and keep_every are integers >= 1.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, keep_every: int | None = None):
        keep_last = as_count("keep_last", keep_last)
        keep_every = None if keep_every is None else as_count("keep_every", keep_every)
        self.directory = Path(directory).absolute()
        self._folders = StepFolders(self.directory, keep_last, keep_every)
        self._pending: tuple[int, Any] | None = None
        self._passed_over: set[int] = set()

    def steps(self) -> list[int]:
        """The steps on disk, in ascending order, whether they can be read or not; broken links are included."""
        return self._folders.steps()

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self._folders.path(step)

    def save(
        self, step: Count | Int[Array | np.ndarray, ""], state: PyTree[Any], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Start writing a state. Returns when the state may be donated, usually long before everything is on disk.

        Waits for the previous save. An existing checkpoint of this step is moved aside first, and so are the steps that
        `load` skipped.

        **Arguments:** `step` number of finished steps, which may be an array of one number; `state` any PyTree, of
        which the arrays are written: those of NumPy come back as JAX's; `notes` any JSON values, which `load` returns:
        configuration, versions, position in the data. Their text, with the record of the arrays, has at most 64 MiB
        and about a million values, nested at most 64 times.

        **Raises:** `ValueError` if `step` is no integer >= 0, if there are checkpoints of later steps, which the next
        `load` would return in place of this one (those that this object's `load` skipped do not count), if JAX does not
        have the dtype of a NumPy array, or if `notes` are no JSON within these limits; `CheckpointError` if this save
        cannot be started, or the previous one failed.
        """
        self.wait()
        given: Any = step
        if isinstance(step, jax.Array | np.ndarray) and step.shape == () and step.dtype.kind in "iu":
            given = step.item()
        step = as_count("step", given, 0)
        there = set(from_first_process(self.steps())) - self._passed_over
        if later := [str(number) for number in sorted(there) if number > step]:
            raise ValueError(
                f"step must not be before those in {self.directory}, {listed(later)}, got {step}: to go on "
                "from an earlier step, move the later ones away first, or save into another directory"
            )
        state = with_arrays_of_jax(state)
        arrays, found = leaves(state), digests(state)
        record = record_text(step, shapes(arrays), found, notes or {})
        with self._as_checkpoint_error(step, "could not be saved"):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for replaced in {step, *self._passed_over}:
                    self._folders.move_aside(replaced)
                write_record(self._folders.record(step), record)
            self._passed_over.clear()
            self._pending = (step, save_arrays(self.path(step), arrays))

    def wait(self) -> None:
        """Wait until the last save is on disk, then remove the checkpoints that are not to be kept.

        **Raises:** `CheckpointError` if the save failed, for example because no space was left.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        with self._as_checkpoint_error(step, "could not be saved"):
            response.result()
        if jax.process_index() == 0:
            with self._as_checkpoint_error(step, "was saved, but older steps could not be removed"):
                self._folders.prune(step)

    def load(
        self,
        make_state: Callable[[], _State],
        parallelism: Parallelism | None = None,
        *,
        step: int | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
        partial: bool = False,
    ) -> Restored[_State] | None:
        """The newest state that is unchanged since it was saved; None if nothing was ever saved. Nothing is written.

        **Arguments:** `make_state` as for `Parallelism.make`: from its result only the shapes and dtypes of arrays and
        everything that is not an array are used; `parallelism` of the loaded state, which may differ from that of the
        saved one; `step` to load this step and no other; `check` a function that is called with a step's notes and
        raises `ValueError` if they do not fit; `partial` whether the saved state may have other leaves besides, which
        are not read.

        Leaves in float64 require that `jax_enable_x64` is set for all threads, by `jax.config.update`.

        **Raises:** `ValueError` that names the leaves if the saved state has other leaves, shapes or dtypes than that
        of `make_state`; `CheckpointError` if there are checkpoints but none can be used.
        """
        wanted = eqx.filter_eval_shape(make_state)
        passed_over: dict[int, str] = {}
        for candidate in reversed(from_first_process(self.steps())) if step is None else [step]:
            try:
                state, notes = self._load_step(candidate, wanted, parallelism, check, partial)
            except Damage as damage:
                passed_over[candidate] = str(damage)
                self._passed_over.add(candidate)
            else:
                return Restored(candidate, state, notes, passed_over)
        if passed_over:
            reasons = "; ".join(f"step {number}: {reason}" for number, reason in passed_over.items())
            message = f"no checkpoint can be used ({reasons}); remove or rename this directory to start from step 0"
            raise CheckpointError(f"{self.directory}: {message}")
        return None

    def saved(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the record of a step says: shape and dtype of each array by its path in the state, and the notes.

        **Raises:** `CheckpointError` if the record cannot be read; `ValueError` if it has another format.
        """
        try:
            record = read_record(self._folders.record(step), step)
        except Damage as damage:
            raise CheckpointError(f"{self.path(step)}: {damage}") from damage
        return record["leaves"], record["notes"]

    def clean(self) -> None:
        """Remove partially written or partially deleted checkpoints of killed runs, and all but the newest of the
        checkpoints that were moved aside. Only a process that may save may call this."""
        if jax.process_index() == 0:
            self._folders.clean()

    def _load_step(
        self,
        step: int,
        wanted: _State,
        parallelism: Parallelism | None,
        check: Callable[[Mapping[str, Any]], None] | None,
        partial: bool,
    ) -> tuple[_State, dict[str, Any]]:
        """State and notes of a step. **Raises:** `Damage` or `ValueError` if the step cannot be used."""
        with raising_everywhere():
            record = read_record(self._folders.record(step), step)
            if check is not None:
                check(record["notes"])
            expected, saved = shapes(leaves(wanted)), record["leaves"]
            if partial:
                saved = {name: leaf for name, leaf in saved.items() if name in expected}
            compare(saved, expected, self.path(step))
        state = fill_shapes(wanted, load_arrays(self.path(step), wanted, parallelism, partial=partial))
        if wrong := [name for name, digest in digests(state).items() if record["digests"][name] != digest]:
            raise Damage(f"{listed(wrong)} not as saved (by the digest)")
        return state, record["notes"]

    @contextlib.contextmanager
    def _as_checkpoint_error(self, step: int, failure: str) -> Iterator[None]:
        """A context that raises every error as a `CheckpointError` about this step."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process has ended
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.path(step)}: step {step} {failure}: {reason}") from error
