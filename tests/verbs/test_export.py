"""`export` writes what other programs load, the same bytes from a set and from its source, and harms nothing there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, open_descriptors, tree, write_checkpoint
from children import at_bytes, die_at_change, in_child
from safetensors import safe_open
from safetensors.numpy import load_file

from mmsplit.checkpoint import open_checkpoint
from mmsplit.dtypes import DTYPES
from mmsplit.errors import (
    FormatError,
    IntegrityError,
    MissingPartitionError,
    NoSpaceError,
    OutputExistsError,
    PlanError,
    RequestError,
    SourceChangedError,
)
from mmsplit.exporting.export_record import RECORD_NAME
from mmsplit.exporting.parameters_reader import load_partition_json
from mmsplit.sidecar import output_directory
from mmsplit.verbs.export import export
from mmsplit.verbs.load import open_partition
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split

INDEX = "model.safetensors.index.json"
BIG = "model.layers.1.mlp.big.weight"
SMALL = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc"}
TIED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with an index, a tied head, odd offsets, mixed widths, empty and scalar tensors, many chunks."""
    weights = [
        *llama_weights(3),
        Weight(BIG, "BF16", (5 * MIB // 2,), 40),
        Weight("model.layers.0.mask", "BOOL", (3,)),
        Weight("model.layers.0.mlp.scale", "F64", ()),
        Weight("model.layers.2.empty", "F32", (3, 0, 2)),
        Weight("model.layers.2.counts", "I64", (2, 2), 0),
    ]
    shards = [weights[k::3] for k in range(3)]
    root = tmp_path_factory.mktemp("model") / "model"
    return write_checkpoint(root, shards, index=True, files=SMALL, pad=3)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set of three, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 3)
    return out


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied checkpoint of numbers that JSON can hold: wide, narrow, NaN, both zeros, none, one, several chunks."""
    rng = np.random.default_rng(0)
    wide = rng.integers(-40, 30, 1000)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        TIED: rng.standard_normal((64, 32)).astype(ml_dtypes.bfloat16),
        "model.layers.0.mlp.weight": (rng.standard_normal((70, 1000)) * 10.0**wide).astype(np.float32),
        "model.layers.0.mask": rng.integers(0, 2, 3).astype(bool),
        "model.layers.1.mlp.weight": rng.standard_normal(5 * MIB // 2).astype(ml_dtypes.bfloat16),
        "model.layers.1.half": np.array([np.nan, -0.0, 0.0, 6e-8, 65504], np.float16),
        "model.layers.1.empty": np.zeros((3, 0, 2), np.float32),
        "model.layers.2.scale": np.array(0.1, np.float64),
        "model.layers.2.fp8": np.arange(100, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "model.norm.weight": np.ones(5, np.float32),
    }
    root = tmp_path_factory.mktemp("numbers") / "model"
    root.mkdir()
    (root / "config.json").write_bytes(CAUSAL_CONFIG)
    header, position = {}, 0
    for name, array in arrays.items():
        dtype = next(known for known, entry in DTYPES.items() if entry.numpy_name == str(array.dtype))
        stop = position + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    (root / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return root


@pytest.fixture(scope="module")
def made_of_numbers(numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its set of three, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "numbers"
    split(numbers, out, 3)
    return out


def weights_of(root: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor below a directory, by the safetensors library where it can."""
    found = {}
    checkpoint = open_checkpoint(root)
    for name, tensor in checkpoint.tensors.items():
        data = (root / tensor.shard).read_bytes()[tensor.start_offset : tensor.stop_offset]
        found[name] = (tensor.dtype, tensor.shape, data)
    for shard in checkpoint.shards:
        with safe_open(root / shard.name, "np") as opened:  # which validates the header, and aligns nothing itself
            assert set(opened.keys()) == {t.name for t in checkpoint.tensors.values() if t.shard == shard.name}
    return found


def files_of(root: Path) -> dict[str, bytes]:
    """All files but the record of how they came there."""
    return {name: data for name, data in tree(root).items() if name != RECORD_NAME}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**6, 5000])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_whole_model_comes_out_as_it_went_in(
    made: Path, source: Path, tmp_path: Path, max_shard_bytes: int, threads: int
) -> None:
    """From a set and straight from the source: the same bytes, every tensor equal, tied weights once."""
    result = export(made, tmp_path / "a", max_shard_bytes=max_shard_bytes, threads=threads)
    export(source, tmp_path / "b", max_shard_bytes=max_shard_bytes, threads=threads)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(source)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in SMALL} == SMALL
    assert result.part_ids == (0, 1, 2)
    assert result.total_params == open_checkpoint(source).total_params
    names = [file.name for file in result.files if file.name.endswith(".safetensors")]
    assert (names == ["model.safetensors"]) == (max_shard_bytes == 10**9)
    assert (tmp_path / "a" / INDEX).exists() == (len(names) > 1)
    for file in result.files:
        assert file.size_bytes == (tmp_path / "a" / file.name).stat().st_size


def test_the_index_is_what_loaders_expect(made: Path, source: Path, tmp_path: Path) -> None:
    """total_size counts tensors, weight_map has every tensor with the file that has it."""
    export(made, tmp_path, max_shard_bytes=5000)
    index = json.loads((tmp_path / INDEX).read_text())
    checkpoint = open_checkpoint(source)
    assert index["metadata"]["total_size"] == checkpoint.total_bytes
    assert index["weight_map"].keys() == checkpoint.tensors.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "np") as opened:
            assert name in set(opened.keys())
            assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize("part_id", [0, 1, 2])
def test_one_partition_has_its_own_tensors(made: Path, source: Path, tmp_path: Path, part_id: int) -> None:
    """From the set, from the partition itself and straight from the source: the same bytes; a copy keeps its name."""
    export(made, tmp_path / "a", part_ids=[part_id])
    export(source, tmp_path / "b", 3, part_ids=[part_id])
    export(made / f"partition_{part_id}.json", tmp_path / "c")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")
    everything = weights_of(source)
    with open_partition(made / f"partition_{part_id}.bin") as partition:
        assert weights_of(tmp_path / "a") == {name: everything[name] for name in partition}
        metadata = {alias: TIED for alias in ("lm_head.weight",) if part_id == 2}
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", **metadata}


def test_two_partitions_in_one_export(made: Path, source: Path, tmp_path: Path) -> None:
    """The union of what they store; the original of a tied weight rather than the copy."""
    export(made, tmp_path / "a", part_ids=[2, 0, 0])
    export(source, tmp_path / "b", 3, part_ids=[0, 2])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with open_partition(made / "partition_0.json") as first, open_partition(made / "partition_2.json") as last:
        assert load_names(tmp_path / "a") == {*first, *last}


def load_names(root: Path) -> set[str]:
    """Names of the tensors in `model.safetensors`."""
    with safe_open(root / "model.safetensors", "np") as opened:
        return set(opened.keys())


def test_what_was_exported_can_be_split_again(made: Path, source: Path, tmp_path: Path) -> None:
    """An export is a checkpoint: split and merged it gives the same tensors; its record does not travel along."""
    export(made, tmp_path / "out", max_shard_bytes=10**6)
    split(tmp_path / "out", tmp_path / "set", 2)
    merge(tmp_path / "set", tmp_path / "back")
    assert weights_of(tmp_path / "back") == weights_of(source)
    assert files_of(tmp_path / "out") == tree(tmp_path / "back")


def test_a_node_that_has_only_its_own_partition(made: Path, tmp_path: Path) -> None:
    """Without a set manifest the files beside the partition are the model's, and that is said."""
    node = tmp_path / "node"
    node.mkdir()
    for name in ("partition_1.json", "partition_1.bin", "config.json"):
        shutil.copyfile(made / name, node / name)
    with pytest.raises(FormatError, match=r"partition_set\.json is missing"):
        export(node, tmp_path / "a")
    result = export(node, tmp_path / "a", part_ids=[1])
    export(node / "partition_1.json", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a").keys() == {"model.safetensors", "config.json"}
    assert "taken for those of the model" in result.notes[0]
    with pytest.raises(MissingPartitionError, match="partition 0 is not here"):
        export(node, tmp_path / "c", part_ids=[0])
    assert not (tmp_path / "c").exists()


def test_a_weight_that_another_partition_has(source: Path, tmp_path: Path) -> None:
    """With --tied reference the last partition lacks its head, and the note says so."""
    split(source, tmp_path / "set", 3, tied="reference")
    result = export(tmp_path / "set", tmp_path / "a", part_ids=[2])
    assert any(f"lm_head.weight is {TIED} of a partition that is not exported" in note for note in result.notes)
    assert TIED not in load_names(tmp_path / "a")
    assert not any("not exported" in note for note in export(tmp_path / "set", tmp_path / "b").notes)
    assert weights_of(tmp_path / "b") == weights_of(source)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such partition": ({"part_ids": [3]}, RequestError, "no partition 3"),
    "none asked for": ({"part_ids": []}, RequestError, "no partition is asked for"),
    "a plan for a set": ({"num_parts": 2}, RequestError, "partitions already.*mmsplit repartition"),
    "no such form": ({"to": "gguf"}, RequestError, "no such form"),
    "no such way": ({"existing": "overwrite"}, RequestError, "no such way"),
    "no such size": ({"max_shard_bytes": 0}, RequestError, "no such size"),
    "no threads": ({"threads": 0}, RequestError, "threads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_requests_that_make_no_sense(made: Path, tmp_path: Path, what: str) -> None:
    """Each is refused before anything is written."""
    arguments, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        export(made, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_checkpoint_needs_a_plan_for_its_partitions(source: Path, tmp_path: Path) -> None:
    """`--part` alone does not say how many there are."""
    with pytest.raises(PlanError):
        export(source, tmp_path / "out", part_ids=[0])
    with pytest.raises(RequestError, match="no partition 2"):
        export(source, tmp_path / "out", 2, part_ids=[2])


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path: Path) -> None:
    """Opaque weights cannot go out; the error has tensor and dtype."""
    source = write_checkpoint(tmp_path / "model", [[Weight("model.layers.0.w", "U8", (32,))]])
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"Q4"'))
    split(source, tmp_path / "set", 1, allow_unknown_dtypes=True)
    for to in ("safetensors", "json"):
        with pytest.raises(RequestError) as raised:
            export(tmp_path / "set", tmp_path / "out", to=to)  # type: ignore[arg-type]
        assert (raised.value.tensor, raised.value.found) == ("model.layers.0.w", "Q4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["set", "source"])
def test_the_source_is_only_read(made: Path, source: Path, kind: str) -> None:
    """Its own directory is no output, however it is spelled."""
    root = made if kind == "set" else source
    before = tree(root)
    with pytest.raises(RequestError, match="directory of the source"):
        export(root, root / ".." / root.name)
    assert tree(root) == before


def test_a_missing_partition_is_named(made: Path, tmp_path: Path) -> None:
    """Of those that are asked for; the others need not be there."""
    some = Path(shutil.copytree(made, tmp_path / "some"))
    (some / "partition_1.bin").unlink()
    with pytest.raises(MissingPartitionError, match="partition 1 is not here"):
        export(some, tmp_path / "out")
    export(some, tmp_path / "out", part_ids=[0, 2])


@pytest.mark.parametrize("to", ["safetensors", "json"])
def test_a_damaged_chunk_is_named(made_of_numbers: Path, tmp_path: Path, to: Any) -> None:
    """The file does not get its name, the index is not written, no descriptor is left; what is whole is kept."""
    damaged = Path(shutil.copytree(made_of_numbers, tmp_path / "damaged"))
    with open_partition(damaged / "partition_1.json") as partition:
        last = "model.layers.1.mlp.weight"
        entry = partition.entry(last)
        record = partition._files.index[entry.first_chunk + entry.chunk_count - 1]
        place = int(record["stored_offset"]) + int(record["stored_bytes"]) // 2
    flip(damaged / "partition_1.bin", place)
    before = open_descriptors()
    with pytest.raises(IntegrityError) as raised:
        export(damaged, tmp_path / "out", to=to, max_shard_bytes=10**6)
    assert raised.value.path == str(damaged / "partition_1.bin")
    assert raised.value.tensor == last
    assert open_descriptors() == before
    assert INDEX not in os.listdir(tmp_path / "out")
    assert not json.loads((tmp_path / "out" / RECORD_NAME).read_text())["complete"]
    if to == "json":
        assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".partial")]
    shutil.copyfile(made_of_numbers / "partition_1.bin", damaged / "partition_1.bin")
    export(damaged, tmp_path / "out", to=to, max_shard_bytes=10**6, existing="resume")
    export(made_of_numbers, tmp_path / "other", to=to, max_shard_bytes=10**6)
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_a_damaged_small_file_is_not_passed_on(made: Path, tmp_path: Path) -> None:
    """It is compared with the set manifest before anything is written."""
    damaged = Path(shutil.copytree(made, tmp_path / "damaged"))
    flip(damaged / "config.json", 1)
    with pytest.raises(IntegrityError, match="not as it was written"):
        export(damaged, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_space_is_checked_first(made_of_numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written where it would not fit."""
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: 1000)
    for to in ("safetensors", "json"):
        with pytest.raises(NoSpaceError, match="too little free space for the export"):
            export(made_of_numbers, tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert not [name for name in tree(tmp_path / "out") if not name.startswith(".")]


IN_THE_WAY = {
    "a weight file of the same name": "model.safetensors",
    "weights that a loader would take along": "model-00001-of-00002.safetensors",
    "an index that a loader would follow": INDEX,
    "another config": "config.json",
    "something that is no record": RECORD_NAME,
}


@pytest.mark.parametrize("existing", ["refuse", "resume", "force"])
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_files_that_no_export_wrote(made: Path, tmp_path: Path, what: str, existing: Any) -> None:
    """They are refused, whatever is asked for, and stay as they are."""
    name = IN_THE_WAY[what]
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(OutputExistsError, match=name):
        export(made, tmp_path, existing=existing)
    assert {key: data for key, data in tree(tmp_path).items() if not key.startswith(".")} == {name: b"{}"}


def test_files_that_are_none_of_ours_stay(made: Path, tmp_path: Path) -> None:
    """What no loader takes for a model does not matter; a small file that is the same neither."""
    (tmp_path / "notes.txt").write_bytes(b"mine")
    (tmp_path / "config.json").write_bytes(CAUSAL_CONFIG)
    export(made, tmp_path)
    export(made, tmp_path, existing="force")
    assert (tmp_path / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("to", ["safetensors", "json"])
def test_resume_keeps_what_is_right(made_of_numbers: Path, tmp_path: Path, to: Any) -> None:
    """Files that are whole are not written again; without resume they are in the way."""
    made = made_of_numbers
    first = export(made, tmp_path, to=to, max_shard_bytes=10**5)
    complete = tree(tmp_path)
    weights = [file.name for file in first.files if file.name.startswith(("model-", "parameters"))]
    assert len(weights) > 2
    (tmp_path / weights[1]).unlink()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in weights if name != weights[1]}
    with pytest.raises(OutputExistsError, match=r"finished export of the same.*--resume"):
        export(made, tmp_path, to=to, max_shard_bytes=10**5)
    result = export(made, tmp_path, to=to, max_shard_bytes=10**5, existing="resume")
    assert result.kept == tuple(times)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    assert tree(tmp_path) == complete
    assert export(made, tmp_path, to=to, max_shard_bytes=10**5, existing="resume").kept == tuple(weights)


OTHERS: dict[str, dict[str, Any]] = {
    "part ids": {"part_ids": [0]},
    "to": {"to": "json"},
    "layout": {"max_shard_bytes": 10**6},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_export_is_replaced_only_by_force(made_of_numbers: Path, tmp_path: Path, what: str) -> None:
    """What differs is said; with force nothing of the earlier one is left."""
    made = made_of_numbers
    export(made, tmp_path / "out")
    for existing in ("refuse", "resume"):
        with pytest.raises(OutputExistsError, match=f"finished export of another .*{what}"):
            export(made, tmp_path / "out", existing=existing, **OTHERS[what])  # type: ignore[arg-type]
    export(made, tmp_path / "out", existing="force", **OTHERS[what])
    export(made, tmp_path / "fresh", **OTHERS[what])
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_source_that_changed_is_another_one(source: Path, tmp_path: Path) -> None:
    """What was read from the old shards does not go together with the new ones."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    export(model, tmp_path / "out", max_shard_bytes=10**6)
    shard = next(iter(sorted(model.glob("*.safetensors"))))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(OutputExistsError, match="of another source"):
        export(model, tmp_path / "out", max_shard_bytes=10**6, existing="resume")


def test_a_file_that_was_changed_is_refused(made: Path, tmp_path: Path) -> None:
    """Resume takes nothing for granted: neither weights nor small files that are not what was written."""
    export(made, tmp_path)
    flip(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(OutputExistsError, match="not what the earlier export wrote"):
        export(made, tmp_path, existing="resume")
    export(made, tmp_path, existing="force")
    (tmp_path / "config.json").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"config\.json"):
        export(made, tmp_path, existing="force")
    assert (tmp_path / "config.json").read_bytes() == b"mine"


BROKEN_RECORDS = {
    "not JSON": b"{",
    "another format": b'{"format": "x", "format_version": 1}',
    "another version": b'{"format": "mmsplit-export", "format_version": 2, "complete": true, "files": []}',
    "a path that leads out": b'{"format": "mmsplit-export", "format_version": 1, "complete": true,'
    b' "files": [{"name": "../victim", "bytes": 1, "sha256": null}], "small_files": []}',
    "a small file that leads out": b'{"format": "mmsplit-export", "format_version": 1, "complete": true, "files": [],'
    b' "small_files": [{"name": "a/../../victim", "bytes": 1, "sha256": null}]}',
    "a key twice": b'{"format": "mmsplit-export", "format": "mmsplit-export"}',
}


@pytest.mark.parametrize("what", BROKEN_RECORDS)
def test_a_record_that_cannot_be_trusted(made: Path, tmp_path: Path, what: str) -> None:
    """Nothing is removed on the word of a record that is not sound."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim").write_bytes(b"1")
    (out / RECORD_NAME).write_bytes(BROKEN_RECORDS[what])
    with pytest.raises(OutputExistsError, match="record of an export that cannot be read"):
        export(made, out, existing="force")
    assert (tmp_path / "victim").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("to", ["safetensors", "json"])
def test_killed_at_any_change_of_the_disk(made_of_numbers: Path, tmp_path: Path, to: Any) -> None:
    """Wherever it dies, no file has its name before it is whole, and a second run completes the export."""
    made = made_of_numbers
    arguments: dict[str, Any] = {"to": to, "max_shard_bytes": 10**5, "threads": 1, "part_ids": [0, 2]}
    export(made, tmp_path / "whole", **arguments)
    whole = tree(tmp_path / "whole")
    names = whole.keys() - {RECORD_NAME}
    for number in range(0, 1000, 3):
        out = tmp_path / str(number)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            export(made, out, **arguments)

        if in_child(body).signal == 0:
            break
        there = tree(out) if out.exists() else {}
        assert {name: there[name] for name in there if name in names} == {
            name: whole[name] for name in there if name in names
        }
        assert INDEX not in there or names <= there.keys()
        export(made, out, existing="resume", **arguments)
        assert tree(out) == whole, number
    assert number > 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_while_it_replaces_another(made: Path, source: Path, tmp_path: Path) -> None:
    """Killed at any step, it can be forced again; no index ever stands beside files that are not its own."""
    for number in range(0, 1000, 4):
        out = tmp_path / str(number)
        export(made, out, max_shard_bytes=10**6)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            export(source, out, max_shard_bytes=5000, existing="force", threads=1)

        ended = in_child(body).signal == 0
        if (out / INDEX).exists():
            assert weights_of(out) == weights_of(source)
        export(source, out, max_shard_bytes=5000, existing="force")
        assert weights_of(out) == weights_of(source)
        assert not [name for name in os.listdir(out) if name.endswith(".partial")]
        if ended:
            break
        shutil.rmtree(out)
    assert number > 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_force_leaves_no_part_of_an_unfinished_file(source: Path, tmp_path: Path) -> None:
    """Also where the new export has no file of that name."""
    killing = at_bytes("export", 4_000_000)
    ending = in_child(lambda: export(source, tmp_path, max_shard_bytes=10**6, threads=1, progress=killing))
    assert ending.signal == 9
    assert [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    export(source, tmp_path, max_shard_bytes=5000, existing="force")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert weights_of(tmp_path) == weights_of(source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_after_some_bytes(source: Path, tmp_path: Path) -> None:
    """Files that were whole when it died are kept."""
    total = open_checkpoint(source).total_bytes
    arguments: dict[str, Any] = {"max_shard_bytes": 10**5, "threads": 1}
    ending = in_child(lambda: export(source, tmp_path, progress=at_bytes("export", total - 1000), **arguments))
    assert ending.signal == 9
    result = export(source, tmp_path, existing="resume", **arguments)
    assert result.kept
    assert weights_of(tmp_path) == weights_of(source)


@pytest.mark.parametrize("to", ["safetensors", "json"])
def test_progress_ends_where_it_should(made_of_numbers: Path, tmp_path: Path, to: Any) -> None:
    """Every byte that streams through is counted once."""
    reports: list[Any] = []
    result = export(made_of_numbers, tmp_path, to=to, threads=1, progress=reports.append)
    assert {report.done_bytes for report in reports[-1:]} == {report.total_bytes for report in reports}
    if to == "safetensors":
        assert reports[-1].done_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert result.moved_bytes is None


def test_a_file_that_shrinks_meanwhile(source: Path, tmp_path: Path) -> None:
    """A source that changes while it is read is an error, and the export stays unfinished."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def shrink(_: object) -> None:
        os.truncate(shard, 100)

    with pytest.raises(SourceChangedError):
        export(model, tmp_path / "out", progress=shrink, threads=1, io="pread", max_shard_bytes=10**5)
    assert not json.loads((tmp_path / "out" / RECORD_NAME).read_text())["complete"]


def test_a_file_that_is_touched_meanwhile(source: Path, tmp_path: Path) -> None:
    """Where all bytes could be read, but not of the file that was planned: no index, and it is not complete."""
    model = Path(shutil.copytree(source, tmp_path / "model"))
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def touch(progress: Any) -> None:
        if progress.done_bytes == progress.total_bytes:
            os.utime(shard, ns=(1, 1))

    with pytest.raises(SourceChangedError):
        export(model, tmp_path / "out", progress=touch, threads=1, max_shard_bytes=10**5)
    assert INDEX not in os.listdir(tmp_path / "out")
    assert not json.loads((tmp_path / "out" / RECORD_NAME).read_text())["complete"]


def test_small_files_of_another_model_go(source: Path, tmp_path: Path) -> None:
    """With force, those that the earlier export wrote; one that somebody changed stays."""
    first = Path(shutil.copytree(source, tmp_path / "first"))
    (first / "tokenizer.json").write_bytes(b"{}")
    (first / "merges.txt").write_bytes(b"a b")
    export(first, tmp_path / "out")
    (tmp_path / "out" / "merges.txt").write_bytes(b"changed")
    export(source, tmp_path / "out", existing="force")
    there = files_of(tmp_path / "out")
    assert "tokenizer.json" not in there
    assert there["merges.txt"] == b"changed"


def test_json_has_every_number(made_of_numbers: Path, numbers: Path, tmp_path: Path) -> None:
    """Partition by partition: what numpy says of the tensors, and the same bytes straight from the source."""
    made, source = made_of_numbers, numbers
    estimates: list[int] = []
    result = export(made, tmp_path / "a", to="json", on_estimate=estimates.append)
    export(source, tmp_path / "b", 3, to="json")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert [file.name for file in result.files] == [f"parameters_of_partition_{k}.json" for k in range(3)]
    assert estimates[0] == pytest.approx(result.total_bytes, rel=0.2)
    for part_id in range(3):
        path = tmp_path / "a" / f"parameters_of_partition_{part_id}.json"
        found = load_partition_json(path)
        plain = json.loads(path.read_text())
        assert plain.keys() == {"part_id", "layers", "total_params"}
        assert all(layer.keys() == {"name", "layer_type", "shape", "parameters"} for layer in plain["layers"])
        with open_partition(made / f"partition_{part_id}.json") as partition:
            same = partition.exported()
            assert (found.part_id, found.total_params) == (part_id, partition.total_params)
            assert [layer.name for layer in found.layers] == list(partition)
            for layer, twin, written in zip(found.layers, same.layers, plain["layers"], strict=True):
                assert layer[:3] == twin[:3]
                expected = partition[layer.name].astype(np.float32).reshape(-1)
                assert layer.shape == partition[layer.name].shape
                for found_numbers in (layer.parameters, twin.parameters):
                    assert np.array_equal(found_numbers, expected, equal_nan=True)
                    signs = np.signbit(found_numbers) == np.signbit(expected)
                    assert (signs | np.isnan(expected)).all()
                assert len(written["parameters"]) == expected.size


def test_a_root_digest_is_that_of_a_set(source: Path, tmp_path: Path) -> None:
    """A checkpoint has none; a partition on its own, without the set manifest, is bound by nothing."""
    made = split(source, tmp_path / "set", 2)
    assert made.root_digest is not None
    with pytest.raises(RequestError, match="partition set"):
        export(source, tmp_path / "out", root_digest=made.root_digest)
    with pytest.raises(IntegrityError, match="root digest"):
        export(tmp_path / "set", tmp_path / "out", root_digest=f"sha256:{'0' * 64}")
    (tmp_path / "set" / "partition_set.json").unlink()
    for path, part_ids in (("set/partition_1.json", None), ("set", [1])):
        with pytest.raises(FormatError, match="nothing here ties"):
            export(tmp_path / path, tmp_path / "out", part_ids=part_ids, root_digest=made.root_digest)
    assert not (tmp_path / "out").exists()


def test_json_says_what_it_rounds(tmp_path: Path) -> None:
    """Numbers that float32 does not have are a note that names the tensor."""
    source = write_checkpoint(tmp_path / "model", [[Weight("model.layers.0.w", "I64", (9,), 256)]])
    result = export(source, tmp_path / "out", to="json")
    assert any("rounded: model.layers.0.w" in note for note in result.notes)
    exact = write_checkpoint(tmp_path / "exact", [[Weight("model.layers.0.w", "U8", (9,), 256)]])
    assert not any("rounded" in note for note in export(exact, tmp_path / "out2", to="json").notes)


def test_json_that_would_be_too_large(made_of_numbers: Path, tmp_path: Path) -> None:
    """It is refused before the first byte, unless there is no limit; how large is said first."""
    estimates: list[int] = []
    with pytest.raises(RequestError, match=r"too large.*--yes"):
        export(made_of_numbers, tmp_path / "out", to="json", max_bytes=100_000, on_estimate=estimates.append)
    assert estimates[0] > 100_000
    assert not (tmp_path / "out").exists()
    export(made_of_numbers, tmp_path / "out", to="json", max_bytes=None)


def test_json_of_infinity_is_refused(tmp_path: Path) -> None:
    """The tensor is named, and half a file does not stay."""
    from safetensors.numpy import save_file

    (tmp_path / "model").mkdir()
    mask = np.zeros(100_000, np.float32)
    mask[-1] = -np.inf
    save_file({"model.layers.0.mask": mask}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(RequestError, match="infinite") as raised:
        export(tmp_path / "model", tmp_path / "out", to="json")
    assert raised.value.tensor == "model.layers.0.mask"
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("parameters")]


def test_nothing_to_store(tmp_path: Path) -> None:
    """A checkpoint of empty tensors has files, too, in either form."""
    weights = [Weight("model.layers.0.w", "F32", (0,)), Weight("model.layers.1.w", "U8", (3, 0, 2))]
    source = write_checkpoint(tmp_path / "model", [weights])
    export(source, tmp_path / "a")
    assert {name: array.shape for name, array in load_file(tmp_path / "a" / "model.safetensors").items()} == {
        "model.layers.0.w": (0,),
        "model.layers.1.w": (3, 0, 2),
    }
    export(source, tmp_path / "b", to="json")
    found = load_partition_json(tmp_path / "b" / "parameters_of_partition_0.json")
    assert [(layer.shape, len(layer.parameters)) for layer in found.layers] == [((0,), 0), ((3, 0, 2), 0)]
