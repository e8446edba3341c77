"""Which files are the checkpoint: its shards, its weights index, the small files that belong to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from mmsplit.checkpoint.local_storage import LocalStorage
from mmsplit.checkpoint.storage import Storage
from mmsplit.checkpoint.weights_index import SUFFIX, is_plain_name, parse_weights_index
from mmsplit.errors import CheckpointError, MissingShardError

INDEX_SUFFIX: Final = f"{SUFFIX}.index.json"
#: Families of weight names that belong together, in order of preference; any other family comes after them.
PREFERRED_FAMILIES: Final = (
    "model",
    "diffusion_pytorch_model",
    "pytorch_model",
    "consolidated",
    "adapter_model",
)
#: Files that hold weights, of whatever framework; never carried along as small files.
WEIGHT_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5"),
        *("msgpack", "onnx", "onnx_data", "tflite", "ot", "pdparams", "nemo"),
    )
)
#: Left over from downloads and runs; nobody's.
_DEBRIS_SUFFIXES: Final = frozenset((".incomplete", ".partial", ".lock"))
MAX_SMALL_FILE_BYTES: Final = 64 << 20
MAX_SMALL_FILES: Final = 10_000
_MAX_INDEX_BYTES: Final = 512 << 20
_NUMBERED: Final = re.compile(r"^(?P<family>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors$", re.ASCII)
#: Partition sets may live beside the checkpoint they came from, and what was exported has a record of it; neither is
#: part of a checkpoint.
_MMSPLIT_FILE: Final = re.compile(
    r"^(partition_(\d+|set)\.(json|bin)(\..*)?|unfinished_split\.json|mmsplit_export\.json)$", re.ASCII
)
_DOWNLOAD_HINT: Final = "Download the missing shards, then run again."


class CheckpointFiles(NamedTuple):
    """The files of a checkpoint.  `shards` are in name order; `weight_map` is None without an index."""

    storage: Storage
    shards: tuple[str, ...]
    index_name: str | None
    index_bytes: bytes
    weight_map: dict[str, str] | None
    small_files: tuple[str, ...]
    notes: tuple[str, ...]


def find_checkpoint_files(path: Path) -> CheckpointFiles:
    """Decide what `path`, a directory, a shard or a weights index, stands for.

    Raises `CheckpointError`, also where the operating system refuses to look.
    """
    try:
        return _require_sound(_find(path))
    except OSError as error:
        raise CheckpointError(f"cannot look at it: {error.strerror}", path=error.filename or path) from error


def choose_checkpoint_files(storage: Storage) -> CheckpointFiles:
    """Decide which files of a whole storage are the checkpoint.  Raises as `find_checkpoint_files` does."""
    return _require_sound(_choose(storage))


def _require_sound(files: CheckpointFiles) -> CheckpointFiles:
    for shard in files.shards:
        location = files.storage.location_of(shard)
        if files.storage.file_bytes(shard) is None:
            raise MissingShardError("shard is a link that leads nowhere", path=location, hint=_DOWNLOAD_HINT)
        if not is_plain_name(shard):
            # The partition set records the name; a reader on another system must be able to use it.
            raise CheckpointError(
                "shard's name is not plain printable text without / \\ and :", path=location, hint="Rename the file."
            )
    return files


def _find(path: Path) -> CheckpointFiles:
    if not path.exists():
        raise CheckpointError(
            "no such file or directory",
            path=path,
            hint="Give a directory that holds .safetensors files, or a model of the Hub: org/name.",
        )
    if path.is_dir():
        return _choose(LocalStorage(path))
    storage = LocalStorage(path.parent)
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(storage, path.name)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise CheckpointError("not a regular file", path=path)
        numbered = _NUMBERED.match(path.name)
        alone = [f"{path.name} is one of {int(numbered['count'])} shards, and is taken alone"] if numbered else []
        return _without_index(storage, [path.name], alone, deep=False)
    raise CheckpointError(
        "not a safetensors file, a weights index or a directory",
        path=path,
        hint=f"Give a directory, a file named *{SUFFIX} or a file named *{INDEX_SUFFIX}.",
    )


def _choose(storage: Storage) -> CheckpointFiles:
    names = storage.names()
    weights = [name for name in names if name.endswith(SUFFIX)]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    families = {_family(name) for name in weights} | {name.removesuffix(INDEX_SUFFIX) for name in indexes}
    if not families:
        raise _no_weights(storage, names)
    family: str | None = next((name for name in PREFERRED_FAMILIES if name in families), None)
    if family is None and len(indexes) == 1:
        family = indexes[0].removesuffix(INDEX_SUFFIX)
    notes: list[str] = []
    if family is None:
        members = weights  # a plain directory of shards: all of them
    else:
        members = [name for name in weights if _family(name) == family]
        notes += _note_left([name for name in weights if _family(name) != family], f"beside {family!r}")
        index_name = f"{family}{INDEX_SUFFIX}"
        if index_name in indexes:
            # save_pretrained leaves a stale index behind when a later save fits one file; loaders take the file.
            alone = members == [f"{family}{SUFFIX}"]
            if alone and set(_read_index(storage, index_name)[1].values()) != set(members):
                notes.append(f"{index_name} names other shards than {members[0]}, which is complete without it")
                return _without_index(storage, members, notes)
            return _from_index(storage, index_name)
    _require_numbered_siblings(storage, members)
    return _without_index(storage, members, notes)


def _no_weights(storage: Storage, names: list[str]) -> CheckpointError:
    partitions = [name for name in names if _MMSPLIT_FILE.match(name)]
    if partitions:
        return CheckpointError(
            "this directory holds partitions, not a checkpoint",
            path=storage.location,
            hint=f"Name one partition, such as {storage.location_of(partitions[-1])}; a whole set is merged first.",
        )
    other = sorted({Path(name).suffix for name in names} & {".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5"})
    return CheckpointError(
        "no .safetensors file in this directory",
        path=storage.location,
        found=f"weights of other formats: {', '.join(other)}" if other else None,
        hint="Convert them to safetensors first." if other else "Give the directory that holds the weights.",
    )


def _note_left(shards: list[str], where: str) -> list[str]:
    if not shards:
        return []
    shown = f"{', '.join(shards[:3])}{' …' if len(shards) > 3 else ''}"
    return [f"{len(shards)} weight file(s) {where} are not part of this checkpoint: {shown}"]


def _family(name: str) -> str:
    numbered = _NUMBERED.match(name)
    return numbered["family"] if numbered else name.removesuffix(SUFFIX)


def _read_index(storage: Storage, name: str) -> tuple[bytes, dict[str, str]]:
    size = storage.file_bytes(name)
    if size is not None and size > _MAX_INDEX_BYTES:
        raise CheckpointError("weights index is too large", path=storage.location_of(name), found=size)
    data = storage.read_file(name)
    return data, parse_weights_index(data, storage.location_of(name))


def _without_index(storage: Storage, shards: list[str], notes: list[str], *, deep: bool = True) -> CheckpointFiles:
    return CheckpointFiles(storage, tuple(shards), None, b"", None, *find_small_files(storage, notes, deep=deep))


def _from_index(storage: Storage, index_name: str) -> CheckpointFiles:
    data, weight_map = _read_index(storage, index_name)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if storage.file_bytes(name) is None]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(shards)} shards named by {index_name} are missing: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}",
            path=storage.location_of(missing[0]),
            hint=_DOWNLOAD_HINT,
        )
    family = index_name.removesuffix(INDEX_SUFFIX)
    left = [name for name in storage.names() if name.endswith(SUFFIX) and name not in set(shards)]
    stray = [name for name in left if _family(name) == family]
    notes = _note_left([name for name in left if _family(name) != family], f"beside {family!r}")
    if stray:
        notes.append(f"{len(stray)} file(s) named like shards are not in {index_name}: {', '.join(stray[:3])}")
    return CheckpointFiles(storage, tuple(shards), index_name, data, weight_map, *find_small_files(storage, notes))


def _require_numbered_siblings(storage: Storage, members: list[str]) -> None:
    """Without an index the numbers in the names are the only promise; hold the directory to it."""
    present = set(members)
    promised: dict[tuple[str, int, str], str] = {}  # one of the files that make the promise
    for name in members:
        numbered = _NUMBERED.match(name)
        if numbered is not None:
            promised.setdefault((numbered["family"], len(numbered["number"]), numbered["count"]), name)
    for (family, width, digits), name in promised.items():
        count = int(digits)
        for number in range(1, min(count, len(present) + 1) + 1):  # one more than there are: one of them is missing
            sibling = f"{family}-{number:0{width}d}-of-{digits}{SUFFIX}"
            if sibling not in present:
                raise MissingShardError(
                    f"shard is missing: {name} says there are {count:,}, and there is no index",
                    path=storage.location_of(sibling),
                    hint=_DOWNLOAD_HINT,
                )


def find_small_files(
    storage: Storage, notes: list[str] | None = None, *, deep: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names, relative with `/`, of the files that make the model usable, and notes on what is left behind.

    Not `deep`, subfolders are left out: a shard named alone may lie in any folder, say a home directory.
    """
    notes = list(notes or ())
    names: list[str] = []
    for relative, size in _walk(storage, deep, notes):
        if not all(is_plain_name(part) for part in relative.split("/")):
            # A partition set could not record it: its readers refuse such names.
            notes.append(f"{relative!r} is not carried along: its name is not plain printable text without \\ and :")
        elif size > MAX_SMALL_FILE_BYTES:
            notes.append(f"{relative} is not carried along: {size:,} bytes is more than a small file has")
        elif len(names) == MAX_SMALL_FILES:
            notes.append(f"more than {MAX_SMALL_FILES:,} small files; the rest is not carried along")
            break
        else:
            names.append(relative)
    return tuple(names), tuple(notes)


def _walk(storage: Storage, deep: bool, notes: list[str]) -> Iterator[tuple[str, int]]:
    """Files in a fixed order, weights of any framework left out.

    A note is made of what only a person can judge: shards in subfolders, and folders that may not be read.
    """
    shards_below: list[str] = []
    other_weights: list[str] = []
    for relative, size in storage.walk(deep, notes):
        path = PurePosixPath(relative)
        suffix = path.suffix.lower()
        if suffix == SUFFIX and len(path.parts) > 1:
            shards_below.append(relative)
        elif suffix in WEIGHT_SUFFIXES and suffix != SUFFIX and not _MMSPLIT_FILE.match(path.name):
            other_weights.append(relative)
        if (
            suffix not in WEIGHT_SUFFIXES | _DEBRIS_SUFFIXES
            and not path.name.endswith(INDEX_SUFFIX)
            and not _MMSPLIT_FILE.match(path.name)
            and size is not None
        ):
            yield relative, size
    notes += _note_left(shards_below, "in subfolders")
    notes += _note_left(other_weights, "of other formats")
