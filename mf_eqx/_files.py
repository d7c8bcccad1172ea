"""Files that are whole at any moment."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, and the folders that it is in: under its name there is what was there before, or all of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses power may keep the new name without the content
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
