"""`inspect` says what a checkpoint, a partition or a set holds; its JSON is a contract."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, Weight, flip, llama_weights, size_of, write_checkpoint, write_shard

from mmsplit.errors import CheckpointError, FormatError, IntegrityError
from mmsplit.verbs.inspect import CheckpointInfo, PartitionInfo, SetInfo, bytes_by_dtype, inspect
from mmsplit.verbs.merge import merge
from mmsplit.verbs.plan import plan
from mmsplit.verbs.split import split


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with a tied head."""
    root = tmp_path_factory.mktemp("model") / "model"
    return write_checkpoint(root, [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its set in two partitions."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 2)
    return out


def _shown(info: CheckpointInfo | PartitionInfo | SetInfo) -> dict:
    return json.loads(json.dumps(info.as_json()))


def test_a_checkpoint(source: Path) -> None:
    """Keys of the contract: tensors, total_params, total_bytes, layers as in a plan, notes."""
    info = inspect(source)
    assert isinstance(info, CheckpointInfo)
    shown = _shown(info)
    weights = llama_weights(3)
    assert shown["tensors"] == len(weights)
    assert shown["total_bytes"] == sum(size_of(weight) for weight in weights) == sum(shown["dtypes"].values())
    assert shown["total_params"] == sum(layer["total_params"] for layer in shown["layers"])
    assert isinstance(shown["notes"], list)
    planned = plan(source, 1).as_json()["partitions"][0]["layers"]
    assert shown["layers"] == json.loads(json.dumps([layer for layer in planned if "alias" not in layer]))
    assert [layer.keys() for layer in shown["layers"]] == [
        {"name", "layer_type", "tensors", "total_params", "total_bytes"}
    ] * 5


@pytest.mark.parametrize("name", ["partition_0.json", "partition_0.bin"])
def test_a_partition(made: Path, name: str) -> None:
    """One partition, by manifest or payload, with its layers and sizes."""
    info = inspect(made / name)
    assert isinstance(info, PartitionInfo)
    shown = _shown(info)
    assert (shown["part_id"], shown["num_parts"], shown["model_id"]) == (0, 2, "model")
    assert (
        shown["total_bytes"] == sum(layer["total_bytes"] for layer in shown["layers"]) == sum(shown["dtypes"].values())
    )
    assert shown["stored_bytes"] == sum(layer["stored_bytes"] for layer in shown["layers"]) < shown["payload_bytes"]
    assert shown["payload_bytes"] == (made / "partition_0.bin").stat().st_size
    assert shown["tensors"] == sum(len(layer["tensors"]) for layer in shown["layers"])


@pytest.mark.parametrize("name", ["", "partition_set.json"])
def test_a_set(made: Path, name: str) -> None:
    """A set, by directory or set manifest; the sums of its partitions are its own."""
    info = inspect(made / name)
    assert isinstance(info, SetInfo)
    shown = _shown(info)
    assert (shown["num_parts"], shown["missing"], shown["files"]) == (2, [], ["config.json"])
    assert shown["root_digest"].startswith("sha256:")
    for key in ("total_bytes", "stored_bytes"):
        assert shown[key] == sum(part[key] for part in shown["partitions"])


def test_a_set_with_a_partition_missing(made: Path, tmp_path: Path) -> None:
    """What is missing is shown, and is no error: the set manifest is all that is needed."""
    part = Path(shutil.copytree(made, tmp_path / "part"))
    (part / "partition_1.bin").unlink()
    assert _shown(inspect(part))["missing"] == [1]


def test_what_cannot_be_inspected(made: Path, tmp_path: Path) -> None:
    """Nothing, an unfinished split, a damaged partition: each is refused in its own branch."""
    with pytest.raises(CheckpointError):
        inspect(tmp_path)
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "nothing")
    (tmp_path / "unfinished_split.json").write_text("{}")
    with pytest.raises(FormatError, match="not finished"):
        inspect(tmp_path)
    part = Path(shutil.copytree(made, tmp_path / "part"))
    flip(part / "partition_0.bin", 50)
    with pytest.raises(IntegrityError, match="file header"):
        inspect(part / "partition_0.json")


def test_partitions_without_their_set_manifest(made: Path, tmp_path: Path) -> None:
    """All of them: what brings the set manifest back.  Some: that one can be named.  With weights: a checkpoint."""
    part = Path(shutil.copytree(made, tmp_path / "part"))
    (part / "partition_set.json").unlink()
    for command in (inspect, lambda path: merge(path, tmp_path / "out")):
        with pytest.raises(FormatError, match=r"partition_set\.json is missing; .* mmsplit repair .*--resume"):
            command(part)
    (part / "partition_1.bin").unlink()
    with pytest.raises(FormatError, match=r"name one of them.*partition_0\.json"):
        inspect(part)
    write_shard(part / "model.safetensors", [Weight("a", "F32", (2,))])
    assert isinstance(inspect(part), CheckpointInfo)


def test_bytes_by_dtype() -> None:
    """Added up, largest first."""
    assert list(bytes_by_dtype([("F32", 4), ("BF16", 10), ("F32", 1), ("U8", 6)]).items()) == [
        ("BF16", 10),
        ("U8", 6),
        ("F32", 5),
    ]
