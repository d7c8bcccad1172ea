"""Data on its way in: sources, the one pipeline, and the checks of both.

    source = data.ShardSource("cifar10")                                   or any other AbstractSource
    stream = data.Stream(source, batch=256, seed=0, parallelism=parallelism)
    for batch in stream.batches(start=int(state.step)):
        state, metrics = train_step(state, batch)

The step number is the whole state of a stream. Inside a jitted step nothing can be refused, since a label out of range
reads some row of the table and a NaN spoils everything; so what comes from outside is checked on the host, where it
enters. Imported explicitly (`from mf_eqx import data`); Grain is loaded by the first `Stream`.
"""

from ._array_record import ArrayRecordSource as ArrayRecordSource, decode_npy as decode_npy
from ._augment import Augmentation as Augmentation, EDMAugmentation as EDMAugmentation
from ._check import check_rows as check_rows
from ._cifar10 import read_cifar10 as read_cifar10
from ._draw import DrawRows as DrawRows
from ._idx import read_idx as read_idx
from ._image_folder import ImageFolderSource as ImageFolderSource
from ._npy import NpySource as NpySource
from ._prepare import (
    FromPixels as FromPixels,
    InTurn as InTurn,
    RandomFlip as RandomFlip,
    SamplePosterior as SamplePosterior,
    WithoutLabel as WithoutLabel,
)
from ._shards import ShardSource as ShardSource, write_shards as write_shards
from ._source import (
    AbstractSource as AbstractSource,
    ArraySource as ArraySource,
    JoinedSource as JoinedSource,
    Rows as Rows,
)
from ._stream import Stream as Stream
