"""A partition arrives: what is right on disk stays, the rest is fetched, nothing passes that is not as published."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, Weight, flip, tree, write_checkpoint

from mmsplit.errors import IntegrityError, MmsplitError, NetworkError, OutputExistsError, SourceChangedError
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.sidecar.layout import DATA_START, SLOT_ALIGNMENT, SLOT_BYTES
from mmsplit.sidecar.partition_check import find_partition_fault
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.partition_receiver import PartitionReceiver, Received
from mmsplit.sidecar.payload_pieces import PIECE_BYTES, PayloadPieces
from mmsplit.sidecar.piece_fetcher import FETCH_ATTEMPTS, iter_runs
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import read_set_manifest
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify


@dataclass
class Shelf:
    """Published files that note what is asked of them, and may hand out other bytes a number of times.

    `wrong` maps a file and an offset in it to how often the byte there arrives flipped.
    """

    files: dict[str, bytes]
    wrong: dict[tuple[str, int], int] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    fail_after_bytes: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, name: str) -> RemoteFile:
        return ShelfFile(self, name)

    def served_bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)


class ShelfFile(RemoteFile):
    def __init__(self, shelf: Shelf, name: str) -> None:
        self._shelf = shelf
        self._name = name

    name = property(lambda self: self._name)
    location = property(lambda self: f"shelf/{self._name}")
    size_bytes = property(lambda self: len(self._shelf.files[self._name]))

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        shelf = self._shelf
        with shelf.lock:
            shelf.ranges.append((self._name, start, stop))
        data = bytearray(shelf.files[self._name][start:stop])
        for (name, offset), times in shelf.wrong.items():
            if name == self._name and start <= offset < stop and times:
                shelf.wrong[name, offset] -= 1
                data[offset - start] ^= 1
        # Blocks that fit no piece, no chunk and no page.
        for position in range(0, len(data), 100_003):
            go_on()
            if shelf.fail_after_bytes is not None:
                shelf.fail_after_bytes -= 100_003
                if shelf.fail_after_bytes < 0:
                    raise NetworkError("the shelf fell", path=self.location)
            yield bytes(data[position : position + 100_003])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two partitions: tensors of several chunks, slots of many, and a layer of tiny tensors."""
    root = tmp_path_factory.mktemp("published")
    weights = [Weight("model.layers.0.mlp.up_proj.weight", "BF16", (5000, 2048), 90)]
    weights += [Weight(f"model.layers.1.{k}.weight", "F16", (k + 1, 37), 200) for k in range(60)]
    weights += [Weight(f"model.layers.{k}.mlp.down_proj.weight", "F32", (700, 1024), 256) for k in range(2, 6)]
    write_checkpoint(root / "model", [weights], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", boundaries=["model.layers.2"])
    return root / "set"


@pytest.fixture
def shelf(published: Path) -> Shelf:
    return Shelf(tree(published))


@pytest.fixture
def manifest(published: Path) -> SetManifest:
    return read_set_manifest(published)


@pytest.fixture
def receiver(manifest: SetManifest, tmp_path: Path) -> Callable[[], PartitionReceiver]:
    """Makes a receiver of partition 0 into tmp_path, as a new run would."""

    def make() -> PartitionReceiver:
        return PartitionReceiver(tmp_path, manifest, manifest.partitions[0], connections=3, threads=2)

    return make


Make = Callable[[], PartitionReceiver]


def add_nothing(count_bytes: int) -> None:
    """Progress that nobody watches."""


def assert_arrived(root: Path, published: Path) -> None:
    """Manifest and payload of partition 0 are those that were published, and there is nothing else of it."""
    expected = {name: data for name, data in tree(published).items() if name.startswith("partition_0")}
    assert tree(root) == expected
    assert verify(root / "partition_0.json", level="full").ok


def test_it_arrives_in_the_same_bytes(receiver: Make, shelf: Shelf, published: Path, tmp_path: Path) -> None:
    """Each byte of data is asked for once, in ranges over whole pieces; header bytes are not asked for at all."""
    counted: list[int] = []
    result = receiver().receive(shelf.open, counted.append)
    assert_arrived(tmp_path, published)
    payload = sorted((start, stop) for name, start, stop in shelf.ranges if name == "partition_0.bin")
    assert payload[0][0] == DATA_START
    assert all(before[1] == after[0] for before, after in itertools.pairwise(payload))
    assert payload[-1][1] == len(shelf.files["partition_0.bin"]) == sum(counted)
    assert result == Received(0, shelf.served_bytes(), 0)


def test_what_is_right_on_disk_is_not_fetched(receiver: Make, shelf: Shelf, published: Path, tmp_path: Path) -> None:
    """An interrupted run leaves its pieces, and the next one asks only for the others."""
    shelf.fail_after_bytes = 6_000_000
    with pytest.raises(NetworkError, match="the shelf fell"):
        receiver().receive(shelf.open, add_nothing)
    assert not (tmp_path / "partition_0.json").exists()
    assert not (tmp_path / "partition_0.bin").exists()
    shelf.fail_after_bytes = None
    shelf.ranges.clear()
    result = receiver().receive(shelf.open, add_nothing)
    assert result.present_bytes > 0
    assert result.fetched_bytes == shelf.served_bytes()
    fetched_data = sum(stop - start for name, start, stop in shelf.ranges[1:] if name == "partition_0.bin")
    data_bytes = open_partition_files(published / "partition_0.json").manifest.data_stop - DATA_START
    assert fetched_data + result.present_bytes == data_bytes
    assert_arrived(tmp_path, published)


def test_a_finished_payload_without_its_manifest_is_taken_over(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path
) -> None:
    """Killed between the two names, a run has fetched all: only the manifest is asked for again."""
    (tmp_path / "partition_0.bin").write_bytes(shelf.files["partition_0.bin"])
    receiver().receive(shelf.open, add_nothing)
    assert [name for name, _, _ in shelf.ranges] == ["partition_0.json"]
    assert_arrived(tmp_path, published)


@pytest.mark.parametrize("place", ["data", "header", "index", "trailer", "padding"])
def test_only_what_is_damaged_on_disk_is_fetched_again(
    receiver: Make, shelf: Shelf, manifest: SetManifest, published: Path, tmp_path: Path, place: str
) -> None:
    """One flipped bit costs the piece it is in, or the few bytes behind the data; the header costs nothing."""
    for name in ("partition_0.json", "partition_0.bin"):
        (tmp_path / name).write_bytes(shelf.files[name])
    with open_partition_files(published / "partition_0.json") as partition:
        data_stop, size = partition.manifest.data_stop, partition.reader.size_bytes
        first = PayloadPieces(partition.index, data_stop)[0]
        end_of_last = PayloadPieces(partition.index, data_stop).chunk_range(len(partition.index) - 1)[1]
    assert end_of_last < data_stop
    offset = {
        "data": first.start + 5,
        "header": 20,
        "index": data_stop + 3,
        "trailer": size - 9,
        "padding": end_of_last,
    }[place]
    flip(tmp_path / "partition_0.bin", offset)
    fault = find_partition_fault(tmp_path, manifest, 0, 2, add_nothing)
    assert isinstance(fault, MmsplitError)
    receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)
    limit = {"header": 0, "data": first.size_bytes, "padding": PIECE_BYTES}.get(place, size - data_stop)
    assert shelf.served_bytes() <= limit


def test_a_damaged_chunk_on_disk_is_named(manifest: SetManifest, shelf: Shelf, tmp_path: Path) -> None:
    """The fault says file, tensor and byte, and an intact partition has none."""
    for name in ("partition_0.json", "partition_0.bin"):
        (tmp_path / name).write_bytes(shelf.files[name])
    counted: list[int] = []
    assert find_partition_fault(tmp_path, manifest, 0, 2, counted.append) is None
    assert sum(counted) == len(shelf.files["partition_0.bin"])
    flip(tmp_path / "partition_0.bin", DATA_START + 7)
    fault = find_partition_fault(tmp_path, manifest, 0, 2, add_nothing)
    assert fault is not None
    assert (fault.tensor, fault.offset) == ("model.layers.0.mlp.up_proj.weight", DATA_START)
    assert fault.path == str(tmp_path / "partition_0.bin")


@pytest.mark.parametrize("length", [0, 100, DATA_START, 3_000_000])
def test_a_truncated_payload_is_completed(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path, length: int
) -> None:
    """Whatever the length of what is there, what it holds of the data counts."""
    (tmp_path / "partition_0.bin.partial").write_bytes(shelf.files["partition_0.bin"][:length])
    receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)


def test_bytes_that_belong_to_nothing_are_no_harm(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path
) -> None:
    """Foreign bytes under a name of work in progress, longer than the payload, are hashed and replaced."""
    noise = b"\x55" * (len(shelf.files["partition_0.bin"]) + 9_999)
    (tmp_path / "partition_0.bin.partial").write_bytes(noise)
    (tmp_path / "partition_0.json.partial").write_bytes(noise[:1000])
    receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)


@pytest.mark.parametrize(
    ("name", "offset"), [("partition_0.json", 100), ("partition_0.bin", 5_000_000), ("partition_0.bin", -20)]
)
def test_what_arrives_damaged_is_fetched_again(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path, name: str, offset: int
) -> None:
    """A bit that flips on the way once, or twice, costs another fetch and nothing else."""
    shelf.wrong[name, offset % len(shelf.files[name])] = FETCH_ATTEMPTS - 1
    result = receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)
    assert result.fetched_bytes == shelf.served_bytes()


def test_a_chunk_that_always_arrives_damaged_is_one_error_that_locates_it(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path
) -> None:
    """Path, tensor and byte; the rest stays, and is not fetched again when the chunk is right one day."""
    with open_partition_files(published / "partition_0.json") as partition:
        pieces = PayloadPieces(partition.index, partition.manifest.data_stop)
        piece = pieces[len(pieces) - 1]
        tensor = pieces.tensor_of(piece.first, partition.manifest)
    shelf.wrong["partition_0.bin", piece.start] = 1_000
    with pytest.raises(IntegrityError, match="arrives damaged, 3 times") as caught:
        receiver().receive(shelf.open, add_nothing)
    error = caught.value
    assert (error.path, error.tensor, error.offset) == ("shelf/partition_0.bin", tensor, piece.start)
    assert not (tmp_path / "partition_0.bin").exists()
    shelf.wrong.clear()
    shelf.ranges.clear()
    receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)


def test_padding_that_arrives_dirty_is_written_clean(
    receiver: Make, shelf: Shelf, published: Path, tmp_path: Path
) -> None:
    """No checksum covers padding, so that it is not taken from anybody: it is zero."""
    with open_partition_files(published / "partition_0.json") as partition:
        end = PayloadPieces(partition.index, partition.manifest.data_stop).chunk_range(0)[1]
    assert end % SLOT_ALIGNMENT
    shelf.wrong["partition_0.bin", end] = 1_000
    receiver().receive(shelf.open, add_nothing)
    assert_arrived(tmp_path, published)


def test_another_manifest_is_refused(receiver: Make, shelf: Shelf, tmp_path: Path) -> None:
    """A partition of another set, sound in itself, is not what the set manifest lists; nothing is written."""
    for suffix in ("json", "bin"):
        shelf.files[f"partition_0.{suffix}"] = shelf.files[f"partition_1.{suffix}"]
    with pytest.raises(IntegrityError, match="not the one that its set was made with"):
        receiver().receive(shelf.open, add_nothing)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_size_is_refused(receiver: Make, shelf: Shelf, change: int) -> None:
    """Before any of its data is fetched."""
    payload = shelf.files["partition_0.bin"]
    shelf.files["partition_0.bin"] = payload[:-1] if change < 0 else payload + b"\0"
    with pytest.raises(IntegrityError, match="another size"):
        receiver().receive(shelf.open, add_nothing)
    assert {name for name, _, _ in shelf.ranges} == {"partition_0.json"}


@pytest.mark.parametrize("place", ["index", "copy", "trailer"])
def test_a_tail_that_is_damaged_where_it_was_published_is_refused(
    receiver: Make, shelf: Shelf, published: Path, place: str
) -> None:
    """Without a sound index no byte of the data can be judged, so that none is fetched."""
    size = len(shelf.files["partition_0.bin"])
    with open_partition_files(published / "partition_0.json") as partition:
        data_stop, copy_start = partition.manifest.data_stop, partition.manifest.data_stop + partition.index.nbytes
    # Of the index, a checksum: no rule about places and lengths would find that.
    offset = {"index": data_stop + 20, "copy": copy_start + 40, "trailer": size - 30}[place]
    shelf.wrong["partition_0.bin", offset] = 1_000
    with pytest.raises(IntegrityError, match="no sound chunk index"):
        receiver().receive(shelf.open, add_nothing)
    assert all(stop == size for name, _, stop in shelf.ranges if name == "partition_0.bin")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
@pytest.mark.parametrize("name", ["partition_0.bin", "partition_0.bin.partial", "partition_0.json.partial"])
def test_nothing_is_written_through_a_link(receiver: Make, shelf: Shelf, tmp_path: Path, name: str) -> None:
    """A link in the place of a file leads to what is not ours."""
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    (tmp_path / name).symlink_to(other)
    with pytest.raises(OutputExistsError, match="not a regular file"):
        receiver().receive(shelf.open, add_nothing)
    assert other.read_bytes() == b"precious"


def test_a_source_that_changes_ends_it(receiver: Make, shelf: Shelf, tmp_path: Path) -> None:
    """Errors of the source end all connections, and leave no partition and no thread."""
    threads = threading.active_count()

    def open_file(name: str) -> RemoteFile:
        if name.endswith(".bin"):
            raise SourceChangedError("the file on the server changed", path=name)
        return shelf.open(name)

    with pytest.raises(SourceChangedError):
        receiver().receive(open_file, add_nothing)
    assert threading.active_count() == threads
    assert not (tmp_path / "partition_0.json").exists()


def test_pieces_cover_the_data_and_stay_small(published: Path) -> None:
    """Pieces follow each other without a gap, each begins and ends on a block and is no larger than a slot."""
    with open_partition_files(published / "partition_0.json") as partition:
        data_stop = partition.manifest.data_stop
        pieces = list(PayloadPieces(partition.index, data_stop))
        assert [piece.start for piece in pieces] == [DATA_START, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == data_stop
        assert all(piece.is_aligned and piece.size_bytes <= SLOT_BYTES for piece in pieces)
        assert max(piece.last - piece.first for piece in pieces) >= 40
        # An index that no writer makes, all its chunks off the blocks, is cut all the same.
        shifted = partition.index.copy()
        shifted["stored_offset"] += 64
        odd = list(PayloadPieces(shifted, data_stop + SLOT_ALIGNMENT))
        assert all(piece.size_bytes <= PIECE_BYTES for piece in odd)
        assert odd[-1].last == len(shifted)


def test_requests_join_neighbours_and_leave_out_what_is_there(published: Path) -> None:
    """Missing pieces come in order, each in one run, and no run spans a piece that is not missing."""
    with open_partition_files(published / "partition_0.json") as partition:
        pieces = PayloadPieces(partition.index, partition.manifest.data_stop)
    assert len(pieces) > 3
    missing = [number for number in range(len(pieces)) if number != 1]
    runs = list(iter_runs(pieces, missing, connections=1))
    assert [number for run in runs for number in range(run.first, run.last)] == missing
    assert runs[0].last == 1
    assert runs[1].first == 2
    assert list(iter_runs(pieces, [], connections=4)) == []
