"""What a user writes for a repository on the Hub: `org/name`, `org/name@revision`, or an address.  Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
#: Hosts that are the Hub whatever endpoint is configured.
_HUB_HOSTS: Final = ("huggingface.co", "www.huggingface.co", "hf.co")
#: The rules of huggingface_hub's `validate_repo_id`, for ids with a namespace.
_PART: Final = r"\w(?:[\w.-]{0,94}\w)?"
_REPO_ID: Final = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_SPECIAL_REVISION: Final = re.compile(r"refs/(?:pr/\d+|convert/[\w.-]+)", re.ASCII)
_NOT_MODELS: Final = ("datasets", "spaces", "kernels", "buckets", "api", "docs", "models")
#: A second part that ends so is a file in a folder rather than a repository.
_FILE_SUFFIXES: Final = (".safetensors", ".json", ".bin")


class HubAddress(NamedTuple):
    """A repository on the Hub, `namespace/name`, and the revision asked for; None for the default."""

    repo_id: str
    revision: str | None


def parse_hub_address(text: str, endpoint: str = DEFAULT_ENDPOINT) -> HubAddress | None:
    """Return the repository that `text` names, or None if it cannot be one.

    `endpoint` is the Hub's configured address.  A path that exists has precedence; that is for the caller to know.
    """
    if text.startswith("hf://"):
        return _parse_id(text[len("hf://") :].removeprefix("models/").rstrip("/"))
    if text.lower().startswith(("http://", "https://")):
        return _parse_url(text, endpoint)
    if looks_like_path(text):
        return None
    return _parse_id(text)


def looks_like_path(text: str) -> bool:
    """Return whether `text` is written as a path is, so that it is never looked up on the Hub."""
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.endswith("/")
        or bool(re.match(r"[A-Za-z]:", text))
        or text.lower().endswith(_FILE_SUFFIXES)
        or text.partition("@")[0].count("/") != 1
    )


def _parse_id(text: str) -> HubAddress | None:
    repo_id, at, revision = text.partition("@")
    if not is_repo_id(repo_id) or (at and not _is_revision(revision)):
        return None
    return HubAddress(repo_id, revision or None)


def is_repo_id(text: str) -> bool:
    """Return whether `text` is `namespace/name` as the Hub allows it."""
    return (
        bool(_REPO_ID.fullmatch(text))
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
        and text.partition("/")[0] not in _NOT_MODELS
    )


def _is_revision(text: str) -> bool:
    return bool(text) and ".." not in text and not any(c.isspace() or not c.isprintable() or c in "?#" for c in text)


def _parse_url(text: str, endpoint: str) -> HubAddress | None:
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets that are no IPv6 address
        return None
    base = urlsplit(endpoint)
    path = parts.path
    if parts.netloc == base.netloc:
        if not path.startswith(f"{base.path.rstrip('/')}/"):
            return None
        path = path[len(base.path.rstrip("/")) :]
    elif parts.netloc.lower() not in _HUB_HOSTS:
        return None
    folders = path.strip("/").split("/")
    if len(folders) == 2:
        return _parse_id("/".join(folders))
    if len(folders) < 4 or folders[2] != "tree":
        return None
    revision = unquote("/".join(folders[3:]))
    special = _SPECIAL_REVISION.fullmatch(revision)
    if len(folders) > 4 and not special:
        return None  # a folder within a repository, or a branch with a / that is not quoted: cannot tell
    return _parse_id(f"{'/'.join(folders[:2])}@{revision}")
