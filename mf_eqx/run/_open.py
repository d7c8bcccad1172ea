"""The directory that a configuration belongs to, new or continued, for one process tree at a time."""

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
from ._directory import as_json, RunDirectory
from ._lock import in_place, locked
from ._processes import agree, is_out_of_memory, once
from ._settings import default_name, difference, recipe

_OF_EVERY_START = (".lock", "config.json", "starts.jsonl")


@contextlib.contextmanager
def opened(
    config: Any, *, root: str | Path = "runs", script: str | None = None, shared: str | None = None
) -> Iterator[RunDirectory]:
    """The directory `root/script/name` of a run, made or found, and locked while the context lasts.

    Its name is `config.name`, if there is one, or made of all fields that say what is learnt, so that the same command
    finds the same directory. With `config.test_run` it is another one beside it, begun anew; with `config.dry_run`
    nothing is made.

    **Arguments:** `config` a `Settings` or another dataclass; `root` of all runs; `script` the name of the running
    script by default; `shared` None, or the name of a directory that all configurations share: what they leave there
    is found by its own settings, as in a `Ledger`.

    **Raises:** `ValueError` if `config.name` does not stay below `root/script`, or names a run of another
    configuration, with what differs; `InUse` if another process trains there. Nothing is changed then. `Moved` at the
    end if the directory is no longer where it was, from where on nothing is written.
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
    """Lock the directory, in the first process; check that it is this run's, or make it so."""
    _check_kind(path)
    if is_test:
        _check_is_test(path)
    elif not is_shared:
        _check_recipe(config, path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(path))
    if is_test:
        _empty(path)
    remove_temporary_files(path)
    stack.enter_context(_taken_back_if_refused(path, made))
    stack.enter_context(in_place(path))
    RunDirectory(path).add_start(config)


@contextlib.contextmanager
def _taken_back_if_refused(path: Path, made: list[Path]) -> Iterator[None]:
    """A context after whose refusal, of bad input before anything was trained, the directory is as it was; `made` are
    it and those above it that were new."""
    starts = path / "starts.jsonl"
    before = _others(path)
    size = starts.stat().st_size if starts.is_file() else 0
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ValueError | OSError | MissingDependency) or is_out_of_memory(error)
        if refused and _others(path) == before:
            if made:
                shutil.rmtree(path, ignore_errors=True)
            elif starts.is_file():
                os.truncate(starts, size)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # another run is in it
                    folder.rmdir()
        raise


def _others(path: Path) -> dict[Path, int]:
    """All files but those that every start writes, with the time of their last change."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in _OF_EVERY_START]
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
    settings = as_json(config).keys() - recipe(config).keys()
    if found := difference({k: v for k, v in saved.items() if k not in settings}, recipe(config)):
        raise ValueError(f"name must be that of a run with this configuration, but in {path} {found}")


def _check_is_test(path: Path) -> None:
    """Refuses to begin anew what is no test run."""
    if (saved := _saved_config(path)) is not None and not saved.get("test_run"):
        raise ValueError(f"name must leave room for a test run, but {path} has another run")


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
