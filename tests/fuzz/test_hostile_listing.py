"""Repositories and servers that mean harm: whatever they call their files, nothing lands outside of the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from directories import models, sets
from guard import Guard, guarded
from huggingface_hub import constants
from loopback_fixtures import use_endpoint
from loopback_hub import LoopbackHub
from loopback_repository import StoredFile
from mutators import NAMES
from sealing import Files, sealed, taken_apart, write_files
from target import without_waiting

from mmsplit.errors import MmsplitError
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.download import download
from mmsplit.verbs.pull import pull
from mmsplit.verbs.split import split

#: Those that can be said at all: a lone surrogate is no JSON, and no name.
_TRICKS = sorted({*NAMES} - {"", "\ud800"}, key=NAMES.index)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """org/model holds a model, org/set a set of it."""
    write_files(tmp_path / "hub" / "org" / "model", models()["plain"])
    write_files(tmp_path / "hub" / "org" / "set", sets()["plain"])
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "HF_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "home" / name))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with LoopbackHub(tmp_path / "hub") as running, without_waiting():
        use_endpoint(monkeypatch, running.endpoint)
        yield running


def _list_as(hub: LoopbackHub, repo_id: str, old: str, new: str) -> None:
    """Have the listing of a repository call a file something else, and serve it under that name."""
    files = hub.repositories[repo_id].commits[hub.repositories[repo_id].branches["main"]]
    stored: StoredFile = files.pop(old)
    files[new] = StoredFile(new, stored.path, stored.size_bytes, stored.sha256, stored.blob_id, stored.is_lfs)


def _everything(root: Path) -> set[str]:
    """Every path below a directory, but what a server and the cache have there."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.relative_to(root).parts[0] not in ("hub", "home")
    }


@pytest.mark.parametrize("name", _TRICKS)
def test_download_of_a_listing_with_tricky_names(hub: LoopbackHub, name: str, tmp_path: Path) -> None:
    """A file of the Hub's listing, and a shard, under every name; into a directory, and into the cache."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    for old in ("config.json", "model-00001-of-00002.safetensors"):
        _list_as(hub, "org/model", old, name if old == "config.json" else f"{name}.safetensors")
        before = _everything(tmp_path)
        for directory in (place / "out", None):
            try:
                download("org/model", local_dir=directory)
            except MmsplitError:
                continue
        new = _everything(tmp_path) - before
        assert all(path.startswith("a/b/out") for path in new), new
    for path in (tmp_path / "home").rglob("*"):
        assert str(path.resolve()).startswith(str(tmp_path / "home")), path


@pytest.mark.parametrize("name", _TRICKS)
def test_split_of_a_listing_with_tricky_names(hub: LoopbackHub, name: str, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    _list_as(hub, "org/model", "one/tokens.txt", name)
    try:
        split("org/model", place / "out", 1, threads=1)
    except MmsplitError:
        pass
    assert all(path.startswith("a/b/out") for path in _everything(tmp_path) - {"a", "a/b"})


def _renamed(files: Files, name: str) -> Files:
    """A set that calls one of its small files something, every checksum in order."""
    parts = taken_apart(files)
    values = json.loads(parts.set_manifest)
    entry = next(entry for entry in values["files"] if entry["name"] == "config.json")
    entry["name"] = name
    changed = {key: data for key, data in parts.files.items() if key != "config.json"}
    return sealed(parts._replace(set_manifest=json.dumps(values).encode(), files=changed))


@pytest.mark.parametrize("name", _TRICKS)
def test_pull_of_a_set_with_tricky_names(hub: LoopbackHub, name: str, tmp_path: Path) -> None:
    """The set manifest and the listing agree about the name, so that the file would be there to be fetched."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    store = tmp_path / "home"
    store.mkdir(exist_ok=True)
    made = _renamed(sets()["plain"], name)
    hub.repositories["org/set"].move_main({SET_MANIFEST_NAME: made[SET_MANIFEST_NAME]}, store)
    _list_as(hub, "org/set", "config.json", name)
    for source in ("org/set", str(tmp_path / "hub" / "org" / "set")):
        try:
            pull(source, place / "out", threads=1)
        except MmsplitError:
            continue
    assert all(path.startswith("a/b/out") for path in _everything(tmp_path) - {"a", "a/b"})
    assert not os.path.lexists("/etc/x")
    assert not os.path.lexists("/x")


def test_the_guard_sees_a_file_that_lands_beside_the_output(tmp_path: Path) -> None:
    """What the tests above compare by listing, the fuzzing of names compares by audit: both see a file outside."""
    (tmp_path / "out").mkdir()
    before = _everything(tmp_path)
    guard = Guard((tmp_path,), (tmp_path / "out",))
    with pytest.raises(AssertionError, match="open"), guarded(guard):
        (tmp_path / "out" / ".." / "x").write_bytes(b"")
    assert _everything(tmp_path) - before == {"x"}
