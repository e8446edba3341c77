"""What lies where a file is expected and is none: nobody waits for it, reads it for ever, or writes to it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import tree
from directories import models, sets
from guard import limited
from sealing import write_files
from target import without_waiting

from mmsplit.checkpoint import open_checkpoint
from mmsplit.checkpoint.file_reader import FileReader
from mmsplit.errors import MmsplitError
from mmsplit.regular_files import is_regular, read_regular
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.inspect import inspect
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.plan import plan
from mmsplit.verbs.pull import pull
from mmsplit.verbs.repair import repair
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with without_waiting():
        yield


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(place.parent, os.O_RDONLY)
        try:  # the path of a socket must be short
            made.bind(f"/proc/self/fd/{here}/{place.name}")
        finally:
            os.close(here)


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda place: place.symlink_to(target)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": _fifo,
    "socket": _socket,
    "directory": lambda place: place.mkdir(),
    "zero": _link_to("/dev/zero"),
    "random": _link_to("/dev/urandom"),
    "terminal": _link_to("/dev/tty"),
    "input": _link_to("/proc/self/fd/0"),
    "null": _link_to("/dev/null"),
    "memory": _link_to("/proc/self/mem"),
    "nowhere": _link_to("nowhere"),
    "itself": lambda place: place.symlink_to(place.name),
}


def _put(place: Path, kind: str) -> None:
    """Put something special where a file is, or was not."""
    place.unlink(missing_ok=True)
    SPECIAL[kind](place)


def _read_set(root: Path) -> None:
    with open_set(root, threads=1) as opened:
        for name in opened:
            opened[name]


SET_FILES = ["partition_set.json", "partition_0.json", "partition_0.bin", "config.json", "one/tokens.txt"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", SET_FILES)
def test_in_a_set(name: str, kind: str, tmp_path: Path) -> None:
    """Every command that reads sets says so, or does without."""
    root = tmp_path / "set"
    write_files(root, sets()["plain"])
    _put(root / name, kind)
    refused = []

    def attempt(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except MmsplitError:
            refused.append(what)

    def require_ok() -> None:
        for level in ("quick", "stored", "full"):
            assert not verify(root, level=level, threads=1).ok  # type: ignore[arg-type]

    with limited():
        attempt("verify", require_ok)
        attempt("verify one", lambda: verify(root / "partition_0.json", threads=1))
        attempt("inspect", lambda: inspect(root))
        attempt("load", lambda: _read_set(root))
        attempt("load one", lambda: open_partition(root / "partition_0.bin", threads=1))
        attempt("merge", lambda: merge(root, tmp_path / "merged", threads=1))
        attempt("pull", lambda: pull(str(root), tmp_path / "pulled", threads=1))
        attempt("repair", lambda: repair(root, dry_run=True, threads=1))
    assert {"merge", "pull"} <= set(refused)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_in_a_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    """A shard that is no file is refused, and so is an index that is asked for; else it is as if there were none."""
    root = tmp_path / "model"
    write_files(root, models()["plain"])
    _put(root / name, kind)
    with limited():
        with pytest.raises(MmsplitError):
            split(root / name, tmp_path / "set", 1, threads=1)
        if name.endswith(".index.json") and not (root / name).is_file():
            assert plan(root, 1)
            return
        with pytest.raises(MmsplitError):
            plan(root, 1)
        with pytest.raises(MmsplitError):
            split(root, tmp_path / "set", 1, threads=1)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "one/tokens.txt", "tokenizer.json"])
def test_small_file_of_a_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    """A small file that is no file is left behind, and the rest is split."""
    root = tmp_path / "model"
    write_files(root, models()["plain"])
    _put(root / name, kind)
    with limited():
        split(root, tmp_path / "set", 1, threads=1)
        assert verify(tmp_path / "set", level="full", threads=1).ok
    assert not (tmp_path / "set" / name).exists()


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_in_the_output_of_a_merge(name: str, kind: str, tmp_path: Path) -> None:
    """What has the name of an output is refused or replaced, never read and never written to."""
    write_files(tmp_path / "set", sets()["plain"])
    out = tmp_path / "out"
    out.mkdir()
    _put(out / name, kind)
    with limited():
        for resume in (False, True):
            try:
                merge(tmp_path / "set", out, threads=1, resume=resume)
            except MmsplitError:
                continue
    if not (out / name).is_symlink() and (out / name).is_file():
        assert (out / name).read_bytes() == models()["plain"][name]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name",
    [SET_MANIFEST_NAME, "partition_set.json.partial", "partition_0.json", "partition_0.bin", "partition_0.bin.partial",
     "partition_0.bin.journal", "unfinished_split.json", "config.json", ".mmsplit.lock"],
)  # fmt: skip
def test_in_the_output_of_split_and_pull(name: str, kind: str, tmp_path: Path) -> None:
    """The same for those that make sets."""
    write_files(tmp_path / "set", sets()["plain"])
    write_files(tmp_path / "model", models()["plain"])
    for number, make in enumerate(
        (
            lambda out: split(tmp_path / "model", out, 2, threads=1, existing="resume"),
            lambda out: split(tmp_path / "model", out, 2, threads=1, existing="force"),
            lambda out: pull(str(tmp_path / "set"), out, threads=1),
            lambda out: pull(str(tmp_path / "set"), out, threads=1, force=True),
        )
    ):
        out = tmp_path / f"out{number}"
        out.mkdir()
        _put(out / name, kind)
        with limited():
            try:
                make(out)
            except MmsplitError:
                continue
        assert verify(out, level="full", threads=1).ok


# --- links that lead out ------------------------------------------------------------------------------------------


def test_a_link_in_a_checkpoint_does_not_carry_out_what_it_leads_to(tmp_path: Path) -> None:
    """A private key that a link of a downloaded model leads to is not carried along, and so never published."""
    (tmp_path / "key").write_bytes(b"secret")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id").write_bytes(b"secret")
    root = tmp_path / "model"
    write_files(root, models()["plain"])
    (root / "vocab.txt").symlink_to("../key")
    (root / "one" / "key").symlink_to(tmp_path / "key")
    (root / "keys").symlink_to("../keys")
    (root / "inside.txt").symlink_to("one/tokens.txt")
    made = split(root, tmp_path / "set", 1, threads=1)
    assert b"secret" not in b"".join(tree(tmp_path / "set").values())
    assert {file.name for file in made.manifest.files} == {"config.json", "one/tokens.txt", "inside.txt"}
    notes = open_checkpoint(root).notes
    assert sum("a link that leads out of the checkpoint" in note for note in notes) == 2


def test_small_files_where_the_weights_are_linked_to_are_carried_along(tmp_path: Path) -> None:
    """`ln -s /models/llama/* .` is a checkpoint, and so is a snapshot of the Hub's cache."""
    write_files(tmp_path / "true", models()["plain"])
    root = tmp_path / "links"
    root.mkdir()
    for path in (tmp_path / "true").iterdir():
        (root / path.name).symlink_to(path)
    made = split(root, tmp_path / "set", 1, threads=1)
    assert "config.json" in {file.name for file in made.manifest.files}


@pytest.mark.parametrize("name", SET_FILES)
def test_a_link_in_a_set_gives_nothing_away(name: str, tmp_path: Path) -> None:
    """What a link of a set leads to is compared with what the set was made with; its content is in no message."""
    (tmp_path / "key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nsecret")
    root = tmp_path / "set"
    write_files(root, sets()["plain"])
    (root / name).unlink()
    (root / name).symlink_to(tmp_path / "key")
    for act in (
        lambda: merge(root, tmp_path / "merged", threads=1),
        lambda: pull(str(root), tmp_path / "pulled", threads=1),
    ):
        with pytest.raises(MmsplitError) as caught:
            act()
        assert "secret" not in str(caught.value)
    made = [*tree(tmp_path / "merged").values(), *tree(tmp_path / "pulled").values()]
    assert b"secret" not in b"".join(made)


def test_links_in_the_output_are_not_written_through(tmp_path: Path) -> None:
    """A merge replaces links, or refuses: what they lead to stays as it is."""
    write_files(tmp_path / "set", sets()["plain"])
    names = [*models()["plain"], *(f"{name}.partial" for name in models()["plain"])]
    for number, name in enumerate(names):
        victim, out = tmp_path / f"victim{number}", tmp_path / f"out{number}"
        victim.write_bytes(b"not yours")
        (out / name).parent.mkdir(parents=True)
        (out / name).symlink_to(victim)
        for resume in (False, True):
            try:
                merge(tmp_path / "set", out, threads=1, resume=resume)
            except MmsplitError:
                continue
        assert victim.read_bytes() == b"not yours", name


# --- the functions themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "memory"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"abc")
    assert read_regular(place) == b"abc"
    assert is_regular(place)
    _put(place, kind)
    assert not is_regular(place)
    with limited():
        for read in (read_regular, FileReader):
            with pytest.raises(OSError) as caught:
                read(place)
            assert caught.value.errno in (errno.EINVAL, errno.EISDIR, errno.ENOENT, errno.ELOOP)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_file_that_says_it_is_empty_is_empty() -> None:
    """Files in /proc are regular, and some of them never end."""
    assert read_regular(Path("/proc/self/mem")) == b""


def test_a_name_that_is_too_long_is_no_file(tmp_path: Path) -> None:
    assert not is_regular(tmp_path / ("n" * 300))
