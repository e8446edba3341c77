"""GGUF files, as the real gguf package wrote them: what is found is what its own reader finds, byte for byte."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_builder import (
    F32,
    I32,
    TEXT,
    U8,
    U16,
    U32,
    Row,
    array,
    contents,
    gguf_file,
    number,
    parse,
    require_cover,
    text,
)

from mmsplit.checkpoint.file_reader import FileReader
from mmsplit.checkpoint.gguf_file import GgufSplit, is_gguf_file, read_gguf_file
from mmsplit.checkpoint.gguf_types import GGML_TYPES
from mmsplit.checkpoint.gguf_values import Omitted
from mmsplit.dtypes import DTYPES
from mmsplit.errors import SourceChangedError

FIXTURES = Path(__file__).parent / "gguf_fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
FILES = EXPECTED["files"]


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_those_of_the_gguf_package(name: str) -> None:
    """Names, types, shapes (numpy's order), places and bytes."""
    file = (FIXTURES / name).read_bytes()
    found = parse(file)
    require_cover(found, file)
    assert is_gguf_file(file)
    assert (found.version, found.alignment) == (FILES[name]["version"], FILES[name]["alignment"])
    assert {
        tensor.name: {
            "type": tensor.dtype,
            "shape": list(tensor.shape),
            "offset": tensor.start_offset,
            "bytes": tensor.size_bytes,
            "sha256": hashlib.sha256(contents(tensor, file)).hexdigest(),
        }
        for tensor in found.tensors
    } == FILES[name]["tensors"]
    assert {tensor.shard for tensor in found.tensors} <= {"s"}
    assert found.notes == ()


@pytest.mark.parametrize("name", FILES)
def test_metadata_are_those_of_the_gguf_package(name: str) -> None:
    """Texts and numbers as they are; of arrays of texts only how many they hold."""

    def seen(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return Omitted(len(value)) if value and isinstance(value[0], str) else tuple(value)

    expected = {key: seen(value) for key, value in FILES[name]["metadata"].items()}
    if "nested" in expected:  # two arrays, which the package flattens
        expected["nested"] = Omitted(2)
    assert parse((FIXTURES / name).read_bytes()).metadata == expected


def test_types_are_those_of_the_gguf_package() -> None:
    """Every number, name, block and size; those beyond are the three that were taken back."""
    found = {name: GGML_TYPES[kind] for name, kind in EXPECTED["numbers"].items()}
    assert {name: [kind.block_elements, kind.block_bytes] for name, kind in found.items()} == EXPECTED["sizes"]
    assert {name: kind.name for name, kind in found.items()} == {name: name for name in found}
    assert set(GGML_TYPES) - set(EXPECTED["numbers"].values()) == {31, 32, 33}


def test_a_dtype_has_one_meaning() -> None:
    """Types of the one table of dtypes have its width; the others are not in it, and so opaque bytes everywhere."""
    for kind in GGML_TYPES.values():
        known = DTYPES.get(kind.name)
        assert (known is None) == (kind.block_elements > 1), kind
        assert known is None or known.bits == 8 * kind.block_bytes
    assert len({kind.name for kind in GGML_TYPES.values()}) == len(GGML_TYPES)


def test_real_file_through_the_reader_of_shards() -> None:
    """The reads are half-open ranges, as `FileReader.read` has them."""
    path = FIXTURES / "llama_tied.gguf"
    with FileReader(path) as reader:
        found = read_gguf_file(reader.read, reader.size_bytes, str(path), path.name)
    assert found.tensors[0].shard == "llama_tied.gguf"
    assert found.tensors == tuple(tensor._replace(shard=path.name) for tensor in parse(path.read_bytes()).tensors)


def test_version_2_is_read_as_version_3() -> None:
    """They differ in nothing but the possibility of big-endian files."""
    file = bytearray((FIXTURES / "llama_tied.gguf").read_bytes())
    third = parse(bytes(file))
    struct.pack_into("<I", file, 4, 2)
    second = parse(bytes(file))
    assert second == third._replace(version=2)


def test_several_files_say_which_they_are() -> None:
    """The first of them may have no tensors at all; all of it is kept then."""
    found = [parse((FIXTURES / f"split-0000{i}-of-00004.gguf").read_bytes()) for i in (1, 2, 3, 4)]
    assert [file.split for file in found] == [GgufSplit(i, 4, 12) for i in range(4)]
    assert sum(len(file.tensors) for file in found) == 12
    assert found[0].tensors == ()
    assert found[0].kept == ((0, (FIXTURES / "split-00001-of-00004.gguf").stat().st_size),)
    assert parse((FIXTURES / "llama_tied.gguf").read_bytes()).split is None


def test_file_that_was_put_together_again_is_one_of_none() -> None:
    """llama-gguf-split --merge leaves a count of 0."""
    metadata = {"split.no": number(U16, 0), "split.count": number(U16, 0), "split.tensors.count": number(I32, 9)}
    assert parse(gguf_file([Row("w")], metadata)).split is None
    assert parse(gguf_file([Row("w")], {"split.count": number(U16, 2)})).split == GgufSplit(0, 2, None)


def test_tensors_come_in_file_order_whatever_the_header_has() -> None:
    """And an empty one takes no byte, wherever it says it is."""
    data = bytes(range(96))
    rows = [Row("c", (8,), 0, 64), Row("e", (0, 3), 0, 32), Row("a", (8,), 0, 0), Row("b", (8,), 0, 32)]
    file = gguf_file(rows, data=data)
    found = parse(file)
    require_cover(found, file)
    assert [tensor.name for tensor in found.tensors] == ["a", "e", "b", "c"]
    assert [contents(tensor, file) for tensor in found.tensors] == [data[:32], b"", data[32:64], data[64:]]
    assert found.tensors[1].shape == (3, 0)


def test_holes_and_tails_are_kept() -> None:
    """Nothing is lost by them, so nothing is refused."""
    file = gguf_file([Row("a", (1,), 0, 0), Row("b", (1,), 0, 96)], data=b"A" * 4 + b"?" * 92 + b"B" * 4, tail=b"tail")
    found = parse(file)
    require_cover(found, file)
    assert [file[start:stop] for start, stop in found.kept[1:]] == [b"?" * 92, b"tail"]


def test_empty_tensor_in_a_hole_does_not_cut_it() -> None:
    """It has no bytes to part what is kept."""
    file = gguf_file([Row("a", (8,), 0, 0), Row("e", (0,), 0, 64), Row("b", (8,), 0, 96)], data=bytes(128))
    found = parse(file)
    require_cover(found, file)
    assert len(found.kept) == 2


def test_scalar_and_odd_sizes() -> None:
    """No dimension is one element; an alignment of 1 needs no padding."""
    file = gguf_file(
        [Row("scalar", (), data=b"1234"), Row("three", (3,))], {"general.alignment": number(U32, 1)}, alignment=1
    )
    found = parse(file)
    require_cover(found, file)
    assert [(t.shape, t.params, contents(t, file)) for t in found.tensors] == [((), 1, b"1234"), ((3,), 3, bytes(12))]


def test_file_without_data_may_end_before_its_padding() -> None:
    """There is nothing to be aligned."""
    file = gguf_file([], {"general.architecture": (TEXT, text("llama"))})
    assert len(file) % 32
    assert parse(file).kept == ((0, len(file)),)


UNKNOWN = [
    Row("known", (8,)),
    Row("new", (256, 2), 139, data=b"n" * 70),
    Row("after", (2,)),
    Row("last", (5,), 200, data=b"x"),
]


def test_unknown_types_reach_to_the_next_tensor() -> None:
    """Their own size cannot be told: what pads them goes with them, and each byte is carried once."""
    file = gguf_file(UNKNOWN)
    found = parse(file, allow_unknown_dtypes=True)
    require_cover(found, file)
    assert [(t.name, t.dtype, t.shape, t.size_bytes) for t in found.tensors] == [
        ("known", "F32", (8,), 32),
        ("new", "GGML_139", (2, 256), 96),
        ("after", "F32", (2,), 8),
        ("last", "GGML_200", (5,), 32),
    ]
    assert found.notes == (
        "2 tensor(s) of types that are not known (GGML_139, GGML_200) are carried as opaque bytes with padding",
    )
    assert not any(dtype in DTYPES for dtype in ("GGML_139", "GGML_200"))


def test_empty_tensor_of_an_unknown_type_takes_nothing() -> None:
    """Its shape says so, whatever the type."""
    file = gguf_file([Row("none", (0,), 139, 0), Row("some", (8,), 0, 0)], data=bytes(32))
    found = parse(file, allow_unknown_dtypes=True)
    require_cover(found, file)
    assert [tensor.size_bytes for tensor in found.tensors] == [0, 32]


def test_tokenizer_is_read_in_few_pieces_and_passed_over() -> None:
    """Over a network each read is a request: a header of 30 MB takes four."""
    texts = [text("token" * (i % 7)) for i in range(150_000)]
    scores = array(F32, [bytes(4)] * 150_000)
    pairs = {"tokens": array(TEXT, texts), "scores": scores, "long": (TEXT, text(bytes(25 << 20)))}
    file = gguf_file([Row("w", (4,), data=b"DATA" * 4)], pairs)
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return file[start:stop]

    found = read_gguf_file(read, len(file), "f", "s")
    assert contents(found.tensors[0], file) == b"DATA" * 4
    assert found.metadata == {"tokens": Omitted(150_000), "scores": Omitted(150_000), "long": Omitted(25 << 20)}
    assert len(reads) <= 4
    assert sum(stop - start for start, stop in reads) < 16 << 20  # nobody fetches a text that is not looked at


def test_texts_may_end_where_a_window_ends() -> None:
    """A length, or a text, may lie across two reads: at every place."""
    for first in range((1 << 20) - 120, (1 << 20) + 8, 3):
        pairs = {
            "pad": array(U8, [bytes(first)], first),
            "tokens": array(TEXT, [text("abc"), text(""), text("é" * 9)]),
        }
        file = gguf_file([Row("w")], {**pairs, "after": (TEXT, text("kept"))})
        found = parse(file)
        assert found.metadata["after"] == "kept"
        assert found.metadata["tokens"] == Omitted(3)


def test_bytes_that_do_not_come_are_an_error() -> None:
    """A file that shrank between its size and its reads."""
    file = (FIXTURES / "llama_tied.gguf").read_bytes()
    with pytest.raises(SourceChangedError, match="bytes of the file are missing"):
        read_gguf_file(lambda start, stop: file[start:stop][:-1], len(file), "f", "s")


def test_text_that_is_not_utf8_is_shown_escaped() -> None:
    """Values are for planning and for people; their bytes are kept as they are, in the header."""
    assert parse(gguf_file([], {"a": (TEXT, text(b"x\xff"))})).metadata == {"a": "x\\xff"}


def test_kept_values_are_bounded() -> None:
    """From some point on values are passed over, however short they are."""
    pairs = {f"k{i}": (TEXT, text(b"v" * 60_000)) for i in range(100)}
    values = list(parse(gguf_file([], pairs)).metadata.values())
    assert sum(len(value) for value in values if isinstance(value, str)) <= 4 << 20
    assert values[0] == "v" * 60_000
    assert values[-1] == Omitted(60_000)
