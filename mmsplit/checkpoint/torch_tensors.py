"""From what a PyTorch file holds to tensors that can be stored: each byte of a storage in exactly one of them.  Pure.

A storage may be seen by several tensors, in part, in another order, or by none.  It is cut where its tensors do not
overlap, so that a flat storage of a whole model becomes as many tensors as it shows.  Where tensors overlap, the first
that is contiguous and covers the others is stored under its name, and the others are views of it; where none is,
the bytes are stored as a flat run, called `NAME[storage]` after the first tensor that sees them, and every tensor there
is a view.  Bytes that no tensor sees are stored, too: `NAME[unused A:B]`, A and B being bytes of the storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmsplit.checkpoint.tensor import ShardLayout, TensorInfo, TensorView
from mmsplit.checkpoint.torch_file import TorchFile, TorchStorage, TorchTensor


class _Cluster(NamedTuple):
    """Bytes [`start`, `stop`) of a file and the tensors that see them, in the order of the state dict."""

    start: int
    stop: int
    tensors: tuple[TorchTensor, ...]


def lay_out_torch_file(file: TorchFile, shard: str) -> ShardLayout:
    """Return the tensors and views of a file; `shard` goes into the records."""
    by_name = {tensor.name: tensor for tensor in file.tensors}
    taken = set(by_name)
    tensors: list[TensorInfo] = []
    views: list[TensorView] = []

    def unique(name: str) -> str:
        while name in taken:
            name += "'"
        taken.add(name)
        return name

    def store(name: str, dtype: str, item_bytes: int, start: int, stop: int) -> None:
        if (stop - start) % item_bytes:
            dtype, item_bytes = "U8", 1
        count = (stop - start) // item_bytes
        tensors.append(TensorInfo(name, dtype, (count,), shard, start, stop, count, hidden=True))

    for storage in file.storages:
        seen = [by_name[name] for name in storage.tensors]
        owner = seen[0].name if seen else f"unused_storages.{storage.key}"
        tensors += [_stored(tensor, shard) for tensor in seen if tensor.start_offset == tensor.stop_offset]
        position = storage.start_offset
        for cluster in _clusters(seen):
            if cluster.start > position:
                store(
                    unique(_unused(owner, storage, position, cluster.start)), *_item(storage), position, cluster.start
                )
            position = cluster.stop
            whole = next((tensor for tensor in cluster.tensors if _covers(tensor, cluster)), None)
            if whole is None:
                base = unique(f"{cluster.tensors[0].name}[storage]")
                store(base, *_common_item(cluster, storage), cluster.start, cluster.stop)
            else:
                base = whole.name
                tensors.append(_stored(whole, shard))
            views += [_view(tensor, base, cluster.start) for tensor in cluster.tensors if tensor is not whole]
        if storage.stop_offset > position:
            name = unique(_unused(owner, storage, position, storage.stop_offset))
            store(name, *_item(storage), position, storage.stop_offset)
    kept = tuple((item.start_offset, item.stop_offset) for item in file.kept)
    return ShardLayout("torch", kept, tuple(tensors), tuple(views), file.notes)


def _clusters(tensors: Sequence[TorchTensor]) -> Iterator[_Cluster]:
    """Put together what overlaps, in the order of the file; tensors without bytes are left out."""
    order = {tensor.name: number for number, tensor in enumerate(tensors)}
    waiting: list[TorchTensor] = []
    stop = -1
    with_bytes = (tensor for tensor in tensors if tensor.start_offset < tensor.stop_offset)
    for tensor in sorted(with_bytes, key=lambda tensor: (tensor.start_offset, tensor.stop_offset)):
        if tensor.start_offset >= stop and waiting:
            yield _cluster(waiting, order)
            waiting = []
        waiting.append(tensor)
        stop = max(stop, tensor.stop_offset)
    if waiting:
        yield _cluster(waiting, order)


def _cluster(tensors: Sequence[TorchTensor], order: dict[str, int]) -> _Cluster:
    start = min(tensor.start_offset for tensor in tensors)
    stop = max(tensor.stop_offset for tensor in tensors)
    return _Cluster(start, stop, tuple(sorted(tensors, key=lambda tensor: order[tensor.name])))


def _stored(tensor: TorchTensor, shard: str) -> TensorInfo:
    start, stop = tensor.start_offset, tensor.stop_offset
    return TensorInfo(tensor.name, tensor.dtype, tensor.shape, shard, start, stop, tensor.params)


def _covers(tensor: TorchTensor, cluster: _Cluster) -> bool:
    return tensor.is_contiguous and (tensor.start_offset, tensor.stop_offset) == (cluster.start, cluster.stop)


def _item(storage: TorchStorage) -> tuple[str, int]:
    return storage.dtype, storage.item_bytes


def _common_item(cluster: _Cluster, storage: TorchStorage) -> tuple[str, int]:
    items = {(tensor.dtype, tensor.item_bytes) for tensor in cluster.tensors}
    return items.pop() if len(items) == 1 else _item(storage)


def _unused(owner: str, storage: TorchStorage, start: int, stop: int) -> str:
    return f"{owner}[unused {start - storage.start_offset}:{stop - storage.start_offset}]"


def _view(tensor: TorchTensor, base: str, base_start: int) -> TensorView:
    return TensorView(tensor.name, base, tensor.dtype, tensor.shape, tensor.stride, tensor.start_offset - base_start)
