"""GGUF files nobody should trust: by table, and by mutation of good ones.  Each gives a layout or one error."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I32,
    TEXT,
    U8,
    U16,
    U32,
    U64,
    Packed,
    Row,
    array,
    gguf_file,
    number,
    pair,
    parse,
    require_cover,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint import gguf_file as gguf_file_module
from mmsplit.checkpoint import gguf_values
from mmsplit.checkpoint.gguf_config import gguf_config
from mmsplit.checkpoint.gguf_file import read_gguf_file
from mmsplit.checkpoint.gguf_types import GGML_TYPES
from mmsplit.errors import GgufFileError

FIXTURES = Path(__file__).parent / "gguf_fixtures"
GOOD = gguf_file([Row("w")], {"a.b": number(U32, 7), "tokens": array(TEXT, [text("x"), text("yz")])})
Q4_K = 12


def with_alignment(value: Packed) -> bytes:
    return gguf_file([Row("w")], {"general.alignment": value})


def with_split(*values: int) -> bytes:
    keys = ("split.no", "split.count", "split.tensors.count")
    return gguf_file([Row("w")], {key: number(I32, value) for key, value in zip(keys, values, strict=False)})


def two(first: Row, second: Row, **options: object) -> bytes:
    return gguf_file([first, second], **options)  # type: ignore[arg-type]


def nested(depth: int) -> Packed:
    value = array(U8, [b"x"])
    for _ in range(depth):
        value = array(ARRAY, [value[1]])
    return value


HOSTILE = {
    "nothing": (b"", "not a GGUF file"),
    "three bytes": (b"GGU", "not a GGUF file"),
    "magic alone": (b"GGUF", "header reaches past the end"),
    "counts cut off": (GOOD[:20], "header reaches past the end"),
    "another format": (b"PK\3\4" + bytes(100), "not a GGUF file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "GGML": (b"lmgg" + bytes(100), "from before GGUF"),
    "GGJT": (b"tjgg" + bytes(100), "from before GGUF"),
    "version 0": (gguf_file([Row("w")], version=0), "version is not known"),
    "version 1": (gguf_file([Row("w")], version=1), "version 1, which is not read"),
    "version 4": (gguf_file([Row("w")], version=4), "A newer mmsplit may read it"),
    "big-endian": ((FIXTURES / "big_endian.gguf").read_bytes(), "big-endian"),
    "too many tensors": (gguf_file([Row("w")], tensor_count=2**64 - 1), "too many tensors"),
    "more tensors than there are": (gguf_file([Row("w")], tensor_count=3), "reaches past the end"),
    "too many pairs": (gguf_file([Row("w")], pair_count=2**64 - 1), "too many metadata pairs"),
    "more pairs than there are": (gguf_file([], {"a": number(U8, 1)}, pair_count=2), "reaches past the end"),
    "key longer than the file": (gguf_file([], [text("abc", 60_000)]), "reaches past the end"),
    "key of 2**64 - 1 bytes": (gguf_file([], [text("abc", 2**64 - 1)]), "metadata key is too long"),
    "empty key": (gguf_file([], {"": number(U8, 1)}), "metadata key is empty"),
    "key that is no text": (gguf_file([], [pair(b"\xff", number(U8, 1))]), "metadata key is not UTF-8"),
    "key twice": (gguf_file([], [pair("a", number(U8, 1))] * 2), "'a' occurs twice"),
    "type of value": (gguf_file([], {"a": (13, b"")}), "type that is not known .expected 0 to 12, found 13"),
    "type of elements": (gguf_file([], {"a": array(99, [])}), "type that is not known"),
    "number cut off": (gguf_file([], {"a": (U64, b"1234567")}), "reaches past the end"),
    "text longer than the file": (gguf_file([], {"a": (TEXT, text("b", 2**63))}), "reaches past the end"),
    "array longer than the file": (gguf_file([], {"a": array(F64, [], 2**61)}), "reaches past the end"),
    "array of 2**64 - 1 texts": (gguf_file([], {"a": array(TEXT, [text("b")], 2**64 - 1)}), "reaches past the end"),
    "texts that are not there": (gguf_file([], {"a": array(TEXT, [text("b")], 2), "c": number(U8, 1)}), "past the end"),
    "last text too long": (gguf_file([], {"a": array(TEXT, [text("b"), text("c", 2**62)])}), "reaches past the end"),
    "array of 2**64 - 1 arrays": (
        gguf_file([], {"a": array(ARRAY, [array(U8, [])[1]], 2**64 - 1)}),
        "reaches past the end",
    ),
    "nested without end": (gguf_file([], {"a": nested(1000)}), "nested too deep"),
    "alignment 0": (with_alignment(number(U32, 0)), "no power of two"),
    "alignment 24": (with_alignment(number(U32, 24)), "no power of two"),
    "alignment -32": (with_alignment(number(I8, -32)), "no power of two"),
    "alignment true": (with_alignment(number(BOOL, 1)), "no power of two"),
    "alignment of text": (with_alignment((TEXT, text("32"))), "no power of two"),
    "alignment beyond the file": (with_alignment(number(U32, 2**31)), "past the end of the file"),
    "name of 2**64 - 1 bytes": (gguf_file([], [], tensor_count=1) + text("n", 2**64 - 1), "is too long"),
    "name that is no text": (gguf_file([Row(b"\xc3\x28")]), "name of a tensor is not UTF-8"),
    "five dimensions": (gguf_file([Row("w", (1, 1, 1, 1, 4))]), "too many dimensions"),
    "2**32 - 1 dimensions": (gguf_file([Row("w")], dimension_count=2**32 - 1), "too many dimensions"),
    "too many elements": (gguf_file([Row("w", (2**40, 2**40), data=b"")]), "too many elements"),
    "elements that overflow to none": (gguf_file([Row("w", (2**32, 2**32), data=b"")]), "too many elements"),
    "negative size": (gguf_file([Row("w", (2**64 - 4,), data=b"")]), "too many elements"),
    "negative size of an empty tensor": (gguf_file([Row("w", (0, 2**64 - 1), data=b"")]), "too many elements"),
    "type 4, from before GGUF": (gguf_file([Row("w", type_number=4)]), "tensor type 4 is not known"),
    "type of a fork": (gguf_file([Row("w", type_number=139)]), "type 139 is not known.*--allow-unknown-dtypes"),
    "type -1": (gguf_file([Row("w", type_number=2**32 - 1)]), "tensor type 4294967295 is not known"),
    "row that is no number of blocks": (gguf_file([Row("w", (128, 2), Q4_K)]), "blocks of Q4_K .expected a multiple"),
    "scalar of a block type": (gguf_file([Row("w", (), Q4_K)]), "do not divide into the blocks"),
    "offset that is not aligned": (gguf_file([Row("w", offset=4)], data=bytes(64)), "offset is not aligned"),
    "offset beyond the file": (gguf_file([Row("w", offset=2**63)], data=bytes(64)), "past the end of the file"),
    "data cut off": (gguf_file([Row("w", (8,))])[:-1], "past the end of the file"),
    "empty tensor beyond the file": (gguf_file([Row("w", (0,), offset=96)], data=bytes(64)), "past the end"),
    "tensor twice": (two(Row("w"), Row("w")), "tensor 'w'.*occurs twice"),
    "same bytes for two": (two(Row("v", (8,), 0, 0), Row("w", (8,), 0, 0), data=bytes(64)), "overlaps"),
    "overlap": (two(Row("v", (16,), 0, 0), Row("w", (8,), 0, 32), data=bytes(64)), "overlaps the one before"),
    "empty tensor inside another": (two(Row("v", (16,), 0, 0), Row("w", (0,), 0, 32), data=bytes(64)), "overlaps"),
    "fifth of four files": (with_split(4, 4, 9), "one of several, but not which"),
    "of -1 files": (with_split(0, -1, 9), "one of several, but not which"),
    "of 2 files with -1 tensors": (with_split(0, 2, -1), "one of several, but not which"),
    "count of files that is no number": (
        gguf_file([Row("w")], {"split.count": (TEXT, text("3"))}),
        "one of several, but not which",
    ),
}


@pytest.mark.parametrize(("file", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused(file: bytes, words: str) -> None:
    """One error each, which names the file, stays short, and says what to do."""
    with pytest.raises(GgufFileError, match=words) as caught:
        parse(file)
    assert caught.value.path == "f"
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 3


#: What may be wrong even where types are not known.
UNKNOWN = {
    "no byte for it": gguf_file([Row("w", (4,), 139, offset=64)], data=bytes(64)),
    "two at one place": two(Row("v", (4,), 139, 0), Row("w", (4,), 139, 0), data=bytes(64)),
    "inside another": two(Row("v", (16,), 0, 0), Row("w", (4,), 139, 32), data=bytes(64)),
    "beyond the file": gguf_file([Row("w", (4,), 139, offset=2**62)], data=bytes(64)),
    "not aligned": gguf_file([Row("w", (4,), 139, offset=1)], data=bytes(64)),
    "too many elements": gguf_file([Row("w", (2**62, 4), 139, 0, b"")], data=bytes(64)),
}


@pytest.mark.parametrize("file", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_types_are_not_trusted_more(file: bytes) -> None:
    """A place of its own, in the file, is needed all the same."""
    with pytest.raises(GgufFileError):
        parse(file, allow_unknown_dtypes=True)


def test_good_file_is_good() -> None:
    """What the table spoils is read when it is not spoilt."""
    require_cover(parse(GOOD), GOOD)
    assert parse(GOOD).metadata["a.b"] == 7
    assert parse(gguf_file([], {"a": nested(3)})).metadata == {"a": gguf_values.Omitted(1)}


def test_cut_anywhere_before_the_last_byte_of_data_is_refused() -> None:
    """A download that stopped is never taken for a whole file."""
    for length in range(len(GOOD) - 16):  # behind it is padding, which no tensor needs
        with pytest.raises(GgufFileError):
            parse(GOOD[:length])


class Claims:
    """A file that is as large as it says and of which only the beginning is not zeros."""

    def __init__(self, head: bytes, size_bytes: int) -> None:
        self.head = head
        self.size_bytes = size_bytes
        self.read_bytes = 0

    def read(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= self.size_bytes
        self.read_bytes += stop - start
        return self.head[start:stop].ljust(stop - start, b"\0")


TEBIBYTE = 1 << 40
#: Lengths and counts that a file of 1 TiB could hold, and words of the error.
LARGE = {
    "text": (gguf_file([], {"a": (TEXT, text("b", TEBIBYTE // 2))}), "header is too long"),
    "array": (gguf_file([], {"a": array(F32, [], TEBIBYTE // 16)}), "header is too long"),
    "texts": (gguf_file([], {"a": array(TEXT, [], TEBIBYTE // 16)}), "header is too long"),
    "nothing but data": (gguf_file([]), "too much of the file lies outside its tensors"),
    "hole": (gguf_file([Row("w", offset=TEBIBYTE // 2)]), "too much of the file lies outside its tensors"),
    "tail": (gguf_file([Row("w")]), "too much of the file lies outside its tensors"),
}


@pytest.mark.parametrize(("head", "words"), LARGE.values(), ids=LARGE)
def test_forged_lengths_cost_nothing(head: bytes, words: str) -> None:
    """However large the file is: no memory, and hardly a read."""
    file = Claims(head, TEBIBYTE)
    tracemalloc.start()
    try:
        with pytest.raises(GgufFileError, match=words):
            read_gguf_file(file.read, file.size_bytes, "f", "s")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert file.read_bytes <= 6 << 20


def test_long_array_is_passed_over_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MiB of texts in a window of 64 KiB; what is seen of it at once is small."""
    monkeypatch.setattr(gguf_values, "_FIRST_WINDOW_BYTES", 16 << 10)
    monkeypatch.setattr(gguf_values, "_MAX_WINDOW_BYTES", 64 << 10)
    head = gguf_file([], {"a": array(TEXT, [], 1 << 18)})
    file = Claims(head, len(head) + (2 << 20))
    tracemalloc.start()
    try:
        assert read_gguf_file(file.read, file.size_bytes, "f", "s").metadata == {"a": gguf_values.Omitted(1 << 18)}
        assert tracemalloc.get_traced_memory()[1] < 512 << 10
    finally:
        tracemalloc.stop()


def test_header_and_what_is_kept_may_be_long_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds hold where they stand."""
    file = gguf_file([Row("w")], {"a": (TEXT, text("b" * 9_900))})
    monkeypatch.setattr(gguf_values, "MAX_HEADER_BYTES", 10_000)
    assert parse(file).tensors
    with pytest.raises(GgufFileError, match="header is too long"):
        parse(gguf_file([Row("w")], {"a": (TEXT, text("b" * 10_000))}))
    monkeypatch.setattr(gguf_file_module, "MAX_KEPT_BYTES", 5_000)
    with pytest.raises(GgufFileError, match="too much of the file lies outside its tensors"):
        parse(file)


def require_one_answer(file: bytes) -> None:
    """A layout that covers the file, a configuration or none, or one error."""
    for allow_unknown_dtypes in (False, True):
        try:
            found = parse(file, allow_unknown_dtypes=allow_unknown_dtypes)
        except GgufFileError:
            continue
        require_cover(found, file)
        gguf_config(found.metadata)


SMALL = [path.read_bytes() for path in sorted(FIXTURES.glob("*.gguf")) if path.stat().st_size < 6000] + [GOOD]


@settings(max_examples=400)
@given(st.data())
def test_any_mutation_gives_a_layout_or_one_error(data: st.DataObject) -> None:
    """Bytes changed, dropped, repeated or moved: never another exception, never a byte twice or not at all."""
    file = bytearray(data.draw(st.sampled_from(SMALL)))
    head_bytes = min(len(file), 1200)  # most of the rest are numbers that mean nothing here
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, min(head_bytes, len(file)) - 1))
        stop = min(len(file), start + data.draw(st.integers(1, 20)))
        match data.draw(st.sampled_from(["change", "bit", "drop", "repeat", "move"])):
            case "change":
                file[start:stop] = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
            case "bit":
                file[start] ^= 1 << data.draw(st.integers(0, 7))
            case "drop":
                del file[start:stop]
            case "repeat":
                file[start:start] = file[start:stop]
            case "move":
                file[start:stop] = file[stop : 2 * stop - start]
        if not file:
            break
    require_one_answer(bytes(file))


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
def test_arbitrary_bytes_behind_a_good_beginning(rest: bytes, tensor_count: int, pair_count: int) -> None:
    """Whatever comes after the counts."""
    require_one_answer(b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + rest)


KINDS = sorted(GGML_TYPES)


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, tuple[int, ...]]]:
    """Types, known or not, and sizes that suit them."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from([*KINDS, 139]))
        block = GGML_TYPES[kind].block_elements if kind in GGML_TYPES else 1
        others = draw(st.lists(st.integers(0, 4), max_size=3))
        found.append((kind, (block * draw(st.integers(0, 2)), *others)))
    return found


@settings(max_examples=200)
@given(rows(), st.sampled_from([1, 8, 32, 64]), st.integers(0, 40), st.randoms(use_true_random=False))
def test_ranges_cover_any_good_file(
    kinds: Sequence[tuple[int, tuple[int, ...]]], alignment: int, tail: int, random: st.random_module
) -> None:
    """Each byte once, and each tensor's bytes are those that were written for it, in whatever order they lie."""
    written, position, places, body = {}, 0, {}, b""
    order = list(range(len(kinds)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for i in order:
        kind, sizes = kinds[i]
        params = 1
        for size in sizes:
            params *= size
        block = GGML_TYPES.get(kind)
        size_bytes = 10 * bool(params) if block is None else params // block.block_elements * block.block_bytes
        content = bytes([i + 1]) * size_bytes
        places[i], written[f"t{i}"] = position, content
        body += content + bytes(-len(content) % alignment)
        position = len(body)
    file = gguf_file(
        [Row(f"t{i}", sizes, kind, places[i]) for i, (kind, sizes) in enumerate(kinds)],
        {"general.alignment": number(U32, alignment), "general.file_type": number(U16, 1)},
        alignment=alignment,
        data=body,
        tail=bytes(tail),
    )
    found = parse(file, allow_unknown_dtypes=True)
    require_cover(found, file)
    assert {tensor.name for tensor in found.tensors} == set(written)
    for tensor in found.tensors:
        content = file[tensor.start_offset : tensor.stop_offset]
        if tensor.dtype.startswith("GGML_"):
            assert content.startswith(written[tensor.name])
            assert not any(content[len(written[tensor.name]) :])
        else:
            assert content == written[tensor.name]
