"""What can be interrupted: each command in each situation, in one table.

A scenario is given a place (`given` makes the input, and perhaps an output that is there already), does something to it
(`act`), can be told to go on (`again`), and to go on whatever is there (`insist`).  To put a new command under all the
faults of the campaign, add a line to `SCENARIOS`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import consuming
from checkpoints import CAUSAL_CONFIG, Weight, flip, llama_weights, tree, write_checkpoint
from fault_layer import Crash, Fault, Layer

from mmsplit.errors import MmsplitError, OutputError
from mmsplit.exporting.export_record import RECORD_NAME
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar import shard_writer
from mmsplit.sidecar.output_directory import STATE_NAME
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.verbs.download import download
from mmsplit.verbs.export import export
from mmsplit.verbs.merge import merge
from mmsplit.verbs.parity import parity
from mmsplit.verbs.pull import pull
from mmsplit.verbs.repair import repair
from mmsplit.verbs.repartition import repartition
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

#: Work in progress that may lie beside a finished result: a loss of power can bring it back, and no reader looks at it.
_DEBRIS = re.compile(r"\.(partial|journal|lock|incomplete|tmp|link)$|(^|/)\.cache/")
#: Where the Hub's cache keeps what its snapshots link to; where there are no links, the content is in the snapshot.
_BLOBS = re.compile(r"(^|/)blobs/")
_TESTS = Path(__file__).resolve().parents[1]


class Work(NamedTuple):
    """Where one run works: `source` is only read, `out` is where the result goes."""

    source: Path
    out: Path
    direct: bool = True


Act = Callable[[Work], object]


class Scenario(NamedTuple):
    """See the module; `judge` names what stands under a final name and is not what it should be."""

    name: str
    given: Act
    act: Act
    again: Act
    insist: Act | None
    judge: Callable[[Path, Mapping[str, bytes]], list[str]]
    writes_direct: bool = True


def result_of(out: Path) -> dict[str, bytes]:
    """Every file of an output that is no work in progress."""
    found = tree(out) if out.exists() else {}
    return {name: data for name, data in found.items() if not _DEBRIS.search(name) and not _BLOBS.search(name)}


def fingerprint(source: Path) -> dict[str, tuple[str, int]]:
    """What would tell that an input was changed: digest and time of every file."""
    return {
        path.relative_to(source).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(source.rglob("*"))
        if path.is_file()
    }


def _make_model(folder: Path, *, blocks: int = 2, seed: int = 0) -> Path:
    """A model of two shards, an index and small files, one of them deep inside; a tied head; one tensor of 20 KiB."""
    weights = [*llama_weights(blocks), Weight("model.layers.0.mlp.down_proj.weight", "BF16", (160, 64), 200)]
    files = {"config.json": CAUSAL_CONFIG, "one/two/tokens.txt": b"abc", "empty.txt": b""}
    return write_checkpoint(folder, [weights[:4], weights[4:]], index=True, files=files, seed=seed)


def _given_model(work: Work) -> None:
    _make_model(work.source)


def _given_set(work: Work) -> None:
    model = _make_model(work.source.with_name("model"))
    split(model, work.source, 2, threads=1)
    shutil.rmtree(model)


def _given_other_output(work: Work) -> None:
    """The output holds another model's set, of another number of partitions."""
    _make_model(work.source)
    other = _make_model(work.source.with_name("other"), blocks=3, seed=9)
    split(other, work.out, 3, threads=1)
    shutil.rmtree(other)


def _given_unfinished(work: Work) -> None:
    """A split died half way: one partition is complete, the other begun."""
    _make_model(work.source)
    with Layer(work.out.parent, keep=True) as counted:
        split(work.source, work.out, 2, threads=1)
    shutil.rmtree(work.out)
    try:
        with Layer(work.out.parent, Fault(counted.calls * 2 // 3, "torn")):
            split(work.source, work.out, 2, threads=1)
    except Crash:
        pass


def _given_output(work: Work) -> None:
    """The output holds the set."""
    _make_model(work.source)
    split(work.source, work.out, 2, threads=1)


def _parity(work: Work) -> object:
    return parity(work.out, 10, threads=1)


def _given_damaged(work: Work) -> None:
    """The output holds the published set, with a flipped bit in each payload."""
    _given_set(work)
    shutil.copytree(work.source, work.out)
    for part_id in range(2):
        flip(work.out / f"partition_{part_id}.bin", 4100)


def _given_damage_for(work: Work, *, published: bool, parity_percent: float | None = None) -> None:
    """The output holds a damaged set: chunks, a manifest, an index, a small file.  The source is the model, or a copy
    of the set as it was published.
    """
    if published:
        _given_set(work)
        shutil.copytree(work.source, work.out)
    else:
        _given_output(work)
    if parity_percent is not None:
        parity(work.out, parity_percent, threads=1)
        flip(work.out / "partition_1.parity", 5000)
    for part_id in range(2):
        flip(work.out / f"partition_{part_id}.bin", 4100)
    flip(work.out / "partition_0.json", 300)
    payload = work.out / "partition_1.bin"
    flip(payload, payload.stat().st_size - 40)
    if parity_percent is None:
        (work.out / "config.json").unlink()


def _given_lost_manifests(work: Work) -> None:
    """The output holds a set that has lost the JSON of its partitions."""
    _given_output(work)
    for part_id in range(2):
        (work.out / f"partition_{part_id}.json").unlink()


def _given_lost_payload(work: Work) -> None:
    """The output holds a set of which a payload is gone."""
    _given_output(work)
    (work.out / "partition_0.bin").unlink()


def _repair(*, from_source: bool = True, rebuild_manifest: bool = False) -> Act:
    def act(work: Work) -> object:
        source = work.source if from_source else None
        result = repair(work.out, source, rebuild_manifest=rebuild_manifest, threads=1)
        if not result.ok:  # which the command says by its exit code
            raise OutputError(f"not all is repaired: {result.problems[0].what}", path=work.out)
        return result

    return act


def _export(to: str, existing: str) -> Act:
    def act(work: Work) -> object:
        with mock.patch.object(shard_writer, "PayloadFile", partial(PayloadFile, direct=work.direct)):
            return export(work.source, work.out, to=to, existing=existing, max_shard_bytes=20_000, threads=1)  # type: ignore[arg-type]

    return act


def _judge_set(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """A directory that passes `verify` holds exactly what a whole run makes."""
    try:
        if not verify(out, level="full", threads=1).ok:
            return []
    except MmsplitError:
        return []
    # Killed between the set manifest and the end of its state, a run leaves both: the set is a set.
    return [problem for problem in compare(out, expected) if STATE_NAME not in problem]


def _judge_partition(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """The same for a single partition."""
    problems = []
    for manifest in sorted(out.glob("partition_?.json")):
        try:
            if not verify(manifest, level="full", threads=1).ok:
                continue
        except MmsplitError:
            continue
        names = (manifest.name, manifest.with_suffix(".bin").name)
        problems += [f"{name} is not as it should be" for name in names if (out / name).read_bytes() != expected[name]]
    return problems


def _judge_files(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """A file that has its final name has its content, whatever else is missing."""
    found = result_of(out)
    return [f"{name} has its name, but not its content" for name, data in found.items() if expected.get(name) != data]


def _judge_export(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """The same; the record of an export says itself whether the export is complete."""
    record = out / RECORD_NAME
    unfinished = record.exists() and b'"complete": true' not in record.read_bytes()
    return [problem for problem in _judge_files(out, expected) if not (unfinished and RECORD_NAME in problem)]


def _judge_cache(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """The same, and every blob that has a hash for its name is one of the contents."""
    blobs = {name: data for name, data in tree(out).items() if _BLOBS.search(name) and not _DEBRIS.search(name)}
    wrong = [f"{name} is no content" for name, data in blobs.items() if data not in expected.values()]
    return _judge_files(out, expected) + wrong


def compare(out: Path, expected: Mapping[str, bytes]) -> list[str]:
    """Say in what the files of an output differ from those of an undisturbed run."""
    found = result_of(out)
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return [f"{name} {'differs' if name in found else 'is missing'}" for name in names]


def _split(existing: str, num_parts: int = 2, only: tuple[int, ...] | None = None) -> Act:
    return lambda work: split(
        work.source,
        work.out,
        num_parts,
        only=only,
        threads=1,
        existing=existing,
        direct=work.direct,  # type: ignore[arg-type]
    )


def _repartition(existing: str) -> Act:
    return lambda work: repartition(
        work.source,
        work.out,
        3,
        threads=1,
        existing=existing,
        direct=work.direct,  # type: ignore[arg-type]
    )


def _merge(*, resume: bool) -> Act:
    def act(work: Work) -> object:
        # It cannot be told how to write, and finds out what the file system takes.
        with mock.patch.object(shard_writer, "PayloadFile", partial(PayloadFile, direct=work.direct)):
            return merge(work.source, work.out, resume=resume, threads=1)

    return act


def _pull(*, force: bool) -> Act:
    return lambda work: pull(
        work.source, work.out, force=force, threads=1, direct=work.direct, hub=HubOptions(connections=1)
    )


def _download(*, into_cache: bool) -> Act:
    def act(work: Work) -> object:
        import huggingface_hub

        place = {"cache_dir" if into_cache else "local_dir": work.out}
        endpoint = (work.source / "endpoint").read_text()
        huggingface_hub.close_session()  # a child must not talk through its parent's connection
        return download("org/model", token=False, endpoint=endpoint, connections=1, **place)  # type: ignore[arg-type]

    return act


def _given_model_to_consume(work: Work) -> None:
    """A model of four shards whose output is its neighbour, and another copy, to compare with.

    With three partitions, shards go after the first and the second, too; the head's copy of the embedding is in the
    last, and does not keep the first shard.
    """
    first, norm, *blocks = llama_weights(4)
    big = Weight("model.layers.2.mlp.down_proj.weight", "BF16", (160, 64), 200)
    shards = [[first, *blocks[:3]], blocks[3:6], [*blocks[6:9], big], [*blocks[9:], norm]]
    for name in (consuming.MODEL, consuming.ORIGINAL):
        write_checkpoint(work.out / name, shards, index=True, files={"config.json": CAUSAL_CONFIG})


def _given_set_to_consume(work: Work) -> None:
    _given_model_to_consume(work)
    split(work.out / consuming.MODEL, work.out / consuming.SET, 3, threads=1, parity=10)
    shutil.rmtree(work.out / consuming.MODEL)


def _consume_split(existing: str) -> Act:
    return lambda work: consuming.consume_split(work.out, existing, direct=work.direct)


def _consume_merge(*, resume: bool) -> Act:
    return lambda work: consuming.consume_merge(work.out, resume=resume)


SCENARIOS = (
    Scenario("split", _given_model, _split("refuse"), _split("resume"), _split("force"), _judge_set),
    Scenario("split --resume", _given_unfinished, _split("resume"), _split("resume"), _split("force"), _judge_set),
    Scenario("split --force over a set", _given_other_output, _split("force"), _split("force"), None, lambda *_: []),
    Scenario(
        "split --only", _given_model, _split("refuse", 3, (1,)), _split("resume", 3, (1,)),
        _split("force", 3, (1,)), _judge_partition,
    ),
    Scenario(
        "repartition", _given_set, _repartition("refuse"), _repartition("resume"), _repartition("force"), _judge_set
    ),
    Scenario("merge", _given_set, _merge(resume=False), _merge(resume=True), None, _judge_files),
    Scenario(
        "split --consume", _given_model_to_consume, _consume_split("refuse"), _consume_split("resume"),
        _consume_split("force"), consuming.judge,
    ),
    Scenario(
        "merge --consume", _given_set_to_consume, _consume_merge(resume=False), _consume_merge(resume=True), None,
        consuming.judge,
    ),
    Scenario("pull", _given_set, _pull(force=False), _pull(force=False), _pull(force=True), _judge_set),
    Scenario("pull --force over damage", _given_damaged, _pull(force=True), _pull(force=True), None, _judge_set),
    Scenario("parity", _given_output, _parity, _parity, None, _judge_files, writes_direct=False),
    Scenario(
        "repair", partial(_given_damage_for, published=False), _repair(), _repair(), None, _judge_set,
        writes_direct=False,
    ),
    Scenario(
        "repair from a copy", partial(_given_damage_for, published=True), _repair(), _repair(), None, _judge_set,
        writes_direct=False,
    ),
    Scenario(
        "repair by parity", partial(_given_damage_for, published=False, parity_percent=10), _repair(from_source=False),
        _repair(from_source=False), None, _judge_set, writes_direct=False,
    ),
    Scenario(
        "repair of a lost payload", _given_lost_payload, _repair(), _repair(), None, _judge_set, writes_direct=False
    ),
    Scenario(
        "repair --rebuild-manifest", _given_lost_manifests, _repair(from_source=False, rebuild_manifest=True),
        _repair(from_source=False, rebuild_manifest=True), None, _judge_set, writes_direct=False,
    ),
    Scenario(
        "export", _given_set, _export("safetensors", "refuse"), _export("safetensors", "resume"),
        _export("safetensors", "force"), _judge_export,
    ),
    Scenario(
        "export --to json", _given_set, _export("json", "refuse"), _export("json", "resume"), _export("json", "force"),
        _judge_export, writes_direct=False,
    ),
    Scenario(
        "download to the cache", lambda _: None, _download(into_cache=True), _download(into_cache=True), None,
        _judge_cache, writes_direct=False,
    ),
    Scenario(
        "download to a folder", lambda _: None, _download(into_cache=False), _download(into_cache=False), None,
        _judge_files, writes_direct=False,
    ),
)  # fmt: skip
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

_HUB = """
import sys
from pathlib import Path
from loopback_hub import LoopbackHub
with LoopbackHub(Path(sys.argv[1])) as hub:
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""


@contextmanager
def local_hub(root: Path) -> Iterator[Path]:
    """Run a Hub with a model in a process of its own; yields a directory with its address, a scenario's source."""
    _make_model(root / "hub" / "org" / "model")
    paths = os.pathsep.join(str(path) for path in (_TESTS / "remote", _TESTS, _TESTS.parent))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", _HUB, str(root / "hub")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            (root / "address").mkdir()
            (root / "address" / "endpoint").write_text(server.stdout.readline().strip())
            yield root / "address"
        finally:
            server.stdin.close()
