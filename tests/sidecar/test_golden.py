"""Sets written long ago: they stay readable, and the same source still gives the same bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import mmsplit

HERE = Path(__file__).parent
GOLDENS = sorted(path.parent for path in (HERE / "golden").glob("v*/original.json"))


def load_script(path: Path) -> ModuleType:
    """Import a file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_golden = load_script(HERE / "golden" / "make_golden.py")


def recorded(golden: Path) -> dict:
    return json.loads((golden / "original.json").read_bytes())


def files_of(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_the_golden_sets_are_there():
    assert [golden.name for golden in GOLDENS] == list(make_golden.GOLDENS)


@pytest.fixture(params=GOLDENS, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_golden_set_verifies_in_full(golden: Path):
    """Structure, stored and raw checksums are those that were written."""
    result = mmsplit.verify(golden / "set", level="full")
    assert result.problems == ()
    assert result.partition_count == len(list((golden / "set").glob("partition_*.bin")))


def test_golden_set_has_the_root_digest_that_was_recorded(golden: Path):
    with mmsplit.open_set(golden / "set") as partitions:
        assert partitions.manifest.root_digest == recorded(golden)["root_digest"]


def test_golden_set_merges_into_the_original_files(golden: Path, tmp_path: Path):
    """Shards, weights index and small files have the SHA-256 of the originals, and nothing else is written."""
    mmsplit.merge(golden / "set", tmp_path / "merged")
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files_of(tmp_path / "merged").items()}
    assert found == recorded(golden)["sha256"]


def test_golden_set_is_read_by_the_independent_reader(golden: Path):
    independent_reader = load_script(HERE / "independent_reader.py")
    found = independent_reader.read_set(golden / "set")
    files = {**found.shards, **found.index, **found.files}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == recorded(golden)["sha256"]


def test_golden_set_shows_what_the_format_can_hold():
    """Raw and planes chunks, a tensor of several chunks, an empty one, a copy of a tied weight, two shards."""
    golden = HERE / "golden" / "v1"
    with mmsplit.open_partition(golden / "set" / "partition_1.json") as partition:
        layers = {layer.name: layer for layer in partition.layers}
        assert (layers["lm_head"].alias, layers["lm_head"].tied_to) == ("lm_head.weight", 0)
        assert layers["lm_head"].stored
        assert "lm_head.weight" in partition
        assert {partition.entry(name).chunk_count for name in partition} == {0, 1, 2}
        assert {partition.entry(name).shard for name in partition} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }
    independent_reader = load_script(HERE / "independent_reader.py")
    chunks = [record for part in independent_reader.read_set(golden / "set").partitions for record in part.records]
    assert {record.codec for record in chunks} == {0, 2}
    assert {record.layout for record in chunks if record.codec == 2} >= {0, 3, 4, 5}


def test_golden_set_of_experts_shows_slices():
    """Each partition of experts has its rows of a packed tensor, and the set has it whole."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    golden = HERE / "golden" / "v1-experts"
    with mmsplit.open_set(golden / "set") as partitions:
        rows = [partitions.partition(part_id).entry(name).rows for part_id in (1, 2)]
        assert [(row.start, row.stop, row.shape) for row in rows] == [(0, 2, (5, 64, 12)), (2, 5, (5, 64, 12))]
        assert name not in partitions.partition(0)
        whole = partitions[name]
    assert whole.shape == (5, 64, 12)
    independent_reader = load_script(HERE / "independent_reader.py")
    assert independent_reader.join_rows(name, independent_reader.read_set(golden / "set").partitions) == whole.tobytes()


def test_the_golden_checkpoint_is_still_made_of_the_same_bytes(golden: Path, tmp_path: Path):
    make_golden.GOLDENS[golden.name].write_checkpoint(tmp_path / "source")
    assert make_golden.sha256_of_files(tmp_path / "source") == recorded(golden)["sha256"]


@pytest.mark.parametrize("threads", [1, 3])
def test_splitting_the_same_source_gives_the_golden_bytes(golden: Path, tmp_path: Path, threads: int):
    """Byte identity needs the same zstd, reading does not."""
    versions = make_golden.library_versions()
    made_with = {key: recorded(golden)[key] for key in versions}
    if made_with != versions:
        pytest.skip(f"golden was encoded by {made_with}, here is {versions}: frames may differ")
    make_golden.GOLDENS[golden.name].write_checkpoint(tmp_path / "source")
    make_golden.GOLDENS[golden.name].split(tmp_path / "source", tmp_path / "set", threads=threads)
    assert files_of(tmp_path / "set") == files_of(golden / "set")
