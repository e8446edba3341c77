"""Parity: a set that has it repairs itself, byte for byte, up to what is promised; beyond that it says so."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CAUSAL_CONFIG, Weight, flip, llama_weights, tree, write_checkpoint
from children import die_at_change, in_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmsplit.errors import IntegrityError, MissingExtraError, NoSpaceError, RequestError
from mmsplit.sidecar.disk_forecast import DiskForecast
from mmsplit.sidecar.parity_file import ParityFile
from mmsplit.sidecar.parity_layout import (
    DEFAULT_PERCENT,
    PAGE_BYTES,
    ParityHeader,
    ParityLayout,
    pack_parity_header,
    plan_parity,
)
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.sidecar.scrub_run import Scrub
from mmsplit.splitting import parity_of_split
from mmsplit.verbs.merge import merge
from mmsplit.verbs.parity import parity
from mmsplit.verbs.repair import repair
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify
from mmsplit.workers import Progress

pytest.importorskip("pyeclib")

PAYLOAD, MANIFEST, PARITY = "partition_0.bin", "partition_0.json", "partition_0.parity"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty chunks that do not compress, 1.2 MB: several stripes, and no chunk in more than a few of them."""
    weights = [Weight(f"model.layers.{k}.mlp.noise.weight", "U8", (30_000,), 256) for k in range(40)]
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "model", [weights], files={"config.json": CAUSAL_CONFIG, "a.txt": b"abc"}
    )


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set with parity of 3 %, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 1, parity=3)
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set of two partitions of a few blocks each, with parity of 10 %."""
    root = tmp_path_factory.mktemp("tiny")
    write_checkpoint(root / "model", [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", 2, parity=10)
    return root / "set"


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def _layout(root: Path, name: str = PARITY) -> ParityLayout:
    with ParityFile(root / name) as file:
        return file.layout


def _overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def _spoil(path: Path, start: int, stop: int) -> None:
    """Change every byte of [start, stop)."""
    data = path.read_bytes()[start:stop]
    _overwrite(path, start, bytes(byte ^ 0xA5 for byte in data))


def _spoil_blocks(root: Path, blocks: set[int], name: str = PAYLOAD) -> None:
    layout = _layout(root, name.replace(".bin", ".parity"))
    for block in blocks:
        start = block * layout.block_bytes
        _spoil(root / name, start, min(start + layout.block_bytes, layout.payload_bytes))


def _assert_repairs(root: Path, made: Path) -> None:
    assert not verify(root).ok
    result = repair(root)
    assert result.ok, result.problems
    assert result.source_bytes == 0
    assert tree(root) == tree(made)


def test_what_is_made(made: Path, source: Path, tmp_path: Path) -> None:
    """About the share that was asked for, the same bytes for any threads, by either command; nothing else changes."""
    layout = _layout(made)
    assert (layout.stripe_count, layout.parity_count) == (2, 5)
    split(source, tmp_path / "set", 1)
    before = tree(tmp_path / "set")
    assert before == {name: data for name, data in tree(made).items() if name != PARITY}
    result = parity(tmp_path / "set", 3, threads=3)
    assert [entry.is_new for entry in result.partitions] == [True]
    assert tree(tmp_path / "set") == tree(made)
    again = parity(tmp_path / "set", 3, threads=1)
    assert [entry.is_new for entry in again.partitions] == [False]
    entry = result.as_json()["partitions"][0]
    assert entry["parity_bytes"] == layout.file_bytes == (made / PARITY).stat().st_size
    assert entry["longest_loss_bytes"] == layout.longest_loss_bytes


def test_another_share_replaces_it(damaged: Path) -> None:
    """And the one that is there goes only when the new one is complete."""
    result = parity(damaged / MANIFEST, 1, only=[0])
    assert result.partitions[0].is_new
    assert _layout(damaged).percent == 1
    assert verify(damaged).ok


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_lost_within_the_promise_comes_back(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any blocks, as many of each stripe as it has parity, some of the parity itself among them."""
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made, root)
    layout = _layout(made)
    lost: set[int] = set()
    for stripe in range(layout.stripe_count):
        columns = st.sets(st.integers(0, layout.data_count - 1), max_size=layout.parity_count)
        of_stripe = {column * layout.stripe_count + stripe for column in data.draw(columns)}
        lost |= {block for block in of_stripe if block < layout.block_count}
        for column in range(layout.parity_count - len(of_stripe)):
            if data.draw(st.booleans()):
                start = layout.parity_start + (column * layout.stripe_count + stripe) * layout.block_bytes
                _spoil(root / PARITY, start, start + layout.block_bytes)
    _spoil_blocks(root, lost)
    result = repair(root)
    assert result.ok, result.problems
    assert tree(root) == tree(made)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 30))
def test_one_stretch_of_the_length_promised_comes_back(made: Path, tmp_path: Path, start: int) -> None:
    """Wherever it lies."""
    root = tmp_path / "stretch"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made, root)
    layout = _layout(made)
    start %= layout.payload_bytes
    _spoil(root / PAYLOAD, start, min(start + layout.longest_loss_bytes, layout.payload_bytes))
    _assert_repairs(root, made)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_beyond_the_promise_it_is_refused(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    """The error says which stripe lacks how much, and nothing is written that is not right."""
    root = tmp_path / "beyond"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made, root)
    layout = _layout(made)
    # Of tensors alone: header, index and trailer can be had without parity.
    columns = st.sets(
        st.integers(1, layout.data_count - 4), min_size=layout.parity_count + 1, max_size=layout.parity_count + 5
    )
    lost = {column * layout.stripe_count for column in data.draw(columns)}
    _spoil_blocks(root, lost)
    before = (root / PAYLOAD).read_bytes()
    result = repair(root)
    assert not result.ok
    assert any(f"stripe 0 of {layout.stripe_count} has lost {len(lost)}" in fault.what for fault in result.problems)
    after, right = (root / PAYLOAD).read_bytes(), (made / PAYLOAD).read_bytes()
    assert all(byte in pair for byte, *pair in zip(after, before, right, strict=True))
    assert (root / PARITY).read_bytes() == (made / PARITY).read_bytes()


def test_beyond_the_promise_another_source_helps(source: Path, damaged: Path, made: Path) -> None:
    """What parity cannot give is asked of the next source."""
    layout = _layout(made)
    _spoil(damaged / PAYLOAD, 4096, 4096 + 2 * layout.longest_loss_bytes)
    assert not repair(damaged).ok
    result = repair(damaged, source)
    assert result.ok
    assert result.source_bytes > 0
    assert tree(damaged) == tree(made)


def test_each_block_by_itself(tiny: Path, tmp_path: Path) -> None:
    """Every block of every payload, header and index and trailer among them."""
    for part_id in (0, 1):
        layout = _layout(tiny, f"partition_{part_id}.parity")
        for block in range(layout.block_count):
            root = tmp_path / f"{part_id}-{block}"
            shutil.copytree(tiny, root)
            _spoil_blocks(root, {block}, f"partition_{part_id}.bin")
            _assert_repairs(root, tiny)
            shutil.rmtree(root)


def _data_stop(root: Path) -> int:
    with open_partition_files(root / MANIFEST, "pread") as partition:
        return partition.manifest.data_stop


def _cut(root: Path) -> None:
    os.truncate(root / PAYLOAD, (root / PAYLOAD).stat().st_size - _layout(root).longest_loss_bytes)


def _destroy_tail(root: Path) -> None:
    _spoil(root / PAYLOAD, _data_stop(root), (root / PAYLOAD).stat().st_size)


def _destroy_tail_and_last_chunk(root: Path) -> None:
    """Without its record, no chunk that is damaged can be found again in a payload."""
    _spoil(root / PAYLOAD, _data_stop(root) - 9000, (root / PAYLOAD).stat().st_size)


def _lose_all_manifests(root: Path) -> None:
    _destroy_tail_and_last_chunk(root)
    (root / MANIFEST).unlink()


def _damage_parity(root: Path) -> None:
    layout = _layout(root)
    _spoil(root / PAYLOAD, 40_000, 50_000)
    _spoil(root / PARITY, 0, PAGE_BYTES)  # the header, not its copy
    _spoil(root / PARITY, layout.table_starts[1], layout.table_starts[1] + PAGE_BYTES)
    _spoil(root / PARITY, layout.parity_start + 100, layout.parity_start + 101)


def _lose_a_page_of_both_tables(root: Path) -> None:
    """What should be in the payload is not known for 511 of its blocks; chunks have checksums of their own."""
    layout = _layout(root)
    for start in layout.table_starts:
        _spoil(root / PARITY, start + 8, start + 9)


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _destroy_tail,
        _destroy_tail_and_last_chunk,
        _lose_all_manifests,
        _damage_parity,
        _lose_a_page_of_both_tables,
        lambda root: _spoil(root / PAYLOAD, 0, 5000),
    ],
)
def test_damage_of_every_kind_comes_back(damage: Callable[[Path], None], damaged: Path, made: Path) -> None:
    """Without any source; the parity file is made again, too."""
    damage(damaged)
    _assert_repairs(damaged, made)


def test_manifest_from_parity_alone(damaged: Path, made: Path) -> None:
    """`rebuild_manifest` finds it where payload and parity together have it."""
    _lose_all_manifests(damaged)
    result = repair(damaged, rebuild_manifest=True)
    assert result.ok
    assert (damaged / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()


def test_a_block_that_was_longer_than_the_payload(damaged: Path, made: Path) -> None:
    """Bytes behind the end are cut off."""
    with (damaged / PAYLOAD).open("ab") as file:
        file.write(b"more" * 5000)
    _assert_repairs(damaged, made)


def test_a_dry_run_says_so_and_writes_nothing(damaged: Path) -> None:
    """Parity is named as the source."""
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    before = tree(damaged)
    result = repair(damaged, dry_run=True)
    assert [mended.source for mended in result.mended] == ["parity"]
    assert tree(damaged) == before


def test_any_damage_of_the_parity_file_is_found_and_mended(tiny: Path, tmp_path: Path) -> None:
    """A byte of every part of it; the file is made again as it was."""
    layout = _layout(tiny)
    places = [0, 9, 71, 75, 4000, *range(PAGE_BYTES, layout.file_bytes, 997), layout.file_bytes - 1]
    for place in places:
        root = tmp_path / str(place)
        shutil.copytree(tiny, root)
        flip(root / PARITY, place)
        found = verify(root)
        assert [Path(fault.file).name for fault in found.problems] == [PARITY], place
        assert found.problems[0].start is not None
        assert found.problems[0].start <= place < found.problems[0].stop
        _assert_repairs(root, tiny)
        shutil.rmtree(root)


def test_a_quick_look_reads_no_parity_block(damaged: Path) -> None:
    """Structure only, as of the payload."""
    _spoil(damaged / PARITY, _layout(damaged).parity_start, _layout(damaged).parity_start + 1)
    assert verify(damaged, level="quick").ok
    flip(damaged / PARITY, 3)
    assert not verify(damaged, level="quick").ok


def test_of_all_parts_of_a_scrub_one_reads_the_parity(damaged: Path) -> None:
    """The one with the partition's last chunk."""
    _spoil(damaged / PARITY, _layout(damaged).parity_start, _layout(damaged).parity_start + 1)
    found = [verify(damaged, scrub=Scrub(subset=f"{n}/3", max_rate=1 << 40)).ok for n in (1, 2, 3)]
    assert found == [True, True, False]


def test_parity_of_another_payload(source: Path, damaged: Path, made: Path, tmp_path: Path) -> None:
    """It is found, never used, and made again; the damage that it does not mend stays damage."""
    split(source, tmp_path / "other", 1, codec="zstd", model_id="other", parity=3)
    shutil.copy(tmp_path / "other" / PARITY, damaged / PARITY)
    found = verify(damaged)
    assert ["another payload" in fault.what for fault in found.problems] == [True]
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    before = tree(damaged)
    result = repair(damaged)
    assert not result.ok
    assert tree(damaged) == before
    shutil.copy(made / PAYLOAD, damaged / PAYLOAD)
    _assert_repairs(damaged, made)


def test_parity_that_lies_changes_no_sound_byte(damaged: Path, made: Path) -> None:
    """Whoever forges it, checksums and all, can keep a repair from working, and not make it write what is wrong."""
    layout = _layout(damaged)
    with ParityFile(damaged / PARITY) as file:
        header = file.header
    forged = bytearray(os.urandom(layout.file_bytes))
    page = pack_parity_header(header)
    forged[:PAGE_BYTES] = forged[-PAGE_BYTES:] = page
    (damaged / PARITY).write_bytes(forged)
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    before = (damaged / PAYLOAD).read_bytes()
    assert not repair(damaged).ok
    assert (damaged / PAYLOAD).read_bytes() == before


def test_a_header_that_promises_the_world_costs_no_memory(damaged: Path, tmp_path: Path) -> None:
    """A sparse file as long as its header says, of a payload of a terabyte."""
    layout = plan_parity(1 << 40, 50)
    page = pack_parity_header(ParityHeader(0, "sha256:" + "00" * 32, layout))
    with (damaged / PARITY).open("wb") as file:
        file.write(page)
        file.truncate(layout.file_bytes)
        file.seek(-PAGE_BYTES, os.SEEK_END)
        file.write(page)
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    tracemalloc.start()
    try:
        assert not verify(damaged, level="quick").ok
        assert not repair(damaged, dry_run=True).ok
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_its_place_is_damage(damaged: Path) -> None:
    """Nobody waits for what will never come."""
    (damaged / PARITY).unlink()
    os.mkfifo(damaged / PARITY)
    assert [fault.what for fault in verify(damaged).problems] == ["parity file is no file"]
    assert repair(damaged).mended == ()


def test_a_parity_file_without_a_header_is_made_again(tiny: Path, tmp_path: Path) -> None:
    """It gets the share of another parity file of the set; where none says one, the default."""
    root = tmp_path / "set"
    shutil.copytree(tiny, root)
    other = root / "partition_1.parity"
    other.write_bytes(b"")
    assert [fault.what for fault in verify(root).problems] == ["parity file has no sound header"]
    assert [mended.file for mended in repair(root, dry_run=True).mended] == [str(other)]
    assert repair(root).ok
    assert tree(root) == tree(tiny)
    other.write_bytes(bytes(9000))
    (root / PARITY).write_bytes(b"")
    assert repair(root).ok
    assert {_layout(root, name).percent for name in (PARITY, other.name)} == {DEFAULT_PERCENT}
    assert verify(root).ok


def test_damage_of_a_parity_file_is_one_problem(tiny: Path, tmp_path: Path) -> None:
    """Also where the payload of another partition is one of this partition."""
    root = tmp_path / "set"
    shutil.copytree(tiny, root)
    shutil.copy(root / "partition_1.bin", root / PAYLOAD)
    (root / "partition_1.parity").write_bytes(b"")
    found = [fault.file for fault in verify(root).problems]
    assert found == [str(root / PAYLOAD), str(root / "partition_1.parity")]


def test_what_cannot_be_made_again_is_said_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and what to do."""
    root = tmp_path / "set"
    shutil.copytree(tiny, root)
    (root / PARITY).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    [left] = repair(root).problems
    assert left.what.count("no sound header") == 1
    assert "mmsplit[parity]" in left.what or "cannot be made again: " in left.what


def test_progress_counts_all_payloads_to_its_total_once(tiny: Path, tmp_path: Path) -> None:
    """One stage of one length, which grows to its end and never beyond; found parity counts as done."""
    root = tmp_path / "set"
    shutil.copytree(tiny, root)
    (root / PARITY).unlink()
    seen: list[Progress] = []
    parity(root, 10, threads=1, progress=seen.append)
    total = 2 * sum((root / f"partition_{k}.bin").stat().st_size for k in range(2))
    assert {(progress.stage, progress.total_bytes) for progress in seen} == {("parity", total)}
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_no_parity_of_a_damaged_payload(damaged: Path) -> None:
    """It would keep the damage; what is there stays."""
    before = (damaged / PARITY).read_bytes()
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    with pytest.raises(IntegrityError, match="no parity is made of a damaged payload"):
        parity(damaged, 5)
    assert (damaged / PARITY).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_at_any_change_of_the_disk(tiny: Path, tmp_path: Path) -> None:
    """A file of that name is a whole one; the same call goes on to the same bytes."""
    for number in range(200):
        root = tmp_path / str(number)
        shutil.copytree(tiny, root, ignore=shutil.ignore_patterns("*.parity"))

        def body(root: Path = root, number: int = number) -> None:
            die_at_change(number)
            parity(root, 10, threads=1)

        if in_child(body).signal == 0:
            break
        assert verify(root).ok
        parity(root, 10)
        assert {name: data for name, data in tree(root).items() if not name.endswith(".lock")} == tree(tiny), number
    assert number > 8


def test_split_adds_it_to_what_is_there_and_force_removes_it(source: Path, made: Path, tmp_path: Path) -> None:
    """A finished set gets its parity by --resume; what --force replaces takes its parity along."""
    out = tmp_path / "set"
    split(source, out, 1)
    (out / f"{PARITY}.partial").write_bytes(bytes(100))
    split(source, out, 1, parity=3, existing="resume")
    assert tree(out) == tree(made)
    split(source, out, 1, codec="raw", existing="force")
    assert not (out / PARITY).exists()
    assert verify(out).ok


def test_requests_that_cannot_be(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written."""
    with pytest.raises(RequestError, match="no such share"):
        split(source, tmp_path / "set", 1, parity=60)
    with pytest.raises(RequestError, match="no partition 7"):
        parity(made, only=[7])
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    with pytest.raises(MissingExtraError):
        split(source, tmp_path / "set", 1, parity=2)
    with pytest.raises(MissingExtraError):
        parity(made)
    assert not (tmp_path / "set").exists()


def test_without_the_library_the_other_sources_do(
    source: Path, damaged: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify needs no library, and repair names it where it would have helped."""
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    assert verify(damaged).ok
    _spoil(damaged / PAYLOAD, 40_000, 40_001)
    result = repair(damaged)
    assert "mmsplit[parity]" in result.problems[0].what
    assert repair(damaged, source).ok
    assert tree(damaged) == tree(made)


def test_what_the_set_itself_mends_counts_before_parity_is_asked(tiny: Path, tmp_path: Path) -> None:
    """A damaged trailer and a damaged chunk in a stripe that can lose one block: one repair is enough."""
    root = Path(shutil.copytree(tiny, tmp_path / "set"))
    payload = root / "partition_1.bin"
    with ParityFile(root / "partition_1.parity") as opened:
        assert (opened.layout.parity_count, opened.layout.stripe_count) == (1, 1)
    before = payload.read_bytes()
    flip(payload, 4100)
    flip(payload, len(before) - 40)
    assert repair(root).ok
    assert payload.read_bytes() == before


@pytest.mark.parametrize("resumed", [False, True])
def test_a_consumed_shard_is_not_deleted_before_the_parity_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Parity that cannot be made keeps the shards; the same command goes on, and takes what it said of the disk."""
    weights = [Weight(f"model.layers.{k}.mlp.noise.weight", "U8", (50_000,), 256) for k in range(4)]
    model = write_checkpoint(tmp_path / "model", [[weight] for weight in weights])
    split(model, tmp_path / "plain", 4, parity=10, model_id="m")
    if resumed:  # an ordinary split is there, without parity
        split(model, tmp_path / "set", 4, model_id="m")
    shards = sorted(model.glob("*.safetensors"))
    real, made = parity_of_split.ensure_parity, []

    def fail(path: Path, *arguments: Any) -> object:
        if len(made) == (0 if resumed else 2):
            raise NoSpaceError("full", path=path)
        made.append(path)
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parity_of_split, "ensure_parity", fail)
        with pytest.raises(NoSpaceError):
            split(
                model,
                tmp_path / "set",
                4,
                parity=10,
                consume=True,
                existing="resume" if resumed else "refuse",
                model_id="m",
            )
    assert sorted(model.glob("*.safetensors")) == (shards if resumed else shards[2:])
    told: list[DiskForecast] = []
    split(
        model,
        tmp_path / "set",
        4,
        parity=10,
        consume=True,
        existing="resume",
        model_id="m",
        announce=told.append,
    )
    assert tree(tmp_path / "set") == tree(tmp_path / "plain")
    assert not list(model.glob("*.safetensors"))
    parity_bytes = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.parity"))
    least = parity_bytes if resumed else parity_bytes // 2
    assert told[0].extra_bytes >= least


def test_merge_consume_takes_the_parity_with_the_payload(tiny: Path, tmp_path: Path) -> None:
    """It is of no use without it, and would bar the directory to the next split."""
    root = Path(shutil.copytree(tiny, tmp_path / "set"))
    result = merge(root, tmp_path / "model", consume=True)
    assert {"partition_0.parity", "partition_1.parity"} < set(result.deleted)
    assert [path.name for path in root.iterdir()] == ["config.json"]
