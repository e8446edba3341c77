"""FORMAT.md holds: a reader written from it alone reads every set, and its numbers are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import mmsplit
from mmsplit.codec import KNOWN_CODECS, LAYOUTS, chunk_codec
from mmsplit.dtypes import DTYPES
from mmsplit.sidecar import framing, layout, manifest, partition_reader, set_manifest
from mmsplit.sidecar.chunk_index import CHUNK_RECORD
from mmsplit.sidecar.payload_writer import PayloadWriter

HERE = Path(__file__).parent
DOCUMENT = (Path(mmsplit.__file__).parent / "sidecar" / "FORMAT.md").read_text(encoding="utf-8")
CODECS = {"raw": 0, "zstd": 1, "planes": 2}


def load_script(path: Path) -> ModuleType:
    """Import a file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_script(HERE / "independent_reader.py")
make_golden = load_script(HERE / "golden" / "make_golden.py")


# --------------------------------------------------------------------------------------------------------- sets


def make_checkpoint(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Write a checkpoint of two shards with tensors of every word layout; return its tensors."""
    rng = np.random.default_rng(7)

    def floats(count: int) -> np.ndarray:
        return (rng.standard_normal(count) * 0.02).astype("<f4")

    def bf16(count: int) -> bytes:
        return (floats(count).view("<u4") >> 16).astype("<u2").tobytes()

    many = (4 << 20) // 2 + 12_345
    shards = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": ("BF16", [300, 24], bf16(7200)),
            "model.layers.0.mlp.up_proj.weight": ("BF16", [many], bf16(many)),
            "model.layers.0.mlp.down_proj.weight": ("F32", [50, 64], floats(3200).tobytes()),
            "model.layers.0.mlp.gate_proj.weight": ("F16", [4000], floats(4000).astype("<f2").tobytes()),
            "model.layers.0.odd": ("U8", [4099], rng.integers(0, 9, 4099, "u1").tobytes()),
            "model.layers.0.empty": ("F32", [0, 3], b""),
        },
        "model-00002-of-00002.safetensors": {
            "model.layers.1.fp8": ("F8_E4M3", [30, 100], rng.integers(0, 40, 3000, "u1").tobytes()),
            "model.layers.1.noise": ("U8", [3, 1000], rng.bytes(3000)),
            "model.layers.1.mask": ("BOOL", [777], rng.integers(0, 2, 777, "u1").tobytes()),
            "model.layers.1.ids": ("I64", [50, 50], np.arange(2500, dtype="<i8").tobytes()),
            "model.layers.1.f64": ("F64", [600], floats(600).astype("<f8").tobytes()),
            "model.layers.1.i32": ("I32", [900], rng.integers(-5, 70_000, 900, "<i4").tobytes()),
            "model.layers.1.complex": ("C64", [700], floats(1400).tobytes()),
            "model.layers.1.scalar": ("F16", [], struct.pack("<e", -2.5)),
            "model.norm.weight": ("BF16", [24], bf16(24)),
        },
    }
    for name, tensors in shards.items():
        make_golden.write_shard(directory / name, tensors)
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "tie_word_embeddings": True, "ä\x7f": "🙂"}
    (directory / "config.json").write_text(json.dumps(config))
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(source: Path, codec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh set of two partitions."""
    path = tmp_path_factory.mktemp(codec)
    mmsplit.split(source, path, 2, codec=codec, model_id='a "model"\n of ünïcode 🙂\x7f')
    return path


def test_reader_needs_nothing_but_zstandard_and_two_hashes():
    """It imports no mmsplit and no numpy."""
    tree = ast.parse((HERE / "independent_reader.py").read_bytes())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    top = {name.partition(".")[0] for name in names}
    assert top - sys.stdlib_module_names == {"zstandard", "xxhash", "blake3"}


def test_reader_gets_every_tensor_and_file_back(made: Path, source: Path, codec: str, tmp_path: Path):
    """All codecs, dtypes, lengths: what comes out is what went in, tied copy included."""
    original = make_checkpoint(tmp_path)
    found = reader.read_set(made)
    tensors = {}
    for partition in found.partitions:
        for tensor in partition.tensors:
            assert (tensor.dtype, tensor.shape, tensor.raw) == original[tensor.name]
            tensors.setdefault(tensor.name, []).append(tensor.is_tied)
    assert set(tensors) == set(original)
    assert sorted(tensors["model.embed_tokens.weight"]) == [False, True]
    files = {**found.shards, **found.index, **found.files}
    assert files == {path.name: path.read_bytes() for path in source.iterdir()}
    codecs = {record.codec for partition in found.partitions for record in partition.records}
    assert codecs == {CODECS[codec], CODECS["raw"]}


def test_every_word_layout_occurs(source: Path, tmp_path: Path):
    """Else the reader would not have proved that FORMAT.md describes it."""
    mmsplit.split(source, tmp_path, 1)
    records = reader.read_set(tmp_path).partitions[0].records
    assert {record.layout for record in records if record.codec == 2} == set(range(len(LAYOUTS)))


@pytest.mark.parametrize("tied", ["duplicate", "reference", "colocate"])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_reader_understands_every_kind_of_tie(source: Path, tmp_path: Path, tied: str, num_parts: int):
    mmsplit.split(source, tmp_path, num_parts, tied=tied)
    found = reader.read_set(tmp_path)
    assert found.shards == {path.name: path.read_bytes() for path in source.glob("*.safetensors")}


def test_partition_that_stores_nothing(tmp_path: Path):
    """Its index is empty and begins at the first slot's place."""
    (tmp_path / "source").mkdir()
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": ("F32", [0], b"") for i in range(2)}
    make_golden.write_shard(tmp_path / "source" / "model.safetensors", tensors)
    mmsplit.split(tmp_path / "source", tmp_path / "set", 2, by="layers")
    found = reader.read_set(tmp_path / "set")
    assert [part.manifest["payload"]["data_stop"] for part in found.partitions] == [4096, 4096]
    assert [part.records for part in found.partitions] == [[], []]


def test_index_and_manifest_are_rebuilt_from_the_payload_alone(made: Path):
    for k in range(2):
        payload = (made / f"partition_{k}.bin").read_bytes()
        text = (made / f"partition_{k}.json").read_bytes()
        assert reader.rebuild_manifest(payload) == text
        assert reader.records_of_payload(payload) == reader.read_partition(text, payload).records


def test_a_layer_is_moved_by_copying_its_range(source: Path, made: Path, codec: str, tmp_path: Path):
    """Its bytes are the same in another partitioning, its records but for place and tensor number."""
    mmsplit.split(source, tmp_path, 1, codec=codec)
    whole, whole_payload = reader.read_set(tmp_path).partitions[0], (tmp_path / "partition_0.bin").read_bytes()
    homes = {layer["name"]: layer for layer in whole.manifest["layers"]}
    moved = 0
    for k, partition in enumerate(reader.read_set(made).partitions):
        payload = (made / f"partition_{k}.bin").read_bytes()
        for layer in partition.manifest["layers"]:
            home = homes[layer["name"]]
            if not layer.get("stored", True) or not home.get("stored", True):
                continue
            assert layer["start"] % 4096 == home["start"] % 4096 == 0
            assert payload[layer["start"] : layer["stop"]] == whole_payload[home["start"] : home["stop"]]
            here = records_of_layer(partition.records, layer)
            there = records_of_layer(whole.records, home)
            by = layer["start"] - home["start"]
            number = here[0].tensor - there[0].tensor
            assert here == [
                record._replace(stored_offset=record.stored_offset + by, tensor=record.tensor + number)
                for record in there
            ]
            moved += by != 0
    assert moved


def records_of_layer(records: list, layer: dict) -> list:
    """Return the index records of a layer."""
    first, last = layer["tensors"][0]["chunks"], layer["tensors"][-1]["chunks"]
    return records[first[0] : last[0] + last[1]]


def test_raw_tensor_can_be_used_where_it_lies(source: Path, tmp_path: Path):
    """It is one piece that begins on a multiple of 64, however many chunks it has."""
    mmsplit.split(source, tmp_path, 1, codec="raw")
    partition = reader.read_set(tmp_path).partitions[0]
    payload = (tmp_path / "partition_0.bin").read_bytes()
    entries = {entry["name"]: entry for layer in partition.manifest["layers"] for entry in layer["tensors"]}
    assert entries["model.layers.0.mlp.up_proj.weight"]["chunks"][1] == 2
    for tensor in partition.tensors:
        first, count = entries[tensor.name]["chunks"]
        if count:
            start = partition.records[first].stored_offset
            assert start % 64 == 0
            if tensor.raw is not None:
                assert payload[start : start + len(tensor.raw)] == tensor.raw


@pytest.mark.parametrize(
    ("file", "offset"),
    [
        ("partition_0.bin", 0),  # magic
        ("partition_0.bin", 8),  # version
        ("partition_0.bin", 13),  # part_id
        ("partition_0.bin", 4000),  # padding of the header
        ("partition_0.bin", 4100),  # a chunk
        ("partition_0.bin", -1),  # trailer
        ("partition_0.json", 200),
        ("partition_set.json", -100),
        ("config.json", 3),
    ],
)
def test_reader_and_verify_both_find_a_flipped_bit(made: Path, file: str, offset: int):
    path = made / file
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    try:
        with pytest.raises((reader.NotSoundError, ValueError, KeyError)):
            reader.read_set(made)
        assert not mmsplit.verify(made).ok
    finally:
        path.write_bytes(sound)


def test_files_get_their_names_in_the_order_of_the_page(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """State and small files, then per partition payload before manifest, and the set manifest last."""
    named = []
    replace = os.replace

    def note(old: Path, new: Path) -> None:
        assert Path(old).name == Path(new).name + ".partial"
        named.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", note)
    mmsplit.split(source, tmp_path, 2, threads=1)
    assert set(named[:2]) == {"unfinished_split.json", "config.json"}
    order = [name for name in named if name != "unfinished_split.json"]  # it is written again as shards are hashed
    assert order[-1] == "partition_set.json"
    for k in range(2):
        assert order.index(f"partition_{k}.bin") < order.index(f"partition_{k}.json")
    assert {path.name for path in tmp_path.iterdir()} == set(order)


def test_unfinished_split_looks_as_the_page_says(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Partial payload and journal; the journal's entries are those of the index of the finished run."""

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(PayloadWriter, "finish", die)
        with pytest.raises(RuntimeError, match="killed"):
            mmsplit.split(source, tmp_path, 1, threads=1)
    there = {path.name for path in tmp_path.iterdir()} - {".mmsplit.lock"}
    assert there == {"config.json", "partition_0.bin.partial", "partition_0.bin.journal", "unfinished_split.json"}
    state = json.loads((tmp_path / "unfinished_split.json").read_bytes())
    assert set(state) >= {"source", "plan", "codec", "model_id", "revision", "fingerprints", "shard_sha256"}
    journal = (tmp_path / "partition_0.bin.journal").read_bytes()
    mmsplit.split(source, tmp_path, 1, existing="resume")
    partition = reader.read_set(tmp_path).partitions[0]
    slots = reader.read_journal(journal, reader.slot_lengths(partition.manifest))
    assert [record for slot in slots for record in slot] == partition.records
    assert all(slot[0].stored_offset % 4096 == 0 for slot in slots)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "partition_0.bin",
        "partition_0.json",
        "partition_set.json",
    }


def test_canonical_json_is_that_of_the_page():
    """Escapes and order written out by hand are what the code's JSON writer does."""
    text = "".join(map(chr, range(0x100))) + "€🙂\u2028"
    value = {"b": [1, None, True, False, {"ü": text}], "a": text, text: -3}
    assert reader.canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------------- numbers


def table(heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table below a heading, by column."""
    section = DOCUMENT.split(f"# {heading}\n", 1)[1]
    lines = []
    for line in section.splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            break
    columns, _, *rows = lines
    return [dict(zip(columns, row, strict=True)) for row in rows]


def require_no_gaps(rows: list[dict[str, str]]) -> int:
    """Check that every field begins where the one before it ends; return where the last ends."""
    position = 0
    for row in rows:
        assert int(row["offset"]) == position, row["field"]
        size = int(row["size"])
        assert row["type"] in ("bytes", f"u{8 * size}")
        position += size
    return position


def test_file_header_table():
    rows = table("File header")
    assert require_no_gaps(rows) == layout.DATA_START
    value = {row["field"]: row["value"] for row in rows}
    offset = {row["field"]: int(row["offset"]) for row in rows}
    header = framing.pack_header(3, 5, "sha256:" + "ab" * 32, "sha256:" + "cd" * 32)
    assert bytes.fromhex(re.search(r"hex `(.*?)`", value["magic"])[1]) == framing.MAGIC == header[:8]
    assert int(value["format_version"]) == framing.FORMAT_VERSION == 1
    assert int(value["chunk_bytes"]) == layout.CHUNK_BYTES
    for field, number in (("format_version", 1), ("part_id", 3), ("num_parts", 5), ("chunk_bytes", 4194304)):
        assert struct.unpack_from("<I", header, offset[field])[0] == number
    assert header[offset["plan_digest"] :][:32] == b"\xab" * 32
    assert header[offset["source_digest"] :][:32] == b"\xcd" * 32
    assert not any(header[offset["padding"] :])


def test_trailer_table():
    rows = table("Trailer")
    assert require_no_gaps(rows) == framing.TRAILER_BYTES
    magic, *fields, checksum = (row["field"] for row in rows)
    assert (magic, checksum) == ("magic", "trailer_xxh3")
    assert tuple(fields) == framing.Trailer._fields
    assert bytes.fromhex(re.search(r"hex `(.*?)`", rows[0]["meaning"])[1]) == framing.TRAILER_MAGIC
    packed = framing.pack_trailer(framing.Trailer(1, 2, 3, 4))
    assert struct.unpack_from("<4Q", packed, 8) == (1, 2, 3, 4)
    assert f"The trailer is {framing.TRAILER_BYTES} bytes" in DOCUMENT


def test_chunk_index_table():
    rows = table("Chunk index")
    assert require_no_gaps(rows) == CHUNK_RECORD.itemsize
    assert [row["field"] for row in rows] == list(CHUNK_RECORD.names)
    for row in rows:
        kind, offset = CHUNK_RECORD.fields[row["field"]][:2]
        word = "bytes" if kind.kind == "V" else f"u{8 * kind.itemsize}"
        assert (int(row["offset"]), int(row["size"]), row["type"]) == (offset, kind.itemsize, word)
    assert f"A record is {CHUNK_RECORD.itemsize} bytes" in DOCUMENT


def test_codec_and_layout_tables():
    rows = table("Encoded chunks")
    assert {row["name"]: int(row["codec"]) for row in rows} == CODECS
    assert {int(row["codec"]) for row in rows} == KNOWN_CODECS
    rows = table("Planes")
    assert [(int(row["layout"]), int(row["w"]), row["exponent8"] == "yes") for row in rows] == list(LAYOUTS)
    for dtype in DTYPES.values():
        row = next(
            row for row in rows if (int(row["w"]), row["exponent8"] == "yes") == (dtype.word_bytes, dtype.exponent8)
        )
        named = [name.strip().replace("*", ".*") for name in row["this writer uses it for"].split(",")]
        assert any(re.fullmatch(name, dtype.name) for name in named), dtype.name


def test_limits_table():
    limits = {row["what"]: row["value"] for row in table("Guarantees and limits")}
    assert limits["raw bytes of a chunk"] == f"1 to {layout.CHUNK_BYTES}" == f"1 to {layout.SLOT_BYTES}"
    assert limits["chunk begins on"] == f"a multiple of {layout.CHUNK_ALIGNMENT}"
    assert limits["slot and layer begin on"] == f"a multiple of {layout.SLOT_ALIGNMENT}"
    assert limits["overhead per chunk"].startswith(f"{CHUNK_RECORD.itemsize} bytes")
    assert limits["manifest"] == f"at most {partition_reader.MAX_MANIFEST_BYTES >> 30} GiB"
    assert limits["kept bytes of a shard, or weights index"] == f"at most {set_manifest._MAX_KEPT_BYTES >> 20} MiB raw"
    assert limits["window of a frame in a chunk"] == f"at most {chunk_codec._MAX_WINDOW_BYTES >> 20} MiB"
    assert limits["plane begins on"].startswith(f"a multiple of {chunk_codec._PLANE_ALIGNMENT},")
    assert (reader.CHUNK_BYTES, reader.SLOT_ALIGNMENT, reader.DATA_START) == (
        layout.CHUNK_BYTES,
        layout.SLOT_ALIGNMENT,
        layout.DATA_START,
    )


def test_manifest_tables_name_every_field(made: Path):
    """No field is written that the page does not name, and none named that is not written."""
    text = json.loads((made / "partition_1.json").read_bytes())
    whole = json.loads((made / "partition_set.json").read_bytes())
    assert text["format"] == manifest.PARTITION_FORMAT
    assert whole["format"] == set_manifest.SET_FORMAT
    section = DOCUMENT.split("## Partition manifest", 1)[1].split("## Checksums", 1)[0]
    named = set()
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| in "):
            named |= {name.removeprefix("shards[].") for name in line.split("|")[1].replace(",", " ").split()}
    named -= {"field"}
    written: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            written.update(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    collect([text, whole])
    assert written - named == {"zstd_base64"}  # named in the cells of its objects
    # only of a shard that lies in a cache of the Hub; only of PyTorch files; only in a slice
    of_torch_files = {"views", "also", "hidden", "tensor", "stride", "offset"}
    assert named - written == {"sha256_published", "rows", *of_torch_files}


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", DOCUMENT)) <= anchors
