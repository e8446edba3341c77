"""Signatures of partition sets, in the form of OpenSSF Model Signing, by its own library.

A signature is a Sigstore bundle over a list of files with their digests.  The list may name `partition_set.json`
alone: that file is small and binds every byte of the set through its root digest, so that nothing large is hashed to
sign or to verify, and a directory that has only some partitions verifies, too.  Whichever list is signed, by mmsplit or
by `model_signing sign`, what mmsplit takes from it is a root digest that can be trusted.

Only what the library documents is used of it.  It reads a signature by its path, so it is given a copy that nobody
else writes to, and the list is read from that same copy once the library has found it right.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mmsplit.digests import SHA256_PREFIX, sha256_of
from mmsplit.errors import FormatError, IntegrityError, MissingExtraError, RequestError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.json_fields import load_json_object
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, parse_set_manifest

if TYPE_CHECKING:
    from types import ModuleType

SIGNATURE_NAME: Final = SET_MANIFEST_NAME + ".sig"
_PREDICATE: Final = "https://model_signing/signature/v1.0"
_KEYS_HINT: Final = (
    "Give a PEM file with a key of curve P-256, P-384 or P-521: the private one to sign, the public one to verify."
)
#: A list of a million files has some 200 MB.
_MAX_SIGNATURE_BYTES: Final = 1 << 28


def make_signature(root: Path, private_key: Path, password: str | None, ignored: Iterable[str] | None) -> bytes:
    """Sign the set in `root`; return the signature.

    It lists `partition_set.json` alone or, with `ignored`, every file below `root` but those, all hashed again.  The
    key is an elliptic curve's (P-256, P-384, P-521) in a PEM file.  Raises `RequestError` for a key that cannot be
    used, `MissingExtraError`.
    """
    library = _library()
    signer = library.signing.Config()
    try:
        # Of a str cryptography says that it is no buffer.
        signer.use_elliptic_key_signer(
            private_key=private_key, password=None if password is None else password.encode()
        )
    except Exception as error:  # the library lets through whatever its parts raise
        _refuse_key(private_key, error, has_password=password is not None)
    if ignored is None:
        signer.set_hashing_config(_only_the_set_manifest(library))
    else:
        signer.set_hashing_config(library.hashing.Config().set_ignored_paths(paths=[Path(name) for name in ignored]))
    with tempfile.TemporaryDirectory(prefix="mmsplit-") as folder:
        path = Path(folder, SIGNATURE_NAME)
        try:
            signer.sign(root, path)
        except Exception as error:
            raise FormatError(f"cannot be signed: {_said(error)}", path=root) from error
        return read_regular(path)


def signed_root_digest(root: Path, signature: Path, public_key: Path) -> str:
    """Return the root digest of the set in `root`, for which whoever has the private key vouches.

    Every file that the signature lists is compared with its digest there.  Raises `IntegrityError` for a signature
    that is not right, or of something else, `RequestError` for a key that cannot be used, `MissingExtraError`.
    """
    library = _library()
    verifier = library.verifying.Config()
    try:
        verifier.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        _refuse_key(public_key, error, has_password=None)
    data = _read(signature, _MAX_SIGNATURE_BYTES)
    verifier.set_ignore_unsigned_files(True)
    with tempfile.TemporaryDirectory(prefix="mmsplit-") as folder:
        copy = Path(folder, SIGNATURE_NAME)
        copy.write_bytes(data)
        try:
            verifier.verify(root, copy)
        except Exception as error:
            raise IntegrityError(
                f"signature is not right: {_said(error)}",
                path=signature,
                hint="Check the key. A signature of every file needs every file of the set to be here.",
            ) from error
    return _root_digest_listed(root / SET_MANIFEST_NAME, data, signature)


def _root_digest_listed(set_manifest: Path, data: bytes, signature: Path) -> str:
    """Return the root digest of a set manifest that a signature, which is right, lists."""
    statement = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))
    listed = {}
    if statement["predicateType"] == _PREDICATE:
        listed = {resource["name"]: resource for resource in statement["predicate"]["resources"]}
    if SET_MANIFEST_NAME not in listed:
        raise IntegrityError(
            f"signature is right, but does not list {SET_MANIFEST_NAME}",
            path=signature,
            hint="Sign the directory of the set.",
        )
    text = _read(set_manifest, _MAX_SIGNATURE_BYTES * 4)
    resource = listed[SET_MANIFEST_NAME]
    if resource["algorithm"] == "sha256" and sha256_of(text) != SHA256_PREFIX + resource["digest"]:
        raise IntegrityError("set manifest changed while its signature was verified", path=set_manifest)
    parse_set_manifest(text, str(set_manifest))
    return str(load_json_object(text, str(set_manifest))["root_digest"])


def _only_the_set_manifest(library: ModuleType) -> Any:
    class OnlyTheSetManifest(library.hashing.Config):  # type: ignore[name-defined,misc]
        """Hashes that file, whatever else is there."""

        def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:  # noqa: ARG002
            return super().hash(model_path, files_to_hash=[Path(model_path, SET_MANIFEST_NAME)])

    return OnlyTheSetManifest()


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        if path.stat().st_size > limit_bytes:
            raise FormatError("file is too large for what it is", path=path, found=path.stat().st_size)
        return read_regular(path)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=path) from error


def _refuse_key(path: Path, error: Exception, *, has_password: bool | None) -> NoReturn:
    """Say why a key is refused; `has_password` is None for a public one, which has none."""
    said, hint = _said(error), _KEYS_HINT
    if isinstance(error, OSError):
        said = error.strerror or said
    elif isinstance(error, AttributeError):  # a sound key, but the library asks it for its curve
        said = "it is no key of an elliptic curve"
    elif has_password is False and isinstance(error, TypeError):
        said, hint = "it is encrypted", "Give its password: --password-file FILE (in Python password=)."
    elif has_password and isinstance(error, TypeError):
        said, hint = "it is not encrypted, and a password is given", "Leave the password out."
    elif has_password and isinstance(error, ValueError) and "password" in said.lower():
        said, hint = "its password is not right", "Check the file of --password-file: its first line is the password."
    raise RequestError(f"key cannot be used: {said}", path=path, hint=hint) from error


def _said(error: Exception) -> str:
    """Return what the library says, without the end of its sentence: ours goes on."""
    return str(error).rstrip(" .?!") or type(error).__name__


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise MissingExtraError(
            f"signatures need the OpenSSF model-signing library: {error}",
            hint="Install it with: pip install 'mmsplit[sign]'",
        ) from error
    return model_signing
