"""Targets that read bytes: a header, an archive, a manifest.  What they accept is held against another reader."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from random import Random

import numpy as np
import safetensors
from form_mutators import mutate_gguf, mutate_safetensors, mutate_torch
from gguf_builder import require_cover
from mutators import Mutation, joined, mutate_bytes, mutate_json
from sealing import split_model, taken_apart, with_root_digest
from target import CORPUS, Target, Wrong, require

from mmsplit.checkpoint.gguf_config import gguf_config
from mmsplit.checkpoint.gguf_file import read_gguf_file
from mmsplit.checkpoint.header import LENGTH_BYTES, parse_header, parse_header_length
from mmsplit.checkpoint.torch_file import TorchFile, read_torch_file
from mmsplit.checkpoint.torch_tensors import lay_out_torch_file
from mmsplit.checkpoint.weights_index import is_plain_name, parse_weights_index
from mmsplit.errors import IntegrityError, MmsplitError
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, find_fault
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.manifest import format_manifest, parse_manifest
from mmsplit.sidecar.set_manifest import parse_set_manifest

#: Why a header may be refused that the reference implementation takes: beginnings of what the error says, and where
#: the rule is from (see `mmsplit.checkpoint.header`).
STRICTER = {
    "header begins with": "the format's README; the reference tolerates white space",
    "key ": "the format's README: duplicate keys are disallowed; the reference keeps the last",
    "entry is not a JSON object": "an entry may be a list to the reference (serde's form of a struct)",
    "dtype is not text": "a dtype may be an object to the reference (serde's form of an enum)",
    "unknown fields nest too deep": "no field beyond the three is in the format",
    "unknown field holds a number": "no field beyond the three is in the format",
    "header is not JSON": "numbers in unknown fields that Python's reader refuses: -0, thousands of digits",
    "header is nested too deep": "Python's limit is below the reference's, and no field nests",
}


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    """How a file's ranges are read; none outside of it may be asked for."""

    def read(start: int, stop: int) -> bytes:
        require(0 <= start <= stop <= len(data), f"read of [{start}, {stop}) in {len(data)} bytes")
        return data[start:stop]

    return read


def seeds_in(folder: str) -> dict[str, bytes]:
    """The files of a corpus by name; there may be none."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / folder).glob("*")) if path.is_file()}


def check_safetensors(data: bytes) -> None:
    """What is accepted the reference accepts, with the same tensors; what only it accepts is in `STRICTER`."""
    try:
        length = parse_header_length(data[:LENGTH_BYTES], len(data), "f")
        header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), "f", "s")
    except MmsplitError as error:
        if _reference(data) is not None:
            require(error.what.startswith(tuple(STRICTER)), f"only the reference accepts it: {error.what}")
        raise
    found = _reference(data)
    require(found is not None, "the reference refuses it")
    ours = {t.name: (t.dtype, list(t.shape), data[t.start_offset : t.stop_offset]) for t in header.tensors}
    require(ours == found, "the reference sees other tensors")


def _reference(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in tensors}


def check_weights_index(data: bytes) -> None:
    """Shards that are named lie right inside the directory."""
    weight_map = parse_weights_index(data, "f", (".safetensors", ".bin"))
    require(all(is_plain_name(shard) for shard in weight_map.values()), "a shard that is no plain name")


def check_torch(data: bytes) -> TorchFile:
    """Ranges cover the file; tensors lie in their storages; other readers of zip archives see the same entries."""
    file = read_torch_file(reader_of(data), len(data), "f")
    position = 0
    for start, stop, _ in file.ranges:
        require(start == position < stop, "ranges do not cover the file")
        position = stop
    require(position == len(data), "ranges do not cover the file")
    storages = {storage.key: storage for storage in file.storages}
    for tensor in file.tensors:
        storage = storages[tensor.storage]
        inside = storage.start_offset <= tensor.start_offset <= tensor.stop_offset <= storage.stop_offset
        require(inside, "a tensor reaches out of its storage")
    if file.form == "zip":
        _require_same_entries(file, data)
    lay_out_torch_file(file, "s")
    return file


def _require_same_entries(file: TorchFile, data: bytes) -> None:
    try:
        infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise Wrong(f"zipfile refuses the archive: {error}") from error
    places = {}
    for info in infos:
        head = data[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        places[info.filename.split("/", 1)[-1].removeprefix("data/")] = (start, start + info.file_size)
    for storage in file.storages:
        require(places.get(storage.key) == storage[3:5], f"zipfile sees entry {storage.key!r} elsewhere")


def check_gguf(data: bytes) -> None:
    """Tensors and kept ranges cover the file, with and without types that are not known."""
    found = read_gguf_file(reader_of(data), len(data), "f", "s")
    require_cover(found, data)
    gguf_config(found.metadata)


def check_manifest(data: bytes) -> None:
    """What is accepted is a record that says the same when it is written and read again."""
    manifest = parse_manifest(data, "f")
    # A layer that is not tied has no use for `tied_to`, and is not written with one.
    layers = [layer if layer.alias is not None else layer._replace(tied_to=None) for layer in manifest.layers]
    manifest = manifest._replace(layers=tuple(layers))
    require(parse_manifest(format_manifest(manifest), "f") == manifest, "another manifest when it is written and read")


def check_set_manifest(data: bytes) -> None:
    """Names lie inside, and kept bytes have the length they are said to have."""
    manifest = parse_set_manifest(data, "f")
    for name in (*(s.name for s in manifest.shards), *(part for f in manifest.files for part in f.name.split("/"))):
        require(is_plain_name(name), f"name {name!r}")
    for shard in manifest.shards:
        if shard.kept.size_bytes < 8 << 20:
            require(len(shard.kept.data("f")) == shard.kept.size_bytes, "kept bytes of another length")


def check_chunk_index(data: bytes) -> None:
    """An index without a fault is, counted with whole numbers, chunks side by side in the data."""
    if len(data) % CHUNK_RECORD.itemsize:
        raise IntegrityError("no whole number of records", path="f")
    index = np.frombuffer(data, CHUNK_RECORD)
    sizes: list[int] = []
    for record in index[:1000]:
        tensor = int(record["tensor"])
        if tensor == len(sizes):
            sizes.append(0)
        if tensor == len(sizes) - 1:
            sizes[-1] += int(record["raw_bytes"])
    last = int(index[-1]["stored_offset"]) + int(index[-1]["stored_bytes"]) if len(index) else DATA_START
    data_stop = -(-last // 4096) * 4096
    fault = find_fault(index, sizes, data_stop)
    if fault is not None:
        raise IntegrityError(fault[1], path="f")
    position = DATA_START
    for record in index:
        start, stored = int(record["stored_offset"]), int(record["stored_bytes"])
        require(
            position <= start < position + 4096 and 0 < stored <= int(record["raw_bytes"]), "a chunk that cannot be"
        )
        position = start + stored
    require(position <= data_stop < position + 4096, "chunks that reach out of the data")


def _sets() -> dict[str, dict[str, bytes]]:
    models = [path for path in sorted((CORPUS / "set").iterdir()) if path.is_dir()]
    return {model.name: split_model(model, 2 if model.name == "plain" else 1) for model in models}


def _manifests() -> dict[str, bytes]:
    found = {}
    for name, files in _sets().items():
        for number, partition in enumerate(taken_apart(files).partitions):
            found[f"{name}_{number}"] = partition.manifest
    return found | seeds_in("manifest")


def _set_manifests() -> dict[str, bytes]:
    return {name: taken_apart(files).set_manifest for name, files in _sets().items()} | seeds_in("set_manifest")


def _indexes() -> dict[str, bytes]:
    return {
        f"{name}_{k}": p.index for name, files in _sets().items() for k, p in enumerate(taken_apart(files).partitions)
    }


def _mutate_set_manifest(data: bytes, random: Random) -> bytes:
    changed = mutate_json(data, random)
    return with_root_digest(changed) if random.random() < 0.9 else changed


def mutate_records(data: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return mutate_bytes(data, random)
    index = np.frombuffer(data[: len(data) // CHUNK_RECORD.itemsize * CHUNK_RECORD.itemsize], CHUNK_RECORD).copy()
    if not len(index):
        return data
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(CHUNK_RECORD.names or ())
        record = index[random.randrange(len(index))]
        raw = record[name].tobytes()
        record[name] = np.frombuffer(mutate_bytes(raw, random)[: len(raw)].ljust(len(raw), b"\0"), record[name].dtype)[
            0
        ]
    return index.tobytes()


def _with(mutate: Mutation) -> Callable[[bytes, bytes, Random], bytes]:
    """A mutation that seldom joins two files of the corpus."""

    def change(data: bytes, other: bytes, random: Random) -> bytes:
        return joined(data, other, random) if random.random() < 0.03 else mutate(data, random)

    return change


def _weights_index_json(data: bytes, random: Random) -> bytes:
    return mutate_json(data, random, ("x.bin", "x.safetensors", "../x.bin", "é.bin"))


READERS = (
    Target("safetensors", lambda: seeds_in("safetensors"), _with(mutate_safetensors), check_safetensors),
    Target("weights_index", lambda: seeds_in("weights_index"), _with(_weights_index_json), check_weights_index),
    Target("torch", lambda: seeds_in("torch"), _with(mutate_torch), check_torch),
    Target("gguf", lambda: seeds_in("gguf"), _with(mutate_gguf), check_gguf),
    Target("manifest", _manifests, _with(mutate_json), check_manifest),
    Target("set_manifest", _set_manifests, _with(_mutate_set_manifest), check_set_manifest),
    Target("chunk_index", _indexes, _with(mutate_records), check_chunk_index),
)
