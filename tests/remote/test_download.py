"""`download`: what is missing arrives, once, whatever happens on the way; what is there stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_fixtures import CONFIG, WEIGHTS, FakeClock
from loopback_hub import MEMBER_TOKEN, OUTSIDER_TOKEN, Fault, LoopbackHub

import mmsplit
from mmsplit.cli import run
from mmsplit.errors import (
    AccessDeniedError,
    IntegrityError,
    NoSpaceError,
    OfflineError,
    OutputExistsError,
    RemoteNotFoundError,
    RequestError,
    SourceChangedError,
)
from mmsplit.remote import downloader
from mmsplit.remote.patience import Limits
from mmsplit.remote.repository import open_repository
from mmsplit.verbs import download as verb
from mmsplit.verbs.download import download

NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
SHARDS = {name: WEIGHTS[number * 1000 :] for number, name in enumerate(NAMES)}
INDEX = json.dumps({"weight_map": {str(number): name for number, name in enumerate(NAMES)}}).encode()
CONTENT = {**SHARDS, "model.safetensors.index.json": INDEX, "config.json": CONFIG, "sub/notes.txt": b"n" * 9}
TOTAL = sum(map(len, CONTENT.values()))


@pytest.fixture(params=["cache", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Arguments of `download`: into the Hub cache, or into a folder."""
    return {"cache_dir": tmp_path / "cache"} if request.param == "cache" else {"local_dir": tmp_path / "folder"}


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock) -> Iterator[LoopbackHub]:
    """A Hub with org/shards, three shards and what belongs to them; `download` waits for nothing real."""
    root = tmp_path / "shards" / "org" / "shards"
    for name, content in {**CONTENT, "model.bin": b"b", "photo.png": b"p"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    with LoopbackHub(tmp_path / "shards", gated=["org/gated"]) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        patient = partial(open_repository, clock=fake_clock.clock(), limits=Limits(silence_seconds=0.3))
        monkeypatch.setattr(verb, "open_repository", patient)
        yield hub


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of a snapshot or folder, huggingface_hub's notes left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }


def body_bytes(hub: LoopbackHub) -> int:
    """Bytes of shards that were served."""
    return sum(request.sent_bytes for request in hub.requests_to("cdn"))


def leftovers(place: dict[str, Any]) -> list[Path]:
    (root,) = place.values()
    return [path for path in Path(root).rglob("*") if path.name.endswith((".incomplete", ".tmp", ".link"))]


def test_what_matters_arrives_once(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """Shards, index and small files; each counted in the result and served once."""
    seen: list[mmsplit.Progress] = []
    result = download("org/shards", **place, progress=seen.append)
    assert content_of(result.path) == CONTENT
    assert {file.name: (file.size_bytes, file.status) for file in result.files} == {
        name: (len(content), "downloaded") for name, content in CONTENT.items()
    }
    assert (result.downloaded_bytes, result.present_bytes, result.resumed_bytes) == (TOTAL, 0, 0)
    assert body_bytes(shards) == sum(map(len, SHARDS.values()))
    assert all(len(shards.requests_to("hub", f"/resolve/{result.commit}/{name}")) == 1 for name in CONTENT)
    assert seen[-1].done_bytes == seen[-1].total_bytes == TOTAL - len(INDEX)
    assert any("model.bin" in note for note in result.notes)
    assert leftovers(place) == []


def test_an_index_of_one_shard_is_fetched_once_and_counted(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """It is read twice to choose the files, from where it is downloaded to."""
    index = b'{"weight_map": {"a": "model.safetensors"}}'
    changes: dict[str, bytes | None] = {**dict.fromkeys(NAMES), "model.safetensors": b"w" * 99}
    shards.move_main("org/shards", {**changes, "model.safetensors.index.json": index})
    result = download("org/shards", **place)
    assert {file.status for file in result.files} == {"downloaded"}
    assert result.downloaded_bytes == sum(file.size_bytes for file in result.files)
    assert len(shards.requests_to("hub", "/model.safetensors.index.json")) == 2  # the one redirects to the other


def test_what_is_there_and_right_is_not_fetched(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """Two questions to the Hub, and no byte of any file; with verify neither."""
    download("org/shards", **place)
    for verify in (False, True):
        shards.clear()
        result = download("org/shards", **place, verify=verify)
        assert {file.status for file in result.files} == {"present"}
        assert (result.downloaded_bytes, result.present_bytes) == (0, TOTAL)
        assert len(shards.requests) == 2


@pytest.mark.parametrize("verify", [False, True])
def test_wrong_bytes_of_the_right_length_are_found_by_verify(
    shards: LoopbackHub, place: dict[str, Any], verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are not hashed without being asked to, since that takes as long as reading them."""
    monkeypatch.setattr(downloader, "_SMALL_BYTES", 1000)
    path = download("org/shards", **place).path / NAMES[1]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"?" + SHARDS[NAMES[1]][1:])
    os.utime(path, ns=times)  # a disk that forgets does not touch the times
    result = download("org/shards", **place, verify=verify)
    changed = [file.name for file in result.files if file.status == "downloaded"]
    assert changed == ([NAMES[1]] if verify else [])
    assert (content_of(result.path) == CONTENT) == verify
    assert [note for note in result.notes if str(path) in note and "replaced" in note] != [] or not verify


def test_a_shard_that_was_cut_short_is_named_and_replaced(shards: LoopbackHub, tmp_path: Path) -> None:
    """In the cache; the others are left alone."""
    path = download("org/shards", cache_dir=tmp_path / "cache").path / NAMES[0]
    path.write_bytes(WEIGHTS[:77])
    shards.clear()
    result = download("org/shards", cache_dir=tmp_path / "cache")
    assert content_of(result.path) == CONTENT
    assert body_bytes(shards) == result.downloaded_bytes == len(WEIGHTS)
    assert any("expected 1,000,000 bytes, found 77 bytes" in note for note in result.notes)


def test_a_folder_with_other_files_is_refused_before_anything_moves(shards: LoopbackHub, tmp_path: Path) -> None:
    """A model of one's own, say; --force replaces the files that differ."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / NAMES[2]).write_bytes(b"my own weights")
    with pytest.raises(OutputExistsError, match=NAMES[2]):
        download("org/shards", local_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / NAMES[2]).read_bytes() == b"my own weights"
    assert body_bytes(shards) == 0
    assert content_of(download("org/shards", local_dir=tmp_path / "mine", force=True).path) == CONTENT


def test_a_revision_is_pinned_once(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """A branch that moves in the middle of the download changes nothing of it."""
    moved: list[str] = []

    def move(_: mmsplit.Progress) -> None:
        if not moved:
            moved.append(shards.move_main("org/shards", {NAMES[0]: b"new", "config.json": b"{}"}))

    first = download("org/shards@main", **place, progress=move)
    assert content_of(first.path) == CONTENT
    second = download("org/shards", **place)
    assert second.commit == moved[0] != first.commit
    assert content_of(second.path) == {**CONTENT, NAMES[0]: b"new", "config.json": b"{}"}
    assert second.downloaded_bytes == len(b"new{}")
    assert download("org/shards", revision=first.commit, cache_dir=place.get("cache_dir")).commit == first.commit


def test_the_real_client_accepts_all_of_it(shards: LoopbackHub, tmp_path: Path) -> None:
    """Without the network; and with it, by patterns that choose the same files, it fetches nothing more."""
    result = download("org/shards", cache_dir=tmp_path / "cache")
    shards.clear()
    offline = huggingface_hub.snapshot_download("org/shards", cache_dir=tmp_path / "cache", local_files_only=True)
    assert (Path(offline), shards.requests) == (result.path, [])
    folder = huggingface_hub.snapshot_download(
        "org/shards", cache_dir=tmp_path / "cache", allow_patterns=list(CONTENT), endpoint=shards.endpoint
    )
    assert Path(folder) == result.path
    assert not any("/resolve" in request.path for request in shards.requests)


FAULTS = {
    "drop": Fault("drop", "cdn GET *", 3, after_bytes=300_000),
    "reset": Fault("reset", "cdn GET *", 3, after_bytes=300_000),
    "stall": Fault("stall", "cdn GET *", 3, after_bytes=300_000),
    "short": Fault("short", "cdn GET *", 3, after_bytes=300_000),
    "another range": Fault("wrong_range", "cdn GET *", 3),
    "range ignored": Fault("ignore_range", "cdn GET *", 3),
    "server errors": Fault("status", "* GET *", 5, status=503),
    "too many requests": Fault("status", "hub GET */resolve/*", 2, status=429, headers={"Retry-After": "600"}),
    "expired signature": Fault("status", "cdn GET *", 2, status=403),
    "flipped bit": Fault("flip", "cdn GET *"),
    "flipped bit in a small file": Fault("flip", "hub GET *config.json*"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_survived(shards: LoopbackHub, place: dict[str, Any], fault: Fault) -> None:
    """In the middle of several files at once."""
    shards.faults.append(Fault(**vars(fault)))
    result = download("org/shards", **place)
    assert content_of(result.path) == CONTENT
    assert shards.faults[0].times == 0
    assert leftovers(place) == []


def test_bytes_that_are_wrong_again_and_again_end_in_one_error(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """The files that were right stay; the wrong one never gets its name."""
    shards.faults.append(Fault("flip", f"cdn GET */{_sha256(shards, NAMES[1])}*", -1))
    with pytest.raises(IntegrityError, match=NAMES[1]):
        download("org/shards", **place, connections=1)
    shards.clear()
    result = download("org/shards", **place)
    assert content_of(result.path) == CONTENT
    assert body_bytes(shards) <= len(SHARDS[NAMES[1]]) + len(SHARDS[NAMES[2]])


def _sha256(hub: LoopbackHub, name: str) -> str:
    repository = hub.repositories["org/shards"]
    return repository.commits[repository.branches["main"]][name].sha256


def test_a_file_that_the_server_changed_is_refused(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """A commit whose content is another on the server than in its listing."""
    headers = {"Location": "/x", "X-Linked-ETag": '"' + "0" * 64 + '"', "X-Linked-Size": str(len(WEIGHTS))}
    shards.faults.append(Fault("status", "hub GET */resolve/*safetensors", -1, status=302, headers=headers))
    with pytest.raises(SourceChangedError):
        download("org/shards", **place)


def test_space_is_looked_at_before_anything_moves(
    shards: LoopbackHub, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already needs no more; the message says how much is wanting."""
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    free = [TOTAL - 1 - len(INDEX)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free[0]))
    with pytest.raises(NoSpaceError, match="Free 1 bytes") as caught:
        download("org/shards", **place)
    assert (caught.value.expected, caught.value.found) == (f"{TOTAL - len(INDEX):,} bytes free", free[0])
    assert body_bytes(shards) == 0
    free[0] += 1
    download("org/shards", **place)
    free[0] = 0
    download("org/shards", **place)


def test_what_a_partial_file_holds_needs_no_space_again(
    shards: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is still to come is compared with what is free."""
    needed: list[int] = []
    monkeypatch.setattr(verb, "require_space", lambda _, needed_bytes: needed.append(needed_bytes))
    blobs = tmp_path / "cache" / "models--org--shards" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{_sha256(shards, NAMES[0])}.mmsplit.incomplete").write_bytes(WEIGHTS[:400_000])
    result = download("org/shards", cache_dir=tmp_path / "cache")
    assert needed == [TOTAL - len(INDEX) - 400_000]
    assert (result.resumed_bytes, result.downloaded_bytes) == (400_000, TOTAL - 400_000)


# Processes that end, and those that work side by side.


def command(hub: LoopbackHub, place: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    """`mmsplit download` in a process of its own."""
    ((option, path),) = place.items()
    words = [sys.executable, "-m", "mmsplit", "download", "org/shards", f"--{option.replace('_', '-')}", str(path)]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    return subprocess.Popen(
        [*words, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sizes_of_partials(place: dict[str, Any]) -> list[int]:
    sizes = []
    for path in leftovers(place):
        with suppress(FileNotFoundError):  # it got its name just now
            sizes.append(path.stat().st_size)
    return sorted(sizes)


def test_killed_at_any_byte_the_same_command_continues_there(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """kill -9 three times, each a little further; no byte is ever asked for twice."""
    stalls = [100_000, 50_001, 300_000]
    for number, after_bytes in enumerate(stalls, 1):
        shards.faults[:] = [Fault("stall", "cdn GET *", -1, after_bytes=after_bytes)]
        child = command(shards, place)
        reached = sum(stalls[:number])
        wait_until(lambda reached=reached: sizes_of_partials(place) == [reached] * 3)  # type: ignore[misc]
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    shards.faults.clear()
    last = command(shards, place)
    out, err = last.communicate()
    assert (last.returncode, err.count("error")) == (0, 0)
    assert content_of(Path(out.splitlines()[0])) == CONTENT
    asked = [request.range for request in shards.requests_to("cdn")]
    starts = [0, 100_000, 150_001, 450_001]
    assert sorted(asked) == sorted(
        f"bytes={start}-{len(content) - 1}" for start in starts for content in SHARDS.values()
    )
    assert body_bytes(shards) == sum(map(len, SHARDS.values()))
    assert "continued from an earlier run" in out
    assert leftovers(place) == []


def test_an_interrupt_ends_it_cleanly(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """Exit code 130, one line, no traceback; what arrived stays."""
    shards.faults.append(Fault("stall", "cdn GET *", -1, after_bytes=200_000))
    child = command(shards, place)
    wait_until(lambda: sizes_of_partials(place) == [200_000] * 3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err.strip().splitlines()[-1] == "mmsplit: interrupted. The same command continues from what is there."
    assert "Traceback" not in err
    assert sizes_of_partials(place) == [200_000] * 3


def test_two_processes_at_once_fetch_everything_once(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """The one waits for the other, content by content."""
    children = [command(shards, place), command(shards, place)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert content_of(Path(outputs[0][0].splitlines()[0])) == CONTENT
    assert body_bytes(shards) == sum(map(len, SHARDS.values()))


def test_many_files_are_fetched_at_once(shards: LoopbackHub, place: dict[str, Any]) -> None:
    """As many as there are connections, and no more."""
    for connections in (1, 2):
        shards.faults[:] = [Fault("stall", "cdn GET *", -1, after_bytes=1000)]
        stop = threading.Event()

        def give_up(_: mmsplit.Progress, stop: threading.Event = stop) -> None:
            if stop.is_set():
                raise KeyboardInterrupt

        before = len(shards.requests_to("cdn"))
        thread = threading.Thread(target=_ignoring_interrupts, args=(place, connections, give_up))
        thread.start()
        wait_until(lambda before=before, n=connections: len(shards.requests_to("cdn")) == before + n)  # type: ignore[misc]
        stop.set()
        shards.faults.clear()
        thread.join(60)
        assert not thread.is_alive()


def _ignoring_interrupts(place: dict[str, Any], connections: int, progress: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        download("org/shards", **place, connections=connections, progress=progress)


# What cannot be had, and what it says.


def test_refusals_say_what_to_do_and_never_the_token(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Private, gated, missing: each is one error, exit code 7; with the right token it works."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    for model, token, kind in (
        ("org/private", None, RemoteNotFoundError),
        ("org/gated", None, AccessDeniedError),
        ("org/gated", OUTSIDER_TOKEN, AccessDeniedError),
        ("org/none", None, RemoteNotFoundError),
        ("org/model@nope", None, RemoteNotFoundError),
    ):
        with pytest.raises(kind):
            download(model, token=token)
        assert run(["download", model, *(("--token", token) if token else ()), "--debug"]) == 7
    assert run(["download", "org/gated", "--token", MEMBER_TOKEN]) == 0
    assert run(["download", "org/private", "--token", MEMBER_TOKEN, "--json"]) == 0
    out, err = capfd.readouterr()
    assert "hf_" not in out + err
    assert f"{hub.endpoint}/org/gated" in err


def test_offline_names_what_was_downloaded_before(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is anything; no connection is tried."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="Unset HF_HUB_OFFLINE"):
        download("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = download("org/model").path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    with pytest.raises(OfflineError, match=str(path)):
        download("org/model")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_id": "./model"}, "org/name"),
        ({"model_id": "model"}, "org/name"),
        ({"model_id": "org/shards@a", "revision": "b"}, "two revisions"),
        ({"model_id": "org/shards", "cache_dir": "a", "local_dir": "b"}, "exclude each other"),
        ({"model_id": "org/shards", "connections": 0}, "from 1 to 64"),
        ({"model_id": "org/shards", "connections": True}, "from 1 to 64"),
        ({"model_id": "org/shards", "include": ["*.nothing"]}, r"--include \*\.nothing"),
    ],
)
def test_requests_that_cannot_be_meant(shards: LoopbackHub, arguments: dict[str, Any], words: str) -> None:
    """Said before anything is downloaded."""
    with pytest.raises(RequestError, match=words):
        download(**arguments)
    assert body_bytes(shards) == 0


# The command line.


def test_the_command_prints_folder_and_files(
    shards: LoopbackHub, place: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is the first line, for scripts; the second time all is present."""
    ((option, path),) = place.items()
    words = ["download", "org/shards", f"--{option.replace('_', '-')}", str(path)]
    assert run(words) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    assert content_of(Path(folder)) == CONTENT
    assert any(NAMES[0] in line and line.endswith("downloaded") for line in lines)
    assert run([*words, "--verify"]) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("present") for line in lines) == len(CONTENT)
    assert "0 B downloaded" in lines[-1]


def test_json_is_the_whole_result(shards: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs; patterns choose."""
    words = ["download", "org/shards", "--cache-dir", str(tmp_path / "c"), "--include", "*.txt", "--json"]
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [{"name": "sub/notes.txt", "size_bytes": 9, "status": "downloaded", "resumed_bytes": 0}]
    assert (said["downloaded_bytes"], said["model_id"]) == (9, "org/shards")
    assert Path(said["path"]).name == said["commit"]


def test_two_places_are_a_usage_error(shards: LoopbackHub) -> None:
    """Exit code 2, nothing asked."""
    assert run(["download", "org/shards", "--cache-dir", "a", "--local-dir", "b"]) == 2
    assert shards.requests == []
