"""Reading what lies where in a shard, whatever form it is in; the form is found out, not asked for."""

from __future__ import annotations

from typing import Final

from mmsplit.checkpoint.gguf_config import gguf_config
from mmsplit.checkpoint.gguf_file import GgufFile, is_gguf_file, read_gguf_file
from mmsplit.checkpoint.header import LENGTH_BYTES, parse_header, parse_header_length
from mmsplit.checkpoint.storage import RangeReader
from mmsplit.checkpoint.tensor import ShardForm, ShardLayout
from mmsplit.checkpoint.torch_file import SNIFF_BYTES, is_torch_file, read_torch_file
from mmsplit.checkpoint.torch_tensors import lay_out_torch_file
from mmsplit.checkpoint.weight_files import form_of

#: So many bytes tell the forms apart.
_FORM_BYTES: Final = 40

__all__ = ["SNIFF_BYTES", "is_shard", "read_shard_layout"]


def is_shard(head: bytes) -> bool:
    """Whether a file that begins with these bytes, at most `SNIFF_BYTES` needed, looks like weights."""
    return _may_be_safetensors(head) or is_torch_file(head) or is_gguf_file(head)


def read_shard_layout(
    reader: RangeReader, location: str, shard: str, *, allow_unknown_dtypes: bool = False
) -> ShardLayout:
    """Read headers only.  `location` is for messages, `shard` goes into the records.

    Raises `HeaderError`, `TorchFileError` or `GgufFileError`, and what the reads raise.
    """
    size = reader.size_bytes
    head = reader.read(0, min(_FORM_BYTES, size))
    if not _may_be_safetensors(head) and (is_gguf_file(head) or _promises(shard, "gguf")):
        return _lay_out_gguf(
            read_gguf_file(reader.read, size, location, shard, allow_unknown_dtypes=allow_unknown_dtypes)
        )
    if not _may_be_safetensors(head) and (is_torch_file(head) or _promises(shard, "torch")):
        file = read_torch_file(
            reader.read, size, location, read_many=reader.read_many, allow_unknown_dtypes=allow_unknown_dtypes
        )
        return lay_out_torch_file(file, shard)
    length = parse_header_length(head[:LENGTH_BYTES], size, location)
    stop = LENGTH_BYTES + length
    header = head[LENGTH_BYTES:stop] + (reader.read(len(head), stop) if stop > len(head) else b"")
    parsed = parse_header(header, size, location, shard, allow_unknown_dtypes=allow_unknown_dtypes)
    return ShardLayout("safetensors", ((0, parsed.header_bytes),), parsed.tensors)


def _promises(shard: str, form: ShardForm) -> bool:
    """Whether the end of a file's name says that it is in a form."""
    promised = form_of(shard)
    return promised is not None and promised.form == form


def _lay_out_gguf(file: GgufFile) -> ShardLayout:
    config = gguf_config(file.metadata)
    count = 1 if file.split is None else max(1, file.split.file_count)
    return ShardLayout("gguf", file.kept, file.tensors, (), file.notes, config, count)


def _may_be_safetensors(head: bytes) -> bool:
    """Whether the file begins as a safetensors file does: a length, then `{`."""
    return head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
