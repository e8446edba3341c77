"""Both manifests: record to text and back, and what a text that is not one is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint import TensorRows
from mmsplit.checkpoint.weights_index import is_plain_name
from mmsplit.codec import CODEC_NAMES
from mmsplit.dtypes import DTYPES
from mmsplit.errors import FormatError, IntegrityError, MmsplitError
from mmsplit.sidecar.json_fields import Fields, load_json_object
from mmsplit.sidecar.layout import DATA_START, chunk_count_of
from mmsplit.sidecar.manifest import (
    LayerEntry,
    Manifest,
    TensorEntry,
    format_manifest,
    manifest_name,
    parse_manifest,
    payload_name,
    refuse_other_version,
)
from mmsplit.sidecar.set_manifest import (
    FileEntry,
    KeptBytes,
    PartitionEntry,
    SetManifest,
    ShardEntry,
    format_set_manifest,
    is_as_written,
    parse_set_manifest,
)

_digest = st.binary(min_size=32, max_size=32).map(lambda value: f"sha256:{value.hex()}")
_xxh3 = st.integers(0, 2**64 - 1).map(lambda value: f"{value:016x}")
_count = st.integers(0, 2**63)
_plain = st.text("abcXYZ019._- éß", min_size=1, max_size=12).filter(is_plain_name)
_text = st.text(max_size=12)


@st.composite
def _manifests(draw: st.DrawFn) -> Manifest:
    chunk, position = 0, DATA_START
    num_parts = draw(st.integers(1, 2**32 - 1))
    layers: list[LayerEntry] = []
    for number in range(draw(st.integers(0, 3))):
        alias = draw(st.none() | _text)
        stored = alias is None or draw(st.booleans())
        tensors = []
        for _ in range(1 if alias is not None else draw(st.integers(0, 3))):
            dtype = draw(st.sampled_from(["F7_UNKNOWN", "BF16", "U8", "F4"]))
            shape = tuple(draw(st.lists(st.integers(0, 50), max_size=3)))
            params = 1
            for size in shape:
                params *= size
            bits = DTYPES[dtype].bits if dtype in DTYPES else 8
            if params * bits % 8:
                shape, params = (2, *shape), params * 2
            size_bytes = draw(st.integers(0, 2**33)) if dtype not in DTYPES else params * bits // 8
            count = chunk_count_of(size_bytes) if stored else 0
            start = draw(_count)
            is_slice = alias is None and shape and shape[0] > 0 and draw(st.booleans())
            first_row = draw(st.integers(0, 2**40))
            whole = (first_row + shape[0] + draw(st.integers(0, 2**40)), *shape[1:]) if is_slice else ()
            xxh3 = draw(_xxh3) if stored else None
            tensors.append(
                TensorEntry(
                    f"{draw(_text)}{number}.{len(tensors)}",
                    dtype,
                    shape,
                    params,
                    size_bytes,
                    xxh3,
                    chunk,
                    count,
                    draw(_plain),
                    start,
                    start + size_bytes,
                    TensorRows(first_row, first_row + shape[0], whole) if is_slice else None,
                )
            )
            chunk += count
        layers.append(
            LayerEntry(
                name=draw(_text),
                layer_type=draw(_text),
                stack=draw(st.none() | _text),
                block_index=draw(st.none() | st.integers(0, 999)),
                start=position,
                stop=(position := position + draw(st.integers(0, 2**40))),
                stored_bytes=draw(st.integers(0, 2**40)),
                tensors=tuple(tensors),
                alias=alias,
                tied_to=None if alias is None else number % num_parts,
                stored=stored,
            )
        )
    part_id = draw(st.integers(0, num_parts - 1))
    return Manifest(
        part_id=part_id,
        num_parts=num_parts,
        model_id=draw(_text),
        revision=draw(st.none() | _text),
        plan_digest=draw(_digest),
        source_digest=draw(_digest),
        payload_file=payload_name(part_id),
        data_stop=position,
        chunk_count=chunk,
        index_sha256=draw(_digest),
        stored_bytes=sum(layer.stored_bytes for layer in layers),
        layers=tuple(layers),
    )


_kept = st.binary(max_size=50).map(KeptBytes.of)


@st.composite
def _shards(draw: st.DrawFn, name: str) -> ShardEntry:
    sha256 = draw(st.none() | _digest)
    is_published = sha256 is not None and draw(st.booleans())
    kept = draw(_kept)
    return ShardEntry(name, max(draw(_count), kept.size_bytes), sha256, kept, is_published)


@st.composite
def _set_manifests(draw: st.DrawFn) -> SetManifest:
    names = draw(st.lists(_plain, max_size=6, unique=True))
    index = (names.pop(), draw(_kept)) if names and draw(st.booleans()) else None
    cut = draw(st.integers(0, len(names)))
    return SetManifest(
        model_id=draw(_text),
        revision=draw(st.none() | _text),
        plan_digest=draw(_digest),
        source_digest=draw(_digest),
        codec=draw(st.sampled_from(CODEC_NAMES)),
        tied=draw(st.sampled_from(["duplicate", "reference", "colocate"])),
        shards=tuple(draw(_shards(name)) for name in names[:cut]),
        weights_index=index,
        files=tuple(FileEntry(f"{draw(_plain)}/{name}", draw(_count), draw(_digest)) for name in names[cut:]),
        partitions=tuple(
            PartitionEntry(k, manifest_name(k), draw(_digest), payload_name(k), *(draw(_count) for _ in range(4)))
            for k in range(draw(st.integers(1, 3)))
        ),
    )


@given(_manifests())
@settings(deadline=None, database=None)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    """Formatted and parsed it is the same record, any text in it."""
    assert parse_manifest(format_manifest(manifest), "p") == manifest


@given(_set_manifests())
@settings(deadline=None, database=None)
def test_a_set_manifest_comes_back(manifest: SetManifest) -> None:
    """Formatted and parsed it is the same record, with the same root digest, and has the bytes it was written with."""
    text = format_set_manifest(manifest)
    parsed = parse_set_manifest(text, "p")
    assert parsed == manifest
    assert json.loads(text)["root_digest"] == parsed.root_digest
    assert is_as_written(text)
    for kept in [shard.kept for shard in parsed.shards] + ([parsed.weights_index[1]] if parsed.weights_index else []):
        assert KeptBytes.of(kept.data("p")) == kept


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(deadline=None, database=None)
def test_any_bytes_are_refused_as_ours(data: bytes) -> None:
    """No text but a manifest is one, and no error but ours says so."""
    for parse in (parse_manifest, parse_set_manifest):
        with pytest.raises((FormatError, IntegrityError)):
            parse(data, "p")


def test_a_manifest_is_one_line_per_tensor() -> None:
    """A person who greps for a tensor finds all there is to say about it."""
    tensor = TensorEntry("a.weight", "U8", (3,), 3, 3, "0" * 16, 0, 1, "model.safetensors", 80, 83)
    layer = LayerEntry("a", "block", None, 4, 4096, 8192, 3, (tensor,), None, None, True)
    digest = "sha256:" + "0" * 64
    text = format_manifest(Manifest(0, 1, "m", None, digest, digest, "b", 8192, 1, "0" * 16, 3, (layer,))).decode()
    (line,) = [line for line in text.splitlines() if "a.weight" in line]
    assert json.loads(line)["source_range"] == [80, 83]
    assert text.endswith("}\n")


def _base() -> dict:
    tensor = {
        "name": "t",
        "dtype": "U8",
        "shape": [3],
        "params": 3,
        "bytes": 3,
        "xxh3": "0" * 16,
        "chunks": [0, 1],
        "shard": "s",
        "source_range": [80, 83],
    }
    layer = {
        "name": "a",
        "layer_type": "block",
        "total_params": 3,
        "total_bytes": 3,
        "stored_bytes": 3,
        "start": 4096,
        "stop": 8192,
        "tensors": [tensor],
    }
    payload = {
        "file": "partition_0.bin",
        "checksum": "xxh3_64",
        "digest": "blake3",
        "chunk_bytes": 4 << 20,
        "chunk_count": 1,
        "data_stop": 8192,
        "index_sha256": "sha256:" + "0" * 64,
    }
    return {
        "format": "mmsplit-partition",
        "format_version": 1,
        "part_id": 0,
        "num_parts": 1,
        "model_id": "m",
        "plan_digest": "sha256:" + "0" * 64,
        "source_digest": "sha256:" + "0" * 64,
        "total_params": 3,
        "total_bytes": 3,
        "stored_bytes": 3,
        "payload": payload,
        "layers": [layer],
    }


def _change(key: str, value: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        *path, last = key.split(".")
        inner = manifest
        for part in path:
            inner = inner[int(part)] if part.isdecimal() else inner[part]
        inner[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("format", "other", FormatError, "format is 'other'"),
        ("format_version", 2, FormatError, "expected version 1, found 2"),
        ("format_version", True, FormatError, "found True"),
        ("payload.checksum", "md5", FormatError, "checksum is not one this mmsplit reads.*expected xxh3_64"),
        ("payload.chunk_bytes", 1 << 20, FormatError, "chunk_bytes is not one this mmsplit reads"),
        ("payload.file", "../b", FormatError, "not a plain file name"),
        ("payload.file", "partition_1.bin", IntegrityError, "payload has another name"),
        ("payload.data_stop", 12288, IntegrityError, "last layer does not end"),
        ("layers.0.start", 8192, IntegrityError, "does not begin where the layer before it ends"),
        ("layers.0.total_bytes", 4, IntegrityError, "total_bytes of a do not fit"),
        ("layers.0.total_params", 4, IntegrityError, "total_params of a do not fit"),
        ("layers.0.tied_to", 1, IntegrityError, "tied to a partition that is none"),
        ("payload.index_sha256", "sha256:" + "0" * 63, FormatError, "not a digest"),
        ("payload.digest", "md5", FormatError, "digest is not one this mmsplit reads.*expected blake3"),
        ("layers.0.tensors.0.xxh3", "0" * 15, FormatError, "not a checksum"),
        ("plan_digest", "md5:" + "0" * 64, FormatError, "not a digest of a kind known here"),
        ("plan_digest", "sha256:" + "A" * 64, FormatError, "not a digest"),
        ("part_id", True, FormatError, "not int"),
        ("part_id", 1, IntegrityError, "part_id is not below num_parts"),
        ("num_parts", 2**32, IntegrityError, "part_id is not below num_parts"),
        ("part_id", -1, FormatError, "out of range"),
        ("total_params", 4, IntegrityError, "total_params is not the sum"),
        ("total_bytes", 4, IntegrityError, "total_bytes is not the sum"),
        ("stored_bytes", 4, IntegrityError, "stored_bytes is not the sum"),
        ("payload.chunk_count", 2, IntegrityError, "chunk_count is not that of its tensors"),
        ("layers", {}, FormatError, "not list"),
        ("layers", [3], FormatError, r"layers\[0\] is not an object"),
        ("layers.0.tensors.0.chunks", [1, 1], IntegrityError, "not numbered in order.*"),
        ("layers.0.tensors.0.chunks", [0, 2], IntegrityError, "chunk count does not fit"),
        ("layers.0.tensors.0.chunks", [0], FormatError, r"layers\[0\].tensors\[0\]: field 'chunks'"),
        ("layers.0.tensors.0.source_range", [80, 84], IntegrityError, "source range does not fit"),
        ("layers.0.tensors.0.xxh3", None, IntegrityError, "has no checksum"),
        ("layers.0.tensors.0.shape", [4], IntegrityError, "dtype and shape do not fit"),
        ("layers.0.tensors.0.shape", [2**62] * 90, IntegrityError, "dtype and shape do not fit"),
        ("layers.0.tensors.0.shape", [True], FormatError, "shape is not a list of sizes"),
        ("layers.0.tensors.0.dtype", "F32", IntegrityError, "dtype and shape do not fit"),
        ("layers.0.tensors.0.shard", "a/b", FormatError, "not a plain file name"),
        ("layers.0.tensors.0.rows", 3, FormatError, "'rows' is missing or not dict"),
        ("layers.0.tensors.0.rows", {"start": 0, "stop": 2}, FormatError, "'shape' is missing"),
        ("layers.0.tensors.0.rows", {"start": -1, "stop": 1, "shape": [4]}, FormatError, "out of range"),
        ("layers.0.tensors.0.rows", {"start": 2, "stop": 2, "shape": [4]}, IntegrityError, "rows do not fit"),
        ("layers.0.tensors.0.rows", {"start": 0, "stop": 9, "shape": [9]}, IntegrityError, "rows do not fit"),
        ("layers.0.tensors.0.rows", {"start": 0, "stop": 2, "shape": []}, IntegrityError, "rows do not fit"),
        ("layers.0.tensors.0.also", [{"name": "b", "shard": "s"}], FormatError, "'source_range' is missing"),
        (
            "layers.0.tensors.0.also",
            [{"name": "b", "shard": "s", "source_range": [0, 4]}],
            IntegrityError,
            "has another length",
        ),
        ("layers.0.alias", "x", FormatError, "field 'stored' is missing"),
        ("layers.0.tensors", [], IntegrityError, "is not the sum"),
    ],
)
def test_a_manifest_that_lies_is_refused(key: str, value: object, error: type[MmsplitError], match: str) -> None:
    """Each rule by itself: the error says the field, and the tensor where there is one."""
    manifest = _base()
    parse_manifest(json.dumps(manifest).encode(), "p")
    _change(key, value)(manifest)
    with pytest.raises(error, match=match):
        parse_manifest(json.dumps(manifest).encode(), "p")


@pytest.mark.parametrize(
    ("view", "rows", "match"),
    [
        ({"offset": 1}, None, None),
        ({"offset": 2}, None, "does not lie in a whole tensor"),
        ({"tensor": "other"}, None, "does not lie in a whole tensor"),
        ({}, {"start": 1, "stop": 4, "shape": [4]}, "does not lie in a whole tensor"),
    ],
)
def test_a_view_lies_in_a_whole_tensor_of_its_layer(view: dict[str, object], rows: object, match: str | None) -> None:
    """Within its bytes; and what is in slices is nobody's to see."""
    manifest = _base()
    (layer,) = manifest["layers"]
    (tensor,) = layer["tensors"]
    sound = {"name": "v", "tensor": tensor["name"], "dtype": "U8", "shape": [2], "stride": [1], "offset": 0}
    layer["views"] = [sound | view]
    if rows is not None:
        tensor["rows"] = rows
    with nullcontext() if match is None else pytest.raises(IntegrityError, match=match):
        parse_manifest(json.dumps(manifest).encode(), "p")


def test_a_tied_layer_has_one_tensor() -> None:
    """The alias stands for a tensor; without one it stands for nothing."""
    manifest = _base()
    manifest["layers"][0] |= {"alias": "x", "stored": False, "tensors": []}
    with pytest.raises(FormatError, match="tied layer"):
        parse_manifest(json.dumps(manifest).encode(), "p")


def test_unknown_fields_are_ignored_and_bound() -> None:
    """A later minor addition does not break this reader, and in the set manifest it is under the root digest."""
    manifest = _base() | {"new": 1}
    assert parse_manifest(json.dumps(manifest).encode(), "p").model_id == "m"
    digest = "sha256:" + "0" * 64
    entry = PartitionEntry(0, "partition_0.json", digest, "partition_0.bin", 1, 2, 3, 4)
    values = json.loads(
        format_set_manifest(SetManifest("m", None, digest, digest, "raw", "duplicate", (), None, (), (entry,)))
    )
    with pytest.raises(IntegrityError, match="root digest does not fit"):
        parse_set_manifest(json.dumps(values | {"new": 1}).encode(), "p")


def _with_shard(**changes: object) -> bytes:
    """A set manifest of one shard, its entry changed, with the root digest that fits."""
    digest = "sha256:" + "0" * 64
    entry = PartitionEntry(0, "partition_0.json", digest, "partition_0.bin", 1, 2, 3, 4)
    shard = ShardEntry("s", 8, digest, KeptBytes.of(b"abc"))
    values = json.loads(
        format_set_manifest(SetManifest("m", None, digest, digest, "raw", "duplicate", (shard,), None, (), (entry,)))
    )
    (written,) = values["source"]["shards"]
    assert written.keys() == {"name", "bytes", "sha256", "kept"}  # computed is what is not said
    written.update(changes)
    del values["root_digest"]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(values | {"root_digest": f"sha256:{hashlib.sha256(canonical).hexdigest()}"}).encode()


@pytest.mark.parametrize(
    ("changes", "sha256", "is_published"),
    [
        ({}, "sha256:" + "0" * 64, False),
        ({"sha256_published": False}, "sha256:" + "0" * 64, False),
        ({"sha256_published": True}, "sha256:" + "0" * 64, True),
        ({"sha256": None}, None, False),
    ],
)
def test_where_the_sha256_of_a_shard_is_from(changes: dict, sha256: str | None, is_published: bool) -> None:
    """Computed, published, or not there."""
    (shard,) = parse_set_manifest(_with_shard(**changes), "p").shards
    assert (shard.sha256, shard.sha256_is_published) == (sha256, is_published)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sha256": None, "sha256_published": True}, "null and cannot be the published one"),
        ({"sha256": "md5:0"}, "not a digest of a kind known here"),
        ({"sha256_published": 1}, "not bool"),
    ],
)
def test_a_shard_entry_that_lies_is_refused(changes: dict, match: str) -> None:
    """Not one of the three."""
    with pytest.raises(FormatError, match=match):
        parse_set_manifest(_with_shard(**changes), "p")


def test_a_shard_entry_without_the_field_is_refused() -> None:
    """No digest is said by null; nothing said is a field that is missing."""
    text = _with_shard(sha256="sha256:" + "1" * 64).replace(b'"sha256": "sha256:' + b"1" * 64 + b'", ', b"")
    values = json.loads(text)
    del values["root_digest"]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    values["root_digest"] = f"sha256:{hashlib.sha256(canonical).hexdigest()}"
    with pytest.raises(FormatError, match="'sha256' is missing"):
        parse_set_manifest(json.dumps(values).encode(), "p")


def test_refuse_other_version() -> None:
    """Only a text that says so itself is of another version; broken ones are for others to judge."""
    own, other = b'{"format": "mmsplit-partition"', b'{"format": "x", "format_version": 2}'
    for text in (b"", b"[]", b"{}", own + b"}", json.dumps(_base()).encode(), other, own + b', "format_version": "2"}'):
        refuse_other_version(text, "p")
    with pytest.raises(FormatError, match="found 2"):
        refuse_other_version(b'{"format": "mmsplit-partition", "format_version": 2}', "p")


@pytest.mark.parametrize(
    ("size", "frame"),
    [
        (3, b""),
        (3, b"garbage"),
        (4, KeptBytes.of(b"abc").frame),
        (3, KeptBytes.of(b"abc").frame + b"x"),
        (3, KeptBytes.of(b"abc").frame[:-1]),
        (2**40, b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x03\x00\x00x"),
        (900, b"\x28\xb5\x2f\xfd\xe0" + (900).to_bytes(8, "little") + b"\x03\x00\x00x"),
    ],
)
def test_kept_bytes_that_are_not_there(size: int, frame: bytes) -> None:
    """A frame gives exactly the bytes that were kept, or an error; a promise alone costs nothing."""
    with pytest.raises(IntegrityError, match="cannot be decoded"):
        KeptBytes(size, frame).data("p")


@pytest.mark.parametrize("text", [b"{} ", b"", b"nonsense", b'{"a":1}\n'])
def test_other_bytes_of_the_same_meaning(text: bytes) -> None:
    """Only the very text that was written is as written."""
    assert not is_as_written(text)
    assert is_as_written(b'{\n "a": "\\u00e8"\n}\n')
    assert not is_as_written(b'{\n "a": "\\u00E8"\n}\n')


def test_json_is_read_strictly() -> None:
    """Duplicate keys at any depth, NaN, Infinity, depth, other than an object."""
    for text in (b'{"a": {"b": 1, "b": 1}}', b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 99999, b"3", b"{", b"\xff"):
        with pytest.raises(IntegrityError, match="manifest is not"):
            load_json_object(text, "p")
    assert load_json_object(b'{"a": 1}', "p") == {"a": 1}


@pytest.mark.parametrize("name", ["a/b", "../a", "/a", "a\\b", "c:x", "", ".", "..", "a\0", "a\n", "\ud800"])
def test_names_that_could_lead_elsewhere(name: str) -> None:
    """A plain name is a file right inside its directory, on every system; a relative one is made of plain names."""
    with pytest.raises(FormatError, match="plain file name"):
        Fields({"n": name}, "p").plain_name("n")
    relative = Fields({"n": f"sub/{name}"}, "p")
    if name != "a/b":
        with pytest.raises(FormatError, match="plain relative path"):
            relative.relative_name("n")
    else:
        assert relative.relative_name("n") == "sub/a/b"
