"""Equal bytes under two names are stored once, whatever the form of the file; what only looks equal is not touched."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkpoint.gguf_builder import TEXT, U32, Row, gguf_file, number, text
from checkpoint.torch_builder import dict_of, program, saved, storage_id, tensor_of
from checkpoints import MIB, data_of, tree
from hypothesis import given, settings
from hypothesis import strategies as st

import mmsplit
from mmsplit.checkpoint import Checkpoint, FileReader, open_checkpoint
from mmsplit.dtypes import DTYPES
from mmsplit.planning import PlanRequest, plan_checkpoint
from mmsplit.splitting import fold_equal_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODES = ("duplicate", "reference", "colocate")
TIED = b'{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true}'
NOT_TIED = TIED.replace(b"true", b"false")
SAME = data_of(96 * 1024, 90, 1)


class Raw(NamedTuple):
    """One tensor of a file and its very bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def matrix(data: bytes = SAME, dtype: str = "BF16") -> Raw:
    """64 columns of two bytes each."""
    return Raw(dtype, (len(data) // 128, 64), data)


def other(seed: int, size: int = len(SAME)) -> Raw:
    return matrix(data_of(size, 200, seed + 100))


def blocks(count: int = 2) -> dict[str, Raw]:
    """Something between the ends; in every block the same mask."""
    found = {}
    for block in range(count):
        found[f"model.layers.{block}.mlp.up_proj.weight"] = other(block)
        found[f"model.layers.{block}.mask"] = Raw("U8", (MIB + 1,), bytes(MIB + 1))
    return found


def write(root: Path, *shards: Mapping[str, Raw], config: bytes | None = TIED) -> Path:
    """A directory of safetensors files."""
    root.mkdir(parents=True)
    for position, shard in enumerate(shards):
        header, offset = {}, 0
        for name, (dtype, shape, data) in shard.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        head = json.dumps(header).encode()
        body = b"".join(raw.data for raw in shard.values())
        path = root / f"model-{position + 1:05d}-of-{len(shards):05d}.safetensors"
        path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    if config is not None:
        (root / "config.json").write_bytes(config)
    return root


def decoder(**changes: Raw) -> dict[str, Raw]:
    """Embedding, blocks, norm and a head that repeats the embedding."""
    return {
        EMBEDDING: matrix(),
        **blocks(),
        "model.norm.weight": Raw("F32", (3,), b"n" * 12),
        HEAD: matrix(),
        **changes,
    }


def folded(source: Path) -> Checkpoint:
    return fold_equal_tensors(open_checkpoint(source), "auto")


def require_round_trip(
    source: Path, work: Path, num_parts: int | None, contents: Mapping[str, bytes], **options: object
):
    """Split, verified against the source, read under every name, merged to the same bytes; returns the result."""
    result = mmsplit.split(source, work / "set", num_parts, **options)
    found = mmsplit.verify(work / "set", level="full", against=source)
    assert found.ok, found.problems
    with mmsplit.open_set(work / "set") as partitions:
        for name, data in contents.items():
            assert np.ascontiguousarray(partitions[name]).tobytes() == data, name
    mmsplit.merge(work / "set", work / "merged")
    expected = tree(source) if source.is_dir() else {source.name: source.read_bytes()}
    assert {name: data for name, data in tree(work / "merged").items() if name in expected} == expected
    return result


def stored_names(result: mmsplit.SplitResult) -> list[list[str]]:
    return [
        [tensor.name for layer in part.layers if layer.stored for tensor in layer.tensors]
        for part in result.plan.partitions
    ]


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("tied", MODES)
def test_a_head_that_repeats_the_embedding(tmp_path: Path, tied: str, num_parts: int) -> None:
    """It is tied to it as if no file had it; both names give the bytes, and both places get them back."""
    source = write(tmp_path / "model", decoder())
    contents = {name: raw.data for name, raw in decoder().items()}
    result = require_round_trip(source, tmp_path, num_parts, contents, tied=tied)
    homes = [part_id for part_id, names in enumerate(stored_names(result)) if EMBEDDING in names]
    assert homes == ([0, num_parts - 1] if tied == "duplicate" and num_parts > 1 else [0])
    assert not any(HEAD in names for names in stored_names(result))
    assert f"{HEAD} holds the same bytes as {EMBEDDING}: stored once" in result.plan.notes
    assert not any("is stored, too" in note for note in result.plan.notes)
    with mmsplit.open_set(tmp_path / "set") as partitions:
        head_home = num_parts - 1 if tied != "colocate" else 0
        assert (HEAD in partitions.partition(head_home)) == (tied != "reference" or num_parts == 1)


#: where one byte differs; some lie in what is sampled, some do not
DIFFERENCES = (0, 5000, len(SAME) // 2 + 7, len(SAME) - 1)


@pytest.mark.parametrize("offset", DIFFERENCES)
def test_one_byte_that_differs_makes_two_tensors(tmp_path: Path, offset: int) -> None:
    """Also the very last one, and one that no sample sees; what config.json says is only a note."""
    changed = SAME[:offset] + bytes([SAME[offset] ^ 1]) + SAME[offset + 1 :]
    source = write(tmp_path / "model", decoder(**{HEAD: matrix(changed)}))
    assert folded(source).tensors == open_checkpoint(source).tensors
    result = require_round_trip(source, tmp_path, 2, {EMBEDDING: SAME, HEAD: changed})
    assert HEAD in stored_names(result)[1]
    assert any(f"{EMBEDDING} and {HEAD} hold different bytes; all are kept" in note for note in result.plan.notes)


def test_config_that_says_otherwise_is_a_note(tmp_path: Path) -> None:
    source = write(tmp_path / "model", decoder(), config=NOT_TIED)
    notes = folded(source).notes
    found = f"{HEAD} holds the same bytes as {EMBEDDING}: stored once"
    assert notes == (f"{found}, though config.json says tie_word_embeddings is false",)
    assert folded(write(tmp_path / "silent", decoder(), config=None)).notes == (found,)


@pytest.mark.parametrize("tied", MODES)
def test_three_names_in_three_shards(tmp_path: Path, tied: str) -> None:
    """As T5 is saved by some: the shared weight, both embeddings and the head; here one of them is another."""
    stacks = {
        f"{side}.block.{k}.layer.0.SelfAttention.q.weight": other(k) for side in ("encoder", "decoder") for k in (0, 1)
    }
    shards = (
        {"decoder.embed_tokens.weight": matrix(), **stacks},
        {"encoder.embed_tokens.weight": other(7), "lm_head.weight": matrix()},
        {"shared.weight": matrix()},
    )
    source = write(tmp_path / "model", *shards, config=b'{"architectures": ["T5ForConditionalGeneration"]}')
    found = folded(source)
    base = found.tensors["shared.weight"]
    assert {(place.name, place.shard[:11]) for place in base.also} == {
        ("decoder.embed_tokens.weight", "model-00001"),
        ("lm_head.weight", "model-00002"),
    }
    contents = {name: raw.data for shard in shards for name, raw in shard.items()}
    result = require_round_trip(source, tmp_path, 3, contents, tied=tied)
    assert "decoder.embed_tokens.weight and lm_head.weight hold the same bytes as shared.weight: stored once" in (
        result.plan.notes
    )


NOT_FOLDED: dict[str, dict[str, Raw]] = {
    "quantised weights with scales of their own": {
        "model.embed_tokens.weight": matrix(dtype="I16"),
        "model.embed_tokens.weight_scale": Raw("F32", (8,), b"a" * 32),
        "lm_head.weight": matrix(dtype="I16"),
        "lm_head.weight_scale": Raw("F32", (8,), b"b" * 32),
        **blocks(),
    },
    "packed weights": {
        "model.embed_tokens.qweight": matrix(dtype="I16"),
        "model.embed_tokens.scales": Raw("F32", (8,), b"a" * 32),
        "lm_head.qweight": matrix(dtype="I16"),
        "lm_head.scales": Raw("F32", (8,), b"a" * 32),
        **blocks(),
    },
    "another dtype": decoder(**{HEAD: matrix(dtype="F16")}),
    "another shape": decoder(**{HEAD: Raw("BF16", (64, len(SAME) // 128), SAME)}),
    "small norms": decoder(**{HEAD: other(5), "model.norm.weight": other(1), "model.last_norm.weight": other(1)}),
    "blocks": {
        **blocks(),
        "model.layers.0.mlp.up_proj.weight": matrix(),
        "model.layers.1.mlp.up_proj.weight": matrix(),
    },
    "nothing in them": {EMBEDDING: Raw("F32", (0, 4), b""), HEAD: Raw("F32", (0, 4), b""), **blocks()},
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_what_is_left_alone(tmp_path: Path, case: str) -> None:
    """Companions go where their weight goes; blocks are never made to depend on each other."""
    source = write(tmp_path / "model", NOT_FOLDED[case])
    assert folded(source).tensors == open_checkpoint(source).tensors
    require_round_trip(source, tmp_path, 2, {name: raw.data for name, raw in NOT_FOLDED[case].items()})


def test_large_tensors_of_other_layers(tmp_path: Path) -> None:
    """From 1 MiB on, whatever the layer is."""
    large = Raw("BF16", (512, 1024), data_of(MIB, 100, 3))
    tensors = {**blocks(), "left.table.weight": large, "right.table.weight": large}
    source = write(tmp_path / "model", tensors, config=None)
    assert len(folded(source).views) == 1
    require_round_trip(source, tmp_path, 2, {name: raw.data for name, raw in tensors.items()})


def test_views_of_what_is_folded_see_what_is_left(tmp_path: Path) -> None:
    """In a PyTorch file: two storages with equal bytes, and a slice of the second."""
    values = np.frombuffer(SAME, "<f4")
    count = len(values)
    wte, head = storage_id("0", count), storage_id("1", count)
    state = {
        "wte.weight": tensor_of(wte, (count // 64, 64), (64, 1)),
        "h.0.mlp.c_fc.weight": tensor_of(storage_id("2", 4)),
        "h.1.mlp.c_fc.weight": tensor_of(storage_id("3", 4)),
        "lm_head.weight": tensor_of(head, (count // 64, 64), (64, 1)),
        "slice_of_head": tensor_of(head, (2, 64), (64, 1), 640),
    }
    storages = {"0": SAME, "1": SAME, "2": b"2" * 16, "3": b"3" * 16}
    source = tmp_path / "pytorch_model.bin"
    source.write_bytes(saved(program(dict_of(state)), storages))
    for tied in MODES:
        contents = {"wte.weight": SAME, "lm_head.weight": SAME, "slice_of_head": SAME[2560:3072]}
        require_round_trip(source, tmp_path / tied, 2, contents, tied=tied)
    assert folded(source).views["slice_of_head"].base == "wte.weight"


def test_gguf(tmp_path: Path) -> None:
    """A converter of old that wrote a tied head twice."""
    table = np.frombuffer(SAME, "<f4").tobytes()
    rows = [Row("token_embd.weight", (64, len(table) // 256), data=table)]
    rows += [Row(f"blk.{block}.ffn_up.weight", (8,), data=bytes([block]) * 32) for block in (0, 1)]
    rows.append(Row("output.weight", (64, len(table) // 256), data=table))
    metadata = {"general.architecture": (TEXT, text("llama")), "llama.block_count": number(U32, 2)}
    source = tmp_path / "model.gguf"
    source.write_bytes(gguf_file(rows, metadata))
    result = require_round_trip(source, tmp_path, 2, {"token_embd.weight": table, "output.weight": table})
    assert "output.weight holds the same bytes as token_embd.weight: stored once" in result.plan.notes


@pytest.mark.parametrize("tied", MODES)
def test_single_partitions_and_resumed_splits_decide_alike(tmp_path: Path, tied: str) -> None:
    """Each by itself, in any order, and after a loss."""
    source = write(tmp_path / "model", decoder(), {"extra.weight": other(3)})
    mmsplit.split(source, tmp_path / "whole", 3, tied=tied)
    for part_id in (2, 0, 1):
        mmsplit.split(source, tmp_path / "single", 3, tied=tied, only=[part_id])
    assert tree(tmp_path / "single") == tree(tmp_path / "whole")
    for name in ("partition_set.json", "partition_1.json", "partition_1.bin"):
        (tmp_path / "single" / name).unlink()
    mmsplit.split(source, tmp_path / "single", 3, tied=tied, only=[1], existing="resume")
    assert tree(tmp_path / "single") == tree(tmp_path / "whole")
    assert mmsplit.split(source, tmp_path / "whole", 3, tied=tied, existing="resume").already_finished


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_any_dtype_is_read_under_both_names(tmp_path: Path, dtype: str) -> None:
    """Also those that are not numpy's own, or packed."""
    raw = Raw(dtype, (4, 48 * 8 // DTYPES[dtype].bits), data_of(192, 200, 1) if dtype != "BOOL" else bytes(192))
    tensors = {EMBEDDING: raw, **blocks(), HEAD: raw}
    source = write(tmp_path / "model", tensors)
    result = require_round_trip(source, tmp_path, 2, {EMBEDDING: raw.data, HEAD: raw.data})
    assert not any(HEAD in names for names in stored_names(result))
    with mmsplit.open_partition(tmp_path / "set" / "partition_1.json") as partition:
        assert (partition[HEAD].dtype, partition[HEAD].shape) == (
            partition[EMBEDDING].dtype,
            partition[EMBEDDING].shape,
        )


@pytest.mark.parametrize("part_ids", [[0], [1], [0, 1]])
def test_repair_from_the_source(tmp_path: Path, part_ids: list[int]) -> None:
    """Of the weight itself, of its copy, or of both."""
    source = write(tmp_path / "model", decoder())
    mmsplit.split(source, tmp_path / "set", 2)
    before = tree(tmp_path / "set")
    for part_id in part_ids:
        with mmsplit.open_partition(tmp_path / "set" / f"partition_{part_id}.json") as partition:
            layer = next(layer for layer in partition.layers if layer.tensors[0].name == EMBEDDING)
        path = tmp_path / "set" / f"partition_{part_id}.bin"
        data = bytearray(path.read_bytes())
        data[layer.start + 100] ^= 4
        path.write_bytes(data)
    assert mmsplit.repair(tmp_path / "set", source).ok
    assert tree(tmp_path / "set") == before


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_source_that_changed_is_told_by_the_name_that_changed(tmp_path: Path, name: str) -> None:
    """Compared with the source, both places are."""
    source = write(tmp_path / "model", decoder())
    mmsplit.split(source, tmp_path / "set", 2)
    place = open_checkpoint(source).tensors[name]
    path = source / place.shard
    data = bytearray(path.read_bytes())
    data[place.stop_offset - 1] ^= 1
    path.write_bytes(data)
    faults = mmsplit.verify(tmp_path / "set", against=source).problems
    assert {fault.tensor for fault in faults} == {name}


def test_weights_that_differ_cost_a_few_kilobytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read but samples, and nothing at all where no two tensors look alike."""
    read = []
    real = FileReader.read

    def counting(self: FileReader, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return real(self, start, stop)

    different = open_checkpoint(write(tmp_path / "different", decoder(**{HEAD: other(9)})))
    alone = open_checkpoint(write(tmp_path / "alone", {name: raw for name, raw in decoder().items() if name != HEAD}))
    monkeypatch.setattr(FileReader, "read", counting)
    monkeypatch.setattr(FileReader, "borrow", None)
    fold_equal_tensors(different, "auto")
    assert 0 < sum(read) <= 2 * 4 * 4096
    read.clear()
    assert fold_equal_tensors(alone, "auto") is alone
    assert not read


def test_memory_is_a_few_pieces_whatever_the_tensor(tmp_path: Path) -> None:
    """Two tensors of 24 MiB."""
    large = Raw("BF16", (12, MIB), data_of(24 * MIB, 100, 3))
    checkpoint = open_checkpoint(write(tmp_path / "model", {EMBEDDING: large, **blocks(), HEAD: large}))
    tracemalloc.start()
    assert fold_equal_tensors(checkpoint, "pread").views
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_plan_says_what_only_a_split_can_know(tmp_path: Path) -> None:
    """And has the same cuts, in the mode that is the default."""
    source = write(tmp_path / "model", decoder())
    planned = mmsplit.plan(source, 2)
    assert planned.notes[-1] == (
        f"{EMBEDDING} and {HEAD} have the same dtype and shape, and config.json says they are tied: a split compares"
        " their bytes, and stores equal ones once, with ties as --tied duplicate has them"
    )
    assert sum("tied" in note for note in planned.notes) == 1
    made = mmsplit.split(source, tmp_path / "set", 2).plan
    assert cuts(made) == cuts(planned)
    assert [part.total_bytes for part in made.partitions] == [part.total_bytes for part in planned.partitions]


def cuts(plan: object) -> list[list[str]]:
    return [[layer.name for layer in part.layers] for part in plan.partitions]  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tensors_fold_by_their_bytes_alone(data: st.DataObject) -> None:
    """The classes are those of the bytes, every byte keeps its one fate, and everything comes back."""
    names = [
        "model.embed_tokens.weight",
        "model.embed_positions.weight",
        "lm_head.weight",
        "score.weight",
        "head.weight",
    ]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=5, unique=True))
    kinds = {name: data.draw(st.integers(0, 2)) for name in chosen}
    tensors = {name: matrix(data_of(512, 200, kind)) for name, kind in kinds.items()}
    tensors |= {f"model.layers.{k}.up.weight": matrix(data_of(256 * (k + 1), 200, k)) for k in range(3)}
    order = data.draw(st.permutations(sorted(tensors)))
    cut = data.draw(st.integers(1, len(order) - 1))
    tied = data.draw(st.sampled_from(MODES))
    num_parts = data.draw(st.integers(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        shards = [{name: tensors[name] for name in part} for part in (order[:cut], order[cut:])]
        source = write(Path(folder) / "model", *shards, config=None)
        checkpoint = folded(source)
        same = {
            tuple(sorted((name, *(place.name for place in info.also)))) for name, info in checkpoint.tensors.items()
        }
        by_bytes: dict[object, list[str]] = {}
        for name in tensors:
            by_bytes.setdefault(kinds.get(name, name), []).append(name)
        assert same == {tuple(sorted(members)) for members in by_bytes.values()}
        require_round_trip(source, Path(folder), num_parts, {n: raw.data for n, raw in tensors.items()}, tied=tied)
        request = PlanRequest(num_parts=num_parts, tied=tied)
        before, after = plan_checkpoint(open_checkpoint(source), request), plan_checkpoint(checkpoint, request)
        assert sum(p.total_bytes for p in after.partitions) <= sum(p.total_bytes for p in before.partitions)
        if tied != "colocate":  # what moves to a weight may make its partition larger
            assert max(after.balance.loads) <= max(before.balance.loads)


@pytest.mark.parametrize("tied", MODES)
def test_cut_by_type(tmp_path: Path, tied: str) -> None:
    """Other cuts see the tie as they see one of which no file speaks."""
    source = write(tmp_path / "model", decoder())
    contents = {name: raw.data for name, raw in decoder().items()}
    result = require_round_trip(source, tmp_path, None, contents, split_by="type", tied=tied)
    assert not any(HEAD in names for names in stored_names(result))
    alone = write(tmp_path / "alone", {name: raw for name, raw in decoder().items() if name != HEAD})
    assert cuts(mmsplit.plan(alone, split_by="type", tied=tied)) == cuts(result.plan)


@pytest.mark.parametrize("dtype", ["I16", "F4"])
@pytest.mark.parametrize("config", [TIED, NOT_TIED], ids=["tied", "not tied"])
@pytest.mark.parametrize(
    "cut", [*({"num_parts": 3, "tied": tied} for tied in MODES), {"split_by": "type"}], ids=[*MODES, "type"]
)
def test_an_export_from_the_source_is_that_of_the_set(
    tmp_path: Path, cut: dict[str, object], config: bytes, dtype: str
) -> None:
    """Machines that export their own partitions must mean the same by a partition as those that split."""
    ends = Raw(dtype, (4, 48 * 8 // DTYPES[dtype].bits), data_of(192, 200, 1))
    up = Raw("I16", (64,), data_of(128, 200, 2))
    tensors = {
        EMBEDDING: ends,
        "model.layers.0.mlp.up_proj.weight": up,
        "model.layers.1.mlp.up_proj.weight": up,
        HEAD: ends,
    }
    source = write(tmp_path / "model", tensors, config=config)
    made = mmsplit.split(source, tmp_path / "set", **cut)
    for attempt, part_ids in enumerate([None, *([k] for k in range(made.plan.num_parts))]):
        for to in ("safetensors", "json") if dtype == "I16" else ("safetensors",):
            there = []
            for side, found in (("set", tmp_path / "set"), ("source", source)):
                out = tmp_path / f"{side}-{to}-{attempt}"
                mmsplit.export(found, out, part_ids=part_ids, to=to, **({} if side == "set" else cut))
                there.append({name: data for name, data in tree(out).items() if name != "mmsplit_export.json"})
            assert there[0] == there[1]
