"""How all figures of matplotlib are made and written, and texts that are shown as they are."""

import io
from pathlib import Path
from typing import Any

from .._files import write_whole
from .._optional import optional


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, which keeps its parts from overlapping. It needs no display.

    **Arguments:** `width` and `height` in hundreds of pixels.

    **Raises:** `MissingDependency` without matplotlib.
    """
    with optional("matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save_figure(path: str | Path, figure: Any) -> None:
    """Write any figure of matplotlib as a PNG file, whole or not at all. Folders above it are made.

    **Raises:** `OSError` that names the file if it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi="figure")
    write_whole(path, content.getvalue())


def plain(text: str) -> str:
    """`text` for matplotlib, which would take what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")
