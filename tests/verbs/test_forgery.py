"""Somebody who means harm: whatever he rewrites, and computes anew below the root digest, the root gives him away.

Three attackers.  One makes other bytes with the same xxh3, for which no number needs to change.  One rewrites
everything consistently, digests and root included, so that without a root there is nothing to find; that this is so is
tested as well, or the table would prove nothing.  For the last xxh3 does not exist: any bit, anywhere, with every
checksum taken as right.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from checkpoints import CAUSAL_CONFIG, Weight, flip, sample, tree, write_checkpoint

from mmsplit.cli import run
from mmsplit.codec import PLANES, ChunkDecoder, Encoded
from mmsplit.digests import chunk_digest, sha256_of
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, MmsplitError, RemoteNotFoundError, RequestError
from mmsplit.planning import iter_stored
from mmsplit.repairing.planned_partition import planned_partition
from mmsplit.sidecar.chunk_index import CHUNK_RECORD, tensor_checksum
from mmsplit.sidecar.framing import TRAILER_BYTES, pack_header, parse_trailer
from mmsplit.sidecar.layout import iter_slots
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.payload_tail import pack_tail
from mmsplit.sidecar.scrub_run import Scrub
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.export import export
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.pull import pull
from mmsplit.verbs.repair import RepairLevel, RepairResult, repair
from mmsplit.verbs.repartition import repartition
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

Json = dict[str, Any]
WEIGHTS = [
    Weight("model.embed_tokens.weight", "BF16", (64, 32)),
    Weight("model.layers.0.mlp.up_proj.weight", "BF16", (64, 64)),
    Weight("model.layers.0.norm.weight", "U8", (16,), 256),
    Weight("model.layers.1.mlp.up_proj.weight", "BF16", (64, 64)),
    Weight("model.layers.1.norm.weight", "U8", (16,), 256),
    Weight("model.norm.weight", "F32", (16,), 256),
]


def _colliding() -> tuple[bytes, bytes]:
    """Two texts of 16 bytes with one xxh3-64: for this length it adds, swaps and folds words that anyone can solve."""
    words = bytes.fromhex("b93942ea7b738267d59f3d805cf975ae"), bytes.fromhex("b81a078df2d84f883a5296093bbc56af")
    assert words[0] != words[1]
    assert xxhash.xxh3_64_digest(words[0]) == xxhash.xxh3_64_digest(words[1])
    return words


GENUINE, COLLIDING = _colliding()


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in two partitions, of a model in whose norm weight the colliding bytes are."""
    root = tmp_path_factory.mktemp("genuine")
    source = write_checkpoint(
        root / "model", [WEIGHTS[:3], WEIGHTS[3:]], index=True, files={"config.json": CAUSAL_CONFIG}
    )
    shard = source / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-16] + GENUINE)  # model.layers.0.norm.weight is the last of its shard
    split(source, root / "set", 2)
    return root / "set"


@pytest.fixture
def root_digest(genuine: Path) -> str:
    """What the one who made the set tells by another way."""
    digest: str = json.loads((genuine / SET_MANIFEST_NAME).read_text())["root_digest"]
    return digest


@pytest.fixture
def victim(genuine: Path, tmp_path: Path) -> Path:
    """A copy to be forged."""
    return Path(shutil.copytree(genuine, tmp_path / "set"))


class Forger:
    """Partition `k` and the set manifest taken apart; `write` computes every number anew and puts them together."""

    def __init__(self, root: Path, k: int = 0) -> None:
        self.root = root
        self.k = k
        with open_partition_files(root / f"partition_{k}.json") as partition:
            self.index = partition.index.copy()
            self.chunks = [bytearray(partition.reader.read(*partition.encoded(c)[:2])) for c in range(len(self.index))]
            self.data = bytearray(partition.reader.read(0, partition.manifest.data_stop))
        self.manifest: Json = json.loads((root / f"partition_{k}.json").read_text())
        self.whole: Json = json.loads((root / SET_MANIFEST_NAME).read_text())

    def chunk_of(self, name: str) -> int:
        """Number of the first chunk of a tensor."""
        (entry,) = (t for layer in self.manifest["layers"] for t in layer["tensors"] if t["name"] == name)
        first: int = entry["chunks"][0]
        return first

    def write(self) -> None:
        """Write partition and set manifest so that all in them fits, up to a root digest of their own."""
        self._fit_index()
        text = json.dumps(self.manifest, indent=1).encode()
        digests = self.manifest["plan_digest"], self.manifest["source_digest"]
        header = pack_header(self.k, self.manifest["num_parts"], *digests)
        self.data[: len(header)] = header
        tail = pack_tail(self.index.tobytes(), len(self.data), text)
        (self.root / f"partition_{self.k}.json").write_bytes(text)
        (self.root / f"partition_{self.k}.bin").write_bytes(self.data + tail)
        entry = self.whole["partitions"][self.k]
        entry["manifest_sha256"] = sha256_of(text)
        entry["payload_bytes"] = len(self.data) + len(tail)
        write_set_manifest(self.root, self.whole)

    def raw(self, number: int) -> bytes:
        """Decode a chunk."""
        record = self.index[number]
        encoded = Encoded(int(record["codec"]), int(record["layout"]), int(record["stored_bytes"]))
        raw = bytearray(int(record["raw_bytes"]))
        ChunkDecoder().decode(memoryview(self.chunks[number]), encoded, memoryview(raw))
        return bytes(raw)

    def decodes(self, number: int) -> bool:
        """Whether a chunk is still one."""
        try:
            self.raw(number)
        except IntegrityError:
            return False
        return True

    def _fit_index(self) -> None:
        for number, chunk in enumerate(self.chunks):
            record, start = self.index[number], int(self.index[number]["stored_offset"])
            self.data[start : start + len(chunk)] = chunk
            record["stored_xxh3"] = xxhash.xxh3_64_intdigest(chunk)
            record["stored_blake3"] = np.void(chunk_digest(chunk))
            record["raw_xxh3"] = xxhash.xxh3_64_intdigest(self.raw(number))
        for layer in self.manifest["layers"]:
            for entry in layer["tensors"]:
                first, count = entry["chunks"]
                if layer.get("stored", True):
                    entry["xxh3"] = tensor_checksum(self.index["raw_xxh3"][first : first + count])
        self.manifest["payload"]["index_sha256"] = sha256_of(self.index.tobytes())


def write_set_manifest(root: Path, values: Json) -> None:
    """Write a set manifest with the root digest that fits it."""
    values = {key: value for key, value in values.items() if key != "root_digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["root_digest"] = sha256_of(text.encode())
    (root / SET_MANIFEST_NAME).write_text(json.dumps(values, indent=1) + "\n")


def change_weight(forger: Forger) -> None:
    """Other weights in a chunk that is stored raw."""
    forger.chunks[forger.chunk_of("model.layers.0.norm.weight")][3] ^= 0x10
    forger.whole["source"]["shards"][0]["sha256"] = None  # what a merge would compare


def change_encoded(forger: Forger) -> None:
    """Other weights in a chunk that is compressed."""
    chunk = forger.chunk_of("model.layers.0.mlp.up_proj.weight")
    assert forger.index[chunk]["codec"] == PLANES
    stored = forger.chunks[chunk]
    for offset in range(len(stored) - 1, 0, -1):  # a bit that leaves it a chunk, of other bytes
        stored[offset] ^= 1
        if forger.decodes(chunk):
            break
        stored[offset] ^= 1
    else:
        raise AssertionError("no bit of the chunk is free")
    forger.whole["source"]["shards"][0]["sha256"] = None


def change_codec(forger: Forger) -> None:
    """The same stored bytes, read in another word layout."""
    chunk = forger.chunk_of("model.layers.0.mlp.up_proj.weight")
    assert forger.index[chunk]["layout"] == 4
    forger.index[chunk]["layout"] = 1
    forger.whole["source"]["shards"][0]["sha256"] = None


def change_dtype(forger: Forger) -> None:
    """The same bytes as another type."""
    for layer in forger.manifest["layers"]:
        for entry in layer["tensors"]:
            entry["dtype"] = {"BF16": "F16"}.get(entry["dtype"], entry["dtype"])


def change_layer_name(forger: Forger) -> None:
    """A layer under another name."""
    forger.manifest["layers"][1]["name"] = "model.layers.7"


def change_model_id(forger: Forger) -> None:
    """Another model's name."""
    forger.manifest["model_id"] = forger.whole["model_id"] = "somebody/else"


def change_config(forger: Forger) -> None:
    """A small file, with its digest."""
    text = b'{"architectures": ["Other"]}'
    (forger.root / "config.json").write_bytes(text)
    forger.whole["files"][0] |= {"bytes": len(text), "sha256": sha256_of(text)}


def drop_config(forger: Forger) -> None:
    """A small file that the set does not list any more."""
    (forger.root / "config.json").unlink()
    forger.whole["files"] = []


def change_source_sha256(forger: Forger) -> None:
    """A shard's SHA-256 left out, so that merge compares nothing."""
    forger.whole["source"]["shards"][0]["sha256"] = None


def add_field(forger: Forger) -> None:
    """A field that this reader does not know."""
    forger.whole["later"] = {"addition": 1}


FORGERIES: dict[str, Callable[[Forger], None]] = {
    act.__name__: act
    for act in (
        change_weight, change_encoded, change_codec, change_dtype, change_layer_name, change_model_id,
        change_config, drop_config, change_source_sha256, add_field,
    )
}  # fmt: skip


def refusals(root: Path, digest: str | None, out: Path) -> list[str]:
    """Give a set to everything that takes a root digest; return what refused it."""

    def read_all(opened: Any) -> None:
        with opened as mapping:
            for name in mapping:
                mapping[name]
            mapping.load()

    def require_ok(path: Path) -> None:
        problems = verify(path, level="stored", root_digest=digest, threads=1).problems
        if problems:
            raise IntegrityError(problems[0].what)

    def require_nothing_to_do(result: RepairResult) -> None:
        if not result.ok:
            raise IntegrityError("there is something to repair")

    uses: dict[str, Callable[[], object]] = {
        "verify": lambda: require_ok(root),
        "verify one": lambda: require_ok(root / "partition_0.json"),
        "open_set": lambda: read_all(open_set(root, root_digest=digest, threads=1)),
        "open_partition": lambda: read_all(open_partition(root / "partition_0.bin", root_digest=digest, threads=1)),
        "export": lambda: export(root, out / "exported", to="json", root_digest=digest, threads=1),
        "export one": lambda: export(root / "partition_0.json", out / "exported", root_digest=digest, threads=1),
        "merge": lambda: merge(root, out / "merged", root_digest=digest, threads=1),
        "repartition": lambda: repartition(root, out / "again", 1, root_digest=digest, threads=1),
        "pull": lambda: pull(root, out / "pulled", root_digest=digest, threads=1),
        "repair": lambda: require_nothing_to_do(repair(root, dry_run=True, root_digest=digest, threads=1)),
    }
    refused = []
    for name, use in uses.items():
        try:
            use()
        except (IntegrityError, FormatError, CheckpointError, RemoteNotFoundError):
            refused.append(name)
        finally:
            for made in ("exported", "merged", "pulled", "again"):
                shutil.rmtree(out / made, ignore_errors=True)
    return refused


EVERYTHING = [
    "verify", "verify one", "open_set", "open_partition", "export", "export one", "merge",
    "repartition", "pull", "repair",
]  # fmt: skip


def test_the_genuine_set_is_accepted(genuine: Path, root_digest: str, tmp_path: Path) -> None:
    """With its root, with the root as people write it, and without one."""
    for digest in (None, root_digest, root_digest.removeprefix("sha256:").upper()):
        assert refusals(genuine, digest, tmp_path) == []
    result = verify(genuine, root_digest=root_digest)
    assert (result.root_digest, result.as_json()["root_digest"]) == (root_digest, root_digest)


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_whoever_rewrites_everything_is_found_out_by_the_root(
    forgery: Callable[[Forger], None], victim: Path, root_digest: str, tmp_path: Path
) -> None:
    """And only by it: all that is in the set fits, so that without the root nothing refuses it."""
    forger = Forger(victim)
    forgery(forger)
    forger.write()
    assert verify(victim, level="full").problems == ()
    assert refusals(victim, None, tmp_path) == []
    assert refusals(victim, root_digest, tmp_path) == EVERYTHING


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_whoever_keeps_the_genuine_set_manifest_is_found_out_below_it(
    forgery: Callable[[Forger], None], victim: Path, genuine: Path, root_digest: str, tmp_path: Path
) -> None:
    """The root is right then; the first digest that does not fit is in the partition, or that of a small file."""
    forger = Forger(victim)
    forgery(forger)
    forger.write()
    shutil.copyfile(genuine / SET_MANIFEST_NAME, victim / SET_MANIFEST_NAME)
    changed = {name for name, data in tree(victim).items() if tree(genuine).get(name) != data}
    changed |= set(tree(genuine)) - set(tree(victim))
    if "partition_0.bin" not in changed and "partition_0.json" not in changed:
        assert changed <= {"config.json"}
        expected = ["verify", "export one", "merge", "repartition", "pull", "repair"] if changed else []
    else:
        expected = EVERYTHING
    assert refusals(victim, root_digest, tmp_path) == expected


def test_bytes_of_the_same_xxh3_pass_without_a_root_and_not_with_it(
    victim: Path, root_digest: str, tmp_path: Path
) -> None:
    """One tensor replaced by bytes that its checksums do not tell from it: no number in the set needs to change."""
    path = victim / "partition_0.bin"
    data = path.read_bytes()
    assert data.count(GENUINE) == 1
    path.write_bytes(data.replace(GENUINE, COLLIDING))
    assert verify(victim, level="stored").ok
    with open_set(victim) as opened:
        assert opened["model.layers.0.norm.weight"].tobytes() == COLLIDING
    assert refusals(victim, None, tmp_path) == ["merge", "pull"]  # the shard's SHA-256; what arrives is held to digests
    assert refusals(victim, root_digest, tmp_path) == EVERYTHING
    for level, digest in (("stored", root_digest), ("full", None)):
        (fault,) = verify(victim, level=level, root_digest=digest).problems
        assert "forged" in fault.what
        assert (fault.partition, fault.tensor) == (0, "model.layers.0.norm.weight")
        assert fault.start is not None
        assert data[fault.start : fault.stop] == GENUINE


def put_colliding(root: Path) -> None:
    """Replace one tensor by the bytes that its checksums do not tell from it."""
    path = root / "partition_0.bin"
    path.write_bytes(path.read_bytes().replace(GENUINE, COLLIDING))


@pytest.mark.parametrize("kind", ["checkpoint", "copy"])
@pytest.mark.parametrize(("level", "with_root"), [("stored", True), ("full", True), ("full", False)])
def test_repair_makes_a_forged_chunk_again(
    genuine: Path, victim: Path, root_digest: str, kind: str, level: RepairLevel, with_root: bool
) -> None:
    """Byte for byte, and so with the same root; held to checksums only, there is nothing to repair."""
    put_colliding(victim)
    source = genuine.parent / "model" if kind == "checkpoint" else genuine
    assert repair(victim, source).mended == ()
    assert not verify(victim, root_digest=root_digest).ok
    result = repair(victim, source, level=level, root_digest=root_digest if with_root else None)
    assert [item.tensor for item in result.mended] == ["model.layers.0.norm.weight"]
    assert (result.ok, result.root_digest) == (True, root_digest)
    assert tree(victim) == tree(genuine)
    assert verify(victim, level="full", root_digest=root_digest).ok


def test_rows_in_several_partitions_are_bound_in_each(tmp_path: Path) -> None:
    """A tensor that is joined from slices: the digest of each is compared, also for those who want no checksums."""
    golden = Path(__file__).parent.parent / "sidecar" / "golden" / "v1-experts" / "set"
    root = Path(shutil.copytree(golden, tmp_path / "set"))
    digest = json.loads((root / SET_MANIFEST_NAME).read_text())["root_digest"]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert verify(root, level="full", root_digest=digest).ok
    with open_set(root, root_digest=digest, verify=False) as opened:
        assert opened[name].shape[0] == 5
    with open_partition_files(root / "partition_1.json") as partition:
        (chunk,) = (t.first_chunk for t in partition.tensors if t.name == name)
        start = partition.encoded(chunk)[0]
    flip(root / "partition_1.bin", start + 40)
    with open_set(root, root_digest=digest, verify=False) as opened:
        for read in (lambda: opened[name], lambda: opened.load()):
            with pytest.raises(IntegrityError, match=r"not those that the root digest binds"):
                read()
    with pytest.raises(IntegrityError, match=r"not those that the root digest binds"):
        merge(root, tmp_path / "merged", root_digest=digest)
    assert repair(root, golden, root_digest=digest).ok
    assert tree(root) == tree(golden)


def test_repair_takes_no_forged_chunk_from_a_source(genuine: Path, victim: Path, tmp_path: Path) -> None:
    """Not even where nobody gave it a root: what is written is held to the digest on record."""
    copy = Path(shutil.copytree(genuine, tmp_path / "copy"))
    put_colliding(copy)
    path = victim / "partition_0.bin"
    flip(path, path.read_bytes().index(GENUINE))
    before = tree(victim)
    (fault,) = repair(victim, copy).problems
    assert "does not give the bytes that were stored" in fault.what
    assert tree(victim) == before
    assert repair(victim, [copy, genuine]).ok
    assert tree(victim) == tree(genuine)


def test_repair_goes_on_from_no_forged_beginning(genuine: Path, victim: Path, root_digest: str) -> None:
    """A payload under construction that somebody put there: genuine records for a journal, one chunk forged."""
    put_colliding(victim)
    payload = victim / "partition_0.bin"
    with open_partition_files(victim / "partition_0.json") as partition:
        index, manifest = partition.index, partition.manifest
    journal = b""
    for slot in iter_slots(iter_stored(planned_partition(manifest))):
        rows = index[slot.first_chunk : slot.first_chunk + len(slot.chunks)].tobytes()
        journal += rows + xxhash.xxh3_64_digest(rows)
    payload.rename(victim / "partition_0.bin.partial")
    (victim / "partition_0.bin.journal").write_bytes(journal)
    assert repair(victim, genuine.parent / "model", root_digest=root_digest).ok
    assert tree(victim) == tree(genuine)


@pytest.mark.parametrize("single", [False, True])
def test_a_little_every_night_with_the_root(victim: Path, root_digest: str, tmp_path: Path, single: bool) -> None:
    """What was held to checksums only is looked at again when a root is given, and the forged chunk is found."""
    place = victim / "partition_0.json" if single else victim
    scrub = Scrub(since=timedelta(days=1), history=tmp_path / "history.jsonl")
    everything = verify(place).checked_bytes
    assert verify(place, scrub=scrub).checked_bytes == everything
    assert verify(place, scrub=scrub).checked_bytes == 0
    bound = verify(place, root_digest=root_digest, scrub=scrub)
    assert (bound.ok, bound.checked_bytes, bound.root_digest) == (True, everything, root_digest)
    assert verify(place, root_digest=root_digest, scrub=scrub).checked_bytes == 0
    assert verify(place, scrub=scrub).checked_bytes == 0
    put_colliding(victim)

    def found(number: int) -> int:
        return len(verify(place, root_digest=root_digest, scrub=Scrub(subset=f"{number}/5")).problems)

    assert sorted(map(found, range(1, 6))) == [0, 0, 0, 0, 1]
    assert all(verify(place, scrub=Scrub(subset=f"{number}/5")).ok for number in range(1, 6))
    with pytest.raises(IntegrityError, match="another set"):
        verify(place, root_digest="0" * 64, scrub=Scrub(subset="1/5"))


@pytest.mark.parametrize("verify_checksums", [True, False])
@pytest.mark.parametrize("codec", ["planes", "zstd", "raw"])
def test_no_unbound_byte_reaches_a_decoder(
    genuine: Path, tmp_path: Path, codec: str, verify_checksums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a root the digest is compared first, in every way to read, also for those who want no checksums."""
    split(genuine.parent / "model", tmp_path / "set", 2, codec=codec)  # type: ignore[arg-type]
    digest = json.loads((tmp_path / "set" / SET_MANIFEST_NAME).read_text())["root_digest"]
    name = "model.layers.0.mlp.up_proj.weight"
    with open_partition_files(tmp_path / "set" / "partition_0.json") as partition:
        (chunk,) = (t.first_chunk for t in partition.tensors if t.name == name)
        start, stop, _ = partition.encoded(chunk)
    path = tmp_path / "set" / "partition_0.bin"
    data = bytearray(path.read_bytes())
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    decoded: list[bytes] = []
    decode = ChunkDecoder.decode

    def note(self: ChunkDecoder, stored: memoryview, *rest: Any) -> None:
        decoded.append(bytes(stored))
        decode(self, stored, *rest)

    monkeypatch.setattr(ChunkDecoder, "decode", note)
    buffer = bytearray(2 * 64 * 64)
    with open_partition(path, root_digest=digest, verify=verify_checksums) as opened:
        for read in (
            lambda: opened[name],
            lambda: opened.load(),
            lambda: opened.read_into(name, buffer),
            lambda: opened.layer("model.layers.0"),
        ):
            with pytest.raises(IntegrityError, match=r"not those that the root digest binds") as caught:
                read()
            assert (caught.value.tensor, caught.value.offset) == (name, start)
    with pytest.raises(IntegrityError, match=r"not those that the root digest binds"):
        merge(tmp_path / "set", tmp_path / "merged", root_digest=digest)
    assert bytes(stop - start) not in decoded


def test_any_bit_is_found_although_every_checksum_is_taken_as_right(
    genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xxh3 replaced by a constant, when the set is made and when it is checked: the digests alone cover every byte."""
    for function, constant in (
        ("xxh3_64_intdigest", 0),
        ("xxh3_64_digest", bytes(8)),
        ("xxh3_64_hexdigest", "0" * 16),
    ):
        monkeypatch.setattr(xxhash, function, lambda _, constant=constant: constant)
    root = tmp_path / "set"
    result = split(genuine.parent / "model", root, 2)
    assert result.root_digest is not None
    assert verify(root, level="full", root_digest=result.root_digest).ok
    for name, data in tree(root).items():
        offsets = (
            set(sample(range(len(data)), 150, seed=len(name))) | set(range(100)) | set(range(len(data) - 60, len(data)))
        )
        if name.endswith(".bin"):
            offsets |= set(sample(range(parse(data).index_offset, len(data)), 300))
        for offset in sorted(offsets & set(range(len(data)))):
            flip(root / name, offset, offset % 8)
            try:
                assert not verify(root, level="stored", root_digest=result.root_digest, threads=1).ok, (name, offset)
            except (IntegrityError, FormatError):
                pass
            finally:
                flip(root / name, offset, offset % 8)


def parse(data: bytes) -> Any:
    """The trailer of a payload whose checksums mean nothing."""
    return parse_trailer(data[-TRAILER_BYTES:], len(data))


ALONE = {
    "header": "file header is not that of the manifest's partition",
    "copy": "manifest is not the one written with this payload",
    "manifest": "manifest is not the one the set was made with",
    "index": "chunk index is damaged",
}


@pytest.mark.parametrize("what", ALONE)
def test_each_part_of_a_partition_is_bound_by_itself(what: str, victim: Path, root_digest: str) -> None:
    """Forged alone, in its own length and with its own checksums right; nothing but its digest can tell."""
    text, path = (victim / "partition_0.json").read_bytes(), victim / "partition_0.bin"
    data = path.read_bytes()
    trailer = parse(data)
    index = bytearray(data[trailer.index_offset : trailer.manifest_offset])
    if what == "header":
        header = pack_header(1, 2, "sha256:" + "0" * 64, "sha256:" + "1" * 64)
        data = header + data[len(header) :]
    elif what == "index":
        record = next(n for n, row in enumerate(np.frombuffer(bytes(index), CHUNK_RECORD)) if row["layout"] == 4)
        index[record * CHUNK_RECORD.itemsize + CHUNK_RECORD.fields["layout"][1]] = 1
        data = data[: trailer.index_offset] + index + data[trailer.manifest_offset :]
    else:
        other = text.replace(b'"model.layers.0.norm.weight"', b'"model.layers.0.norm.wEight"')
        data = data[: trailer.index_offset] + pack_tail(bytes(index), trailer.index_offset, other)
        if what == "manifest":
            (victim / "partition_0.json").write_bytes(other)
    assert path.stat().st_size == len(data)
    path.write_bytes(data)
    problems = verify(victim, level="stored", root_digest=root_digest).problems
    assert [fault.what for fault in problems] == [ALONE[what]]
    for use in (open_partition, lambda path, **root: open_set(path.parent, **root).partition(0)):
        with pytest.raises(IntegrityError, match=ALONE[what]):
            use(victim / "partition_0.json", root_digest=root_digest)  # type: ignore[operator]


def test_one_partition_and_the_set_manifest_are_enough(genuine: Path, root_digest: str, tmp_path: Path) -> None:
    """No other partition is needed, nor a small file; it is looked at to the last byte."""
    for name in ("partition_1.json", "partition_1.bin", SET_MANIFEST_NAME):
        shutil.copyfile(genuine / name, tmp_path / name)
    for name in ("partition_1.json", "partition_1.bin"):
        result = verify(tmp_path / name, root_digest=root_digest)
        assert result.ok
        assert result.checked_bytes > 0
        with open_partition(tmp_path / name, root_digest=root_digest) as partition:
            assert partition.load()
    flip(tmp_path / "partition_1.bin", 4100)
    assert not verify(tmp_path / "partition_1.json", root_digest=root_digest).ok


def test_one_chunk_is_tied_to_the_root_by_hand(genuine: Path, root_digest: str) -> None:
    """What FORMAT.md says of a range request: set manifest, partition manifest, index, and that chunk."""
    whole = json.loads((genuine / SET_MANIFEST_NAME).read_bytes())
    rest = {key: value for key, value in whole.items() if key != "root_digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    assert "sha256:" + hashlib.sha256(text).hexdigest() == root_digest
    text = (genuine / "partition_0.json").read_bytes()
    assert "sha256:" + hashlib.sha256(text).hexdigest() == whole["partitions"][0]["manifest_sha256"]
    place = json.loads(text)["payload"]
    payload = (genuine / "partition_0.bin").read_bytes()  # of which a range is used
    index = payload[place["data_stop"] :][: place["chunk_count"] * CHUNK_RECORD.itemsize]
    assert "sha256:" + hashlib.sha256(index).hexdigest() == place["index_sha256"]
    record = index[CHUNK_RECORD.itemsize : 2 * CHUNK_RECORD.itemsize]
    start, length = struct.unpack_from("<QI", record)
    assert chunk_digest(payload[start : start + length]) == record[40:72]


def test_without_the_set_manifest_nothing_ties_a_partition_to_the_root(
    genuine: Path, root_digest: str, tmp_path: Path
) -> None:
    """The error says what to fetch; without a root the partition is read as ever."""
    for name in ("partition_0.json", "partition_0.bin"):
        shutil.copyfile(genuine / name, tmp_path / name)
    for use in (verify, open_partition):
        with pytest.raises(FormatError, match=r"nothing here ties a partition to the root digest.*Fetch that file"):
            use(tmp_path / "partition_0.json", root_digest=root_digest)  # type: ignore[operator]
    assert verify(tmp_path / "partition_0.json").ok


def test_a_partition_that_the_set_does_not_have(genuine: Path, root_digest: str, tmp_path: Path) -> None:
    """A file of another name is not of the set, whatever it holds."""
    shutil.copytree(genuine, tmp_path / "set")
    for suffix in (".json", ".bin"):
        shutil.copyfile(genuine / f"partition_0{suffix}", tmp_path / "set" / f"partition_7{suffix}")
    with pytest.raises(FormatError, match=r"no partition of this name .expected partition_0 to partition_1"):
        open_partition(tmp_path / "set" / "partition_7.json", root_digest=root_digest)


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:12", "blake3:" + "0" * 64, "md5:0", "x" * 64, "0" * 63])
def test_what_is_no_root_digest_is_a_wrong_request(genuine: Path, text: str) -> None:
    """Not another set: the digest itself is mistaken."""
    for use in (verify, open_set, open_partition):
        path = genuine / "partition_0.json" if use is open_partition else genuine
        with pytest.raises(RequestError, match="not a root digest"):
            use(path, root_digest=text)  # type: ignore[operator]


def test_another_set_is_refused_before_anything_of_it_is_read(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the wrong root no partition is opened, and both digests are told."""

    def fail(*_: object) -> None:
        raise AssertionError("a partition was opened")

    monkeypatch.setattr("mmsplit.verbs.verify.read_partition_files", fail)
    with pytest.raises(MmsplitError, match=r"another set.*expected sha256:0{64}, found sha256:[0-9a-f]{64}"):
        verify(genuine, root_digest="0" * 64)


def test_the_commands_demand_the_root(genuine: Path, root_digest: str, tmp_path: Path, capsys: Any) -> None:
    """Exit code 0 and the root in the result, 5 for another set, 2 for what is no digest."""
    commands = (
        ["verify", str(genuine)],
        ["verify", str(genuine), "--subset", "1/2"],
        ["repair", str(genuine)],
        ["merge", str(genuine), "-o", str(tmp_path / "merged")],
    )
    for command in commands:
        assert run([*command, "--root", root_digest, "--quiet"]) == 0
        assert run([*command, "--root", "sha256:" + "0" * 64, "--quiet"]) == 5
        assert run([*command, "--root", "0", "--quiet"]) == 2
    capsys.readouterr()
    assert run(["verify", str(genuine), "--root", root_digest.removeprefix("sha256:"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["root_digest"] == root_digest
