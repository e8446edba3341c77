"""Where files go is where huggingface_hub's own client looks for them, and it accepts what it finds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from loopback_fixtures import CONFIG, WEIGHTS
from loopback_hub import LoopbackHub

from mmsplit.errors import NoSpaceError, OutputError, OutputExistsError
from mmsplit.remote import downloader
from mmsplit.remote.downloader import Downloader, Fetched, Presence
from mmsplit.remote.hub_cache import HubCache, LocalFolder, default_cache_dir
from mmsplit.remote.repository import HubRepository, open_repository

SHARD = "model.safetensors"
NAMES = ("config.json", "empty.txt", SHARD, "onnx/a b#%.onnx")
CONTENT = {"config.json": CONFIG, "empty.txt": b"", SHARD: WEIGHTS, "onnx/a b#%.onnx": WEIGHTS[:1000]}


@pytest.fixture
def repository(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> HubRepository:
    """org/model, as the process knows the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    return open_repository("org/model")


def fetch_all(repository: HubRepository, place: HubCache | LocalFolder, *, revision: str | None = None) -> None:
    for name in NAMES:
        Downloader(repository, place).fetch(name)
    place.finish(revision)


def layout(folder: Path) -> dict[str, str | bytes]:
    """Every file below a folder: where it links to, or its content."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def bodies(hub: LoopbackHub) -> list[str]:
    """What was served of files, apart from questions about them and listings."""
    return [
        r.path for r in hub.requests if r.method == "GET" and not r.path.startswith("/api/models/") and r.sent_bytes
    ]


def test_the_layout_is_that_of_huggingface_hub(hub: LoopbackHub, repository: HubRepository, tmp_path: Path) -> None:
    """Blobs, links, refs and locks, compared with what its own client makes of the same repository."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    huggingface_hub.snapshot_download("org/model", cache_dir=theirs)
    fetch_all(repository, HubCache(repository, ours))
    own = {"CACHEDIR.TAG", f"models--org--model/trees/{repository.commit}.json"}
    assert layout(ours) == {name: what for name, what in layout(theirs).items() if name not in own}


def test_huggingface_hub_finds_every_file_and_fetches_none(hub: LoopbackHub, repository: HubRepository) -> None:
    """Without the network, and with it: the one by name of the branch, the other by the commit that it has now."""
    fetch_all(repository, HubCache(repository))
    hub.clear()
    folder = Path(huggingface_hub.snapshot_download("org/model", local_files_only=True))
    assert folder == HubCache(repository).root
    for name in NAMES:
        offline = huggingface_hub.hf_hub_download("org/model", name, local_files_only=True)
        assert Path(offline).read_bytes() == CONTENT[name]
    assert hub.requests == []
    for name in NAMES:
        assert huggingface_hub.hf_hub_download("org/model", name) == str(folder / name)
    assert huggingface_hub.snapshot_download("org/model") == str(folder)
    assert bodies(hub) == []


def test_a_process_that_is_offline_finds_it(hub: LoopbackHub, repository: HubRepository, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is read when huggingface_hub is imported, so this takes a process of its own."""
    fetch_all(repository, HubCache(repository, tmp_path / "cache"))
    program = "import huggingface_hub; print(huggingface_hub.snapshot_download('org/model'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()) == HubCache(repository, tmp_path / "cache").root


def test_the_cache_scans_clean(repository: HubRepository) -> None:
    """`hf cache` knows every byte, and would remove a partial file as one of its own."""
    cache = HubCache(repository)
    fetch_all(repository, cache)
    left = cache.partial(repository.file(SHARD))
    left.write_bytes(WEIGHTS[:10])
    scan = huggingface_hub.scan_cache_dir()
    (repo,) = scan.repos
    assert scan.warnings == []
    assert (repo.nb_files, repo.size_on_disk) == (4, sum(map(len, CONTENT.values())))
    assert list(repo.refs) == ["main"]
    known = getattr(scan, "incomplete_files", None)  # from huggingface_hub 2 on
    assert known is None or [file.file_path for file in known] == [left]


def test_a_partial_file_is_none_of_huggingface_hubs_business(hub: LoopbackHub, repository: HubRepository) -> None:
    """It neither continues nor removes ours, and what it downloads beside it is whole."""
    cache = HubCache(repository)
    partial = cache.partial(repository.file(SHARD))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"not what it should be")
    assert Path(huggingface_hub.hf_hub_download("org/model", SHARD)).read_bytes() == WEIGHTS
    assert partial.read_bytes() == b"not what it should be"


def test_what_huggingface_hub_has_downloaded_is_not_fetched_again(hub: LoopbackHub, repository: HubRepository) -> None:
    """The other way round."""
    huggingface_hub.snapshot_download("org/model")
    hub.clear()
    fetch_all(repository, HubCache(repository))
    assert bodies(hub) == []


def test_a_new_commit_fetches_what_changed_and_links_the_rest(hub: LoopbackHub, repository: HubRepository) -> None:
    """Both snapshots stay whole, and refs/main is moved."""
    old = HubCache(repository)
    fetch_all(repository, old)
    hub.move_main("org/model", {"config.json": b"{}"})
    hub.clear()
    moved = open_repository("org/model")
    new = HubCache(moved)
    fetch_all(moved, new)
    assert len(bodies(hub)) == 1
    assert (new.folder / "refs" / "main").read_text() == moved.commit
    assert [(place.root / "config.json").read_bytes() for place in (old, new)] == [CONFIG, b"{}"]
    assert (new.root / SHARD).samefile(old.root / SHARD)


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", "a/b"])
def test_the_revision_is_written_down_where_huggingface_hub_looks(
    hub: LoopbackHub, repository: HubRepository, revision: str | None
) -> None:
    """None is main; names with a slash are folders."""
    fetch_all(repository, HubCache(repository), revision=revision)
    found = huggingface_hub.hf_hub_download("org/model", SHARD, revision=revision, local_files_only=True)
    assert Path(found).read_bytes() == WEIGHTS


def test_a_commit_needs_no_ref(repository: HubRepository) -> None:
    """It is its own name."""
    cache = HubCache(repository)
    fetch_all(repository, cache, revision=repository.commit)
    assert not (cache.folder / "refs").exists()


def test_a_full_disk_is_not_taken_for_one_without_links(
    repository: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob would lose its place in the cache because of a moment's shortage."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = HubCache(repository, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        with pytest.raises(NoSpaceError):
            fetch_all(repository, cache)
    fetch_all(repository, cache)
    assert all((cache.root / name).is_symlink() for name in NAMES)


@pytest.fixture
def linkless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that makes no symbolic links, as Windows without developer mode."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)


@pytest.mark.parametrize("way", ["system", "variable"])
def test_without_links_the_snapshot_holds_the_files_themselves(
    hub: LoopbackHub,
    repository: HubRepository,
    way: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As huggingface_hub does it; what is there is found again, and copied for a second commit, never fetched."""
    if way == "system":
        request.getfixturevalue("linkless")
    else:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    cache = HubCache(repository)
    fetch_all(repository, cache)
    assert {name: (cache.root / name).read_bytes() for name in NAMES} == CONTENT
    assert not any((cache.root / name).is_symlink() for name in NAMES)
    assert list((cache.folder / "blobs").iterdir()) == []  # not twice on the disk
    hub.clear()
    fetch_all(repository, cache)
    assert Path(huggingface_hub.hf_hub_download("org/model", SHARD)).read_bytes() == WEIGHTS
    assert bodies(hub) == []
    (cache.folder / "blobs" / repository.file(SHARD).etag).write_bytes(WEIGHTS)  # as a system with links left it
    (cache.root / SHARD).unlink()
    fetch_all(repository, cache)
    assert (cache.root / SHARD).read_bytes() == WEIGHTS
    assert bodies(hub) == []


def test_a_snapshot_whose_blob_is_gone_is_mended(hub: LoopbackHub, repository: HubRepository) -> None:
    """A link that leads nowhere is no file."""
    cache = HubCache(repository)
    fetch_all(repository, cache)
    cache.blob(repository.file(SHARD)).unlink()
    fetch_all(repository, cache)
    assert (cache.root / SHARD).read_bytes() == WEIGHTS


@pytest.mark.parametrize("content", [WEIGHTS[:-1], b"?" + WEIGHTS[1:]], ids=["short", "other bytes"])
def test_a_wrong_blob_is_named_and_replaced_in_one_step(repository: HubRepository, content: bytes) -> None:
    """Whatever is called by a hash and has another is of no use to anybody; an open reader keeps what it had."""
    cache = HubCache(repository)
    fetch_all(repository, cache)
    blob = cache.blob(repository.file(SHARD))
    blob.write_bytes(content)
    with blob.open("rb") as reader:
        fetched = Downloader(repository, cache, verify=True).fetch(SHARD)
        assert reader.read() == content
    assert fetched.found.presence is Presence.WRONG
    assert fetched.found.path == cache.root / SHARD
    assert fetched.found.expected != fetched.found.actual
    assert blob.read_bytes() == WEIGHTS


def test_processes_take_turns_by_the_lock_of_huggingface_hub(hub: LoopbackHub, repository: HubRepository) -> None:
    """While its client holds the lock of a content we wait; when it is done there is nothing left to fetch."""
    cache = HubCache(repository)
    file = repository.file(SHARD)
    lock = cache.cache_dir / ".locks" / "models--org--model" / f"{file.etag}.lock"
    assert cache.lock(file) == lock
    lock.parent.mkdir(parents=True)
    asked = threading.Event()
    results: list[Fetched] = []
    with WeakFileLock(lock):
        thread = threading.Thread(
            target=lambda: results.append(Downloader(repository, cache).fetch(SHARD, go_on=asked.set))
        )
        thread.start()
        assert asked.wait(30)
        cache.blob(file).parent.mkdir(parents=True)
        cache.blob(file).write_bytes(WEIGHTS)
        assert bodies(hub) == []
    thread.join(30)
    assert [fetched.found.presence for fetched in results] == [Presence.PRESENT]
    assert (cache.root / SHARD).read_bytes() == WEIGHTS
    assert bodies(hub) == []


def test_who_waits_for_a_lock_may_give_up(repository: HubRepository) -> None:
    """An interrupt is not kept waiting by another process."""
    cache = HubCache(repository)
    lock = cache.lock(repository.file(SHARD))
    lock.parent.mkdir(parents=True)
    calls = iter(range(3))

    def go_on() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    gave_up = threading.Event()

    def wait() -> None:
        with pytest.raises(KeyboardInterrupt):
            Downloader(repository, cache).fetch(SHARD, go_on=go_on)
        gave_up.set()

    with WeakFileLock(lock):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(30)
    assert gave_up.is_set()


def test_a_cache_that_is_whole_need_not_be_writable(repository: HubRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, locked or renamed when everything is there."""
    cache = HubCache(repository)
    fetch_all(repository, cache)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "replace", "symlink", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    fetch_all(repository, cache)


def test_a_cache_that_cannot_be_written_to_says_so(repository: HubRepository, tmp_path: Path) -> None:
    """With the path, and what to do."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="choose another") as caught:
        fetch_all(repository, HubCache(repository, tmp_path / "file"))
    assert str(tmp_path / "file") in str(caught.value.path)


def test_the_cache_is_the_one_that_the_variables_say(repository: HubRepository, tmp_path: Path) -> None:
    """HF_HUB_CACHE and HF_HOME, as huggingface_hub reads them; an argument goes before, and ~ is a home."""
    assert default_cache_dir() == Path(constants.HF_HUB_CACHE)
    assert HubCache(repository).cache_dir == Path(constants.HF_HUB_CACHE).resolve()
    assert HubCache(repository, "~/x").cache_dir == Path("~/x").expanduser().resolve()


# A plain folder.


def test_a_folder_that_we_filled_is_one_that_huggingface_hub_filled(
    hub: LoopbackHub, repository: HubRepository, tmp_path: Path
) -> None:
    """Its own client finds its notes, and fetches nothing, with and without the network."""
    folder = tmp_path / "model"
    fetch_all(repository, LocalFolder(repository, folder))
    assert {name: (folder / name).read_bytes() for name in NAMES} == CONTENT
    hub.clear()
    for name in NAMES:
        for revision in (None, repository.commit):
            found = huggingface_hub.hf_hub_download("org/model", name, local_dir=folder, revision=revision)
            assert found == str(folder / name)
    assert huggingface_hub.snapshot_download("org/model", local_dir=folder) == str(folder)
    assert huggingface_hub.snapshot_download("org/model", local_dir=folder, local_files_only=True) == str(folder)
    assert bodies(hub) == []


def test_a_folder_that_huggingface_hub_filled_is_not_fetched_again(
    hub: LoopbackHub, repository: HubRepository, tmp_path: Path
) -> None:
    """Its notes are believed, as long as nobody has written to the file since."""
    huggingface_hub.snapshot_download("org/model", local_dir=tmp_path / "model")
    hub.clear()
    fetch_all(repository, LocalFolder(repository, tmp_path / "model"))
    assert bodies(hub) == []


def test_files_without_notes_are_hashed_and_kept(hub: LoopbackHub, repository: HubRepository, tmp_path: Path) -> None:
    """Copied there by hand, say; the notes are made up for."""
    folder = tmp_path / "model"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hub.clear()
    fetch_all(repository, LocalFolder(repository, folder))
    huggingface_hub.hf_hub_download("org/model", SHARD, local_dir=folder, revision=repository.commit)
    assert hub.requests == []


def test_an_older_download_is_brought_up_to_date(hub: LoopbackHub, repository: HubRepository, tmp_path: Path) -> None:
    """Its notes say what it is, so that nobody's work is lost."""
    folder = tmp_path / "model"
    fetch_all(repository, LocalFolder(repository, folder))
    hub.move_main("org/model", {"config.json": b"{}"})
    moved = open_repository("org/model")
    hub.clear()
    fetch_all(moved, LocalFolder(moved, folder))
    assert (folder / "config.json").read_bytes() == b"{}"
    assert len(bodies(hub)) == 1
    hub.clear()
    huggingface_hub.hf_hub_download("org/model", SHARD, local_dir=folder, revision=moved.commit)
    assert hub.requests == []  # the file that did not change has a note of the new commit


@pytest.mark.parametrize("noted", [False, True], ids=["never downloaded", "changed since"])
def test_a_file_that_may_be_somebodys_work_is_not_replaced(
    repository: HubRepository, tmp_path: Path, noted: bool
) -> None:
    """It is named with both hashes; force replaces it."""
    folder = tmp_path / "model"
    config = folder / "config.json"
    if noted:
        fetch_all(repository, LocalFolder(repository, folder))
    folder.mkdir(exist_ok=True)
    config.write_bytes(b'{"model_type": "mine!"}')
    later = config.stat().st_mtime + 60
    os.utime(config, (later, later))
    with pytest.raises(OutputExistsError, match="--force") as caught:
        Downloader(repository, LocalFolder(repository, folder)).fetch("config.json")
    assert caught.value.path == str(config)
    assert caught.value.expected == repository.file("config.json").etag
    assert config.read_bytes() == b'{"model_type": "mine!"}'
    Downloader(repository, LocalFolder(repository, folder, force=True)).fetch("config.json")
    assert config.read_bytes() == CONFIG


def test_bytes_that_nobody_vouches_for_are_hashed_whatever_their_length(
    repository: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file of the right length that was put there by hand; and a note that was cut short is no note."""
    monkeypatch.setattr(downloader, "_SMALL_BYTES", 0)
    place = LocalFolder(repository, tmp_path / "model")
    place.root.mkdir()
    (place.root / SHARD).write_bytes(WEIGHTS[::-1])
    assert Downloader(repository, place).look(SHARD).presence is Presence.WRONG
    (place.root / SHARD).write_bytes(WEIGHTS)
    Downloader(repository, place).fetch(SHARD)
    note = place.lock(repository.file(SHARD)).with_name(f"{SHARD}.metadata")
    note.write_text(note.read_text()[:60])
    assert not place.is_vouched_for(repository.file(SHARD))
    assert Downloader(repository, place).look(SHARD).presence is Presence.PRESENT


def test_partial_files_of_a_folder_lie_beside_its_notes(repository: HubRepository, tmp_path: Path) -> None:
    """Where they disturb nobody, in the same file system, and each name has its own."""
    place = LocalFolder(repository, tmp_path / "model")
    partials = {place.partial(repository.file(name)) for name in NAMES}
    assert len(partials) == len(NAMES)
    assert all(path.is_relative_to(tmp_path / "model" / ".cache" / "huggingface") for path in partials)
