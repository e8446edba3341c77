"""Which tensor lies in which safetensors file, and where: headers and the weights index.  Pure.

Files are filled in layer order, as the libraries that save models do.  Within a file wide numbers come first: a file
has no holes, and so every tensor begins on a multiple of its own width, which loaders that map files rely on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint.header_writer import format_header
from mmsplit.dtypes import DTYPES
from mmsplit.errors import RequestError
from mmsplit.exporting.tensor import ExportTensor

SUFFIX: Final = ".safetensors"
INDEX_NAME: Final = f"model{SUFFIX}.index.json"
DEFAULT_SHARD_BYTES: Final = 5_000_000_000
#: Readers refuse a header above 100 MB.
_MOST_TENSORS: Final = 100_000
_RESERVED_NAME: Final = "__metadata__"


class WeightFile(NamedTuple):
    """One file: `header` with its length field, then the tensors in this order."""

    name: str
    header: bytes
    tensors: tuple[ExportTensor, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


def lay_out_files(
    tensors: Sequence[ExportTensor], aliases: Mapping[str, str], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> tuple[WeightFile, ...]:
    """Return the files of these tensors, none with more than `max_shard_bytes` of tensors but for a single one.

    `aliases` (other name -> stored name) are said in the header of the file that has the tensor.  Raises `RequestError`
    for a tensor that safetensors cannot hold.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise RequestError("no such size for a file", found=str(max_shard_bytes), expected="a number of bytes above 0")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise RequestError(
                "safetensors has no such dtype",
                tensor=tensor.name,
                found=tensor.dtype,
                hint="Only a merge gives such weights (quantised blocks, say) back, in their own format.",
            )
        if tensor.name == _RESERVED_NAME:
            raise RequestError("safetensors keeps this name for itself", tensor=tensor.name)
    groups = _groups(tensors, max_shard_bytes)
    names = (
        [f"model{SUFFIX}"]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}{SUFFIX}" for number in range(1, len(groups) + 1)]
    )
    return tuple(_file(name, group, aliases) for name, group in zip(names, groups, strict=True))


def format_weights_index(files: Iterable[WeightFile]) -> bytes:
    """Return the weights index of several files."""
    placed = sorted((tensor.name, file.name, tensor) for file in files for tensor in file.tensors)
    index = {
        "metadata": {
            "total_parameters": sum(tensor.params for *_, tensor in placed),
            "total_size": sum(tensor.size_bytes for *_, tensor in placed),
        },
        "weight_map": {name: file for name, file, _ in placed},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _groups(tensors: Iterable[ExportTensor], max_shard_bytes: int) -> list[list[ExportTensor]]:
    groups: list[list[ExportTensor]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if groups[-1] and (size_bytes + tensor.size_bytes > max_shard_bytes or len(groups[-1]) == _MOST_TENSORS):
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.size_bytes
    return groups


def _file(name: str, group: Iterable[ExportTensor], aliases: Mapping[str, str]) -> WeightFile:
    tensors = tuple(sorted(group, key=lambda tensor: -DTYPES[tensor.dtype].bits))
    stored = {tensor.name for tensor in tensors}
    here = {alias: target for alias, target in sorted(aliases.items()) if target in stored}
    header = format_header(((t.name, t.dtype, t.shape, t.size_bytes) for t in tensors), here)
    return WeightFile(name, header, tensors)
