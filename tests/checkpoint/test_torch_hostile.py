"""PyTorch files nobody should trust: by table, and by mutation of good ones.  Each gives a layout or one error."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch_file import READ, require_cover
from torch_builder import (
    FALSE,
    FOUR_FLOATS,
    NONE,
    ORDERED_DICT,
    PREAMBLE,
    SIMPLE,
    Entry,
    dict_of,
    entries,
    integer,
    legacy_file,
    named,
    parse,
    program,
    saved,
    storage_id,
    tensor_of,
    text,
    tuple_of,
    zip_file,
)

from mmsplit.checkpoint import torch_file
from mmsplit.checkpoint.torch_legacy import MAGIC
from mmsplit.errors import TorchFileError

FIXTURES = Path(__file__).parent / "torch_fixtures"
FLOATS = struct.pack("<q", 4) + FOUR_FLOATS


def with_entry(position: int, **changes: object) -> bytes:
    """A good zip file, one of whose entries (0 data.pkl, 1 byteorder, 2 data/0) is written otherwise."""
    changed = entries()
    for name, value in changes.items():
        setattr(changed[position], name, value)
    return zip_file(changed)


def with_more(*more: Entry, **changes: object) -> bytes:
    """A good zip file with more entries."""
    return zip_file([*entries(), *more], **changes)  # type: ignore[arg-type]


def with_zip64(*, size: int = 44, offset: int | None = None, count: int = 3, disks: int = 1) -> bytes:
    """A good zip file with a zip64 end record and locator as told."""
    file = zip_file(entries())
    _, _, _, _, _, directory_bytes, start, _ = struct.unpack("<4s4H2LH", file[-22:])
    wide = (b"PK\6\6", size, 30, 45, 0, 0, count, count, directory_bytes, start)
    locator = (b"PK\6\7", 0, len(file) - 22 if offset is None else offset, disks)
    return zip_file(entries(), before_end=struct.pack("<4sQ2H2L4Q", *wide) + struct.pack("<4sLQL", *locator))


def object_of(value: bytes, **storages: bytes) -> bytes:
    """A zip file that saved this value as the tensor `w`."""
    return saved(program(dict_of({"w": value})), {"0": FOUR_FLOATS, **storages})


def call(function: str, *arguments: bytes) -> bytes:
    """A function of torch._utils called."""
    return named("torch._utils", function) + tuple_of(*arguments) + b"R"


def persistent(*parts: bytes) -> bytes:
    """A tensor on a persistent id of these parts."""
    return tensor_of(tuple_of(*parts) + b"Q")


FLOAT = named("torch", "FloatStorage")
ONE, FOUR = tuple_of(integer(1)), tuple_of(integer(4))

#: file -> words of the error.
HOSTILE = {
    # what the file is
    "empty": (b"", "not written by torch.save"),
    "one byte": (b"P", "not written by torch.save"),
    "safetensors": (b'\x08\0\0\0\0\0\0\0{"a":1}', "not written by torch.save"),
    "git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "tar of PyTorch 0.1": (b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(300), "tar form"),
    "pickle without the magic number": (SIMPLE, "not written by torch.save"),
    # the end of a zip file
    "zip magic alone": (b"PK\3\4", "does not end with its end record"),
    "zip cut short": (saved()[:-1], "does not end with its end record"),
    "bytes after the end": (zip_file(entries(), after=b"x"), "does not end with its end record"),
    "empty zip after a local header": (b"PK\3\4" + zip_file([]), "not where its end record says"),
    "comment": (saved()[:-2] + b"\x05\0hello", "does not end with its end record"),
    "comment that ends as a file": (saved()[:-2] + b"\x16\0", "comment"),
    "fewer entries than counted": (zip_file(entries(), count=4), "ends early"),
    "more entries than counted": (zip_file(entries(), count=2), "holds more than its entries"),
    "bytes between directory and end": (zip_file(entries(), before_end=b"x"), "not where its end record says"),
    "bytes before the archive": (b"PK\3\4" + saved(), "not where its end record says"),
    "first disk is another": (saved()[:-18] + b"\1\0" + saved()[-16:], "one of several"),
    "zip64 of another size": (with_zip64(size=45), "kind not known"),
    "zip64 elsewhere": (with_zip64(offset=0), "not where its locator says"),
    "zip64 on two disks": (with_zip64(disks=2), "kind not known"),
    "zip64 disagrees": (with_zip64(count=4), "disagree"),
    # its directory
    "two entries of one name": (with_more(Entry(b"archive/data/0", FOUR_FLOATS)), "have the same name"),
    "name is not UTF-8": (with_more(Entry(b"archive/\xff", b"")), "not text"),
    "name with a NUL": (with_more(Entry(b"archive/a\0b", b"")), "not text"),
    "entry of a format to come": (with_more(Entry(b"x", b"", needed_version=64)), "needs version 6.4"),
    "entry on another disk": (with_more(Entry(b"x", b"", disk=1)), "lies in another file"),
    "stored and real size differ": (with_entry(2, stored_size=8), "two sizes"),
    "folder with data": (with_entry(2, attributes=0x10), "is a folder that holds data"),
    "extra field cut short": (with_entry(2, extra=b"\7\0\5\0abc"), "extra fields of a zip entry are damaged"),
    "extra field of three bytes": (with_entry(2, extra=b"\7\0\0"), "extra fields of a zip entry are damaged"),
    "two zip64 fields": (with_entry(2, extra=b"\1\0\0\0\1\0\0\0"), "extra fields of a zip entry are damaged"),
    "zip64 field is missing": (with_entry(2, size=0xFFFFFFFF), "larger than its directory can say"),
    "zip64 field is too short": (
        with_entry(2, size=0xFFFFFFFF, extra=b"\1\0\x08\0" + (16).to_bytes(8, "little")),
        "larger than its directory can say",
    ),
    "size of 2**64 - 1": (
        with_entry(2, size=0xFFFFFFFF, extra=b"\1\0\x10\0" + b"\xff" * 16),
        "overlaps the next",
    ),
    # its entries
    "compressed": (with_entry(2, method=8), "'archive/data/0' is compressed"),
    "compressed by its own header": (with_entry(2, local_method=8), "'archive/data/0' is compressed"),
    "encrypted": (with_entry(2, flags=1), "'archive/data/0' is encrypted"),
    "encrypted by its own header": (with_entry(2, local_flags=1), "is encrypted"),
    "strongly encrypted": (with_entry(0, flags=1 << 6 | 1), "is encrypted"),
    "patch data": (with_entry(2, flags=1 << 5), "flags not known"),
    "another name in its own header": (with_entry(2, local_name=b"archive/data/1"), "another name in its own header"),
    "shorter name in its own header": (with_entry(2, local_name=b"archive/data/"), "another name in its own header"),
    "another size in its own header": (with_entry(2, local_size=8), "another size in its own header"),
    "descriptor by one header": (with_entry(2, flags=8, local_flags=0), "another size in its own header"),
    "no size and no descriptor": (with_entry(2, local_size=0), "another size in its own header"),
    "entry within another": (with_entry(2, header_offset=1), "overlaps the next"),
    "header that is none": (b"PK\7\10".join(saved().rsplit(b"PK\3\4", 1)), "is not where the directory says"),
    "entry on the one before": (with_more(Entry(b"x", b"", header_offset=0)), "overlaps the next"),
    "entry past the end": (with_entry(2, header_offset=1 << 30), "overlaps the next"),
    "entry in the directory": (with_more(Entry(b"x", b"", header_offset=len(saved()) - 100)), "overlaps the next"),
    "data reaches into the next": (with_entry(0, size=len(SIMPLE) + 1), "overlaps the next"),
    "data reaches into the directory": (with_entry(2, size=17), "overlaps the next"),
    "padding reaches into the next": (with_entry(2, local_extra=b"", data=b""), "missing|another length"),
    # what the archive is
    "no data.pkl": (zip_file([Entry(b"archive/data/0", b"")]), "not written by torch.save"),
    "data.pkl at the top": (zip_file([Entry(b"data.pkl", SIMPLE)]), "not written by torch.save"),
    "two data.pkl": (with_more(Entry(b"other/data.pkl", SIMPLE)), "one folder with a data.pkl"),
    "data.pkl deep down": (zip_file([Entry(b"a/b/data.pkl", SIMPLE)]), "not written by torch.save"),
    "TorchScript code": (with_more(Entry(b"archive/code/m.py", b"")), "TorchScript: 'archive/code/m.py'"),
    "TorchScript constants": (with_more(Entry(b"archive/constants.pkl", b"")), "TorchScript"),
    "big-endian": (with_entry(1, data=b"big"), "little-endian"),
    "unknown byte order": (with_entry(1, data=b"little and more, a lot"), "little-endian"),
    "empty byte order": (with_entry(1, data=b""), "little-endian"),
    "data.pkl empty": (saved(b""), "cut short"),
    "data.pkl cut short": (saved(SIMPLE[:-1]), "cut short"),
    "data.pkl with more after it": (saved(SIMPLE + b"N."), "goes on after its pickle"),
    # what is in the pickle
    "os.system": (object_of(named("os", "system") + tuple_of(text("true")) + b"R"), "'os.system'"),
    "builtins.eval": (object_of(named("builtins", "eval")), "'builtins.eval'"),
    "getattr": (object_of(named("__builtin__", "getattr")), "'__builtin__.getattr'"),
    "torch.load itself": (object_of(named("torch", "load")), "'torch.load'"),
    "numpy array": (object_of(named("numpy.core.multiarray", "_reconstruct")), "numpy.core.multiarray._reconstruct"),
    "storage from bytes": (object_of(named("torch.storage", "_load_from_bytes")), "'torch.storage._load_from_bytes'"),
    "TorchScript class": (object_of(named("__torch__.m", "M")), "TorchScript: '__torch__.m.M'"),
    "quantised": (object_of(named("torch._utils", "_rebuild_qtensor")), "quantised tensor: 'torch._utils._rebuild_q"),
    "quantised storage": (
        object_of(tensor_of(storage_id(kind="QUInt8Storage"))),
        "quantised tensor: 'torch.QUInt8Storage'",
    ),
    "sparse": (object_of(named("torch._utils", "_rebuild_sparse_csr_tensor")), "sparse tensor"),
    "typed storage class": (object_of(tensor_of(storage_id(kind="TypedStorage"))), "'torch.TypedStorage'"),
    "dtype of four bits": (object_of(named("torch", "float4_e2m1fn_x2")), "'torch.float4_e2m1fn_x2'"),
    "name with a newline in it": (object_of(b"\x8c\x02os\x8c\x08a\nb\x1b[2Jc\x93"), r"os.a\\nb\\x1b\[2J"),
    "very long name": (object_of(named("os", "s" * 100_000)), "'os.s"),
    # persistent ids
    "persistent id is text": (object_of(text("0") + b"Q"), "not a tuple that begins with text"),
    "persistent id is empty": (object_of(b")Q"), "not a tuple that begins with text"),
    "persistent id of a number": (object_of(persistent(integer(1))), "not a tuple that begins with text"),
    "persistent id of a module": (object_of(persistent(text("module"), FLOAT, NONE, NONE)), "kind 'module'"),
    "persistent id of four": (object_of(persistent(text("storage"), FLOAT, text("0"), NONE)), "has 4 fields"),
    "persistent id of seven": (object_of(tensor_of(storage_id("0", 4, "FloatStorage", NONE, NONE))), "has 7 fields"),
    "storage view": (object_of(tensor_of(storage_id("0", 4, "FloatStorage", ONE))), "view of another"),
    "storage without a class": (
        object_of(tensor_of(tuple_of(text("storage"), *[text("0")] * 3, integer(4)) + b"Q")),
        "no class",
    ),
    "storage whose class is a dtype": (
        object_of(persistent(text("storage"), named("torch", "float32"), text("0"), NONE, integer(4))),
        "no class",
    ),
    "storage whose key is a number": (
        object_of(persistent(text("storage"), FLOAT, integer(0), NONE, integer(4))),
        "no class or no key",
    ),
    "negative length": (object_of(tensor_of(storage_id("0", -4))), "storage's length is negative"),
    "length of 2**63": (object_of(tensor_of(storage_id("0", 2**63))), "beyond 2"),
    "length of 2**2000": (object_of(tensor_of(storage_id("0", 2**2000))), "beyond 2"),
    "bytes overflow": (object_of(tensor_of(storage_id("0", 2**62))), "more than 2"),
    "length is True": (object_of(persistent(text("storage"), FLOAT, text("0"), NONE, b"\x88")), "not an integer"),
    "storage of two classes": (
        object_of(tuple_of(tensor_of(), tensor_of(storage_id(kind="IntStorage")))),
        "'0' is described in two ways",
    ),
    "storage of two lengths": (
        object_of(tuple_of(tensor_of(), tensor_of(storage_id(count=3)))),
        "described in two ways",
    ),
    "storage is missing": (object_of(tensor_of(storage_id("7"))), "storage '7' is missing"),
    "storage up the path": (object_of(tensor_of(storage_id("../data.pkl"))), "is missing"),
    "storage is longer": (object_of(tensor_of(storage_id("1")), **{"1": bytes(20)}), "another length"),
    "storage is shorter": (object_of(tensor_of(storage_id("1")), **{"1": bytes(12)}), "another length"),
    # tensors
    "tensor of None": (object_of(tensor_of(NONE)), "not on a storage"),
    "tensor of a tensor": (object_of(tensor_of(tensor_of())), "not on a storage"),
    "storage as a tensor": (object_of(storage_id()), "no tensors"),
    "shape is a list": (
        object_of(call("_rebuild_tensor", storage_id(), integer(0), b"]", ONE)),
        "shape is a value of type list",
    ),
    "shape with text": (
        object_of(call("_rebuild_tensor", storage_id(), integer(0), tuple_of(text("4")), ONE)),
        "shape is",
    ),
    "shape with True": (
        object_of(call("_rebuild_tensor", storage_id(), integer(0), tuple_of(b"\x88"), ONE)),
        "type bool",
    ),
    "shape negative": (object_of(tensor_of(shape=(-4,))), "shape is negative"),
    "shape of 2**63": (object_of(tensor_of(shape=(2**63,))), "shape is negative or beyond"),
    "shape of 2**2000": (object_of(tensor_of(shape=(2**2000,))), "shape is negative or beyond"),
    "stride negative": (object_of(tensor_of(stride=(-1,), offset=3)), "stride is negative"),
    "offset negative": (object_of(tensor_of(offset=-1)), "offset is negative"),
    "offset is None": (object_of(call("_rebuild_tensor", storage_id(), NONE, FOUR, ONE)), "offset is a value of type"),
    "sizes without strides": (object_of(tensor_of(stride=())), "1 sizes and 0 strides"),
    "65 dimensions": (object_of(tensor_of(shape=(1,) * 65, stride=(1,) * 65)), "65 dimensions"),
    "elements overflow": (object_of(tensor_of(shape=(2**40, 2**40), stride=(0, 0))), "more than 2"),
    "expanded beyond 2**63 bytes": (object_of(tensor_of(shape=(2**62,), stride=(0,))), "more than 2"),
    "one element too many": (object_of(tensor_of(shape=(5,))), "reaches past the end of its storage"),
    "offset too far": (object_of(tensor_of(offset=1)), "reaches past the end of its storage"),
    "stride too far": (object_of(tensor_of(shape=(2,), stride=(4,))), "reaches past the end of its storage"),
    "reach overflows": (object_of(tensor_of(shape=(2,), stride=(2**63 - 1,))), "reaches past the end of its storage"),
    "scalar past the end": (object_of(tensor_of(shape=(), stride=(), offset=4)), "reaches past the end of its storage"),
    "element larger than its storage": (
        object_of(
            call(
                "_rebuild_tensor_v3",
                *(
                    storage_id("1", 3, "UntypedStorage"),
                    integer(0),
                    ONE,
                    ONE,
                    FALSE,
                    ORDERED_DICT,
                    named("torch", "float32"),
                ),
            ),
            **{"1": bytes(3)},
        ),
        "reaches past the end of its storage",
    ),
    "dtype is text": (
        object_of(call("_rebuild_tensor_v3", storage_id(), integer(0), ONE, ONE, FALSE, NONE, text("float32"))),
        "dtype is a value of type str",
    ),
    "conjugated": (object_of(tensor_of(None, (4,), (1,), 0, dict_of({"conj": b"\x88"}))), "conjugated or negated"),
    "too few arguments": (object_of(call("_rebuild_tensor_v2", storage_id())), "with 1 arguments, not 6 or 7"),
    "too many arguments": (object_of(call("_rebuild_tensor", *[NONE] * 5)), "with 5 arguments, not 4"),
    "parameter of None": (object_of(call("_rebuild_parameter", NONE, FALSE, ORDERED_DICT)), "parameter is built on"),
    "parameter of two": (object_of(call("_rebuild_parameter", tensor_of(), FALSE)), "with 2 arguments"),
    "attributes on a tensor": (object_of(tensor_of() + b"}b"), "attributes are set on"),
    "OrderedDict of text": (object_of(named("collections", "OrderedDict") + text("ab") + b"\x85R"), "list of pairs"),
    "OrderedDict of triples": (
        object_of(named("collections", "OrderedDict") + b"](NNN\x87e\x85R"),
        "list of pairs",
    ),
    "torch.Size of two": (object_of(named("torch", "Size") + b"NN\x86R"), "one tuple"),
    "torch.Size of text": (object_of(named("torch", "Size") + tuple_of(tuple_of(text("a"))) + b"R"), "torch.Size is"),
    # the legacy form
    "legacy: magic alone": (legacy_file(preamble=PREAMBLE[:1])[:20], "cut short"),
    "legacy: magic is deeper": (legacy_file(preamble=([MAGIC], *PREAMBLE[1:])), "magic number"),
    "legacy: version": (legacy_file(preamble=(MAGIC, 1002, PREAMBLE[2])), "magic number and version 1001"),
    "legacy: system is a list": (legacy_file(preamble=(MAGIC, 1001, [])), "little-endian"),
    "legacy: big-endian": (legacy_file(preamble=(MAGIC, 1001, {"little_endian": False})), "little-endian"),
    "legacy: cut in the pickle": (legacy_file()[:150], "cut short"),
    "legacy: no keys": (legacy_file(keys=(), storages=b""), "does not name the storages"),
    "legacy: key of nobody": (legacy_file(keys=("0", "1"), storages=FLOATS), "does not name the storages"),
    "legacy: key twice": (legacy_file(keys=("0", "0"), storages=FLOATS * 2), "list of different texts"),
    "legacy: keys are numbers": (legacy_file(keys=(0,)), "list of different texts"),
    "legacy: keys are a dict": (legacy_file(keys={"0": 0}), "list of different texts"),
    "legacy: cut in a storage": (legacy_file()[:-1], "shorter than its storages"),
    "legacy: goes on": (legacy_file() + b"\0", "goes on after its storages"),
    "legacy: another count": (
        legacy_file(storages=struct.pack("<q", 5) + FOUR_FLOATS),
        "another length than the pickle",
    ),
    "legacy: negative count": (legacy_file(storages=struct.pack("<q", -4) + FOUR_FLOATS), "another length than"),
    "legacy: os.system": (legacy_file(program(named("os", "system") + b")R")), "'os.system'"),
    "legacy: os.system in the version": (
        legacy_file()[: legacy_file().index(b"\x80\x02M")] + b"\x80\x02cos\nsystem\n)R.",
        "'os.system'",
    ),
}


@pytest.mark.parametrize(("file", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused(file: bytes, words: str) -> None:
    """One error each, which names the file, stays short, and is of the tree."""
    with pytest.raises(TorchFileError, match=words) as caught:
        parse(file)
    assert caught.value.path == "f"
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


def test_good_files_are_good() -> None:
    """What the table spoils is read when it is not spoilt."""
    for file in (saved(), legacy_file(), with_zip64(), with_more(Entry(b"x", b"y")), object_of(tensor_of())):
        require_cover(parse(file), file)


def test_data_pkl_may_be_large_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both forms."""
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1 << 20)
    long_text = program(dict_of({"w": tensor_of(), "note": text("x" * (1 << 20))}))
    with pytest.raises(TorchFileError, match=r"data.pkl is too large"):
        parse(saved(long_text))
    with pytest.raises(TorchFileError, match="cut short"):
        parse(legacy_file(long_text))
    shorter = program(dict_of({"w": tensor_of(), "note": text("x" * (1 << 19))}))
    assert parse(saved(shorter)).tensors[0].name == "w"
    assert parse(legacy_file(shorter)).tensors[0].name == "w"


def test_much_that_is_no_storage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept as it is must fit in memory."""
    monkeypatch.setattr(torch_file, "MAX_KEPT_BYTES", 10_000)
    with pytest.raises(TorchFileError, match="too much of the file lies outside its storages"):
        parse(with_more(Entry(b"archive/spare", bytes(10_000))))
    assert parse(with_more(Entry(b"archive/data/spare", bytes(10_000)))).tensors


def test_empty_storage_may_be_seen_in_two_dtypes() -> None:
    """torch shares one empty storage; it has no bytes to disagree about."""
    pickled = program(
        dict_of({"a": tensor_of(storage_id("0", 0), (0,)), "b": tensor_of(storage_id("0", 0, "LongStorage"), (0,))})
    )
    assert [tensor.dtype for tensor in parse(saved(pickled, {"0": b""})).tensors] == ["F32", "I64"]


SMALL = {name: (FIXTURES / name).read_bytes() for name in READ if (FIXTURES / name).stat().st_size < 5000}


def require_one_answer(file: bytes) -> None:
    """A layout whose tensors lie in their storages and whose ranges cover the file, or one error."""
    try:
        found = parse(file, allow_unknown_dtypes=True)
    except TorchFileError:
        return
    require_cover(found, file)
    storages = {storage.key: storage for storage in found.storages}
    for item in found.tensors:
        place = storages[item.storage]
        assert place.start_offset <= item.start_offset <= item.stop_offset <= place.stop_offset


@settings(max_examples=400)
@given(st.data())
def test_any_mutation_gives_a_layout_or_one_error(data: st.DataObject) -> None:
    """Bytes changed, dropped, repeated or moved: never another exception, and never a tensor outside its storage."""
    file = bytearray(SMALL[data.draw(st.sampled_from(sorted(SMALL)))])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(file) - 1))
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


@settings(max_examples=300)
@given(st.data())
def test_any_change_of_the_pickle_gives_a_layout_or_one_error(data: st.DataObject) -> None:
    """The same within the pickle alone, so that the archive around it stays good."""
    pickled = bytearray(
        program(dict_of({"w": tensor_of(), "v": tensor_of(shape=(2, 2), stride=(1, 2)), "n": integer(3)}))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(pickled) - 1))
        pickled[position] = data.draw(st.integers(0, 255) | st.sampled_from(b"(tR.QKJN}]u)qhX"))
    require_one_answer(saved(bytes(pickled)))
    require_one_answer(legacy_file(bytes(pickled)))


@pytest.mark.parametrize("name", sorted(SMALL)[:6])
def test_file_cut_anywhere_is_refused(name: str) -> None:
    """A download that stopped is never taken for a whole file."""
    file = SMALL[name]
    for length in range(0, len(file), 7):
        with pytest.raises(TorchFileError):
            parse(file[:length])
