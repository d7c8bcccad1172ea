"""Results of many small runs, saved one by one: a script that is started again computes only the missing ones."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .._files import named_in_errors, read_regular
from .._json import parse_json
from ._directory import as_json, commit
from ._lock import check_in_place

_LARGEST_FILE = 1 << 30
"""Bytes."""


class Ledger:
    """Results by their settings, in a file of one JSON object per line.

    The key of a result is *all* of its settings: another number of steps is another key. The commit is not part of the
    key; it is stored beside the result (`commit` returns it).

    Several processes may add to one file; each has the results that were there when it started, and its own.

    **Arguments:** `path` of the file, which is read at once if it exists. A last line that was cut off by a crash is
    ignored, and the next `put` removes it.

    **Raises:** `ValueError` if any other line is not a ledger's, or if the file is not a regular file or is larger than
    a GiB.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._commit = commit(Path(sys.argv[0]).parent)
        self._results: dict[str, Any] = {}
        self._commits: dict[str, str | None] = {}
        data = read_regular(self._path, _LARGEST_FILE) if self._path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                self._read(number, line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = parse_json(line, finite=False)
            key, result, commit_of_result = _key(record["settings"]), record["result"], record["commit"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path}, line {number}, must be a result of a ledger: {error}") from error
        self._results[key], self._commits[key] = result, commit_of_result

    def __contains__(self, settings: Any) -> bool:
        return _key(settings) in self._results

    def __getitem__(self, settings: Any) -> Any:
        return self._results[_key(settings)]

    def commit(self, settings: Any) -> str | None:
        """The commit that a result was made at; None outside git."""
        return self._commits[_key(settings)]

    def put(self, settings: Any, result: Mapping[str, Any]) -> None:
        """Save a result. It is in the file when this returns.

        **Arguments:** `settings` a dataclass or anything else that JSON can hold: numbers, texts, lists of them, but no
        Modules, whose class would be lost; `result` plain numbers, lists, texts.

        **Raises:** `Moved` if the directory of the file was locked by `opened` and has been moved.
        """
        check_in_place(self._path.parent)
        record = {"settings": as_json(settings), "result": dict(result), "commit": self._commit}
        line = (json.dumps(record) + "\n").encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with named_in_errors(self._path), self._path.open("a+b") as file:
            self._drop_cut_off_line(file)
            file.write(line)
        self._results[_key(settings)] = record["result"]
        self._commits[_key(settings)] = self._commit

    def _drop_cut_off_line(self, file: BinaryIO) -> None:
        """Remove the last line if a crash has cut it off."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _key(settings: Any) -> str:
    return json.dumps(as_json(settings), sort_keys=True)
