"""Text without secrets: tokens, passwords and signatures, as they occur in what servers and libraries say.  Pure."""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = (
    r"x-(?:amz|goog|ms)-[a-z-]+|signature|sig|policy|key-pair-id|awsaccesskeyid|(?:access_?|refresh_?|id_?)?token"
    r"|api_?key|password|passwd|secret"
)
_PATTERNS: Final = (
    # In an address: what stands before the @, and all from the first ? or # on.
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#'\"<>]*@", re.IGNORECASE), r"\1"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", re.IGNORECASE), r"\1"),
    # Beyond addresses: headers, the Hub's tokens, JSON web tokens, parameters, user:password@host.
    (re.compile(r"\b(bearer|basic)(\s+)[^\s'\",;\\]+", re.IGNORECASE), r"\1\2…"),
    (re.compile(r"\b(?:hf|api)_(?:oauth_|jwt_|org_)?[A-Za-z0-9][\w.-]{15,}"), "…"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w.-]+"), "…"),
    (re.compile(rf"\b((?:{_NAMES})['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"[^\s/@'\"]+:[^\s/@'\"]+@(?=[\w.-])"), ""),
)


def without_secrets(text: str, *known: str | None) -> str:
    """Return `text` without tokens, passwords and the query of any address, and without each of `known`."""
    for secret in known:
        if secret:
            text = text.replace(secret, "…")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
