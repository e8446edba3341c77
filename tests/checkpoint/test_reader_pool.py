"""Open shards: shared, bounded, never closed while they are lent."""

from pathlib import Path

import pytest

from mmsplit.checkpoint import FileReader, open_checkpoint, reader_pool
from mmsplit.checkpoint.checkpoint import Checkpoint
from mmsplit.errors import MmsplitError, SourceChangedError


@pytest.fixture
def checkpoint(tmp_path: Path, write_shard, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Six shards, and a pool that keeps two open."""
    monkeypatch.setattr(reader_pool, "_MAX_OPEN", 2)
    for name in "abcdef":
        write_shard(tmp_path / f"{name}.safetensors", {name: name.encode()})
    return open_checkpoint(tmp_path)


def is_open(reader: FileReader) -> bool:
    """Whether the reader still has its file."""
    try:
        return len(reader.read(0, 8)) == 8
    except MmsplitError:  # it is closed
        return False


def test_shard_is_opened_once(checkpoint: Checkpoint) -> None:
    """Whoever asks while it is open gets the same reader."""
    with checkpoint.open_readers() as pool:
        with pool.lend("a.safetensors") as one, pool.lend("a.safetensors") as two:
            assert one is two
        with pool.lend("a.safetensors") as three:
            assert three is one


def test_idle_readers_beyond_the_bound_are_closed_oldest_first(checkpoint: Checkpoint) -> None:
    """The last two stay open."""
    readers = []
    with checkpoint.open_readers() as pool:
        for shard in checkpoint.shards:
            with pool.lend(shard.name) as reader:
                readers.append(reader)
        assert [is_open(reader) for reader in readers] == [False] * 4 + [True] * 2
        with pool.lend("e.safetensors"), pool.lend("a.safetensors"):  # e was used since f
            assert [is_open(reader) for reader in readers[4:]] == [True, False]
    assert not any(is_open(reader) for reader in readers)


def test_lent_readers_are_never_closed(checkpoint: Checkpoint) -> None:
    """More are lent than the bound allows; when they come back, the next lending closes them."""
    with checkpoint.open_readers() as pool:
        lent = [pool.lend(shard.name) for shard in checkpoint.shards[:5]]
        readers = [context.__enter__() for context in lent]
        assert all(is_open(reader) for reader in readers)
        with pool.lend("a.safetensors"):
            pass  # lent twice, returned once
        assert all(is_open(reader) for reader in readers)
        for context in lent:
            context.__exit__(None, None, None)
        with pool.lend("f.safetensors"):
            assert [is_open(reader) for reader in readers].count(True) == 1


def test_reader_comes_back_when_the_block_fails(checkpoint: Checkpoint) -> None:
    """A reader whose user failed is idle again."""
    with checkpoint.open_readers() as pool:
        with pytest.raises(KeyError), pool.lend("a.safetensors") as reader:
            raise KeyError
        for name in "bcd":
            with pool.lend(f"{name}.safetensors"):
                pass
        assert not is_open(reader)


def test_changed_shard_is_not_lent(checkpoint: Checkpoint) -> None:
    """Nor is anything left behind by the attempt."""
    path = Path(checkpoint.shards[0].location)
    before = path.read_bytes()
    path.write_bytes(before + b"x")
    with checkpoint.open_readers() as pool:
        for _ in range(2):
            with pytest.raises(SourceChangedError), pool.lend(path.name):
                pass
