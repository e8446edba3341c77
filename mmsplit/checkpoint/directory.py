"""Which files are the checkpoint: its shards, its weights index, the small files that belong to it.

Where a directory has weights in several forms, safetensors come before PyTorch files, and these before GGUF.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from mmsplit.checkpoint.local_storage import LocalStorage
from mmsplit.checkpoint.shard_layout import SNIFF_BYTES, is_shard
from mmsplit.checkpoint.storage import Storage
from mmsplit.checkpoint.weight_files import (
    FORMS,
    WEIGHT_SUFFIXES,
    Numbered,
    WeightForm,
    choose_family,
    family_of,
    form_of,
    index_form,
    is_partition_file,
    is_weights,
    models_apart,
    parse_numbered,
)
from mmsplit.checkpoint.weights_index import folded_name, is_plain_name, parse_weights_index
from mmsplit.errors import CheckpointError, MissingShardError

#: Left over from downloads and runs; nobody's.
_DEBRIS_SUFFIXES: Final = frozenset((".incomplete", ".partial", ".lock"))
MAX_SMALL_FILE_BYTES: Final = 64 << 20
MAX_SMALL_FILES: Final = 10_000
_MAX_INDEX_BYTES: Final = 512 << 20
_DOWNLOAD_HINT: Final = "Download the missing shards, then run again."
_SAFETENSORS: Final = FORMS[0]
#: What makes partitions a set, here for error messages only.
_SET_MANIFEST_NAME: Final = "partition_set.json"


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
    first: dict[str, str] = {}
    for shard in files.shards:
        other = first.setdefault(folded_name(shard), shard)
        if other != shard:
            raise CheckpointError(
                f"two shards whose names differ only by letter case or Unicode form: {other!r} and {shard!r}",
                path=files.storage.location_of(shard),
                hint="Many file systems take them for one file, and would lose one: rename one of them.",
            )
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
            hint="Give a directory that holds .safetensors, .bin or .gguf files, or a model of the Hub: org/name.",
        )
    if path.is_dir():
        return _choose(LocalStorage(path))
    storage = LocalStorage(path.parent)
    index = index_form(path.name)
    if index is not None:
        return _from_index(storage, path.name, index)
    if not path.is_file():
        raise CheckpointError("not a regular file", path=path)
    form = form_of(path.name)
    if form is None and not is_shard(_first_bytes(path)):
        if is_partition_file(path.name):
            raise _partitions(storage, "a file of a partition set", str(path))
        raise CheckpointError(
            "not a safetensors, PyTorch or GGUF file, a weights index or a directory",
            path=path,
            hint="Give a directory, a file of weights, or a weights index such as model.safetensors.index.json.",
        )
    numbered = parse_numbered(path.name)
    if numbered is not None and form is not None and form.form == "gguf":
        # As its own loader has it: who names one file of several means the model.
        members = [name for name in storage.names() if family_of(name) == numbered.family and is_weights(name, form)]
        _require_numbered_siblings(storage, members)
        return _without_index(storage, members, [], deep=False)
    alone = [f"{path.name} is one of {numbered.file_count} shards, and is taken alone"] if numbered else []
    return _without_index(storage, [path.name], alone, deep=False)


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(SNIFF_BYTES)


def _choose(storage: Storage) -> CheckpointFiles:
    names = storage.names()
    for form in FORMS:
        weights = [name for name in names if is_weights(name, form)]
        suffix = form.index_suffix
        indexes = [] if suffix is None else [name for name in names if name.endswith(suffix)]
        if weights or indexes:
            return _choose_family(storage, form, weights, indexes)
    raise _no_weights(storage, names)


def _choose_family(storage: Storage, form: WeightForm, weights: list[str], indexes: list[str]) -> CheckpointFiles:
    suffix = form.index_suffix or ""
    family = choose_family(weights, [name.removesuffix(suffix) for name in indexes])
    if family is None and not form.one_model:
        family = _only_model(storage, weights)
    notes: list[str] = []
    if family is None:
        members = weights  # a plain directory of shards: all of them
    else:
        members = [name for name in weights if family_of(name) == family]
        notes += _note_left([name for name in weights if family_of(name) != family], f"beside {family!r}")
        index_name = f"{family}{suffix}"
        if index_name in indexes:
            # save_pretrained leaves a stale index behind when a later save fits one file; loaders take the file.
            alone = len(members) == 1 and parse_numbered(members[0]) is None
            if alone and set(_read_index(storage, index_name, form)[1].values()) != set(members):
                notes.append(f"{index_name} names other shards than {members[0]}, which is complete without it")
                return _without_index(storage, members, notes)
            return _from_index(storage, index_name, form)
    _require_numbered_siblings(storage, members)
    return _without_index(storage, members, notes)


def _only_model(storage: Storage, weights: list[str]) -> str:
    models = models_apart(weights) or sorted({family_of(name) for name in weights})
    if len(models) > 1:
        raise CheckpointError(
            f"{len(models)} models are in this directory",
            path=storage.location,
            found=f"{', '.join(weights[:5])}{' …' if len(weights) > 5 else ''}",
            hint="Name the file of one of them; of a model on the Hub, download that file first (--include).",
        )
    return models[0]


def _no_weights(storage: Storage, names: list[str]) -> CheckpointError:
    if any(is_partition_file(name) for name in names):
        what = "a partition set" if _SET_MANIFEST_NAME in names else "a directory that holds partitions"
        return _partitions(storage, what, storage.location)
    other = sorted({Path(name).suffix for name in names} & WEIGHT_SUFFIXES)
    return CheckpointError(
        "no .safetensors, .bin or .gguf file in this directory",
        path=storage.location,
        found=f"weights of other formats: {', '.join(other)}" if other else None,
        hint="Convert them to safetensors first." if other else "Give the directory that holds the weights.",
    )


def _partitions(storage: Storage, what: str, location: str) -> CheckpointError:
    first = "" if storage.directory else "get it first (mmsplit pull); "
    root = storage.location if storage.directory else "DIR"
    return CheckpointError(
        f"this is {what}, not a checkpoint",
        path=location,
        hint=f"To cut a set anew, {first}mmsplit repartition {root} …; to have the checkpoint, mmsplit merge {root} ….",
    )


def _note_left(shards: list[str], where: str) -> list[str]:
    if not shards:
        return []
    shown = f"{', '.join(shards[:3])}{' …' if len(shards) > 3 else ''}"
    return [f"{len(shards)} weight file(s) {where} are not part of this checkpoint: {shown}"]


def _read_index(storage: Storage, name: str, form: WeightForm) -> tuple[bytes, dict[str, str]]:
    size = storage.file_bytes(name)
    if size is not None and size > _MAX_INDEX_BYTES:
        raise CheckpointError("weights index is too large", path=storage.location_of(name), found=size)
    data = storage.read_file(name)
    return data, parse_weights_index(data, storage.location_of(name), form.suffixes)


def _without_index(storage: Storage, shards: list[str], notes: list[str], *, deep: bool = True) -> CheckpointFiles:
    small, notes_on_small = find_small_files(storage, shards, notes, deep=deep)
    return CheckpointFiles(storage, tuple(shards), None, b"", None, small, notes_on_small)


def _from_index(storage: Storage, index_name: str, form: WeightForm) -> CheckpointFiles:
    data, weight_map = _read_index(storage, index_name, form)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if storage.file_bytes(name) is None]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(shards)} shards named by {index_name} are missing: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}",
            path=storage.location_of(missing[0]),
            hint=_DOWNLOAD_HINT,
        )
    family = index_name.removesuffix(form.index_suffix or "")
    left = [name for name in storage.names() if is_weights(name, form) and name not in set(shards)]
    stray = [name for name in left if family_of(name) == family]
    notes = _note_left([name for name in left if family_of(name) != family], f"beside {family!r}")
    if stray:
        notes.append(f"{len(stray)} file(s) named like shards are not in {index_name}: {', '.join(stray[:3])}")
    small, notes_on_small = find_small_files(storage, shards, notes, index_name=index_name)
    return CheckpointFiles(storage, tuple(shards), index_name, data, weight_map, small, notes_on_small)


def _require_numbered_siblings(storage: Storage, members: list[str]) -> None:
    """Without an index the numbers in the names are the only promise; hold the directory to it."""
    present = set(members)
    promised: dict[Numbered, str] = {}  # one of the files that make the promise
    for name in members:
        numbered = parse_numbered(name)
        if numbered is not None:
            promised.setdefault(numbered, name)
    for numbered, name in promised.items():
        # one more than there are: one of them is missing
        for number in range(1, min(numbered.file_count, len(present) + 1) + 1):
            if numbered.sibling(number) not in present:
                raise MissingShardError(
                    f"shard is missing: {name} says there are {numbered.file_count:,}, and there is no index",
                    path=storage.location_of(numbered.sibling(number)),
                    hint=_DOWNLOAD_HINT,
                )


def find_small_files(
    storage: Storage,
    shards: Sequence[str] = (),
    found: Sequence[str] = (),
    *,
    index_name: str | None = None,
    deep: bool = True,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names, relative with `/`, of the files that make the model usable, and notes on what is left behind.

    Not `deep`, subfolders are left out: a shard named alone may lie in any folder, say a home directory.  `shards` and
    `index_name` are taken already; the notes begin with those `found` before.
    """
    notes = list(found)
    names: list[str] = []
    seen = _TakenNames([*shards, *([] if index_name is None else [index_name])])
    for relative, size in _walk(storage, {*shards, index_name}, form_of(shards[0]) if shards else None, deep, notes):
        if not all(is_plain_name(part) for part in relative.split("/")):
            # A partition set could not record it: its readers refuse such names.
            notes.append(f"{relative!r} is not carried along: its name is not plain printable text without \\ and :")
        elif size > MAX_SMALL_FILE_BYTES:
            notes.append(f"{relative} is not carried along: {size:,} bytes is more than a small file has")
        elif (other := seen.like(relative)) is not None:
            notes.append(
                f"{relative} is not carried along: its name differs from {other} only by letter case or Unicode form, "
                "and many file systems would take them for one file"
            )
        elif len(names) == MAX_SMALL_FILES:
            notes.append(f"more than {MAX_SMALL_FILES:,} small files; the rest is not carried along")
            break
        else:
            names.append(relative)
            seen.add(relative)
    return tuple(names), tuple(notes)


class _TakenNames:
    """Names of files, and those of the folders they lie in, as a file system sees them that folds names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Take a name."""
        self._files[folded_name(name)] = name
        for folder in PurePosixPath(name).parents:
            self._folders.setdefault(folded_name(str(folder)), str(folder))

    def like(self, name: str) -> str | None:
        """Return what cannot be beside a file of this name, None if nothing."""
        if is_partition_file(folded_name(name)):
            return "one of mmsplit's own files"
        folded = folded_name(name)
        above = (self._files.get(folded_name(str(folder))) for folder in PurePosixPath(name).parents)
        return self._files.get(folded) or self._folders.get(folded) or next(filter(None, above), None)


def _walk(
    storage: Storage, taken: Set[str | None], form: WeightForm | None, deep: bool, notes: list[str]
) -> Iterator[tuple[str, int]]:
    """Files in a fixed order, weights of any framework and what is `taken` left out.

    A note is made of what only a person can judge: weights that are not taken, and folders that may not be read; of
    weights in the checkpoint's own `form` beside it there is one already.
    """
    shards_below: list[str] = []
    other_weights: list[str] = []
    for relative, size in storage.walk(deep, notes):
        path = PurePosixPath(relative)
        suffix = path.suffix.lower()
        if relative in taken or is_partition_file(path.name):
            continue
        if form is not None and form_of(path.name) is form:
            if len(path.parts) > 1:
                shards_below.append(relative)
        elif suffix in WEIGHT_SUFFIXES:
            other_weights.append(relative)
        elif (
            suffix not in _DEBRIS_SUFFIXES
            and not path.name.endswith(_SAFETENSORS.index_suffix or "")
            and size is not None
        ):
            yield relative, size
    notes += _note_left(shards_below, "in subfolders")
    notes += _note_left(other_weights, "of other formats")
