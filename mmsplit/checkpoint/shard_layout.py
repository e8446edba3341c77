"""Reading what lies where in a shard, whatever form it is in; the form is found out, not asked for."""

from __future__ import annotations

from mmsplit.checkpoint.header import LENGTH_BYTES, parse_header, parse_header_length
from mmsplit.checkpoint.storage import RangeReader
from mmsplit.checkpoint.tensor import ShardLayout
from mmsplit.checkpoint.torch_file import SNIFF_BYTES, is_torch_file, read_torch_file
from mmsplit.checkpoint.torch_tensors import lay_out_torch_file
from mmsplit.checkpoint.weight_files import form_of

__all__ = ["SNIFF_BYTES", "is_shard", "read_shard_layout"]


def is_shard(head: bytes) -> bool:
    """Whether a file that begins with these bytes, at most `SNIFF_BYTES` needed, looks like weights."""
    return _may_be_safetensors(head) or is_torch_file(head)


def read_shard_layout(
    reader: RangeReader, location: str, shard: str, *, allow_unknown_dtypes: bool = False
) -> ShardLayout:
    """Read headers only.  `location` is for messages, `shard` goes into the records.

    Raises `HeaderError` or `TorchFileError`, and what the reads raise.
    """
    size = reader.size_bytes
    head = reader.read(0, min(SNIFF_BYTES, size))
    if not _may_be_safetensors(head) and (is_torch_file(head) or _promises_torch(shard)):
        file = read_torch_file(
            reader.read, size, location, read_many=reader.read_many, allow_unknown_dtypes=allow_unknown_dtypes
        )
        return lay_out_torch_file(file, shard)
    length = parse_header_length(head[:LENGTH_BYTES], size, location)
    header = reader.read(LENGTH_BYTES, LENGTH_BYTES + length)
    parsed = parse_header(header, size, location, shard, allow_unknown_dtypes=allow_unknown_dtypes)
    return ShardLayout("safetensors", ((0, parsed.header_bytes),), parsed.tensors)


def _promises_torch(shard: str) -> bool:
    form = form_of(shard)
    return form is not None and form.form == "torch"


def _may_be_safetensors(head: bytes) -> bool:
    """Whether the file begins as a safetensors file does: a length, then `{`."""
    return head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
