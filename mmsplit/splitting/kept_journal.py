"""What must be known of a source before its first shard is deleted, as it stands in the state of an unfinished split.

It is written, and synced, together with the SHA-256 of every shard; from then on the run can be planned again although
shards are gone.  Of a finished set the set manifest and the partitions say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint import ByteRange, Checkpoint, KeptShard, KeptSource, open_kept_checkpoint
from mmsplit.checkpoint.cover import gaps_between
from mmsplit.errors import FormatError, IntegrityError, MissingShardError, OutputExistsError, SourceChangedError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.consumed_directory import ConsumedDirectory
from mmsplit.sidecar.json_fields import Fields
from mmsplit.sidecar.manifest import manifest_name, parse_manifest
from mmsplit.sidecar.output_directory import DELETED_KEY, KEPT_SOURCE_KEY, STATE_NAME, read_state_file
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, KeptBytes, kept_json, parse_kept, parse_set_manifest
from mmsplit.splitting.equal_tensors import fold, repeated_tensors


class Consumed(NamedTuple):
    """What an output says of a source that is being consumed into it; `deleted` names the shards that may be gone."""

    source: KeptSource
    deleted: frozenset[str]


def journal_of(checkpoint: Checkpoint, kept: Mapping[str, KeptBytes]) -> dict[str, object]:
    """Return the journal of a source as JSON."""
    index = None
    if checkpoint.index_name is not None:
        index = {"name": checkpoint.index_name, **kept_json(KeptBytes.of(checkpoint.index_bytes))}
    return {
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.size_bytes,
                "identity": list(shard.identity),
                "ranges": [list(place) for place in shard.kept],
                "kept": kept_json(kept[shard.name]),
            }
            for shard in checkpoint.shards
        ],
        "index": index,
        "files": list(checkpoint.small_files),
        "same_as": repeated_tensors(checkpoint),
    }


def read_consumed(output: Path) -> Consumed | None:
    """Return what the output of a split says of its source: an unfinished one that consumes it, or a finished set.

    None if it is neither.  Raises `OutputExistsError` for what cannot be read.
    """
    state = read_state_file(output / STATE_NAME)
    if state is not None:
        journal = state.get(KEPT_SOURCE_KEY)
        if journal is None:
            return None
        deleted = state.get(DELETED_KEY)
        return Consumed(_parse_journal(journal, output / STATE_NAME), frozenset(_names(deleted)))
    path = output / SET_MANIFEST_NAME
    if not path.is_file():
        return None
    source = _source_of_set(output)
    return Consumed(source, frozenset(shard.name for shard in source.shards))


def open_what_is_left(
    path: Path, directory: ConsumedDirectory, record: Consumed, *, allow_unknown_dtypes: bool
) -> Checkpoint | None:
    """Return the checkpoint as far as it is there, and as recorded beyond that; None if nothing of it is gone.

    Raises `MissingShardError` for a shard that is gone and was not deleted by mmsplit.
    """
    gone = [shard.name for shard in record.source.shards if not (directory.path / shard.name).exists()]
    if not gone:
        return None
    lost = [name for name in gone if name not in record.deleted]
    if lost:
        raise MissingShardError(
            "shard is not there, and it was not mmsplit that deleted it: its tensors are not all in partitions yet",
            path=directory.path / lost[0],
            hint="Bring it back, then run again with --resume.",
        )
    _require_same_index(directory.path, record.source)
    left = open_kept_checkpoint(path, record.source, allow_unknown_dtypes=allow_unknown_dtypes)
    if not record.source.same_as:
        return left
    for name, first in record.source.same_as.items():
        one, other = left.tensors.get(name), left.tensors.get(first)
        is_possible = one is not None and other is not None and one.size_bytes == other.size_bytes
        if not is_possible or first in record.source.same_as:
            raise OutputExistsError(
                f"output says of tensor {name[:80]!r} that it has the bytes of {first[:80]!r}, which cannot be",
                path=directory.path,
                hint="The state of the split, or the set, is not that of this source; bring back the right one.",
            )
    return fold(left, record.source.same_as, ())


def _require_same_index(directory: Path, source: KeptSource) -> None:
    """Raise `SourceChangedError` for a weights index that names shards of the source, and is not the recorded one."""
    with output_errors(directory):
        names = sorted(path.name for path in directory.iterdir() if path.name.endswith(".index.json"))
        for name in names:
            data = read_regular(directory / name)
            is_its = any(f'"{shard.name}"'.encode() in data for shard in source.shards)
            if is_its and (name, data) != source.weights_index:
                raise SourceChangedError(
                    "weights index is not the one that the split recorded",
                    path=directory / name,
                    hint="Bring back the right one; or the state of the split in the output is not of this source.",
                )


def require_not_consumed(output: Path) -> None:
    """Raise `OutputExistsError` if an unfinished run deleted shards of its source, and nobody asked to go on so."""
    try:
        state = read_state_file(output / STATE_NAME)
    except OutputExistsError:
        return  # what is to be done about it depends on what is asked for
    if state is not None and state.get(DELETED_KEY):
        raise OutputExistsError(
            "output holds an unfinished split that deletes its source as it goes",
            path=output,
            hint="Go on with --consume --resume, or choose another directory.",
        )


def _names(values: object) -> Collection[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _parse_journal(journal: object, path: Path) -> KeptSource:
    try:
        fields = Fields(journal if isinstance(journal, dict) else {}, str(path), KEPT_SOURCE_KEY)
        index = None
        if fields.values.get("index") is not None:
            inner = fields.inner("index")
            index = (inner.plain_name("name"), parse_kept(inner).data(str(path)))
        shards = tuple(_parse_shard(shard, str(path)) for shard in fields.each("shards"))
        same_as = fields.get("same_as", dict)
        if not all(isinstance(first, str) for first in same_as.values()):
            fields.fail("field 'same_as' has something else than names")
        if len({shard.name for shard in shards}) != len(shards):
            fields.fail("a shard occurs twice")
        return KeptSource(shards, index, tuple(_names(fields.get("files", list))), same_as)
    except (FormatError, IntegrityError) as error:
        raise OutputExistsError(f"cannot read the state of an unfinished run: {error.what}", path=path) from error


def _parse_shard(fields: Fields, path: str) -> KeptShard:
    size_bytes, data = fields.count("bytes"), parse_kept(fields.inner("kept")).data(path)
    identity = tuple(fields.get("identity", list))
    ranges: list[ByteRange] = []
    for item in fields.get("ranges", list):
        if not isinstance(item, list) or len(item) != 2 or not all(type(value) is int for value in item):
            fields.fail("a kept range is not a list of two integers")
        ranges.append((item[0], item[1]))
    positions = [0, *(position for place in ranges for position in place), size_bytes]
    if positions != sorted(positions) or sum(stop - start for start, stop in ranges) != len(data):
        fields.fail("kept ranges do not fit the shard, or what is kept of it")
    if not all(type(value) is int for value in identity):
        fields.fail("field 'identity' is not a list of integers")
    return KeptShard(fields.plain_name("name"), size_bytes, identity, tuple(ranges), data)


def _source_of_set(root: Path) -> KeptSource:
    path = root / SET_MANIFEST_NAME
    with output_errors(path):
        manifest = parse_set_manifest(read_regular(path), str(path))
    stored: dict[str, set[tuple[int, int]]] = {shard.name: set() for shard in manifest.shards}
    same_as: dict[str, str] = {}
    for entry in manifest.partitions:
        partition_path = root / manifest_name(entry.part_id)
        with output_errors(partition_path):
            partition = parse_manifest(read_regular(partition_path), str(partition_path))
        for tensor in partition.stored_tensors():
            same_as.update((place.name, tensor.name) for place in tensor.also if place.name != tensor.name)
            for place in tensor.places():
                stored.setdefault(place.shard, set()).add((place.start_offset, place.stop_offset))
    shards = tuple(
        KeptShard(
            shard.name,
            shard.size_bytes,
            (shard.size_bytes,),
            tuple(gaps_between(stored[shard.name], shard.size_bytes)),
            shard.kept.data(shard.name),
        )
        for shard in manifest.shards
    )
    index = None
    if manifest.weights_index is not None:
        name, index_bytes = manifest.weights_index
        index = (name, index_bytes.data(name))
    return KeptSource(shards, index, tuple(entry.name for entry in manifest.files), same_as)
