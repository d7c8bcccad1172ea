"""Checksums of rows, which shards store beside the data.

Disks, memory and copying can change bytes without an error, and training would use the changed values. So a
`ShardSource` compares the CRC-32 of every row that it returns: a change within 32 successive bits is always detected,
any other change with probability 1 - 2^-32.
"""

import zlib

import numpy as np
from jaxtyping import Int, Shaped, UInt32


def row_checksums(
    label: Int[np.ndarray, " rows"], *arrays: Shaped[np.ndarray, "rows ..."]
) -> UInt32[np.ndarray, " rows"]:
    """The CRC-32 of the little-endian bytes of each row, as in the files, one array after the other, with the row's
    label as the starting value."""
    checksums = label.tolist()
    for array in arrays:
        rows = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        content, size = rows.reshape(-1).view(np.uint8).data, rows.nbytes // max(1, len(rows))
        checksums = [zlib.crc32(content[i * size : (i + 1) * size], start) for i, start in enumerate(checksums)]
    return np.array(checksums, np.uint32)
