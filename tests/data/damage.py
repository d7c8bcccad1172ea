"""Damage that happens to files, for every format alike. Test files that import this are skipped without Hypothesis."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import example as example, given as given, HealthCheck, settings, strategies as st

# Small files, many of them; the machine may be slow, and fixtures are shared on purpose.
QUICK = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def flips(size):
    """A position in a file of `size` bytes and the bits that change there."""
    return st.tuples(st.integers(0, size - 1), st.integers(1, 255))


def flipped(content, flip):
    position, bits = flip
    changed = bytearray(content)
    changed[position] ^= bits
    return bytes(changed)


def read_all(source):
    """All rows; holds them against what the source says of itself."""
    rows = source.take(np.arange(len(source)))
    assert rows.x.shape == (len(source), *source.row_shape) and rows.x.dtype == source.dtype
    assert (rows.label is None) == (source.labels is None)
    if source.labels is not None:
        assert rows.label.shape == (len(source),) and rows.label.dtype == np.int32
        assert rows.label.min() >= 0 and rows.label.max() < source.labels
    return rows


def opens_or_is_refused(make):
    """Whether `make` gives a source; everything but `ValueError` passes through."""
    try:
        read_all(make())
    except ValueError:
        return False
    return True
