"""Neighbours: other runs, readers, directories inside each other, links, names; docs/reliability.md says the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint
from machine import mounted, skipped_where_not_here

from mmsplit.checkpoint.weights_index import folded_name
from mmsplit.cli import run
from mmsplit.errors import CheckpointError, FormatError, OutputError, OutputExistsError, OutputLockedError
from mmsplit.sidecar.output_directory import LOCK_NAME, STATE_NAME, OutputDirectory
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX
from mmsplit.verbs.load import open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.pull import pull
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

FILES = {"config.json": CAUSAL_CONFIG, "one/tokens.txt": b"abc"}
SHARD = "model.safetensors"
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links are for administrators there")
needs_bytes = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are bytes on Linux only")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small checkpoint with small files."""
    return write_checkpoint(tmp_path / "model", [llama_weights(3)], files=FILES)


@pytest.fixture
def made(model: Path, tmp_path: Path) -> Path:
    """Its set."""
    split(model, tmp_path / "made", 2)
    return tmp_path / "made"


# --- Other runs and readers -------------------------------------------------------------------------------------


def test_whoever_writes_to_an_output_writes_alone(model: Path, made: Path, tmp_path: Path) -> None:
    """Split, merge and pull are refused where another run of any of them writes; reading is not."""
    out = tmp_path / "out"
    with OutputDirectory(out):
        before = tree(out)
        for run_there in (
            lambda: split(model, out, 2),
            lambda: split(model, out, 2, existing="force"),
            lambda: merge(made, out),
            lambda: pull(made, out, force=True),
        ):
            with pytest.raises(OutputLockedError, match="another run is writing"):
                run_there()
        assert tree(out) == before
    with OutputDirectory(made):
        assert verify(made, level="full").ok


def test_two_runs_may_read_one_source(model: Path, tmp_path: Path) -> None:
    """Each holds its own lease; neither holds up the other."""
    seen = []

    def split_again(_: object) -> None:
        if not seen:
            seen.append(split(model, tmp_path / "b", 2))

    split(model, tmp_path / "a", 2, progress=split_again)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_reader_meets_no_set_while_one_is_made(model: Path, tmp_path: Path) -> None:
    """From the first byte to the last, whoever reads is told that it is not finished."""
    out, told = tmp_path / "out", []

    def read(_: object) -> None:
        for reader in (verify, open_set, lambda path: merge(path, tmp_path / "early")):
            with pytest.raises(FormatError, match="not finished"):
                reader(out)
            told.append(True)

    split(model, out, 2, progress=read)
    assert told
    assert verify(out, level="full").ok
    assert not (tmp_path / "early").exists()


def test_a_reader_keeps_its_set_while_it_is_replaced(model: Path, tmp_path: Path) -> None:
    """Files are replaced, never written over: what is open stays what it was."""
    out = tmp_path / "out"
    split(model, out, 2, codec="raw")
    with open_set(out) as before:
        name = "model.layers.1.mlp.up_proj.weight"
        view, other = before[name], "model.layers.0.mlp.up_proj.weight"
        expected = view.tobytes()
        changed = write_checkpoint(tmp_path / "changed", [llama_weights(3)], seed=5)
        split(changed, out, 2, codec="raw", existing="force")
        assert view.tobytes() == expected
        assert len(before[other].tobytes()) == len(expected)
    with open_set(out) as after:
        assert after[name].tobytes() != expected


# --- Directories inside each other ------------------------------------------------------------------------------


def test_output_inside_the_source(model: Path, tmp_path: Path) -> None:
    """The set is the one made elsewhere; it is no part of the model, whatever is run again."""
    split(model, tmp_path / "elsewhere", 2)
    expected = tree(tmp_path / "elsewhere")
    split(model, model / "parts", 2)
    assert split(model, model / "parts", 2, existing="resume").already_finished
    split(model, model / "parts", 2, existing="force")
    assert tree(model / "parts") == expected
    for part_id in range(2):  # single partitions have no set manifest yet
        split(model, model / "deeper" / "single", 2, only=[part_id])
    assert tree(model / "deeper" / "single") == expected


def test_source_inside_the_output(tmp_path: Path) -> None:
    """What mmsplit did not write is left alone, the source above all."""
    out = tmp_path / "out"
    source = write_checkpoint(out / "model", [llama_weights(3)], files=FILES)
    before = tree(source)
    split(source, out, 2)
    split(source, out, 3, existing="force")
    assert verify(out, against=source).ok
    merge(out, out / "merged")
    assert tree(source) == before == tree(out / "merged")


@pytest.mark.parametrize("spelling", ["itself", "link", "dots"])
def test_output_that_is_the_source(model: Path, made: Path, tmp_path: Path, spelling: str) -> None:
    """Refused under any of its names, before anything is written."""

    def name(path: Path) -> Path:
        if spelling == "link":
            (tmp_path / f"link-{path.name}").symlink_to(path)
            return tmp_path / f"link-{path.name}"
        return path if spelling == "itself" else path / ".." / path.name

    before = tree(tmp_path)
    assert run(["split", str(model), "-o", str(name(model)), "-n", "2", "--force"]) == 2
    assert run(["merge", str(made), "-o", str(name(made))]) == 2
    assert run(["pull", str(made), "-o", str(made)]) == 2
    assert {path: data for path, data in tree(tmp_path).items() if not path.startswith("link-")} == before


# --- Links ------------------------------------------------------------------------------------------------------

_LINKS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic": lambda victim, name: name.symlink_to(victim),
    "hard": lambda victim, name: os.link(victim, name),
}
_UNFINISHED = (f"{STATE_NAME}.partial", "config.json.partial", f"{SHARD}.partial", LOCK_NAME)


@needs_links
@pytest.mark.parametrize("kind", _LINKS)
@pytest.mark.parametrize("name", _UNFINISHED)
def test_nothing_is_written_through_a_link(model: Path, made: Path, tmp_path: Path, kind: str, name: str) -> None:
    """A link in the place of work in progress: its other name keeps its content, whether the run is refused or not."""
    victim = tmp_path / "victim"
    for number, act in enumerate((lambda out: split(model, out, 2), lambda out: merge(made, out))):
        victim.write_bytes(b"precious")
        out = tmp_path / str(number)
        out.mkdir()
        _LINKS[kind](victim, out / name)
        try:
            act(out)
        except OutputError:
            (out / name).unlink()
            act(out)
        assert victim.read_bytes() == b"precious"


@needs_links
@pytest.mark.parametrize("kind", _LINKS)
@pytest.mark.parametrize(
    ("verb", "name"),
    [("split", "partition_0.bin.partial"), ("split", "partition_0.bin.journal"), ("pull", "partition_0.bin.partial"),
     ("pull", "partition_0.json.partial")],
)  # fmt: skip
def test_an_unfinished_partition_that_is_a_link_is_not_continued(
    model: Path, made: Path, tmp_path: Path, kind: str, verb: str, name: str
) -> None:
    """An interrupted run, and then somebody links its work in progress to other files."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    def act(progress: Callable[[object], None] | None = None) -> object:
        if verb == "split":
            return split(model, out, 2, existing="resume", threads=1, progress=progress)
        return pull(made, out, progress=progress)

    out, victim = tmp_path / "out", tmp_path / "victim"
    with pytest.raises(KeyboardInterrupt):
        act(stop)
    victim.write_bytes(b"precious")
    (out / name).unlink(missing_ok=True)
    _LINKS[kind](victim, out / name)
    try:
        act()
    except OutputError as error:
        assert name in str(error)  # noqa: PT017
        (out / name).unlink()
        act()
    assert victim.read_bytes() == b"precious"
    assert tree(out) == tree(made)


@needs_links
def test_a_folder_of_the_output_that_is_a_link_is_refused(model: Path, made: Path, tmp_path: Path) -> None:
    """Small files in folders would be written to wherever it leads."""
    for number, act in enumerate(
        (lambda out: split(model, out, 2), lambda out: merge(made, out), lambda out: pull(made, out))
    ):
        out, elsewhere = tmp_path / str(number), tmp_path / f"elsewhere-{number}"
        out.mkdir()
        elsewhere.mkdir()
        (out / "one").symlink_to(elsewhere)
        with pytest.raises(OutputExistsError, match="folder in the output is a link"):
            act(out)
        assert list(elsewhere.iterdir()) == []


@needs_links
def test_other_names_of_a_finished_set_keep_it(model: Path, made: Path, tmp_path: Path) -> None:
    """A copy by hard links (`cp -al`) is a copy: replacing the set does not reach it."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, copy_function=os.link)
    before = tree(copy)
    split(model, made, 3, codec="raw", existing="force")
    assert tree(copy) == before
    pull(copy, made, force=True)
    assert tree(copy) == before == tree(made)


# --- Names ------------------------------------------------------------------------------------------------------

SAME_FOR_SOME = [
    ("a.json", "A.json"),
    ("caf\u00e9", "cafe\u0301"),
    ("x/y", "X/y"),
    ("notes", "Notes/x"),
    ("STRASSE", "stra\u00dfe"),
]


@needs_bytes
@pytest.mark.parametrize(("one", "other"), SAME_FOR_SOME)
def test_small_files_that_a_file_system_takes_for_one(tmp_path: Path, one: str, other: str) -> None:
    """The first in order is carried along, a note names the other, and the names of the set are different for all."""
    source = write_checkpoint(tmp_path / "m", [llama_weights(1)], files={one: b"1", other: b"2"})
    result = split(source, tmp_path / "set", 2)
    assert sum("differs from" in note and "is not carried along" in note for note in result.plan.notes) == 1
    names = list(tree(tmp_path / "set"))
    folders = {folded_name(str(folder)) for name in names for folder in Path(name).parents}
    assert len({folded_name(name) for name in names} - folders) == len(names)
    merge(tmp_path / "set", tmp_path / "merged")
    assert len({one, other} & set(tree(tmp_path / "merged"))) == 1


@needs_bytes
def test_a_small_file_that_would_be_taken_for_one_of_ours(tmp_path: Path) -> None:
    """Partition_0.json is none of ours here, and would be on another system."""
    source = write_checkpoint(tmp_path / "m", [llama_weights(1)], files={"Partition_0.json": b"{}"})
    result = split(source, tmp_path / "set", 2)
    assert any("Partition_0.json is not carried along" in note for note in result.plan.notes)


@needs_bytes
def test_shards_that_a_file_system_takes_for_one_are_refused(tmp_path: Path) -> None:
    """Merged on such a system one would be lost; which of them is needed only a person can say."""
    source = write_checkpoint(tmp_path / "m", [llama_weights(1)[:2], llama_weights(1)[2:]])
    for path, name in zip(
        sorted(source.glob("*.safetensors")), ("Weights.safetensors", "weights.safetensors"), strict=True
    ):
        path.rename(source / name)
    with pytest.raises(CheckpointError, match="differ only by letter case or Unicode form") as caught:
        split(source, tmp_path / "set", 2)
    assert "Weights.safetensors" in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_on_a_file_system_that_folds_case(tmp_path: Path) -> None:
    """What split makes arrives whole where case does not count."""
    files = {**FILES, "README.md": b"1", "readme.md": b"2"}
    source = write_checkpoint(tmp_path / "m", [llama_weights(2)], files=files)
    with skipped_where_not_here(), mounted(tmp_path / "folding", "casefold,size=64m") as place:
        (place / "x").mkdir()
        if subprocess.run(["chattr", "+F", str(place / "x")], capture_output=True, check=False).returncode:
            pytest.skip("tmpfs does not fold case here")
        split(source, place / "x" / "set", 2)
        merge(place / "x" / "set", place / "x" / "merged")
        assert verify(place / "x" / "set", against=source).ok


@needs_bytes
@pytest.mark.parametrize("length", [246, 247, 248, 255])
def test_very_long_names(tmp_path: Path, length: int) -> None:
    """As long as the file system allows, although work in progress has a longer name."""
    shard, small = "s" * (length - 12) + ".safetensors", "t" * length
    source = write_checkpoint(tmp_path / "m", [llama_weights(2)], files={small: b"abc"})
    (source / SHARD).rename(source / (shard := shard[-length:]))
    split(source, tmp_path / "set", 2)
    merge(tmp_path / "set", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(source)
    pull(tmp_path / "set", tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(tmp_path / "set")
    assert not [name for name in tree(tmp_path) if name.endswith(PARTIAL_SUFFIX)]


@needs_bytes
def test_a_path_that_is_too_long_is_an_error_of_ours(model: Path, made: Path, tmp_path: Path) -> None:
    """Not a bare OSError."""
    out = tmp_path / "/".join(["d" * 200] * 25)
    for act in (lambda: split(model, out, 2), lambda: merge(made, out), lambda: pull(made, out)):
        with pytest.raises(OutputError, match="too long"):
            act()


@needs_bytes
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """Directories may have them; a small file is left behind with a note, a shard is refused."""

    def odd(name: bytes) -> Path:
        return Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))

    source = write_checkpoint(odd(b"model\xff"), [llama_weights(2)], files=FILES)
    (source / os.fsdecode(b"notes\xfe")).write_bytes(b"x")
    result = split(source, odd(b"set\xff"), 2)
    assert any("notes" in note and "is not carried along" in note for note in result.plan.notes)
    assert verify(odd(b"set\xff"), against=source).ok
    assert run(["merge", str(odd(b"set\xff")), "-o", str(odd(b"merged\xff")), "-q"]) == 0
    assert tree(odd(b"merged\xff")) == {name: data for name, data in tree(source).items() if "notes" not in name}
    (source / SHARD).rename(source / os.fsdecode(b"m\xff.safetensors"))
    with pytest.raises(CheckpointError, match="not plain printable text"):
        split(source, tmp_path / "other", 2)
