"""Tables of final results, in Markdown that reads well as plain text."""

from collections.abc import Sequence

from ._values import short


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A Markdown table with aligned columns: for the terminal and for `results.md` alike.

    **Arguments:** `rows` the cells: floats get four significant digits, None is a dash, anything else its `str` (format
    a number yourself to fix its decimals); `headers` one per column. Columns of numbers are aligned right.

    **Returns:** the lines joined by newlines, without a final one.

    **Raises:** `ValueError` if a row has another number of cells than `headers`.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"rows must have {len(headers)} cells, one per header; got {len(row)} in {list(row)}")
    cells = [[_text(cell) for cell in row] for row in rows]
    columns = [_column(header, [row[i] for row in cells]) for i, header in enumerate(headers)]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return short(cell)
    return str(cell).replace("|", r"\|").replace("\n", " ")


def _column(header: str, cells: list[str]) -> list[str]:
    """Header, rule and cells, all of one width."""
    right = all(_is_number(cell) for cell in cells)
    width = max(len(text) for text in [header, *cells, "---"])
    rule = "-" * (width - 1) + (":" if right else "-")
    return [
        rule if text is None else text.rjust(width) if right else text.ljust(width) for text in [header, None, *cells]
    ]


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return text == "-"
    return True
