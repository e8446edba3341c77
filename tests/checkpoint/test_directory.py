"""Which files of a directory are the checkpoint."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mmsplit.checkpoint import directory
from mmsplit.checkpoint.directory import find_checkpoint_files
from mmsplit.errors import CheckpointError, MissingShardError


def fill(root: Path, names: list[str], index: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Empty files with these names, and weights indexes: name -> weight map."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name, weight_map in (index or {}).items():
        (root / name).write_text(json.dumps({"weight_map": weight_map}))


def numbered(family: str, count: int, width: int = 5) -> list[str]:
    return [f"{family}-{number:0{width}d}-of-{count:0{width}d}.safetensors" for number in range(1, count + 1)]


def over(shards: list[str]) -> dict[str, str]:
    """A weight map with one tensor in each shard."""
    return {f"t{i}": shard for i, shard in enumerate(shards)}


MODEL = numbered("model", 2)
INDEX = "model.safetensors.index.json"

#: files, indexes -> shards chosen, index chosen, words of each note
CHOICES = {
    "one file": (["model.safetensors"], {}, ["model.safetensors"], None, []),
    "index": (MODEL, {INDEX: over(MODEL)}, MODEL, INDEX, []),
    "numbers without index": (MODEL, {}, MODEL, None, []),
    "six digits": (numbered("model", 2, 6), {}, numbered("model", 2, 6), None, []),
    "diffusers": (["diffusion_pytorch_model.safetensors"], {}, ["diffusion_pytorch_model.safetensors"], None, []),
    "adapter": (["adapter_model.safetensors"], {}, ["adapter_model.safetensors"], None, []),
    "adapter beside a model": (
        ["adapter_model.safetensors", "model.safetensors"],
        {},
        ["model.safetensors"],
        None,
        ["1 weight file"],
    ),
    "consolidated": (["consolidated.safetensors"], {}, ["consolidated.safetensors"], None, []),
    "consolidated in pieces": (
        ["consolidated.00.safetensors", "consolidated.01.safetensors"],
        {},
        ["consolidated.00.safetensors", "consolidated.01.safetensors"],
        None,
        [],
    ),
    "consolidated beside shards": (
        ["consolidated.safetensors", *MODEL],
        {INDEX: over(MODEL)},
        MODEL,
        INDEX,
        ["1 weight file(s) beside 'model' are not part of this checkpoint: consolidated.safetensors"],
    ),
    "half precision beside full": (
        ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
        {},
        ["diffusion_pytorch_model.safetensors"],
        None,
        ["1 weight file"],
    ),
    "plain directory of shards": (["b.safetensors", "a.safetensors"], {}, ["a.safetensors", "b.safetensors"], None, []),
    "own name with index": (
        [*numbered("mine", 2), "other.safetensors"],
        {"mine.safetensors.index.json": over(numbered("mine", 2))},
        numbered("mine", 2),
        "mine.safetensors.index.json",
        ["1 weight file"],
    ),
    "own name with two indexes": (
        ["a.safetensors", "b.safetensors"],
        {f"{name}.safetensors.index.json": {"t": f"{name}.safetensors"} for name in "ab"},
        ["a.safetensors", "b.safetensors"],
        None,
        [],
    ),
    "stale index beside one file": (
        ["model.safetensors"],
        {INDEX: over(MODEL)},
        ["model.safetensors"],
        None,
        ["names other shards than model.safetensors"],
    ),
    "index of one file": (["model.safetensors"], {INDEX: {"t": "model.safetensors"}}, ["model.safetensors"], INDEX, []),
    "shard that the index does not name": (
        [*MODEL, "model.safetensors"],
        {INDEX: over(MODEL)},
        MODEL,
        INDEX,
        ["1 file(s) named like shards are not in"],
    ),
    "index with names of its own": (
        ["x.safetensors", "y.safetensors"],
        {INDEX: over(["x.safetensors", "y.safetensors"])},
        ["x.safetensors", "y.safetensors"],
        INDEX,
        [],
    ),
    "PyTorch beside safetensors": (
        ["model.safetensors", "pytorch_model.bin"],
        {},
        ["model.safetensors"],
        None,
        ["1 weight file(s) of other formats are not part of this checkpoint: pytorch_model.bin"],
    ),
    "PyTorch shards with their index": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin", "m.gguf"],
        {
            "pytorch_model.bin.index.json": over(
                ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
            )
        },
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "pytorch_model.bin.index.json",
        ["2 weight file(s) of other formats are not part of this checkpoint: m.gguf, training_args.bin"],
    ),
    "parts of a tensor-parallel model": (
        ["consolidated.00.pth", "consolidated.01.pth", "other.pth"],
        {},
        ["consolidated.00.pth", "consolidated.01.pth"],
        None,
        ["1 weight file(s) beside 'consolidated'"],
    ),
    "GGUF beside its projector": (
        ["m-Q4_0.gguf", "mmproj-m.gguf"],
        {},
        ["m-Q4_0.gguf"],
        None,
        ["1 weight file(s) beside 'm-Q4_0'"],
    ),
    "GGUF in parts": (
        ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        {},
        ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        None,
        [],
    ),
    "hidden shard": ([".model.safetensors", "model.safetensors"], {}, ["model.safetensors"], None, []),
    "shards in a subfolder": (
        ["model.safetensors", "2_Dense/model.safetensors"],
        {},
        ["model.safetensors"],
        None,
        ["1 weight file(s) in subfolders are not part of this checkpoint: 2_Dense/model.safetensors"],
    ),
}


@pytest.mark.parametrize(("names", "indexes", "shards", "index", "notes"), CHOICES.values(), ids=CHOICES)
def test_choice(
    tmp_path: Path,
    names: list[str],
    indexes: dict[str, dict[str, str]],
    shards: list[str],
    index: str | None,
    notes: list[str],
) -> None:
    """Shards in name order, the index that counts, and a note on what was left aside."""
    fill(tmp_path, names, indexes)
    found = find_checkpoint_files(tmp_path)
    assert list(found.shards) == shards
    assert found.index_name == index
    assert len(found.notes) == len(notes)
    for note, words in zip(found.notes, notes, strict=True):
        assert words in note
    if index is not None:
        assert found.index_bytes == (tmp_path / index).read_bytes()
        assert found.weight_map == indexes[index]


REFUSED = {
    "empty": ([], {}, CheckpointError, "no .safetensors, .bin or .gguf file"),
    "other frameworks": (["tf_model.h5", "x.onnx"], {}, CheckpointError, "weights of other formats: .h5, .onnx"),
    "only what trainers write": (["training_args.bin", "optimizer.pt"], {}, CheckpointError, "no .safetensors, .bin"),
    "several GGUF models": (["m-Q4_0.gguf", "m-Q8_0.gguf"], {}, CheckpointError, "2 models are in this directory"),
    "part of a GGUF missing": (["m-00001-of-00002.gguf"], {}, MissingShardError, "m-00002-of-00002.gguf"),
    "part of a .bin missing": (
        ["pytorch_model-00002-of-00002.bin"],
        {},
        MissingShardError,
        "pytorch_model-00001-of-00002.bin",
    ),
    "index of .bin names safetensors": (
        ["model.safetensors.x", "pytorch_model.bin"],
        {"pytorch_model.bin.index.json": {"t": "pytorch_model.safetensors"}},
        CheckpointError,
        "not a .bin or .pt or .pth or .ckpt file",
    ),
    "partitions": (["partition_0.bin", "partition_0.json"], {}, CheckpointError, "holds partitions, not a checkpoint"),
    "a partition set": (["partition_0.bin", "partition_set.json"], {}, CheckpointError, "mmsplit repartition"),
    "only hidden": ([".model.safetensors"], {}, CheckpointError, "no .safetensors, .bin"),
    "missing number": (numbered("model", 3)[:2], {}, MissingShardError, "model-00003-of-00003.safetensors"),
    "first number missing": (numbered("model", 3)[1:], {}, MissingShardError, "model-00001-of-00003.safetensors"),
    "forged count": (["model-00001-of-99999.safetensors"], {}, MissingShardError, "model-00002-of-99999"),
    "two counts": ([*MODEL, numbered("model", 3)[0]], {}, MissingShardError, "model-00002-of-00003"),
    "number missing in an unknown family": (numbered("own", 3)[:1], {}, MissingShardError, "own-00002-of-00003"),
    "index names a missing shard": (MODEL[:1], {INDEX: over(MODEL)}, MissingShardError, "1 of 2 shards named by"),
    "index without shards": ([], {INDEX: over(MODEL)}, MissingShardError, "2 of 2 shards"),
    "shard a directory": (["model.safetensors/x"], {}, CheckpointError, "no .safetensors, .bin"),
    "index names a directory": (
        ["a.safetensors/x", "b.safetensors"],
        {INDEX: over(["a.safetensors", "b.safetensors"])},
        MissingShardError,
        "a.safetensors",
    ),
    "index names a path": (["model.safetensors"], {INDEX: {"t": "../model.safetensors"}}, CheckpointError, "plain"),
    "index names a very long name": ([], {INDEX: {"t": "x" * 5000 + ".safetensors"}}, CheckpointError, "cannot look"),
    "name no reader of the set would take": (["a:b.safetensors"], {}, CheckpointError, "Rename the file"),
}


@pytest.mark.skipif(os.name == "nt", reason="the file system refuses some of these names itself")
@pytest.mark.parametrize(("names", "indexes", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusal(
    tmp_path: Path,
    names: list[str],
    indexes: dict[str, dict[str, str]],
    error: type[CheckpointError],
    words: str,
) -> None:
    """One clear error of the right branch."""
    fill(tmp_path, names, indexes)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint_files(tmp_path)
    assert type(caught.value) is error
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["partition_0.json", "partition_0.bin", "partition_set.json"])
def test_a_file_of_a_partition_set(tmp_path: Path, name: str) -> None:
    """Who names one is told what cuts the set anew."""
    fill(tmp_path, [name], {})
    with pytest.raises(CheckpointError, match=r"a file of a partition set, not a checkpoint.*mmsplit repartition"):
        find_checkpoint_files(tmp_path / name)


def test_path_may_be_a_shard_or_an_index(tmp_path: Path) -> None:
    """A shard stands for itself, an index for what it names."""
    fill(tmp_path, [*MODEL, "config.json"], {INDEX: over(MODEL[:1])})
    alone = find_checkpoint_files(tmp_path / MODEL[1])
    assert alone.shards == (MODEL[1],)
    assert alone.notes == (f"{MODEL[1]} is one of 2 shards, and is taken alone",)
    assert find_checkpoint_files(tmp_path / INDEX).shards == (MODEL[0],)


@pytest.mark.parametrize("name", ["nowhere", "config.json", "x.safetensors", "n" * 5000])
def test_path_that_is_neither_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path, ["config.json", "x.safetensors/x"])
    with pytest.raises(CheckpointError):
        find_checkpoint_files(tmp_path / name)


def test_link_that_leads_nowhere_is_a_missing_shard(tmp_path: Path) -> None:
    """A Hub cache that lost a blob; the shard is not passed over, whatever else is there."""
    (tmp_path / "b.safetensors").symlink_to("gone")
    fill(tmp_path, ["a.safetensors"])
    with pytest.raises(MissingShardError, match="leads nowhere"):
        find_checkpoint_files(tmp_path)


def test_large_index_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is checked before a byte is read."""
    monkeypatch.setattr(directory, "_MAX_INDEX_BYTES", 10)
    fill(tmp_path, MODEL, {INDEX: over(MODEL)})
    with pytest.raises(CheckpointError, match="too large"):
        find_checkpoint_files(tmp_path)


def test_small_files_are_those_of_the_model(tmp_path: Path) -> None:
    """Subfolders are carried along; hidden names, weights, indexes and partition sets are not."""
    kept = ["LICENSE", "code/model.py", "config.json", "pytorch_model.bin.index.json", "tokenizer.model"]
    fill(
        tmp_path,
        [
            *kept, "model.safetensors", ".cache/x", ".gitattributes", "code/.x", "pytorch_model.bin", "x.GGUF",
            "onnx/model.onnx", "m.npz", "x.safetensors.incomplete", "partition_0.json", "partition_12.bin",
            "partition_0.bin.partial", "partition_set.json", "unfinished_split.json", "out/partition_set.json",
            "out/config.json", "old/unfinished_split.json", "old/config.json",
        ],
        {"adapter_model.safetensors.index.json": {"t": "x.safetensors"}},
    )  # fmt: skip
    (tmp_path / "partition_notes.md").touch()
    assert find_checkpoint_files(tmp_path).small_files == (
        "LICENSE",
        "config.json",
        "m.npz",
        "partition_notes.md",
        "pytorch_model.bin.index.json",
        "tokenizer.model",
        "code/model.py",
    )
    assert any(note.startswith("3 weight file(s) of other formats") for note in find_checkpoint_files(tmp_path).notes)


def test_shard_named_alone_brings_no_subfolders(tmp_path: Path) -> None:
    """It may lie in any folder; what is right beside it is all that can belong to it."""
    fill(tmp_path, ["model.safetensors", "config.json", "documents/letter.txt"])
    assert find_checkpoint_files(tmp_path / "model.safetensors").small_files == ("config.json",)


def test_large_and_many_small_files_are_left_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size and number are bounded, in a fixed order."""
    monkeypatch.setattr(directory, "MAX_SMALL_FILE_BYTES", 3)
    monkeypatch.setattr(directory, "MAX_SMALL_FILES", 2)
    fill(tmp_path, ["model.safetensors", "b.txt", "c.txt", "d.txt"])
    (tmp_path / "a.txt").write_bytes(b"1234")
    found = find_checkpoint_files(tmp_path)
    assert found.small_files == ("b.txt", "c.txt")
    large, many = found.notes
    assert large.startswith("a.txt is not carried along: 4 bytes")
    assert many.startswith("more than 2 small files")


@pytest.mark.skipif(os.name == "nt", reason="the file system refuses these names itself")
@pytest.mark.parametrize("name", [b"a:b.txt", b"a\\b.txt", b"a\nb.txt", b"\xff.txt", b"a\xc2\xa0b.txt"])
def test_small_file_that_a_set_could_not_name_is_left_with_a_note(tmp_path: Path, name: bytes) -> None:
    """Readers of a partition set refuse such names; carrying them would make a set that cannot be opened."""
    fill(tmp_path, ["model.safetensors", "config.json"])
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    except OSError:
        pytest.skip("the file system refuses this name itself")
    found = find_checkpoint_files(tmp_path)
    assert found.small_files == ("config.json",)
    (note,) = found.notes
    assert "is not carried along: its name" in note
    note.encode()  # for a terminal and for JSON


def refuse(at: Path, call: Callable[..., object]) -> Callable[..., object]:
    """A system call that may not look at one path; the tests may run as root, whom no mode stops."""

    def refusing(path: object = ".", *args: object, **kwargs: object) -> object:
        if os.fspath(path) == str(at):  # type: ignore[call-overload]
            raise PermissionError(13, "Permission denied", str(at))
        return call(path, *args, **kwargs)

    return refusing


def test_directory_that_may_not_be_read_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bare OSError leaves the room."""
    monkeypatch.setattr(os, "scandir", refuse(tmp_path, os.scandir))
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        find_checkpoint_files(tmp_path)
    assert caught.value.path == str(tmp_path)


def test_subfolder_that_may_not_be_read_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost+found` must not stop anybody, and nothing is passed over in silence."""
    fill(tmp_path, ["model.safetensors", "lost+found/x"])
    monkeypatch.setattr(os, "scandir", refuse(tmp_path / "lost+found", os.scandir))
    (note,) = find_checkpoint_files(tmp_path).notes
    assert "lost+found is not carried along: Permission denied" in note
