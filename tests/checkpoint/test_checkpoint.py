"""Headers, index and config of a checkpoint, held against each other."""

import json
import os
from pathlib import Path

import pytest

from mmsplit.checkpoint import checkpoint as module
from mmsplit.checkpoint import open_checkpoint
from mmsplit.errors import CheckpointError, HeaderError, IndexMismatchError, SourceChangedError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two_shards(tmp_path: Path, write_shard) -> Path:
    """a and b in the first shard, c in the second; no index."""
    write_shard(tmp_path / ONE, {"b": b"22", "a": b"1"})
    write_shard(tmp_path / TWO, {"c": b"333"})
    return tmp_path


def index(root: Path, weight_map: dict[str, str]) -> None:
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_of_all_shards_in_order(two_shards: Path) -> None:
    """Shards by name, tensors by offset; sums, sizes and headers are those of the files."""
    index(two_shards, {"a": ONE, "b": ONE, "c": TWO})
    (two_shards / "config.json").write_text('\ufeff{"model_type": "llama"}', encoding="utf-8")
    checkpoint = open_checkpoint(str(two_shards))
    assert list(checkpoint.tensors) == ["b", "a", "c"]
    assert (checkpoint.total_bytes, checkpoint.total_params) == (6, 6)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.index_name == INDEX
    assert checkpoint.small_files == ("config.json",)
    assert checkpoint.notes == ()
    assert (checkpoint.model_id, checkpoint.revision) == (two_shards.name, None)
    for shard in checkpoint.shards:
        data = Path(shard.location).read_bytes()
        assert shard.size_bytes == len(data)
        assert checkpoint.read_kept(shard.name) == data[: shard.kept_bytes]
        with checkpoint.open_shard(shard.name) as reader:
            for tensor in checkpoint.tensors.values():
                if tensor.shard == shard.name:
                    assert reader.read(tensor.start_offset, tensor.stop_offset) == {
                        "a": b"1",
                        "b": b"22",
                        "c": b"333",
                    }[tensor.name]  # fmt: skip


INDEX_FAULTS = {
    "listed, in no shard": ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, "d", "no header has it"),
    "in another shard": ({"a": TWO, "b": ONE, "c": TWO}, "a", "not in the shard the index names"),
    "in a shard that is not opened": ({"c": ONE}, "c", "no header has it"),
}


@pytest.mark.parametrize(("weight_map", "tensor", "words"), INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_index_that_disagrees_with_headers_is_an_error(
    two_shards: Path, weight_map: dict[str, str], tensor: str, words: str
) -> None:
    """The error names tensor and index."""
    index(two_shards, weight_map)
    with pytest.raises(IndexMismatchError, match=words) as caught:
        open_checkpoint(two_shards)
    assert (caught.value.tensor, caught.value.path) == (tensor, str(two_shards / INDEX))


def test_tensors_that_the_index_does_not_list_are_carried_along_with_a_note(two_shards: Path) -> None:
    index(two_shards, {"a": ONE, "c": TWO})
    checkpoint = open_checkpoint(two_shards)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.notes == ("1 tensor(s) are in the shards but not in the index; they are carried along: b",)


@pytest.mark.parametrize("with_index", [False, True])
def test_tensor_in_two_shards_is_an_error(two_shards: Path, write_shard, with_index: bool) -> None:
    """Whichever of the two the index prefers."""
    write_shard(two_shards / TWO, {"c": b"333", "a": b"1"})
    if with_index:
        index(two_shards, {"a": TWO, "b": ONE, "c": TWO})
    with pytest.raises(IndexMismatchError, match=f"in two shards, {ONE} and {TWO}") as caught:
        open_checkpoint(two_shards)
    assert caught.value.tensor == "a"


def test_header_errors_name_the_file(two_shards: Path) -> None:
    """A truncated shard, an empty one, a Git LFS pointer."""
    shard = two_shards / TWO
    whole = shard.read_bytes()
    for data, words in (
        (whole[:-1], "shorter than its header says"),
        (b"", "too short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ):
        shard.write_bytes(data)
        with pytest.raises(HeaderError, match=words) as caught:
            open_checkpoint(two_shards)
        assert caught.value.path == str(shard)


def test_unknown_dtype_is_carried_on_request(tmp_path: Path, write_shard) -> None:
    path = write_shard(tmp_path / "model.safetensors", {"a": b"12"})
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"Q4"'))
    with pytest.raises(HeaderError, match="--allow-unknown-dtypes"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, allow_unknown_dtypes=True).tensors["a"].dtype == "Q4"


BROKEN_CONFIGS = {
    "no JSON": (b"{", "could not be read"),
    "not UTF-8": (b'{"a": "\xff"}', "could not be read"),
    "deep": (b"[" * 200_000, "could not be read"),
    "a list": (b"[]", "not a JSON object"),
    "too large": (b" " * 101 + b"{}", "was not looked at"),
}


@pytest.mark.parametrize(("data", "words"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_broken_config_is_a_note(two_shards: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, words: str) -> None:
    """It only cross-checks, so nothing fails without it."""
    monkeypatch.setattr(module, "_MAX_CONFIG_BYTES", 100 if words == "was not looked at" else 1 << 20)
    (two_shards / "config.json").write_bytes(data)
    checkpoint = open_checkpoint(two_shards)
    assert checkpoint.config is None
    assert [words in note for note in checkpoint.notes] == [True]


def test_unreadable_shard_is_a_checkpoint_error(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's refusal keeps its words; the tests may run as root, whom no mode stops."""
    real = os.open

    def refuse(path: object, *args: object) -> int:
        if str(path).endswith(TWO):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot open: Permission denied") as caught:
        open_checkpoint(two_shards)
    assert caught.value.path == str(two_shards / TWO)


def test_shard_that_changed_since_its_header_was_read_is_not_opened(two_shards: Path, write_shard) -> None:
    """Another size, and the same bytes in another file."""
    checkpoint = open_checkpoint(two_shards)
    write_shard(two_shards / ONE, {"a": b"longer"})
    data = (two_shards / TWO).read_bytes()
    (two_shards / "new").write_bytes(data)
    os.replace(two_shards / "new", two_shards / TWO)
    for name in (ONE, TWO):
        with pytest.raises(SourceChangedError, match="changed while it was read"):
            checkpoint.open_shard(name)


HUB_FOLDERS = {
    "with owner": ("models--meta-llama--Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    "without owner": ("models--gpt2", "gpt2"),
    "dashes in the name": ("models--a--b--c", "a/b--c"),
}


@pytest.mark.parametrize(("folder", "model_id"), HUB_FOLDERS.values(), ids=HUB_FOLDERS)
def test_snapshot_of_the_hub_cache_knows_model_and_revision(
    tmp_path: Path, write_shard, folder: str, model_id: str
) -> None:
    """Its files are links into blobs/; they are followed, and keep the names they have in the snapshot."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / folder / "snapshots" / revision
    blob = write_shard(tmp_path / folder / "blobs" / ("ab" * 32), {"a": b"1"})
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / folder / "blobs" / "cfg").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/cfg")
    for path in (snapshot, snapshot / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.model_id, checkpoint.revision) == (model_id, revision)
        assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
        assert checkpoint.config == {}
        assert checkpoint.small_files == ("config.json",)


def test_model_id_of_the_working_directory_is_its_name(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_shards)
    assert open_checkpoint(".").model_id == two_shards.name
    assert open_checkpoint(ONE).model_id == two_shards.name
