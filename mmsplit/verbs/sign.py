"""`sign`: vouch for a partition set with a key."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmsplit.errors import OutputExistsError, RequestError
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX, write_whole_file
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.sidecar.set_reader import read_set_manifest, resolve_set_path
from mmsplit.sidecar.signature import SIGNATURE_NAME, make_signature

#: No part of a set: what a run locks.
_NOT_SIGNED = (".mmsplit.lock",)


class SignResult(NamedTuple):
    """Where the signature is, and the root digest that it vouches for."""

    path: Path
    root_digest: str

    def as_json(self) -> dict[str, object]:
        """Return what `sign --json` shows."""
        return {"path": str(self.path), "root_digest": self.root_digest}


def sign(
    path: str | Path,
    private_key: str | Path,
    *,
    output: str | Path | None = None,
    password: str | None = None,
    every_file: bool = False,
    force: bool = False,
) -> SignResult:
    """Sign the partition set at `path` in the form of OpenSSF Model Signing.

    The signature goes to `output`, by default `partition_set.json.sig` in the directory of the set.  It lists
    `partition_set.json` alone, which binds all the rest by its root digest and takes no time; with `every_file` it
    lists every file of the directory, for those who verify without mmsplit, and all are hashed for that.
    `private_key` is a PEM file with a key of curve P-256, P-384 or P-521, which `password` decrypts.

    Whether the set is intact is not looked at: that is for `verify`.  Raises `RequestError`, `FormatError`,
    `IntegrityError` if the set manifest is damaged, `OutputExistsError` unless `force` is given, `MissingExtraError`.
    """
    root, only = resolve_set_path(Path(path))
    if only is not None:
        raise RequestError(f"one partition is not signed, but {SET_MANIFEST_NAME}", path=path, hint=f"Give {root}.")
    manifest = read_set_manifest(root)
    place = root / SIGNATURE_NAME if output is None else Path(output)
    if place.exists() and not force:
        raise OutputExistsError("signature exists already", path=place, hint="Use --force to replace it.")
    ignored = None
    if every_file:
        ignored = list(_NOT_SIGNED)
        if place.resolve().is_relative_to(root.resolve()):
            name = place.resolve().relative_to(root.resolve()).as_posix()
            ignored += [name, name + PARTIAL_SUFFIX]
    write_whole_file(place, make_signature(root, Path(private_key), password, ignored))
    return SignResult(place, manifest.root_digest)
