"""`mmsplit_export.json`: what an export makes, from what, and the SHA-256 of each file that is whole.

Written before the first file, after each, and last of all as complete.  By it a later run knows which files are its
own: what it may keep, or with "force" remove.  Loaders ignore it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.errors import FormatError, IntegrityError, OutputExistsError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.json_fields import Fields, load_json_object
from mmsplit.sidecar.output_files import output_errors, sha256_of_file, write_whole_file

RECORD_NAME: Final = "mmsplit_export.json"
_FORMAT: Final = "mmsplit-export"
_VERSION: Final = 1
_MOST_BYTES: Final = 256 << 20


class ExportedFile(NamedTuple):
    """A file of an export, `name` relative to it.  Length and SHA-256 are None while it is not whole."""

    name: str
    size_bytes: int | None = None
    sha256: str | None = None


class ExportRecord(NamedTuple):
    """What an export makes: JSON values that tell it from any other, and its files by name.

    `files` are weights and their index, `small_files` what else a model has.
    """

    identity: Mapping[str, object]
    files: dict[str, ExportedFile]
    small_files: dict[str, ExportedFile]
    complete: bool = False

    def write(self, directory: Path) -> None:
        """Write it to its place, durably."""
        values = {
            "format": _FORMAT,
            "format_version": _VERSION,
            **self.identity,
            "complete": self.complete,
            "files": [_as_json(file) for file in self.files.values()],
            "small_files": [_as_json(file) for file in self.small_files.values()],
        }
        write_whole_file(directory / RECORD_NAME, (json.dumps(values, indent=1) + "\n").encode())

    def is_whole(self, directory: Path, name: str) -> bool:
        """Whether a file of weights is there as it was written; reads it.

        One that may not have been whole when the record was last written counts as missing.  Raises `OutputExistsError`
        for one that is not what was written.
        """
        entry, path = self.files.get(name), directory / name
        if entry is None or entry.sha256 is None or not path.exists():
            return False
        same = path.is_file() and path.stat().st_size == entry.size_bytes and sha256_of_file(path) == entry.sha256
        if not same:
            raise OutputExistsError(
                "file is not what the earlier export wrote",
                path=path,
                expected=entry.sha256,
                hint="Move it away, or use --force to replace it.",
            )
        return True


def read_record(directory: Path) -> ExportRecord | None:
    """Return the record of an earlier export, None if there is none.

    Raises `OutputExistsError` for one that cannot be read: then nobody knows which files are whose.
    """
    path = directory / RECORD_NAME
    try:
        with output_errors(path):
            if not path.exists():
                return None
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:
                raise FormatError("not a record of an export", path=path)
            data = read_regular(path)
        fields = Fields(load_json_object(data, str(path)), str(path))
        if fields.get("format", str) != _FORMAT or fields.get("format_version", int) != _VERSION:
            fields.fail("not the record of an export of a version known here")
        own = ("format", "format_version", "complete", "files", "small_files")
        identity = {key: value for key, value in fields.values.items() if key not in own}
        files = {f.plain_name("name"): _parse_file(f) for f in fields.each("files")}
        small_files = {f.relative_name("name"): _parse_file(f) for f in fields.each("small_files")}
        return ExportRecord(identity, files, small_files, fields.get("complete", bool))
    except (FormatError, IntegrityError) as error:
        raise OutputExistsError(
            f"output holds a record of an export that cannot be read: {error.what}",
            path=path,
            hint="Choose another directory, or remove what lies there yourself.",
        ) from error


def _as_json(file: ExportedFile) -> dict[str, object]:
    return {"name": file.name, "bytes": file.size_bytes, "sha256": file.sha256}


def _parse_file(fields: Fields) -> ExportedFile:
    return ExportedFile(
        fields.get("name", str),
        None if fields.values.get("bytes") is None else fields.count("bytes"),
        None if fields.values.get("sha256") is None else fields.sha256("sha256"),
    )
