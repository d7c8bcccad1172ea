"""The directory of one run: what was run, on which software and hardware, and the results.

runs/<script>/<name>/config.json     configuration, command, versions, device, commit
                     starts.jsonl    command, versions, device, commit of each start of a run that may be continued
                     metrics.jsonl   one JSON object per line, each with its step
                     summary.json    how the time was spent
                     ...             pictures, results, any other file that is written to a `path`
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import ArrayLike

from .._files import append, read_regular, write_whole
from .._json import parse_json, read_json_object
from .._mean import Mean
from ._lock import check_in_place
from ._values import fetch

_LARGEST_LOG = 1 << 30
"""Bytes of metrics.jsonl; about three million lines."""
_LONGEST_SESSION = 1e12
"""Seconds. A session in a summary that lists a longer time is ignored as damaged."""
CREATED: list[Path] = []
"""The directories that `RunDirectory.create` has made in this process."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The files of one run. `RunDirectory.create` makes a new directory; the constructor makes none.

    **Arguments:** `root` the directory; `opened` the time at which it was opened, in seconds of `time.perf_counter`.
    """

    root: Path
    opened: float = dataclasses.field(default_factory=time.perf_counter, compare=False, repr=False)

    @classmethod
    def create(
        cls, config: Any, name: str | None = None, *, root: str | Path = "runs", script: str | None = None
    ) -> "RunDirectory":
        """A new directory `root/script/name` with its `config.json`.

        **Arguments:** `config` of the run, a dataclass; `name` of the run, the time of day by default; `root` of all
        runs; `script` the name of the running script by default.

        **Raises:** `ValueError` if `name` is not below `root/script`, or names anything but a new or empty
        directory. In this case nothing is changed.
        """
        parent = Path(root) / (Path(sys.argv[0]).stem if script is None else script)
        directory = cls(_new_by_time(parent) if name is None else _new_by_name(parent, name))
        CREATED.append(directory.root.absolute())
        write_whole(directory.path("config.json"), _document(as_json({"config": config, **_provenance()})))
        return directory

    def add_start(self, config: Any) -> None:
        """Write `config.json` if there is none yet, and a line of `starts.jsonl` with command, versions and devices."""
        start = _provenance()
        if not (self.root / "config.json").exists():
            write_whole(self.path("config.json"), _document(as_json({"config": config, **start})))
        append(self.path("starts.jsonl"), (json.dumps(as_json(start)) + "\n").encode())

    def path(self, name: str) -> Path:
        """The path of the file `name`, whose parent directories are created: `path("previews/000500.png")`.

        **Raises:** `Moved` if the directory was locked by `opened` and has been moved.
        """
        check_in_place(self.root)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, step: int, metrics: Mapping[str, Mean | ArrayLike]) -> None:
        """Append a line to `metrics.jsonl`. It is in the file when this returns.

        **Arguments:** `step` number of finished steps; `metrics` of the last one, as returned by `TrainStep`, or plain
        numbers. Fetching them waits for the device, so do not log every step. Numbers that are not finite become null.
        """
        record = {"step": int(step), **{name: _or_null(value) for name, value in fetch(metrics).items()}}
        append(self.path("metrics.jsonl"), (json.dumps(record, allow_nan=False) + "\n").encode())

    def records(self) -> list[dict[str, Any]]:
        """All records in `metrics.jsonl`. A last line that was cut off by a crash is ignored.

        **Raises:** `ValueError`, which names the file, if it is not a regular file or is larger than a GiB;
        `ValueError`, which names file and line, if any other line is not a record.
        """
        path = self.root / "metrics.jsonl"
        return _records(path, read_regular(path, _LARGEST_LOG)) if path.exists() else []

    def drop_records_after(self, step: int) -> int:
        """Remove the records after a step, and a line that was cut off: a run that continues logs them again.

        **Returns:** the number of remaining lines.
        """
        check_in_place(self.root)
        path = self.root / "metrics.jsonl"
        content = read_regular(path, _LARGEST_LOG) if path.exists() else b""
        remaining = [record for record in _records(path, content) if record["step"] <= step]
        if content:
            text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in remaining).encode()
            if text != content:
                write_whole(path, text)
        return len(remaining)

    def add_session(self, start: int, stop: int, seconds: Mapping[str, float]) -> None:
        """Add a session to `summary.json`: how the time between two steps was spent. Update the sums over all sessions.

        **Arguments:** `start` and `stop` the numbers of steps finished before and after the session; `seconds` of each
        part, among them `steps`, the productive time, and `wall`, the sum of all parts; each is the sum over all
        threads. Sessions that were killed are missing in the sums.
        """
        path = self.path("summary.json")
        sessions = _sessions(path)
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        sessions.append({"start": start, "stop": stop, "seconds": rounded})
        sums = {name: round(sum(session["seconds"].get(name, 0.0) for session in sessions), 3) for name in rounded}
        goodput = sums["steps"] / sums["wall"] if sums["wall"] > 0 else None
        summary = {"steps": stop, "goodput": goodput, "seconds": sums, "sessions": sessions}
        write_whole(path, _document(summary))

    def save_results(self, text: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Write `results.md` and `results.json`: the same results for people and for programs.

        **Arguments:** `text` Markdown; `records` plain numbers, texts, lists and dictionaries of them. Numbers that are
        not finite become null.
        """
        write_whole(self.path("results.md"), (text.rstrip("\n") + "\n").encode())
        write_whole(self.path("results.json"), _document(_or_null(list(records))))


def remove_unused(created: Iterable[Path]) -> None:
    """Remove the directories that contain nothing but `config.json`, and their parents if these are then empty."""
    for path in created:
        if path.is_dir() and {entry.name for entry in path.iterdir()} <= {"config.json"}:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # the parent contains other runs
                path.parent.rmdir()
                path.parent.parent.rmdir()


def missing_lines(directory: RunDirectory, lines: int, written: int, step: int) -> str:
    """A warning that a log has not as many lines as when the checkpoint was saved."""
    path = directory.root / "metrics.jsonl"
    return f"{path}: must have {written} lines up to step {step}, but has {lines}; the run continues nevertheless"


def _document(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _records(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The records of a log, without a last line that was cut off."""
    lines = content.split(b"\n")[:-1]
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The record in a line of a log, which must be a JSON object with its step."""
    rule = f"{path}, line {number}: must be a record with a step"
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{rule}, but it cannot be read: {error}") from error
    if not isinstance(record, dict) or type(step := record.get("step")) is not int or step < 0:
        raise ValueError(f"{rule}, an integer >= 0, got {line[:60].decode(errors='replace')!r}")
    return record


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions in a summary. An empty list if the file is missing or unreadable: it is only statistics."""
    try:
        sessions = read_json_object(path)["sessions"]
        return [session for session in sessions if all(map(_is_time, session["seconds"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LONGEST_SESSION


def _new_by_name(parent: Path, name: str) -> Path:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"name must be a path below {parent}, got {name!r}")
    path = parent / relative
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"name must be that of a new run, got {name!r}, but {path} has files: choose another name or remove them"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _new_by_time(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    name, copy = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
    while True:  # two runs may start within one second
        path = parent / (name if copy == 1 else f"{name}_{copy}")
        try:
            path.mkdir()
        except FileExistsError:
            copy += 1
        else:
            return path


def _provenance() -> dict[str, Any]:
    return {"command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **made_by()}


def made_by() -> dict[str, Any]:
    """The software and hardware of a run: versions, devices and commit."""
    devices = jax.devices()
    return {
        "versions": _versions(),
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "commit": commit(Path(sys.argv[0]).parent),
    }


def _versions() -> dict[str, str]:
    package = __name__.partition(".")[0]  # from the package itself: a checkout that is not installed has no metadata
    others = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "equinox", "optax", "numpy")}
    return {"python": platform.python_version(), package: sys.modules[package].__version__, **others}


def commit(directory: Path) -> str | None:
    """The commit of the script, with `-dirty` if files were changed since; None outside git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def as_json(value: Any) -> Any:
    """`value` with everything that JSON cannot hold written as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _or_null(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_or_null(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _or_null(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
