"""`repair` makes a set byte for byte what it was, whatever was damaged, and says what it cannot repair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, sample, tree, write_checkpoint

from mmsplit.checkpoint import open_checkpoint
from mmsplit.errors import FormatError, IntegrityError, OutputError, OutputLockedError, RequestError
from mmsplit.sidecar.chunk_index import CHUNK_RECORD
from mmsplit.sidecar.framing import TRAILER_BYTES
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, format_set_manifest
from mmsplit.sidecar.set_reader import read_set_manifest
from mmsplit.verbs.repair import RepairResult, repair
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; tensors of one chunk and of several, that compress and that do not; a tied head."""
    root = tmp_path_factory.mktemp("model") / "model"
    weights = [*llama_weights(2), Weight("model.layers.1.mlp.big.weight", "BF16", (1536, 2048), 90)]
    weights.append(Weight("model.layers.1.mlp.noise.weight", "U8", (5 * MIB,), 256))
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc", "empty.txt": b""}
    return write_checkpoint(root, [weights[:3], weights[3:]], index=True, files=files)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set of the checkpoint, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 2, model_id="modèle/é", revision="r1")
    return out


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def _chunk(root: Path, part_id: int, number: int) -> tuple[int, int]:
    with open_partition_files(root / f"partition_{part_id}.json", "pread") as partition:
        return partition.encoded(number)[:2]


def _data_stop(root: Path, part_id: int) -> int:
    with open_partition_files(root / f"partition_{part_id}.json", "pread") as partition:
        return partition.manifest.data_stop


def _flip_chunk(part_id: int, number: int) -> Damage:
    return lambda root: flip(root / f"partition_{part_id}.bin", _chunk(root, part_id, number)[0] + 3)


def _overwrite(name: str, start: int, data: bytes) -> None:
    with open(name, "r+b") as file:
        file.seek(start)
        file.write(data)


def _flip_padding(root: Path) -> None:
    flip(root / "partition_0.bin", _chunk(root, 0, 0)[1] + 1)


def _several_chunks(root: Path) -> None:
    with open_partition_files(root / "partition_1.json", "pread") as partition:
        places = [partition.encoded(chunk)[0] for chunk in range(len(partition.index))]
    for place in places[:-1]:
        flip(root / "partition_1.bin", place)


def _cut(name: str, part: float) -> Damage:
    def cut(root: Path) -> None:
        os.truncate(root / name, int((root / name).stat().st_size * part))

    return cut


def _append(name: str) -> Damage:
    def append(root: Path) -> None:
        with open(root / name, "ab") as file:
            file.write(b"more")

    return append


def _remove(*names: str) -> Damage:
    def remove(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return remove


def _flip_at(name: str, offset: int) -> Damage:
    return lambda root: flip(root / name, offset % (root / name).stat().st_size)


def _zero_index(root: Path) -> None:
    _overwrite(str(root / "partition_1.bin"), _data_stop(root, 1), bytes(3 * CHUNK_RECORD.itemsize))


def _all(*damages: Damage) -> Damage:
    def do_all(root: Path) -> None:
        for damage in damages:
            damage(root)

    return do_all


#: What the set itself is enough for.
_SELF: dict[str, Damage] = {
    "nothing": lambda _: None,
    "file header": _flip_at("partition_0.bin", 30),
    "magic": _flip_at("partition_0.bin", 2),
    "version": _flip_at("partition_0.bin", 9),
    "header padding": _flip_at("partition_0.bin", 3000),
    "padding": _flip_padding,
    "trailer": _flip_at("partition_1.bin", -5),
    "manifest copy": _flip_at("partition_1.bin", -90),
    "index and trailer": _all(_zero_index, _flip_at("partition_1.bin", -5)),
    "three index records": _zero_index,
    "manifest flipped": _flip_at("partition_0.json", 200),
    "manifest gone": _remove("partition_0.json"),
    "all manifests gone": _remove("partition_0.json", "partition_1.json"),
    "manifest and trailer": _all(_remove("partition_0.json"), _flip_at("partition_0.bin", -5)),
    "manifest and header": _all(_remove("partition_0.json"), _flip_at("partition_0.bin", 50)),
    "payload too long": _append("partition_0.bin"),
    "manifest too long": _append("partition_0.json"),
    "trailer cut off": lambda root: os.truncate(
        root / "partition_0.bin", (root / "partition_0.bin").stat().st_size - TRAILER_BYTES
    ),
    "manifest gone, trailer cut off": lambda root: _all(_SELF["trailer cut off"], _remove("partition_0.json"))(root),
    "set manifest too long": lambda root: (root / SET_MANIFEST_NAME).write_bytes(
        (root / SET_MANIFEST_NAME).read_bytes() + b"\n"
    ),
}

#: What takes either source.
_EITHER: dict[str, Damage] = {
    "one chunk": _flip_chunk(0, 1),
    "chunk of several": _flip_chunk(1, 4),
    "all chunks but one": _several_chunks,
    "payload cut in half": _cut("partition_1.bin", 0.5),
    "payload cut to its header": lambda root: os.truncate(root / "partition_1.bin", DATA_START),
    "payload empty": _cut("partition_1.bin", 0),
    "payload gone": _remove("partition_1.bin"),
    "both payloads gone": _remove("partition_0.bin", "partition_1.bin"),
    "small file gone": _remove("config.json", "empty.txt"),
    "small file flipped": _flip_at("sub/tokens.txt", 1),
    "everything": _all(
        _flip_chunk(0, 0), _flip_chunk(1, 3), _flip_padding, _flip_at("partition_0.bin", 30), _remove("sub/tokens.txt"),
        _zero_index, _flip_at("partition_1.bin", -5), _remove("partition_0.json"),
    ),
}  # fmt: skip

#: What only another copy of the set has.
_COPY: dict[str, Damage] = {
    "set manifest gone": _remove(SET_MANIFEST_NAME),
    "set manifest flipped": _flip_at(SET_MANIFEST_NAME, 500),
    "a partition gone": _remove("partition_1.json", "partition_1.bin"),
    "manifest and its copy": _all(_remove("partition_1.json"), _flip_at("partition_1.bin", -90)),
    "a manifest and the set manifest": _remove("partition_0.json", SET_MANIFEST_NAME),
}


def _require_whole(result: RepairResult, root: Path, made: Path) -> None:
    assert result.problems == ()
    assert result.ok
    assert tree(root) == tree(made)


@pytest.mark.parametrize("damage", _SELF)
def test_what_the_set_itself_is_enough_for(damaged: Path, made: Path, damage: str) -> None:
    """Manifests, headers, indexes, trailers and padding come back without any source."""
    _SELF[damage](damaged)
    was_sound = tree(damaged) == tree(made)
    assert verify(damaged).ok == was_sound
    planned = repair(damaged, dry_run=True)
    assert planned.ok == was_sound
    result = repair(damaged)
    assert bool(result.mended) != was_sound
    assert result.source_bytes == 0
    assert planned.mended == result.mended
    _require_whole(result, damaged, made)


@pytest.mark.parametrize("kind", ["checkpoint", "copy"])
@pytest.mark.parametrize("damage", {**_SELF, **_EITHER})
def test_from_a_source(damaged: Path, made: Path, source: Path, damage: str, kind: str) -> None:
    """Byte for byte as it was; a dry run before says the same things and changes nothing."""
    {**_SELF, **_EITHER}[damage](damaged)
    before = tree(damaged)
    place = source if kind == "checkpoint" else made
    planned = repair(damaged, place, dry_run=True)
    assert tree(damaged) == before
    result = repair(damaged, place)
    _require_whole(result, damaged, made)
    assert [(item.file, item.what) for item in planned.mended] == [(item.file, item.what) for item in result.mended]
    assert repair(damaged, place).mended == ()


@pytest.mark.parametrize("damage", _COPY)
def test_what_only_a_copy_has(damaged: Path, made: Path, source: Path, damage: str) -> None:
    """The checkpoint does not bring it back, and repair says so and what would; a copy does."""
    _COPY[damage](damaged)
    result = repair(damaged, source)
    assert not result.ok
    assert any("another copy of the set" in fault.what for fault in result.problems)
    _require_whole(repair(damaged, [source, made]), damaged, made)


@pytest.mark.parametrize("damage", _EITHER)
def test_without_a_source_it_says_what_is_left(damaged: Path, damage: str) -> None:
    """What is left is what verify finds then."""
    _EITHER[damage](damaged)
    result = repair(damaged)
    assert not result.ok
    assert result.problems
    left = {Path(fault.file).name for fault in verify(damaged).problems}
    assert left == {Path(fault.file).name for fault in result.problems}


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_of_any_file(damaged: Path, made: Path, source: Path, seed: int) -> None:
    """Bits flipped at random in every file at once; the checkpoint brings all back but what only a copy has."""
    for name, data in tree(made).items():
        if data and name != SET_MANIFEST_NAME:
            path = damaged / name
            changed = bytearray(data)
            for offset in sample(range(len(data)), 3, seed):
                changed[offset] ^= 1 << seed
            path.write_bytes(changed)
    _require_whole(repair(damaged, [source, made]), damaged, made)


def test_every_byte_of_header_index_and_trailer(damaged: Path, made: Path) -> None:
    """One flipped bit anywhere around the data is repaired by the set itself; many in the index, too."""
    path = damaged / "partition_0.bin"
    data = bytearray(path.read_bytes())
    data_stop = _data_stop(made, 0)
    index = range(data_stop, data_stop + CHUNK_RECORD.itemsize * 3)
    for number, offset in enumerate([*range(0, 100, 3), *index, *range(len(data) - 64, len(data))]):
        bit = 1 << number % 8
        data[offset] ^= bit
        path.write_bytes(data)
        data[offset] ^= bit
        result = repair(damaged, only=[0], threads=1)
        assert result.ok, (offset, result.problems)
        assert path.read_bytes() == bytes(data), offset


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_other_codecs(source: Path, tmp_path: Path, codec: str) -> None:
    """A chunk is encoded again as its record says, and an index is found again from frames and raw chunks."""
    split(source, tmp_path / "set", 2, codec=codec)
    root = Path(shutil.copytree(tmp_path / "set", tmp_path / "damaged"))
    _flip_chunk(1, 2)(root)
    _zero_index(root)
    _flip_chunk(0, 0)(root)
    _require_whole(repair(root, source), root, tmp_path / "set")


def test_only_the_damaged_chunk_is_read_and_written(
    damaged: Path, made: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint its raw bytes, from a copy its stored ones; no other byte of the payload is written."""
    written: list[tuple[int, int]] = []
    write = PayloadFile.write

    def note(self: PayloadFile, offset: int, data: bytes | memoryview) -> None:
        written.append((offset, offset + len(data)))
        write(self, offset, data)

    monkeypatch.setattr(PayloadFile, "write", note)
    start, stop = _chunk(made, 1, 5)
    with open_partition_files(made / "partition_1.json", "pread") as partition:
        raw_bytes = int(partition.index[5]["raw_bytes"])
    for place, expected in ((source, raw_bytes), (made, stop - start)):
        written.clear()
        flip(damaged / "partition_1.bin", (start + stop) // 2)
        result = repair(damaged, place)
        assert (result.source_bytes, written) == (expected, [(start, stop)])
        (item,) = result.mended
        assert (item.what, item.start, item.stop, item.partition, item.source) == ("chunk", start, stop, 1, str(place))
    assert tree(damaged) == tree(made)


def test_a_source_with_other_weights_mends_nothing(damaged: Path, source: Path, made: Path, tmp_path: Path) -> None:
    """The chunk it has is not the one that was split: nothing is written, and the message says whose fault it is."""
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensor = open_checkpoint(other).tensors["model.layers.1.mlp.noise.weight"]
    flip(other / tensor.shard, tensor.start_offset + 7)
    with open_partition_files(damaged / "partition_1.json", "pread") as partition:
        entry = next(t for t in partition.tensors if t.name == tensor.name)
    _flip_chunk(1, entry.first_chunk)(damaged)
    before = tree(damaged)
    (fault,) = repair(damaged, other).problems
    assert "source bytes are not those that were split" in fault.what
    assert (fault.tensor, fault.chunk) == (tensor.name, entry.first_chunk)
    assert tree(damaged) == before
    (damaged / "partition_1.bin").unlink()
    (fault,) = repair(damaged, other).problems
    assert "source bytes are not those that were split" in fault.what
    assert not (damaged / "partition_1.bin").exists()
    _require_whole(repair(damaged, [other, source]), damaged, made)


def test_an_encoder_that_gives_other_bytes_is_no_source(
    damaged: Path, made: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of zstd: a chunk of other bytes never replaces the recorded one; raw chunks do not care."""
    import mmsplit.repairing.sources as sources

    encode = sources.ChunkEncoder.encode

    def longer(self: object, raw: memoryview, dtype: str, out: memoryview) -> object:
        encoded = encode(self, raw, dtype, out)  # type: ignore[arg-type]
        return encoded._replace(stored_bytes=encoded.stored_bytes - 1) if encoded.codec else encoded

    monkeypatch.setattr(sources.ChunkEncoder, "encode", longer)
    with open_partition_files(made / "partition_1.json", "pread") as partition:
        codecs = [int(record["codec"]) for record in partition.index]
    _flip_chunk(1, codecs.index(2))(damaged)
    before = tree(damaged)
    result = repair(damaged, source)
    assert "does not give the bytes that were stored" in result.problems[0].what
    assert tree(damaged) == before
    _flip_chunk(1, codecs.index(0))(damaged)
    assert len(repair(damaged, source).mended) == 1
    (damaged / "partition_0.bin").unlink()
    assert any("encodes to other bytes" in fault.what for fault in repair(damaged, source).problems)
    assert not list(damaged.glob("*.partial"))
    _require_whole(repair(damaged, [source, made]), damaged, made)


def test_a_tied_weight_is_repaired_from_its_other_copy(damaged: Path, made: Path) -> None:
    """The head's partition has the embedding once more: each copy repairs the other, without any source."""
    places = {}
    for part_id in (0, 1):
        with open_partition_files(made / f"partition_{part_id}.json", "pread") as partition:
            tied = next(tensor for tensor in partition.tensors if tensor.name == "model.embed_tokens.weight")
            places[part_id] = partition.encoded(tied.first_chunk)[0]
    for part_id, place in places.items():
        flip(damaged / f"partition_{part_id}.bin", place)
        planned = repair(damaged, dry_run=True)
        assert [item.source for item in planned.mended] == ["the set itself"]
        result = repair(damaged)
        assert result.mended == planned.mended
        _require_whole(result, damaged, made)
    for part_id, place in places.items():
        flip(damaged / f"partition_{part_id}.bin", place)
    result = repair(damaged)
    assert [fault.partition for fault in result.problems] == [0, 1]
    assert "the set itself: it does not give the bytes that were stored" in result.problems[0].what
    _require_whole(repair(damaged, made), damaged, made)


def test_a_damaged_copy_gives_what_it_has(damaged: Path, made: Path, tmp_path: Path) -> None:
    """Two copies, each damaged elsewhere, repair each other; damaged at the same place, neither helps."""
    other = Path(shutil.copytree(made, tmp_path / "other"))
    _flip_chunk(1, 2)(damaged)
    _flip_chunk(1, 3)(other)
    (other / SET_MANIFEST_NAME).unlink()
    _require_whole(repair(damaged, other), damaged, made)
    _flip_chunk(1, 3)(damaged)
    (fault,) = repair(damaged, other).problems
    assert "does not give the bytes that were stored" in fault.what
    _require_whole(repair(damaged, [other, made]), damaged, made)


def test_a_copy_that_is_another_set_changes_nothing(damaged: Path, source: Path, tmp_path: Path) -> None:
    """Not a manifest, not a chunk of it is taken for ours."""
    split(source, tmp_path / "other", 2, codec="raw", model_id="modèle/é", revision="r1")
    _remove(SET_MANIFEST_NAME, "partition_0.json")(damaged)
    _flip_chunk(1, 5)(damaged)
    result = repair(damaged, tmp_path / "other")
    assert not result.ok
    assert any("is another than the one here" in fault.what for fault in result.problems)
    assert not (damaged / SET_MANIFEST_NAME).exists()


@pytest.mark.parametrize("model_id", ["thing", "a-longer-name"])
def test_a_copy_of_another_name_is_called_that(source: Path, tmp_path: Path, model_id: str) -> None:
    """A sound copy that differs in nothing but the model id is not called damaged."""
    split(source, tmp_path / "set", 2, model_id="other")
    split(source, tmp_path / "copy", 2, model_id=model_id)
    (tmp_path / "set" / "partition_0.bin").unlink()
    result = repair(tmp_path / "set", tmp_path / "copy")
    assert len(result.problems) == 1
    assert f"is not the one of this set: its model id is '{model_id}', not 'other'" in result.problems[0].what


@pytest.mark.parametrize("kind", ["swapped", "swapped, and damaged", "other set"])
def test_a_sound_payload_of_another_partition_is_not_written_over(
    damaged: Path, made: Path, source: Path, tmp_path: Path, kind: str
) -> None:
    """It may be the only copy of what it holds."""
    if kind != "other set":
        (damaged / "partition_0.bin").rename(damaged / "x")
        (damaged / "partition_1.bin").rename(damaged / "partition_0.bin")
        (damaged / "x").rename(damaged / "partition_1.bin")
        if kind != "swapped":
            for name in ("partition_0.bin", "partition_1.bin"):
                _flip_at(name, -5)(damaged)
    else:
        split(source, tmp_path / "other", 2, codec="raw", model_id="modèle/é", revision="r1")
        shutil.copyfile(tmp_path / "other" / "partition_0.bin", damaged / "partition_0.bin")
    before = tree(damaged)
    for place in (source, made, None):
        result = repair(damaged, place)
        assert all("move it away" in fault.what for fault in result.problems)
        assert not result.ok
        assert tree(damaged) == before
    for path in damaged.glob("*.bin"):
        path.unlink()
    _require_whole(repair(damaged, source), damaged, made)


def test_foreign_bytes_under_the_name_of_a_payload(damaged: Path, made: Path) -> None:
    """A file that shares nothing with the partition is somebody's, and stays."""
    path = damaged / "partition_1.bin"
    path.write_bytes(os.urandom(path.stat().st_size))
    before = path.read_bytes()
    assert "holds no byte of this partition" in repair(damaged, made).problems[0].what
    assert path.read_bytes() == before


def test_decoding_finds_what_was_stored_wrong(damaged: Path, made: Path, source: Path) -> None:
    """Level full sees it, and repair does not claim to mend what its own records say."""
    assert repair(damaged, source, level="full").mended == ()
    _flip_chunk(0, 0)(damaged)
    assert repair(damaged, source, level="quick").mended == ()
    _require_whole(repair(damaged, source, level="full"), damaged, made)


@pytest.mark.parametrize("kind", ["checkpoint", "copy"])
@pytest.mark.parametrize("length", [DATA_START, 5 * MIB, -1, -200])
def test_what_is_cut_off_is_no_matter_of_level(damaged: Path, made: Path, source: Path, kind: str, length: int) -> None:
    """Level quick reads no chunk, but one that is not there is not made up of zeros."""
    path = damaged / "partition_1.bin"
    os.truncate(path, length if length > 0 else path.stat().st_size + length)
    _require_whole(repair(damaged, source if kind == "checkpoint" else made, level="quick"), damaged, made)


def test_rebuild_manifest(damaged: Path, made: Path) -> None:
    """The JSON comes back from the payload, and nothing else is looked at."""
    _remove("partition_0.json", "partition_1.json")(damaged)
    start = _chunk(made, 0, 0)[0]
    flip(damaged / "partition_0.bin", start)
    result = repair(damaged, rebuild_manifest=True)
    assert (result.ok, len(result.mended)) == (True, 2)
    flip(damaged / "partition_0.bin", start)
    assert tree(damaged) == tree(made)


def test_single_partitions(damaged: Path, made: Path, source: Path) -> None:
    """A node's own partition is repaired by its name, with and without the set manifest beside it."""
    for name in ("partition_0.json", "partition_0.bin"):
        (damaged / name).unlink()
    for _ in range(2):
        _flip_chunk(1, 1)(damaged)
        _flip_at("partition_1.bin", 30)(damaged)
        (damaged / "partition_1.json").unlink()
        assert repair(damaged / "partition_1.bin", source).ok
        for name in ("partition_1.json", "partition_1.bin"):
            assert (damaged / name).read_bytes() == (made / name).read_bytes()
        (damaged / SET_MANIFEST_NAME).unlink(missing_ok=True)
    (damaged / "partition_1.bin").unlink()
    result = repair(damaged / "partition_1.json", [made, source])
    assert "set manifest" in result.problems[0].what
    assert (damaged / "partition_1.json").exists()


def test_only_some_partitions(damaged: Path, made: Path) -> None:
    """A node that has one partition of a set does not get the others by a repair of its own."""
    _remove("partition_0.json", "partition_0.bin")(damaged)
    _flip_chunk(1, 1)(damaged)
    result = repair(damaged, made, only=[1])
    assert (result.ok, result.partitions) == (True, (1,))
    assert not (damaged / "partition_0.bin").exists()
    with pytest.raises(RequestError, match="no partition 2"):
        repair(damaged, made, only=[2])


def test_a_root_digest_is_demanded(damaged: Path, made: Path) -> None:
    """The set here, or the one that a copy brings, must be the one asked for."""
    right = repair(made).root_digest
    assert right is not None
    assert repair(damaged, root_digest=right).ok
    with pytest.raises(IntegrityError, match="another set than the one of this root digest"):
        repair(damaged, root_digest="sha256:" + "0" * 64)
    with pytest.raises(RequestError, match="not a root digest"):
        repair(damaged, root_digest="abc")
    (damaged / SET_MANIFEST_NAME).unlink()
    result = repair(damaged, made, root_digest="0" * 64)
    assert "another set than the one of this root digest" in result.problems[0].what
    _require_whole(repair(damaged, made, root_digest=right), damaged, made)


def test_what_nothing_ties_to_the_root_is_left_alone(damaged: Path, made: Path, source: Path) -> None:
    """Without the set manifest nothing says what the partitions should be, so none of them is written to."""
    right = repair(made).root_digest
    (damaged / SET_MANIFEST_NAME).unlink()
    _flip_chunk(0, 0)(damaged)
    (damaged / "partition_1.json").unlink()
    before = tree(damaged)
    for path in (damaged, damaged / "partition_0.json"):
        result = repair(path, source, root_digest=right)
        assert (result.ok, result.partitions, len(result.problems)) == (False, (), 1)
        assert tree(damaged) == before
    _require_whole(repair(damaged, [source, made], root_digest=right), damaged, made)


def test_manifests_that_contradict_each_other(damaged: Path) -> None:
    """A set manifest of another payload length, everything else sound, is no reason to cut the payload."""
    manifest = read_set_manifest(damaged)
    first = manifest.partitions[0]._replace(payload_bytes=manifest.partitions[0].payload_bytes - 1)
    changed = manifest._replace(partitions=(first, *manifest.partitions[1:]))
    (damaged / SET_MANIFEST_NAME).write_bytes(format_set_manifest(changed))
    before = tree(damaged)
    result = repair(damaged)
    assert [fault.what for fault in result.problems] == ["set manifest and partition manifest say other lengths"]
    assert tree(damaged) == before


def test_a_copy_that_only_a_root_digest_speaks_for(damaged: Path, made: Path) -> None:
    """With no sound manifest left, nothing but the digest says that the copy is of the same set."""
    right = repair(made).root_digest
    for name in tree(damaged):
        if name.startswith("partition_"):
            (damaged / name).unlink()
    (damaged / "partition_0.json").write_bytes(b"{")
    (damaged / "partition_0.bin").write_bytes(b"")
    assert any("nothing here says" in fault.what for fault in repair(damaged, made).problems)
    _require_whole(repair(damaged, made, root_digest=right), damaged, made)


def _wrong_chunks(root: Path, made: Path) -> set[tuple[int, int]]:
    """Partition and number of each chunk whose bytes are not those that were written."""
    wrong = set()
    for part_id in range(2):
        with open_partition_files(made / f"partition_{part_id}.json", "pread") as partition:
            places = [partition.encoded(chunk)[:2] for chunk in range(len(partition.index))]
        right, there = ((place / f"partition_{part_id}.bin").read_bytes() for place in (made, root))
        wrong |= {(part_id, k) for k, (start, stop) in enumerate(places) if right[start:stop] != there[start:stop]}
    return wrong


def test_interrupted_at_every_write_it_goes_on(
    damaged: Path, made: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write fails in turn, half of it done: nothing else is damaged by it, and the next repair ends it."""
    _EITHER["everything"](damaged)
    everything, wrong = tree(damaged), _wrong_chunks(damaged, made)
    from mmsplit.sidecar import output_files, payload_file

    write_all = output_files.write_all
    state = {"left": 0}

    def write_half(fd: int, data: memoryview, offset: int) -> None:
        state["left"] -= 1
        if state["left"] < 0:
            write_all(fd, memoryview(data)[: len(data) // 2], offset)
            raise OSError(5, "Input/output error")
        write_all(fd, memoryview(data), offset)

    monkeypatch.setattr(output_files, "write_all", write_half)
    monkeypatch.setattr(payload_file, "write_all", write_half)
    for writes in range(100):
        shutil.rmtree(damaged)
        for name, data in everything.items():
            (damaged / name).parent.mkdir(parents=True, exist_ok=True)
            (damaged / name).write_bytes(data)
        state["left"] = writes
        try:
            repair(damaged, source, threads=1)
            break
        except (OutputError, OSError):
            pass
        assert _wrong_chunks(damaged, made) <= wrong
        state["left"] = 10**9
        _require_whole(repair(damaged, source), damaged, made)
    assert writes >= 8
    assert tree(damaged) == tree(made)


def test_what_does_not_read_back_is_not_called_repaired(
    damaged: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes a write and forgets it: the chunk stays on the list."""
    _flip_chunk(1, 5)(damaged)
    monkeypatch.setattr(PayloadFile, "write", lambda *_: None)
    result = repair(damaged, source)
    assert (result.ok, result.mended) == (False, ())
    assert "does not read back" in result.problems[0].what


def test_nobody_else_writes_meanwhile(damaged: Path, source: Path) -> None:
    """The lock of all writers; a dry run needs none."""
    with OutputDirectory(damaged):
        with pytest.raises(OutputLockedError):
            repair(damaged, source)
        assert repair(damaged, source, dry_run=True).ok


def test_requests_that_make_no_sense(damaged: Path, made: Path, tmp_path: Path) -> None:
    """Each is refused before anything is written."""
    before = tree(damaged)
    with pytest.raises(RequestError, match="the set itself"):
        repair(damaged, damaged)
    with pytest.raises(RequestError, match="no such level"):
        repair(damaged, level="fast")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no such directory"):
        repair(damaged, "./nowhere")
    with pytest.raises(RequestError, match="is empty"):
        repair(damaged, "")
    with pytest.raises(RequestError, match="others are asked for"):
        repair(damaged / "partition_0.json", only=[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no partition set here"):
        repair(tmp_path / "empty", made)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "unfinished_split.json").write_text("{}")
    with pytest.raises(FormatError, match="not finished"):
        repair(tmp_path / "unfinished", made)
    assert tree(damaged) == before


def test_a_lost_set_manifest_comes_back_by_the_same_split(damaged: Path, made: Path, source: Path) -> None:
    """As the message says: the split it came from, run again with --resume, moves nothing and writes it."""
    (damaged / SET_MANIFEST_NAME).unlink()
    assert "run again with --resume" in repair(damaged).problems[0].what
    split(source, damaged, 2, model_id="modèle/é", revision="r1", existing="resume")
    assert tree(damaged) == tree(made)


def test_nothing_is_repaired_through_a_folder_that_is_a_link(tmp_path: Path) -> None:
    """A file of somebody else lies where the folder of the set leads."""
    source = write_checkpoint(tmp_path / "model", [llama_weights(2)], files={"sub/x.json": b"{}"})
    split(source, tmp_path / "set", 2)
    shutil.rmtree(tmp_path / "set" / "sub")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "x.json").write_text("of somebody else")
    (tmp_path / "set" / "sub").symlink_to(tmp_path / "shared")
    assert not repair(tmp_path / "set", source).ok
    assert (tmp_path / "shared" / "x.json").read_text() == "of somebody else"
