"""Splits by type, by expert and by rule, through every verb: what comes out is what went in."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Weight, flip, tree, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import mmsplit
from mmsplit.checkpoint import SourcePlace
from mmsplit.errors import IntegrityError, MissingPartitionError, OutputExistsError, PlanError
from mmsplit.repairing.planned_partition import planned_partition
from mmsplit.sidecar.manifest import parse_manifest

EXPERTS = 5
PACKED = "model.layers.0.mlp.experts.gate_up_proj"
#: More than one chunk, and slices that are no whole number of chunks.
LARGE = (EXPERTS, 1200, 1001)


def moe_weights(kinds: list[str], large: bool = False) -> list[Weight]:
    """A mixture whose layers keep their experts in these ways; the head is tied."""
    weights = [Weight("model.embed_tokens.weight", "BF16", (40, 8)), Weight("model.norm.weight", "F32", (8,))]
    for k, kind in enumerate(kinds):
        at = f"model.layers.{k}"
        weights += [
            Weight(f"{at}.input_layernorm.weight", "F32", (8,), 256),
            Weight(f"{at}.self_attn.q_proj.weight", "BF16", (8, 8)),
            Weight(f"{at}.mlp.gate.weight", "BF16", (EXPERTS, 8)),
        ]
        experts = f"{at}.mlp.experts"
        if kind == "numbered":
            for e in range(EXPERTS):
                weights.append(Weight(f"{experts}.{e}.up_proj.weight", "F8_E4M3", (6, 8)))
                weights.append(Weight(f"{experts}.{e}.up_proj.weight_scale_inv", "F32", (1, 1)))
        elif kind == "packed":
            weights.append(Weight(f"{experts}.gate_up_proj", "BF16", LARGE if large else (EXPERTS, 8, 6), 30))
            weights.append(Weight(f"{experts}.down_proj", "F16", (EXPERTS, 3, 8)))
        elif kind == "MXFP4":
            weights.append(Weight(f"{experts}.gate_up_proj_blocks", "U8", (EXPERTS, 4, 2, 16), 256))
            weights.append(Weight(f"{experts}.gate_up_proj_scales", "U8", (EXPERTS, 4, 2)))
            weights.append(Weight(f"{experts}.gate_up_proj_bias", "BF16", (EXPERTS, 4)))
        elif kind == "four bits":
            weights.append(Weight(f"{experts}.up_proj", "F4", (EXPERTS, 3, 4), 256))
        elif kind == "empty":
            weights.append(Weight(f"{experts}.up_proj", "F32", (EXPERTS, 0, 4)))
    return weights


CONFIG = json.dumps({"architectures": ["MoeForCausalLM"], "num_experts": EXPERTS, "tie_word_embeddings": True}).encode()
KINDS = ["numbered", "packed", "MXFP4", "four bits", "empty", "dense"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    weights = moe_weights(["packed", "numbered"], large=True)
    return write_checkpoint(
        tmp_path / "model", [weights[::2], weights[1::2]], index=True, files={"config.json": CONFIG}
    )


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> Path:
    mmsplit.split(source, tmp_path / "parts", 4, split_by="expert")
    return tmp_path / "parts"


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    cut=st.sampled_from(["type", "expert", "rule"]),
    num_parts=st.integers(2, 7),
    tied=st.sampled_from(["duplicate", "reference", "colocate"]),
    codec=st.sampled_from(["planes", "raw"]),
    shard_count=st.integers(1, 3),
    modulus=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, database=None)
def test_merge_after_any_cut_gives_the_same_bytes(kinds, cut, num_parts, tied, codec, shard_count, modulus) -> None:
    """Every file comes back, the set verifies against the source, and as a whole it has every tensor, once."""

    def rule(tensor: mmsplit.TensorInfo) -> int:
        module = tensor.name.partition("_scale")[0].partition("_blocks")[0]
        return len(module) % modulus

    options = {
        "type": {"split_by": "type"},
        "expert": {"split_by": "expert", "num_parts": num_parts},
        "rule": {"rule": rule},
    }[cut]
    weights = moe_weights(kinds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = [weights[k::shard_count] for k in range(shard_count)]
        source = write_checkpoint(root / "model", shards, index=True, files={"config.json": CONFIG})
        try:
            plan = mmsplit.plan(source, tied=tied, **options)
        except PlanError as error:
            known = (
                "no tensor is of a routed expert",
                "is no possible number",
                "gives nothing",
                "whole number of bytes",
            )
            if not any(text in str(error) for text in known):
                raise
            return
        mmsplit.split(source, root / "set", tied=tied, codec=codec, **options)
        assert mmsplit.verify(root / "set", level="full", against=source).problems == ()
        mmsplit.merge(root / "set", root / "back")
        assert tree(root / "back") == tree(source)
        raw = raw_tensors(source)
        copies = sum(layer.total_bytes for part in plan.partitions for layer in part.layers if layer.alias is not None)
        assert sum(part.total_bytes for part in plan.partitions) == sum(map(len, raw.values())) + copies
        with mmsplit.open_set(root / "set") as whole:
            assert {name: whole[name].tobytes() for name in whole} == raw
            assert {name: array.tobytes() for name, array in whole.load().items()} == raw
            assert whole["lm_head.weight"].tobytes() == raw["model.embed_tokens.weight"]


def raw_tensors(source: Path) -> dict[str, bytes]:
    checkpoint = mmsplit.open_checkpoint(source)
    files = {shard.name: (source / shard.name).read_bytes() for shard in checkpoint.shards}
    return {t.name: files[t.shard][t.start_offset : t.stop_offset] for t in checkpoint.tensors.values()}


def test_a_set_joins_what_a_partition_has_in_part(source: Path, parts: Path) -> None:
    """A partition gives its rows and says so; the set gives the tensor with its true shape and dtype."""
    raw = raw_tensors(source)[PACKED]
    with mmsplit.open_set(parts) as whole:
        found = whole[PACKED]
        assert (found.shape, found.dtype.name, found.tobytes()) == (LARGE, "bfloat16", raw)
        rows = []
        for part_id in (1, 2, 3):
            part = whole.partition(part_id)
            entry = part.entry(PACKED)
            rows.append((entry.rows.start, entry.rows.stop, entry.rows.shape))
            assert part[PACKED].tobytes() == found[entry.rows.start : entry.rows.stop].tobytes()
            assert entry.shape == part[PACKED].shape
        assert rows == [(0, 1, LARGE), (1, 3, LARGE), (3, 5, LARGE)]
        assert PACKED not in whole.partition(0)
        assert PACKED in whole
        assert len(whole) == len(raw_tensors(source))


def test_rows_that_are_not_here(parts: Path) -> None:
    """Without one of its partitions a sliced tensor is not in the set; the others are."""
    for suffix in (".json", ".bin"):
        (parts / f"partition_2{suffix}").unlink()
    with mmsplit.open_set(parts) as whole:
        assert PACKED not in whole
        assert PACKED not in set(whole)
        assert PACKED not in whole.load()
        assert whole.get(PACKED) is None
        with pytest.raises(MissingPartitionError, match="not with all its rows; not here: 2"):
            whole[PACKED]
        assert whole.partition(3)[PACKED].shape == (2, *LARGE[1:])
        assert whole["model.norm.weight"].shape == (8,)


def test_one_partition_at_a_time(source: Path, parts: Path, tmp_path: Path) -> None:
    """`only` makes the same bytes as the whole split, and needs the trunk for none of the experts."""
    out = tmp_path / "one"
    needed = [mmsplit.split(source, out, 4, split_by="expert", only=[k]).needed_bytes for k in (3, 1, 0, 2)]
    assert tree(out) == tree(parts)
    assert sum(needed) == mmsplit.open_checkpoint(source).total_bytes


def test_resume_and_finished(source: Path, parts: Path, tmp_path: Path) -> None:
    """A run that resumes finds slices finished; weights that changed under a slice are found out."""
    result = mmsplit.split(source, parts, 4, split_by="expert", existing="resume")
    assert result.already_finished
    (parts / "partition_set.json").unlink()
    shutil.copytree(source, tmp_path / "other")
    place = mmsplit.open_checkpoint(source).tensors[PACKED]
    path = tmp_path / "other" / place.shard
    data = bytearray(path.read_bytes())
    for offset in range(place.start_offset, place.stop_offset, 1000):
        data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputExistsError, match="other weights"):
        mmsplit.split(tmp_path / "other", parts, 4, split_by="expert", existing="resume", model_id="model")
    assert mmsplit.split(source, parts, 4, split_by="expert", existing="resume").root_digest is not None


def test_verify_against_finds_the_row(source: Path, parts: Path) -> None:
    """Damage in one expert of the source is reported for the partition that has it, at its place in the shard."""
    tensor = mmsplit.open_checkpoint(source).tensors[PACKED]
    offset = tensor.stop_offset - 5
    flip(source / tensor.shard, offset)
    problems = mmsplit.verify(parts, level="quick", against=source).problems
    assert [(p.partition, p.tensor) for p in problems] == [(3, PACKED)]
    assert problems[0].start <= offset < problems[0].stop


def test_verify_against_another_form(source: Path, parts: Path, tmp_path: Path) -> None:
    """A source that has the tensor with another first dimension is not the one that was sliced."""
    weights = [
        w._replace(shape=(LARGE[0] * 2, LARGE[1] // 2, LARGE[2])) if w.name == PACKED else w
        for w in moe_weights(["packed", "numbered"], large=True)
    ]
    other = write_checkpoint(tmp_path / "other", [weights[::2], weights[1::2]], index=True)
    what = {p.what for p in mmsplit.verify(parts, level="quick", against=other).problems if p.tensor == PACKED}
    assert what == {"source has the tensor in another form"}


def test_damage_in_a_slice_names_the_tensor(parts: Path) -> None:
    with mmsplit.open_set(parts) as whole:
        record = whole.partition(2)._files.index[whole.partition(2).entry(PACKED).first_chunk]
    flip(parts / "partition_2.bin", int(record["stored_offset"]) + 7)
    problems = mmsplit.verify(parts).problems
    assert [(p.partition, p.tensor, p.layer) for p in problems] == [(2, PACKED, "model.layers.0.mlp.experts")]
    with mmsplit.open_set(parts) as whole, pytest.raises(IntegrityError, match="gate_up_proj"):
        whole[PACKED]


def test_inspect_and_json(source: Path, parts: Path) -> None:
    """The plan's JSON says which rows; a partition's layers are those of the plan."""
    plan = json.loads(json.dumps(mmsplit.plan(source, 4, split_by="expert").as_json()))
    assert plan["partitions"][2]["label"] == "experts 1-2"
    assert plan["partitions"][2]["layers"][0]["rows"][PACKED] == [1, 3]
    info = mmsplit.inspect(parts / "partition_2.json").as_json()
    assert [layer["layer_type"] for layer in info["layers"]] == ["experts", "experts"]
    tensors = json.loads((parts / "partition_2.json").read_bytes())["layers"][0]["tensors"]
    mentioned = next(tensor for tensor in tensors if tensor["name"] == PACKED)
    assert mentioned["rows"] == {"start": 1, "stop": 3, "shape": list(LARGE)}


# ---------------------------------------------------------------------------------------------- damage, and repair


def chunk_offset(parts: Path, part_id: int, name: str, number: int = 0) -> int:
    """Return where in the payload a chunk of a tensor begins."""
    with mmsplit.open_set(parts) as whole:
        partition = whole.partition(part_id)
        return int(partition._files.index[partition.entry(name).first_chunk + number]["stored_offset"])


def flip_in_every_slice(parts: Path) -> None:
    for part_id in (1, 2, 3):
        flip(parts / f"partition_{part_id}.bin", chunk_offset(parts, part_id, PACKED) + 7)


def flip_the_index(parts: Path) -> None:
    for part_id in (2, 3):
        data_stop = json.loads((parts / f"partition_{part_id}.json").read_bytes())["payload"]["data_stop"]
        flip(parts / f"partition_{part_id}.bin", data_stop + 9)


def lose_payloads(parts: Path) -> None:
    for part_id in (0, 3):
        (parts / f"partition_{part_id}.bin").unlink()


def lose_manifests(parts: Path) -> None:
    for part_id in (0, 1, 2, 3):
        (parts / f"partition_{part_id}.json").unlink()


DAMAGE = {
    "chunks": flip_in_every_slice,
    "index": flip_the_index,
    "payloads": lose_payloads,
    "manifests": lose_manifests,
}


@pytest.mark.parametrize("kind", ["checkpoint", "copy"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_slices_are_repaired(
    source: Path, parts: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    """From the rows of the checkpoint, or from another copy: the set is what it was."""
    sound = Path(shutil.copytree(parts, tmp_path / "sound"))
    damage(parts)
    assert not mmsplit.verify(parts).ok
    assert mmsplit.repair(parts, source=source if kind == "checkpoint" else sound).ok
    assert tree(parts) == tree(sound)


def test_a_manifest_says_what_was_planned(source: Path, parts: Path) -> None:
    """From it alone come the same layers, slices included: what a lost payload is made again by."""
    for planned in mmsplit.plan(source, 4, split_by="expert").partitions:
        path = parts / f"partition_{planned.part_id}.json"
        assert planned_partition(parse_manifest(path.read_bytes(), str(path))).layers == planned.layers


def test_another_slice_is_no_copy(parts: Path) -> None:
    """Slices share a name, and no row: without a source nobody is asked, though a tied weight's copy would be."""
    flip(parts / "partition_2.bin", chunk_offset(parts, 2, PACKED) + 7)
    result = mmsplit.repair(parts)
    assert [(fault.partition, fault.tensor) for fault in result.problems] == [(2, PACKED)]
    assert "no source was given" in result.problems[0].what


def test_a_scrub_of_slices_is_the_whole(parts: Path) -> None:
    """Some chunks each time, in the end all; and the damaged one is found in its turn."""
    whole = mmsplit.verify(parts).checked_bytes
    scrubs = [mmsplit.Scrub(subset=f"{k}/3") for k in (1, 2, 3)]
    assert sum(mmsplit.verify(parts, scrub=scrub).checked_bytes for scrub in scrubs) == whole
    flip(parts / "partition_3.bin", chunk_offset(parts, 3, PACKED) + 7)
    found = [problem for scrub in scrubs for problem in mmsplit.verify(parts, scrub=scrub).problems]
    assert [(problem.partition, problem.tensor) for problem in found] == [(3, PACKED)]


# --------------------------------------------------------------------------------------------- one cut into another

CUTS = [{"num_parts": 1}, {"num_parts": 3}, {"split_by": "type"}, {"split_by": "expert", "num_parts": 4}]


@pytest.mark.parametrize("before", CUTS, ids=str)
@pytest.mark.parametrize("after", [*CUTS, {"split_by": "expert", "num_parts": 3}], ids=str)
def test_any_cut_becomes_any_other(source: Path, tmp_path: Path, before: dict, after: dict) -> None:
    """As a fresh split would have it; slices that begin within a chunk are encoded again, all else is copied."""
    mmsplit.split(source, tmp_path / "set", **before)
    mmsplit.split(source, tmp_path / "fresh", **after)
    result = mmsplit.repartition(tmp_path / "set", tmp_path / "again", **after)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    packed = mmsplit.open_checkpoint(source).tensors[PACKED].size_bytes
    same = before == after or "expert" not in (before.get("split_by"), after.get("split_by"))
    assert (result.encoded_bytes == 0) is same
    assert result.encoded_bytes < 1.1 * packed


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    before=st.sampled_from(CUTS),
    after=st.sampled_from(CUTS),
    codec=st.sampled_from(["planes", "zstd"]),
    tied=st.sampled_from(["duplicate", "reference", "colocate"]),
)
@settings(max_examples=40, deadline=None, database=None)
def test_small_cuts_become_others(kinds, before, after, codec, tied) -> None:
    """Of every way to keep experts."""
    weights = moe_weights(kinds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_checkpoint(root / "model", [weights[::2], weights[1::2]], files={"config.json": CONFIG})
        try:
            mmsplit.split(source, root / "set", tied=tied, codec=codec, **before)
            mmsplit.split(source, root / "fresh", tied=tied, codec=codec, **after)
        except PlanError:
            return
        mmsplit.repartition(root / "set", root / "again", **after)
        assert tree(root / "again") == tree(root / "fresh")


# ------------------------------------------------------------------------------------------- places beside its own


def test_a_slice_is_put_into_every_place_of_its_tensor(tmp_path: Path) -> None:
    """A tensor that lies twice in the source is stored once, in slices; each goes back to both places."""
    shape = (EXPERTS, 8, 6)
    weights = [
        Weight("model.embed_tokens.weight", "BF16", (40, 8)),
        Weight("model.layers.0.mlp.experts.up_proj", "BF16", shape, 256),
        Weight("model.layers.0.mlp.experts.zz_same", "BF16", shape, 256),
    ]
    source = write_checkpoint(tmp_path / "model", [weights[:2], weights[2:]], index=True)
    first, second = (mmsplit.open_checkpoint(source).tensors[weight.name] for weight in weights[1:])
    shards = {name: bytearray((source / name).read_bytes()) for name in (first.shard, second.shard)}
    raw = shards[first.shard][first.start_offset : first.stop_offset]
    shards[second.shard][second.start_offset : second.stop_offset] = raw
    (source / second.shard).write_bytes(shards[second.shard])
    checkpoint = mmsplit.open_checkpoint(source)
    place = SourcePlace(second.name, second.shard, second.start_offset, second.stop_offset)
    checkpoint.tensors[first.name] = first._replace(also=(place,))
    del checkpoint.tensors[second.name]
    result = mmsplit.split(checkpoint, tmp_path / "set", 4, split_by="expert")
    assert sum(part.total_bytes for part in result.plan.partitions) == 40 * 8 * 2 + len(raw)
    mmsplit.repartition(tmp_path / "set", tmp_path / "again", 1)
    for place in ("set", "again"):
        mmsplit.merge(tmp_path / place, tmp_path / f"back of {place}")
        assert tree(tmp_path / f"back of {place}") == tree(source)
    assert mmsplit.verify(tmp_path / "set", level="full", against=source).ok
    flip(tmp_path / "set" / "partition_3.bin", chunk_offset(tmp_path / "set", 3, first.name))
    assert mmsplit.repair(tmp_path / "set", source=checkpoint).ok
    with mmsplit.open_set(tmp_path / "set") as whole:
        assert whole[first.name].tobytes() == raw
