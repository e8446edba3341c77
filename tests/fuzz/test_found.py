"""What fuzzing and its tables found, one test each; all of it is refused now, in words of ours."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Weight, write_checkpoint, write_shard
from directories import sets
from mutators import NAMES
from sealing import Files, sealed, taken_apart, with_root_digest, write_files

from mmsplit.cli import run
from mmsplit.errors import FormatError, IntegrityError, MmsplitError, OutputError, PlanError, RequestError
from mmsplit.sidecar.manifest import parse_manifest
from mmsplit.sidecar.set_manifest import parse_set_manifest
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.plan import plan
from mmsplit.verbs.pull import pull
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify


def _forged(name: str, change: Callable[[Any], None]) -> Files:
    """A set whose first manifest says something else, every checksum in order."""
    parts = taken_apart(sets()[name])
    values = json.loads(parts.partitions[0].manifest)
    change(values)
    first = parts.partitions[0]._replace(manifest=json.dumps(values).encode())
    return sealed(parts._replace(partitions=(first, *parts.partitions[1:])))


def test_a_view_of_another_layer_s_tensor_reads_no_memory_that_is_not_the_tensor_s(tmp_path: Path) -> None:
    """A tied layer may claim any size for a tensor that it does not store: its views were held to that size alone."""

    def change(values: Any) -> None:
        base = next(t for layer in values["layers"] for t in layer["tensors"] if t["dtype"] == "F32" and t["bytes"])
        count = 1 << 20
        claimed = {**base, "shape": [count], "params": count, "bytes": 4 * count, "chunks": [0, 1], "xxh3": None}
        claimed["source_range"] = [0, 4 * count]
        claimed.pop("also", None)
        view = {"name": "evil", "tensor": base["name"], "dtype": "F32", "shape": [count], "stride": [1], "offset": 0}
        stop = values["layers"][-1]["stop"]
        values["layers"].append(
            {"name": "tied", "layer_type": "other", "stack": None, "index": None, "total_params": 0, "total_bytes": 0,
             "stored_bytes": 0, "start": stop, "stop": stop, "alias": "tied.weight", "tied_to": 0, "stored": False,
             "views": [view], "tensors": [claimed]}
        )  # fmt: skip

    files = _forged("torch", change)
    assert parse_manifest(files["partition_0.json"], "m")  # it is not refused for anything else
    write_files(tmp_path, files)
    for opened in (open_set(tmp_path, threads=1), open_partition(tmp_path / "partition_0.json", threads=1)):
        with opened, pytest.raises(IntegrityError, match="view does not lie in its tensor"):
            opened["evil"]


@pytest.mark.parametrize("shape", [(2**62, 2, 0), (1,) * 65], ids=["2**63 rows of nothing", "65 dimensions"])
def test_shapes_that_numpy_has_not_are_split_and_named_at_loading(shape: tuple[int, ...], tmp_path: Path) -> None:
    """They are sound to the format, and come back bit for bit."""
    data = b"" if 0 in shape else b"abcd"
    header = {"x": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    split(tmp_path / "m", tmp_path / "set", 1, threads=1)
    assert verify(tmp_path / "set", level="full", threads=1).ok
    with open_set(tmp_path / "set", threads=1) as opened, pytest.raises(RequestError, match="numpy has no array"):
        opened["x"]
    merge(tmp_path / "set", tmp_path / "back", threads=1)
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("name", [name for name in NAMES if len(name) > 255])
def test_names_that_are_too_long_are_errors_of_ours(name: str, tmp_path: Path) -> None:
    """Looking whether they are there already fails in another way than that they are not."""
    parts = taken_apart(sets()["plain"])
    values = json.loads(parts.set_manifest)
    values["files"][0]["name"] = name
    write_files(tmp_path / "set", sealed(parts._replace(set_manifest=json.dumps(values).encode())))
    assert not verify(tmp_path / "set", threads=1).ok
    with pytest.raises((IntegrityError, OutputError)):
        merge(tmp_path / "set", tmp_path / "out", threads=1)
    with pytest.raises(MmsplitError):
        pull(str(tmp_path / "set"), tmp_path / "pulled", threads=1)


def test_more_kept_bytes_than_a_shard_has_are_refused() -> None:
    """Half a gigabyte of zeros is a few kilobytes of JSON; it is not decoded for a shard of 300 bytes."""
    values = json.loads(sets()["plain"]["partition_set.json"])
    values["source"]["shards"][0]["kept"]["bytes"] = values["source"]["shards"][0]["bytes"] + 1
    parts = taken_apart(sets()["plain"])
    text = sealed(parts._replace(set_manifest=json.dumps(values).encode()))["partition_set.json"]
    with pytest.raises(FormatError, match="more bytes are kept of a shard than it has"):
        parse_set_manifest(text, "m")


def test_merging_holds_the_kept_bytes_of_one_shard_at_a_time(tmp_path: Path) -> None:
    """Headers of 8 MiB, as spaces, are next to nothing in the set manifest."""
    shards = [[Weight(f"model.layers.{number}.w", "U8", (8,))] for number in range(8)]
    split(write_checkpoint(tmp_path / "m", shards, index=True, pad=8 << 20), tmp_path / "set", 1, threads=1)
    tracemalloc.start()
    try:
        merge(tmp_path / "set", tmp_path / "out", threads=1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 8


@pytest.mark.parametrize("said", ["\ud800", "\x1b[2J", "\u202egnp.exe", "a\rb"])
def test_a_message_can_be_printed_and_tells_no_terminal_what_to_do(said: str) -> None:
    """The root digest that a set manifest states is repeated in the error, as many other words of strangers are."""
    values = {**json.loads(sets()["plain"]["partition_set.json"]), "root_digest": said}
    with pytest.raises(IntegrityError, match="root digest does not fit") as caught:
        parse_set_manifest(json.dumps(values).encode(), "m")
    assert str(caught.value).isprintable()
    assert repr(said)[1:-1] in str(caught.value)


def test_inspect_tells_no_terminal_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a model is a stranger's word, too."""
    parts = taken_apart(sets()["plain"])
    values = {**json.loads(parts.set_manifest), "model_id": "\x1b[2Jmodel"}
    write_files(tmp_path, sealed(parts._replace(set_manifest=json.dumps(values).encode())))
    assert run(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b[2Jmodel" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_link_to_itself_stops_nothing(name: str, tmp_path: Path) -> None:
    """Asking what it is fails, and a directory was left open then."""
    write_shard(tmp_path / "a.safetensors", [Weight("x", "U8", (3,))])
    (tmp_path / name).symlink_to(name)
    if name == "tokenizer.json":
        assert split(tmp_path, tmp_path / "set", 1, threads=1)
    else:
        with pytest.raises(MmsplitError, match="leads nowhere"):
            split(tmp_path, tmp_path / "set", 1, threads=1)


def test_numpy_is_what_the_shapes_above_are_too_much_for() -> None:
    """Else the test above would test nothing."""
    with pytest.raises(ValueError, match="dimension"):
        np.empty(1, np.uint8).reshape((1,) * 65)


@pytest.mark.parametrize("how", [{}, {"split_by": "type"}])
def test_a_model_without_tensors_is_named(tmp_path: Path, how: dict[str, Any]) -> None:
    """There is nothing to plan, and the message says where."""
    header = b"{}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PlanError, match="has no tensors") as caught:
        plan(tmp_path, 1, **how)
    assert str(tmp_path) in str(caught.value)


def test_a_set_of_an_unknown_way_to_treat_ties_is_refused_by_name() -> None:
    """Whoever cuts the set again plans with what it says."""
    values = json.loads(sets()["plain"]["partition_set.json"]) | {"tied": "duplicat"}
    with pytest.raises(FormatError, match="tied"):
        parse_set_manifest(with_root_digest(json.dumps(values).encode()), "somewhere")
