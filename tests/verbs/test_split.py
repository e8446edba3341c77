"""`split`: what it writes, what it reports, what it refuses; laws and survival are in files of their own."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, llama_weights, size_of, tree, write_checkpoint, write_shard

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.errors import FormatError, OutputExistsError, PlanError, RequestError
from mmsplit.planning import NodeRequest, parse_nodes
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.repeated_chunks import RepeatedChunks
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
        assert (source / shard.name).read_bytes().startswith(shard.kept.data("shard"))
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


def _borrowed(monkeypatch: pytest.MonkeyPatch, shard: str) -> list[tuple[int, int]]:
    """Note every range that is borrowed from `shard` from now on."""
    ranges: list[tuple[int, int]] = []
    borrow = FileReader.borrow

    def note(self: FileReader, start: int, stop: int, scratch: Scratch) -> AbstractContextManager[memoryview]:
        if self.path.name == shard:
            ranges.append((start, stop))
        return borrow(self, start, stop, scratch)

    monkeypatch.setattr(FileReader, "borrow", note)
    return ranges


@pytest.mark.parametrize("codec", ["planes", "zstd", "raw"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_tied_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, threads: int) -> None:
    """Its copy, of several chunks, is taken from the partition that has it; the set is as if it were encoded again."""
    embedding = Weight("model.embed_tokens.weight", "BF16", (1100, 2048))
    source = write_checkpoint(
        tmp_path / "model", [[embedding, *llama_weights(2)[1:]]], files={"config.json": CAUSAL_CONFIG}
    )
    ranges = _borrowed(monkeypatch, "model.safetensors")
    split(source, tmp_path / "set", 2, codec=codec, threads=threads, source_sha256=False)
    weights = [stop - start for start, stop in ranges]
    assert len(set(ranges)) == len(ranges)
    assert sum(weights) == sum(map(size_of, [embedding, *llama_weights(2)[1:]]))
    assert verify(tmp_path / "set", level="full", against=source).ok
    copied = tree(tmp_path / "set")
    monkeypatch.setattr(RepeatedChunks, "original_of", lambda *_: None)
    split(source, tmp_path / "again", 2, codec=codec, source_sha256=False)
    assert tree(tmp_path / "again") == copied


def test_copies_right_behind_their_originals(tmp_path: Path) -> None:
    """Where every thread must wait for the partition before, none waits for ever."""
    shared = [Weight("shared.weight", "BF16", (2100, 2048))]
    blocks = [Weight(f"{side}.block.0.layer.0.w.weight", "BF16", (16, 16)) for side in ("encoder", "decoder")]
    config = json.dumps({"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": True}).encode()
    source = write_checkpoint(tmp_path / "model", [shared + blocks], files={"config.json": config})
    planned = plan(source, boundaries=["decoder.embed_tokens"])
    assert planned.partitions[1].layers[0].name == "decoder.embed_tokens"
    for threads in (1, 4):
        out = tmp_path / f"set{threads}"
        split(source, out, boundaries=["decoder.embed_tokens"], threads=threads)
        assert verify(out, level="full", against=source).ok


def test_without_the_sha256_of_the_source(source: Path, tmp_path: Path) -> None:
    """Nothing but the digests is missing; what is known to be published is recorded as that."""
    split(source, tmp_path / "with", 2)
    result = split(source, tmp_path / "without", 2, source_sha256=False)
    assert [(shard.sha256, shard.sha256_is_published) for shard in result.manifest.shards] == [(None, False)] * 2
    with_digests, without = tree(tmp_path / "with"), tree(tmp_path / "without")
    changed = {name for name in with_digests if with_digests[name] != without[name]}
    assert changed == {"partition_set.json"}
    assert verify(tmp_path / "without", level="full", against=source).ok
    merge(tmp_path / "without", tmp_path / "back")
    assert all((source / name).read_bytes() == data for name, data in tree(tmp_path / "back").items())


def test_a_published_sha256_is_recorded_as_published(tmp_path: Path) -> None:
    """A snapshot of the Hub's cache says what the Hub has; nothing is hashed, and merge can compare all the same."""
    made = write_checkpoint(tmp_path / "made", [llama_weights(1)])
    data = (made / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "r", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / digest).write_bytes(data)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    for known, published in ((False, True), (True, False)):
        (shard,) = split(snapshot, tmp_path / f"set{known}", 1, source_sha256=known).manifest.shards
        assert (shard.sha256, shard.sha256_is_published) == (f"sha256:{digest}", published)
        merge(tmp_path / f"set{known}", tmp_path / f"back{known}")


def test_a_finished_set_without_the_sha256_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    """Resume does not say that all is done where the digests are missing; the other way round they do no harm."""
    split(source, tmp_path, 2, source_sha256=False)
    assert split(source, tmp_path, 2, source_sha256=False, existing="resume").already_finished
    with pytest.raises(OutputExistsError, match=r"without the SHA-256 of its source.*--force"):
        split(source, tmp_path, 2, existing="resume")
    split(source, tmp_path, 2, existing="force")
    assert split(source, tmp_path, 2, source_sha256=False, existing="resume").already_finished


def test_split_for_nodes(source: Path, tmp_path: Path) -> None:
    """Partition k is what the k-th node gets; whoever names nodes and a number of partitions is asked which."""
    text = "".join(f'[[node]]\nname = "{name}"\nmemory = {memory}\n' for name, memory in (("a", MIB), ("b", MIB)))
    nodes = NodeRequest(nodes=parse_nodes(text, "nodes.toml"))
    result = split(source, tmp_path / "out", nodes=nodes)
    assert [part.node for part in result.plan.partitions] == ["a", "b"]
    assert result.plan.digest == plan(source, nodes=nodes).digest
    with pytest.raises(PlanError, match=r"--nodes and --num-parts \(num_parts\) both say how to cut"):
        split(source, tmp_path / "other", 2, nodes=nodes)


def test_single_partitions_must_be_of_one_codec_and_of_the_same_weights(source: Path, tmp_path: Path) -> None:
    """A fine-tune has the same headers; what is there already is held to a chunk of each layer."""
    split(source, tmp_path / "out", 2, only=[0])
    before = tree(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="another codec"):
        split(source, tmp_path / "out", 2, only=[1], codec="raw")
    weights = llama_weights(3)
    files = {"config.json": CAUSAL_CONFIG, "code/modeling.py": b"pass"}
    tuned = write_checkpoint(tmp_path / "tuned" / source.name, [weights[:4], weights[4:]], files=files, seed=5)
    with pytest.raises(OutputExistsError, match="other weights"):
        split(tuned, tmp_path / "out", 2, only=[1])
    assert tree(tmp_path / "out") == before
    result = split(source, tmp_path / "out", 2, only=[1])
    split(source, tmp_path / "whole", 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert result.manifest is not None


def test_there_is_no_such_partition(source: Path, tmp_path: Path) -> None:
    for only in ([2], [-1], []):
        with pytest.raises(RequestError):
            split(source, tmp_path / "out", 2, only=only)
    assert not (tmp_path / "out").exists()


def test_single_partitions_are_no_set_and_say_so(source: Path, tmp_path: Path) -> None:
    """Whoever takes the directory for a set is told what to name instead."""
    split(source, tmp_path / "out", 2, only=[1])
    with pytest.raises(FormatError, match=r"name one of them: .*partition_1\.json"):
        merge(tmp_path / "out", tmp_path / "merged")
    assert verify(tmp_path / "out" / "partition_1.json").ok
