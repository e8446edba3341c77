"""`repartition` gives what a split of the original gives, and hands no damage on."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from arbitrary_checkpoints import cases
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, tree, write_checkpoint
from children import at_bytes, die_at_change, in_child
from hypothesis import given, settings
from hypothesis import strategies as st

import mmsplit
from mmsplit.errors import (
    FormatError,
    IntegrityError,
    MissingPartitionError,
    MmsplitError,
    NoSpaceError,
    OutputExistsError,
    PlanError,
    RequestError,
    SourceChangedError,
)
from mmsplit.planning import NodeRequest
from mmsplit.repartitioning import StoredSource
from mmsplit.sidecar import block_sharing, output_directory
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.plan import read_nodes
from mmsplit.verbs.repartition import repartition
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

TORCH = Path(__file__).parent.parent / "checkpoint" / "torch_fixtures"
GGUF = Path(__file__).parent.parent / "checkpoint" / "gguf_fixtures"
TORCH_FILES = sorted(json.loads((TORCH / "expected.json").read_text())["read"])
GGUF_FILES = ("llama_tied.gguf", "metadata.gguf", "mmproj.gguf", "shapes.gguf", "types.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with an index, small files, a tied head, tensors of more than one chunk."""
    root = tmp_path_factory.mktemp("model") / "model"
    weights = [*llama_weights(5), Weight("model.layers.2.mlp.down_proj.weight", "BF16", (2100, 2100), 200)]
    weights[0] = Weight(weights[0].name, "BF16", (2500, 900), 90)
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc"}
    return write_checkpoint(root, [weights[:6], weights[6:]], index=True, files=files)


@pytest.fixture(scope="module")
def two(model: Path) -> Path:
    """Its set in two partitions."""
    split(model, model.parent / "two", 2)
    return model.parent / "two"


@given(
    case=cases(),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    codec=st.sampled_from(["planes", "zstd", "raw"]),
    tied=st.sampled_from([None, "duplicate", "reference", "colocate"]),
    tied_before=st.sampled_from(["duplicate", "reference", "colocate"]),
    source_sha256=st.booleans(),
    io=st.sampled_from(["auto", "pread"]),
    direct=st.booleans(),
)
@settings(max_examples=100, deadline=None, database=None)
def test_gives_what_a_fresh_split_gives(
    case, before, after, codec, tied, tied_before, source_sha256, io, direct
) -> None:
    """Every file, manifests included, whatever the cuts and the way to treat ties before and after."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = case.write(root / "model")
        given_options = {"codec": codec, "source_sha256": source_sha256}
        try:
            split(source, root / "set", before, tied=tied_before, **given_options)
            split(source, root / "fresh", after, tied=tied or tied_before, **given_options)
        except PlanError:
            assert max(before, after) > 1  # fewer layers than partitions
            return
        shutil.rmtree(source)
        result = repartition(root / "set", root / "again", after, tied=tied, io=io, direct=direct)
        assert tree(root / "again") == tree(root / "fresh")
        assert result.encoded_bytes == 0
        assert result.copied_bytes == sum(entry.stored_bytes for entry in result.partitions)


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("path", [*(TORCH / name for name in TORCH_FILES), *(GGUF / name for name in GGUF_FILES)])
def test_of_other_forms_of_weights(tmp_path: Path, path: Path, tied: str) -> None:
    """PyTorch files with their views, GGUF files with their metadata for a config."""
    source = tmp_path / "source" / path.name
    source.parent.mkdir()
    shutil.copy(path, source)
    parts = min(3, len(mmsplit.plan(source, 1, allow_unknown_dtypes=True).partitions[0].layers))
    options = {"tied": tied, "allow_unknown_dtypes": True}
    split(source, tmp_path / "set", 1, **options)
    split(source, tmp_path / "fresh", parts, **options)
    repartition(tmp_path / "set", tmp_path / "again", parts)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    repartition(tmp_path / "again", tmp_path / "back", 1)
    assert tree(tmp_path / "back") == tree(tmp_path / "set")


def test_of_gguf_files_that_are_one_model(tmp_path: Path) -> None:
    """All parts of it."""
    source = tmp_path / "source"
    source.mkdir()
    for path in GGUF.glob("split-*.gguf"):
        shutil.copy(path, source)
    split(source, tmp_path / "set", 2)
    split(source, tmp_path / "fresh", 1)
    repartition(tmp_path / "set", tmp_path / "again", 1)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")


def test_equal_bytes_that_are_stored_once_stay_so(tmp_path: Path) -> None:
    """Which places are equal stands in no header, but in the set."""
    weights = llama_weights(3, head=True)
    path = write_checkpoint(tmp_path / "model", [weights])
    shard = bytearray((path / "model.safetensors").read_bytes())
    opened = mmsplit.open_checkpoint(path)
    first, last = (opened.tensors[weights[k].name] for k in (0, -1))
    shard[last.start_offset : last.stop_offset] = shard[first.start_offset : first.stop_offset]
    (path / "model.safetensors").write_bytes(shard)

    split(path, tmp_path / "set", 2)
    split(path, tmp_path / "fresh", 3)
    assert '"also"' in (tmp_path / "fresh" / "partition_0.json").read_text()
    repartition(tmp_path / "set", tmp_path / "again", 3)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    mmsplit.merge(tmp_path / "again", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == shard


@pytest.mark.parametrize(
    "request_",
    [
        {"num_parts": 3, "by": "params"},
        {"num_parts": 3, "by": "layers"},
        {"weights": (3, "1", 2)},
        {"boundaries": ("model.layers.1", "model.layers.4")},
    ],
    ids=str,
)
def test_takes_every_way_to_plan(model: Path, two: Path, tmp_path: Path, request_: dict) -> None:
    """What split can be asked for."""
    split(model, tmp_path / "fresh", **request_)
    repartition(two, tmp_path / "again", **request_)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")


def test_takes_nodes(model: Path, two: Path, tmp_path: Path) -> None:
    """The config that memory is judged by is in the set."""
    (tmp_path / "nodes.toml").write_text(
        '[[node]]\nname = "a"\nmemory = "40 MiB"\n[[node]]\nname = "b"\nmemory = "80 MiB"\n'
    )
    nodes = NodeRequest(nodes=read_nodes(tmp_path / "nodes.toml"))
    split(model, tmp_path / "fresh", nodes=nodes)
    repartition(two, tmp_path / "again", nodes=nodes)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")


def test_of_a_model_of_another_name_and_revision(model: Path, tmp_path: Path) -> None:
    """What the set says of its origin is handed on."""
    options = {"model_id": "org/name", "revision": "abc", "source_sha256": False}
    split(model, tmp_path / "set", 2, **options)
    split(model, tmp_path / "fresh", 4, **options)
    repartition(tmp_path / "set" / SET_MANIFEST_NAME, tmp_path / "again", 4)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")


def test_only_some_partitions(model: Path, two: Path, tmp_path: Path) -> None:
    """Each is that of the whole; with the last of them the set is a set."""
    split(model, tmp_path / "fresh", 3)
    fresh = tree(tmp_path / "fresh")
    result = repartition(two, tmp_path / "again", 3, only=[1])
    assert result.root_digest is None
    made = tree(tmp_path / "again")
    assert {name for name in made if name.startswith("partition")} == {"partition_1.json", "partition_1.bin"}
    assert made == {name: fresh[name] for name in made}
    assert repartition(two, tmp_path / "again", 3, only=[0, 2]).root_digest is not None
    assert tree(tmp_path / "again") == fresh


def test_only_needs_the_payloads_that_hold_its_bytes(model: Path, two: Path, tmp_path: Path) -> None:
    """A node that has some payloads, and all manifests, makes its own; the first missing one is named before a byte."""
    split(model, tmp_path / "four", 4)
    split(model, tmp_path / "fresh", 2)
    shutil.copytree(tmp_path / "four", tmp_path / "some")
    (tmp_path / "some" / "partition_2.bin").unlink()
    repartition(tmp_path / "some", tmp_path / "again", 2, only=[0])
    name = "partition_0.bin"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    with pytest.raises(MissingPartitionError, match=r"partition_2\.bin"):
        repartition(tmp_path / "some", tmp_path / "again2", 2)
    assert not (tmp_path / "again2").exists()


def test_tied_weight_comes_from_whichever_copy_is_there(model: Path, two: Path, tmp_path: Path) -> None:
    """The embedding is in both partitions; one of them is enough for a partition that has just that."""
    some = Path(shutil.copytree(two, tmp_path / "some"))
    split(model, tmp_path / "fresh", boundaries=("model.norm",))
    (some / "partition_0.bin").unlink()
    repartition(some, tmp_path / "again", boundaries=("model.norm",), only=[1])
    assert tree(tmp_path / "again").items() <= tree(tmp_path / "fresh").items()


def _chunks(path: Path) -> list[tuple[str, int, int]]:
    with open_partition_files(path) as partition:
        return [
            (partition.tensors[int(record["tensor"])].name, *partition.encoded(chunk)[:2])
            for chunk, record in enumerate(partition.index)
        ]


def test_damaged_chunk_is_not_handed_on(two: Path, tmp_path: Path) -> None:
    """Whichever it is: the error says tensor and byte, and no set comes out of it."""
    places = [(part_id, *chunk) for part_id in range(2) for chunk in _chunks(two / f"partition_{part_id}.json")]
    assert len(places) > 10
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    for number, (part_id, tensor, start, stop) in enumerate(places):
        payload = damaged / f"partition_{part_id}.bin"
        flip(payload, (start + stop) // 2)
        out = tmp_path / str(number)
        if (part_id, tensor) == (1, "model.embed_tokens.weight"):  # the other copy of the tied weight is taken
            repartition(damaged, out, 3)
            assert verify(out, level="full").ok
        else:
            with pytest.raises(IntegrityError) as raised:
                repartition(damaged, out, 3)
            assert (raised.value.path, raised.value.tensor, raised.value.offset) == (str(payload), tensor, start)
            with pytest.raises(FormatError):
                verify(out)
        flip(payload, (start + stop) // 2)


@pytest.mark.parametrize(
    ("name", "offset", "error"),
    [
        ("partition_set.json", 200, IntegrityError),
        ("partition_1.json", 300, IntegrityError),
        ("config.json", 3, IntegrityError),
        ("partition_1.bin", 100, IntegrityError),
        ("partition_1.bin", -100, IntegrityError),
    ],
)
def test_damage_anywhere_else_is_an_error_before_a_byte(
    two: Path, tmp_path: Path, name: str, offset: int, error: type[MmsplitError]
) -> None:
    """Manifests, small files, headers and tails."""
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    flip(damaged / name, offset % (damaged / name).stat().st_size)
    with pytest.raises(error):
        repartition(damaged, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bytes_between_chunks_that_are_not_zero_are_left_behind(model: Path, two: Path, tmp_path: Path) -> None:
    """They are damage of the input, which verify finds, but lose nothing."""
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    chunks = _chunks(two / "partition_0.json")
    gaps = [(a[2], b[1]) for a, b in itertools.pairwise(chunks) if a[2] < b[1]]
    flip(damaged / "partition_0.bin", gaps[0][0])
    assert not verify(damaged).ok
    split(model, tmp_path / "fresh", 3)
    repartition(damaged, tmp_path / "again", 3)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("shares", ["all", "refused at once"])
def test_blocks_are_shared_where_the_file_system_can(
    model: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: str
) -> None:
    """The same bytes either way; nothing is asked of a file system that refused once.  Padding is compared, too."""
    asked = []

    def share(fd: int, start: int, target_fd: int, offset: int, size_bytes: int) -> bool:
        asked.append(size_bytes)
        if shares != "all":
            return False
        block_sharing.copy_blocks(fd, start, target_fd, offset, size_bytes)
        return True

    monkeypatch.setattr(block_sharing, "share_blocks", share)
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    chunks = _chunks(two / "partition_0.json")
    flip(damaged / "partition_0.bin", next(a[2] for a, b in itertools.pairwise(chunks) if a[2] < b[1]))
    split(model, tmp_path / "fresh", 3)
    result = repartition(damaged, tmp_path / "again", 3, threads=1)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    stored = sum(entry.stored_bytes for entry in result.partitions)
    assert result.copied_bytes + result.shared_bytes == stored
    if shares == "all":
        assert stored // 2 < result.shared_bytes < stored
    else:
        assert len(asked) <= 7  # threads that had asked before the first answer
        assert result.shared_bytes == 0


def test_what_is_cut_otherwise_is_encoded_again(model: Path, two: Path, tmp_path: Path, monkeypatch) -> None:
    """A chunk that the set does not have as such is made from decoded ones, and is the same."""
    split(model, tmp_path / "fresh", 3)
    real = StoredSource.place_of

    def place_of(self, chunk):
        return None if chunk.tensor.name.endswith("proj.weight") else real(self, chunk)

    monkeypatch.setattr(StoredSource, "place_of", place_of)
    result = repartition(two, tmp_path / "again", 3)
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    opened = mmsplit.open_checkpoint(model)
    assert result.encoded_bytes == sum(t.size_bytes for t in opened.tensors.values() if t.name.endswith("proj.weight"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_at_any_change_of_the_disk(tmp_path: Path) -> None:
    """Whichever write, rename or removal it dies in: no half set passes, the input stays, a second run completes it."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})
    split(source, tmp_path / "set", 1)
    split(source, tmp_path / "fresh", 2)
    expected, given_set = tree(tmp_path / "fresh"), tree(tmp_path / "set")
    for number in range(1000):
        out = tmp_path / str(number)

        def body(out: Path = out, number: int = number) -> None:
            die_at_change(number)
            repartition(tmp_path / "set", out, 2, threads=1)

        if in_child(body).signal == 0:
            break
        if (out / SET_MANIFEST_NAME).exists():
            assert verify(out).ok
        elif out.exists():
            with pytest.raises(FormatError):
                verify(out)
        repartition(tmp_path / "set", out, 2, threads=2, existing="resume")
        assert tree(out) == expected, number
    assert number > 40
    assert tree(tmp_path / "set") == given_set


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_resume_keeps_what_is_there(tmp_path: Path) -> None:
    """And takes nothing for granted that came from another set."""
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (1280, 2048), 90) for k in range(6)]
    for seed in (0, 1):
        source = write_checkpoint(tmp_path / f"model{seed}", [weights], seed=seed)
        split(source, tmp_path / f"set{seed}", 1, model_id="m")
    split(tmp_path / "model0", tmp_path / "fresh", 2, model_id="m")
    stop = at_bytes("copy", 14 * MIB)
    ending = in_child(lambda: repartition(tmp_path / "set0", tmp_path / "out", 2, threads=1, progress=stop))
    assert ending.signal == 9
    with pytest.raises(OutputExistsError):
        repartition(tmp_path / "set0", tmp_path / "out", 2)
    with pytest.raises(SourceChangedError):
        repartition(tmp_path / "set1", tmp_path / "out", 2, existing="resume")
    result = repartition(tmp_path / "set0", tmp_path / "out", 2, existing="resume")
    assert result.resumed_bytes > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert repartition(tmp_path / "set0", tmp_path / "out", 2, existing="resume").already_finished
    with pytest.raises(OutputExistsError, match="other weights"):
        repartition(tmp_path / "set1", tmp_path / "out", 2, existing="resume")
    repartition(tmp_path / "set1", tmp_path / "out", 2, existing="force")
    split(tmp_path / "model1", tmp_path / "fresh1", 2, model_id="m")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh1")


def test_finished_set_that_lacks_what_the_input_has_is_not_the_same(model: Path, two: Path, tmp_path: Path) -> None:
    """A set without the SHA-256 of its shards is not what comes of one that has them."""
    split(model, tmp_path / "out", 3, source_sha256=False)
    with pytest.raises(OutputExistsError, match="SHA-256"):
        repartition(two, tmp_path / "out", 3, existing="resume")


def test_refuses_before_a_byte(model: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output in the input, one partition for a set, what is no set, impossible plans, too little space."""
    before = tree(two)
    for out in (two, two / "inside"):
        with pytest.raises(RequestError, match="only read"):
            repartition(two, out, 3)
    with pytest.raises(RequestError, match="not the whole model"):
        repartition(two / "partition_0.json", tmp_path / "out", 3)
    with pytest.raises(FormatError, match="no partition set here"):
        repartition(model, tmp_path / "out", 3)
    with pytest.raises(PlanError, match="no possible number"):
        repartition(two, tmp_path / "out", 99)
    with pytest.raises(RequestError, match="no partition 7"):
        repartition(two, tmp_path / "out", 3, only=[7])
    assert not (tmp_path / "out").exists()
    stored = sum((two / f"partition_{k}.bin").stat().st_size for k in range(2))
    monkeypatch.setattr("mmsplit.sidecar.output_directory.free_bytes", lambda _: stored // 2)
    with pytest.raises(NoSpaceError):
        repartition(two, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: stored + 200_000)
    repartition(two, tmp_path / "out", 3)
    assert tree(two) == before


def test_files_that_are_links_into_the_output_are_refused(tmp_path: Path) -> None:
    """Another view of a set: to replace what is in the output would be to delete what is read."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)])
    split(source, tmp_path / "set", 2)
    (tmp_path / "view").mkdir()
    for path in (tmp_path / "set").iterdir():
        (tmp_path / "view" / path.name).symlink_to(path)
    before = tree(tmp_path / "set")
    with pytest.raises(RequestError, match="links into the output"):
        repartition(tmp_path / "view", tmp_path / "set", 1, existing="force")
    assert tree(tmp_path / "set") == before
