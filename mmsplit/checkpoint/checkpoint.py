"""`open_checkpoint`: a directory of shards, understood from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.checkpoint.directory import CheckpointFiles, find_checkpoint_files
from mmsplit.checkpoint.file_reader import IoMode
from mmsplit.checkpoint.range_reads import RangeReads
from mmsplit.checkpoint.shard_layout import read_shard_layout
from mmsplit.checkpoint.storage import Identity, RangeReader, ShardReaders, Storage
from mmsplit.checkpoint.tensor import ByteRange, ShardForm, ShardLayout, TensorInfo, TensorView, total_size
from mmsplit.errors import CheckpointError, IndexMismatchError, MissingShardError

CONFIG_NAME: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 16 << 20


class Shard(NamedTuple):
    """One input weight file.  The ranges `kept` are header and padding, the rest is covered by tensors.

    `location` is what a message shows: a path, or a place on the Hub.
    """

    name: str
    location: str
    size_bytes: int
    kept: tuple[ByteRange, ...]
    identity: Identity
    form: ShardForm = "safetensors"

    @property
    def kept_bytes(self) -> int:
        """Length of what is kept as it is."""
        return sum(stop - start for start, stop in self.kept)


class Checkpoint:
    """A checkpoint whose headers have been read and agree with each other; no weight has been touched.

    `tensors` maps each name to its `TensorInfo`, shards in name order, then by offset.  `views` are further names, from
    PyTorch files, whose bytes are those of a tensor: tied weights, slices, transposes.  `config` is config.json, or
    None.  `small_files` are names relative to `storage`.  `notes` are sentences for a person.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        shards: tuple[Shard, ...],
        tensors: dict[str, TensorInfo],
        config: dict[str, object] | None,
        notes: tuple[str, ...],
        views: dict[str, TensorView] | None = None,
    ) -> None:
        self._files = files
        self.storage = files.storage
        self.shards = shards
        self.tensors = tensors
        self.views = views or {}
        self.config = config
        self.small_files = files.small_files
        self.index_name = files.index_name
        self.index_bytes = files.index_bytes
        self.notes = notes
        self.model_id, self.revision = files.storage.model
        self.total_bytes = total_size(tensors.values())
        self.total_params = sum([tensor.params for tensor in tensors.values()])
        self._shard_by_name = {shard.name: shard for shard in shards}

    def __repr__(self) -> str:
        return f"<Checkpoint {self.model_id}: {len(self.tensors):,} tensors in {len(self.shards)} shards>"

    @property
    def location(self) -> str:
        """Where it is, as a person would name it."""
        return self.storage.location

    def location_of(self, name: str) -> str:
        """Where one of its files is, as a person would name it."""
        return self.storage.location_of(name)

    def folded(self, tensors: dict[str, TensorInfo], views: dict[str, TensorView], notes: Iterable[str]) -> Checkpoint:
        """Return the same checkpoint with other records of what lies where, and more notes."""
        return Checkpoint(self._files, self.shards, tensors, self.config, (*self.notes, *notes), views)

    def open_shard(self, name: str, io: IoMode = "auto") -> RangeReader:
        """Open a shard for reading; raises `SourceChangedError` if it is not the file whose header was read."""
        return self.storage.open_shard(name, io, self._shard_by_name[name].identity)

    def open_readers(self, io: IoMode = "auto") -> ShardReaders:
        """Return readers of all shards, for threads to share; they raise as `open_shard` does."""
        return self.storage.open_readers(io, self._identities())

    def read_kept(self, name: str) -> bytes:
        """Read the kept ranges of a shard, joined: of a safetensors file, length field and header, verbatim."""
        shard = self._shard_by_name[name]
        with closing(self.open_shard(name, "pread")) as reader:
            reads = RangeReads(reader.read, shard.size_bytes, shard.location, reader.read_many)
            return b"".join(reads.read_all(shard.kept))

    def published_sha256(self, name: str) -> str | None:
        """64 hex digits of the SHA-256 that the Hub publishes for a shard, where that is known."""
        return self.storage.published_sha256(name)

    def require_unchanged(self) -> None:
        """Raise `SourceChangedError` if a shard is not the file whose header was read any more."""
        self.storage.require_unchanged(self._identities())

    def _identities(self) -> dict[str, Identity]:
        return {shard.name: shard.identity for shard in self.shards}


def open_checkpoint(path: str | Path, *, allow_unknown_dtypes: bool = False) -> Checkpoint:
    """Read all headers of the checkpoint at `path`: a directory, one shard, or a weights index.

    Raises `HeaderError`, `MissingShardError`, `IndexMismatchError` or another `CheckpointError`.
    """
    return read_checkpoint(find_checkpoint_files(Path(path)), allow_unknown_dtypes=allow_unknown_dtypes)


def read_checkpoint(files: CheckpointFiles, *, allow_unknown_dtypes: bool = False) -> Checkpoint:
    """Read all headers of a checkpoint whose files are known.  Raises as `open_checkpoint` does."""
    shards: list[Shard] = []
    tensors: dict[str, TensorInfo] = {}
    views: dict[str, TensorView] = {}
    home: dict[str, str] = {}
    notes = list(files.notes)
    own_config: dict[str, object] | None = None
    for name in files.shards:
        shard, layout = _read_shard(files.storage, name, allow_unknown_dtypes)
        shards.append(shard)
        notes += layout.notes
        own_config = own_config or layout.config
        if layout.file_count > len(files.shards):
            raise MissingShardError(
                f"file says it is one of {layout.file_count:,}, and there are {len(files.shards):,}",
                path=shard.location,
                hint="Download the missing files to the same directory, then run again.",
            )
        for found in (*(tensor.name for tensor in layout.tensors), *(view.name for view in layout.views)):
            first = home.setdefault(found, name)
            if first != name:
                raise _twice(shard, found, first)
        tensors.update((tensor.name, tensor) for tensor in layout.tensors)
        views.update((view.name, view) for view in layout.views)
    # Beside a file that describes its model, a config.json is often only what a download counter wants.
    config, config_notes = (own_config, ()) if own_config else read_config(files.storage)
    notes += (*config_notes, *_compare_with_index(files, home))
    return Checkpoint(files, tuple(shards), tensors, config, tuple(notes), views)


def _twice(shard: Shard, tensor: str, first: str) -> IndexMismatchError:
    hint = "Remove the shard that does not belong, or name the weights index instead of the directory."
    if shard.form == "torch":
        hint = "If these are the parts of a tensor-parallel model, split each by itself; else remove one."
    return IndexMismatchError(
        f"tensor is in two shards, {first} and {shard.name}", path=shard.location, tensor=tensor, hint=hint
    )


def _read_shard(storage: Storage, name: str, allow_unknown_dtypes: bool) -> tuple[Shard, ShardLayout]:
    location = storage.location_of(name)
    identity = storage.identity_of(name)
    with closing(storage.open_shard(name, "pread", identity)) as reader:
        size = reader.size_bytes
        layout = read_shard_layout(reader, location, name, allow_unknown_dtypes=allow_unknown_dtypes)
    return Shard(name, location, size, layout.kept, identity, layout.form), layout


def _compare_with_index(files: CheckpointFiles, home: dict[str, str]) -> tuple[str, ...]:
    """Compare the weights index with `home`: the shard in which each name, of a tensor or a view, was found."""
    if files.weight_map is None:
        return ()
    index_location = files.storage.location_of(files.index_name or "")
    for name, shard in files.weight_map.items():
        found = home.get(name)
        if found is None:
            raise IndexMismatchError(
                f"tensor is listed in {shard}, but no header has it",
                path=index_location,
                tensor=name,
                hint="Index and shards are not of the same model; download both again.",
            )
        if found != shard:
            raise IndexMismatchError(
                "tensor is not in the shard the index names",
                path=index_location,
                tensor=name,
                expected=shard,
                found=found,
                hint="Index and shards are not of the same model; download both again.",
            )
    unlisted = [name for name in home if name not in files.weight_map]
    if not unlisted:
        return ()
    return (
        f"{len(unlisted)} tensor(s) are in the shards but not in the index; they are carried along:"
        f" {', '.join(unlisted[:3])}{' …' if len(unlisted) > 3 else ''}",
    )


def read_config(storage: Storage) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    """Return config.json and notes.  It only cross-checks, so a broken one is a note and not an error."""
    size = storage.file_bytes(CONFIG_NAME)
    if size is None:
        return None, ()
    if size > _MAX_CONFIG_BYTES:
        return None, (f"config.json is {size:,} bytes long and was not looked at",)
    try:
        config = json.loads(storage.read_file(CONFIG_NAME))
    except (CheckpointError, ValueError, RecursionError) as error:
        return None, (f"config.json could not be read and was not used: {error}",)
    if not isinstance(config, dict):
        return None, ("config.json is not a JSON object and was not used",)
    return config, ()
