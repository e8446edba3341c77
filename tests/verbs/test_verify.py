"""`verify` finds every byte that is not as it was written, says where it is, and reports all damage at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, llama_weights, sample, write_checkpoint

from mmsplit.checkpoint import open_checkpoint
from mmsplit.cli import run
from mmsplit.digests import chunk_digest
from mmsplit.errors import CheckpointError, FormatError, MissingShardError, RequestError
from mmsplit.sidecar.chunk_index import CHUNK_RECORD
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import VerifyResult, verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, an index, non-ASCII names, small files; some tensors compress, some do not."""
    root = tmp_path_factory.mktemp("model") / "model"
    weights = llama_weights(1)
    files = {"config.json": CAUSAL_CONFIG, "sub/tokens.txt": b"abc"}
    return write_checkpoint(root, [weights[:3], weights[3:]], index=True, files=files, metadata={"é": "ü"})


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set of the checkpoint, never to be changed: `damaged` is for that."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 2, model_id="modèle/é", revision="r1")
    return out


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def _problems(result: VerifyResult) -> list[str]:
    assert result.ok == (not result.problems)
    return [f"{Path(fault.file).name}: {fault.what}" for fault in result.problems]


@pytest.mark.parametrize("level", ["quick", "stored", "full"])
@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_a_sound_set_has_no_problems(made: Path, source: Path, level: str, io: str) -> None:
    """Nothing is reported where nothing is wrong, whichever way the path is given."""
    for path in (made, made / SET_MANIFEST_NAME, made / "partition_0.json", made / "partition_1.bin"):
        result = verify(path, level=level, io=io, against=source)
        assert (result.problems, result.ok, result.level) == ((), True, level)
        assert result.partition_count == (2 if path in (made, made / SET_MANIFEST_NAME) else 1)
        assert (result.checked_bytes > 0) == (level != "quick")


def _landmarks(payload: Path) -> list[int]:
    """Offsets where something begins or ends: header fields, chunks, padding, index, manifest copy, trailer."""
    with open_partition_files(payload, "pread") as partition:
        index, data_stop, size = partition.index, partition.manifest.data_stop, partition.reader.size_bytes
    places = {*range(100), DATA_START - 1, *range(data_stop, size)}
    for record in index:
        start, stop = int(record["stored_offset"]), int(record["stored_offset"]) + int(record["stored_bytes"])
        places |= {start, start + 9, (start + stop) // 2, stop - 1, min(stop, data_stop - 1)}
    return sorted(places)


def test_any_flipped_bit_of_a_payload_is_found(damaged: Path) -> None:
    """A bit of every byte of header, index, manifest copy and trailer, and of many between, flipped one at a time."""
    name = "partition_1.bin"
    path = damaged / name
    data = bytearray(path.read_bytes())
    between = sample(range(100, len(data)), 250)
    for number, offset in enumerate([*_landmarks(path), *between]):
        bit = 1 << (number * 5 + offset) % 8
        data[offset] ^= bit
        path.write_bytes(data)
        data[offset] ^= bit
        result = verify(path, threads=1)
        assert not result.ok, (offset, bit)
        # It is located: some problem's range in this file holds the byte.
        assert any(
            Path(fault.file).name == name and (fault.start or 0) <= offset < (fault.stop or len(data))
            for fault in result.problems
        ), (offset, result.problems)


def test_every_bit_of_the_manifest_copy_counts(damaged: Path) -> None:
    """A zstd frame has bits that a decoder ignores; the copy's own checksum does not."""
    path = damaged / "partition_1.bin"
    data = bytearray(path.read_bytes())
    with open_partition_files(path, "pread") as partition:
        start = partition.manifest.data_stop + partition.index.nbytes
    for offset in [*range(start, start + 12), *sample(range(start + 12, len(data) - 64), 60)]:
        for bit in range(8):
            data[offset] ^= 1 << bit
            path.write_bytes(data)
            data[offset] ^= 1 << bit
            assert _problems(verify(path, level="quick")) == [
                "partition_1.bin: payload's copy of the manifest is damaged"
            ]


@pytest.mark.parametrize("name", ["partition_1.json", SET_MANIFEST_NAME, "config.json"])
def test_any_flipped_bit_of_a_small_file_is_found(damaged: Path, name: str) -> None:
    """One bit of every byte of the JSON files; a digit of the version that became another is a version not known."""
    path = damaged / name
    data = bytearray(path.read_bytes())
    # A partition answers for itself; the set manifest and the small files are found by verifying the set.
    target = path if name == "partition_1.json" else damaged
    level = "stored" if name == "config.json" else "quick"
    version = data.find(b'"format_version": ') + len(b'"format_version": ')
    for offset in range(len(data)):
        bit = 1 << offset * 3 % 8
        data[offset] ^= bit
        path.write_bytes(data)
        if offset == version and chr(data[offset]).isdecimal():
            with pytest.raises(FormatError, match="version"):
                verify(target)
        else:
            assert not verify(target, level=level, threads=1).ok, (offset, data[max(0, offset - 20) : offset + 20])
        data[offset] ^= bit


@pytest.mark.parametrize("bit", range(8))
def test_bits_that_json_does_not_mind_are_found(damaged: Path, bit: int) -> None:
    """A capital in an escape, a lost line end: the same meaning, but not the bytes that were written."""
    path = damaged / SET_MANIFEST_NAME
    data = path.read_bytes()
    start = data.index(b"\\u00e8")
    for offset in range(start, start + 6):
        flip(path, offset, bit)
        assert not verify(damaged, level="quick").ok
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["partition_0.bin", "partition_0.json", SET_MANIFEST_NAME, "config.json"])
def test_any_truncation_is_found(damaged: Path, name: str) -> None:
    """A file cut at any length, by one byte or down to none, at level quick."""
    path = damaged / name
    data = path.read_bytes()
    for length in [*sample(range(len(data)), 60), 0, 1, 8, 95, 96, 4095, 4096, len(data) - 64, len(data) - 1]:
        if length < len(data):
            path.write_bytes(data[:length])
            assert not verify(damaged, level="quick").ok, length


def test_bytes_too_many_are_found(damaged: Path) -> None:
    """Something appended to a file is damage, too."""
    for name in ("partition_0.bin", "partition_0.json", SET_MANIFEST_NAME, "config.json"):
        path = damaged / name
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        assert not verify(damaged, level="quick").ok, name
        path.write_bytes(data)


def test_damage_is_located(tmp_path: Path) -> None:
    """A problem names partition, layer, tensor and the byte range of the chunk: 4 MiB at most."""
    weights = [*llama_weights(2, head=True), Weight("model.layers.1.mlp.big.weight", "U8", (9 * MIB,), 256)]
    source = write_checkpoint(tmp_path / "model", [weights])
    split(source, tmp_path / "set", 2)
    with open_partition_files(tmp_path / "set" / "partition_1.json", "pread") as partition:
        number = next(k for k, tensor in enumerate(partition.tensors) if tensor.name.endswith("big.weight"))
        record = partition.index[partition.tensors[number].first_chunk + 1]
    start, stored = int(record["stored_offset"]), int(record["stored_bytes"])
    flip(tmp_path / "set" / "partition_1.bin", start + 12345)
    (fault,) = verify(tmp_path / "set").problems
    assert fault[:7] == (
        str(tmp_path / "set" / "partition_1.bin"),
        "stored bytes are damaged",
        start,
        start + stored,
        1,
        "model.layers.1",
        "model.layers.1.mlp.big.weight",
    )
    assert (fault.kind, fault.chunk) == ("chunk", partition.tensors[number].first_chunk + 1)
    assert stored == 4 * MIB


def test_all_damage_is_reported(damaged: Path) -> None:
    """Several things wrong in several files: each has its line, and none hides another."""
    with open_partition_files(damaged / "partition_0.json", "pread") as partition:
        first, last = (int(partition.index[k]["stored_offset"]) for k in (0, -1))
    flip(damaged / "partition_0.bin", first + 1)
    flip(damaged / "partition_0.bin", last + 1)
    flip(damaged / "partition_0.bin", 3000)
    flip(damaged / "partition_0.json", 5)
    flip(damaged / "partition_1.bin", 2)
    flip(damaged / "partition_1.bin", (damaged / "partition_1.bin").stat().st_size - 1)
    (damaged / "sub" / "tokens.txt").unlink()
    flip(damaged / "config.json", 5)
    assert _problems(verify(damaged)) == [
        "config.json: file of the model is not as it was written",
        "partition_0.bin: file header is not that of the manifest's partition",
        "partition_0.bin: stored bytes are damaged",
        "partition_0.bin: stored bytes are damaged",
        "partition_0.json: manifest is not the one the set was made with",
        "partition_0.json: manifest is not the one written with this payload",
        "partition_1.bin: file header is not that of the manifest's partition",
        "partition_1.bin: payload does not end in its trailer; it is damaged or truncated",
        "tokens.txt: file of the model is missing",
    ]


def _remove(name: str) -> Callable[[Path, Path], None]:
    return lambda root, _: (root / name).unlink()


def _swap(suffix: str) -> Callable[[Path, Path], None]:
    def swap(root: Path, other: Path) -> None:
        a, b = root / f"partition_0{suffix}", root / f"partition_1{suffix}"
        a.rename(root / "x"), b.rename(a), (root / "x").rename(b)

    return swap


def _take_from_other(*names: str) -> Callable[[Path, Path], None]:
    def take(root: Path, other: Path) -> None:
        for name in names:
            shutil.copyfile(other / name, root / name)

    return take


def _swap_both(root: Path, other: Path) -> None:
    _swap(".json")(root, other)
    _swap(".bin")(root, other)


_MIX_UPS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "manifest gone": (_remove("partition_0.json"), "partition_0.json: manifest is missing"),
    "payload gone": (_remove("partition_1.bin"), "partition_1.bin: payload is missing"),
    "set manifest gone": (_remove(SET_MANIFEST_NAME), f"{SET_MANIFEST_NAME}: set manifest is missing"),
    "small file gone": (_remove("config.json"), "config.json: file of the model is missing"),
    "payloads swapped": (_swap(".bin"), "partition_0.bin: payload is that of partition 1: out of place"),
    "manifests swapped": (_swap(".json"), "partition_1.json: manifest is not the one the set was made with"),
    "partitions swapped": (_swap_both, "partition_0.json: file holds partition 1, not 0"),
    "stale JSON": (
        _take_from_other("partition_0.json"), "partition_0.json: manifest is not the one written with this payload"),
    "new payload under old JSON": (
        _take_from_other("partition_0.bin"), "partition_0.json: manifest is not the one written with this payload"),
    "partition of another set": (
        _take_from_other("partition_0.json", "partition_0.bin"),
        "partition_0.json: manifest is not the one the set was made with"),
    "set manifest of another set": (
        _take_from_other(SET_MANIFEST_NAME), "partition_0.json: manifest is not the one the set was made with"),
}  # fmt: skip


@pytest.mark.parametrize("mix_up", _MIX_UPS)
def test_files_that_are_gone_or_mixed_up_are_found(damaged: Path, source: Path, tmp_path: Path, mix_up: str) -> None:
    """Each file may be sound in itself; together they are not the set that was written."""
    other = tmp_path / "other"
    split(source, other, 2, codec="raw", model_id="modèle/é", revision="r1")
    act, expected = _MIX_UPS[mix_up]
    act(damaged, other)
    assert expected in _problems(verify(damaged, level="quick"))


def test_one_partition_alone(damaged: Path) -> None:
    """Verified alone, a partition is held to itself, and what is wrong beside it does not matter."""
    flip(damaged / "partition_0.bin", DATA_START)
    (damaged / SET_MANIFEST_NAME).unlink()
    assert verify(damaged / "partition_1.json").ok
    assert verify(damaged / "partition_1.bin").ok
    assert _problems(verify(damaged / "partition_0.bin")) == ["partition_0.bin: stored bytes are damaged"]


@pytest.fixture
def some(source: Path, tmp_path: Path) -> Path:
    """Two partitions of four, made one at a time."""
    for part_id in (1, 3):
        split(source, tmp_path / "some", 4, only=[part_id])
    return tmp_path / "some"


def test_partitions_made_one_at_a_time_are_verified_each(some: Path) -> None:
    """There is no set manifest before the last one is made: that is said, and is no fault."""
    result = verify(some)
    assert (result.ok, result.partition_count, result.single) == (True, 2, ((1, 3), 4))
    assert result.as_json()["single_partitions"] == {"part_ids": (1, 3), "num_parts": 4}
    with pytest.raises(FormatError, match="nothing here ties a partition to the root digest"):
        verify(some, root_digest="sha256:" + "0" * 64)
    flip(some / "partition_3.bin", DATA_START)
    assert _problems(verify(some)) == ["partition_3.bin: stored bytes are damaged"]
    (some / "partition_1.json").unlink()
    assert _problems(verify(some, level="quick")) == ["partition_1.json: manifest is missing"]


def test_where_a_set_manifest_should_be_it_is_missed(some: Path, source: Path, tmp_path: Path) -> None:
    """All partitions are here; those of another split are, too; a pull was interrupted."""
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    split(source, whole, 4)
    assert verify(whole).single is None
    (whole / SET_MANIFEST_NAME).unlink()
    missing = f"{SET_MANIFEST_NAME}: set manifest is missing"
    assert _problems(verify(whole)) == [missing]
    split(source, mixed, 3, only=[0])
    for suffix in (".json", ".bin"):
        shutil.copy(some / f"partition_1{suffix}", mixed)
    assert _problems(verify(mixed)) == [f"{missing}, and the partitions here are of different splits"]
    (some / f"{SET_MANIFEST_NAME}.partial").write_bytes(b"{}")
    assert _problems(verify(some)) == [f"{missing}: a pull into this directory is not finished"]


def test_quick_looks_at_no_chunk(damaged: Path) -> None:
    """Level quick is structure and sizes; it says so by what it counts."""
    flip(damaged / "partition_0.bin", DATA_START)
    result = verify(damaged, level="quick")
    assert (result.ok, result.checked_bytes) == (True, 0)
    assert not verify(damaged, level="stored").ok


def _rewrite_chunk(path: Path) -> None:
    """Give the first chunk other stored bytes, and checksum and digest that fit: an encoder's mistake."""
    import xxhash

    with open_partition_files(path, "pread") as partition:
        manifest, record = partition.manifest, partition.index[0]
    start, stored = int(record["stored_offset"]), int(record["stored_bytes"])
    data = bytearray(path.read_bytes())
    data[start + stored - 1] ^= 1
    at = manifest.data_stop + CHUNK_RECORD.fields["stored_xxh3"][1]
    data[at : at + 8] = xxhash.xxh3_64_intdigest(data[start : start + stored]).to_bytes(8, "little")
    at = manifest.data_stop + CHUNK_RECORD.fields["stored_blake3"][1]
    data[at : at + 32] = chunk_digest(data[start : start + stored])
    path.write_bytes(data)


def test_full_finds_what_decodes_to_other_bytes(damaged: Path) -> None:
    """Where the stored bytes have their checksum but are not those of the source, only decoding tells."""
    _rewrite_chunk(damaged / "partition_0.bin")
    assert _problems(verify(damaged, level="stored")) == ["partition_0.bin: chunk index is damaged"]
    first, second = _problems(verify(damaged, level="full"))
    assert "cannot be decoded" in first or "decoded bytes are not those that were split" in first
    assert second == "partition_0.bin: chunk index is damaged"


def test_an_unknown_version_is_refused_by_name(damaged: Path) -> None:
    """A set or partition of a later version is not damage: the error says which version it would need.

    But a partition that a set of our version lists was of our version, so there it is damage among other damage.
    """
    for name in (SET_MANIFEST_NAME, "partition_0.json"):
        path = damaged / name
        text = path.read_text()
        path.write_text(text.replace('"format_version": 1', '"format_version": 7'))
        with pytest.raises(FormatError, match=r"expected version 1, found 7.*reads format version 7"):
            verify(damaged if name == SET_MANIFEST_NAME else path)
        if name != SET_MANIFEST_NAME:
            assert any("format version" in fault.what for fault in verify(damaged).problems)
        path.write_text(text)
    payload = damaged / "partition_0.bin"
    data = bytearray(payload.read_bytes())
    data[8:96] = (7).to_bytes(4, "little") + bytes(84)
    payload.write_bytes(data)
    with pytest.raises(FormatError, match=r"expected version 1, found 7"):
        verify(payload)
    flip(damaged / "partition_1.bin", 5000)
    faults = verify(damaged).problems
    assert any("format version" in fault.what for fault in faults)
    assert any(fault.file.endswith("partition_1.bin") for fault in faults)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda _: None, "no partition set here"),
        (lambda root: (root / "unfinished_split.json").write_text("{}"), "not finished.*--resume"),
        (
            lambda root: (root / SET_MANIFEST_NAME).write_text('{"format": "other"}'),
            "not the manifest of a partition set",
        ),
    ],
)
def test_what_is_no_set_is_refused(tmp_path: Path, make: Callable[[Path], object], match: str) -> None:
    """Nothing to verify is a mistake of the request, not damage."""
    make(tmp_path)
    with pytest.raises(FormatError, match=match):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.bin", "model.safetensors", "nothing"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    """A path that names no partition is refused as such."""
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "model.bin").write_bytes(b"PK" * 5000)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError):
        verify(tmp_path / name)


def test_an_unknown_level_is_refused(made: Path) -> None:
    """A level that is misspelt does not pass for one that checks less."""
    with pytest.raises(RequestError, match=r"no such level.*quick, stored, full"):
        verify(made, level="ful")


def test_against_a_source_with_another_byte(made: Path, source: Path, tmp_path: Path) -> None:
    """The byte is located in the source: shard, tensor, range."""
    other = Path(shutil.copytree(source, tmp_path / "model"))
    checkpoint = open_checkpoint(other)
    tensor = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    flip(other / tensor.shard, tensor.start_offset + 100)
    (fault,) = verify(made, level="quick", against=other).problems
    assert (fault.file, fault.what) == (str(other / tensor.shard), "source bytes are not those that were split")
    assert (fault.start, fault.stop, fault.tensor) == (tensor.start_offset, tensor.stop_offset, tensor.name)
    assert verify(made, against=source).ok


def test_against_a_source_with_another_header(made: Path, source: Path, tmp_path: Path) -> None:
    """Metadata is part of what merge gives back, so a change there is found; so is a tensor of another form."""
    other = Path(shutil.copytree(source, tmp_path / "model"))
    shard = other / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"\\u00fc"', b'"\\u00fd"', 1))
    assert _problems(verify(made, against=other)) == [f"{shard.name}: source header is not the one that was split"]
    shard.write_bytes(data.replace(b'"BF16"', b'"F16" ', 1))
    problems = _problems(verify(made, against=other))
    assert f"{shard.name}: source has the tensor in another form" in problems
    assert f"{shard.name}: source header is not the one that was split" in problems


def test_against_a_source_that_lacks_a_shard(made: Path, source: Path, tmp_path: Path) -> None:
    """With an index a missing shard is an error of the source; without, its tensors are missed one by one."""
    other = Path(shutil.copytree(source, tmp_path / "model"))
    (other / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingShardError):
        verify(made, against=other)
    problems = _problems(verify(made, against=other / "model-00001-of-00002.safetensors"))
    assert "model-00002-of-00002.safetensors: source shard is missing" in problems
    assert "model-00002-of-00002.safetensors: tensor is missing in the source" in problems
    with pytest.raises(CheckpointError):
        verify(made, against=tmp_path / "nothing")


def test_as_json_has_the_keys_of_the_contract(damaged: Path) -> None:
    """What `verify --json` shows can be written as JSON and has the promised fields."""
    flip(damaged / "partition_0.bin", DATA_START)
    shown = json.loads(json.dumps(verify(damaged).as_json()))
    assert shown["ok"] is False
    assert {"partition", "tensor", "start", "stop", "what"} <= shown["problems"][0].keys()
    assert shown["problems"][0]["partition"] == 0


def test_a_progress_that_ends_where_it_should(made: Path) -> None:
    """The last report says that all was done, and no report goes beyond that."""
    reports = []
    result = verify(made, threads=2, progress=reports.append)
    assert max(report.done_bytes for report in reports) == reports[0].total_bytes >= result.checked_bytes


def test_files_that_cannot_be_read_are_damage(damaged: Path) -> None:
    """A directory in a file's place, or a file without permission, is reported and does not end the rest."""
    for name in ("partition_0.json", "config.json"):
        (damaged / name).unlink()
        (damaged / name).mkdir()
    if os.geteuid() != 0:
        (damaged / "partition_1.bin").chmod(0)
    problems = _problems(verify(damaged))
    assert "partition_0.json: manifest cannot be read: Is a directory" in problems
    assert "config.json: file of the model is missing" in problems


def test_payloads_out_of_place_are_said_of_the_payloads_alone(damaged: Path) -> None:
    """Their manifests are right, and nothing else is wrong."""
    _swap(".bin")(damaged, damaged)
    assert _problems(verify(damaged)) == [
        "partition_0.bin: payload is that of partition 1: out of place",
        "partition_1.bin: payload is that of partition 0: out of place",
    ]
    result = verify(damaged / "partition_0.json")
    assert _problems(result) == ["partition_0.bin: payload is that of partition 1: out of place"]


def test_against_another_model_is_one_problem(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though it has tensors of the same names; repair, which could not help, is not recommended."""
    weights = [Weight(weight.name, weight.dtype, (*weight.shape, 2)) for weight in llama_weights(1)]
    other = write_checkpoint(tmp_path / "other", [weights], files={"config.json": CAUSAL_CONFIG})
    (fault,) = verify(made, against=other).problems
    assert fault.what.startswith("this is another model: ")
    assert Path(fault.file).exists()
    (fault,) = verify(made / "partition_1.json", against=other).problems
    assert fault.what.startswith("this is another model than partition 1 was made from")
    assert run(["verify", str(made), "--against", str(other)]) == 5
    err = capsys.readouterr().err
    assert f"1 problem(s) found, all in {other}; nothing is wrong with {made}" in err
    assert "repair" not in err


def test_what_to_do_names_what_was_given(damaged: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command to copy, and the line on single partitions only where some are missing."""
    flip(damaged / "partition_1.bin", 4096)
    assert run(["verify", str(damaged), "--against", str(source)]) == 5
    assert capsys.readouterr().err == (
        f"mmsplit: 1 problem(s) found. Make what is damaged again with: mmsplit repair {damaged} --from {source}\n"
    )
    for name in ("partition_0.json", "partition_0.bin"):
        (damaged / name).unlink()
    assert run(["verify", str(damaged)]) == 5
    err = capsys.readouterr().err
    assert f"repair {damaged} --from SOURCE\n" in err
    assert f"verifies each by its name: mmsplit verify {damaged / 'partition_K.json'}\n" in err
