"""Results of many small runs, kept as they come: a script that is started again does only what is missing."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._directory import as_json, commit


class Ledger:
    """Results by their settings, in a file of one JSON object per line.

    A result is found again by *all* of its settings: another number of steps is another key. It is found whatever the
    commit, which is written beside it; `commits` says which ones they were.

    **Arguments:** `path` of the file, read now if it exists; a last line that was cut off by a crash is left out.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._commit = commit(Path(sys.argv[0]).parent)
        self._results: dict[str, Any] = {}
        self._commits: dict[str, str | None] = {}
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            for line in text.splitlines(keepends=True):
                if line.endswith("\n"):
                    record = json.loads(line)
                    self._results[_text(record["settings"])] = record["result"]
                    self._commits[_text(record["settings"])] = record["commit"]
            if not text.endswith("\n"):
                self._path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")

    def __contains__(self, settings: Any) -> bool:
        return _text(settings) in self._results

    def __getitem__(self, settings: Any) -> Any:
        return self._results[_text(settings)]

    @property
    def commits(self) -> set[str | None]:
        """Of all results that are kept."""
        return set(self._commits.values())

    def put(self, settings: Any, result: Mapping[str, Any]) -> None:
        """Keep a result. It is in the file when this returns.

        **Arguments:** `settings` a dataclass or anything else that JSON can hold; `result` plain numbers, lists, texts.
        """
        record = {"settings": as_json(settings), "result": dict(result), "commit": self._commit}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._results[_text(settings)] = record["result"]
        self._commits[_text(settings)] = self._commit


def _text(settings: Any) -> str:
    return json.dumps(as_json(settings), sort_keys=True)
