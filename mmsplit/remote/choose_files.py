"""Which files of a repository matter: one set of weights, and the small files that make it usable."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from mmsplit.checkpoint import Storage, choose_checkpoint_files
from mmsplit.checkpoint.weight_files import WEIGHT_SUFFIXES, form_of, index_form
from mmsplit.errors import CheckpointError, RequestError


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
    names = storage.names()
    if not any(form_of(name) or index_form(name) for name in names):
        below = [name for name, _ in storage.walk(True, []) if PurePosixPath(name).suffix in WEIGHT_SUFFIXES]
        raise CheckpointError(
            "no weights at the top of the repository that could be chosen",
            path=storage.location,
            found=_shown(below) if below else "no weights at all",
            hint="Say which files to download: --include 'NAME' or --include 'FOLDER/*'",
        )
    files = choose_checkpoint_files(storage)
    index = (files.index_name,) if files.index_name is not None else ()
    return ChosenFiles((*files.shards, *index, *files.small_files), files.notes)


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
