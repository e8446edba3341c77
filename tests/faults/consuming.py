"""Scenarios in which the input is deleted on the way: everything lies in one folder, input and output.

The judge asks the one question that matters there: is every byte of the model still somewhere, in a shard or in a
partition that can be decoded, with the kept bytes that make a shard of it?  It uses none of the code that decides what
may be deleted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import zstandard
from checkpoints import tree

from mmsplit.codec import ChunkDecoder
from mmsplit.errors import MmsplitError
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split

MODEL, SET, MERGED, ORIGINAL = "model", "set", "merged", "original"


def lost_bytes(folder: Path, original: Mapping[str, bytes]) -> list[str]:
    """Name the shards of `original` that neither lie below `folder` nor can be put together from its partitions."""
    problems = []
    for name, data in original.items():
        places = [folder / MODEL / name, folder / MERGED / name]
        if any(place.is_file() and place.read_bytes() == data for place in places):
            continue
        covered = bytearray(len(data))
        stop = 8 + int.from_bytes(data[:8], "little")
        if _kept_bytes(folder / SET, name) == data[:stop]:
            covered[:stop] = b"\1" * stop
        for start, raw in _stored(folder / SET, name):
            if data[start : start + len(raw)] == raw:
                covered[start : start + len(raw)] = b"\1" * len(raw)
        if 0 in covered:
            problems.append(f"byte {covered.index(0)} of {name} is nowhere any more")
    return problems


def _kept_bytes(root: Path, shard: str) -> bytes | None:
    for path in (root / SET_MANIFEST_NAME, root / "unfinished_split.json"):
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        entries = values["source"]["shards"] if "source" in values and "partitions" in values else None
        entries = values.get("kept_source", {}).get("shards", []) if entries is None else entries
        for entry in entries:
            if entry["name"] == shard:
                return zstandard.ZstdDecompressor().decompress(base64.b64decode(entry["kept"]["zstd_base64"]))
    return None


def _stored(root: Path, shard: str) -> list[tuple[int, bytes]]:
    """Decode every tensor of a shard that a finished partition holds; damaged ones are none."""
    found = []
    for path in sorted(root.glob("partition_?.json")) if root.is_dir() else []:
        try:
            partition = open_partition_files(path, "pread")
        except MmsplitError:
            continue
        with partition:
            for tensor in partition.tensors:
                starts = [place.start_offset for place in tensor.places() if place.shard == shard]
                if not starts:
                    continue
                raw, decoder = bytearray(), ChunkDecoder()
                for chunk in range(tensor.first_chunk, tensor.first_chunk + tensor.chunk_count):
                    start, stop, encoded = partition.encoded(chunk)
                    piece = bytearray(int(partition.index[chunk]["raw_bytes"]))
                    try:
                        decoder.decode(partition.reader.read(start, stop), encoded, memoryview(piece))
                    except MmsplitError:
                        break
                    raw += piece
                found += [(start, bytes(raw)) for start in starts]
    return found


def shards_of(folder: Path) -> dict[str, bytes]:
    """The shards of a model by name."""
    return {name: data for name, data in tree(folder).items() if name.endswith(".safetensors")}


def judge(out: Path, _: Mapping[str, bytes]) -> list[str]:
    """Everything is somewhere.  The original lies beside, for comparison only."""
    return lost_bytes(out, shards_of(out / ORIGINAL))


def consume_split(out: Path, existing: str, *, direct: bool = True) -> object:
    """Split the model in a folder into the set there, with parity, and delete its shards."""
    return split(
        out / MODEL,
        out / SET,
        3,
        threads=1,
        existing=existing,  # type: ignore[arg-type]
        direct=direct,
        parity=10,
        consume=True,
    )


def consume_merge(out: Path, *, resume: bool) -> object:
    """Merge the set in a folder, and delete it; nothing if that is done."""
    if resume and not (out / SET / SET_MANIFEST_NAME).exists():
        return None
    return merge(out / SET, out / MERGED, resume=resume, threads=1, consume=True)
