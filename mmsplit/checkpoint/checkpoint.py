"""`open_checkpoint`: a directory of shards, understood from headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.checkpoint.directory import CheckpointFiles, find_checkpoint_files
from mmsplit.checkpoint.file_reader import FileReader, Fingerprint, IoMode
from mmsplit.checkpoint.header import LENGTH_BYTES, parse_header, parse_header_length
from mmsplit.checkpoint.tensor import TensorInfo
from mmsplit.errors import CheckpointError, IndexMismatchError

_MAX_CONFIG_BYTES: Final = 16 << 20


class Shard(NamedTuple):
    """One input weight file.  Bytes [0, `header_bytes`) are header, the rest is covered by tensors."""

    name: str
    path: Path
    header_bytes: int
    fingerprint: Fingerprint

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return self.fingerprint.size_bytes


class Checkpoint:
    """A checkpoint whose headers have been read and agree with each other; no weight has been touched.

    `tensors` maps each name to its `TensorInfo`, shards in name order, then by offset.  `config` is config.json,
    or None.  `small_files` are names relative to `root`.  `notes` are sentences for a person.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        shards: tuple[Shard, ...],
        tensors: dict[str, TensorInfo],
        config: dict[str, object] | None,
        notes: tuple[str, ...],
    ) -> None:
        self.root = files.root
        self.shards = shards
        self.tensors = tensors
        self.config = config
        self.small_files = files.small_files
        self.index_name = files.index_path.name if files.index_path else None
        self.index_bytes = files.index_bytes
        self.notes = notes
        self.model_id, self.revision = _identity(files.root)
        self.total_bytes = sum(tensor.size_bytes for tensor in tensors.values())
        self.total_params = sum(tensor.params for tensor in tensors.values())
        self._shard_by_name = {shard.name: shard for shard in shards}

    def __repr__(self) -> str:
        return f"<Checkpoint {self.model_id}: {len(self.tensors):,} tensors in {len(self.shards)} shards>"

    def open_shard(self, name: str, io: IoMode = "auto") -> FileReader:
        """Open a shard for reading; raises `SourceChangedError` if it is not the file whose header was read."""
        shard = self._shard_by_name[name]
        reader = open_source(shard.path, io)
        if reader.fingerprint != shard.fingerprint:
            # Let the reader say it in the one way it is said everywhere.
            reader.fingerprint = shard.fingerprint
            try:
                reader.require_unchanged()
            finally:
                reader.close()
        return reader

    def read_header(self, name: str) -> bytes:
        """Read bytes [0, `header_bytes`) of a shard: length field and header, verbatim."""
        with self.open_shard(name, "pread") as reader:
            return reader.read(0, self._shard_by_name[name].header_bytes)


def open_checkpoint(path: str | Path, *, allow_unknown_dtypes: bool = False) -> Checkpoint:
    """Read all headers of the checkpoint at `path`: a directory, one shard, or a weights index.

    Raises `HeaderError`, `MissingShardError`, `IndexMismatchError` or another `CheckpointError`.
    """
    files = find_checkpoint_files(Path(path))
    shards: list[Shard] = []
    tensors: dict[str, TensorInfo] = {}
    for shard_path in files.shards:
        shard, found = _read_shard(shard_path, allow_unknown_dtypes)
        shards.append(shard)
        for tensor in found:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                raise IndexMismatchError(
                    f"tensor is in two shards, {first.shard} and {tensor.shard}",
                    path=shard_path,
                    tensor=tensor.name,
                    hint="Remove the shard that does not belong, or name the weights index instead of the directory.",
                )
    config, config_notes = _read_config(files.root)
    notes = (*files.notes, *config_notes, *_compare_with_index(files, tensors))
    return Checkpoint(files, tuple(shards), tensors, config, notes)


def open_source(path: Path, io: IoMode) -> FileReader:
    """Open a file of a checkpoint; the operating system's refusals become `CheckpointError`."""
    try:
        return FileReader(path, io=io)
    except OSError as error:
        raise CheckpointError(f"cannot open: {error.strerror}", path=path) from error


def _read_shard(path: Path, allow_unknown_dtypes: bool) -> tuple[Shard, tuple[TensorInfo, ...]]:
    with open_source(path, "pread") as reader:
        size = reader.size_bytes
        length = parse_header_length(reader.read(0, min(LENGTH_BYTES, size)), size, str(path))
        header = reader.read(LENGTH_BYTES, LENGTH_BYTES + length)
        parsed = parse_header(header, size, str(path), path.name, allow_unknown_dtypes=allow_unknown_dtypes)
        return Shard(path.name, path, parsed.header_bytes, reader.fingerprint), parsed.tensors


def _compare_with_index(files: CheckpointFiles, tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    if files.weight_map is None:
        return ()
    for name, shard in files.weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise IndexMismatchError(
                f"tensor is listed in {shard}, but no header has it",
                path=files.index_path,
                tensor=name,
                hint="Index and shards are not of the same model; download both again.",
            )
        if tensor.shard != shard:
            raise IndexMismatchError(
                "tensor is not in the shard the index names",
                path=files.index_path,
                tensor=name,
                expected=shard,
                found=tensor.shard,
                hint="Index and shards are not of the same model; download both again.",
            )
    unlisted = [name for name in tensors if name not in files.weight_map]
    if not unlisted:
        return ()
    return (
        f"{len(unlisted)} tensor(s) are in the shards but not in the index; they are carried along:"
        f" {', '.join(unlisted[:3])}{' …' if len(unlisted) > 3 else ''}",
    )


def _read_config(root: Path) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    """config.json only cross-checks, so a broken one is a note and not an error."""
    path = root / "config.json"
    if not path.is_file():
        return None, ()
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return None, (f"config.json is {path.stat().st_size:,} bytes long and was not looked at",)
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return None, (f"config.json could not be read and was not used: {error}",)
    if not isinstance(config, dict):
        return None, ("config.json is not a JSON object and was not used",)
    return config, ()


def _identity(root: Path) -> tuple[str, str | None]:
    """Model id and revision: from the Hub cache's own folder names where it is one, else the folder's name."""
    parts = root.absolute().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1), parts[-1]
    # ".." is taken out, but links are kept: the name a person gave
    return Path(os.path.abspath(root)).name, None  # noqa: PTH100
