"""Where a partition set is published: how a place is spelled, and its files read from there."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from huggingface_hub import constants
from loopback_fixtures import CONFIG, WEIGHTS, use_endpoint
from loopback_hub import MEMBER_TOKEN, Fault, LoopbackHub

from mmsplit.errors import NetworkError, OfflineError, RemoteNotFoundError, RequestError
from mmsplit.remote.set_source import HubFolder, SetSource, open_set_source, parse_hub_folder
from mmsplit.remote.source import HubOptions

HUB = "https://huggingface.co"
MIRROR = "https://mirror.example/hub"


@pytest.mark.parametrize(
    ("text", "repository", "folder"),
    [
        ("org/name", "org/name", ""),
        ("org/name:sets/a", "org/name", "sets/a"),
        ("org/name@v1:sets/a/", "org/name@v1", "sets/a"),
        ("org/name@refs/pr/3:a", "org/name@refs/pr/3", "a"),
        ("hf://org/name@v1:a", "hf://org/name@v1", "a"),
        (f"{HUB}/org/name", f"{HUB}/org/name", ""),
        (f"{HUB}/org/name/tree/main", f"{HUB}/org/name/tree/main", ""),
        (f"{HUB}/org/name/tree/v1/sets/a%20b", f"{HUB}/org/name/tree/v1", "sets/a b"),
        (f"{HUB}/org/name/tree/refs/pr/3", f"{HUB}/org/name/tree/refs/pr/3", ""),
        (f"{HUB}/org/name/tree/refs%2Fpr%2F3/a", f"{HUB}/org/name/tree/refs%2Fpr%2F3", "a"),
        (f"{HUB}/org/name/blob/main/a/partition_set.json", f"{HUB}/org/name/tree/main", "a"),
        (f"{HUB}/org/name/resolve/main/partition_set.json", f"{HUB}/org/name/tree/main", ""),
        (f"{MIRROR}/org/name/tree/main/a", f"{MIRROR}/org/name/tree/main", "a"),
        ("s3://bucket/a:b", "s3://bucket/a:b", ""),
    ],
)
def test_a_folder_is_taken_off(text: str, repository: str, folder: str) -> None:
    """After a colon, or after the revision in the address of a page."""
    assert parse_hub_folder(text, MIRROR if "mirror" in text else HUB) == HubFolder(repository, folder)


@pytest.mark.parametrize("text", ["org/name:", "org/name:../x", "org/name:a//b", "org/name:.", "org/name:a\\b"])
def test_folders_that_lead_elsewhere_are_refused(text: str) -> None:
    """A folder is plain names joined by slashes."""
    with pytest.raises(RequestError, match="not a folder"):
        parse_hub_folder(text, HUB)


@pytest.fixture
def folder_hub(hub: LoopbackHub) -> LoopbackHub:
    """org/model has a folder, too, and so has the plain server."""
    hub.move_main("org/model", {"sets/a b/config.json": CONFIG, "sets/a b/partition_0.bin": WEIGHTS})
    folder = hub.static / "sets" / "a b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "partition_0.bin").write_bytes(WEIGHTS)
    return hub


def assert_reads(source: SetSource) -> None:
    assert source.read("config.json", 1000) == CONFIG
    file = source.open("partition_0.bin")
    assert file.size_bytes == len(WEIGHTS)
    assert file.name.endswith("partition_0.bin")
    assert file.read(1000, 70_000) == WEIGHTS[1000:70_000]
    with pytest.raises(RemoteNotFoundError):
        source.read("none.json", 1000)
    with pytest.raises(NetworkError, match="too large"):
        source.read("partition_0.bin", 1000)


def test_a_folder_of_a_repository(folder_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Hub's endpoint or by a page's address; the revision is pinned once."""
    use_endpoint(monkeypatch, folder_hub.endpoint)
    for text in ("org/model:sets/a b", f"{folder_hub.endpoint}/org/model/tree/main/sets/a%20b"):
        source = open_set_source(text)
        assert source.commit == folder_hub.repositories["org/model"].branches["main"]
        folder_hub.move_main("org/model", {"sets/a b/config.json": b"later"})
        assert_reads(source)
        folder_hub.move_main("org/model", {"sets/a b/config.json": CONFIG})
    assert open_set_source("org/model").read("config.json", 1000) == CONFIG
    assert source.directory is None


def test_a_private_repository_needs_a_token(folder_hub: LoopbackHub) -> None:
    """The token goes to the Hub alone, and is in no location."""
    with pytest.raises(RemoteNotFoundError, match="private"):
        open_set_source("org/private", HubOptions(endpoint=folder_hub.endpoint))
    source = open_set_source("org/private", HubOptions(endpoint=folder_hub.endpoint, token=MEMBER_TOKEN))
    assert source.open("model.safetensors").read(5, 9) == WEIGHTS[5:9]
    assert MEMBER_TOKEN not in source.location


def test_a_revision_may_be_given_beside_the_id(folder_hub: LoopbackHub) -> None:
    """Two different ones contradict each other."""
    commit = folder_hub.repositories["org/model"].branches["main"]
    hub = HubOptions(revision=commit, endpoint=folder_hub.endpoint)
    assert open_set_source("org/model", hub).commit == commit
    with pytest.raises(RequestError, match="two revisions"):
        open_set_source("org/model@main", hub)


def test_the_network_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE holds for a repository."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError):
        open_set_source("org/model")


@pytest.mark.parametrize("end", ["", "/", "/partition_set.json"])
def test_a_folder_on_a_web_server(folder_hub: LoopbackHub, end: str) -> None:
    """With or without a slash, or by its set manifest."""
    assert_reads(open_set_source(folder_hub.static_url("sets/a b") + end))


def test_what_signs_an_address_goes_with_every_file_and_into_no_message(folder_hub: LoopbackHub) -> None:
    """A query stands behind the folder; the name comes before it."""
    source = open_set_source(folder_hub.static_url("sets/a b") + "?sig=verysecret#there")
    assert_reads(source)
    assert {request.path.partition("?")[2] for request in folder_hub.requests} == {"sig=verysecret"}
    folder_hub.faults.append(Fault("status", status=403))
    with pytest.raises(NetworkError) as caught:
        source.read("config.json", 1000)
    assert "verysecret" not in f"{caught.value} {source.location}"
    assert quote("a b") in source.location


def test_a_folder_that_fsspec_reaches() -> None:
    """Whatever package the user has; the one in memory is always there."""
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/set/config.json", CONFIG)
    files.pipe("/bucket/set/partition_0.bin", WEIGHTS)
    for end in ("", "/", "/partition_set.json"):
        assert_reads(open_set_source(f"memory://bucket/set{end}"))


def test_a_directory(folder_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path or as text, by its set manifest, from the home directory; one that exists is no repository."""
    root = folder_hub.static / "sets" / "a b"
    (root / "partition_set.json").write_bytes(b"{}")
    for source in (root, str(root), root / "partition_set.json"):
        assert_reads(open_set_source(source))
    assert open_set_source(root).directory == root
    monkeypatch.setenv("HOME", str(root.parent))
    assert_reads(open_set_source("~/a b"))
    monkeypatch.chdir(folder_hub.static)
    assert_reads(open_set_source("sets/a b"))
    with pytest.raises(RequestError, match="not a directory"):
        open_set_source(root / "config.json")


@pytest.mark.parametrize("text", ["./none", "/none/none", "none", "a/b/c", "none.json", ""])
def test_places_that_are_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how a place is written; nothing is asked of anybody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError):
        open_set_source(text)


def test_a_file_that_changes_its_length_is_noticed(tmp_path: Path) -> None:
    """A range beyond what was seen at first is not within the file."""
    (tmp_path / "a").write_bytes(b"abc")
    file = open_set_source(tmp_path).open("a")
    assert file.read(1, 3) == b"bc"
    with pytest.raises(RequestError):
        file.read(0, 4)
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(Exception, match=r"outside the file|ends early"):
        file.read(0, 3)
