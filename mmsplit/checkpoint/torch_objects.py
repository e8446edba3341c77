"""What the names in a pickle of `torch.save` mean: storages and tensors, as records.  Pure.

The names known here are all that is allowed; sources are `torch/_utils.py`, `torch/storage.py` and
`torch/serialization.py` (2.13).  A name is added only if it is known how its bytes lie in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mmsplit.checkpoint.pickle_layout import Constructor, PickledDict, PickleRefusalError, kind_of
from mmsplit.dtypes import DTYPES

#: torch's own limit is lower for most operations; it only keeps hostile shapes short.
MAX_DIMENSIONS: Final = 64
_INT64_MAX: Final = 2**63 - 1

#: torch dtype -> name in a safetensors header.  C32 and C128 have no such name and are unknown dtypes.
_DTYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex32": "C32",
    "complex64": "C64",
    "complex128": "C128",
}
_UNNAMED_BYTES: Final = {"C32": 4, "C128": 16}
_STORAGES: Final = {
    "UntypedStorage": "U8",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
}
_STORAGE_MODULES: Final = ("torch", "torch.storage", "torch.cuda")

_SAVE_HINT: Final = "Save the state dict, and that alone: torch.save(model.state_dict(), path)."
_REFUSED_KINDS: Final = (
    (("torch.nn.modules",), "a whole module", _SAVE_HINT),
    (("qtensor", "QInt", "QUInt", "qint", "quint"), "a quantised tensor", "Save the state dict before quantising."),
    (("sparse",), "a sparse tensor", "Save it dense: tensor.to_dense()."),
    (("nested", "meta_tensor", "DTensor"), "a tensor without plain strided storage", "Save an ordinary tensor."),
    (("__torch__", "torch.jit"), "TorchScript", _SAVE_HINT),
)


@dataclass(frozen=True, slots=True, eq=False)
class DTypeRef:
    """A dtype: its name in `mmsplit.dtypes`, or C32 or C128."""

    name: str
    item_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class StorageType:
    """A class of storages, all of whose elements have one dtype."""

    dtype: DTypeRef


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A run of elements under a key of the file, which says elsewhere where its bytes are."""

    key: str
    dtype: DTypeRef
    count: int

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.count * self.dtype.item_bytes


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A strided view of a storage.  `offset`, `shape` and `stride` count elements of `dtype`; none is negative."""

    storage: StorageRef
    dtype: DTypeRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A value that is no tensor and does not matter here: a device, say."""

    name: str


class TorchVocabulary:
    """The `Vocabulary` of torch's pickles; `storages` are those met so far, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, StorageRef] = {}

    def find_global(self, name: str) -> object:
        """Return what a global stands for; everything but the names of this module is refused."""
        try:
            return _GLOBALS[name]
        except KeyError:
            raise _refused_global(name) from None

    def find_persistent(self, saved_id: object) -> StorageRef:
        """Return the storage of ("storage", class, key, location, count of elements[, view])."""
        if type(saved_id) is not tuple or not saved_id or not isinstance(saved_id[0], str):
            raise PickleRefusalError("persistent id is not a tuple that begins with text")
        if saved_id[0] != "storage":
            what = f"persistent id is of kind {saved_id[0][:80]!r}, not a storage"
            raise PickleRefusalError(what, hint=_SAVE_HINT)
        if len(saved_id) not in (5, 6):
            raise PickleRefusalError(f"persistent id of a storage has {len(saved_id)} fields, not 5 or 6")
        _, storage_type, key, _, count, *view = saved_id
        if not isinstance(storage_type, StorageType) or not isinstance(key, str):
            raise PickleRefusalError("persistent id of a storage has no class or no key")
        if view and view[0] is not None:
            raise PickleRefusalError(
                "storage is a view of another, as old versions of PyTorch could save",
                hint="Load the file with PyTorch and save it again.",
            )
        return self._same_storage(StorageRef(key, storage_type.dtype, _size(count, "storage's length")))

    def _same_storage(self, storage: StorageRef) -> StorageRef:
        """Return it, held to what was said of its key before: torch goes by the first mention, silently."""
        if storage.size_bytes > _INT64_MAX:
            raise PickleRefusalError("storage has more than 2**63 bytes")
        first = self.storages.setdefault(storage.key, storage)
        differs = first.dtype is not storage.dtype and first.size_bytes != 0
        if differs or first.size_bytes != storage.size_bytes:
            raise PickleRefusalError(f"storage {storage.key[:80]!r} is described in two ways")
        return storage


def _refused_global(name: str) -> PickleRefusalError:
    for marks, kind, hint in _REFUSED_KINDS:
        if any(mark in name for mark in marks):
            return PickleRefusalError(f"file holds {kind}: {name[:200]!r}", hint=hint)
    what = f"file holds more than tensors: {name[:200]!r} is not a name that mmsplit reads"
    return PickleRefusalError(what, hint=_SAVE_HINT)


def _size(value: object, what: str) -> int:
    """Return an integer that fits torch's int64 and is not negative."""
    if type(value) is not int:
        raise PickleRefusalError(f"{what} is {kind_of(value)}, not an integer")
    if not 0 <= value <= _INT64_MAX:
        raise PickleRefusalError(f"{what} is negative or beyond 2**63")
    return value


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not tuple:
        raise PickleRefusalError(f"{what} is {kind_of(value)}, not a tuple")
    if len(value) > MAX_DIMENSIONS:
        raise PickleRefusalError(f"{what} has {len(value):,} dimensions; at most {MAX_DIMENSIONS} are read")
    return tuple([_size(item, what) for item in value])


def _view(storage: object, dtype: DTypeRef | None, offset: object, shape: object, stride: object) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise PickleRefusalError(f"tensor is built on {kind_of(storage)}, not on a storage")
    sizes, steps = _sizes(shape, "tensor's shape"), _sizes(stride, "tensor's stride")
    if len(sizes) != len(steps):
        raise PickleRefusalError(f"tensor has {len(sizes)} sizes and {len(steps)} strides")
    return TensorRef(storage, dtype or storage.dtype, _size(offset, "tensor's offset"), sizes, steps)


def _rebuild_tensor(arguments: tuple[object, ...]) -> TensorRef:
    _require_count(arguments, 4)
    storage, offset, shape, stride = arguments
    return _view(storage, None, offset, shape, stride)


def _rebuild_tensor_v2(arguments: tuple[object, ...]) -> TensorRef:
    _require_count(arguments, 6, 7)
    storage, offset, shape, stride, _requires_grad, _hooks, *metadata = arguments
    _require_plain_values(metadata)
    return _view(storage, None, offset, shape, stride)


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> TensorRef:
    _require_count(arguments, 7, 8)
    storage, offset, shape, stride, _requires_grad, _hooks, dtype, *metadata = arguments
    _require_plain_values(metadata)
    if not isinstance(dtype, DTypeRef):
        raise PickleRefusalError(f"tensor's dtype is {kind_of(dtype)}")
    return _view(storage, dtype, offset, shape, stride)


def _rebuild_parameter(arguments: tuple[object, ...]) -> TensorRef:
    """A parameter is its tensor; its own attributes, the fourth argument, are no weights."""
    _require_count(arguments, 3, 4)
    if not isinstance(arguments[0], TensorRef):
        raise PickleRefusalError(f"parameter is built on {kind_of(arguments[0])}, not on a tensor")
    return arguments[0]


def _require_count(arguments: tuple[object, ...], *counts: int) -> None:
    if len(arguments) not in counts:
        raise PickleRefusalError(
            f"tensor is built with {len(arguments)} arguments, not {' or '.join(map(str, counts))}"
        )


def _require_plain_values(metadata: list[object]) -> None:
    """Refuse a tensor whose values are the conjugate or the negative of its bytes; its metadata says so."""
    if not metadata or metadata[0] is None or (isinstance(metadata[0], PickledDict) and not metadata[0].items):
        return
    raise PickleRefusalError(
        "tensor's values are not its bytes: it was saved conjugated or negated",
        hint="Save tensor.resolve_conj().resolve_neg().",
    )


def _ordered_dict(arguments: tuple[object, ...]) -> PickledDict:
    """Python 3 writes an empty one and sets items, Python 2 passes a list of pairs."""
    if not arguments:
        return PickledDict()
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        raise PickleRefusalError("OrderedDict is built from something else than a list of pairs")
    items: list[tuple[object, object]] = []
    for pair in arguments[0]:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise PickleRefusalError("OrderedDict is built from something else than a list of pairs")
        items.append((pair[0], pair[1]))
    return PickledDict(items)


def _torch_size(arguments: tuple[object, ...]) -> tuple[int, ...]:
    if len(arguments) != 1:
        raise PickleRefusalError("torch.Size is built from something else than one tuple")
    return _sizes(tuple(arguments[0]) if isinstance(arguments[0], list) else arguments[0], "torch.Size")


def _dtype_ref(name: str) -> DTypeRef:
    known = DTYPES.get(name)
    return DTypeRef(name, known.bits // 8 if known else _UNNAMED_BYTES[name])


def _all_globals() -> dict[str, object]:
    dtypes = {name: _dtype_ref(name) for name in _DTYPES.values()}
    builders: dict[str, Callable[[tuple[object, ...]], object]] = {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch.Size": _torch_size,
        "torch.device": lambda _: Leaf("torch.device"),
    }
    return {
        **{name: Constructor(name, build) for name, build in builders.items()},
        **{f"torch.{torch_name}": dtypes[name] for torch_name, name in _DTYPES.items()},
        **{
            f"{module}.{kind}": StorageType(dtypes[name])
            for module in _STORAGE_MODULES
            for kind, name in _STORAGES.items()
        },
    }


_GLOBALS: Final = _all_globals()
