"""An output that lies about the source that is being consumed into it: refused, nothing deleted, nothing elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint

from mmsplit.digests import sha256_of
from mmsplit.errors import IntegrityError, MmsplitError
from mmsplit.sidecar.chunk_index import CHUNK_RECORD
from mmsplit.sidecar.consumed_directory import ConsumedDirectory
from mmsplit.sidecar.output_directory import STATE_NAME
from mmsplit.sidecar.payload_writer import JOURNAL_SUFFIX
from mmsplit.splitting.partition_run import PartitionRun
from mmsplit.verbs.split import split

State = dict[str, Any]


class Interrupt(BaseException):
    """Somebody pulls the plug; not an `Exception`."""


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of three shards of which the first is deleted, and the unfinished split that deleted it."""
    first, norm, *blocks = llama_weights(3)
    shards = [[first, *blocks[:3]], blocks[3:6], [*blocks[6:], norm]]
    write_checkpoint(tmp_path / "model", shards, index=True, files={"config.json": CAUSAL_CONFIG})
    real = ConsumedDirectory.delete

    def delete(self: ConsumedDirectory, names: list[str]) -> None:
        real(self, names)
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsumedDirectory, "delete", delete)
        with pytest.raises(Interrupt):
            split(tmp_path / "model", tmp_path / "set", 3, threads=1, consume=True)
    return tmp_path


def _seal(path: Path, change: Callable[[State], None]) -> None:
    """Change a state, its checksum in order."""
    state = json.loads(path.read_bytes())
    del state["xxh3"]
    change(state)
    state["xxh3"] = xxhash.xxh3_64_hexdigest(json.dumps(state, sort_keys=True).encode())
    path.write_text(json.dumps(state))


def _resume(half: Path) -> None:
    split(half / "model", half / "set", 3, threads=1, consume=True, existing="resume")


def test_small_files_that_a_state_names_elsewhere_are_not_carried_along(half: Path) -> None:
    """Neither is one read from outside the model, nor written outside the output."""
    secret = half.parent / f"{half.name}-secret.txt"
    secret.write_text("secret")
    (half / "model" / "link.txt").symlink_to(secret)
    names = [f"../../{secret.name}", f"../{half.name}-made.txt", str(secret), "link.txt", "config.json"]
    _seal(half / "set" / STATE_NAME, lambda state: state["kept_source"].update(files=names))
    before = set(half.parent.iterdir())
    _resume(half)
    assert set(half.parent.iterdir()) == before
    assert b"secret" not in tree(half / "set").values()
    assert [entry["name"] for entry in json.loads((half / "set" / "partition_set.json").read_text())["files"]] == [
        "config.json"
    ]


def _first_shard(change: Callable[[State], None]) -> Callable[[State], None]:
    return lambda state: change(state["kept_source"]["shards"][0])


@pytest.mark.parametrize(
    "lie",
    [
        _first_shard(lambda shard: shard.update(ranges=[{}])),
        _first_shard(lambda shard: shard.update(ranges=[[0]])),
        _first_shard(lambda shard: shard.update(ranges=[["0", "8"]])),
        _first_shard(lambda shard: shard.update(ranges=[[8, 0]])),
        _first_shard(lambda shard: shard.update(ranges=[[0, 1 << 60]])),
        _first_shard(lambda shard: shard.update(identity=[[]])),
        _first_shard(lambda shard: shard.update(name="../x")),
        _first_shard(lambda shard: shard["kept"].update(bytes=1)),
        _first_shard(lambda shard: shard["kept"].update(zstd_base64="AAAA")),
        lambda state: state["kept_source"].update(shards=state["kept_source"]["shards"][:1] * 2),
        lambda state: state["kept_source"].update(same_as={"model.norm.weight": []}),
        lambda state: state["kept_source"].update(same_as={"model.norm.weight": "nothing"}),
        lambda state: state["kept_source"].update(same_as={"model.norm.weight": "model.embed_tokens.weight"}),
        lambda state: state["kept_source"].update(index=None),
        lambda state: state["kept_source"].update(index={"name": "../x"}),
        lambda state: state.update(deleted_shards=[]),
    ],
)
def test_a_state_that_lies_is_refused(half: Path, lie: Callable[[State], None]) -> None:
    """With an error of ours; the shards that are there stay."""
    _seal(half / "set" / STATE_NAME, lie)
    before = tree(half / "model")
    with pytest.raises(MmsplitError) as caught:
        _resume(half)
    assert caught.value.path is not None
    assert tree(half / "model") == before


def test_what_a_state_says_of_a_shard_does_not_delete_it(half: Path, tmp_path: Path) -> None:
    """Whoever puts partitions of other weights there, and their digests into the state, has no shard deleted."""
    first, norm, *blocks = llama_weights(3)
    shards = [[first, *blocks[:3]], blocks[3:6], [*blocks[6:], norm]]
    other = write_checkpoint(tmp_path / "other" / "model", shards, index=True, seed=8)
    split(other, tmp_path / "forged", 3, threads=1)
    for suffix in (".json", ".bin"):
        for part_id in (1, 2):
            shutil.copy(tmp_path / "forged" / f"partition_{part_id}{suffix}", half / "set")
    digests = {path.name: sha256_of(path.read_bytes()) for path in other.glob("*.safetensors")}
    _seal(half / "set" / STATE_NAME, lambda state: state["shard_sha256"].update(digests))
    before = tree(half / "model")
    with pytest.raises(MmsplitError):
        _resume(half)
    assert tree(half / "model") == before


@pytest.mark.parametrize("field", ["raw_xxh3", "stored_xxh3", "stored_blake3"])
def test_right_bytes_under_a_wrong_checksum_are_no_proof(
    half: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """No reader would give them out: the shard stays."""

    def stop(_: PartitionRun) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartitionRun, "finish", stop)
        with pytest.raises(Interrupt):
            _resume(half)
    journal = half / "set" / f"partition_1.bin{JOURNAL_SUFFIX}"
    rows = journal.read_bytes()[:-8]
    index = np.frombuffer(rows, CHUNK_RECORD).copy()
    if field == "raw_xxh3":
        index[field][0] ^= 1
    else:  # believed only where it fits; so the record is changed where it is made
        real = PartitionRun.finish

        def finish(self: PartitionRun) -> None:
            view = self.writer.index.view(np.uint8).reshape(len(self.writer.index), -1)
            view[0, CHUNK_RECORD.fields[field][1]] ^= 1  # type: ignore[index]
            real(self)

        monkeypatch.setattr(PartitionRun, "finish", finish)
    journal.write_bytes(index.tobytes() + xxhash.xxh3_64_digest(index.tobytes()))
    before = tree(half / "model")
    with pytest.raises(IntegrityError, match="its checksums are not those of its bytes"):
        _resume(half)
    assert tree(half / "model") == before
