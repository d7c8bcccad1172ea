"""Training data: sources of rows, the pipeline that makes batches of them, and the checks of both.

    source = data.ShardSource("cifar10")                                   or any other AbstractSource
    stream = data.Stream(source, batch=256, seed=0, parallelism=parallelism)
    for batch in stream.batches(start=int(state.step)):
        state, metrics = train_step(state, batch)

The step number is the whole state of a stream. A jitted step cannot raise an error for bad values: a label out of range
gives NaN, or another row of the table in a network of one's own, and one NaN reaches all parameters. So data from
outside are checked on the host, before they are put on a device. Import this part explicitly (`from mf_eqx import
data`); the first `Stream` imports Grain.
"""

from ._array_record import ArrayRecordSource as ArrayRecordSource, decode_npy as decode_npy
from ._augment import Augmentation as Augmentation, EDMAugmentation as EDMAugmentation
from ._check import check_rows as check_rows
from ._cifar10 import read_cifar10 as read_cifar10
from ._draw import DrawRows as DrawRows
from ._idx import read_idx as read_idx
from ._image_folder import ImageFolderSource as ImageFolderSource
from ._npy import NpySource as NpySource
from ._optimal_pairs import optimal_pairs as optimal_pairs
from ._prepare import (
    FromPixels as FromPixels,
    InTurn as InTurn,
    RandomFlip as RandomFlip,
    SamplePosterior as SamplePosterior,
    TakeEps as TakeEps,
    WithoutLabel as WithoutLabel,
)
from ._shard_source import ShardSource as ShardSource
from ._shard_writer import write_shards as write_shards
from ._source import (
    AbstractSource as AbstractSource,
    ArraySource as ArraySource,
    JoinedSource as JoinedSource,
    Rows as Rows,
)
from ._stream import Stream as Stream
