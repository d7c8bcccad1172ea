"""The steps in a directory: how their folders are named, which are kept, and what a killed run leaves."""

import dataclasses
import os
from pathlib import Path

from .._files import remove

_DAMAGED, _DELETED = ".damaged", ".deleted"


@dataclasses.dataclass(frozen=True)
class StepFolders:
    """The folders of steps in `directory`, each with a record beside it; `keep_last` and `keep_every` as in
    `Checkpoints`. All methods but the first three write, so only the first process may call them."""

    directory: Path
    keep_last: int
    keep_every: int | None

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / f"{step:08}"

    def record(self, step: int) -> Path:
        """The file with the record of a step."""
        return self.path(step).with_suffix(".json")

    def steps(self) -> list[int]:
        """The steps on disk, in ascending order, whether they can be read or not; broken links are included."""
        if not self.directory.is_dir():
            return []
        named = [path for path in self.directory.iterdir() if path.name.isdecimal() and _is_folder(path)]
        return sorted(int(path.name) for path in named if path == self.path(int(path.name)))

    def prune(self, newest: int) -> None:
        """Remove old steps. Steps after the newest save are not removed: they are steps that `load` skipped."""
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                deleted = self.path(step).with_suffix(_DELETED)
                remove(deleted)
                self.path(step).rename(deleted)  # atomic: a partly deleted step must not look complete
                remove(self.record(step))
                remove(deleted)

    def move_aside(self, step: int) -> None:
        """Make room for a step that is saved again."""
        if os.path.lexists(self.path(step)):
            aside = self.path(step).with_suffix(_DAMAGED)
            remove(aside)
            self.path(step).rename(aside)
        remove(self.record(step))

    def clean(self) -> None:
        """Remove what is partially written or deleted, records without a step, and all but the newest of the steps that
        were moved aside."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if _is_folder(path) and (".orbax-checkpoint-tmp" in path.name or path.suffix == _DELETED):
                remove(path)
        for old in sorted(self.directory.glob(f"*{_DAMAGED}"))[:-1]:
            remove(old)
        for path in self.directory.iterdir():
            if path.suffix == ".json" and path.stem.isdecimal() and not os.path.lexists(path.with_suffix("")):
                remove(path)


def _is_folder(path: Path) -> bool:
    """Whether a path is a directory or a link, since a step may be moved to another disk and replaced by a link. Only
    the link is then renamed or removed, never its target."""
    return path.is_dir() or path.is_symlink()
