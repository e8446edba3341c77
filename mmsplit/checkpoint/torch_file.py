"""PyTorch checkpoint files (.bin, .pt, .pth): where the bytes of each tensor lie.  Pure but for the reads it is given.

Both forms of `torch.save` are read, the zip file and the legacy one, from a few ranges and without torch; no pickle
is ever run (`pickle_layout`).  Tensors are views of *storages*, runs of bytes of the file.  Most often a tensor is the
whole of a storage of its own; but several may share one (tied weights, slices), and one may see only part of it, or
see it in another order.

Law: `TorchFile.ranges` cover the file exactly, each byte either in one storage or in a range kept as it is (pickle,
zip headers, padding), so that the file can be put together again byte for byte.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

from mmsplit.checkpoint.pickle_layout import PickleRefusalError, parse_pickle
from mmsplit.checkpoint.range_reads import RangeReads, Read, ReadMany
from mmsplit.checkpoint.state_dict import StateDict, name_tensors
from mmsplit.checkpoint.strided import is_contiguous, reach_count
from mmsplit.checkpoint.torch_legacy import MAGIC_BYTES, MAGIC_WITHIN, read_legacy_file
from mmsplit.checkpoint.torch_objects import StorageRef, TensorRef, TorchVocabulary
from mmsplit.checkpoint.torch_zip import (
    ZIP_MAGIC,
    ZipDirectory,
    ZipEntry,
    locate_zip_entries,
    read_zip_directory,
)
from mmsplit.dtypes import DTYPES
from mmsplit.errors import TorchFileError

#: Bounds on memory: of the pickle, and of all that is kept as it is.  Real pickles take 100 bytes a tensor.
MAX_PICKLE_BYTES: Final = 64 << 20
MAX_KEPT_BYTES: Final = 256 << 20
#: How much of a file `is_torch_file` needs to see.
SNIFF_BYTES: Final = 512

_INT64_MAX: Final = 2**63 - 1
_RESAVE_HINT: Final = "Load the file with PyTorch and save it again."
_DOWNLOAD_HINT: Final = "The file is damaged. Download it again."
_SAVE_HINT: Final = "Save the state dict, and that alone: torch.save(model.state_dict(), path)."
_TAR_MAGIC: Final = slice(257, 262), b"ustar"


class TorchTensor(NamedTuple):
    """One tensor.  `stride` and `storage_offset` count elements; `storage` is the key of its storage.

    [`start_offset`, `stop_offset`) are the bytes of the file from its first element to its furthest.  If it
    `is_contiguous` they are its bytes, in order; otherwise `strided.iter_row_major` gathers them from that range.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: str
    storage_offset: int
    item_bytes: int
    start_offset: int
    stop_offset: int
    is_contiguous: bool

    @property
    def params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Length of the elements in row-major order; not of the range they lie in."""
        return self.params * self.item_bytes


class TorchStorage(NamedTuple):
    """One storage, bytes [`start_offset`, `stop_offset`) of the file, and the names of the tensors that view it.

    `whole` is the first of them that is contiguous and covers all of it, or None; so a storage is simple if
    `tensors == (whole,)`.  More than one name: tied or overlapping views.  No name: no tensor has use for it.
    `dtype` is what its tensors have in common if it holds a whole number of such elements, else its own.
    """

    key: str
    dtype: str
    item_bytes: int
    start_offset: int
    stop_offset: int
    tensors: tuple[str, ...]
    whole: str | None

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.stop_offset - self.start_offset


class FileRange(NamedTuple):
    """Bytes [`start_offset`, `stop_offset`) of the file: those of a storage, or, `storage` being None, kept as is."""

    start_offset: int
    stop_offset: int
    storage: str | None


class TorchFile(NamedTuple):
    """What a PyTorch file holds.

    `tensors` are in the order of the state dict, `storages` and `ranges` in that of the file; no range is empty,
    though a storage may be.  `wrapper` are the keys around the state dict (`state_dict.StateDict`).
    """

    form: Literal["zip", "legacy"]
    file_bytes: int
    tensors: tuple[TorchTensor, ...]
    storages: tuple[TorchStorage, ...]
    ranges: tuple[FileRange, ...]
    wrapper: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def kept(self) -> tuple[FileRange, ...]:
        """The ranges of no storage."""
        return tuple([item for item in self.ranges if item.storage is None])


class _Saved(NamedTuple):
    """A saved object, its storages, and where in the file each key's bytes are; keys may have no storage."""

    form: Literal["zip", "legacy"]
    root: object
    storages: dict[str, StorageRef]
    places: dict[str, tuple[int, int]]


def is_torch_file(head: bytes) -> bool:
    """Whether a file that begins with these bytes, at most `SNIFF_BYTES` needed, is in a form of `torch.save`."""
    return head.startswith(ZIP_MAGIC) or MAGIC_BYTES in head[:MAGIC_WITHIN]


def read_torch_file(
    read: Read,
    file_bytes: int,
    path: str,
    *,
    read_many: ReadMany | None = None,
    allow_unknown_dtypes: bool = False,
) -> TorchFile:
    """Read the layout of a file of `file_bytes` bytes; `path` is for messages.

    `read_many`, if given, is called for many small ranges at once, which a server answers faster.  With
    `allow_unknown_dtypes` complex tensors of 32 and 128 bits are carried as dtypes C32 and C128.
    Raises `TorchFileError`, and whatever the reads raise.
    """
    reads = RangeReads(read, file_bytes, path, read_many)
    head = reads.read(0, min(SNIFF_BYTES, file_bytes))
    if head.startswith(ZIP_MAGIC):
        saved = _read_zip(reads)
    elif is_torch_file(head):
        saved = _Saved("legacy", *read_legacy_file(reads, MAX_PICKLE_BYTES))
    else:
        raise _not_torch(head, path)
    try:
        state = name_tensors(saved.root)
    except PickleRefusalError as refusal:
        raise TorchFileError(refusal.what, path=path, hint=refusal.hint or _SAVE_HINT) from None
    return _lay_out(saved, state, file_bytes, path, allow_unknown_dtypes)


def _not_torch(head: bytes, path: str) -> TorchFileError:
    if head.startswith(b"version https://git-lfs"):
        return TorchFileError(
            "file is a Git LFS pointer, not the weights", path=path, hint="Fetch the weights with: git lfs pull"
        )
    where, magic = _TAR_MAGIC
    if head[where] == magic:
        return TorchFileError("file has the tar form of PyTorch 0.1, which is not read", path=path, hint=_RESAVE_HINT)
    return TorchFileError(
        "file was not written by torch.save", path=path, offset=0, found=repr(head[:8]), hint="Download it again."
    )


def _read_zip(reads: RangeReads) -> _Saved:
    directory = read_zip_directory(reads)
    root = _root_of(directory, reads.path)
    entries = {
        entry.name.removeprefix(root): entry
        for entry in locate_zip_entries(directory, reads)
        if entry.name.startswith(root)
    }
    if "byteorder" in entries:
        _require_little_endian(entries["byteorder"], reads)
    value, vocabulary = _read_pickle(entries["data.pkl"], reads)
    places = {
        name.removeprefix("data/"): (entry.start_offset, entry.stop_offset)
        for name, entry in entries.items()
        if name.startswith("data/") and not name.endswith("/")
    }
    return _Saved("zip", value, vocabulary.storages, places)


def _root_of(directory: ZipDirectory, path: str) -> str:
    """Return the one folder that holds data.pkl, with its slash; TorchScript is refused."""
    names = [record.name for record in directory.records]
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError(
            "zip file was not written by torch.save",
            path=path,
            expected="one folder with a data.pkl",
            found=len(roots),
            hint=_SAVE_HINT,
        )
    for name in names:
        if name.startswith((f"{roots[0]}code/", f"{roots[0]}constants.pkl")):
            raise TorchFileError(f"file holds TorchScript: {name[:200]!r}", path=path, hint=_SAVE_HINT)
    return roots[0]


def _require_little_endian(entry: ZipEntry, reads: RangeReads) -> None:
    """Older files do not say; then, as torch has it, they are little-endian."""
    if reads.read(entry.start_offset, min(entry.stop_offset, entry.start_offset + 16)) != b"little":
        raise TorchFileError(
            "file does not say that its numbers are little-endian",
            path=reads.path,
            offset=entry.start_offset,
            hint="Load the file with PyTorch and save it again on a little-endian machine.",
        )


def _read_pickle(entry: ZipEntry, reads: RangeReads) -> tuple[object, TorchVocabulary]:
    size_bytes = entry.stop_offset - entry.start_offset
    if size_bytes > MAX_PICKLE_BYTES:
        raise TorchFileError(
            "data.pkl is too large",
            path=reads.path,
            offset=entry.start_offset,
            expected=f"at most {MAX_PICKLE_BYTES:,} bytes",
            found=size_bytes,
            hint=_SAVE_HINT,
        )
    vocabulary = TorchVocabulary()
    try:
        value, length = parse_pickle(reads.read(entry.start_offset, entry.stop_offset), vocabulary)
        if length != size_bytes:
            raise PickleRefusalError("data.pkl goes on after its pickle", offset=length)
    except PickleRefusalError as refusal:
        raise TorchFileError(
            refusal.what,
            path=reads.path,
            offset=entry.start_offset + (refusal.offset or 0),
            hint=refusal.hint or _DOWNLOAD_HINT,
        ) from None
    return value, vocabulary


def _lay_out(saved: _Saved, state: StateDict, file_bytes: int, path: str, allow_unknown_dtypes: bool) -> TorchFile:
    for key, storage in saved.storages.items():
        _require_place(storage, saved.places.get(key), path)
    tensors = tuple(
        [_tensor(name, ref, saved.places[ref.storage.key], path, allow_unknown_dtypes) for name, ref in state.tensors]
    )
    storages = _storages(saved, tensors)
    ranges = _cover(storages, file_bytes, path)
    return TorchFile(saved.form, file_bytes, tensors, storages, ranges, state.wrapper, state.notes)


def _require_place(storage: StorageRef, place: tuple[int, int] | None, path: str) -> None:
    found = None if place is None else place[1] - place[0]
    if found != storage.size_bytes:
        raise TorchFileError(
            f"storage {storage.key[:80]!r} {'is missing' if found is None else 'has another length'}",
            path=path,
            offset=place and place[0],
            expected=f"{storage.size_bytes:,} bytes",
            found=found,
            hint=_DOWNLOAD_HINT,
        )


def _tensor(name: str, ref: TensorRef, place: tuple[int, int], path: str, allow_unknown_dtypes: bool) -> TorchTensor:
    """Hold a tensor to its storage: every element lies in it."""
    if ref.dtype.name not in DTYPES and not allow_unknown_dtypes:
        raise TorchFileError(
            f"dtype {ref.dtype.name!r} is not known",
            path=path,
            tensor=name,
            hint="mmsplit can carry it as opaque bytes: allow unknown dtypes (--allow-unknown-dtypes).",
        )
    if math.prod(ref.shape) * ref.dtype.item_bytes > _INT64_MAX:
        raise TorchFileError("tensor has more than 2**63 bytes", path=path, tensor=name, hint=_DOWNLOAD_HINT)
    item_bytes = ref.dtype.item_bytes
    reach = reach_count(ref.shape, ref.stride)
    start = place[0] + (ref.offset * item_bytes if reach else 0)
    stop = start + reach * item_bytes
    if stop > place[1]:
        raise TorchFileError(
            "tensor reaches past the end of its storage",
            path=path,
            tensor=name,
            offset=place[0],
            expected=f"at most {(place[1] - place[0]) // item_bytes:,} elements",
            found=ref.offset + reach,
            hint=_DOWNLOAD_HINT,
        )
    contiguous = is_contiguous(ref.shape, ref.stride)
    return TorchTensor(
        name,
        ref.dtype.name,
        ref.shape,
        ref.stride,
        ref.storage.key,
        ref.offset,
        item_bytes,
        start,
        stop,
        contiguous,
    )


def _storages(saved: _Saved, tensors: tuple[TorchTensor, ...]) -> tuple[TorchStorage, ...]:
    """Return all storages in file order, those without a tensor, too; empty ones before what begins where they are."""
    views: dict[str, list[TorchTensor]] = {key: [] for key in saved.places}
    for tensor in tensors:
        views[tensor.storage].append(tensor)
    storages = []
    for key, (start, stop) in sorted(saved.places.items(), key=lambda item: (item[1], item[0])):
        dtype, item_bytes = _common_dtype(views[key], saved.storages.get(key), stop - start)
        whole = (view.name for view in views[key] if view.is_contiguous and view.size_bytes == stop - start)
        names = tuple([view.name for view in views[key]])
        storages.append(TorchStorage(key, dtype, item_bytes, start, stop, names, next(whole, None)))
    return tuple(storages)


def _common_dtype(views: list[TorchTensor], storage: StorageRef | None, size_bytes: int) -> tuple[str, int]:
    """Return the dtype, and its width, to see a storage in; what no pickle speaks of is bytes."""
    dtypes = {(view.dtype, view.item_bytes) for view in views}
    if len(dtypes) == 1:
        dtype, item_bytes = dtypes.pop()
        if size_bytes % item_bytes == 0:
            return dtype, item_bytes
    return (storage.dtype.name, storage.dtype.item_bytes) if storage else ("U8", 1)


def _cover(storages: tuple[TorchStorage, ...], file_bytes: int, path: str) -> tuple[FileRange, ...]:
    """Return the ranges that cover the file: storages, and what lies between them."""
    ranges = []
    position = kept_bytes = 0
    for storage in storages:
        if (
            storage.start_offset < position or storage.stop_offset > file_bytes
        ):  # pragma: no cover - both forms see to it
            raise TorchFileError("storages overlap", path=path, offset=storage.start_offset)
        if storage.start_offset > position:
            ranges.append(FileRange(position, storage.start_offset, None))
            kept_bytes += storage.start_offset - position
        if storage.stop_offset > storage.start_offset:
            ranges.append(FileRange(storage.start_offset, storage.stop_offset, storage.key))
        position = storage.stop_offset
    if file_bytes > position:
        ranges.append(FileRange(position, file_bytes, None))
        kept_bytes += file_bytes - position
    if kept_bytes > MAX_KEPT_BYTES:
        raise TorchFileError(
            "too much of the file lies outside its storages",
            path=path,
            expected=f"at most {MAX_KEPT_BYTES:,} bytes",
            found=kept_bytes,
            hint=_RESAVE_HINT,
        )
    return tuple(ranges)
