r"""The data pipeline: global batches of a source, in a shuffled order that the seed and the step number determine.

    row i of step s  =  order[s B + i],     order = every row once, in a new order each epoch, without end

The global batch is defined first and then split: a process reads only the rows that its devices use. So the rows of a
global batch do not depend on the number of processes and devices, and a run that continues after step s has to know
only s.

Rows are checked here, on the host, because a jitted step cannot raise errors for bad values. Grain (grain-dev/grain)
shuffles, and reads ahead in threads; batches are transferred to the devices while the previous step is still running.
"""

import collections
import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from .._batch import Batch
from .._leaves import by_name, shapes
from .._sharding import Parallelism
from .._validate import as_count, Count
from ._source import AbstractSource, ArraySource, check_source, check_taken

_SAMPLED = 64
_MOST_COMPARED = 2**28  # bytes: a fraction of a second
_ON_DEVICES = 2


class Stream:
    """An endless sequence of batches from a source.

    **Arguments:**

    - `source`: of the rows. The condition of a batch is their labels, or their other condition, or None.
    - `batch`: number of rows in a global batch.
    - `seed`: of the random order.
    - `parallelism`: how rows are distributed over devices, or None for one device.
    - `shuffle`: False for the source's own order.
    - `threads`: number of threads that read ahead.
    - `ahead`: number of batches that are read ahead on the host. Two more are on the devices.

    **Raises:** `ValueError` if the source's dtype cannot be trained on (it is neither uint8 nor floating point of at
    most 64 bits), if a number is not an integer or too small, if the source has fewer rows than a batch, or if the
    number of rows in a batch is not a multiple of the number of devices.
    """

    def __init__(
        self,
        source: AbstractSource,
        batch: Count,
        *,
        seed: Count = 0,
        parallelism: Parallelism | None = None,
        shuffle: bool = True,
        threads: Count = 2,
        ahead: Count = 4,
    ):
        check_source(source)
        batch = as_count("batch", batch)
        if batch > len(source):
            raise ValueError(f"batch must lie in [1, {len(source)}], the rows of {source.name}, got {batch}")
        self.source, self.batch, self.seed, self.shuffle = source, batch, as_count("seed", seed, 0), shuffle
        self._parallelism, self._threads = parallelism, as_count("threads", threads)
        self._ahead = as_count("ahead", ahead)
        self._positions = np.arange(batch) if parallelism is None else parallelism.positions(batch)
        self._order = _order(len(source), self.seed, shuffle)

    def __getitem__(self, step: Count) -> Batch:
        """The batch of a step, counted from 0, on the host: the rows for the devices of this process.

        **Raises:** `ValueError` that names the source, and the row for a label out of range or a value that is not
        finite; also for rows or conditions of another shape or dtype than the source declares.
        """
        return self._read(self._rows(step, self._positions), self._positions)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """The sharding of rows over the devices; None on one device."""
        return None if self._parallelism is None else self._parallelism.rows

    def rows(self, step: Count) -> Int[np.ndarray, " batch"]:
        """The numbers of all rows of a step's global batch."""
        return self._rows(step, np.arange(self.batch))

    def batches(self, start: Count = 0, stop: Count | None = None) -> Iterator[Batch]:
        """Batches on the devices, from step `start` up to but not including `stop`, or without end."""
        import grain

        first, end = as_count("step", start, 0), sys.maxsize if stop is None else as_count("stop", stop, 0)
        steps = grain.MapDataset.range(first, end)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._ahead)
        host = iter(steps.map(self.__getitem__).to_iter_dataset(options))
        return _prefetched(map(self._place, host))

    def fingerprint(self) -> dict[str, Any]:
        """A description of the data and their order, which differs between streams of different batches. Of a source
        without a digest only 64 rows are compared, unless it is an `ArraySource` of at most 256 MiB."""
        source = self.source
        rows = len(source) if isinstance(source, ArraySource) and source.x.nbytes <= _MOST_COMPARED else _SAMPLED
        sampled = np.unique(np.linspace(0, len(source) - 1, rows).astype(np.int64))
        x, label, condition = source.take(sampled)
        digest = hashlib.sha256(np.ascontiguousarray(x).tobytes())
        digest.update(b"" if label is None else label.astype("<i8").tobytes())
        for leaf in jax.tree.leaves(condition):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return {
            "rows": len(source),
            "row_shape": list(source.row_shape),
            "dtype": str(source.dtype),
            "labels": source.labels,
            "sampled_rows_sha256": digest.hexdigest(),
            "digest": source.digest,
            "batch": self.batch,
            "seed": self.seed if self.shuffle else None,
            "condition": shapes(by_name("condition", source.row_condition)),
        }

    def _rows(self, step: Count, positions: Int[np.ndarray, " local"]) -> Int[np.ndarray, " local"]:
        first = as_count("step", step, 0) * self.batch
        return np.array([self._order[first + int(i)] for i in positions], np.int64)

    def _read(self, rows: Int[np.ndarray, " local"], positions: Int[np.ndarray, " local"]) -> Batch:
        read = self.source.take(rows)
        check_taken(self.source, rows, read)
        condition = read.condition if read.label is None else read.label
        return Batch(read.x, condition, positions.astype(np.int32))

    def _place(self, batch: Batch) -> Batch:
        if self._parallelism is None:
            return jax.device_put(batch)
        return self._parallelism.place(batch, self.batch)


def _order(rows: int, seed: int, shuffle: bool) -> Any:
    """An endless sequence of row numbers, in a new order in each epoch."""
    import grain

    numbers = grain.MapDataset.range(rows)
    return (numbers.seed(seed).shuffle() if shuffle else numbers).repeat()


def _prefetched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each requested before the one in front of it is handed out: its transfer to the devices starts
    at once and runs in the background."""
    waiting = collections.deque(itertools.islice(batches, _ON_DEVICES))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(batches, 1))
