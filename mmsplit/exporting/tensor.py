"""The records of this room, and what every source of tensors can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mmsplit.checkpoint import Storage, TensorRows, TensorView
from mmsplit.checkpoint.strided import is_contiguous
from mmsplit.dtypes import DTYPES
from mmsplit.errors import RequestError
from mmsplit.merging.span import BlockSink, Span


class ExportTensor(NamedTuple):
    """A name of the state dict whose bytes partition `part_id` stores.

    A copy is a tied weight of which another layer has the original.  With `view` the tensor has no bytes of its own but
    shows elements of the stored tensor `view.base`, in that order.  A `tied_head` is such a one that shows all of an
    embedding as it is: where config.json says `tie_word_embeddings`, loaders make it themselves.

    With `rows` it is only these of a tensor that several partitions share; joined again, a tensor has them as `slices`.
    """

    part_id: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    params: int
    size_bytes: int
    layer_type: str
    is_copy: bool
    view: TensorView | None = None
    tied_head: bool = False
    rows: TensorRows | None = None
    slices: tuple[ExportTensor, ...] = ()

    @property
    def stored_name(self) -> str:
        """What the tensor that holds the bytes is called in the partition."""
        return self.name if self.view is None else self.view.base


class ExportPartition(NamedTuple):
    """What a partition stores, in layer order; names that `elsewhere` are its own, but another has their bytes.

    `aliases`: names without a tensor of their own that it uses for a tied weight -> the stored name.
    """

    part_id: int
    tensors: tuple[ExportTensor, ...]
    aliases: Mapping[str, str]
    elsewhere: tuple[ExportTensor, ...] = ()


class _TensorLike(Protocol):
    """What tensors of manifests and of plans have in common."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def params(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def hidden(self) -> bool: ...
    @property
    def rows(self) -> TensorRows | None: ...


class _LayerLike(Protocol):
    """What layers of manifests and of plans have in common."""

    @property
    def layer_type(self) -> str: ...
    @property
    def tensors(self) -> Sequence[_TensorLike]: ...
    @property
    def alias(self) -> str | None: ...
    @property
    def stored(self) -> bool: ...
    @property
    def tied_to(self) -> int | None: ...
    @property
    def views(self) -> Sequence[TensorView]: ...


class ExportSource(Protocol):
    """Where tensors come from: a partition set, or a checkpoint and a plan.

    `partitions` are those asked for.  `identity` (JSON values) differs if their bytes may.  `small_files` are names
    relative to `storage`, with their SHA-256 where it is known.  `config` is config.json, or None.  `notes` are
    sentences for a person.  `directory` is where the source lies on this machine; nothing is written there.
    `most_lanes` files may be made at once.
    """

    @property
    def model_id(self) -> str: ...  # noqa: D102
    @property
    def revision(self) -> str | None: ...  # noqa: D102
    @property
    def num_parts(self) -> int: ...  # noqa: D102
    @property
    def plan_digest(self) -> str: ...  # noqa: D102
    @property
    def partitions(self) -> tuple[ExportPartition, ...]: ...  # noqa: D102
    @property
    def identity(self) -> Mapping[str, object]: ...  # noqa: D102
    @property
    def storage(self) -> Storage: ...  # noqa: D102
    @property
    def small_files(self) -> Mapping[str, str | None]: ...  # noqa: D102
    @property
    def config(self) -> Mapping[str, object] | None: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def directory(self) -> Path | None: ...  # noqa: D102
    @property
    def most_lanes(self) -> int | None: ...  # noqa: D102

    def iter_spans(self, sink: BlockSink, start: int, tensors: Sequence[ExportTensor]) -> Iterator[Span]:
        """Yield the spans of tensors that follow each other in the file from `start` on."""

    def read_beginning(self, tensor: ExportTensor, size_bytes: int) -> bytes:
        """Read at most so many of a tensor's first raw bytes, for a sample; not more than a chunk."""

    def require_unchanged(self) -> None:
        """Raise `SourceChangedError` if what was read is not what was planned."""

    def cancel(self) -> None:
        """Wake every thread that waits for bytes."""

    def close(self) -> None:
        """Let go of the files; no thread may be reading."""


def partition_of(part_id: int, layers: Iterable[_LayerLike]) -> ExportPartition:
    """Return what a partition of these layers has to show.  This is the one place that decides what views become.

    A view is a tensor like any other: safetensors has no strides, and no two tensors that overlap.  A copy of a tied
    weight that only views of it use is not shown itself, and hidden tensors never are.
    """
    tensors: list[ExportTensor] = []
    elsewhere: list[ExportTensor] = []
    aliases: dict[str, str] = {}
    for layer in layers:
        is_copy = layer.alias is not None
        if layer.stored and not (is_copy and layer.views):
            tensors += [
                ExportTensor(
                    part_id, t.name, t.dtype, t.shape, t.params, t.size_bytes, layer.layer_type, is_copy, rows=t.rows
                )
                for t in layer.tensors
                if not t.hidden
            ]
        home = part_id if layer.stored or layer.tied_to is None else layer.tied_to
        (tensors if home == part_id else elsewhere).extend(_views(layer, home))
        if layer.alias is not None and not layer.views:
            aliases[layer.alias] = layer.tensors[0].name
    return ExportPartition(part_id, tuple(tensors), aliases, tuple(elsewhere))


def _views(layer: _LayerLike, home: int) -> list[ExportTensor]:
    bases = {tensor.name: tensor for tensor in layer.tensors}
    found = []
    for view in layer.views:
        base = bases[view.base]
        is_head = layer.alias is not None and layer.layer_type == "head" and view.name.endswith(".weight")
        is_all = (view.dtype, view.shape, view.offset_bytes) == (base.dtype, base.shape, 0) and not base.hidden
        dtype = DTYPES.get(view.dtype)  # without one no form takes the tensor
        found.append(
            ExportTensor(
                home,
                view.name,
                view.dtype,
                view.shape,
                view.params,
                0 if dtype is None else view.params * dtype.bits // 8,
                layer.layer_type,
                layer.alias is not None,
                view,
                is_head and is_all and is_contiguous(view.shape, view.stride),
            )
        )
    return found


def shows_all(tensor: ExportTensor, stored_bytes: int) -> bool:
    """Whether a tensor's bytes are those of the stored tensor, of so many, from the first to the last as they lie."""
    view = tensor.view
    return view is None or (
        tensor.size_bytes == stored_bytes and view.offset_bytes == 0 and is_contiguous(view.shape, view.stride)
    )


def state_dict_of(
    partitions: Sequence[ExportPartition], *, ties_restored: bool
) -> tuple[tuple[ExportTensor, ...], dict[str, str]]:
    """Return each tensor of these partitions once, originals rather than copies, in layer order, and other names.

    With `ties_restored` a tied head goes by the name of its embedding, the one that loaders look for.  A tensor whose
    rows lie in several of these partitions is one again.  Raises `RequestError` if some of its rows are in none: no
    file can hold two of a name.
    """
    aliases = {alias: name for part in partitions for alias, name in part.aliases.items()}
    here = {partition.part_id for partition in partitions}
    found: list[ExportTensor] = []
    for tensor in (tensor for part in partitions for tensor in (*part.tensors, *part.elsewhere)):
        if tensor.part_id not in here:
            continue
        if ties_restored and tensor.tied_head:
            aliases[tensor.name] = tensor.stored_name
            found.append(tensor._replace(name=tensor.stored_name, view=None, tied_head=False))
        else:
            found.append(tensor)
    return _by_name(found), aliases


def _by_name(tensors: Sequence[ExportTensor]) -> tuple[ExportTensor, ...]:
    originals: dict[str, list[ExportTensor]] = {}
    for tensor in tensors:
        if not tensor.is_copy:
            originals.setdefault(tensor.name, []).append(tensor)
    chosen: dict[str, ExportTensor] = {}
    for tensor in tensors:
        if tensor.name not in chosen:
            found = originals.get(tensor.name, [tensor])
            chosen[tensor.name] = found[0] if len(found) == 1 else _joined(found)
    return tuple(chosen.values())


def _joined(slices: Sequence[ExportTensor]) -> ExportTensor:
    first = slices[0]
    whole = first.shape if first.rows is None else first.rows.shape
    in_order = sorted(slices, key=lambda part: -1 if part.rows is None else part.rows.start)
    row = 0
    for part in in_order:
        if part.rows is None or part.rows.start != row or part.rows.shape != whole:
            break
        row = part.rows.stop
    if not whole or row != whole[0]:
        raise RequestError(
            "tensor lies in slices in several of these partitions, and not all of its rows do",
            tensor=first.name,
            hint="Export one partition at a time, or all of them.",
        )
    return first._replace(
        shape=whole,
        params=sum(part.params for part in slices),
        size_bytes=sum(part.size_bytes for part in slices),
        rows=None,
        slices=tuple(in_order),
    )


def notes_on_ties(partitions: Iterable[ExportPartition]) -> tuple[str, ...]:
    """Say which tied weights are used here and lie in a partition that is not exported."""
    partitions = tuple(partitions)
    here = {partition.part_id for partition in partitions}
    stored = {tensor.stored_name for partition in partitions for tensor in partition.tensors}
    ties = [tie for partition in partitions for tie in partition.aliases.items() if tie[1] not in stored]
    ties += [(t.name, t.stored_name) for partition in partitions for t in partition.elsewhere if t.part_id not in here]
    return tuple(
        f"{alias} is {name} of a partition that is not exported; take that one along, or its loader lacks it"
        for alias, name in ties
    )


def note_on_rows(tensors: Iterable[ExportTensor]) -> tuple[str, ...]:
    """Say which tensors are only some of their rows: the experts of one partition, say."""
    names = [tensor.name for tensor in tensors if tensor.rows is not None]
    if not names:
        return ()
    shown = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
    return (f"{len(names)} tensor(s) have only the rows of this partition: {shown}",)
