"""`pull` from a directory: the same bytes, whatever it dies in, and never over what is not its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, tree, write_checkpoint
from children import at_bytes, die_at_change, in_child

from mmsplit.errors import (
    FormatError,
    IntegrityError,
    MissingPartitionError,
    MmsplitError,
    NoSpaceError,
    OutputExistsError,
    OutputLockedError,
    RemoteNotFoundError,
    RequestError,
)
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar import output_directory
from mmsplit.sidecar.output_directory import LOCK_NAME, STATE_NAME, OutputDirectory
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.pull import PullResult, pull
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
PARTIAL_NAME = SET_MANIFEST_NAME + ".partial"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published set of three partitions with small files, one of them empty and one in a folder."""
    root = tmp_path_factory.mktemp("small")
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc", "__init__.py": b""}
    weights = llama_weights(4)
    write_checkpoint(root / "model", [weights[:5], weights[5:]], index=True, files=files)
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another published set, of four partitions, one of whose small files has a name of the first set's."""
    root = tmp_path_factory.mktemp("other")
    write_checkpoint(root / "model", [llama_weights(5)], files={"config.json": CAUSAL_CONFIG + b"\n"})
    split(root / "model", root / "set", 4)
    return root / "set"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published set of some 33 MB in two partitions of several pieces."""
    root = tmp_path_factory.mktemp("large")
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (1280, 2048), 90) for k in range(12)]
    write_checkpoint(root / "model", [weights], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", 2)
    return root / "set"


def changed(source: Path, to: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a set whose set manifest says something else, its root digest in order."""
    shutil.copytree(source, to)
    values = json.loads((to / SET_MANIFEST_NAME).read_bytes())
    change(values)
    del values["root_digest"]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    values["root_digest"] = "sha256:" + hashlib.sha256(canonical).hexdigest()
    (to / SET_MANIFEST_NAME).write_text(json.dumps(values, indent=1) + "\n")
    return to


def test_a_set_arrives_in_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """Every file is the published one, the set verifies, and merges into what was split."""
    result = pull(small, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(small)
    assert verify(tmp_path / "out", level="full").ok
    merge(tmp_path / "out", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(small.parent / "model")
    assert result.root_digest == json.loads((small / SET_MANIFEST_NAME).read_bytes())["root_digest"]


def test_partitions_come_one_by_one(small: Path, tmp_path: Path) -> None:
    """With `only`, a partition and what belongs to all; later ones join it, and the last makes the set whole."""
    out = tmp_path / "out"
    pull(small, out, only=[1])
    names = {"partition_1.json", "partition_1.bin", SET_MANIFEST_NAME, "config.json", "sub/tokens.txt", "__init__.py"}
    assert tree(out) == {name: data for name, data in tree(small).items() if name in names}
    assert verify(out / "partition_1.json", level="full").ok
    with open_partition(out / "partition_1.json") as partition:
        assert list(partition)
    with pytest.raises(MissingPartitionError):
        merge(out, tmp_path / "early")
    result = pull(small, out, only=[2, 0, 2])
    assert [received.part_id for received in result.partitions] == [0, 2]
    assert tree(out) == tree(small)
    with open_set(out) as loaded:
        assert "model.norm.weight" in loaded


def test_the_result_says_what_was_fetched_and_what_was_there(large: Path, tmp_path: Path) -> None:
    """A second pull fetches the set manifest, to know what is published there, and nothing else."""
    payload_bytes = [entry.payload_bytes for entry in pull(large, tmp_path / "out", only=[0]).manifest.partitions]
    result = pull(large, tmp_path / "out")
    assert [received.present_bytes for received in result.partitions] == [payload_bytes[0], 0]
    assert result.partitions[0].fetched_bytes == 0
    again = pull(large, tmp_path / "out")
    assert again.fetched_bytes == (large / SET_MANIFEST_NAME).stat().st_size
    assert again.present_bytes == sum(payload_bytes) + len(CAUSAL_CONFIG)
    assert json.loads(json.dumps(again.as_json()))["partitions"][1] == {
        "part_id": 1,
        "fetched_bytes": 0,
        "present_bytes": payload_bytes[1],
        "payload_bytes": payload_bytes[1],
    }


def test_progress_comes_to_its_total(large: Path, tmp_path: Path) -> None:
    """Every stage ends at what it announced, fresh, resumed by another partition, and with all there."""
    for only in ([0], None, None):
        last = {}
        pull(large, tmp_path / "out", only=only, progress=lambda p, last=last: last.update({p.stage: p}))
        assert last
        assert all(progress.done_bytes == progress.total_bytes for progress in last.values())


@needs_fork
def test_killed_at_any_change_of_the_disk(small: Path, tmp_path: Path) -> None:
    """Whichever write, rename or removal it dies in: what passes for a partition is one, and the next run ends well."""
    expected = tree(small)
    for number in range(1000):
        out = tmp_path / str(number)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            pull(small, out)

        if in_child(body).signal == 0:
            break
        for path in out.glob("partition_?.json"):
            assert verify(path, level="full").ok
        if (out / SET_MANIFEST_NAME).exists():
            assert verify(out).ok
        pull(small, out)
        assert tree(out) == expected, number
    assert number > 30


@needs_fork
def test_killed_at_any_change_while_it_replaces_another_set(small: Path, other: Path, tmp_path: Path) -> None:
    """With `force`, what was there is gone or whole, never mixed, and the same command ends well."""
    expected = tree(small)
    for number in range(1000):
        out = tmp_path / str(number)
        shutil.copytree(other, out)
        (out / "notes.txt").write_bytes(b"mine")

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            pull(small, out, force=True)

        if in_child(body).signal == 0:
            break
        if (out / SET_MANIFEST_NAME).exists():
            assert verify(out).ok
        pull(small, out, force=True)
        assert tree(out) == {**expected, "notes.txt": b"mine"}, number
        shutil.rmtree(out)
    assert number > 30


@needs_fork
@pytest.mark.parametrize("done_mib", [1, 12, 17, 25, 31])
def test_killed_after_so_many_bytes(large: Path, tmp_path: Path, done_mib: int) -> None:
    """What arrived stays and is not fetched again."""
    out = tmp_path / "out"
    ending = in_child(lambda: pull(large, out, progress=at_bytes("pull", done_mib * MIB)))
    assert ending.signal == 9
    assert not (out / SET_MANIFEST_NAME).exists()
    result = pull(large, out)
    assert result.present_bytes >= (done_mib - 1) * MIB
    total = sum(entry.payload_bytes for entry in result.manifest.partitions)
    assert result.fetched_bytes < total - result.present_bytes + 100_000
    assert tree(out) == tree(large)


def test_another_set_is_refused_and_replaced_on_demand(small: Path, large: Path, tmp_path: Path) -> None:
    """`force` removes what mmsplit wrote, and leaves what is not its own."""
    out = tmp_path / "out"
    pull(large, out)
    before = tree(out)
    with pytest.raises(OutputExistsError, match="another partition set"):
        pull(small, out)
    assert tree(out) == before
    (out / "notes.txt").write_bytes(b"mine")
    pull(small, out, force=True)
    assert tree(out) == {**tree(small), "notes.txt": b"mine"}


def test_an_unfinished_pull_of_another_set_is_refused(small: Path, large: Path, tmp_path: Path) -> None:
    """Its set manifest, still without its name, says what it was."""
    (tmp_path / PARTIAL_NAME).write_bytes((large / SET_MANIFEST_NAME).read_bytes())
    with pytest.raises(OutputExistsError, match="unfinished pull of another set"):
        pull(small, tmp_path)
    pull(small, tmp_path, force=True)
    assert tree(tmp_path) == tree(small)


def test_an_unfinished_split_is_refused(small: Path, tmp_path: Path) -> None:
    """Neither touched, nor taken for ours; with `force` it goes."""
    with OutputDirectory(tmp_path) as out:
        out.write_state({"source": "x"})
    with pytest.raises(OutputExistsError, match=r"unfinished split .*use --force to replace"):
        pull(small, tmp_path)
    pull(small, tmp_path, force=True)
    assert tree(tmp_path) == tree(small)
    assert not (tmp_path / STATE_NAME).exists()


@pytest.mark.parametrize("name", ["partition_0.bin", "partition_7.json", "partition_1.bin.partial"])
def test_files_of_nobody_with_names_of_ours_are_refused(small: Path, tmp_path: Path, name: str) -> None:
    """Without a set manifest nobody knows what they are; if mmsplit did not write them, not even `force` helps."""
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match=name):
        pull(small, tmp_path)
    with pytest.raises(OutputExistsError, match="did not write it"):
        pull(small, tmp_path, force=True)
    assert tree(tmp_path) == {name: b"precious"}


def test_a_small_file_of_the_users_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    """Another config.json is refused before anything is written, the same one is taken as it is."""
    (tmp_path / "config.json").write_bytes(b"{}")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match=r"config\.json"):
            pull(small, tmp_path, force=force)
    assert tree(tmp_path) == {"config.json": b"{}"}
    (tmp_path / "config.json").write_bytes(CAUSAL_CONFIG)
    pull(small, tmp_path)
    assert tree(tmp_path) == tree(small)


def test_a_wrong_partition_is_named_and_mended_on_demand(large: Path, tmp_path: Path) -> None:
    """Only the piece that is damaged is fetched again."""
    out = tmp_path / "out"
    pull(large, out)
    flip(out / "partition_1.bin", 9_000_000)
    flip(out / "config.json", 3)
    with pytest.raises(OutputExistsError, match=r"config\.json"):
        pull(large, out)
    (out / "config.json").write_bytes(CAUSAL_CONFIG)
    with pytest.raises(OutputExistsError, match=r"partition_1\.bin.*is there, but not as published.*--force"):
        pull(large, out)
    assert pull(large, out, only=[0]).partitions[0].fetched_bytes == 0
    flip(out / "config.json", 3)
    result = pull(large, out, force=True)
    assert 0 < result.partitions[1].fetched_bytes < 5 * MIB
    assert tree(out) == tree(large)


@needs_fork
def test_killed_at_any_change_while_it_mends_a_partition(small: Path, tmp_path: Path) -> None:
    """A partition that is being mended is none: its manifest goes first and comes last."""
    for number in range(1000):
        out = tmp_path / str(number)
        shutil.copytree(small, out)
        flip(out / "partition_1.bin", 5_000)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            pull(small, out, force=True)

        if in_child(body).signal == 0:
            break
        if not (out / "partition_1.bin").exists():
            assert not (out / "partition_1.json").exists()
        pull(small, out, force=True)
        assert tree(out) == tree(small), number
    assert number > 5


def test_a_wrong_manifest_is_named_and_mended_on_demand(small: Path, tmp_path: Path) -> None:
    """The JSON of a partition is held to the digest in the set manifest; the set manifest to what is published."""
    out = tmp_path / "out"
    pull(small, out)
    flip(out / "partition_2.json", 50)
    with pytest.raises(OutputExistsError, match="partition 2 is there, but not as published"):
        pull(small, out)
    pull(small, out, force=True)
    assert tree(out) == tree(small)
    path = out / SET_MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_bytes())))
    with pytest.raises(OutputExistsError, match="not in the same bytes"):
        pull(small, out)
    pull(small, out, force=True)
    assert tree(out) == tree(small)


def test_files_that_are_gone_are_fetched(small: Path, tmp_path: Path) -> None:
    """What is missing needs no permission: nothing is overwritten."""
    pull(small, tmp_path)
    for name in ("partition_0.bin", "partition_1.json", "config.json"):
        (tmp_path / name).unlink()
    pull(small, tmp_path)
    assert tree(tmp_path) == tree(small)


def test_only_the_set_of_a_root_digest(small: Path, tmp_path: Path) -> None:
    """With or without its prefix; another one is refused before anything is written."""
    root = json.loads((small / SET_MANIFEST_NAME).read_bytes())["root_digest"]
    with pytest.raises(IntegrityError, match="another set than the one of this root digest"):
        pull(small, tmp_path / "out", root_digest="sha256:" + "0" * 64)
    with pytest.raises(RequestError, match="not a root digest"):
        pull(small, tmp_path / "out", root_digest="sha256:12")
    assert not (tmp_path / "out").exists()
    pull(small, tmp_path / "out", only=[0], root_digest=root)
    pull(small, tmp_path / "out", root_digest=root.removeprefix("sha256:").upper())


@pytest.mark.parametrize("only", [[3], [-1], [0, 99], ["0"], [True], []])
def test_partitions_that_are_none(small: Path, tmp_path: Path, only: list) -> None:
    """The message says which there are; nothing is written."""
    with pytest.raises(RequestError, match="partition"):
        pull(small, tmp_path / "out", only=only)
    assert not (tmp_path / "out").exists()


def test_places_that_are_none(small: Path, tmp_path: Path) -> None:
    """No set there, no such place, and the place itself as output."""
    with pytest.raises(RemoteNotFoundError, match="no partition set there"):
        pull(tmp_path, tmp_path / "out")
    with pytest.raises(RequestError, match="no such directory"):
        pull(str(tmp_path / "none"), tmp_path / "out")
    with pytest.raises(RequestError, match="directory of the source"):
        pull(small, small / ".." / small.name)
    with pytest.raises(RequestError, match="without a connection"):
        pull(small, tmp_path / "out", hub=HubOptions(connections=0))
    assert not (tmp_path / "out").exists()


def test_a_set_that_lacks_a_partition_gives_the_others(small: Path, tmp_path: Path) -> None:
    """A node's disk holds one partition: that one can be had from it, and the message names the others."""
    pull(small, tmp_path / "node", only=[1])
    pull(tmp_path / "node", tmp_path / "out", only=[1])
    assert tree(tmp_path / "out") == tree(tmp_path / "node")
    with pytest.raises(RemoteNotFoundError, match=r"partition_0\.json"):
        pull(tmp_path / "node", tmp_path / "out")


def test_space_is_checked_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written where it cannot fit; what is there already needs no space."""
    pull(small, tmp_path / "out", only=[0, 1])
    before = tree(tmp_path / "out")
    need = (small / "partition_2.bin").stat().st_size
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: need - 1)
    with pytest.raises(NoSpaceError, match="too little free space"):
        pull(small, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: need)
    pull(small, tmp_path / "out")


def test_another_run_in_the_same_place_is_refused(small: Path, tmp_path: Path) -> None:
    """One writer at a time."""
    with OutputDirectory(tmp_path), pytest.raises(OutputLockedError):
        pull(small, tmp_path)
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("../evil", FormatError),
        ("/evil", FormatError),
        ("sub/../../evil", FormatError),
        ("C:evil", FormatError),
        ("partition_0.bin", IntegrityError),
        ("Partition_0.JSON", IntegrityError),
        ("partition_set.json", IntegrityError),
        ("unfinished_split.json", IntegrityError),
        (".mmsplit.lock", IntegrityError),
        ("config.json.partial", IntegrityError),
    ],
)
def test_names_that_would_do_harm_are_refused(
    small: Path, tmp_path: Path, name: str, error: type[MmsplitError]
) -> None:
    """A set of a stranger writes only below its directory, and nothing that means something to mmsplit."""

    def rename(values: dict) -> None:
        values["files"][0]["name"] = name

    source = changed(small, tmp_path / "source", rename)
    with pytest.raises(error):
        pull(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


def test_a_huge_small_file_is_refused(small: Path, tmp_path: Path) -> None:
    """What is read into memory is bounded before it is read."""
    source = changed(small, tmp_path / "source", lambda values: values["files"][0].update(bytes=1 << 40))
    with pytest.raises(IntegrityError, match="too large"):
        pull(source, tmp_path / "out")


@pytest.mark.parametrize("change", ["damaged", "reformatted", "other"])
def test_a_set_manifest_that_is_not_as_written_is_refused(small: Path, tmp_path: Path, change: str) -> None:
    """A changed value breaks the root digest; a changed byte that means the same would fail verification later."""
    source = shutil.copytree(small, tmp_path / "source")
    path = source / SET_MANIFEST_NAME
    text = path.read_text()
    path.write_text(
        {
            "damaged": text.replace('"num_parts": 3', '"num_parts": 4'),
            "reformatted": json.dumps(json.loads(text)),
            "other": "[]",
        }[change]
    )
    with pytest.raises(IntegrityError):
        pull(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_file_that_is_not_the_published_one_is_refused(small: Path, tmp_path: Path) -> None:
    """Of another content or another length; the pull goes on when it is right again."""
    source = shutil.copytree(small, tmp_path / "source")
    for content in (b"xyz", b"x"):
        (source / "sub/tokens.txt").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"tokens\.txt.*not the one that its set was made with"):
            pull(source, tmp_path / "out")
    (source / "sub/tokens.txt").write_bytes(b"abc")
    pull(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(small)


def test_a_published_partition_that_is_damaged_never_becomes_one_here(small: Path, tmp_path: Path) -> None:
    """One clear error that says where; the other partitions can be had."""
    source = shutil.copytree(small, tmp_path / "source")
    flip(source / "partition_1.bin", 5_000)
    with pytest.raises(IntegrityError, match=r"partition_1\.bin.*arrives damaged"):
        pull(source, tmp_path / "out")
    assert not (tmp_path / "out" / "partition_1.json").exists()
    assert not (tmp_path / "out" / SET_MANIFEST_NAME).exists()
    pull(source, tmp_path / "out", only=[0, 2])
    assert pull(small, tmp_path / "out").partitions[1].fetched_bytes > 0
    assert tree(tmp_path / "out") == tree(small)


def test_the_number_of_connections_changes_nothing(large: Path, tmp_path: Path) -> None:
    """One or many, with and without the page cache: the same bytes."""
    results: list[PullResult] = []
    for connections, direct in ((1, True), (7, False), (64, True)):
        out = tmp_path / str(connections)
        results.append(pull(large, out, hub=HubOptions(connections=connections), direct=direct))
        assert tree(out) == tree(large)
    assert len({result.fetched_bytes for result in results}) == 1


def test_memory_does_not_grow_with_the_partition(large: Path, tmp_path: Path) -> None:
    """Blocks of 1 MiB go through a buffer of a piece a connection, which tracemalloc does not see."""
    pull(large, tmp_path / "warm", only=[0])
    tracemalloc.start(1)
    try:
        pull(large, tmp_path / "out", hub=HubOptions(connections=1), threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB < (large / "partition_0.bin").stat().st_size
