"""`--consume`: what is deleted when, what is refused, what an interrupted run leaves and how it goes on.

Crashes, losses of power and kills at every step are in tests/faults (scenarios "split --consume", "merge --consume").
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, Weight, flip, llama_weights, tree, write_checkpoint

import mmsplit
from mmsplit.checkpoint import FileReader
from mmsplit.errors import (
    FormatError,
    IntegrityError,
    MissingPartitionError,
    MissingShardError,
    NoSpaceError,
    OutputExistsError,
    OutputLockedError,
    RequestError,
    SourceChangedError,
)
from mmsplit.sidecar.consumed_directory import ConsumedDirectory
from mmsplit.sidecar.disk_forecast import DiskForecast
from mmsplit.sidecar.layout import Slot
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.slot_encoder import EncodedSlot, SlotEncoder
from mmsplit.splitting import consumer as consumer_module
from mmsplit.splitting import space, split_run
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split

SHARD = "model-{:05d}-of-00004.safetensors"
TESTS = Path(__file__).resolve().parents[1]


class Interrupt(BaseException):
    """Somebody pulls the plug; not an `Exception`."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four shards in the order of the layers; of three partitions the last has a copy of what is in the first shard."""
    first, norm, *blocks = llama_weights(4)
    big = Weight("model.layers.2.mlp.down_proj.weight", "BF16", (160, 64), 200)
    shards = [[first, *blocks[:3]], blocks[3:6], [*blocks[6:9], big], [*blocks[9:], norm]]
    return write_checkpoint(tmp_path / "model", shards, index=True, files={"config.json": CAUSAL_CONFIG})


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))


def interrupted(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 1) -> None:
    """Split, and stop when shards have been deleted `after` times."""
    real, count = ConsumedDirectory.delete, iter(range(1, 100))

    def delete(self: ConsumedDirectory, names: list[str]) -> None:
        real(self, names)
        if next(count) == after:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsumedDirectory, "delete", delete)
        with pytest.raises(Interrupt):
            split(model, out, 3, threads=2, consume=True)


def test_split_makes_the_same_set_and_leaves_the_other_files(tmp_path: Path, model: Path) -> None:
    """Byte for byte as without; index and config stay, and merging into the old place brings everything back."""
    before = tree(model)
    split(model, tmp_path / "plain", 3, threads=2)
    result = split(model, tmp_path / "set", 3, threads=2, consume=True)
    assert tree(tmp_path / "set") == tree(tmp_path / "plain")
    assert sorted(tree(model)) == ["config.json", "model.safetensors.index.json"]
    assert sorted(result.deleted) == [SHARD.format(k) for k in (1, 2, 3, 4)]
    merge(tmp_path / "set", model, consume=True)
    assert tree(model) == before
    assert sorted(tree(tmp_path / "set")) == ["config.json"]


def test_shards_go_as_soon_as_their_partitions_are_there(tmp_path: Path, model: Path) -> None:
    """Foretold, and so it happens; a copy of a tied weight does not keep the shard of its original."""
    told: list[DiskForecast] = []
    split(model, tmp_path / "set", 3, consume=True, announce=told.append)
    (disk,) = told
    assert [step.deleted for step in disk.steps] == [
        (SHARD.format(1), SHARD.format(2)),
        (SHARD.format(3),),
        (SHARD.format(4),),
    ]


def test_half_way_nothing_passes_for_whole_and_resume_finishes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first deletion: set and source are refused with what to do; the same command goes on."""
    split(model, tmp_path / "plain", 3)
    out = tmp_path / "set"
    interrupted(model, out, monkeypatch)
    assert shards_in(model) == [SHARD.format(3), SHARD.format(4)]
    with pytest.raises(FormatError, match="not finished"):
        mmsplit.verify(out)
    with pytest.raises(FormatError, match="not finished"):
        mmsplit.open_set(out)
    with pytest.raises(MissingShardError):
        split(model, tmp_path / "other", 3)
    for arguments in ({}, {"existing": "resume"}, {"existing": "force"}):
        with pytest.raises(OutputExistsError, match="--consume --resume"):
            split(model, out, 3, **arguments)  # type: ignore[arg-type]
    with pytest.raises(OutputExistsError, match="Use --consume --resume to go on"):
        split(model, out, 3, consume=True)
    with pytest.raises(OutputExistsError, match="--consume --resume"):
        split(model, out, 3, existing="force", consume=True)
    result = split(model, out, 3, existing="resume", consume=True)
    assert result.deleted == (SHARD.format(3), SHARD.format(4))
    assert tree(out) == tree(tmp_path / "plain")
    assert split(model, out, 3, existing="resume", consume=True).already_finished


def test_no_other_command_replaces_the_only_copy(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model forced into the output of a half-consumed one is refused; so is one whose state is damaged."""
    other = write_checkpoint(tmp_path / "other", [llama_weights(2)])
    out = tmp_path / "set"
    interrupted(model, out, monkeypatch)
    for damage in (None, lambda: flip(out / "unfinished_split.json", 500)):
        if damage is not None:
            damage()
        before = tree(out)
        with pytest.raises(OutputExistsError, match=r"only copy|deletes its source"):
            split(other, out, 2, existing="force", consume=True)
        assert tree(out) == before


def test_resume_takes_a_source_that_was_moved_and_not_one_that_was_changed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left may be copied to another disk: by then the SHA-256 of every shard is recorded."""
    out = tmp_path / "set"
    split(model, tmp_path / "plain", 3)
    interrupted(model, out, monkeypatch)
    copy = tmp_path / "moved" / "model"
    shutil.copytree(model, copy)
    flip(copy / SHARD.format(4), -1 + (copy / SHARD.format(4)).stat().st_size)
    with pytest.raises(SourceChangedError):
        split(copy, out, 3, existing="resume", consume=True)
    flip(copy / SHARD.format(4), -1 + (copy / SHARD.format(4)).stat().st_size)
    split(copy, out, 3, existing="resume", consume=True)
    assert tree(out) == tree(tmp_path / "plain")
    assert shards_in(copy) == []


def test_tensors_of_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when all shards were there, remembered when they are not; both shards are held by one tensor."""
    weights = llama_weights(4, head=True)
    model = write_checkpoint(tmp_path / "model", [weights[:1], weights[2:6], weights[6:-1], [weights[-1], weights[1]]])
    head, embedding = model / SHARD.format(4), model / SHARD.format(1)
    data = bytearray(head.read_bytes())
    start, size = 8 + int.from_bytes(data[:8], "little"), 64 * 32 * 2
    data[start : start + size] = embedding.read_bytes()[-size:]
    head.write_bytes(data)
    before, out = tree(model), tmp_path / "set"
    split(model, tmp_path / "plain", 3)
    interrupted(model, out, monkeypatch)
    assert 0 < len(shards_in(model)) < 4
    split(model, out, 3, existing="resume", consume=True)
    assert tree(out) == tree(tmp_path / "plain")
    assert split(model, out, 3, existing="resume", consume=True).already_finished
    merge(out, tmp_path / "merged", consume=True)
    assert tree(tmp_path / "merged") == before


def test_resume_with_another_encoder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of zstd may not bar the only way there is; without deleted shards one starts again."""
    out, before = tmp_path / "set", tree(model)
    interrupted(model, out, monkeypatch)
    monkeypatch.setattr(split_run, "ENCODER", "another")
    split(model, out, 3, existing="resume", consume=True)
    merge(out, tmp_path / "merged")
    assert tree(tmp_path / "merged") == before


def test_a_shard_that_somebody_else_deleted_is_missed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal knows which shards may be gone."""
    out = tmp_path / "set"
    interrupted(model, out, monkeypatch)
    (model / SHARD.format(3)).rename(tmp_path / "away")
    with pytest.raises(MissingShardError, match="not mmsplit that deleted it"):
        split(model, out, 3, existing="resume", consume=True)


def test_a_damaged_partition_whose_shards_are_gone_is_left_as_it_is(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, and neither the partition nor one shard more is touched."""
    out = tmp_path / "set"
    interrupted(model, out, monkeypatch)
    flip(out / "partition_0.bin", 4200)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match="cannot be read back whole"):
        split(model, out, 3, existing="resume", consume=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", ["encoder", "disk"])
def test_what_the_disk_does_not_give_back_is_not_deleted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A bit that was lost before the checksum, or after the sync: found by the proof, and the shard stays."""
    out, before = tmp_path / "set", tree(model)
    split(model, tmp_path / "plain", 3)
    with monkeypatch.context() as patch:
        if way == "disk":
            real = consumer_module.settle

            def settle(paths: object) -> None:
                real(paths)  # type: ignore[arg-type]
                flip(out / "partition_0.bin", 4200)

            patch.setattr(consumer_module, "settle", settle)
        else:
            _lose_a_bit(patch)
        with pytest.raises(IntegrityError):
            split(model, out, 3, threads=1, consume=True)
    assert tree(model) == before
    if way == "encoder":  # the disk is sound: the partition is made again
        split(model, out, 3, existing="resume", consume=True)
        assert tree(out) == tree(tmp_path / "plain")


def _lose_a_bit(patch: pytest.MonkeyPatch) -> None:
    """Memory flips a bit of the source before anything has a checksum, for whoever encodes for partition 0."""
    encode, borrow = SlotEncoder.encode, FileReader.borrow
    encoding = threading.local()

    @contextmanager
    def flipped(self: FileReader, start: int, stop: int, *rest: object) -> Iterator[memoryview]:
        with borrow(self, start, stop, *rest) as view:  # type: ignore[arg-type]
            if not getattr(encoding, "is_hurt", False):
                yield view
                return
            data = bytearray(view)
            data[0] ^= 1
            yield memoryview(data).toreadonly()

    def encode_hurt(self: SlotEncoder, part_id: int, slot: Slot) -> EncodedSlot:
        encoding.is_hurt = part_id == 0
        try:
            return encode(self, part_id, slot)
        finally:
            encoding.is_hurt = False

    patch.setattr(FileReader, "borrow", flipped)
    patch.setattr(SlotEncoder, "encode", encode_hurt)


def test_a_shard_that_changes_on_the_way_is_not_deleted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written to after it was hashed: what is there now is in no partition."""
    real = consumer_module.Consumer.delete_proven

    def delete(self: consumer_module.Consumer, readers: object = None) -> None:
        with (model / SHARD.format(2)).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        os.utime(model / SHARD.format(2), ns=(1, 1))
        real(self, readers)  # type: ignore[arg-type]

    monkeypatch.setattr(consumer_module.Consumer, "delete_proven", delete)
    with pytest.raises(SourceChangedError):
        split(model, tmp_path / "set", 3, threads=1, consume=True)
    assert shards_in(model) == [SHARD.format(k) for k in (1, 2, 3, 4)]


def test_consume_after_an_ordinary_split(tmp_path: Path, model: Path) -> None:
    """A set that is there already is proven against the source, which then goes; another source does not."""
    out = tmp_path / "set"
    split(model, out, 3)
    changed = tmp_path / "changed" / "model"
    shutil.copytree(model, changed)
    flip(changed / SHARD.format(1), (changed / SHARD.format(1)).stat().st_size - 1)
    with pytest.raises(SourceChangedError, match="nor is any other"):
        split(changed, out, 3, existing="resume", consume=True)
    assert len(shards_in(changed)) == 4
    assert split(model, out, 3, existing="resume", consume=True).deleted
    assert shards_in(model) == []


def _link(model: Path) -> None:
    (model / SHARD.format(2)).rename(model.parent / "blob")
    (model / SHARD.format(2)).symlink_to(model.parent / "blob")


def _hard_link(model: Path) -> None:
    os.link(model / SHARD.format(2), model.parent / "blob")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (_link, {}, "is a link"),
        (_hard_link, {}, "hard link"),
        (None, {"only": (1,)}, "--only"),
        (None, {"source_sha256": False}, "SHA-256"),
    ],
)
def test_refused(
    tmp_path: Path, model: Path, prepare: Callable[[Path], None] | None, arguments: dict, message: str
) -> None:
    """What would free nothing, harm others, or could not be proven; before anything is written."""
    if prepare is not None:
        prepare(model)
    before = tree(tmp_path)
    with pytest.raises(RequestError, match=message):
        split(model, tmp_path / "set", 3, consume=True, **arguments)
    assert tree(tmp_path) == before


def test_a_model_of_the_hub_has_nothing_to_delete(tmp_path: Path) -> None:
    """Refused before the network is asked."""
    with pytest.raises(RequestError, match="no shards here"):
        split("org/name", tmp_path / "set", 2, consume=True)


def test_two_runs_do_not_consume_one_source(tmp_path: Path, model: Path) -> None:
    """Each would be left with half."""
    with ConsumedDirectory(model), pytest.raises(OutputLockedError):
        split(model, tmp_path / "set", 3, consume=True)
    split(model, tmp_path / "set", 3)
    with OutputDirectory(tmp_path / "set"), pytest.raises(OutputLockedError):
        merge(tmp_path / "set", tmp_path / "merged", consume=True)
    with ConsumedDirectory(tmp_path / "set"), pytest.raises(OutputLockedError):
        merge(tmp_path / "set", tmp_path / "merged", consume=True)


def test_refused_for_want_of_space_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a sample of the weights says; with more than that, it is tried."""
    told: list[DiskForecast] = []
    with monkeypatch.context() as patch:
        patch.setattr(space, "free_bytes", lambda _: 1000)
        with pytest.raises(NoSpaceError, match="--num-parts") as caught:
            split(model, tmp_path / "set", 3, consume=True, announce=told.append)
    assert caught.value.exit_code == 6
    assert told[0].expected_bytes <= told[0].extra_bytes
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["llama_tied.gguf", "views.zip.bin", "shapes.legacy.bin"])
def test_one_file_goes_in_the_end(tmp_path: Path, name: str) -> None:
    """GGUF and PyTorch files, named by themselves; interrupted after the deletion, the set says what is gone."""
    (found,) = (TESTS / "checkpoint").glob(f"*_fixtures/{name}")
    source = tmp_path / "source" / found.name
    source.parent.mkdir()
    shutil.copy(found, source)
    parts = min(2, len(mmsplit.plan(source, 1).partitions[0].layers))
    told: list[DiskForecast] = []
    split(source, tmp_path / "set", parts, consume=True, announce=told.append)
    assert told[0].steps[-1].deleted == (found.name,)
    assert not source.exists()
    again = split(source, tmp_path / "set", parts, consume=True, existing="resume")
    assert again.already_finished
    merge(tmp_path / "set", tmp_path / "merged", consume=True)
    assert (tmp_path / "merged" / found.name).read_bytes() == found.read_bytes()


def test_parts_of_a_gguf_model_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half consumed, what is left is planned from what was kept of the rest."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (TESTS / "checkpoint" / "gguf_fixtures").glob("split-*.gguf"):
        shutil.copy(path, source)
    before = tree(source)
    parts = len(mmsplit.plan(source, 1).partitions[0].layers)
    split(source, tmp_path / "plain", parts)
    with monkeypatch.context() as patch:
        real = ConsumedDirectory.delete

        def delete(self: ConsumedDirectory, names: list[str]) -> None:
            real(self, names)
            if names:
                raise Interrupt

        patch.setattr(ConsumedDirectory, "delete", delete)
        with pytest.raises(Interrupt):
            split(source, tmp_path / "set", parts, consume=True)
    assert len(tree(source)) < len(before)
    split(source, tmp_path / "set", parts, consume=True, existing="resume")
    assert tree(tmp_path / "set") == tree(tmp_path / "plain")
    merge(tmp_path / "set", tmp_path / "merged")
    assert tree(tmp_path / "merged") == before


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_set(tmp_path: Path, model: Path) -> Path:
    split(model, tmp_path / "set", 3)
    return tmp_path / "set"


def interrupted_merge(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ConsumedDirectory.delete

    def delete(self: ConsumedDirectory, names: list[str]) -> None:
        real(self, names)
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsumedDirectory, "delete", delete)
        with pytest.raises(Interrupt):
            merge(root, out, consume=True)


def test_half_merged_set_is_refused_and_goes_on(
    tmp_path: Path, model: Path, whole_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify and open say what is going on; resume needs the output that has the rest, with --consume or without."""
    out = tmp_path / "merged"
    interrupted_merge(whole_set, out, monkeypatch)
    assert shards_in(whole_set) == ["partition_1.bin", "partition_2.bin"]
    for use in (mmsplit.verify, mmsplit.open_set):
        with pytest.raises(FormatError, match="merge --consume"):
            use(whole_set)
    with pytest.raises(OutputExistsError, match="only copy"):
        split(model, whole_set, 2, existing="force")
    with pytest.raises(MissingPartitionError):
        merge(whole_set, tmp_path / "elsewhere")
    with pytest.raises(MissingPartitionError, match=str(out)):
        merge(whole_set, tmp_path / "elsewhere", resume=True)
    copy, copied = tmp_path / "copy", tmp_path / "copied"
    shutil.copytree(whole_set, copy)
    shutil.copytree(out, copied)
    merge(copy, copied, resume=True)
    assert tree(copied) == tree(model)
    merge(whole_set, out, resume=True, consume=True)
    assert tree(out) == tree(model)
    assert sorted(tree(whole_set)) == ["config.json"]


@pytest.mark.parametrize("was_split", [False, True], ids=["at once", "after an ordinary split"])
def test_the_only_copy_is_marked_until_the_last_shard_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, was_split: bool
) -> None:
    """Without an index and numbers, what is left of the source passes for a smaller model: force must not take it."""
    model, out = tmp_path / "model", tmp_path / "set"
    for number, name in enumerate(("alpha", "beta")):
        write_checkpoint(model, [[Weight(f"model.layers.{number}.up.weight", "F32", (16, 16), number)]])
        (model / "model.safetensors").rename(model / f"{name}.safetensors")
    if was_split:
        split(model, out, 1)
    before = tree(model)

    def delete(self: ConsumedDirectory, names: list[str]) -> None:
        (self.path / names[0]).unlink()
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsumedDirectory, "delete", delete)
        with pytest.raises(Interrupt):
            split(model, out, 1, existing="resume", consume=True)
    assert shards_in(model) == ["beta.safetensors"]
    for consume in (False, True):
        with pytest.raises(OutputExistsError):
            split(model, out, 1, existing="force", consume=consume)
    split(model, out, 1, existing="resume", consume=True)
    assert shards_in(model) == []
    assert not (out / "unfinished_split.json").exists()
    merge(out, tmp_path / "back")
    assert tree(tmp_path / "back") == before


def test_a_shard_without_tensors_is_read_back_before_the_set_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no partition, but its bytes are in the set manifest, which is deleted last."""
    from mmsplit.merging import set_consumer

    model, whole = tmp_path / "model", tmp_path / "set"
    shards = [[Weight(f"model.layers.{n}.up.weight", "F32", (16, 16), n)] for n in range(2)]
    write_checkpoint(model, [*shards, []])
    split(model, whole, 2)
    before, real = tree(whole), set_consumer.settle

    def settle(paths: object) -> None:
        found = list(paths)  # type: ignore[call-overload]
        real(found)
        for path in found:
            if path.name == "model-00003-of-00003.safetensors":
                flip(path, 9)

    monkeypatch.setattr(set_consumer, "settle", settle)
    with pytest.raises(IntegrityError, match="does not give back"):
        merge(whole, tmp_path / "merged", consume=True)
    assert "partition_set.json" in tree(whole)
    assert before["partition_set.json"] == tree(whole)["partition_set.json"]


def test_a_damaged_set_is_merged_by_nobody_who_deletes(tmp_path: Path, whole_set: Path) -> None:
    """Damage in the last partition is found before the first is deleted."""
    flip(whole_set / "partition_2.bin", 4200)
    before = tree(whole_set)
    with pytest.raises(IntegrityError, match="damaged"):
        merge(whole_set, tmp_path / "merged", consume=True)
    assert tree(whole_set) == before


def test_what_the_disk_does_not_give_back_keeps_its_partitions(
    tmp_path: Path, whole_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged shard that is lost after it was synced."""
    from mmsplit.merging import set_consumer

    before = tree(whole_set)
    real = set_consumer.settle

    def settle(paths: object) -> None:
        found = list(paths)  # type: ignore[call-overload]
        real(found)
        for path in found:
            if path.suffix == ".safetensors":
                flip(path, 700)

    monkeypatch.setattr(set_consumer, "settle", settle)
    with pytest.raises(IntegrityError, match="does not give back"):
        merge(whole_set, tmp_path / "merged", consume=True)
    assert tree(whole_set) == before


def test_merge_refuses(tmp_path: Path, model: Path, whole_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recorded SHA-256, links, too little space; with everything as it was."""
    bare = tmp_path / "bare"
    split(model, bare, 3, source_sha256=False)
    with pytest.raises(RequestError, match="not recorded"):
        merge(bare, tmp_path / "merged", consume=True)
    os.link(whole_set / "partition_1.bin", tmp_path / "name")
    with pytest.raises(RequestError, match="hard link"):
        merge(whole_set, tmp_path / "merged", consume=True)
    (tmp_path / "name").unlink()
    before = tree(whole_set)
    with monkeypatch.context() as patch:
        patch.setattr("mmsplit.verbs.merge.free_bytes", lambda _: 1000)
        with pytest.raises(NoSpaceError):
            merge(whole_set, tmp_path / "merged", consume=True)
    assert tree(whole_set) == before
