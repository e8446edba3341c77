"""`split`: what it writes, what it reports, what it refuses; laws and survival are in files of their own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, llama_weights, size_of, tree, write_checkpoint, write_shard

from mmsplit.errors import PlanError, RequestError
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_reader import read_set_manifest
from mmsplit.verbs.merge import merge
from mmsplit.verbs.plan import plan
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with a tied head, in two shards."""
    root = tmp_path_factory.mktemp("model") / "model"
    weights = llama_weights(3)
    files = {"config.json": CAUSAL_CONFIG, "code/modeling.py": b"pass", ".git/config": b"", "old.bin": b"x"}
    return write_checkpoint(root, [weights[:4], weights[4:]], files=files)


def test_what_lies_in_the_output(source: Path, tmp_path: Path) -> None:
    """Partitions, set manifest and small files; no state, lock, journal or other weights."""
    split(source, tmp_path, 2)
    assert tree(tmp_path).keys() == {
        "partition_0.json",
        "partition_0.bin",
        "partition_1.json",
        "partition_1.bin",
        "partition_set.json",
        "config.json",
        "code/modeling.py",
    }


def test_the_plan_is_what_is_written(source: Path, tmp_path: Path) -> None:
    """Layers, tensors and totals of the manifests are those of the dry run."""
    planned = plan(source, 3)
    split(source, tmp_path, 3)
    for part in planned.partitions:
        with open_partition_files(tmp_path / f"partition_{part.part_id}.json") as partition:
            manifest = partition.manifest
        assert [layer.name for layer in manifest.layers] == [layer.name for layer in part.layers]
        assert [[t.name for t in layer.tensors] for layer in manifest.layers] == [
            [t.name for t in layer.tensors] for layer in part.layers
        ]
        assert (manifest.total_bytes, manifest.total_params) == (part.total_bytes, part.total_params)
        assert manifest.plan_digest == planned.digest


def test_the_set_manifest_is_true(source: Path, tmp_path: Path) -> None:
    """Digests and sizes in it are those of the files, here and at the source."""

    def sha256(path: Path) -> str:
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"

    result = split(source, tmp_path, 2, model_id="org/name", revision="abc")
    manifest = read_set_manifest(tmp_path)
    assert manifest == result.manifest
    assert (manifest.model_id, manifest.revision, manifest.root_digest) == ("org/name", "abc", result.root_digest)
    for shard in manifest.shards:
        assert (shard.size_bytes, shard.sha256) == ((source / shard.name).stat().st_size, sha256(source / shard.name))
        assert (source / shard.name).read_bytes().startswith(shard.header.data("shard"))
    for entry in manifest.files:
        assert (entry.size_bytes, entry.sha256) == (
            (tmp_path / entry.name).stat().st_size,
            sha256(tmp_path / entry.name),
        )
    for part in manifest.partitions:
        assert part.manifest_sha256 == sha256(tmp_path / part.manifest_file)
        assert part.payload_bytes == (tmp_path / part.payload_file).stat().st_size


def test_as_json(source: Path, tmp_path: Path) -> None:
    """What `split --json` shows can be written as JSON."""
    shown = json.loads(json.dumps(split(source, tmp_path, 2).as_json()))
    assert shown["already_finished"] is False
    assert shown["resumed_bytes"] == 0
    assert [part["part_id"] for part in shown["partitions"]] == [0, 1]


def test_progress_ends_where_it_should(source: Path, tmp_path: Path) -> None:
    """Every raw byte of every partition is counted once."""
    reports = []
    total = split(source, tmp_path, 2, threads=3, progress=reports.append).manifest.total_bytes
    assert {(report.stage, report.total_bytes) for report in reports} == {("split", total)}
    assert reports[-1].done_bytes == total
    assert [report.done_bytes for report in reports] == sorted(report.done_bytes for report in reports)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_parts": 2, "codec": "gzip"}, RequestError, "planes, zstd, raw"),
        ({"num_parts": 2, "threads": 0}, RequestError, "1 to 1024"),
        ({"num_parts": 2, "threads": 5000}, RequestError, "1 to 1024"),
        ({"num_parts": 0}, PlanError, "1 to"),
        ({"num_parts": 99}, PlanError, "1 to"),
        ({}, PlanError, "into how many"),
    ],
)
def test_requests_that_cannot_be_met(source: Path, tmp_path: Path, arguments: dict, error: type, match: str) -> None:
    """Refused with what is possible, before the output directory exists."""
    with pytest.raises(error, match=match):
        split(source, tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
def test_a_tied_weight_has_the_fate_it_was_given(source: Path, tmp_path: Path, tied: str) -> None:
    """A copy, a reference, or the same partition: said in the manifest, and every original byte is stored once."""
    result = split(source, tmp_path / "set", 2, tied=tied)
    raw = sum(size_of(weight) for weight in llama_weights(3))
    embedding = size_of(llama_weights(3)[0])
    assert result.manifest.total_bytes == raw + (embedding if tied == "duplicate" else 0)
    merge(tmp_path / "set", tmp_path / "back")
    assert all((source / name).read_bytes() == data for name, data in tree(tmp_path / "back").items())


def test_one_shard_given_directly(tmp_path: Path) -> None:
    """A single file is a checkpoint, whatever its name, and comes back under it."""
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "some-lora.safetensors", llama_weights(1))
    split(tmp_path / "in" / "some-lora.safetensors", tmp_path / "set", 1)
    merge(tmp_path / "set", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "in")


def test_more_partitions_open_than_threads_and_slots(tmp_path: Path) -> None:
    """Partitions without a byte, and many of them: each is complete on its own."""
    weights = [Weight(f"model.layers.{k}.mlp.w.weight", "F32", (0, 3)) for k in range(40)]
    source = write_checkpoint(tmp_path / "model", [weights])
    split(source, tmp_path / "set", 40, threads=2)
    assert verify(tmp_path / "set", level="full", against=source).ok
    merge(tmp_path / "set", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)


def test_an_output_inside_the_source(tmp_path: Path) -> None:
    """The set may lie in the checkpoint's own directory, but not be that directory: it is only read."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)], files={"config.json": CAUSAL_CONFIG})
    original = tree(source)
    split(source, source / "parts", 2)
    with pytest.raises(RequestError, match="directory of the source"):
        split(source, source, 2)
    split(source, source / "parts", 3, existing="force")
    assert {name: data for name, data in tree(source).items() if name in original} == original
    merge(source / "parts", tmp_path / "back")
    assert tree(tmp_path / "back") == original


def test_unknown_dtypes_are_carried_as_they_are(tmp_path: Path) -> None:
    """A dtype that is not known yet splits, verifies and merges if it is allowed to."""
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    header = {"model.layers.0.w": {"dtype": "F5_E9M9", "shape": [7], "data_offsets": [0, 5 * MIB]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abcde" * MIB)
    split(path.parent, tmp_path / "set", 1, allow_unknown_dtypes=True)
    assert verify(tmp_path / "set", level="full").ok
    merge(tmp_path / "set", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path.parent)
