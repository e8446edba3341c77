"""Reads a partition set by mmsplit/sidecar/FORMAT.md alone: no mmsplit, no numpy; only zstandard, xxhash and blake3.

It proves that the page is complete, and it shows how little a reader in another language needs.  It checks
everything it can and keeps all in memory, so it is for small sets.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import blake3
import xxhash
import zstandard

FORMAT_VERSION = 1
CHUNK_BYTES = 4194304
SLOT_ALIGNMENT = DATA_START = 4096
CHUNK_ALIGNMENT = 64
PLANE_ALIGNMENT = 16
MAX_WINDOW_BYTES = 8 << 20
MAX_KEPT_BYTES = 512 << 20
MAX_MANIFEST_BYTES = 1 << 30

HEADER = struct.Struct("<8sIIII32s32sQ")
RECORD = struct.Struct("<QIIQQIBBH32s")
TRAILER = struct.Struct("<8sQQQQQ")
PLANE_ENTRY = struct.Struct("<II")

RAW, ZSTD, PLANES = 0, 1, 2
#: layout -> (w, exponent8)
LAYOUTS = {0: (1, False), 1: (2, False), 2: (4, False), 3: (8, False), 4: (2, True), 5: (4, True)}


class NotSoundError(Exception):
    """Something in the set is not as FORMAT.md says it must be."""


class Record(NamedTuple):
    """One record of the chunk index."""

    stored_offset: int
    stored_bytes: int
    raw_bytes: int
    stored_xxh3: int
    raw_xxh3: int
    tensor: int
    codec: int
    layout: int
    reserved: int
    stored_blake3: bytes


class Trailer(NamedTuple):
    """The fields of a trailer between magic and checksum."""

    index_offset: int
    manifest_offset: int
    manifest_bytes: int
    manifest_xxh3: int


class Tensor(NamedTuple):
    """A tensor with its decoded raw bytes, or None where the layer is not stored."""

    name: str
    dtype: str
    shape: list[int]
    rows: dict | None
    shard: str
    source_range: tuple[int, int]
    is_tied: bool
    raw: bytes | None


class Partition(NamedTuple):
    """A partition, wholly verified and decoded."""

    manifest: dict
    records: list[Record]
    tensors: list[Tensor]


class PartitionSet(NamedTuple):
    """A set, wholly verified and decoded; `shards`, `index` and `files` are the checkpoint's files by name."""

    manifest: dict
    partitions: list[Partition]
    shards: dict[str, bytes]
    index: dict[str, bytes]
    files: dict[str, bytes]


def read_set(directory: Path, root_digest: str | None = None) -> PartitionSet:
    """Read, verify and decode all of a set, that of `root_digest` if given, and put its shards together again."""
    manifest = parse_set_manifest((directory / "partition_set.json").read_bytes())
    require(root_digest in (None, manifest["root_digest"]), "another set")
    files = {}
    for entry in manifest["files"]:
        for part in entry["name"].split("/"):
            require(is_plain_name(part), "small file leads out of its directory")
        data = (directory / entry["name"]).read_bytes()
        require(len(data) == entry["bytes"] and sha256(data) == entry["sha256"], f"small file {entry['name']}")
        files[entry["name"]] = data
    partitions = []
    for entry in manifest["partitions"]:
        text = (directory / entry["manifest"]).read_bytes()
        payload = (directory / entry["payload"]).read_bytes()
        require(sha256(text) == entry["manifest_sha256"], "manifest_sha256")
        require(len(payload) == entry["payload_bytes"], "payload_bytes")
        partition = read_partition(text, payload)
        for field in ("model_id", "revision", "num_parts", "plan_digest", "source_digest"):
            require(partition.manifest[field] == manifest[field], f"{field} of partition and set differ")
        for field in ("part_id", "total_params", "total_bytes", "stored_bytes"):
            require(partition.manifest[field] == entry[field], f"{field} of partition and set differ")
        partitions.append(partition)
    kept_of = {shard["name"]: kept_bytes(shard["kept"]) for shard in manifest["source"]["shards"]}
    require(source_digest(manifest, kept_of) == manifest["source_digest"], "source_digest")
    require(plan_digest(partitions) == manifest["plan_digest"], "plan_digest")
    check_rows(partitions)
    for field in ("total_bytes", "stored_bytes"):
        require(sum(partition.manifest[field] for partition in partitions) == manifest[field], field)
    entries = manifest["source"]["shards"]
    shards = {entry["name"]: merge_shard(entry, kept_of[entry["name"]], partitions) for entry in entries}
    kept = manifest["source"]["index"]
    index = {} if kept is None else {kept["name"]: kept_bytes(kept)}
    return PartitionSet(manifest, partitions, shards, index, files)


def read_partition(text: bytes, payload: bytes) -> Partition:
    """Verify and decode one partition, given the bytes of its manifest and of its payload."""
    manifest = parse_manifest(text)
    trailer = parse_trailer(payload)
    require(manifest_copy(payload, trailer) == text, "payload has another manifest")
    require(payload[:DATA_START] == expected_header(manifest), "file header")
    place = manifest["payload"]
    start, size = place["data_stop"], RECORD.size * place["chunk_count"]
    require((trailer.index_offset, trailer.manifest_offset) == (start, start + size), "trailer and manifest disagree")
    index = payload[start : start + size]
    require(sha256(index) == place["index_sha256"], "index_sha256")
    records = [Record(*fields) for fields in RECORD.iter_unpack(index)]
    check_layers(manifest, records)
    check_padding(manifest, records, payload)
    tensors, number = [], 0
    for layer in manifest["layers"]:
        stored = layer.get("stored", True)
        for entry in layer["tensors"]:
            raw = None
            if stored:
                raw = read_tensor(entry, number, records, payload, start)
                number += 1
            tensors.append(
                Tensor(
                    entry["name"],
                    entry["dtype"],
                    entry["shape"],
                    entry.get("rows"),
                    entry["shard"],
                    tuple(entry["source_range"]),
                    "alias" in layer,
                    raw,
                )
            )
    return Partition(manifest, records, tensors)


def rebuild_manifest(payload: bytes) -> bytes:
    """Return the bytes of the lost `partition_K.json`, from the payload alone."""
    return manifest_copy(payload, parse_trailer(payload))


def records_of_payload(payload: bytes) -> list[Record]:
    """Return the chunk index, from the payload's trailer alone."""
    trailer = parse_trailer(payload)
    index = payload[trailer.index_offset : trailer.manifest_offset]
    return [Record(*fields) for fields in RECORD.iter_unpack(index)]


def slot_lengths(manifest: dict) -> list[int]:
    """Return how many chunks each slot of a partition has, by the raw lengths alone."""
    lengths = []
    for layer in manifest["layers"]:
        position = None
        for entry in layer["tensors"] if layer.get("stored", True) else ():
            for raw_bytes in chunk_lengths(entry["bytes"]):
                begin = 0 if position is None else round_up(position, CHUNK_ALIGNMENT)
                if position is None or begin + raw_bytes > CHUNK_BYTES:
                    lengths.append(0)
                    begin = 0
                lengths[-1] += 1
                position = begin + raw_bytes
    return lengths


def read_journal(journal: bytes, lengths: list[int]) -> list[list[Record]]:
    """Return the records of the slots that a journal holds."""
    slots, position = [], 0
    for length in lengths:
        rows = journal[position : position + length * RECORD.size]
        checksum = journal[position + len(rows) : position + len(rows) + 8]
        if len(rows) < length * RECORD.size or checksum != struct.pack(">Q", xxhash.xxh3_64_intdigest(rows)):
            break
        slots.append([Record(*fields) for fields in RECORD.iter_unpack(rows)])
        position += len(rows) + len(checksum)
    return slots


# ------------------------------------------------------------------------------------------------------- payload


def expected_header(manifest: dict) -> bytes:
    """Return the 4096 bytes that a payload of this manifest begins with."""
    digests = [bytes.fromhex(manifest[field].removeprefix("sha256:")) for field in ("plan_digest", "source_digest")]
    numbers = (FORMAT_VERSION, manifest["part_id"], manifest["num_parts"], CHUNK_BYTES)
    block = HEADER.pack(b"MMSPLIT\0", *numbers, *digests, 0)[:-8]
    return (block + struct.pack("<Q", xxhash.xxh3_64_intdigest(block))).ljust(DATA_START, b"\0")


def parse_trailer(payload: bytes) -> Trailer:
    """Return the trailer of a payload, checked."""
    require(payload[:12] == b"MMSPLIT\0" + struct.pack("<I", FORMAT_VERSION), "magic or format_version")
    block = payload[-TRAILER.size :]
    magic, *fields, checksum = TRAILER.unpack(block)
    require(magic == b"MMSPLEND" and checksum == xxhash.xxh3_64_intdigest(block[:40]), "trailer")
    trailer = Trailer(*fields)
    require(trailer.index_offset >= DATA_START and trailer.index_offset % SLOT_ALIGNMENT == 0, "index_offset")
    index_bytes = trailer.manifest_offset - trailer.index_offset
    require(index_bytes >= 0 and index_bytes % RECORD.size == 0, "manifest_offset")
    require(trailer.manifest_offset + trailer.manifest_bytes + TRAILER.size == len(payload), "payload size")
    return trailer


def manifest_copy(payload: bytes, trailer: Trailer) -> bytes:
    """Return the manifest that the payload carries."""
    require(trailer.manifest_bytes <= MAX_MANIFEST_BYTES, "manifest_bytes")
    text = payload[trailer.manifest_offset : trailer.manifest_offset + trailer.manifest_bytes]
    require(xxhash.xxh3_64_intdigest(text) == trailer.manifest_xxh3, "manifest_xxh3")
    return text


def check_layers(manifest: dict, records: list[Record]) -> None:
    """Hold the layers' ranges and the records of the index against each other, and chunks against the slot rule."""
    position, number = DATA_START, 0
    chunks = iter(records)
    stop = DATA_START
    for layer in manifest["layers"]:
        require(layer["start"] == position and layer["start"] % SLOT_ALIGNMENT == 0, "layer start")
        stored, raw_position, begun = 0, 0, False
        for entry in layer["tensors"] if layer.get("stored", True) else ():
            for raw_bytes in chunk_lengths(entry["bytes"]):
                record = next(chunks, None)
                require(record is not None and record.tensor == number, "index has another tensor")
                require(record.raw_bytes == raw_bytes, "index has another raw length")
                require(0 < record.stored_bytes <= raw_bytes and record.reserved == 0, "record")
                begin = round_up(raw_position, CHUNK_ALIGNMENT)
                if not begun or begin + raw_bytes > CHUNK_BYTES:
                    expected, begin = round_up(stop, SLOT_ALIGNMENT), 0
                else:
                    expected = round_up(stop, CHUNK_ALIGNMENT)
                require(record.stored_offset == expected, "chunk does not lie where slots put it")
                begun, raw_position = True, begin + raw_bytes
                stop = record.stored_offset + record.stored_bytes
                stored += record.stored_bytes
            number += 1
        position = round_up(stop, SLOT_ALIGNMENT)
        require(layer["stop"] == position, "layer stop")
        require(layer["stored_bytes"] == stored, "layer stored_bytes")
    require(next(chunks, None) is None, "index has too many records")
    require(position == manifest["payload"]["data_stop"], "data_stop")


def check_padding(manifest: dict, records: list[Record], payload: bytes) -> None:
    """Require zeros between the chunks."""
    position = DATA_START
    for record in records:
        require(not any(payload[position : record.stored_offset]), "padding")
        position = record.stored_offset + record.stored_bytes
    require(not any(payload[position : manifest["payload"]["data_stop"]]), "padding")


def read_tensor(entry: dict, number: int, records: list[Record], payload: bytes, data_stop: int) -> bytes:
    """Read one tensor, as FORMAT.md's recipe does, and compare all its checksums."""
    first, count = entry["chunks"]
    raw = bytearray()
    for record in records[first : first + count]:
        require(record.tensor == number, "tensor")
        require(record.raw_bytes == min(CHUNK_BYTES, entry["bytes"] - len(raw)), "raw_bytes")
        stop = record.stored_offset + record.stored_bytes
        require(record.stored_offset >= DATA_START and stop <= data_stop, "chunk leaves the payload")
        stored = payload[record.stored_offset : stop]
        require(xxhash.xxh3_64_intdigest(stored) == record.stored_xxh3, "stored_xxh3")
        require(blake3.blake3(stored).digest() == record.stored_blake3, "stored_blake3")
        chunk = decode_chunk(stored, record)
        require(xxhash.xxh3_64_intdigest(chunk) == record.raw_xxh3, "raw_xxh3")
        raw += chunk
    require(len(raw) == entry["bytes"], "bytes")
    checksums = [record.raw_xxh3 for record in records[first : first + count]]
    checksum = f"{checksums[0]:016x}" if count == 1 else xxh3_hex(struct.pack(f"<{count}Q", *checksums))
    require(checksum == entry["xxh3"], "tensor checksum")
    return bytes(raw)


# -------------------------------------------------------------------------------------------------------- chunks


def decode_chunk(stored: bytes, record: Record) -> bytes:
    """Return the raw bytes of an encoded chunk."""
    if record.codec == PLANES:
        require(record.layout in LAYOUTS, "layout is not known")
        return decode_planes(stored, *LAYOUTS[record.layout], record.raw_bytes)
    require(record.layout == 0, "layout of a chunk without planes")
    if record.codec == ZSTD:
        return unzstd(stored, record.raw_bytes, MAX_WINDOW_BYTES)
    require(record.codec == RAW, "codec is not known")
    require(len(stored) == record.raw_bytes, "raw chunk has another length")
    return stored


def decode_planes(stored: bytes, w: int, exponent8: bool, raw_bytes: int) -> bytes:
    """Return the raw bytes of a planes chunk."""
    count, rest = divmod(raw_bytes, w)
    require(rest == 0, "no whole words")
    planes, ranges = [], [(0, w * PLANE_ENTRY.size)]
    for p in range(w):
        length, offset = PLANE_ENTRY.unpack_from(stored, p * PLANE_ENTRY.size)
        is_frame, length = length >> 31, length & 0x7FFFFFFF
        require(offset % PLANE_ALIGNMENT == 0 and offset + length <= len(stored), "plane leaves its chunk")
        piece = stored[offset : offset + length]
        planes.append(unzstd(piece, count, MAX_WINDOW_BYTES) if is_frame else piece)
        require(len(planes[p]) == count, "plane has another length")
        ranges.append((offset, offset + length))
    ranges.sort()
    for (_, stop), (start, _) in itertools.pairwise(ranges):
        require(0 <= start - stop < PLANE_ALIGNMENT and not any(stored[stop:start]), "planes overlap, or padding")
    require(ranges[-1][1] == len(stored), "chunk does not end with its last plane")
    if exponent8:
        planes[w - 2 :] = regroup(planes[w - 2], planes[w - 1])
    raw = bytearray(raw_bytes)
    for p in range(w):
        raw[p::w] = planes[p]
    return bytes(raw)


def regroup(low: bytes, high: bytes) -> tuple[bytes, bytes]:
    """Return bytes w-2 and w-1 of every word from planes w-2 and w-1."""
    lowest_exponent_bit = high.translate(bytes((h & 1) << 7 for h in range(256)))
    other_exponent_bits = high.translate(bytes(h >> 1 for h in range(256)))
    mantissa = low.translate(bytes(byte & 0x7F for byte in range(256)))
    sign = low.translate(bytes(byte & 0x80 for byte in range(256)))
    return either(lowest_exponent_bit, mantissa), either(sign, other_exponent_bits)


def either(a: bytes, b: bytes) -> bytes:
    """Return the bitwise or of two byte strings of one length; as long integers that is fast enough."""
    return (int.from_bytes(a) | int.from_bytes(b)).to_bytes(len(a))


def unzstd(frame: bytes, size: int, max_window_bytes: int = 1 << 27) -> bytes:
    """Decode one whole zstd frame that must declare and hold `size` bytes, and nothing behind it."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        require(parameters.content_size == size, "frame declares another length")
        require(parameters.window_size <= max_window_bytes and parameters.dict_id == 0, "frame")
        decoder = zstandard.ZstdDecompressor().decompressobj()
        data = decoder.decompress(frame)
    except zstandard.ZstdError as error:
        raise NotSoundError(f"frame: {error}") from error
    require(decoder.eof and not decoder.unused_data and len(data) == size, "frame")
    return data


# ----------------------------------------------------------------------------------------------------- manifests


def parse_manifest(text: bytes) -> dict:
    """Parse a partition manifest and check what can be checked without the payload."""
    manifest = parse_json(text, "mmsplit-partition")
    fields = manifest["payload"]
    require((fields["checksum"], fields["digest"]) == ("xxh3_64", "blake3"), "kind of checksum or digest")
    require(fields["chunk_bytes"] == CHUNK_BYTES, "chunk_bytes")
    require(0 <= manifest["part_id"] < manifest["num_parts"], "part_id")
    require(fields["file"] == f"partition_{manifest['part_id']}.bin", "payload file")
    require(fields["data_stop"] % SLOT_ALIGNMENT == 0, "data_stop")
    chunk = 0
    totals = dict.fromkeys(("total_params", "total_bytes", "stored_bytes"), 0)
    for layer in manifest["layers"]:
        tied = [field in layer for field in ("alias", "tied_to", "stored")]
        require(all(tied) or not any(tied), "a layer is tied or not")
        stored = layer.get("stored", True)
        require(not any(tied) or len(layer["tensors"]) == 1, "a tied layer has one tensor")
        for entry in layer["tensors"]:
            count = len(list(chunk_lengths(entry["bytes"]))) if stored else 0
            require(entry["chunks"] == [chunk, count], "chunks")
            require(entry["source_range"][1] - entry["source_range"][0] == entry["bytes"], "source_range")
            require((entry["xxh3"] is not None) == stored, "xxh3")
            require(is_plain_name(entry["shard"]), "shard")
            if "rows" in entry:
                start, stop, whole = (entry["rows"][field] for field in ("start", "stop", "shape"))
                require(not any(tied) and 0 <= start < stop <= whole[0], "rows")
                require(entry["shape"] == [stop - start, *whole[1:]], "shape of rows")
            chunk += count
        held = layer["tensors"] if stored else ()
        require(layer["total_params"] == sum(entry["params"] for entry in held), "layer total_params")
        require(layer["total_bytes"] == sum(entry["bytes"] for entry in held), "layer total_bytes")
        for field in totals:
            totals[field] += layer[field]
    require(chunk == fields["chunk_count"], "chunk_count")
    for field, total in totals.items():
        require(manifest[field] == total, field)
    return manifest


def parse_set_manifest(text: bytes) -> dict:
    """Parse a set manifest and check its root digest."""
    manifest = parse_json(text, "mmsplit-set")
    rest = {key: value for key, value in manifest.items() if key != "root_digest"}
    require(sha256(canonical(rest).encode("ascii")) == manifest["root_digest"], "root_digest")
    require([entry["part_id"] for entry in manifest["partitions"]] == list(range(manifest["num_parts"])), "part_id")
    for entry in manifest["partitions"]:
        stem = f"partition_{entry['part_id']}"
        require((entry["manifest"], entry["payload"]) == (f"{stem}.json", f"{stem}.bin"), "partition's file names")
    names = [shard["name"] for shard in manifest["source"]["shards"]]
    require(names == sorted(names) and all(is_plain_name(name) for name in names), "shards")
    names += [entry["name"] for entry in manifest["files"]]
    require(len(names) == len(set(names)), "two files have the same name")
    return manifest


def parse_json(text: bytes, kind: str) -> dict:
    """Parse a manifest of that format; a key that occurs twice, NaN and Infinity are refused."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        require(len(dict(pairs)) == len(pairs), "a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise NotSoundError(constant)

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    require(value["format"] == kind, "format")
    require(type(value["format_version"]) is int and value["format_version"] == FORMAT_VERSION, "format_version")
    return value


def canonical(value: object) -> str:
    """Return the canonical JSON of FORMAT.md, written out by hand so that the page is what is tested."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{quoted(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    require(type(value) is int, "number is not an integer")
    return str(value)


def quoted(text: str) -> str:
    """Return a JSON string in ASCII, escaped as FORMAT.md says."""
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
    pieces = []
    for char in text:
        if char in short:
            pieces.append(short[char])
        elif " " <= char <= "~":
            pieces.append(char)
        else:
            units = char.encode("utf-16-be")
            pieces.extend(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
    return '"' + "".join(pieces) + '"'


def kept_bytes(kept: dict) -> bytes:
    """Return bytes that the set manifest keeps verbatim."""
    require(kept["bytes"] <= MAX_KEPT_BYTES, "kept bytes")
    return unzstd(base64.b64decode(kept["zstd_base64"], validate=True), kept["bytes"])


def source_digest(manifest: dict, kept_of: dict[str, bytes]) -> str:
    """Return the digest of the shards' names, sizes and kept bytes."""
    data = b""
    for shard in manifest["source"]["shards"]:
        for item in (shard["name"].encode(), str(shard["bytes"]).encode(), kept_of[shard["name"]]):
            data += struct.pack("<Q", len(item)) + item
    return sha256(data)


def plan_digest(partitions: list[Partition]) -> str:
    """Return the digest of who holds what."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(text(item) for item in value) + "]"
        return canonical(value)

    def row(layer: dict) -> list:
        names = [entry["name"] for entry in layer["tensors"]]
        for number, entry in enumerate(layer["tensors"]):
            if "rows" in entry:
                names[number] = [entry["name"], entry["rows"]["start"], entry["rows"]["stop"]]
        what = [layer[field] for field in ("name", "layer_type", "stack", "index")]
        return [*what, names, layer.get("alias"), layer.get("tied_to"), layer.get("stored", True)]

    plan = [[row(layer) for layer in partition.manifest["layers"]] for partition in partitions]
    return sha256(text(plan).encode("ascii"))


def join_rows(name: str, partitions: list[Partition]) -> bytes:
    """Return the raw bytes of a tensor, wherever its rows lie."""
    found = [tensor for partition in partitions for tensor in partition.tensors if tensor.name == name]
    slices = [tensor for tensor in found if tensor.rows is not None]
    if not slices:
        return next(tensor.raw for tensor in found if tensor.raw is not None)
    return b"".join(tensor.raw for tensor in sorted(slices, key=lambda tensor: tensor.rows["start"]))


def check_rows(partitions: list[Partition]) -> None:
    """Require that the slices of each sliced tensor are of one tensor and have each of its rows once."""
    slices: dict[str, list[Tensor]] = {}
    for partition in partitions:
        for tensor in partition.tensors:
            if not tensor.is_tied:
                slices.setdefault(tensor.name, []).append(tensor)
    for found in slices.values():
        if all(tensor.rows is None for tensor in found):
            require(len(found) == 1, "a tensor is in two layers without being tied")
            continue
        row, dtype, shape = 0, found[0].dtype, found[0].rows["shape"]
        for tensor in sorted(found, key=lambda tensor: tensor.rows["start"]):
            require((tensor.rows["start"], tensor.rows["shape"], tensor.dtype) == (row, shape, dtype), "rows")
            row = tensor.rows["stop"]
        require(row == shape[0], "rows are missing")


def merge_shard(entry: dict, kept: bytes, partitions: list[Partition]) -> bytes:
    """Return a source shard, put together from its kept bytes and the tensors that are not tied."""
    ranges = [
        (place["source_range"], tensor.raw)
        for partition in partitions
        for layer in partition.manifest["layers"]
        if "alias" not in layer
        for described in layer["tensors"]
        for tensor in partition.tensors
        if tensor.name == described["name"] and not tensor.is_tied
        for place in (described, *described.get("also", []))
        if place["shard"] == entry["name"]
    ]
    data, used = bytearray(), 0
    for (start, stop), raw in sorted(ranges, key=lambda item: item[0]):
        if start == stop:
            continue
        require(len(data) <= start and raw is not None and len(raw) == stop - start, "tensors overlap in the shard")
        gap = start - len(data)
        data += kept[used : used + gap]
        used += gap
        require(len(data) == start, "tensors do not cover the shard")
        data += raw
    data += kept[used:]
    require(len(data) == entry["bytes"] and entry["sha256"] in (None, sha256(bytes(data))), "merged shard")
    return bytes(data)


# --------------------------------------------------------------------------------------------------------- small


def require(holds: bool, what: str) -> None:
    """Raise `NotSoundError` unless it holds."""
    if not holds:
        raise NotSoundError(what)


def chunk_lengths(size: int) -> Iterator[int]:
    """Yield the raw lengths of the chunks of a tensor of `size` bytes."""
    for start in range(0, size, CHUNK_BYTES):
        yield min(CHUNK_BYTES, size - start)


def round_up(position: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-position // alignment) * alignment


def is_plain_name(name: str) -> bool:
    """Whether a name can only mean a file in its directory."""
    if name == "" or name[-1] in ". " or not name.isprintable() or re.search(r"[/\\:]", name):
        return False
    device = name.partition(".")[0].rstrip(" ").upper()
    return device not in {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} and not re.fullmatch(
        "(COM|LPT)[0-9¹²³]", device
    )


def sha256(data: bytes) -> str:
    """Return a digest as manifests write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def xxh3_hex(data: bytes) -> str:
    """Return a checksum as manifests write it."""
    return f"{xxhash.xxh3_64_intdigest(data):016x}"
