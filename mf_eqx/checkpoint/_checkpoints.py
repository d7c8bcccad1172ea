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
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, PyTree

from .._files import irregular_files, remove
from .._json import parse_json, read_json_object
from .._leaves import compare, fill_shapes, leaves, listed, shapes, without_key_dtype
from .._quiet import collect_tasks, quiet
from .._sharding import Parallelism
from .._validate import as_count, Count
from ._digest import digests

_State = TypeVar("_State")

_FORMAT = 1
_DAMAGED, _DELETED = ".damaged", ".deleted"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no checkpoint could be read; the message says which one and why."""


class _Damage(Exception):
    """The checkpoint of one step is damaged; the message is the reason."""


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
        """The steps on disk, in ascending order, whether they can be read or not; broken links are included."""
        if not self.directory.is_dir():
            return []
        named = [path for path in self.directory.iterdir() if path.name.isdecimal() and _is_folder(path)]
        return sorted(int(path.name) for path in named if path == self.path(int(path.name)))

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / f"{step:08}"

    def _record_path(self, step: int) -> Path:
        return self.path(step).with_suffix(".json")

    def save(
        self, step: Count | Int[Array | np.ndarray, ""], state: PyTree[Any], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Start writing a state. Returns when the state may be donated, usually long before everything is on disk.

        Waits for the previous save. An existing checkpoint of this step is moved aside first, and so are the steps that
        `load` skipped.

        **Arguments:** `step` number of finished steps, which may be an array of one number; `state` any PyTree, of
        which the arrays are written: those of NumPy come back as JAX's; `notes` any JSON values, which `load` returns:
        configuration, versions, position in the data.

        **Raises:** `ValueError` if `step` is no integer >= 0, if there are checkpoints of later steps, which the next
        `load` would return in place of this one (those that this object's `load` skipped do not count), or if JAX does
        not have the dtype of a NumPy array; `CheckpointError` if this save cannot be started, or the previous one
        failed.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        given: Any = step
        if isinstance(step, jax.Array | np.ndarray) and step.shape == () and step.dtype.kind in "iu":
            given = step.item()
        step = as_count("step", given, 0)
        there = set(_from_first_process(self.steps())) - self._passed_over
        if later := [str(number) for number in sorted(there) if number > step]:
            raise ValueError(
                f"step must not be before those in {self.directory}, {listed(later)}, got {step}: to go on "
                "from an earlier step, move the later ones away first, or save into another directory"
            )
        state = jax.tree.map_with_path(_as_jax, state)
        arrays = leaves(state)
        record = {"format": _FORMAT, "step": step, "leaves": shapes(arrays), "digests": digests(state)}
        with self._as_checkpoint_error(step, "could not be saved"):
            content = _with_checksum({**record, "notes": notes or {}})
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for replaced in {step, *self._passed_over}:
                    self._move_aside(replaced)
                remove(self._record_path(step))  # if it is a link, its target must not be overwritten
                with self._record_path(step).open("x", encoding="utf-8") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            self._passed_over.clear()
            plain_arrays = {name: without_key_dtype(leaf) for name, leaf in arrays.items()}
            self._pending = (step, ocp.save_async(str(self.path(step)), plain_arrays))

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
                self._prune(step)

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
        for candidate in reversed(_from_first_process(self.steps())) if step is None else [step]:
            try:
                state, notes = self._load_step(candidate, wanted, parallelism, check, partial)
            except _Damage as damage:
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
            record = self._record(step)
        except _Damage as damage:
            raise CheckpointError(f"{self.path(step)}: {damage}") from damage
        return record["leaves"], record["notes"]

    def clean(self) -> None:
        """Remove partially written or partially deleted checkpoints of killed runs, and all but the newest of the
        checkpoints that were moved aside. Only a process that may save may call this."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for path in self.directory.iterdir():
                if _is_folder(path) and (".orbax-checkpoint-tmp" in path.name or path.suffix == _DELETED):
                    remove(path)
            for old in sorted(self.directory.glob(f"*{_DAMAGED}"))[:-1]:
                remove(old)
            for path in self.directory.iterdir():
                if path.suffix == ".json" and path.stem.isdecimal() and not os.path.lexists(path.with_suffix("")):
                    remove(path)

    def _load_step(
        self,
        step: int,
        wanted: _State,
        parallelism: Parallelism | None,
        check: Callable[[Mapping[str, Any]], None] | None,
        partial: bool,
    ) -> tuple[_State, dict[str, Any]]:
        """State and notes of a step. **Raises:** `_Damage` or `ValueError` if the step cannot be used."""
        with _raising_everywhere():
            record = self._record(step)
            if check is not None:
                check(record["notes"])
            expected, saved = shapes(leaves(wanted)), record["leaves"]
            if partial:
                saved = {name: leaf for name, leaf in saved.items() if name in expected}
            compare(saved, expected, self.path(step))
        state = fill_shapes(wanted, self._read(step, wanted, parallelism, partial))
        if wrong := [name for name, digest in digests(state).items() if record["digests"][name] != digest]:
            raise _Damage(f"{listed(wrong)} not as saved (by the digest)")
        return state, record["notes"]

    def _record(self, step: int) -> dict[str, Any]:
        """The record that was written beside the arrays of a step."""
        try:
            content = read_json_object(self._record_path(step))
            text, checksum = content["record"], content["sha256"]
            matches = _sha256(text) == checksum
            record = parse_json(text.encode(), finite=False) if matches else {}
        except Exception as error:
            raise _Damage(f"its record cannot be read: {_short_text(error)}") from error
        if not matches:
            raise _Damage("its record does not match its checksum")
        _check_record(record)
        if record["format"] != _FORMAT:
            raise ValueError(f"{self.path(step)}: format must be {_FORMAT}, got {record['format']}")
        if record["step"] != step:
            raise _Damage(f"its record is of step {record['step']}")
        return record

    def _read(self, step: int, wanted: PyTree[Any], parallelism: Parallelism | None, partial: bool) -> dict[str, Any]:
        """The arrays of a step, whose values are not yet verified."""
        from orbax.checkpoint import v1 as ocp

        path = self.path(step)
        targets = {name: _target(without_key_dtype(leaf), parallelism) for name, leaf in leaves(wanted).items()}
        arrays, reason = {}, None
        with _raising_everywhere():
            if irregular := irregular_files(path):
                raise _Damage(f"it contains other things than ordinary files: {listed(irregular)}")
            with quiet():
                loading = ocp.options.PyTreeOptions.Loading(partial_load=partial)
                try:
                    with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
                        arrays = ocp.load(str(path), targets)
                except Exception as error:  # damaged files make the reader raise errors of many types
                    reason = f"it cannot be read: {_short_text(error)}"
                if reason is not None:
                    collect_tasks()
            if reason is not None:
                raise _Damage(reason)
        return arrays

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

    def _prune(self, newest: int) -> None:
        """Remove old steps. Steps after the newest save are not removed: they are steps that `load` skipped."""
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep_last]:
            if self._keep_every is None or step % self._keep_every:
                deleted = self.path(step).with_suffix(_DELETED)
                remove(deleted)
                self.path(step).rename(deleted)  # atomic: a partly deleted step must not look complete
                remove(self._record_path(step))
                remove(deleted)

    def _move_aside(self, step: int) -> None:
        if os.path.lexists(self.path(step)):
            aside = self.path(step).with_suffix(_DAMAGED)
            remove(aside)
            self.path(step).rename(aside)
        remove(self._record_path(step))


def _check_record(record: Any) -> None:
    """Raises `_Damage` if a record lacks one of its entries or has an entry of another type."""
    wanted = {"format": int, "step": int, "leaves": dict, "digests": dict, "notes": dict}
    if not isinstance(record, dict):
        raise _Damage(f"its record is a {type(record).__name__}")
    if wrong := [name for name, kind in wanted.items() if type(record.get(name)) is not kind]:
        raise _Damage(f"its record lacks {listed(wrong)} or has another type there")
    if record["leaves"].keys() != record["digests"].keys():
        raise _Damage("its record has digests of other leaves")
    for name, leaf in record["leaves"].items():
        if type(leaf) is not list or [*map(type, leaf)] != [list, str]:
            raise _Damage(f"its record has no shape and dtype of {name}")


def _as_jax(path: Any, leaf: Any) -> Any:
    """`leaf` as an array of JAX. **Raises:** `ValueError` if it is one of NumPy whose dtype JAX does not keep."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    native = leaf.dtype.newbyteorder("=")
    try:
        dtype = jax.dtypes.canonicalize_dtype(native)
    except TypeError:
        dtype = None
    if dtype != native:
        name = jax.tree_util.keystr(path)
        raise ValueError(f"{name} must have a dtype that JAX keeps, got {leaf.dtype}")
    return jnp.asarray(leaf.astype(native))


def _is_folder(path: Path) -> bool:
    """Whether a path is a directory or a link, since a step may be moved to another disk and replaced by a link. Only
    the link is then renamed or removed, never its target."""
    return path.is_dir() or path.is_symlink()


def _with_checksum(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return json.dumps({"record": text, "sha256": _sha256(text)})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _raising_everywhere() -> Iterator[None]:
    """A context that raises in all processes if it raises in one of them: if the processes did different things next,
    they would wait for each other for ever.

    **Raises:** in a process with an error, that error; in the other processes, `_Damage` or `ValueError`. If different
    processes have errors of both types, `ValueError` in all of them.
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
            ValueError("another process refuses the checkpoint")
            if verdict == 2
            else _Damage("another process finds it damaged")
        )


def _from_first_process(steps: list[int]) -> list[int]:
    """The steps that the first process sees: a directory's contents may differ between machines for a while."""
    if jax.process_count() == 1:
        return steps
    number = int(multihost_utils.broadcast_one_to_all(np.array(len(steps))))
    mine = np.zeros(number, np.int64)
    mine[: len(steps[:number])] = steps[:number]
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def _short_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _target(leaf: jax.ShapeDtypeStruct, parallelism: Parallelism | None) -> Any:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = one_device if parallelism is None else parallelism.of_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
