"""PyTorch files, as a real PyTorch wrote them: what is found is what torch.load finds, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from torch_builder import (
    FOUR_FLOATS,
    Entry,
    dict_of,
    entries,
    legacy_file,
    parse,
    program,
    saved,
    storage_id,
    tensor_of,
    zip_file,
)

from mmsplit.checkpoint.file_reader import FileReader
from mmsplit.checkpoint.strided import iter_row_major
from mmsplit.checkpoint.torch_file import SNIFF_BYTES, TorchFile, TorchTensor, is_torch_file, read_torch_file
from mmsplit.dtypes import DTYPES
from mmsplit.errors import SourceChangedError, TorchFileError

FIXTURES = Path(__file__).parent / "torch_fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
READ = sorted(EXPECTED["read"])
REFUSED = sorted(EXPECTED["refused"])
#: Files whose state dict has something around it, and what.
WRAPPED = {name: ("model",) for name in READ if name.startswith(("wrapped", "protocol"))}

#: torch's names, by ours; those of numpy are torch's but for these.
TORCH_NAMES = {"C32": "complex32", "C128": "complex128"} | {
    dtype.name: dtype.numpy_name for dtype in DTYPES.values() if dtype.numpy_name
}


def contents(tensor: TorchTensor, file: bytes, block_bytes: int = 64) -> bytes:
    """A tensor's bytes in row-major order."""
    span = memoryview(file)[tensor.start_offset : tensor.stop_offset]
    blocks = iter_row_major(
        lambda start, stop: span[start:stop], tensor.item_bytes, tensor.shape, tensor.stride, block_bytes
    )
    gathered = b"".join(blocks)
    if tensor.is_contiguous:
        assert gathered == span
    return gathered


def require_cover(found: TorchFile, file: bytes) -> None:
    """The law: ranges follow each other from the first byte to the last, and storages are where they say."""
    assert b"".join(file[start:stop] for start, stop, _ in found.ranges) == file
    assert all(start < stop for start, stop, _ in found.ranges)
    assert found.ranges[0].start_offset == 0
    assert found.ranges[-1].stop_offset == len(file)
    for this, following in zip(found.ranges, found.ranges[1:], strict=False):
        assert this.stop_offset == following.start_offset
    places = {s.key: (s.start_offset, s.stop_offset) for s in found.storages if s.size_bytes}
    assert {key: (start, stop) for start, stop, key in found.ranges if key is not None} == places
    assert len(places) == sum(item.storage is not None for item in found.ranges)
    for storage in found.storages:
        assert storage.tensors == tuple(t.name for t in found.tensors if t.storage == storage.key)
        assert storage.size_bytes % storage.item_bytes == 0


@pytest.mark.parametrize("name", READ)
def test_what_torch_loads_is_found(name: str) -> None:
    """Names, dtypes, geometry, storages and bytes are those that torch.load gave when the fixtures were written."""
    file = (FIXTURES / name).read_bytes()
    found = parse(file, allow_unknown_dtypes=True)
    expected = EXPECTED["read"][name]
    wrapper = WRAPPED.get(name, ())
    assert found.wrapper == wrapper
    assert found.form == ("legacy" if "legacy" in name else "zip")
    require_cover(found, file)
    assert [tensor.name for tensor in found.tensors] == [
        ".".join(record["path"][len(wrapper) :]) for record in expected["tensors"]
    ]
    storages = {storage.key: storage for storage in found.storages}
    for tensor, record in zip(found.tensors, expected["tensors"], strict=True):
        storage = storages[tensor.storage]
        whole = file[storage.start_offset : storage.stop_offset]
        assert TORCH_NAMES[tensor.dtype].replace("float8_e4m3b", "float8_e4m3") == record["dtype"]
        assert list(tensor.shape) == record["shape"]
        assert list(tensor.stride) == record["stride"]
        assert tensor.storage_offset == record["offset"]
        assert tensor.is_contiguous == record["contiguous"]
        assert len(whole) == record["storage_bytes"]
        assert hashlib.sha256(whole).hexdigest() == record["storage_sha256"]
        assert hashlib.sha256(contents(tensor, file)).hexdigest() == record["sha256"]


@pytest.mark.parametrize("name", READ)
def test_tensors_that_share_a_storage_are_told(name: str) -> None:
    """Storages with several tensors are those of torch; the one stored whole is contiguous and fills its storage."""
    found = parse((FIXTURES / name).read_bytes(), allow_unknown_dtypes=True)
    wrapper = [*found.wrapper, ""]
    shared = sorted(
        "\n".join(".".join(path.split("\n")) for path in group) for group in EXPECTED["read"][name]["shared"]
    )
    prefix = ".".join(wrapper)
    ours = ["\n".join(prefix + tensor for tensor in s.tensors) for s in found.storages if len(s.tensors) > 1]
    assert sorted(ours) == shared
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for storage in found.storages:
        fills = [
            name
            for name in storage.tensors
            if tensors[name].is_contiguous and tensors[name].size_bytes == storage.size_bytes
        ]
        assert storage.whole == next(iter(fills), None)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", READ)
def test_same_as_torch(name: str) -> None:
    """Where torch is installed: the tensors are those that it loads now."""
    torch = pytest.importorskip("torch")

    def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
        if isinstance(value, torch.Tensor):
            return {path: value.detach()}
        pairs = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        return {p: t for key, item in pairs for p, t in flatten(item, (*path, str(key))).items()}

    file = (FIXTURES / name).read_bytes()
    found = parse(file, allow_unknown_dtypes=True)
    loaded = flatten(torch.load(FIXTURES / name, weights_only=False))
    assert {(*found.wrapper, tensor.name) for tensor in found.tensors} == {
        (*path[: len(found.wrapper)], ".".join(path[len(found.wrapper) :])) for path in loaded
    }
    for tensor, theirs in zip(found.tensors, loaded.values(), strict=True):
        assert tensor.shape == tuple(theirs.shape)
        raw = theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if theirs.numel() else b""
        assert contents(tensor, file) == raw


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_tensors_is_refused_by_name(name: str) -> None:
    """Quantised, sparse, whole modules, TorchScript, other globals: one error, which says the name and what to do."""
    with pytest.raises(TorchFileError) as caught:
        parse((FIXTURES / name).read_bytes())
    assert EXPECTED["refused"][name] in str(caught.value)
    assert caught.value.path == "f"
    assert caught.value.hint is not None


def test_dtypes_without_a_name_are_carried_only_if_asked() -> None:
    """Complex numbers of 32 and 128 bits have no name in safetensors."""
    file = (FIXTURES / "unnamed_dtypes.zip.bin").read_bytes()
    with pytest.raises(TorchFileError, match=r"'C32' is not known.*--allow-unknown-dtypes"):
        parse(file)
    found = parse(file, allow_unknown_dtypes=True)
    assert [(tensor.dtype, tensor.item_bytes) for tensor in found.tensors] == [("C32", 4), ("C128", 16)]


def test_fixtures_are_those_that_are_recorded() -> None:
    """A fixture without an expectation would be tested by nobody."""
    assert {path.name for path in FIXTURES.glob("*.bin")} == {*READ, *REFUSED}
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 300_000


def test_storage_is_seen_in_the_dtype_of_its_tensors() -> None:
    """Newer dtypes lie in storages of bytes."""
    found = parse((FIXTURES / "dtypes.zip.bin").read_bytes())
    assert [storage.dtype for storage in found.storages] == [tensor.dtype for tensor in found.tensors]
    assert {tensor.dtype for tensor in found.tensors} == set(DTYPES) - {"F4", "F6_E2M3", "F6_E3M2"}


def test_storage_that_no_tensor_uses_is_covered() -> None:
    """Data nobody speaks of is a storage of bytes without tensors."""
    file = saved(storages={"0": FOUR_FLOATS, "spare": b"12345"})
    found = parse(file)
    require_cover(found, file)
    spare = found.storages[1]
    assert (spare.key, spare.dtype, spare.tensors, spare.whole, spare.size_bytes) == ("spare", "U8", (), None, 5)


def test_notes_say_what_is_left_out() -> None:
    """Names of the first values that are no tensors, and the wrapper."""
    found = parse((FIXTURES / "wrapped.zip.bin").read_bytes())
    assert found.notes == (
        "the tensors lie under 'model', which is left out of their names",
        "values that are no tensors stay in the file's own bytes: epoch, best, args.names.0 …",
    )


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_weights_are_not_read(form: str, tmp_path: Path) -> None:
    """Headers are read through a reader of ranges; of a storage of 64 MiB no byte is touched."""
    size = 64 << 20
    weight = tensor_of(storage_id("0", size, "ByteStorage"), (size,))
    pickled = program(dict_of({"big": weight, "small": tensor_of(storage_id("1"))}))
    path = tmp_path / "big.bin"
    if form == "zip":
        path.write_bytes(saved(pickled, {"0": bytes(size), "1": FOUR_FLOATS}))
    else:
        stored = size.to_bytes(8, "little") + bytes(size) + (4).to_bytes(8, "little") + FOUR_FLOATS
        path.write_bytes(legacy_file(pickled, ("0", "1"), stored))
    ranges: list[tuple[int, int]] = []
    with FileReader(path, io="pread") as reader:

        def read(start: int, stop: int) -> bytes:
            ranges.append((start, stop))
            return reader.read(start, stop)

        found = read_torch_file(read, reader.size_bytes, str(path))
    assert [tensor.name for tensor in found.tensors] == ["big", "small"]
    assert sum(stop - start for start, stop in ranges) < 300_000
    assert len(ranges) < 10


def test_headers_of_many_entries_are_asked_for_together() -> None:
    """A server is asked for all local headers in one go, those close to each other as one range."""
    keys = [str(number) for number in range(40)]
    pickled = program(dict_of({key: tensor_of(storage_id(key, 10_000), (10_000,)) for key in keys}))
    file = saved(pickled, {key: bytes(40_000) for key in keys})
    calls = []

    def read_many(ranges: Any) -> list[bytes]:
        calls.append(len(ranges))
        return [file[start:stop] for start, stop in ranges]

    found = read_torch_file(lambda start, stop: file[start:stop], len(file), "f", read_many=read_many)
    assert len(found.tensors) == 40
    assert calls == [1, 1, 41, 1, 1]  # beginning, end, 40 local headers and data.pkl's, byteorder, data.pkl


def test_missing_bytes_are_an_error() -> None:
    """A read that gives less than was asked for means that the file changed."""
    file = saved()
    with pytest.raises(SourceChangedError, match="bytes of the file are missing"):
        read_torch_file(lambda start, stop: file[start : stop - 1], len(file), "f")


@pytest.mark.parametrize("name", READ)
def test_forms_are_recognised(name: str) -> None:
    """By the first bytes, whatever the name of the file."""
    assert is_torch_file((FIXTURES / name).read_bytes()[:SNIFF_BYTES])
    assert not is_torch_file(b'\x08\0\0\0\0\0\0\0{"a":{}}')
    assert not is_torch_file(b"")


def test_zip_written_by_others_is_read() -> None:
    """Data descriptors, padding in local headers, folders, zip64 fields, another name for the root."""
    wide = b"\1\0\x18\0" + (16).to_bytes(8, "little") * 2 + (0).to_bytes(8, "little")
    folder = Entry(b"model/", b"")
    data = Entry(
        b"model/data/0",
        FOUR_FLOATS,
        size=0xFFFFFFFF,
        header_offset=0xFFFFFFFF,
        extra=wide,
        local_extra=b"FB\5\0ZZZZZ",
        flags=8 | 1 << 11,
        local_size=0,
        descriptor=b"PK\7\10" + bytes(12),
    )
    file = zip_file([data, folder, Entry(b"model/data.pkl", entries()[0].data)])
    found = parse(file)
    require_cover(found, file)
    assert contents(found.tensors[0], file) == FOUR_FLOATS
