"""Exports of PyTorch and GGUF files: the tensors that torch.load gave, in safetensors and in JSON."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CAUSAL_CONFIG, MIB
from safetensors import safe_open
from safetensors.numpy import load_file

import mmsplit
from mmsplit.dtypes import DTYPES
from mmsplit.errors import RequestError
from mmsplit.exporting import elements

CHECKPOINTS = Path(__file__).parent.parent / "checkpoint"
sys.path.append(str(CHECKPOINTS))

from test_torch_checkpoints import EXPECTED, FIXTURES, expected_tensors  # noqa: E402
from torch_builder import dict_of, program, saved, storage_id, tensor_of  # noqa: E402

GGUF = CHECKPOINTS / "gguf_fixtures"
TORCH = sorted(set(EXPECTED["read"]) - {"unnamed_dtypes.zip.bin"})


def tensor_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a directory; the safetensors library opens each file, too."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            names = set(opened.keys())
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        assert set(header) == names
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            assert end - begin == math.prod(entry["shape"]) * DTYPES[entry["dtype"]].bits // 8
            found[name] = hashlib.sha256(data[begin:end]).hexdigest()
    return found


def parts_of(source: Path) -> int:
    return min(2, len(mmsplit.plan(source, 1).partitions[0].layers))


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("name", TORCH)
def test_what_torch_loads_comes_out(tmp_path: Path, name: str, tied: Any) -> None:
    """From the file and from its set, in one go and in parts: every name with the elements that torch.load gave."""
    source = FIXTURES / name
    expected = expected_tensors(name)
    mmsplit.split(source, tmp_path / "set", parts_of(source), tied=tied)
    mmsplit.export(source, tmp_path / "a", parts_of(source), tied=tied)
    mmsplit.export(tmp_path / "set", tmp_path / "b", max_shard_bytes=100)
    assert tensor_hashes(tmp_path / "a") == expected
    assert tensor_hashes(tmp_path / "b") == expected
    together: dict[str, str] = {}
    for part_id in range(parts_of(source)):
        mmsplit.export(source, tmp_path / f"{part_id}", parts_of(source), tied=tied, part_ids=[part_id])
        mmsplit.export(tmp_path / "set", tmp_path / f"set-{part_id}", part_ids=[part_id])
        found = tensor_hashes(tmp_path / f"{part_id}")
        assert found == tensor_hashes(tmp_path / f"set-{part_id}")
        together |= found
    if tied != "reference":
        assert together == expected


@pytest.mark.parametrize("name", ["module.zip.bin", "views.legacy.bin", "shapes.zip.bin"])
def test_json_has_the_same_numbers(tmp_path: Path, name: str) -> None:
    """From the file and from its set, and what the partition itself gives as float32."""
    source, parts = FIXTURES / name, parts_of(FIXTURES / name)
    mmsplit.split(source, tmp_path / "set", parts)
    mmsplit.export(source, tmp_path / "a", parts, to="json")
    mmsplit.export(tmp_path / "set", tmp_path / "b", to="json")
    found = {}
    for part_id in range(parts):
        file = f"parameters_of_partition_{part_id}.json"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        read = mmsplit.load_partition_json(tmp_path / "a" / file)
        with mmsplit.open_partition(tmp_path / "set" / f"partition_{part_id}.json") as partition:
            exported = partition.exported()
            of_layers = [layer.parameters for layer in partition.layers]
        assert [layer[:3] for layer in read.layers] == [layer[:3] for layer in exported.layers]
        assert read.total_params == exported.total_params
        for one, other in zip(read.layers, exported.layers, strict=True):
            assert np.array_equal(one.parameters, other.parameters, equal_nan=True)
        flat = [layer.parameters for layer in exported.layers]
        assert np.array_equal(np.concatenate(flat), np.concatenate(of_layers), equal_nan=True)
        found |= {layer.name: layer.parameters for layer in read.layers}
    expected = mmsplit.open_set(tmp_path / "set").load()
    for tensor, sha256 in expected_tensors(name).items():
        array = found[tensor].astype(expected[tensor].dtype)
        assert hashlib.sha256(array.tobytes()).hexdigest() == sha256, tensor


@pytest.mark.parametrize("declared", [True, False, None])
def test_a_tied_head_is_written_unless_loaders_make_it(tmp_path: Path, declared: bool | None) -> None:
    """tie_word_embeddings in config.json decides; transformers would take a head that it says is not tied as lost."""
    source = tmp_path / "model"
    source.mkdir()
    weights = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), tensor_of(shape=(2, 2), stride=(2, 1)))
    weights["model.layers.0.mlp.weight"] = tensor_of(shape=(2,))
    (source / "pytorch_model.bin").write_bytes(saved(program(dict_of(weights))))
    config = {**json.loads(CAUSAL_CONFIG), "tie_word_embeddings": declared}
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    mmsplit.split(source, tmp_path / "set", 2)
    mmsplit.export(source, tmp_path / "a")
    mmsplit.export(tmp_path / "set", tmp_path / "b")
    expected = set(weights) - ({"lm_head.weight"} if declared else set())
    for out in (tmp_path / "a", tmp_path / "b"):
        assert set(load_file(out / "model.safetensors")) == expected
    with safe_open(tmp_path / "b" / "model.safetensors", "np") as opened:
        said = opened.metadata().get("lm_head.weight")
    assert said == ("model.embed_tokens.weight" if declared else None)


@pytest.mark.parametrize("block_bytes", [100_000, 32 * MIB])
@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_large_views_are_gathered_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, codec: Any
) -> None:
    """Over many chunks: transposed, sliced with steps, from an odd place on, expanded far beyond its bytes."""
    monkeypatch.setattr(elements, "_BLOCK_BYTES", block_bytes)
    rows, columns = 1500, 1501
    data = np.random.default_rng(0).standard_normal(rows * columns).astype(np.float32)
    storage = storage_id(count=data.size)
    matrix = data.reshape(rows, columns)
    expected = {
        "a.transposed": matrix.T,
        "b.steps": matrix[::7, 5::3],
        "c.run": data[1_000_001:2_200_000],
        "d.expanded": np.broadcast_to(matrix[3, :1000], (1300, 1000)),
    }
    weights = {
        name: tensor_of(
            storage,
            array.shape,
            [step // 4 for step in array.strides],
            (array.__array_interface__["data"][0] - data.__array_interface__["data"][0]) // 4,
        )
        for name, array in expected.items()
    }
    source = tmp_path / "pytorch_model.bin"
    source.write_bytes(saved(program(dict_of(weights)), {"0": data.tobytes()}))
    mmsplit.split(source, tmp_path / "set", 1, codec=codec)
    mmsplit.export(source, tmp_path / "a", threads=3)
    mmsplit.export(tmp_path / "set", tmp_path / "b", max_shard_bytes=10**6)
    for out in (tmp_path / "a", tmp_path / "b"):
        hashes = {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in expected.items()}
        assert tensor_hashes(out) == hashes


def test_gguf_of_plain_numbers(tmp_path: Path) -> None:
    """Names and rows as the file has them, shapes slowest first: the bytes are the same."""
    source = shutil.copy(GGUF / "mmproj.gguf", tmp_path / "model.gguf")
    expected = json.loads((GGUF / "expected.json").read_text())["files"]["mmproj.gguf"]["tensors"]
    mmsplit.split(source, tmp_path / "set", 1)
    for given in (source, tmp_path / "set"):
        out = tmp_path / f"out-{Path(given).name}"
        mmsplit.export(given, out)
        assert tensor_hashes(out) == {name: entry["sha256"] for name, entry in expected.items()}
        shapes = {name: list(array.shape) for name, array in load_file(out / "model.safetensors").items()}
        assert shapes == {name: entry["shape"] for name, entry in expected.items()}


@pytest.mark.parametrize("to", ["safetensors", "json"])
def test_quantised_blocks_are_one_clear_error(tmp_path: Path, to: Any) -> None:
    """It names tensor and type, before anything is written."""
    with pytest.raises(RequestError) as raised:
        mmsplit.export(GGUF / "llama_tied.gguf", tmp_path / "out", to=to)
    assert (raised.value.tensor, raised.value.found) == ("token_embd.weight", "Q8_0")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
