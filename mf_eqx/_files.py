"""Files that are whole at any moment, and what is removed with what it holds."""

import os
import shutil
from pathlib import Path

_PART = ".part"


def write_whole(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Write a file, and the folders that it is in: under its name there is what was there before, or all of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + _PART)
    try:
        with beside.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses power may keep the new name without the content
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; of a symbolic link, the link alone. Nothing if there is
    none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what `write_whole` left of files in a folder, and below, when its process was killed."""
    for path in folder.rglob(f"*{_PART}"):
        if path.is_file():
            path.unlink()
