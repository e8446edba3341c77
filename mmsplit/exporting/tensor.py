"""The records of this room, and what every source of tensors can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mmsplit.checkpoint import Storage
from mmsplit.errors import RequestError
from mmsplit.merging.span import BlockSink, Span


class ExportTensor(NamedTuple):
    """A tensor that partition `part_id` stores, under its stored name.

    A copy is a tied weight of which another layer has the original.
    """

    part_id: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    params: int
    size_bytes: int
    layer_type: str
    is_copy: bool


class ExportPartition(NamedTuple):
    """What a partition stores, in layer order.  `aliases`: names that it uses for a tied weight -> the stored name."""

    part_id: int
    tensors: tuple[ExportTensor, ...]
    aliases: Mapping[str, str]


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


class ExportSource(Protocol):
    """Where tensors come from: a partition set, or a checkpoint and a plan.

    `partitions` are those asked for.  `identity` (JSON values) differs if their bytes may.  `small_files` are names
    relative to `storage`, with their SHA-256 where it is known.  `notes` are sentences for a person.  `directory` is
    where the source lies on this machine; nothing is written there.  `most_lanes` files may be made at once.
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
    """Return what a partition of these layers stores."""
    layers = tuple(layers)
    tensors = tuple(
        ExportTensor(
            part_id, t.name, t.dtype, t.shape, t.params, t.size_bytes, layer.layer_type, layer.alias is not None
        )
        for layer in layers
        if layer.stored
        for t in layer.tensors
    )
    return ExportPartition(part_id, tensors, {layer.alias: layer.tensors[0].name for layer in layers if layer.alias})


def tensors_by_name(partitions: Iterable[ExportPartition]) -> tuple[ExportTensor, ...]:
    """Return each tensor once, originals rather than copies, in layer order.

    Raises `RequestError` for a tensor that lies in slices in several partitions: no file can hold two of a name.
    """
    stored = [tensor for partition in partitions for tensor in partition.tensors]
    originals: set[str] = set()
    for tensor in stored:
        if not tensor.is_copy and tensor.name in originals:
            raise RequestError(
                "tensor lies in slices in several of these partitions",
                tensor=tensor.name,
                hint="Export one partition at a time, or merge the set.",
            )
        if not tensor.is_copy:
            originals.add(tensor.name)
    chosen: dict[str, ExportTensor] = {}
    for tensor in stored:
        if not tensor.is_copy or tensor.name not in originals:
            chosen.setdefault(tensor.name, tensor)
    return tuple(chosen.values())


def notes_on_ties(partitions: Iterable[ExportPartition]) -> tuple[str, ...]:
    """Say which tied weights are used here and lie in a partition that is not exported."""
    partitions = tuple(partitions)
    stored = {tensor.name for partition in partitions for tensor in partition.tensors}
    return tuple(
        f"{alias} is {name} of a partition that is not exported; take that one along, or its loader lacks it"
        for partition in partitions
        for alias, name in partition.aliases.items()
        if name not in stored
    )
