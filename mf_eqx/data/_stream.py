r"""The one pipeline: global batches of a source, in a shuffled order that the seed and the step number determine.

    row i of step s  =  order[s B + i],     order = every row once, in a new order each epoch, for ever

First the global batch is defined, then it is cut: a process reads only those of its rows that its devices need. So the
same rows meet in one batch however many processes and devices there are, and a run that continues after step s needs to
know nothing but s.

What is read is checked here, on the host: a step can refuse nothing. Grain (grain-dev/grain) shuffles, and reads ahead
in threads; batches are put on the devices while the step before is still computing.
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
from .._sharding import Parallelism
from .._validate import as_count, Count
from ._source import AbstractSource, check_source, check_taken

_SAMPLED = 64


class Stream:
    """Batches of a source, without end.

    **Arguments:**

    - `source`: of the rows.
    - `batch`: rows of a global batch.
    - `seed`: of the order.
    - `parallelism`: None for one device, or how rows are spread over devices.
    - `shuffle`: False for the source's own order.
    - `threads`: that read ahead; `ahead` how many batches are read ahead on the host. Two more are on the devices.

    **Raises:** `ValueError` if data of the source's dtype cannot be trained on (they are neither uint8 nor floating
    point of at most 64 bits), if a number is no integer or too small, if the source has fewer rows than a batch, or if
    the devices do not divide the batch.
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
        """The batch of a step, counted from 0, on the host: those rows that this process needs.

        **Raises:** `ValueError` that names source and row for a label out of range, a value that is not finite, or rows
        of another shape or dtype than the source says.
        """
        return self._read(self._rows(step, self._positions), self._positions)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Where rows lie on the devices; None on one device."""
        return None if self._parallelism is None else self._parallelism.rows

    def rows(self, step: Count) -> Int[np.ndarray, " batch"]:
        """The numbers of all rows of a step's global batch."""
        return self._rows(step, np.arange(self.batch))

    def batches(self, start: Count = 0, stop: Count | None = None) -> Iterator[Batch]:
        """Batches on the devices, from step `start` on, up to `stop` or for ever."""
        import grain

        first, end = as_count("step", start, 0), sys.maxsize if stop is None else as_count("stop", stop, 0)
        steps = grain.MapDataset.range(first, end)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._ahead)
        host = iter(steps.map(self.__getitem__).to_iter_dataset(options))
        return _placed(map(self._place, host))

    def fingerprint(self) -> dict[str, Any]:
        """What the data are: different for a stream of other batches. Of the rows, 64 are looked at; all of them count
        where the source knows a digest."""
        source = self.source
        sampled = np.unique(np.linspace(0, len(source) - 1, _SAMPLED).astype(np.int64))
        x, label = source.take(sampled)
        digest = hashlib.sha256(np.ascontiguousarray(x).tobytes())
        digest.update(b"" if label is None else label.astype("<i8").tobytes())
        return {
            "rows": len(source),
            "row_shape": list(source.row_shape),
            "dtype": str(source.dtype),
            "labels": source.labels,
            "sampled_rows_sha256": digest.hexdigest(),
            "digest": source.digest,
            "batch": self.batch,
            "seed": self.seed if self.shuffle else None,
        }

    def _rows(self, step: Count, positions: Int[np.ndarray, " local"]) -> Int[np.ndarray, " local"]:
        first = as_count("step", step, 0) * self.batch
        return np.array([self._order[first + int(i)] for i in positions], np.int64)

    def _read(self, rows: Int[np.ndarray, " local"], positions: Int[np.ndarray, " local"]) -> Batch:
        read = self.source.take(rows)
        check_taken(self.source, rows, read)
        return Batch(read.x, read.label, positions.astype(np.int32))

    def _place(self, batch: Batch) -> Batch:
        if self._parallelism is None:
            return jax.device_put(batch)
        return self._parallelism.place(batch, self.batch)


def _order(rows: int, seed: int, shuffle: bool) -> Any:
    """Row numbers without end, each epoch in a new order."""
    import grain

    numbers = grain.MapDataset.range(rows)
    return (numbers.seed(seed).shuffle() if shuffle else numbers).repeat()


def _placed(batches: Iterator[Batch], ahead: int = 2) -> Iterator[Batch]:
    """The same, each asked for two before it is needed: a transfer starts at once and does not wait for its end."""
    waiting = collections.deque(itertools.islice(batches, ahead))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(batches, 1))
