"""The teacher of a training, for methods that evaluate it."""

from .._field import AbstractField
from .._row import Row


def teacher_of(row: Row, method: str) -> AbstractField:
    """The teacher of the row's context, which a method evaluates without a key.

    **Arguments:** `row`; `method` that needs the teacher, by name.

    **Raises:** `ValueError` without a teacher.
    """
    if row.context is None or row.context.teacher is None:
        raise ValueError(f"context must have a teacher for {method}, got none")
    return row.context.teacher
