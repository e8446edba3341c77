"""Where tensors live: header bytes -> `TensorInfo`, byte range -> view."""

from mmsplit.checkpoint.checkpoint import Checkpoint, Shard, open_checkpoint
from mmsplit.checkpoint.file_reader import FileReader, Fingerprint, IoMode, Scratch, aligned_buffer
from mmsplit.checkpoint.reader_pool import ReaderPool
from mmsplit.checkpoint.shard_hasher import ShardHasher
from mmsplit.checkpoint.tensor import ShardHeader, TensorInfo

__all__ = [
    "Checkpoint",
    "FileReader",
    "Fingerprint",
    "IoMode",
    "ReaderPool",
    "Scratch",
    "Shard",
    "ShardHasher",
    "ShardHeader",
    "TensorInfo",
    "aligned_buffer",
    "open_checkpoint",
]
