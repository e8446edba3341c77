"""`split` survives: killed anywhere and run again it comes to the same bytes, and believes nothing it cannot check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, open_descriptors, tree, write_checkpoint
from children import at_bytes, die, die_at_change, in_child
from safetensors.numpy import save_file

from mmsplit.errors import (
    FormatError,
    OutputExistsError,
    SourceChangedError,
)
from mmsplit.sidecar.output_directory import LOCK_NAME, STATE_NAME
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.splitting import split_run
from mmsplit.verbs.load import open_set
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of many small slots, two shards, an index and a small file."""
    root = tmp_path_factory.mktemp("small") / "model"
    weights = llama_weights(3)
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc"}
    return write_checkpoint(root, [weights[:5], weights[5:]], index=True, files=files)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 60 MB: a dozen slots of full size."""
    root = tmp_path_factory.mktemp("large") / "model"
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (1280, 2048), 90) for k in range(12)]
    return write_checkpoint(root, [weights], files={"config.json": CAUSAL_CONFIG})


@pytest.fixture(scope="module")
def whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the large checkpoint's set, made without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "set"
    split(large, out, 2, threads=2)
    return tree(out)


def _interrupt(source: Path, out: Path, done_bytes: int, *, threads: int = 1) -> None:
    ending = in_child(lambda: split(source, out, 2, threads=threads, progress=at_bytes("split", done_bytes)))
    assert ending.signal == 9


def _assert_is_no_set(out: Path) -> None:
    for refuse in (verify, open_set):
        with pytest.raises(FormatError, match=r"not finished|no partition set"):
            refuse(out)


def test_killed_at_any_change_of_the_disk(small: Path, tmp_path: Path) -> None:
    """Whichever write, rename or removal it dies in: no half set passes, and a second run makes the same files."""
    split(small, tmp_path / "whole", 2, threads=1)
    expected = tree(tmp_path / "whole")
    for number in range(1000):
        out = tmp_path / str(number)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            split(small, out, 2, threads=1)

        if in_child(body).signal == 0:
            break
        if (out / SET_MANIFEST_NAME).exists():
            assert verify(out).ok
        elif out.exists():
            _assert_is_no_set(out)
        split(small, out, 2, threads=2, existing="resume")
        assert tree(out) == expected, number
    assert number > 40


@pytest.mark.parametrize("done_mib", [1, 14, 29, 31, 45, 60])
def test_killed_after_so_many_bytes(large: Path, whole: dict[str, bytes], tmp_path: Path, done_mib: int) -> None:
    """What is on disk is hashed again and not made again; the lock died with its owner."""
    out = tmp_path / "set"
    _interrupt(large, out, done_mib * MIB, threads=2)
    _assert_is_no_set(out)
    result = split(large, out, 2, existing="resume", threads=2)
    # Slots that other threads had in flight, and the one reported before its neighbours, may have to be made again.
    assert result.resumed_bytes >= (done_mib - 6 * 5) * MIB
    assert result.resumed_bytes > 0 or done_mib == 1
    assert tree(out) == whole


def test_killed_again_and_again(large: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Every run goes on where the one before it was killed, until one comes through."""
    out = tmp_path / "set"
    stops = [8 * MIB, 24 * MIB, 40 * MIB, 56 * MIB]
    for stop in stops:
        callback = at_bytes("split", stop)
        ending = in_child(lambda callback=callback: split(large, out, 2, existing="resume", progress=callback))
        assert ending.signal == 9
    assert split(large, out, 2, existing="resume").resumed_bytes > 20 * MIB
    assert tree(out) == whole


def test_killed_while_it_re_hashes(large: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Looking at what is there changes nothing."""
    out = tmp_path / "set"
    _interrupt(large, out, 30 * MIB)
    before = tree(out)
    callback = at_bytes("re-hash", 10 * MIB)
    assert in_child(lambda: split(large, out, 2, existing="resume", progress=callback)).signal == 9
    assert {name: data for name, data in tree(out).items() if name != LOCK_NAME} == {
        name: data for name, data in before.items() if name != LOCK_NAME
    }
    split(large, out, 2, existing="resume")
    assert tree(out) == whole


def test_an_error_is_as_good_as_a_kill(large: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """An exception from the caller's callback ends the run, leaves no thread and no open file, and can be resumed."""

    def fail() -> None:
        raise RuntimeError("the caller's own")

    threads, files = threading.active_count(), open_descriptors()
    with pytest.raises(RuntimeError, match="the caller's own"):
        split(large, tmp_path, 2, progress=at_bytes("split", 20 * MIB, fail))
    assert threading.active_count() == threads
    assert open_descriptors() == files
    assert split(large, tmp_path, 2, existing="resume").resumed_bytes > 0
    assert tree(tmp_path) == whole


def _cut_journal(out: Path) -> None:
    path = out / "partition_0.bin.journal"
    os.truncate(path, path.stat().st_size - 50)


def _cut_journal_within_a_checksum(out: Path) -> None:
    path = out / "partition_0.bin.journal"
    os.truncate(path, path.stat().st_size - 3)


def _promise_too_much(out: Path) -> None:
    """The journal tells of more slots than the payload holds."""
    path = out / "partition_0.bin.partial"
    os.truncate(path, path.stat().st_size // 2)


def _append_to_journal(out: Path) -> None:
    path = out / "partition_0.bin.journal"
    path.write_bytes(path.read_bytes() * 2)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "payload, first slot": lambda out: flip(out / "partition_0.bin.partial", 5000),
    "payload, middle": lambda out: flip(out / "partition_0.bin.partial", 9 * MIB, 7),
    "payload, header": lambda out: flip(out / "partition_0.bin.partial", 20),
    "payload, padding of the header": lambda out: flip(out / "partition_0.bin.partial", 2000),
    "journal, first record": lambda out: flip(out / "partition_0.bin.journal", 17),
    # Neither can be told from the payload's bytes: only the journal's own checksum tells.
    "journal, checksum of the raw bytes": lambda out: flip(out / "partition_0.bin.journal", 25),
    "journal, word layout": lambda out: flip(out / "partition_0.bin.journal", 37),
    "journal, checksum": lambda out: flip(out / "partition_0.bin.journal", 41),
    "journal, late record": lambda out: flip(out / "partition_0.bin.journal", 150),
    "journal cut": _cut_journal,
    "journal cut within a checksum": _cut_journal_within_a_checksum,
    "journal gone": lambda out: (out / "partition_0.bin.journal").unlink(),
    "journal longer than the payload": _promise_too_much,
    "journal appended to": _append_to_journal,
    "payload gone": lambda out: (out / "partition_0.bin.partial").unlink(),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_work_is_made_again(large: Path, whole: dict[str, bytes], tmp_path: Path, damage: str) -> None:
    """Whatever happened to the work in progress, the result is that of an undisturbed run."""
    out = tmp_path / "set"
    _interrupt(large, out, 20 * MIB)
    _DAMAGES[damage](out)
    split(large, out, 2, existing="resume")
    assert tree(out) == whole


@pytest.mark.parametrize(
    ("name", "offset"),
    [("partition_0.bin", 30), ("partition_0.bin", 9 * MIB), ("partition_0.bin", -1), ("partition_0.bin", -300),
     ("partition_0.json", 100)],
)  # fmt: skip
def test_a_damaged_partition_of_an_unfinished_set_is_made_again(
    large: Path, whole: dict[str, bytes], tmp_path: Path, name: str, offset: int
) -> None:
    """A partition that was complete is believed only as far as its checksums go."""
    out = tmp_path / "set"
    _interrupt(large, out, 50 * MIB)
    path = out / name
    flip(path, offset % path.stat().st_size)
    split(large, out, 2, existing="resume")
    assert tree(out) == whole


def test_a_flipped_bit_in_the_state_is_found(large: Path, tmp_path: Path) -> None:
    """The state holds digests of the shards; a wrong one would make a set that can never be merged."""
    _interrupt(large, tmp_path, 20 * MIB)
    path = tmp_path / STATE_NAME
    state = path.read_bytes()
    for offset in range(0, len(state), 7):
        flip(path, offset)
        with pytest.raises(OutputExistsError, match="cannot read the state"):
            split(large, tmp_path, 2, existing="resume")
        path.write_bytes(state)


def test_force_starts_again_where_the_state_cannot_be_read(
    large: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The way out that the error names is one."""
    _interrupt(large, tmp_path, 20 * MIB)
    flip(tmp_path / STATE_NAME, 300)
    with pytest.raises(OutputExistsError, match="--force"):
        split(large, tmp_path, 2, existing="resume")
    split(large, tmp_path, 2, existing="force")
    assert tree(tmp_path) == whole


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_parts": 3}, "another plan"),
        ({"codec": "raw"}, "another codec"),
        ({"model_id": "other"}, r"another model id \(expected other, found .*--model-id"),
        ({"revision": "other"}, "another revision"),
        ({"tied": "reference"}, None),
    ],
)
def test_only_the_same_run_is_resumed(small: Path, tmp_path: Path, options: dict, reason: str | None) -> None:
    """Another plan, codec or name is refused with the reason, over an unfinished run and over a finished set."""
    if reason is None:
        reason = "another plan"  # the tied head is stored differently
    out = tmp_path / "set"
    _interrupt(small, out, 1)
    for _ in range(2):
        with pytest.raises(OutputExistsError, match=reason):
            split(small, out, **({"num_parts": 2} | options), existing="resume")
        split(small, out, 2, existing="resume")


def test_another_source_is_refused(small: Path, large: Path, tmp_path: Path) -> None:
    """An unfinished split of another checkpoint stays as it is."""
    _interrupt(large, tmp_path, 20 * MIB)
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match="another source"):
        split(small, tmp_path, 2, existing="resume")
    assert {k: v for k, v in tree(tmp_path).items() if k != LOCK_NAME} == {
        k: v for k, v in before.items() if k != LOCK_NAME
    }


def test_a_source_that_changed_between_runs_is_refused(tmp_path: Path) -> None:
    """Same names, shapes and sizes but another time of change: half old, half new would pass every checksum."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(3)])
    _interrupt(source, tmp_path / "set", 1)
    stat = (source / "model.safetensors").stat()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SourceChangedError, match=r"not the one the unfinished split read.*--force"):
        split(source, tmp_path / "set", 2, existing="resume")
    split(source, tmp_path / "set", 2, existing="force")
    assert verify(tmp_path / "set", against=source).ok


def test_a_finished_set_is_left_alone(small: Path, tmp_path: Path) -> None:
    """Resuming what is finished touches no file."""
    done = split(small, tmp_path, 2)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = split(small, tmp_path, 2, existing="resume")
    assert again.already_finished
    assert again.root_digest == done.root_digest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == times


@pytest.mark.parametrize("name", ["partition_1.bin", "partition_0.json", "config.json"])
def test_a_finished_set_that_lost_a_file_is_not_called_finished(small: Path, tmp_path: Path, name: str) -> None:
    """Resume does not say that all is well where a file of the set is gone."""
    split(small, tmp_path, 2)
    (tmp_path / name).unlink()
    with pytest.raises(OutputExistsError, match=f"{name}.*missing"):
        split(small, tmp_path, 2, existing="resume")


def test_existing_output_is_refused(small: Path, large: Path, tmp_path: Path) -> None:
    """Without being told, a run neither continues nor replaces anything, and says what to do."""
    _interrupt(large, tmp_path / "a", 20 * MIB)
    with pytest.raises(OutputExistsError, match=r"unfinished split of the same source and plan.*--resume"):
        split(large, tmp_path / "a", 2)
    split(small, tmp_path / "b", 2)
    with pytest.raises(OutputExistsError, match=r"finished partition set of the same source and plan.*--force"):
        split(small, tmp_path / "b", 2)


def test_two_runs_on_one_output(large: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The second is refused while the first runs, whatever it asks for, and does not disturb it."""
    script = """
import sys
from mmsplit import OutputLockedError, split
for existing in ("refuse", "resume", "force"):
    try:
        split(sys.argv[1], sys.argv[2], 2, existing=existing)
    except OutputLockedError as error:
        print(error)
"""
    refusals = []

    def try_another() -> None:
        command = [sys.executable, "-c", script, str(large), str(tmp_path)]
        refusals.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    split(large, tmp_path, 2, progress=at_bytes("split", 20 * MIB, try_another))
    assert (
        refusals[0].splitlines() == [f"{tmp_path}: another run is writing to this output. Wait until it has ended."] * 3
    )
    assert tree(tmp_path) == whole


def test_force_replaces_only_what_mmsplit_wrote(
    small: Path, large: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Everything of the old set goes, finished or not; everything else stays."""
    mine = {"notes.txt": b"mine", "partition_notes.txt": b"mine, too", "partition_0.bin.bak": b"and this"}
    for number, prepare in enumerate(
        (lambda out: split(small, out, 5), lambda out: _interrupt(small, out, 1), lambda out: out.mkdir())
    ):
        out = tmp_path / str(number)
        prepare(out)
        for name, data in mine.items():
            (out / name).write_bytes(data)
        split(large, out, 2, existing="force")
        extra = {"sub/tokens.txt": b"abc"} if number < 2 else {}  # of the old model, and harmless
        assert tree(out) == whole | mine | extra


@pytest.mark.parametrize(
    "name", ["partition_0.bin", "partition_7.json", SET_MANIFEST_NAME, STATE_NAME]
)  # fmt: skip
def test_force_refuses_files_of_others_with_names_like_ours(small: Path, tmp_path: Path, name: str) -> None:
    """A foreign partition_0.bin is not replaced, and nothing else is removed before it is found."""
    split(small, tmp_path, 2)
    (tmp_path / name).write_bytes(b'{"weights": "of somebody else"}')
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=f"{name}: .*mmsplit did not write it"):
        split(small, tmp_path, 2, existing="force")
    assert tree(tmp_path) == before


def test_files_of_others_with_names_like_ours_are_refused(small: Path, tmp_path: Path) -> None:
    """A partition file without a set is in the way of a new set."""
    (tmp_path / "partition_0.bin").write_bytes(b"somebody's")
    for existing in ("refuse", "resume"):
        with pytest.raises(OutputExistsError, match=r"partition_0\.bin, but neither"):
            split(small, tmp_path, 2, existing=existing)
    assert tree(tmp_path) == {"partition_0.bin": b"somebody's"}


def test_force_killed_at_any_change_of_the_disk(small: Path, tmp_path: Path) -> None:
    """An interrupted replacement never leaves old and new passing for one set; force again completes it."""
    split(small, tmp_path / "whole", 2, codec="raw")
    expected = tree(tmp_path / "whole")
    for number in range(0, 1000, 4):
        out = tmp_path / str(number)
        split(small, out, 3)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            split(small, out, 2, codec="raw", existing="force", threads=1)

        if in_child(body).signal == 0:
            break
        if (out / SET_MANIFEST_NAME).exists():
            assert verify(out).ok
        else:
            _assert_is_no_set_of_files(out)
        split(small, out, 2, codec="raw", existing="force")
        assert tree(out) == expected, number
    assert number > 40


def _assert_is_no_set_of_files(out: Path) -> None:
    """The old partitions may be there without their set manifest; they are no set, and verify says so."""
    try:
        assert not verify(out).ok
    except FormatError:
        pass


def test_a_small_file_that_changed_is_replaced_by_force(tmp_path: Path) -> None:
    """What the old set recorded as its own may be replaced; what somebody edited may not."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)], files={"tokens.txt": b"old"})
    split(source, tmp_path / "set", 2)
    (source / "tokens.txt").write_bytes(b"new")
    split(source, tmp_path / "set", 2, existing="force")
    assert (tmp_path / "set" / "tokens.txt").read_bytes() == b"new"
    (tmp_path / "set" / "tokens.txt").write_bytes(b"edited")
    with pytest.raises(OutputExistsError, match=r"tokens\.txt: a file that mmsplit did not write"):
        split(source, tmp_path / "set", 2, existing="force")
    assert (tmp_path / "set" / "tokens.txt").read_bytes() == b"edited"


def test_a_small_file_that_changed_during_an_unfinished_run_is_replaced_by_force(tmp_path: Path) -> None:
    """The state, too, knows which small files were written."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)], files={"tokens.txt": b"old"})
    _interrupt(source, tmp_path / "set", 1)
    (source / "tokens.txt").write_bytes(b"new")
    with pytest.raises(SourceChangedError, match=r"tokens\.txt: file of the model is not the one"):
        split(source, tmp_path / "set", 2, existing="resume")
    split(source, tmp_path / "set", 2, existing="force")
    assert verify(tmp_path / "set", against=source).ok
    assert (tmp_path / "set" / "tokens.txt").read_bytes() == b"new"


def test_a_small_file_in_the_way_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    """The refusal comes before the first byte, so that the next run is a first run."""
    (tmp_path / "config.json").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"config\.json: a file that mmsplit did not write"):
        split(small, tmp_path, 2)
    assert tree(tmp_path) == {"config.json": b"mine"}


def test_the_state_is_readable(large: Path, tmp_path: Path) -> None:
    """Someone who finds an unfinished run can read what it was."""
    _interrupt(large, tmp_path, 20 * MIB)
    state = json.loads((tmp_path / STATE_NAME).read_text())
    assert state["codec"] == "planes"
    assert list(state["fingerprints"]) == ["model.safetensors"]


def test_die_is_a_kill() -> None:
    """The helper ends a child by signal 9, so that no handler and no `finally` can run."""
    assert in_child(die).signal == 9


def test_a_finished_set_of_other_weights_is_not_taken_for_this_source(tmp_path: Path) -> None:
    """Two fine-tunes have the same headers; --resume must not call the one's set finished for the other."""
    sources = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for number, source in enumerate(sources):
        source.mkdir(parents=True)
        tensors = {f"model.layers.{i}.w.weight": np.full(3000, number + i, np.float32) for i in range(4)}
        save_file(tensors, source / "model.safetensors")
    out = tmp_path / "out"
    split(sources[0], out, 2)
    assert split(sources[0], out, 2, existing="resume").already_finished
    with pytest.raises(OutputExistsError, match="other weights"):
        split(sources[1], out, 2, existing="resume")


def test_an_unfinished_split_of_another_encoder_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of zstd may give other bytes, and a set must not depend on where a run was interrupted."""
    source = tmp_path / "model"
    source.mkdir()
    save_file({f"model.layers.{i}.w.weight": np.ones(3000, np.float32) for i in range(4)}, source / "model.safetensors")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(source, tmp_path / "out", 2, progress=stop)
    monkeypatch.setattr(split_run, "ENCODER", "planes 1, zstd 9.9.9")
    with pytest.raises(OutputExistsError, match="another encoder"):
        split(source, tmp_path / "out", 2, existing="resume")
