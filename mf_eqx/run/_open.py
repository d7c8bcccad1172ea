"""The directory that belongs to a configuration, new or continued, for one process tree at a time."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import remove, remove_temporary_files
from .._json import read_json_object
from .._optional import MissingDependency
from ._directory import RunDirectory
from ._lock import in_place, locked
from ._processes import agree, is_out_of_memory, once, tell
from ._settings import default_name, difference, recipe

_LONGER = (
    "the number of steps cannot be changed where it shapes what is learnt, such as a schedule of the learning rate: "
    "{flags} begins a new run from the state of that one"
)
_WRITTEN_AT_EVERY_START = (".lock", "config.json", "starts.jsonl")


@contextlib.contextmanager
def opened(
    config: Any, *, root: str | Path = "runs", script: str | None = None, shared: str | None = None
) -> Iterator[RunDirectory]:
    """A context with the directory `root/script/name` of a run, which is created if it does not exist, and is locked
    while the context lasts.

    Its name is `config.name` if that is given, otherwise a digest of all fields that determine what is learnt, so that
    the same command finds the same directory. With `config.test_run`, it is a separate directory beside it, which is
    emptied first; with `config.dry_run`, nothing is created.

    **Arguments:** `config` a `Settings` or another dataclass; `root` of all runs; `script` the name of the running
    script by default; `shared` None, or the name of a directory that all configurations share; each result in it must
    be stored with its own settings, as in a `Ledger`.

    **Raises:** `ValueError` if `config.name` is not below `root/script`, or names a run of another configuration (the
    message says what differs); `InUse` if another process trains there. In these cases nothing is changed. `Moved` at
    the end if the directory was moved; after the move nothing is written.
    """
    parent = Path(root) / (Path(sys.argv[0]).stem if script is None else script)
    given = getattr(config, "name", "")
    name = Path(given or shared or default_name(config))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ValueError(f"name must be a path below {parent}, got {given!r}")
    is_test = getattr(config, "test_run", False)
    path = parent / (name.with_name(name.name + "-test") if is_test else name)
    if getattr(config, "dry_run", False):
        yield RunDirectory(path)
        return
    agree("config", {"path": str(path), "config": recipe(config)})
    with contextlib.ExitStack() as stack:
        once(lambda: _enter(stack, config, path, is_test, shared is not None))
        yield RunDirectory(path)


def _enter(stack: contextlib.ExitStack, config: Any, path: Path, is_test: bool, is_shared: bool) -> None:
    """Check that the directory is new or belongs to this run, lock it, and record the start, in the first process."""
    _check_kind(path)
    if is_test:
        _check_is_test(path)
    elif not is_shared:
        _check_recipe(config, path)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(path))
    if is_test:
        _empty(path)
    remove_temporary_files(path)
    stack.enter_context(_restored_if_refused(path, created))
    stack.enter_context(in_place(path))
    if path in created and not is_test and not is_shared:
        _tell_of_others(config, path)
    RunDirectory(path).add_start(config)


@contextlib.contextmanager
def _restored_if_refused(path: Path, created: list[Path]) -> Iterator[None]:
    """A context that restores the directory if bad input is refused before anything was trained. `created` lists the
    directory and its parents, as far as they are new."""
    starts = path / "starts.jsonl"
    before = _other_files(path)
    size = starts.stat().st_size if starts.is_file() else 0
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ValueError | OSError | MissingDependency) or is_out_of_memory(error)
        if refused and _other_files(path) == before:
            if created:
                shutil.rmtree(path, ignore_errors=True)
            elif starts.is_file():
                os.truncate(starts, size)
            for folder in created[1:]:
                with contextlib.suppress(OSError):  # it contains another run
                    folder.rmdir()
        raise


def _other_files(path: Path) -> dict[Path, int]:
    """All files except those that every start writes, with the times of their last changes."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in _WRITTEN_AT_EVERY_START]
    return {file: file.stat().st_mtime_ns for file in files}


def _check_kind(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"name must be that of a directory, got {path}")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").exists() and not (path / ".lock").exists():
        raise ValueError(f"name must be that of a run or new, but {path} has files and no config.json")


def _check_recipe(config: Any, path: Path) -> None:
    """Refuses to continue another run."""
    if (saved := _saved_config(path)) is None:
        return
    saved = recipe(config, saved)
    if change := difference(saved, recipe(config)):
        hint = f"; {_longer(path)}" if _differs_in_steps(saved, config) else "; a new run takes another name"
        raise ValueError(f"name must be that of a run with this configuration, but in {path} {change}{hint}")


def _differs_in_steps(saved: dict[str, Any], config: Any) -> bool:
    """Whether a run differs in nothing but the number of steps, and the script can start from its state."""
    current = recipe(config)
    both = "steps" in current and hasattr(config, "start")
    return both and saved != current and {**saved, "steps": 0} == {**current, "steps": 0}


def _longer(path: Path) -> str:
    """How the run in a directory is continued to more steps. Where it has several trainings, one must be chosen."""
    trainings = sorted(folder.parent for folder in path.glob("*/checkpoints"))
    return _LONGER.format(flags=" or ".join(f"--start {folder}" for folder in (trainings or [path])))


def _tell_of_others(config: Any, path: Path) -> None:
    """Print which other run has the same configuration under another name, or the same but for the number of steps."""
    for other in sorted(path.parent.glob("*/config.json")):
        with contextlib.suppress(OSError, ValueError):
            saved = _saved_config(other.parent) or {}
            if other.parent == path or saved.get("test_run"):
                continue
            saved = recipe(config, saved)
            if _differs_in_steps(saved, config):
                tell(f"{path}: a new run; {_longer(other.parent)}")
            elif saved == recipe(config) and not getattr(config, "name", ""):
                name = other.parent.name
                tell(f"{path}: a new run; {other.parent} has the same configuration, and --name {name} continues it")


def _check_is_test(path: Path) -> None:
    """Refuses to empty a directory that does not belong to a test run."""
    if (saved := _saved_config(path)) is not None and not saved.get("test_run"):
        raise ValueError(f"name must be free for a test run, but {path} has another run")


def _saved_config(path: Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory, if there is one."""
    file = path / "config.json"
    if not file.exists():
        return None
    saved = read_json_object(file).get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: must be the configuration of a run, got {saved!r}"[:200])
    return saved


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name != ".lock":
            remove(entry)
