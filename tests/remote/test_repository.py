"""A repository on the Hub: pinned, listed, read; and each way in which it cannot be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import httpx
from loopback_fixtures import CONFIG, WEIGHTS, FakeClock, use_endpoint
from loopback_hub import MEMBER_TOKEN, OUTSIDER_TOKEN, Fault, LoopbackHub

from mmsplit.errors import (
    AccessDeniedError,
    NetworkError,
    OfflineError,
    RemoteNotFoundError,
    RequestError,
    SourceChangedError,
)
from mmsplit.remote.repository import HubFile, HubRepository, cached_snapshot, is_safe_name, open_repository

UNKNOWN_TOKEN = "hf_unknownunknownunknownunknownunkn03"


def opened(hub: LoopbackHub, repo_id: str = "org/model", **options: object) -> HubRepository:
    return open_repository(repo_id, endpoint=hub.endpoint, **options)  # type: ignore[arg-type]


def test_files_are_listed_with_what_the_hub_knows_of_them(hub: LoopbackHub) -> None:
    """Names, sizes, SHA-256 of large files and git's id of small ones, in the order of names."""
    repository = opened(hub)
    stored = hub.repositories["org/model"].commits[repository.commit]
    assert repository.files == tuple(
        HubFile(name, file.size_bytes, file.sha256 if file.is_lfs else None, file.blob_id, xet=False)
        for name, file in sorted(stored.items())
    )
    weights = repository.file("model.safetensors")
    assert (weights.sha256, weights.etag) == (hashlib.sha256(WEIGHTS).hexdigest(),) * 2
    assert repository.file("config.json").etag == repository.file("config.json").blob_id
    assert "onnx/a b#%.onnx" in repository
    assert "onnx" not in repository


def test_a_listing_of_many_pages_is_read_to_its_end(hub: LoopbackHub) -> None:
    """The Hub hands out a thousand entries at a time."""
    hub.page_size = 2
    assert len(opened(hub).files) == 4
    assert len(hub.requests_to("hub", "/tree/")) == 3  # five entries, of which one is a folder


def test_opening_costs_two_requests_and_uses_only_the_commit_from_then_on(hub: LoopbackHub) -> None:
    """The branch is named once."""
    repository = opened(hub, revision="main")
    repository.read_file("config.json", 100)
    first, *others = hub.requests
    assert first.path == "/api/models/org/model/revision/main"
    assert all(repository.commit in request.path for request in others)
    assert len(others) == 3  # the listing; the file, by way of one redirect
    assert repository.traffic.snapshot().request_count == len(hub.requests)


def test_a_branch_may_have_a_slash_in_its_name(hub: LoopbackHub) -> None:
    """refs/pr/7 is one."""
    stored = hub.repositories["org/model"]
    first = stored.branches["main"]
    hub.move_main("org/model", {"new.bin": b"new"})
    stored.branches["refs/pr/7"] = first
    assert opened(hub, revision="refs/pr/7").commit == first


def test_a_branch_that_moves_meanwhile_changes_nothing(hub: LoopbackHub) -> None:
    """What was opened stays readable as it was; whoever opens again gets the new commit."""
    repository = opened(hub)
    commit = hub.move_main("org/model", {"model.safetensors": WEIGHTS[::-1], "new.bin": b"new"})
    assert repository.open_file("model.safetensors").read(0, len(WEIGHTS)) == WEIGHTS
    again = opened(hub)
    assert again.commit == commit
    assert again.open_file("model.safetensors").read(0, len(WEIGHTS)) == WEIGHTS[::-1]
    assert opened(hub, revision=repository.commit).files == repository.files


def test_small_files_are_read_whole_and_no_larger_than_allowed(hub: LoopbackHub) -> None:
    """An index of many gigabytes is no index."""
    repository = opened(hub)
    assert repository.read_file("config.json", len(CONFIG)) == CONFIG
    assert repository.read_file("empty.txt", 0) == b""
    assert repository.read_file("onnx/a b#%.onnx", 1000) == WEIGHTS[:1000]
    with pytest.raises(NetworkError, match="too large"):
        repository.read_file("config.json", len(CONFIG) - 1)
    with pytest.raises(RemoteNotFoundError, match=r"no file 'nothing\.json'"):
        repository.read_file("nothing.json", 100)


def test_files_kept_by_xet_are_read_by_ranges_like_any_other(hub: LoopbackHub) -> None:
    """Plain HTTP is what every repository offers."""
    repository = opened(hub, "org/xet")
    assert [file.name for file in repository.files if file.xet] == ["model.safetensors", "onnx/a b#%.onnx"]
    assert repository.open_file("model.safetensors").read(7, 70_000) == WEIGHTS[7:70_000]


def test_a_renamed_repository_is_found_under_its_old_name(hub: LoopbackHub) -> None:
    """The Hub redirects; relative to itself, so that the token goes along."""
    hub.renamed["org/old"] = "org/private"
    repository = opened(hub, "org/old", token=MEMBER_TOKEN)
    assert repository.read_file("config.json", 100) == CONFIG
    assert repository.open_file("model.safetensors").read(0, 9) == WEIGHTS[:9]


def test_the_token_goes_to_the_hub_only(hub: LoopbackHub) -> None:
    """The CDN refuses whoever brings one, as the real one does."""
    repository = opened(hub, "org/private", token=MEMBER_TOKEN)
    assert repository.open_file("model.safetensors").read(0, len(WEIGHTS)) == WEIGHTS
    assert {request.authorization for request in hub.requests_to("hub")} == {f"Bearer {MEMBER_TOKEN}"}
    assert [request.authorization for request in hub.requests_to("cdn")] == [None]
    assert MEMBER_TOKEN not in repr(vars(repository))


@pytest.mark.parametrize("way", ["variable", "file", "argument"])
def test_the_token_is_found_where_huggingface_hub_finds_it(
    hub: LoopbackHub, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN, then the login; a token that is given goes before both."""
    if way == "variable":
        monkeypatch.setenv("HF_TOKEN", MEMBER_TOKEN)
    elif way == "file":
        path = Path(constants.HF_TOKEN_PATH)
        path.parent.mkdir(parents=True)
        path.write_text(MEMBER_TOKEN + "\n")
    else:
        monkeypatch.setenv("HF_TOKEN", UNKNOWN_TOKEN)
    opened(hub, "org/private", token=f" {MEMBER_TOKEN}\n" if way == "argument" else None)
    with pytest.raises(RemoteNotFoundError):
        opened(hub, "org/private", token=False)


def test_the_endpoint_is_that_of_the_process_unless_one_is_given(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_ENDPOINT, with or without a slash at its end."""
    use_endpoint(monkeypatch, hub.endpoint)
    assert open_repository("org/model").endpoint == hub.endpoint
    assert open_repository("org/model", endpoint=f"{hub.endpoint}/").endpoint == hub.endpoint


REFUSALS: dict[str, tuple[str, dict[str, object], type[NetworkError], tuple[str, ...]]] = {
    "missing": ("org/nothing", {}, RemoteNotFoundError, ("org/nothing: no such repository", "HF_TOKEN")),
    "missing, logged in": ("org/nothing", {"token": MEMBER_TOKEN}, RemoteNotFoundError, ("no such repository",)),
    "private": ("org/private", {}, RemoteNotFoundError, ("or a private one", "hf auth login", "HF_TOKEN")),
    "revision": ("org/model", {"revision": "v9"}, RemoteNotFoundError, ("no revision 'v9'", "org/model/tree/main")),
    "strange revision": ("org/model", {"revision": "a/b c"}, RemoteNotFoundError, ("no revision 'a/b c'",)),
    "bad token": (
        "org/model",
        {"token": UNKNOWN_TOKEN},
        AccessDeniedError,
        ("does not accept the token", "/settings/tokens", "unset HF_TOKEN"),
    ),
}


@pytest.mark.parametrize(("repo_id", "options", "kind", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_a_repository_that_cannot_be_had_is_told_apart(
    hub: LoopbackHub,
    fake_clock: FakeClock,
    repo_id: str,
    options: dict[str, object],
    kind: type[NetworkError],
    parts: tuple[str, ...],
) -> None:
    """Each message says what to do; none is waited for, and none repeats the token."""
    with pytest.raises(kind) as caught:
        opened(hub, repo_id, clock=fake_clock.clock(), **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "hf_" not in message
    assert (caught.value.exit_code, fake_clock.pauses, len(hub.requests)) == (7, [], 1)


@pytest.mark.parametrize("token", [None, OUTSIDER_TOKEN], ids=["nobody", "no member"])
def test_a_gated_repository_names_the_page_where_access_is_granted(hub: LoopbackHub, token: str | None) -> None:
    """It can be listed by all, and read by those who were granted it."""
    repository = opened(hub, "org/gated", token=token)
    with pytest.raises(AccessDeniedError) as caught:
        repository.read_file("config.json", 100)
    message = str(caught.value)
    assert message.startswith(f"org/gated@{repository.commit[:12]}/config.json: gated")
    assert f"Accept it at {hub.endpoint}/org/gated and log in" in message
    assert ("has not been granted" in message) == (token is not None)
    granted = opened(hub, "org/gated", token=MEMBER_TOKEN)
    assert granted.read_file("config.json", 100) == CONFIG


def test_offline_says_which_variable_forbids_it(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked, and also when it is set under a repository that is open."""
    repository = opened(hub)
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    client = httpx.Client()  # as of a factory of the user's, that knows nothing of the variable
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    for attempt in (lambda: opened(hub), lambda: repository.read_file("config.json", 100)):
        with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
            attempt()
    assert hub.requests == []


def test_a_snapshot_is_found_in_the_cache_without_the_network(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What huggingface_hub itself has downloaded, whole or in part."""
    assert cached_snapshot("org/model") is None
    use_endpoint(monkeypatch, hub.endpoint)
    huggingface_hub.hf_hub_download("org/model", "config.json", endpoint=hub.endpoint)
    hub.clear()
    folder = cached_snapshot("org/model")
    assert folder is not None
    assert (folder / "config.json").read_bytes() == CONFIG
    assert cached_snapshot("org/model", "v9") is None
    assert cached_snapshot("org/model", folder.name) == folder
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "../etc", "org/--", "datasets/x", "org/x.git", ""])
def test_what_cannot_be_an_id_is_not_asked_for(hub: LoopbackHub, repo_id: str) -> None:
    """It would end up in an address."""
    with pytest.raises(RequestError, match="not a repository id"):
        opened(hub, repo_id)
    assert hub.requests == []


def test_busy_and_broken_moments_of_the_hub_are_waited_for(hub: LoopbackHub, fake_clock: FakeClock) -> None:
    """503, a dropped listing and a rate limit, each on the way to the list of files."""
    hub.faults += [
        Fault("status", "hub GET /api/*", status=503),
        Fault("status", "hub GET */tree/*", status=429, headers={"Retry-After": "37"}),
        Fault("status", "hub GET */tree/*", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
    ]
    repository = opened(hub, clock=fake_clock.clock())
    assert len(repository.files) == 4
    assert repository.traffic.snapshot().retry_count == 3
    assert sum(fake_clock.pauses) == pytest.approx(0.25 + 37 + 55)


LISTINGS: dict[str, object] = {
    "not a list": {"error": "x"},
    "no object": ["x"],
    "no path": [{"type": "file", "size": 1, "oid": "0" * 40}],
    "above": [{"type": "file", "path": "../x", "size": 1, "oid": "0" * 40}],
    "absolute": [{"type": "file", "path": "/x", "size": 1, "oid": "0" * 40}],
    "size of True": [{"type": "file", "path": "x", "size": True, "oid": "0" * 40}],
    "below zero": [{"type": "file", "path": "x", "size": -1, "oid": "0" * 40}],
    "id with a path": [{"type": "file", "path": "x", "size": 1, "oid": "../" + "0" * 37}],
    "sha256 with a path": [
        {"type": "file", "path": "x", "size": 1, "oid": "0" * 40, "lfs": {"oid": "../" + "0" * 61, "size": 1}}
    ],
    "two sizes": [{"type": "file", "path": "x", "size": 1, "oid": "0" * 40, "lfs": {"oid": "0" * 64, "size": 2}}],
    "twice": [{"type": "file", "path": "x", "size": 1, "oid": "0" * 40}] * 2,
}


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
def test_a_listing_that_the_hub_would_not_give_is_refused(
    hub: LoopbackHub, listing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names become paths, and hashes names of files in the cache: none is taken on trust."""
    from loopback_hub import _HubHandler

    monkeypatch.setattr(_HubHandler, "_tree", lambda handler, *_: handler.reply(200, listing))
    with pytest.raises(NetworkError, match="does not answer as the Hub does"):
        opened(hub)


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"[]", b'{"sha": "main"}', b'{"sha": 5}'])
def test_a_page_that_stands_in_for_the_hub_is_recognized(
    hub: LoopbackHub, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captive portal answers 200 to everything."""
    from loopback_hub import _HubHandler

    monkeypatch.setattr(_HubHandler, "_info", lambda handler, *_: handler.reply(200, answer))
    with pytest.raises(NetworkError, match=r"does not answer as the Hub does.*HF_ENDPOINT"):
        opened(hub)


def test_the_next_page_is_asked_of_the_endpoint_whatever_the_link_says(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror hands on the links of the real Hub; and a link must not carry the token elsewhere."""
    from loopback_hub import _HubHandler

    def pages(handler: _HubHandler, _id: str, _revision: str, _folder: str, query: dict[str, str]) -> None:
        name = query.get("cursor", "a")
        link = {"Link": '<http://127.0.0.1:9/api/x?recursive=true&cursor=b>; rel="next"'} if name == "a" else {}
        handler.reply(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}], link)

    monkeypatch.setattr(_HubHandler, "_tree", pages)
    assert [file.name for file in opened(hub, token=MEMBER_TOKEN).files] == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "value", "what"),
    [
        ("X-Linked-Size", "999999", "size"),
        ("X-Linked-ETag", '"' + "0" * 64 + '"', "ETag"),
        ("X-Repo-Commit", "0" * 40, "commit"),
    ],
)
def test_what_the_hub_says_of_a_file_must_be_what_it_listed(
    hub: LoopbackHub, header: str, value: str, what: str
) -> None:
    """A commit that was rewritten on the server is noticed before a byte of it is used."""
    repository = opened(hub)
    headers = {"Location": hub.static_url("model.bin"), header: value}
    hub.faults.append(Fault("status", "hub GET */resolve/*", status=302, headers=headers))
    with pytest.raises(SourceChangedError, match=f"another {what}"):
        repository.open_file("model.safetensors").read(0, 1)
    assert hub.requests_to("cdn") == []


NAMES = {"a": True, "a/b.json": True, "ü/ß": True, "a/../b": False, "a//b": False, "/a": False, "a\\b": False}
NAMES |= {"c:/x": False, "": False, ".": False, "a/": False, "a\nb": False, ".gitattributes": True, "a/b:c": True}


@pytest.mark.parametrize(("name", "safe"), NAMES.items())
def test_names_that_would_leave_their_folder_are_not_safe(name: str, safe: bool) -> None:
    """On any system."""
    assert is_safe_name(name) == safe


def test_what_a_stranger_sees_of_a_private_repository_is_nothing(hub: LoopbackHub) -> None:
    """The answer of the loopback Hub is the one that the real client knows."""
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.HfApi(endpoint=hub.endpoint).model_info("org/private")
    said = huggingface_hub.HfApi(endpoint=hub.endpoint, token=MEMBER_TOKEN).model_info("org/private")
    assert said.sha == hub.repositories["org/private"].branches["main"]
