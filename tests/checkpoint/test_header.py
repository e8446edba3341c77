"""The header validator: hostile headers by table, and its law against the safetensors library."""

import json
import sys
import tracemalloc
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.checkpoint.header import MAX_HEADER_BYTES, parse_header, parse_header_length
from mmsplit.checkpoint.tensor import ShardHeader
from mmsplit.dtypes import DTYPES
from mmsplit.errors import HeaderError

U8 = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


def shard(header: str | bytes, data: bytes = b"") -> bytes:
    """The bytes of a file with this header, right or wrong, and a length field that fits it."""
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def parse(file: bytes, *, allow_unknown_dtypes: bool = False) -> ShardHeader:
    """What mmsplit makes of a file."""
    length = parse_header_length(file[:8], len(file), "s")
    return parse_header(file[8 : 8 + length], len(file), "s", "s", allow_unknown_dtypes=allow_unknown_dtypes)


def reference_accepts(file: bytes) -> bool:
    """Whether the safetensors library reads the file; its panics count as refusals."""
    try:
        safetensors.deserialize(file)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return False
    return True


def require_law(file: bytes) -> None:
    """What we accept, the reference accepts, and it finds the same tensors in the same bytes."""
    try:
        ours = parse(file)
    except HeaderError:
        return
    theirs = {
        name: (record["dtype"], record["shape"], bytes(record["data"]))
        for name, record in safetensors.deserialize(file)
    }
    assert theirs == {t.name: (t.dtype, list(t.shape), file[t.start_offset : t.stop_offset]) for t in ours.tensors}


def with_field(field: str, value: str) -> str:
    """The small header with one field written differently."""
    old = {"dtype": '"U8"', "shape": "[2]", "data_offsets": "[0,2]"}[field]
    return U8.replace(f'"{field}":{old}', f'"{field}":{value}')


def with_extra(value: str) -> str:
    """The small header with an unknown field."""
    return U8.replace('"dtype"', f'"extra":{value},"dtype"')


def entry(dtype: str, shape: str, offsets: str) -> str:
    """A header of one tensor."""
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


#: file -> words of the error.  The reference refuses all of these.
HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "length past the end": ((3).to_bytes(8, "little") + b"{}", "past the end"),
    "length over the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "beyond what the format allows"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "beyond what the format allows"),
    "git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "no header": (shard(""), "begins with"),
    "header is a list": (shard("[]"), "begins with"),
    "NUL before": (shard("\0" + U8, b"12"), "begins with"),
    "byte order mark": (shard("\ufeff" + U8, b"12"), "begins with"),
    "NUL after": (shard(U8 + "\0", b"12"), "not JSON: Extra data"),
    "no-break space after": (shard(U8 + "\u00a0", b"12"), "not JSON: Extra data"),
    "second object after": (shard(U8 + "{}", b"12"), "not JSON: Extra data"),
    "cut short": (shard(U8[:-1], b"12"), "not JSON"),
    "trailing comma": (shard(with_field("shape", "[2,]"), b"12"), "not JSON"),
    "single quotes": (shard(U8.replace('"', "'"), b"12"), "not JSON"),
    "not UTF-8": (shard(U8.encode().replace(b'"a"', b'"\xff"'), b"12"), "not UTF-8"),
    "surrogate in UTF-8": (shard(U8.encode().replace(b'"a"', b'"\xed\xa0\x80"'), b"12"), "not UTF-8"),
    "overlong UTF-8": (shard(U8.encode().replace(b'"a"', b'"\xc1\xa1"'), b"12"), "not UTF-8"),
    "control character in a name": (shard(U8.replace('"a"', '"\x01"'), b"12"), "not JSON"),
    "lone surrogate in a name": (shard(U8.replace('"a"', r'"\ud800"'), b"12"), "lone surrogate"),
    "lone low surrogate": (shard(U8.replace('"a"', r'"\uDC00"'), b"12"), "lone surrogate"),
    "lone surrogate in an unknown field": (shard(with_extra(r'"\udbff"'), b"12"), "lone surrogate"),
    "lone surrogate in the metadata": (shard(r'{"__metadata__":{"a":"\udfff"}}'), "lone surrogate"),
    "deep": (shard('{"a":' * 200_000), "nested too deep"),
    "deep in an unknown field": (shard(with_extra("[" * 100_000 + "]" * 100_000), b"12"), "too deep"),
    "NaN": (shard(with_extra("NaN"), b"12"), "NaN is not a JSON number"),
    "-Infinity": (shard(with_extra("-Infinity"), b"12"), "-Infinity is not a JSON number"),
    "float beyond double": (shard(with_extra("1e309"), b"12"), "out of range"),
    "integer beyond double": (shard(with_extra("9" * 400), b"12"), "out of range"),
    "negative integer beyond double": (shard(with_extra("[-1" + "0" * 309 + "]"), b"12"), "out of range"),
    "integer of 5,000 digits": (shard(with_extra("9" * 5000), b"12"), "not JSON"),
    "leading zero": (shard(with_field("shape", "[02]"), b"12"), "not JSON"),
    "plus sign": (shard(with_field("shape", "[+2]"), b"12"), "not JSON"),
    "Arabic digit": (shard(with_field("shape", "[٢]"), b"12"), "not JSON"),
    "metadata twice": (shard('{"__metadata__":{},"__metadata__":{}}'), "occurs twice"),
    "metadata is a list": (shard('{"__metadata__":[]}'), "not a map from text to text"),
    "metadata is text": (shard('{"__metadata__":"pt"}'), "not a map from text to text"),
    "metadata with a number": (shard('{"__metadata__":{"step":1}}'), "not a map from text to text"),
    "metadata with null": (shard('{"__metadata__":{"step":null}}'), "not a map from text to text"),
    "entry is null": (shard('{"a":null}'), "not a JSON object"),
    "entry is a number": (shard('{"a":7}'), "not a JSON object"),
    "no dtype": (shard('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"12"), "no field 'dtype'"),
    "no shape": (shard('{"a":{"dtype":"U8","data_offsets":[0,2]}}', b"12"), "no field 'shape'"),
    "no offsets": (shard('{"a":{"dtype":"U8","shape":[2]}}', b"12"), "no field 'data_offsets'"),
    "dtype null": (shard(with_field("dtype", "null"), b"12"), "dtype is not text"),
    "dtype a list": (shard(with_field("dtype", '["U8"]'), b"12"), "dtype is not text"),
    "dtype unknown": (shard(with_field("dtype", '"Q4_K"'), b"12"), "dtype 'Q4_K' is not known"),
    "dtype in lower case": (shard(with_field("dtype", '"u8"'), b"12"), "dtype 'u8' is not known"),
    "offsets of one": (shard(with_field("data_offsets", "[0]"), b"12"), "not a list of two"),
    "offsets of three": (shard(with_field("data_offsets", "[0,2,2]"), b"12"), "not a list of two"),
    "offsets an object": (shard(with_field("data_offsets", '{"0":0,"1":2}'), b"12"), "not a list of two"),
    "offsets text": (shard(with_field("data_offsets", '"02"'), b"12"), "not a list of two"),
    "offset a float": (shard(with_field("data_offsets", "[0,2.0]"), b"12"), "unsigned 64-bit"),
    "offset with exponent": (shard(with_field("data_offsets", "[0,2e0]"), b"12"), "unsigned 64-bit"),
    "offset negative": (shard(with_field("data_offsets", "[-2,0]"), b"12"), "unsigned 64-bit"),
    "offset -0": (shard(with_field("data_offsets", "[-0,2]"), b"12"), "-0 is not an integer"),
    "offset true": (shard(with_field("data_offsets", "[false,2]"), b"12"), "unsigned 64-bit"),
    "offset 2**64": (shard(with_field("data_offsets", f"[{2**64},{2**64 + 2}]"), b"12"), "unsigned 64-bit"),
    "offset near 2**64": (shard(with_field("data_offsets", f"[0,{2**64 - 1}]"), b"12"), "do not fit dtype and shape"),
    "offsets backwards": (shard(with_field("data_offsets", "[2,0]"), b"12"), "run backwards"),
    "shape a number": (shard(with_field("shape", "2"), b"12"), "shape is not a list"),
    "shape null": (shard(with_field("shape", "null"), b"12"), "shape is not a list"),
    "shape with a float": (shard(with_field("shape", "[2.0]"), b"12"), "list of unsigned 64-bit"),
    "shape with 1e0": (shard(with_field("shape", "[1e0,2]"), b"12"), "list of unsigned 64-bit"),
    "shape with true": (shard(with_field("shape", "[true,2]"), b"12"), "list of unsigned 64-bit"),
    "shape negative": (shard(with_field("shape", "[-1,-2]"), b"12"), "list of unsigned 64-bit"),
    "shape with text": (shard(with_field("shape", '["2"]'), b"12"), "list of unsigned 64-bit"),
    "shape with 2**64": (shard(entry("U8", f"[{2**64},0]", "[0,0]")), "list of unsigned 64-bit"),
    "elements overflow": (shard(entry("U8", f"[{2**63},2]", "[0,0]")), "more than 2**64 elements"),
    "elements overflow before a zero": (shard(entry("U8", f"[{2**63},2,0]", "[0,0]")), "more than 2**64 elements"),
    "bits overflow": (shard(entry("U8", f"[{2**61}]", "[0,0]")), "more than 2**64 bits"),
    "half a byte": (shard(entry("F4", "[3]", "[0,2]"), b"12"), "do not fill whole bytes"),
    "six bits": (shard(entry("F6_E2M3", "[1]", "[0,1]"), b"1"), "do not fill whole bytes"),
    "wrong length": (shard(entry("U16", "[2]", "[0,2]"), b"12"), "do not fit dtype and shape"),
    "hole before": (shard(entry("U8", "[2]", "[1,3]"), b"123"), "leaves a hole"),
    "overlap": (
        shard(
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
            b"123",
        ),
        "overlaps the tensor before",
    ),
    "the same bytes twice": (
        shard(
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b"12",
        ),
        "overlaps the tensor before",
    ),
    "empty tensor inside another": (
        shard(
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
            b"12",
        ),
        "overlaps the tensor before",
    ),
    "bytes at the end": (shard(U8, b"123"), "no tensor covers"),
    "bytes without tensors": (shard("{}", b"1"), "no tensor covers"),
    "truncated data": (shard(U8, b"1"), "shorter than its header says"),
}

#: The reference accepts these and we do not; the error says so in words of its own.
STRICTER = {
    "white space before": (shard(" " + U8, b"12"), "mmsplit does not"),
    "newline before": (shard("\n" + U8, b"12"), "mmsplit does not"),
    "name twice": (
        shard('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},' + U8[1:], b"12"),
        "'a' occurs twice; the safetensors format forbids it",
    ),
    "name twice, once escaped": (
        shard(r'{"\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},' + U8[1:], b"12"),
        "'a' occurs twice",
    ),
    "metadata key twice": (shard('{"__metadata__":{"a":"b","a":"c"}}'), "occurs twice"),
    "unknown field twice": (shard(with_extra('1,"extra":2'), b"12"), "occurs twice"),
    "entry is a list": (shard('{"a":["U8",[2],[0,2]]}', b"12"), "not a JSON object"),
    "dtype is an object": (shard(with_field("dtype", '{"U8":null}'), b"12"), "dtype is not text"),
    "unknown field -0": (shard(with_extra("-0"), b"12"), "-0 is not an integer"),
    "unknown field near the largest double": (shard(with_extra("1.7e308"), b"12"), "out of range"),
    "unknown field 40 deep": (shard(with_extra("[" * 40 + "]" * 40), b"12"), "nest too deep"),
}

ACCEPTED = {
    "nothing": shard("{}"),
    "one": shard(U8, b"12"),
    "white space after": shard(U8 + " \t\r\n", b"12"),
    "white space inside": shard(U8.replace(":", " :\n"), b"12"),
    "metadata": shard(U8[:-1] + ',"__metadata__":{"format":"pt","":""}}', b"12"),
    "metadata null": shard(U8[:-1] + ',"__metadata__":null}', b"12"),
    "unknown fields": shard(with_extra('{"x":[1.5,-1,1e307,null,true,"-0"]}'), b"12"),
    "unknown field 30 deep": shard(with_extra("[" * 30 + "]" * 30), b"12"),
    "unknown field of 300 digits": shard(with_extra("9" * 300), b"12"),
    "unknown field that underflows": shard(with_extra("1e-99999"), b"12"),
    "escaped dtype": shard(with_field("dtype", r'"U\u0038"'), b"12"),
    "surrogate pair": shard(U8.replace('"a"', r'"\ud83d\ude00"'), b"12"),
    "escaped NUL": shard(U8.replace('"a"', r'"\u0000"'), b"12"),
    "empty name": shard(U8.replace('"a"', '""'), b"12"),
    "rank 0": shard(entry("U8", "[]", "[0,1]"), b"1"),
    "no elements": shard(entry("F64", "[3,0]", "[0,0]")),
    "overflow after a zero": shard(entry("U8", f"[0,{2**63},2]", "[0,0]")),
    "two F4 to the byte": shard(entry("F4", "[2]", "[0,1]"), b"1"),
    "four F6 in three bytes": shard(entry("F6_E3M2", "[4]", "[0,3]"), b"123"),
    "empty tensors at both ends, order reversed": shard(
        '{"z":{"dtype":"U8","shape":[0],"data_offsets":[2,2]},'
        '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        '"0":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}',
        b"12",
    ),
    "odd offset": shard(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[],"data_offsets":[1,5]}}',
        b"12345",
    ),
}


@pytest.mark.parametrize(("file", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_is_refused_in_words_and_by_the_reference(file: bytes, words: str) -> None:
    with pytest.raises(HeaderError) as caught:
        parse(file)
    assert words in str(caught.value)
    assert caught.value.path == "s"
    assert not reference_accepts(file)


@pytest.mark.parametrize(("file", "words"), STRICTER.values(), ids=STRICTER)
def test_where_we_are_stricter_the_error_says_so(file: bytes, words: str) -> None:
    assert reference_accepts(file)
    with pytest.raises(HeaderError) as caught:
        parse(file)
    assert words in str(caught.value)


@pytest.mark.parametrize("file", ACCEPTED.values(), ids=ACCEPTED)
def test_odd_but_sound_header_is_accepted_as_the_reference_does(file: bytes) -> None:
    parse(file)
    require_law(file)


def test_errors_carry_what_they_know() -> None:
    """A hole and a truncation, with every attribute that a caller may want to use."""
    hole = shard(entry("U8", "[2]", "[1,3]"), b"123")
    with pytest.raises(HeaderError) as caught:
        parse(hole)
    error = caught.value
    start = len(hole) - 3
    assert (error.path, error.tensor, error.offset) == ("s", "a", start + 1)
    assert (error.expected, error.found) == (f"a start at byte {start:,}", start + 1)

    short = shard(U8, b"1")
    with pytest.raises(HeaderError) as caught:
        parse(short)
    assert (caught.value.offset, caught.value.expected, caught.value.found) == (
        len(short),
        f"{len(short) + 1:,} bytes",
        len(short),
    )
    assert "Download it again" in str(caught.value)


def test_offset_of_a_json_error_counts_bytes_of_the_file() -> None:
    """Two-byte characters before the fault move it by bytes, not by characters."""
    with pytest.raises(HeaderError) as caught:
        parse(shard('{"ä":}'))
    assert caught.value.offset == 8 + len('{"ä":'.encode())


def test_hostile_name_does_not_flood_the_message() -> None:
    """A name of a megabyte is shortened in the message."""
    name = "n" * 1_000_000
    for header in (f'{{"{name}":null}}', f'{{"{name}":1,"{name}":2}}'):
        with pytest.raises(HeaderError) as caught:
            parse(shard(header))
        assert len(str(caught.value)) < 1000


def test_metadata_and_places_are_returned() -> None:
    """Tensors come by offset, offsets count from the start of the file."""
    file = ACCEPTED["empty tensors at both ends, order reversed"]
    header = parse(file)
    assert [tensor.name for tensor in header.tensors] == ["0", "a", "z"]
    assert header.header_bytes == len(file) - 2
    assert [(t.start_offset, t.stop_offset) for t in header.tensors] == [
        (header.header_bytes, header.header_bytes),
        (header.header_bytes, len(file)),
        (len(file), len(file)),
    ]
    assert parse(ACCEPTED["metadata"]).metadata == {"format": "pt", "": ""}


def test_unknown_dtype_is_carried_on_request() -> None:
    """Its length is what the offsets say; everything else is still checked."""
    (tensor,) = parse(shard(entry("Q4_K", "[3]", "[0,2]"), b"12"), allow_unknown_dtypes=True).tensors
    assert (tensor.dtype, tensor.shape, tensor.size_bytes, tensor.params) == ("Q4_K", (3,), 2, 3)
    for wrong in (entry("Q4_K", "[3]", "[1,2]"), entry("Q4_K", f"[{2**63},2]", "[0,2]"), entry("U16", "[2]", "[0,2]")):
        with pytest.raises(HeaderError):
            parse(shard(wrong, b"12"), allow_unknown_dtypes=True)


def test_forged_length_costs_no_memory() -> None:
    """The length field is judged against the file before anything is read."""
    tracemalloc.start()
    try:
        for claimed in (50_000_000, MAX_HEADER_BYTES, 2**40, 2**64 - 1):
            with pytest.raises(HeaderError):
                parse_header_length(claimed.to_bytes(8, "little"), 1000, "s")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if dtype.numpy_name])
def test_files_the_library_writes_are_read_alike(dtype: str) -> None:
    """Every dtype that numpy can hold, as safetensors itself writes it: empty, rank 0 and a matrix, with metadata."""
    name = DTYPES[dtype].numpy_name
    numpy_dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    arrays = {
        "none": np.zeros((3, 0), numpy_dtype),
        "one": np.ones((), numpy_dtype),
        "ä\u2028": np.ones((4, 3), numpy_dtype),
    }
    file = safetensors.numpy.save(arrays, {"format": "np"})
    header = parse(file)
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == {k: (dtype, a.shape) for k, a in arrays.items()}
    assert header.metadata == {"format": "np"}
    require_law(file)


# --- Laws over made headers -------------------------------------------------------------------------------------

_ODD_VALUES = [
    "0", "1", "2", "3", "8", "-0", "-1", "1e0", "0e0", "0.0", "2.0", "1E+2", "-0.0", "0e99999999999", "1e309", "NaN",
    "Infinity", "null", "true", "false", '""', '"U8"', '"F4"', '"U\\u0038"', '"\\ud800"', '"\\ud83d\\ude00"', "[]",
    "{}", "[0]", "[0,2]", "[2,0]", "[0,0]", "[0,1,2]", '{"U8":null}', '["U8",[2],[0,2]]', "[[[[1]]]]",
    str(2**63), str(2**64 - 1), str(2**64), str(2**65), f"[{2**63},2,0]", f"[0,{2**63},2]", f"[{2**61}]", "9" * 320,
    "[" * 30 + "]" * 30, "[" * 130 + "]" * 130, '{"a":1,"a":2}', "'a'", "02", "+2", "1.", ".5", "\0", "", " ",
]  # fmt: skip
_KEYS = st.sampled_from(["a", "b", "\\u0061", "__metadata__", "dtype", "shape", "data_offsets", "x", "é", ""])
_VALUES = st.one_of(
    st.sampled_from(_ODD_VALUES),
    st.integers(-3, 2**66).map(str),
    st.floats().map(repr),
    st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=3)), max_size=2).map(json.dumps),
)
_PADDING = st.sampled_from(["", "", "", "", " ", "\n", "\t ", "\0", "\u00a0", "x", "{}"])


@st.composite
def _sound_entries(draw: st.DrawFn) -> tuple[list[tuple[str, list[tuple[str, str]]]], int]:
    """Entries of a sound header as (name, fields as JSON text), and the length of the data."""
    position, entries = 0, []
    for name in draw(st.lists(st.sampled_from("abcdeé"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=2))
        if DTYPES[dtype].bits % 8:
            shape = [*shape, 4]
        size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].bits // 8
        fields = [("dtype", f'"{dtype}"'), ("shape", str(shape)), ("data_offsets", f"[{position},{position + size}]")]
        entries.append((name, draw(st.permutations(fields))))
        position += size
    return draw(st.permutations(entries)), position


@st.composite
def _mutated_json(draw: st.DrawFn) -> bytes:
    """A sound header with a few changes to its JSON, and perhaps the wrong number of bytes behind it."""
    entries, size = draw(_sound_entries())
    members = [(name, "{" + ",".join(f'"{key}":{value}' for key, value in fields) + "}") for name, fields in entries]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["field", "field", "extra", "drop", "member", "twice", "metadata"]))
        if kind == "metadata":
            members.append(("__metadata__", draw(st.one_of(_VALUES, st.just('{"a":"b"}')))))
        elif kind == "member":
            members.append((draw(_KEYS), draw(_VALUES)))
        elif entries:
            at = draw(st.integers(0, len(entries) - 1))
            name, fields = entries[at]
            fields = list(fields)
            if kind == "twice":
                members.append(members[at])
            elif kind == "extra":
                fields.insert(draw(st.integers(0, len(fields))), (draw(_KEYS), draw(_VALUES)))
            elif kind == "drop":
                del fields[draw(st.integers(0, 2))]
            else:
                where = draw(st.integers(0, 2))
                fields[where] = (fields[where][0], draw(_VALUES))
            members[at] = (name, "{" + ",".join(f'"{key}":{value}' for key, value in fields) + "}")
    header = "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"
    header = draw(_PADDING) + header + draw(_PADDING)
    return shard(
        header.encode("utf-8", "surrogatepass"), bytes(max(0, size + draw(st.sampled_from([0] * 8 + [-1, 1]))))
    )


@st.composite
def _mutated_bytes(draw: st.DrawFn) -> bytes:
    """A sound file with a few bytes of its header replaced, put in or taken out."""
    entries, size = draw(_sound_entries())
    members = [f'"{name}":{{' + ",".join(f'"{k}":{v}' for k, v in fields) + "}" for name, fields in entries]
    header = bytearray(("{" + ",".join(members) + "}").encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(header)))
        cut = draw(st.integers(0, 2))
        header[at : at + cut] = draw(st.one_of(st.binary(max_size=2), st.sampled_from([b"0", b"-", b"1", b",", b"e1"])))
    return shard(bytes(header), bytes(size))


@pytest.mark.parametrize("files", [_mutated_json, _mutated_bytes], ids=["json", "bytes"])
def test_never_accepts_what_the_reference_refuses(files: Callable[[], st.SearchStrategy[bytes]]) -> None:
    @given(files())
    @settings(max_examples=1000, deadline=None, database=None)
    def law(file: bytes) -> None:
        require_law(file)

    law()


@given(_sound_entries(), st.sampled_from(["", " ", "   \n"]))
@settings(max_examples=200, deadline=None, database=None)
def test_accepts_every_sound_header(made: tuple[list[tuple[str, list[tuple[str, str]]]], int], padding: str) -> None:
    """A validator that refused all would obey the law above."""
    entries, size = made
    header = json.dumps({name: {key: json.loads(value) for key, value in fields} for name, fields in entries})
    file = shard(header + padding, bytes(size))
    assert len(parse(file).tensors) == len(entries)
    require_law(file)


def test_numbers_at_the_edge_of_a_double_are_judged_as_the_reference_does() -> None:
    """Around the largest double the two parsers must not part in the dangerous direction."""
    edge = int(sys.float_info.max)
    for value in (edge, edge + 1, edge + 2**969, edge + 2**970 - 1, edge + 2**970, -edge, -edge - 2**970):
        require_law(shard(with_extra(str(value)), b"12"))
        require_law(shard(with_extra(f"{value}.0"), b"12"))
    for text in ("1.7976931348623157e308", "1.7976931348623158e308", "1.7976931348623159e308", "17976931348623158e292"):
        require_law(shard(with_extra(text), b"12"))
        require_law(shard(with_extra("-" + text), b"12"))
