"""Which files of a repository matter: one set of weights, and the small files that make it usable."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from mmsplit.checkpoint import Storage, choose_checkpoint_files
from mmsplit.checkpoint.directory import MAX_SMALL_FILE_BYTES, WEIGHT_SUFFIXES
from mmsplit.errors import CheckpointError, RequestError

_SAFETENSORS: Final = ".safetensors"
#: Formats of which a repository has one set of weights, in order of preference; of others it may have many.
_OTHER_FORMATS: Final = (".bin", ".pth", ".pt")
#: Families that libraries look for, and what else is written beside them: optimizer states and settings of a training.
_FAMILY: Final = "pytorch_model"
_NOT_WEIGHTS: Final = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


class ChosenFiles(NamedTuple):
    """Names of files in a repository, and notes on what is left out."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


def choose_files(
    storage: Storage, names: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ChosenFiles:
    """Choose among all `names` of a repository, whose checkpoint is at `storage`.

    With `include` exactly those that match one of the patterns, else what the checkpoint needs; of these, those that
    match none of `exclude`.  Patterns are those of huggingface_hub: * goes across /, a folder is written with / at its
    end.  Raises `CheckpointError` if there are no weights to choose, `RequestError` if nothing is left.
    """
    included = tuple(name for name in names if matches(name, include))
    chosen = ChosenFiles(included, ()) if include else _choose(storage)
    left = tuple(name for name in chosen.names if not matches(name, exclude))
    if not left:
        raise RequestError(
            "no file of the repository is chosen",
            path=storage.location,
            found=f"--include {' '.join(include) or '(none)'}, --exclude {' '.join(exclude) or '(none)'}",
            hint=f"It has {_shown(names)}",
        )
    return ChosenFiles(left, chosen.notes)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns, by the rules of huggingface_hub.  Pure."""
    plain = (pattern.replace("\\", "/") for pattern in patterns)
    return any(fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in plain)


def _choose(storage: Storage) -> ChosenFiles:
    if any(name.endswith(_SAFETENSORS) for name in storage.names()):
        files = choose_checkpoint_files(storage)
        index = (files.index_name,) if files.index_name is not None else ()
        return ChosenFiles((*files.shards, *index, *files.small_files), files.notes)
    weights = _other_weights(storage.names())
    if not weights:
        below = [name for name, _ in storage.walk(True, []) if PurePosixPath(name).suffix in WEIGHT_SUFFIXES]
        raise CheckpointError(
            "no weights at the top of the repository that could be chosen",
            path=storage.location,
            found=_shown(below) if below else "no weights at all",
            hint="Say which files to download: --include 'NAME' or --include 'FOLDER/*'",
        )
    small = [
        name
        for name, size in storage.walk(True, [])
        if PurePosixPath(name).suffix not in WEIGHT_SUFFIXES and (size or 0) <= MAX_SMALL_FILE_BYTES
    ]
    return ChosenFiles((*weights, *small), (f"no safetensors: {weights[0]} and its like are chosen instead",))


def _other_weights(names: Sequence[str]) -> tuple[str, ...]:
    """Return the weights of the best other format: its usual family, else all of that format.  Pure."""
    for suffix in _OTHER_FORMATS:
        members = [name for name in names if name.endswith(suffix) and not name.startswith(_NOT_WEIGHTS)]
        usual = [name for name in members if name.startswith(_FAMILY)]
        if members:
            return tuple(usual or members)
    return ()


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
