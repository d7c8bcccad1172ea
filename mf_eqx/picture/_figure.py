"""What all figures of matplotlib have in common: how they are written, and texts that are shown as they are."""

import io
from pathlib import Path
from typing import Any

from .._files import write_whole


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
