"""Where tensors live: header bytes -> `TensorInfo`, byte range -> view."""

from mmsplit.checkpoint.checkpoint import Checkpoint, Shard, open_checkpoint, read_checkpoint
from mmsplit.checkpoint.directory import choose_checkpoint_files
from mmsplit.checkpoint.file_reader import FileReader, Fingerprint, IoMode, Scratch, aligned_buffer
from mmsplit.checkpoint.kept_storage import KeptShard, KeptSource, open_kept_checkpoint
from mmsplit.checkpoint.local_storage import LocalStorage
from mmsplit.checkpoint.read_ahead import ShardRange, iter_with_read_ahead
from mmsplit.checkpoint.reader_pool import ReaderPool
from mmsplit.checkpoint.shard_hasher import ShardHasher
from mmsplit.checkpoint.storage import Identity, RangeReader, ShardReaders, Storage
from mmsplit.checkpoint.tensor import (
    ByteRange,
    ShardHeader,
    ShardLayout,
    SourcePlace,
    TensorInfo,
    TensorRows,
    TensorView,
    slice_rows,
)

__all__ = [
    "ByteRange",
    "Checkpoint",
    "FileReader",
    "Fingerprint",
    "Identity",
    "IoMode",
    "KeptShard",
    "KeptSource",
    "LocalStorage",
    "RangeReader",
    "ReaderPool",
    "Scratch",
    "Shard",
    "ShardHasher",
    "ShardHeader",
    "ShardLayout",
    "ShardRange",
    "ShardReaders",
    "SourcePlace",
    "Storage",
    "TensorInfo",
    "TensorRows",
    "TensorView",
    "aligned_buffer",
    "choose_checkpoint_files",
    "iter_with_read_ahead",
    "open_checkpoint",
    "open_kept_checkpoint",
    "read_checkpoint",
    "slice_rows",
]
