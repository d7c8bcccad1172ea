"""The directory that a configuration belongs to, new or continued, for one process tree at a time."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ._directory import as_json, RunDirectory
from ._lock import locked
from ._processes import once
from ._settings import default_name, difference, recipe, Settings


@contextlib.contextmanager
def opened(config: Settings, *, root: str | Path = "runs", script: str | None = None) -> Iterator[RunDirectory]:
    """The directory `root/script/name` of a run, made or found, and locked while the context lasts.

    With `config.test_run` it is another one beside it, begun anew; with `config.dry_run` nothing is made.

    **Arguments:** `config`, whose `name` is by default made of all its fields that say what is learnt; `root` of all
    runs; `script` the name of the running script by default.

    **Raises:** `ValueError` if `config.name` does not stay below `root/script`, or names a run of another
    configuration, with what differs; `InUse` if another process trains there. Nothing is changed then.
    """
    parent = Path(root) / (Path(sys.argv[0]).stem if script is None else script)
    name = Path(config.name or default_name(config))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ValueError(f"name must be a path below {parent}, got {config.name!r}")
    path = parent / (name.with_name(name.name + "-test") if config.test_run else name)
    if config.dry_run:
        yield RunDirectory(path)
        return
    with contextlib.ExitStack() as stack:
        once(lambda: _enter(stack, config, path))
        yield RunDirectory(path)


def _enter(stack: contextlib.ExitStack, config: Settings, path: Path) -> None:
    """Lock the directory, in the first process; check that it is this run's, or make it so."""
    _check_kind(path)
    if not config.test_run:
        _check_recipe(config, path)
    path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(path))
    if config.test_run:
        _empty(path)
    RunDirectory(path).add_start(config)


def _check_kind(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"name must be that of a directory, got {path}")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").exists() and not (path / ".lock").exists():
        raise ValueError(f"name must be that of a run or new, but {path} has files and no config.json")


def _check_recipe(config: Settings, path: Path) -> None:
    """Refuses to continue another run."""
    file = path / "config.json"
    if not file.exists():
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: must be the configuration of a run, but it cannot be read: {error}") from error
    settings = as_json(config).keys() - recipe(config).keys()
    if found := difference({k: v for k, v in saved.items() if k not in settings}, recipe(config)):
        raise ValueError(f"name must be that of a run with this configuration, but in {path} {found}")


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
