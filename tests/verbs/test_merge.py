"""`merge` gives the original files or an error that says what is wrong where, and never harms what is there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, open_descriptors, tree, write_checkpoint
from children import at_bytes, die_at_change, in_child

from mmsplit.errors import IntegrityError, MissingPartitionError, OutputExistsError, OutputLockedError
from mmsplit.sidecar.output_directory import LOCK_NAME, OutputDirectory
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.sidecar.set_reader import read_set_manifest
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with an index and small files; one tensor has several chunks."""
    weights = [*llama_weights(3), Weight("model.layers.1.big", "BF16", (5 * MIB // 2,), 40)]
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc"}
    shards = [weights[k::3] for k in range(3)]
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model", shards, index=True, files=files)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 3)
    return out


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def test_result_names_shards_and_digests(made: Path, source: Path, tmp_path: Path) -> None:
    """What merge reports is what lies on disk."""
    shown = merge(made, tmp_path / "out").as_json()
    assert json.loads(json.dumps(shown)) == shown
    for shard in shown["shards"]:
        data = (source / shard["name"]).read_bytes()
        assert shard == {
            "name": shard["name"],
            "bytes": len(data),
            "sha256": f"sha256:{hashlib.sha256(data).hexdigest()}",
            "kept": False,
        }
    assert shown["total_bytes"] == sum(shard["bytes"] for shard in shown["shards"])
    assert tree(tmp_path / "out") == tree(source)


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_any_number_of_threads_gives_the_same_files(made: Path, source: Path, tmp_path: Path, threads: int) -> None:
    """One shard at a time, or several side by side."""
    merge(made, tmp_path / "out", threads=threads)
    assert tree(tmp_path / "out") == tree(source)


@pytest.mark.parametrize("name", ["partition_1.json", "partition_1.bin"])
def test_a_missing_partition_is_named(damaged: Path, tmp_path: Path, name: str) -> None:
    """Merging needs all; which is missing is said before anything is written."""
    (damaged / name).unlink()
    with pytest.raises(MissingPartitionError, match=f"{name}: partition 1 is not here"):
        merge(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_chunk_is_named(damaged: Path, tmp_path: Path) -> None:
    """The error has the payload, the tensor and the offset of the chunk, and the shard does not get its name."""
    for part_id in range(3):
        with open_partition_files(damaged / f"partition_{part_id}.json", "pread") as partition:
            for number, tensor in enumerate(partition.tensors):
                if tensor.name == "model.layers.1.big":
                    record = partition.index[tensor.first_chunk]
                    assert int(record["tensor"]) == number
                    path, start, stored = partition.reader.path, int(record["stored_offset"]), record["stored_bytes"]
    flip(path, start + int(stored) // 2)
    with pytest.raises(IntegrityError) as raised:
        merge(damaged, tmp_path / "out")
    assert (raised.value.path, raised.value.tensor, raised.value.offset) == (str(path), "model.layers.1.big", start)
    assert "mmsplit verify" in str(raised.value)
    shards = {shard.name for shard in read_set_manifest(damaged).shards}
    complete = shards & set(os.listdir(tmp_path / "out"))
    assert INDEX not in os.listdir(tmp_path / "out")
    assert len(complete) < 3


def test_a_wrong_digest_is_found(damaged: Path, tmp_path: Path) -> None:
    """A shard is compared with the SHA-256 that split recorded, and does not get its name if it is another."""
    path = damaged / SET_MANIFEST_NAME
    values = json.loads(path.read_text())
    shard = values["source"]["shards"][1]
    shard["sha256"] = "sha256:" + "0" * 64
    del values["root_digest"]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    values["root_digest"] = f"sha256:{hashlib.sha256(canonical).hexdigest()}"
    path.write_text(json.dumps(values, indent=1) + "\n")
    with pytest.raises(IntegrityError, match=r"merged shard is not the original.*expected sha256:0000"):
        merge(damaged, tmp_path / "out")
    assert not (tmp_path / "out" / shard["name"]).exists()


def test_a_partition_of_another_set_is_refused(damaged: Path, source: Path, tmp_path: Path) -> None:
    """A sound partition that does not belong here is found before anything is written."""
    split(source, tmp_path / "other", 3, model_id="another")
    for name in ("partition_2.json", "partition_2.bin"):
        shutil.copyfile(tmp_path / "other" / name, damaged / name)
    with pytest.raises(IntegrityError, match=r"partition_2\.json.*not the one the set was made with"):
        merge(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "sub/tokens.txt"])
def test_a_damaged_small_file_is_not_passed_on(damaged: Path, tmp_path: Path, name: str) -> None:
    """Small files are compared with their SHA-256, too; a missing one is damage of the set."""
    flip(damaged / name, 1)
    with pytest.raises(IntegrityError, match="not as it was written"):
        merge(damaged, tmp_path / "out")
    (damaged / name).unlink()
    with pytest.raises(IntegrityError, match="cannot read"):
        merge(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", INDEX])
def test_files_in_the_way_are_refused(made: Path, tmp_path: Path, name: str, resume: bool) -> None:
    """Nothing that is there is overwritten, and it is said before the work, not after it."""
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=name):
        merge(made, tmp_path, resume=resume)
    assert {key: data for key, data in tree(tmp_path).items() if key != LOCK_NAME} == {name: b"mine"}


def test_resume_keeps_the_shards_that_are_right(made: Path, source: Path, tmp_path: Path) -> None:
    """Kept shards are not written again; without resume they are in the way."""
    merge(made, tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError, match=r"file exists already.*--resume"):
        merge(made, tmp_path)
    result = merge(made, tmp_path, resume=True)
    assert result.kept == ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")
    assert tree(tmp_path) == tree(source)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_at_any_change_of_the_disk(made: Path, source: Path, tmp_path: Path) -> None:
    """Wherever it dies, no shard has its name before it is whole, and a second run completes the checkpoint."""
    original = tree(source)
    for number in range(0, 1000, 2):
        out = tmp_path / str(number)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            merge(made, out, threads=1)

        if in_child(body).signal == 0:
            break
        there = tree(out) if out.exists() else {}
        assert {name: data for name, data in there.items() if name in original} == {
            name: original[name] for name in there if name in original
        }
        assert INDEX not in there or original.keys() <= there.keys()
        merge(made, out, resume=True)
        assert tree(out) == original, number
    assert number > 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_after_some_bytes(made: Path, source: Path, tmp_path: Path) -> None:
    """Shards that were whole when it died are kept."""
    shards = read_set_manifest(made).shards
    after_two = sum(shard.size_bytes for shard in shards) - 1000
    ending = in_child(lambda: merge(made, tmp_path, threads=1, progress=at_bytes("merge", after_two)))
    assert ending.signal == 9
    merge(made, tmp_path, resume=True)
    assert tree(tmp_path) == tree(source)


def test_progress_ends_where_it_should(made: Path, tmp_path: Path) -> None:
    """Every byte of every shard is counted once, header bytes as well."""
    reports = []
    total = merge(made, tmp_path, threads=1, progress=reports.append).total_bytes
    assert [reports[-1].done_bytes, *{report.total_bytes for report in reports}] == [total, total]


def test_two_merges_into_one_directory(made: Path, tmp_path: Path) -> None:
    """The second is refused while the first holds the lock."""
    with OutputDirectory(tmp_path), pytest.raises(OutputLockedError, match="another run"):
        merge(made, tmp_path)


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    """Shards that hold nothing but empty tensors come back, too."""
    weights = [
        Weight("model.layers.0.mlp.up_proj.weight", "F32", (0,)),
        Weight("model.layers.1.mlp.up_proj.weight", "U8", (3, 0, 2)),
    ]
    source = write_checkpoint(tmp_path / "model", [weights[:1], weights[1:]])
    split(source, tmp_path / "set", 2)
    merge(tmp_path / "set", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(source)


def test_an_error_leaves_no_file_open(damaged: Path, tmp_path: Path) -> None:
    """After a failed merge no descriptor of its many files is left."""
    flip(damaged / "partition_2.bin", 4096)
    before = open_descriptors()
    with pytest.raises(IntegrityError):
        merge(damaged, tmp_path / "out")
    assert open_descriptors() == before
