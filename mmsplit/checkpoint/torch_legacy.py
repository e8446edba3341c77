"""The form in which PyTorch saved before 1.6: pickles one after the other, then the storages.  Pure but for the reads.

    pickle   magic number
    pickle   protocol version, 1001
    pickle   {"protocol_version": 1001, "little_endian": True, "type_sizes": {...}}
    pickle   the saved object; storages are persistent ids
    pickle   list of storage keys, in the order of
    storage  count of elements (8 bytes, little endian), then the elements; nothing is aligned

Nothing may come after the last storage.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mmsplit.checkpoint.pickle_layout import PickledDict, PickleRefusalError, parse_pickle
from mmsplit.checkpoint.range_reads import RangeReads
from mmsplit.checkpoint.torch_objects import StorageRef, TorchVocabulary
from mmsplit.errors import TorchFileError

MAGIC: Final = 0x1950A86A20F9469CFC6C
#: How the magic number looks in a pickle, after the opcodes that begin it; these are within `MAGIC_WITHIN` bytes.
MAGIC_BYTES: Final = MAGIC.to_bytes(10, "little")
MAGIC_WITHIN: Final = 32
_PROTOCOL_VERSION: Final = 1001
_COUNT_BYTES: Final = 8
_FIRST_READ_BYTES: Final = 64 << 10
_DOWNLOAD_HINT: Final = "The file is truncated or damaged. Download it again."


class LegacyFile(NamedTuple):
    """The saved object, its storages by key, and the byte range of each storage's elements in the file."""

    root: object
    storages: dict[str, StorageRef]
    places: dict[str, tuple[int, int]]


class _Pickles(NamedTuple):
    """What the pickles say.  `keys` are in the order of the storages, the first of which begins at `stop_offset`."""

    root: object
    storages: dict[str, StorageRef]
    keys: list[str]
    stop_offset: int


def read_legacy_file(reads: RangeReads, max_pickle_bytes: int) -> LegacyFile:
    """Read the pickles, and the count before each storage.  Raises `TorchFileError`."""
    length = _FIRST_READ_BYTES
    while True:
        # Only the pickles say where they end: a longer prefix is read until they are whole.
        prefix = reads.read(0, min(length, reads.size_bytes))
        try:
            pickles = _parse_pickles(prefix)
            break
        except PickleRefusalError as refusal:
            is_last = len(prefix) == reads.size_bytes or length >= max_pickle_bytes
            if is_last or not refusal.is_undecodable:
                raise TorchFileError(
                    refusal.what, path=reads.path, offset=refusal.offset, hint=refusal.hint or _DOWNLOAD_HINT
                ) from None
        length = min(4 * length, max_pickle_bytes)
    return LegacyFile(pickles.root, pickles.storages, _locate(pickles, reads))


def _parse_pickles(prefix: bytes) -> _Pickles:
    position = 0
    vocabulary = TorchVocabulary()
    values = []
    for _ in range(5):
        try:
            value, length = parse_pickle(prefix[position:], vocabulary)
        except PickleRefusalError as refusal:
            refusal.offset = position + (refusal.offset or 0)
            raise
        values.append(value)
        position += length
        if len(values) == 3:
            _require_preamble(*values)
    *_, root, keys = values
    return _Pickles(root, vocabulary.storages, _storage_keys(keys, vocabulary.storages), position)


def _require_preamble(magic: object, version: object, system: object) -> None:
    if magic != MAGIC or version != _PROTOCOL_VERSION:
        raise PickleRefusalError(f"file does not begin with PyTorch's magic number and version {_PROTOCOL_VERSION}")
    items = system.items if isinstance(system, PickledDict) else []
    endian = [value for key, value in items if key == "little_endian"]
    if not endian or endian[-1] is not True:
        raise PickleRefusalError(
            "file does not say that a little-endian machine wrote it",
            hint="Load the file with PyTorch and save it again on a little-endian machine.",
        )


def _storage_keys(value: object, storages: dict[str, StorageRef]) -> list[str]:
    keys = [key for key in value if isinstance(key, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(keys) != len(value) or len(set(keys)) != len(keys):
        raise PickleRefusalError("file's list of storage keys is not a list of different texts")
    if set(keys) != set(storages):
        raise PickleRefusalError("file's list of storage keys does not name the storages that its tensors need")
    return keys


def _locate(pickles: _Pickles, reads: RangeReads) -> dict[str, tuple[int, int]]:
    """Return the byte range of each storage; every one must hold as many elements as the pickle says."""
    places = {}
    position = pickles.stop_offset
    for key in pickles.keys:
        start = position + _COUNT_BYTES
        position = start + pickles.storages[key].size_bytes
        places[key] = start, position
    if position != reads.size_bytes:
        raise TorchFileError(
            "file is shorter than its storages" if position > reads.size_bytes else "file goes on after its storages",
            path=reads.path,
            expected=f"{position:,} bytes",
            found=reads.size_bytes,
            hint=_DOWNLOAD_HINT,
        )
    fields = reads.read_all([(start - _COUNT_BYTES, start) for start, _ in places.values()])
    for (key, (start, _)), count in zip(places.items(), fields, strict=True):
        if int.from_bytes(count, "little", signed=True) != pickles.storages[key].count:
            raise TorchFileError(
                f"storage {key[:80]!r} has another length than the pickle says",
                path=reads.path,
                offset=start - _COUNT_BYTES,
                expected=pickles.storages[key].count,
                found=int.from_bytes(count, "little", signed=True),
                hint=_DOWNLOAD_HINT,
            )
    return places
