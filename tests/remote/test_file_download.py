"""One file: resumed to the byte, checked before anybody may have it, whatever the network does meanwhile."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
from loopback_fixtures import CONFIG, WEIGHTS, FakeClock
from loopback_hub import Fault, LoopbackHub

from mmsplit.errors import IntegrityError, NetworkError, NoSpaceError, OutputError
from mmsplit.remote import file_download
from mmsplit.remote.content_hash import etag_of
from mmsplit.remote.file_download import Received, download_file, partial_bytes
from mmsplit.remote.patience import Limits
from mmsplit.remote.repository import HubRepository, open_repository
from mmsplit.workers import Stopped

SIZE = len(WEIGHTS)
SHARD = "model.safetensors"


@pytest.fixture
def repository(hub: LoopbackHub, fake_clock: FakeClock) -> HubRepository:
    """org/model, asked without any waiting; the log begins after its opening."""
    limits = Limits(silence_seconds=0.3)
    opened = open_repository("org/model", endpoint=hub.endpoint, clock=fake_clock.clock(), limits=limits)
    hub.clear()
    return opened


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "blobs" / "x.mmsplit.incomplete"


def fetched(repository: HubRepository, partial: Path, name: str = SHARD) -> tuple[Received, int]:
    """What `download_file` says, and the sum of all progress."""
    done: list[int] = []
    received = download_file(repository.open_file(name), repository.file(name), partial, done.append)
    return received, sum(done)


def ranges(hub: LoopbackHub) -> list[str | None]:
    return [request.range for request in hub.requests_to("cdn")]


@pytest.mark.parametrize(("name", "content"), [(SHARD, WEIGHTS), ("config.json", CONFIG), ("empty.txt", b"")])
def test_large_small_and_empty_files_arrive_whole(
    repository: HubRepository, partial: Path, name: str, content: bytes
) -> None:
    """The one is held to its SHA-256, the others to git's hash."""
    assert fetched(repository, partial, name) == (Received(len(content), 0), len(content))
    assert partial.read_bytes() == content
    assert etag_of(partial, repository.file(name)) == repository.file(name).etag


@pytest.mark.parametrize("there", [1, 65_536, 70_001, SIZE - 1])
def test_what_an_earlier_run_left_is_continued_at_its_last_byte(
    hub: LoopbackHub, repository: HubRepository, partial: Path, there: int
) -> None:
    """Not one byte of it is asked for again."""
    partial.parent.mkdir()
    partial.write_bytes(WEIGHTS[:there])
    assert fetched(repository, partial) == (Received(SIZE - there, there), SIZE)
    assert partial.read_bytes() == WEIGHTS
    assert ranges(hub) == [f"bytes={there}-{SIZE - 1}"]


def test_what_is_whole_already_is_checked_and_not_asked_for(
    hub: LoopbackHub, repository: HubRepository, partial: Path
) -> None:
    """A run that was killed between the last byte and the renaming."""
    partial.parent.mkdir()
    partial.write_bytes(WEIGHTS)
    assert fetched(repository, partial) == (Received(0, SIZE), SIZE)
    assert hub.requests == []


@pytest.mark.parametrize("left", [b"\0" * 1000, WEIGHTS[1:], b"?" + WEIGHTS[1:]])
def test_a_corrupted_partial_file_is_found_and_begun_anew(
    hub: LoopbackHub, repository: HubRepository, partial: Path, left: bytes
) -> None:
    """A machine that lost its power may leave zeros where bytes were."""
    partial.parent.mkdir()
    partial.write_bytes(left)
    received, done = fetched(repository, partial)
    assert (received, done) == (Received(2 * SIZE - len(left), 0), SIZE)
    assert partial.read_bytes() == WEIGHTS
    assert ranges(hub)[-1] == f"bytes=0-{SIZE - 1}"


def test_a_partial_file_that_is_too_long_is_no_part_of_it(repository: HubRepository, partial: Path) -> None:
    """It is not counted either, where free space is compared with what is still to come."""
    partial.parent.mkdir()
    partial.write_bytes(WEIGHTS + b"x")
    assert partial_bytes(partial, repository.file(SHARD)) == 0
    assert fetched(repository, partial) == (Received(SIZE, 0), SIZE)
    assert partial.read_bytes() == WEIGHTS


FAULTS = {
    "drop": Fault("drop", "cdn GET *", after_bytes=100_000),
    "reset": Fault("reset", "cdn GET *", after_bytes=100_000),
    "stall": Fault("stall", "cdn GET *", after_bytes=100_000),
    "short": Fault("short", "cdn GET *", after_bytes=100_000),
    "drop at once": Fault("drop", "cdn GET *"),
    "another range": Fault("wrong_range", "cdn GET *"),
    "range ignored": Fault("ignore_range", "cdn GET *"),
    "no length": Fault("no_length", "cdn GET *"),
    "gzip": Fault("gzip", "cdn GET *"),
    "500": Fault("status", "* GET *", status=500),
    "503 of the CDN": Fault("status", "cdn GET *", status=503),
    "429": Fault("status", "hub GET *", status=429, headers={"Retry-After": "3"}),
    "expired": Fault("status", "cdn GET *", status=403),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_fault_of_the_network_is_survived(
    hub: LoopbackHub, repository: HubRepository, partial: Path, fault: Fault
) -> None:
    """The file is right in the end; what had been written before is not asked for again."""
    partial.parent.mkdir()
    partial.write_bytes(WEIGHTS[:1000])
    hub.faults.append(Fault(**{**vars(fault), "times": 2}))
    received, done = fetched(repository, partial)
    assert (received, done) == (Received(SIZE - 1000, 1000), SIZE)
    assert partial.read_bytes() == WEIGHTS
    assert not any(asked.startswith("bytes=0-") for asked in ranges(hub) if asked)


def test_a_flipped_bit_is_caught_and_the_file_fetched_once_more(
    hub: LoopbackHub, repository: HubRepository, partial: Path
) -> None:
    """The bytes that were wrong are not counted as progress."""
    hub.faults.append(Fault("flip", "cdn GET *"))
    assert fetched(repository, partial) == (Received(2 * SIZE, 0), SIZE)
    assert partial.read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_content_that_is_wrong_twice_is_one_clear_error(
    hub: LoopbackHub, repository: HubRepository, partial: Path, name: str
) -> None:
    """With both hashes; and nothing is left that the next run would continue."""
    hub.faults.append(Fault("flip", times=-1))
    with pytest.raises(IntegrityError) as caught:
        fetched(repository, partial, name)
    file = repository.file(name)
    assert caught.value.path == f"org/model@{repository.commit[:12]}/{name}"
    assert file.etag in str(caught.value.expected)
    assert len(str(caught.value.found)) == len(file.etag)
    assert "HF_ENDPOINT" in str(caught.value)
    assert not partial.exists()


def test_a_network_that_stays_away_leaves_what_arrived(
    hub: LoopbackHub, repository: HubRepository, partial: Path
) -> None:
    """The error says that the same command continues, and it does."""
    hub.faults += [Fault("drop", "cdn GET *", after_bytes=300_000), Fault("status", "cdn *", -1, status=502)]
    with pytest.raises(NetworkError, match="continues") as caught:
        fetched(repository, partial)
    assert caught.value.offset == partial.stat().st_size == 300_000
    hub.clear()
    assert fetched(repository, partial) == (Received(SIZE - 300_000, 300_000), SIZE)
    assert ranges(hub) == [f"bytes=300000-{SIZE - 1}"]


def test_a_caller_who_gives_up_leaves_what_arrived(repository: HubRepository, partial: Path) -> None:
    """Between two blocks."""
    calls = iter(range(8))

    def go_on() -> None:
        if next(calls, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        download_file(repository.open_file(SHARD), repository.file(SHARD), partial, go_on=go_on)
    left = partial.read_bytes()
    assert 0 < len(left) < SIZE
    assert WEIGHTS.startswith(left)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, OutputError)])
def test_a_disk_that_refuses_says_so_and_keeps_what_it_has(
    repository: HubRepository, partial: Path, number: int, kind: type[OutputError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command continues when there is space again."""
    real = file_download._write_all
    writes = iter(range(4))

    def write(out: object, block: bytes) -> None:
        if next(writes, None) is None:
            raise OSError(number, "refused")
        real(out, block)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "_write_all", write)
        with pytest.raises(kind, match="refused") as caught:
            fetched(repository, partial)
    assert caught.value.path == str(partial)
    there = partial.stat().st_size
    assert 0 < there < SIZE
    assert fetched(repository, partial)[0] == Received(SIZE - there, there)


def test_the_file_is_synced_before_it_is_handed_on(
    repository: HubRepository, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all of it is there, not before."""
    synced: list[int] = []
    # Before there is a file, the directory for it is synced.
    monkeypatch.setattr("os.fsync", lambda _: synced.append(partial.stat().st_size) if partial.exists() else None)
    fetched(repository, partial)
    assert synced == [SIZE]


def test_the_hash_is_that_of_the_hub(repository: HubRepository, tmp_path: Path) -> None:
    """SHA-256 of the bytes; for small files git's: SHA-1 with kind and length before them."""
    path = tmp_path / "file"
    path.write_bytes(WEIGHTS)
    assert etag_of(path, repository.file(SHARD)) == hashlib.sha256(WEIGHTS).hexdigest()
    path.write_bytes(b"")
    assert etag_of(path, repository.file("empty.txt")) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
