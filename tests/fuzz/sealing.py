"""A partition set taken to pieces and put together again with every checksum in order.

That is what somebody does who means harm, and what lets a change reach past the first checksum.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mmsplit.digests import chunk_digest
from mmsplit.errors import MmsplitError
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, tensor_checksum
from mmsplit.sidecar.framing import TRAILER_BYTES, parse_trailer
from mmsplit.sidecar.manifest import manifest_name, parse_manifest, payload_name
from mmsplit.sidecar.payload_tail import pack_tail
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.split import split

#: The files of a directory by relative name.
Files = dict[str, bytes]


class Partition(NamedTuple):
    """One partition: header and encoded tensors, chunk index, manifest."""

    data: bytes
    index: bytes
    manifest: bytes


class Parts(NamedTuple):
    """A set: its partitions, its set manifest, its small files."""

    partitions: tuple[Partition, ...]
    set_manifest: bytes
    files: Files


def read_files(root: Path) -> Files:
    """Every file below `root`."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_files(root: Path, files: Files) -> None:
    """Write files below `root`, those left out whose names a file system here does not take."""
    for name, data in files.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def split_model(model: Path, part_count: int) -> Files:
    """The files of a set made of a model."""
    with tempfile.TemporaryDirectory() as folder:
        split(model, Path(folder, "set"), part_count, threads=1, model_id="fuzz/model", revision="r")
        return read_files(Path(folder, "set"))


def taken_apart(files: Files) -> Parts:
    """The parts of a set; raises `ValueError` where it is too damaged to have any."""
    rest = dict(files)
    set_manifest = rest.pop(SET_MANIFEST_NAME)
    partitions = []
    for number in range(json.loads(set_manifest)["num_parts"]):
        payload, manifest = rest.pop(payload_name(number)), rest.pop(manifest_name(number))
        trailer = parse_trailer(payload[-TRAILER_BYTES:], len(payload))
        if trailer is None:
            raise ValueError("no trailer")
        index = payload[trailer.index_offset : trailer.manifest_offset]
        partitions.append(Partition(payload[: trailer.index_offset], index, manifest))
    return Parts(tuple(partitions), set_manifest, rest)


def with_chunk_checksums(index: bytes, data: bytes) -> bytes:
    """An index whose checksums of stored bytes are those of what lies at its places in `data`."""
    whole = len(index) // CHUNK_RECORD.itemsize * CHUNK_RECORD.itemsize
    records = np.frombuffer(index[:whole], CHUNK_RECORD).copy()
    for record in records:
        start = int(record["stored_offset"])
        stored = data[start : start + int(record["stored_bytes"])]
        record["stored_xxh3"] = xxhash.xxh3_64_intdigest(stored)
        record["stored_blake3"] = np.void(chunk_digest(stored))
    return records.tobytes() + index[whole:]


def with_index_checksums(manifest: bytes, index: bytes) -> bytes:
    """A manifest whose checksums, of the index and of the tensors, are those of `index`."""

    def change(values: Any) -> None:
        payload = values["payload"]
        payload["index_sha256"] = _sha256(index)
        records = np.frombuffer(index[: len(index) // CHUNK_RECORD.itemsize * CHUNK_RECORD.itemsize], CHUNK_RECORD)
        for layer in values["layers"]:
            for tensor in layer["tensors"] if layer.get("stored", True) else ():
                first, count = tensor["chunks"]
                tensor["xxh3"] = tensor_checksum(records["raw_xxh3"][first : first + count])

    return _edited(manifest, change)


def with_root_digest(set_manifest: bytes) -> bytes:
    """A set manifest, in the bytes in which one is written, whose root digest is that of what it says."""

    def change(values: Any) -> None:
        del values["root_digest"]
        values["root_digest"] = _sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())

    return _edited(set_manifest, change, indent=1)


def sealed(parts: Parts) -> Files:
    """The files of a set in which every checksum above the chunks fits, whatever its parts say."""
    files = dict(parts.files)
    entries = []
    for number, partition in enumerate(parts.partitions):
        payload = partition.data + pack_tail(partition.index, len(partition.data), partition.manifest)
        files[payload_name(number)], files[manifest_name(number)] = payload, partition.manifest
        entries.append((len(payload), _sha256(partition.manifest)))

    def change(values: Any) -> None:
        for number, (payload_bytes, digest) in enumerate(entries):
            values["partitions"][number].update(payload_bytes=payload_bytes, manifest_sha256=digest)

    files[SET_MANIFEST_NAME] = with_root_digest(_edited(parts.set_manifest, change))
    return files


def with_numbers_of(manifest: bytes, set_manifest: bytes, number: int) -> bytes:
    """A set manifest that says of a partition what its manifest says, where that can be read."""
    try:
        found = parse_manifest(manifest, "")
    except MmsplitError:
        return set_manifest

    def change(values: Any) -> None:
        said = {name: getattr(found, name) for name in ("total_params", "total_bytes", "stored_bytes")}
        values["partitions"][number].update(said)
        for name in ("total_bytes", "stored_bytes"):
            values[name] = sum(entry[name] for entry in values["partitions"])

    return _edited(set_manifest, change)


def _edited(text: bytes, change: Callable[[Any], None], indent: int | None = None) -> bytes:
    """A JSON text changed; the same text where it is none, or has not what is to be changed."""
    try:
        values = json.loads(text)
        change(values)
        return (json.dumps(values, indent=indent) + "\n").encode()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return text


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
