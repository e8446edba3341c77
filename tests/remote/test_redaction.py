"""No secret survives, and what is none does."""

from __future__ import annotations

import pytest

from mmsplit.remote.redaction import without_secrets

TOKEN = "hf_" + "aBcD1234" * 4 + "xy"

CASES = {
    "GET https://cdn.example/b?X-Amz-Signature=abc&X-Amz-Date=1 refused": "GET https://cdn.example/b refused",
    "see 'https://cdn.example/a b": "see 'https://cdn.example/a b",
    "'https://h/p?sig=abc' and \"http://h/q#t=abc\"": "'https://h/p' and \"http://h/q\"",
    "http://user:pa55@proxy:8080/": "http://proxy:8080/",
    "HTTPS://User@host/x": "HTTPS://host/x",
    "s3://key:secret@bucket/file?versionId=abc": "s3://bucket/file",
    "user:pa55@proxy:8080": "proxy:8080",
    f"Authorization: Bearer {TOKEN}": "Authorization: Bearer …",
    "Illegal header value b'Bearer short\\n'": "Illegal header value b'Bearer …\\n'",
    "Proxy-Authorization: Basic dXNlcjpwYXNz": "Proxy-Authorization: Basic …",
    f"token {TOKEN} is bad": "token … is bad",
    f"({TOKEN})": "(…)",
    "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJ1.abc-_d": "…",
    "jwt eyJhbGciOiJFZERTQSJ9.eyJzdWIi.x_-y.": "jwt …",
    "X-Amz-Security-Token=abc&x=1": "X-Amz-Security-Token=…&x=1",
    '{"access_token": "abc", "x": 1}': '{"access_token": "…", "x": 1}',
    "password=abc": "password=…",
}

INNOCENT = (
    "org/name@main/model-00001-of-00002.safetensors",
    "[Errno 111] Connection refused",
    "hf_hub_download and hf_xet",
    "mail@example",
    "https://huggingface.co/org/name/tree/main",
    "bytes 0-1/2: at 12:30",
)


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_secrets_are_left_out(text: str, expected: str) -> None:
    """Whatever they stand in."""
    assert without_secrets(text) == expected


@pytest.mark.parametrize("text", INNOCENT)
def test_the_rest_stays_as_it_is(text: str) -> None:
    """A message that says nothing helps nobody."""
    assert without_secrets(text) == text


def test_secrets_that_are_known_are_left_out_wherever_they_stand() -> None:
    """Also those that look like words; None and the empty text are no secrets."""
    assert without_secrets("it was swordfish.", "swordfish", None, "") == "it was …."
