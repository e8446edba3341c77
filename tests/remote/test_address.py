"""What counts as a repository on the Hub, and what never does."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.remote.address import HubAddress, is_repo_id, looks_like_path, parse_hub_address

COMMIT = "0123456789abcdef0123456789abcdef01234567"

ADDRESSES = {
    "org/name": ("org/name", None),
    "meta-llama/Llama-3.2-1B": ("meta-llama/Llama-3.2-1B", None),
    "org/name@main": ("org/name", "main"),
    f"org/name@{COMMIT}": ("org/name", COMMIT),
    "org/name@refs/pr/7": ("org/name", "refs/pr/7"),
    "org/name@feature/x": ("org/name", "feature/x"),
    "hf://org/name": ("org/name", None),
    "hf://org/name/": ("org/name", None),
    "hf://models/org/name@v1.0": ("org/name", "v1.0"),
    "https://huggingface.co/org/name": ("org/name", None),
    "https://huggingface.co/org/name/": ("org/name", None),
    "HTTPS://hf.co/org/name": ("org/name", None),
    "https://huggingface.co/org/name/tree/main": ("org/name", "main"),
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F7": ("org/name", "refs/pr/7"),
    "https://huggingface.co/org/name/tree/refs/pr/7": ("org/name", "refs/pr/7"),
    "https://huggingface.co/org/name?library=x#card": ("org/name", None),
    "http://mirror:8080/hub/org/name/tree/v1": ("org/name", "v1"),
}

NEITHER = (
    *("", "name", "gpt2", ".", "..", "./x", "../x", "/x", "/org/name", "~/x", "a/b/c", "a/b/c@main", "org/name/"),
    *("x.safetensors", "org/x.safetensors", "models/x.SAFETENSORS", "dir/model.safetensors.index.json", "a/x.bin"),
    *("C:/x", "C:\\x", "org\\name", "org/na me", "org/-x", "org/x-", "org/.x", "org/a--b", "org/a..b", "org/x.git"),
    *(
        "org/name@",
        "org/name@a b",
        "org/name@../x",
        "org/name@x?y",
        "org/name\n",
        "org/n\u00e4me",
        "@main",
        "org/@main",
    ),
    *("datasets/name", "spaces/org", "hf://datasets/org/name", "hf://org", "hf://org/name/file", "s3://org/name"),
    *("https://example.com/org/name", "https://huggingface.co/org", "https://huggingface.co/datasets/org/name"),
    *("https://huggingface.co/org/name/blob/main/config.json", "https://huggingface.co/org/name/tree/main/sub"),
    *(
        "https://[x",
        "https://huggingface.co:x/org/name",
        "https://",
        "https://huggingface.co/docs/hub",
        "http://mirror:8080/org/name",
        "http://mirror:8080/hubs/org/name",
    ),
)


@pytest.mark.parametrize(("text", "expected"), ADDRESSES.items())
def test_what_names_a_repository_is_parsed(text: str, expected: tuple[str, str | None]) -> None:
    """As an id, with a revision, or as an address of the Hub or of the configured endpoint."""
    assert parse_hub_address(text, "http://mirror:8080/hub") == HubAddress(*expected)


@pytest.mark.parametrize("text", NEITHER)
def test_what_cannot_name_one_is_none(text: str) -> None:
    """Paths above all."""
    assert parse_hub_address(text, "http://mirror:8080/hub") is None


@pytest.mark.parametrize(
    "text", ["./org/name", "/org/name", "~/name", "a\\b", "c:x/y", "a/b/c", "name", "a/m.json", "a/"]
)
def test_what_is_written_as_a_path_looks_like_one(text: str) -> None:
    """Also if it does not exist."""
    assert looks_like_path(text)


@pytest.mark.parametrize("text", ["org/name", "org/name@refs/pr/7", "org/name.v2"])
def test_what_may_be_an_id_does_not_look_like_a_path(text: str) -> None:
    """It may be one all the same: what exists has precedence."""
    assert not looks_like_path(text)


@given(st.text(alphabet="aZ9_.-/", min_size=1, max_size=12))
def test_no_id_passes_that_huggingface_hub_refuses(text: str) -> None:
    """With a namespace, the rules are the same in both directions."""
    try:
        validate_repo_id(text)
        accepted = "/" in text
    except HFValidationError:
        accepted = False
    assert is_repo_id(text) == accepted


@pytest.mark.parametrize("length", [96, 97])
def test_the_longest_name_is_that_of_huggingface_hub(length: int) -> None:
    """96 characters."""
    assert is_repo_id(f"org/{'x' * length}") == (length == 96)
