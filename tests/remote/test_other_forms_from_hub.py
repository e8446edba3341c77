"""PyTorch and GGUF files on the Hub, and equal tensors there: the set of a local split, and few requests."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint.gguf_builder import TEXT, U32, Row, gguf_file, number, text
from checkpoint.torch_builder import Entry, dict_of, legacy_file, program, storage_id, tensor_of, zip_file
from checkpoints import MIB, data_of, tree
from loopback_hub import LoopbackHub

import mmsplit
from mmsplit.remote.source import HubOptions

ID = "org/model"
CONFIG = b'{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}'
EMBEDDING = data_of(2 * MIB, 90, 1)


def state(blocks: int = 3) -> dict[str, bytes]:
    """A head that repeats the embedding; small tensors; blocks of more than a mebibyte."""
    found = {"wte.weight": EMBEDDING}
    for block in range(blocks):
        found[f"h.{block}.attn.bias"] = bytes([block]) * 2000
        found[f"h.{block}.mlp.weight"] = data_of(MIB + 4096, 150, block)
    return {**found, "lm_head.weight": EMBEDDING}


def torch_pickle(tensors: dict[str, bytes]) -> bytes:
    """One storage a tensor, of two dimensions as weights are."""
    parts = {}
    for key, (name, data) in enumerate(tensors.items()):
        count = len(data) // 4
        columns = 4 if count % 4 == 0 else 1
        parts[name] = tensor_of(storage_id(str(key), count), (count // columns, columns), (columns, 1))
    return program(dict_of(parts))


def torch_zip(tensors: dict[str, bytes]) -> bytes:
    """As torch.save writes it: data at multiples of 64, a descriptor behind each entry."""
    items: list[Entry] = []
    position = 0

    def add(name: bytes, data: bytes) -> None:
        nonlocal position
        padding = -(position + 30 + len(name) + 4) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        items.append(Entry(name, data, local_extra=extra, flags=8, local_size=0, descriptor=bytes_after(len(data))))
        position += 30 + len(name) + len(extra) + len(data) + 16

    add(b"archive/data.pkl", torch_pickle(tensors))
    add(b"archive/byteorder", b"little")
    for key, data in enumerate(tensors.values()):
        add(f"archive/data/{key}".encode(), data)
    return zip_file(items)


def bytes_after(size: int) -> bytes:
    return struct.pack("<4s3L", b"PK\x07\x08", 0, size, size)


def torch_legacy(tensors: dict[str, bytes]) -> bytes:
    storages = b"".join(struct.pack("<q", len(data) // 4) + data for data in tensors.values())
    return legacy_file(torch_pickle(tensors), tuple(map(str, range(len(tensors)))), storages)


def gguf(tensors: dict[str, bytes]) -> bytes:
    """The same under GGUF's names."""
    spelled = {"wte.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    rows = []
    for name, data in tensors.items():
        own = spelled.get(
            name, name.replace("h.", "blk.", 1).replace("mlp", "ffn_up").replace("attn.bias", "attn_q.bias")
        )
        rows.append(Row(own, (4, len(data) // 16), data=data))
    blocks = sum(name.endswith("attn.bias") for name in tensors)
    return gguf_file(rows, {"general.architecture": (TEXT, text("llama")), "llama.block_count": number(U32, blocks)})


def safetensors(tensors: dict[str, bytes]) -> bytes:
    header, position = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "F32", "shape": [len(data) // 16, 4], "data_offsets": [position, position + len(data)]}
        position += len(data)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(tensors.values())


Maker = Callable[[dict[str, bytes]], bytes]
FORMS: dict[str, tuple[str, Maker]] = {
    "torch zip": ("pytorch_model.bin", torch_zip),
    "torch legacy": ("pytorch_model.bin", torch_legacy),
    "gguf": ("model.gguf", gguf),
    "safetensors": ("model.safetensors", safetensors),
}


def write(root: Path, form: str, tensors: dict[str, bytes]) -> Path:
    name, make = FORMS[form]
    model = root / "hub" / ID
    model.mkdir(parents=True)
    (model / name).write_bytes(make(tensors))
    (model / "config.json").write_bytes(CONFIG)
    return model


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, request.param, state())


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        yield hub


@pytest.fixture
def options(hub: LoopbackHub, tmp_path: Path) -> HubOptions:
    return HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


def test_every_verb(model: Path, hub: LoopbackHub, options: HubOptions, tmp_path: Path) -> None:
    """Plan, split as a whole and one partition at a time, verify against the Hub, merge: all as from the disk."""
    planned = mmsplit.plan(ID, 3, hub=options)
    assert "a split compares their bytes" in planned.notes[-1]
    assert planned._replace(notes=planned.notes[1:]) == mmsplit.plan(model, 3)
    commit = mmsplit.open_source(ID, options).revision
    mmsplit.split(model, tmp_path / "local", 3, model_id=ID, revision=commit)
    mmsplit.split(ID, tmp_path / "whole", 3, hub=options)
    assert tree(tmp_path / "whole") == tree(tmp_path / "local")
    for part_id in (1, 2, 0):
        mmsplit.split(ID, tmp_path / "single", 3, only=[part_id], hub=options)
    assert tree(tmp_path / "single") == tree(tmp_path / "local")
    assert mmsplit.verify(tmp_path / "whole", level="full", against=ID, hub=options).ok
    mmsplit.merge(tmp_path / "whole", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(model)


def test_through_the_cache(model: Path, options: HubOptions, tmp_path: Path) -> None:
    """Shards that are kept are compared where they lie."""
    commit = mmsplit.open_source(ID, options).revision
    mmsplit.split(model, tmp_path / "local", 2, model_id=ID, revision=commit)
    mmsplit.split(ID, tmp_path / "out", 2, hub=options._replace(keep_source=True))
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_equal_tensors_move_once_more_and_no_others(hub: LoopbackHub, options: HubOptions, tmp_path: Path) -> None:
    """To compare them both are read; then one of them is left out, and all else comes once."""
    hub.clear()
    result = mmsplit.split(ID, tmp_path / "out", 3, hub=options)
    size = mmsplit.open_source(ID, options).total_bytes
    assert result.needed_bytes == size - len(EMBEDDING)
    assert result.moved_bytes is not None
    assert size + len(EMBEDDING) < result.moved_bytes < size + len(EMBEDDING) + 2 * MIB  # GGUF headers are read ahead
    assert "holds the same bytes as" in " ".join(result.plan.notes)


@pytest.mark.parametrize("form", ["torch zip", "torch legacy"])
def test_a_file_of_300_tensors_is_looked_at_once(tmp_path: Path, form: str) -> None:
    """One small request a storage to find it; what they brought is kept with the partitions without any more."""
    tensors = {f"h.{k // 10}.m{k % 10}.weight": data_of(8192, 200, k) for k in range(300)}
    root = write(tmp_path, form, tensors).parent.parent
    with LoopbackHub(root) as hub:
        opened = mmsplit.open_source(ID, HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
        assert 300 <= len(hub.requests) < 310
        hub.clear()
        kept = opened.read_kept("pytorch_model.bin")
        assert not hub.requests
        mmsplit.split(opened, tmp_path / "set", 2)
        assert len(hub.requests) < 150
    assert len(kept) == opened.shards[0].kept_bytes
    mmsplit.merge(tmp_path / "set", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(root / ID)
