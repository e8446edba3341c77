"""Targets that are work in progress, or lies beside a set: states, journals, parity, histories, records of exports.

Whoever goes on from them writes into their directory alone, ends, and comes to what an undisturbed run comes to, or
refuses.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import xxhash
from checkpoints import llama_weights, write_checkpoint
from consuming import lost_bytes
from directories import Steps, _mutate_sealed, _refused, _require_promised, _require_sound, models, sets
from mutators import mutate_bytes, mutate_json
from readers import mutate_records
from sealing import Files, Parts, read_files, sealed, taken_apart, write_files
from target import Target, require

from mmsplit.errors import IntegrityError, MmsplitError, RequestError
from mmsplit.exporting.export_record import RECORD_NAME
from mmsplit.exporting.parameters_reader import load_partition_json
from mmsplit.sidecar.chunk_index import CHUNK_RECORD
from mmsplit.sidecar.output_directory import STATE_NAME, UNFINISHED_MERGE_NAME
from mmsplit.sidecar.parity_layout import PAGE_BYTES
from mmsplit.sidecar.scrub_run import Scrub
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.splitting.partition_run import PartitionRun
from mmsplit.verbs.export import export
from mmsplit.verbs.merge import merge
from mmsplit.verbs.parity import parity
from mmsplit.verbs.repair import repair
from mmsplit.verbs.repartition import repartition
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

#: What stands in a state for a shard's size, time, inode and device.
_TO_BE_FOUND = "@"


class _Stop(BaseException):
    """Ends a run half way; not an `Exception`, so that nobody recovers from it."""


def _raise_first(*errors: MmsplitError | None) -> None:
    for error in errors:
        if error is not None:
            raise error


def _below(folder: str, files: Files) -> Files:
    return {f"{folder}/{name}": data for name, data in files.items()}


def _in_folder(folder: str, files: Files) -> Files:
    return {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")}


# --- an unfinished split -----------------------------------------------------------------------------------------


def _stop_at(part_id: int) -> object:
    """A patch that lets a run die where a partition is written but has no name yet."""
    real = PartitionRun.finish

    def finish(self: PartitionRun) -> None:
        if self.partition.part_id == part_id:
            raise _Stop
        real(self)

    return mock.patch.object(PartitionRun, "finish", finish)


@functools.cache
def unfinished() -> dict[str, Files]:
    """Unfinished splits, of a model that stays, and of one whose first shard is deleted."""
    found = {}
    for consume in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = llama_weights(2, rows=8, columns=8)
            write_checkpoint(folder / "model", [weights[2:5], [*weights[:2], *weights[5:]]], index=True)
            with _stop_at(1):  # type: ignore[attr-defined]
                try:
                    split(folder / "model", folder / "set", 2, by="layers", threads=1, consume=consume, model_id="m")
                except _Stop:
                    pass
            files = read_files(folder)
            shards = [path.name for path in (folder / "model").glob("*.safetensors")]
            files[f"set/{STATE_NAME}"] = _with_identities(
                files[f"set/{STATE_NAME}"], dict.fromkeys(shards, _TO_BE_FOUND), always=True
            )
            found["consumed" if consume else "plain"] = files
    return found


def _with_identities(data: bytes, found: Mapping[str, object], *, always: bool = False) -> bytes:
    """A state that says of shards that they are the files that were `found`, where that was to be found, or always."""
    try:
        values = json.loads(data)
        fits = values.get("xxh3") == json.loads(_seal_state(data)).get("xxh3")
        for name, identity in values["fingerprints"].items():
            if name in found and (always or identity == _TO_BE_FOUND):
                values["fingerprints"][name] = found[name]
        data = json.dumps(values).encode()
        return _seal_state(data) if fits else data
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data


@functools.cache
def _model() -> Files:
    return _in_folder("model", unfinished()["plain"])


def _seal_state(data: bytes) -> bytes:
    """A state whose checksum fits what it says; the same bytes where it is none."""
    try:
        values = json.loads(data)
        values.pop("xxh3", None)
        values["xxh3"] = xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
        return json.dumps(values).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def _journal_slots(journal: bytes) -> Iterator[bytes]:
    """The records of each slot of a sound journal."""
    start = stop = 0
    while stop < len(journal):
        stop += CHUNK_RECORD.itemsize
        if journal[stop : stop + 8] == xxhash.xxh3_64_digest(journal[start:stop]):
            yield journal[start:stop]
            start = stop = stop + 8


def _mutate_journal(journal: bytes, random: Random) -> bytes:
    """Change records, each slot's checksum in order; or just bytes."""
    slots = list(_journal_slots(journal))
    if not slots or random.random() < 0.3:
        return mutate_bytes(journal, random)
    number = random.randrange(len(slots))
    slots[number] = mutate_records(slots[number], random)
    if random.random() < 0.2:
        slots.insert(random.randint(0, len(slots)), random.choice(slots))
    return b"".join(slot + xxhash.xxh3_64_digest(slot) for slot in slots)


def _mutate_unfinished(files: Files, other: Files, random: Random) -> Files:
    """Change what an unfinished split left: mostly its state, checksum in order, or its journal."""
    changed = dict(files)
    kind = random.random()
    state = f"set/{STATE_NAME}"
    if kind < 0.55 and state in files:
        changed[state] = mutate_json(files[state], random)
        if random.random() < 0.85:
            changed[state] = _seal_state(changed[state])
        return changed
    names = sorted(name for name in files if name.startswith("set/")) or sorted(files)
    journals = [name for name in names if name.endswith(".journal")]
    if kind < 0.75 and journals:
        changed[journals[0]] = _mutate_journal(files[journals[0]], random)
    elif kind < 0.8:
        del changed[random.choice(names)]
    elif kind < 0.85:
        changed[random.choice(names)] = files[random.choice(names)]
    else:
        name = random.choice(names)
        changed[name] = mutate_bytes(files[name], random)
    return changed


def _check_unfinished(files: Files, folder: Path) -> Steps:
    """Going on comes to the set of the model, or is refused; no byte of a shard that was there is lost by it."""
    out = folder / "out"
    there = {name: data for name, data in _in_folder("model", files).items() if name.endswith(".safetensors")}
    consume = len(there) < 2

    def check() -> None:
        going = _refused(
            lambda: split(
                out / "model", out / "set", 2, by="layers", threads=1, existing="resume", consume=consume, model_id="m"
            )
        )
        lost = lost_bytes(out, there)
        require(not lost, f"deleted what is nowhere else: {lost}")
        if going is None:
            unsound = _refused(lambda: _require_sound(out / "set", "full"))
            # Who made every checksum fit put his own bytes there (docs/security.md); for these no shard is deleted.
            require(unsound is None or not consume, f"deleted shards for what is no set: {unsound}")
            merging = _refused(lambda: merge(out / "set", out / "merged", threads=1))
            if merging is None:
                require(read_files(out / "merged") == _model(), "what was gone on with merges to something else")
            require(isinstance(merging, IntegrityError | None), f"what was gone on with does not merge: {merging}")
        # A request for more partitions than a lying state leaves layers is refused without a file to name.
        _raise_first(None if isinstance(going, RequestError) and going.path is None else going)

    def write() -> None:
        write_files(out, files)
        found = {}
        for name in there:
            status = (out / "model" / name).stat()
            found[name] = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev]
        state = out / "set" / STATE_NAME
        if state.exists() and found:
            state.write_bytes(_with_identities(state.read_bytes(), found))

    return write, check


# --- a set that a merge has begun to delete ----------------------------------------------------------------------


@functools.cache
def half_merged() -> dict[str, Files]:
    """A set of which a merge has deleted a payload, its output beside it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder / "set", sets()["plain"])
        from mmsplit.merging.set_consumer import SetConsumer

        with mock.patch.object(SetConsumer, "finish", side_effect=_Stop):
            try:
                merge(folder / "set", folder / "merged", threads=1, consume=True)
            except _Stop:
                pass
        return {"plain": read_files(folder)}


def _mutate_half_merged(files: Files, other: Files, random: Random) -> Files:
    changed = dict(files)
    mark = f"set/{UNFINISHED_MERGE_NAME}"
    name = mark if random.random() < 0.6 and mark in files else random.choice(sorted(files))
    kind = random.random()
    if kind < 0.1:
        del changed[name]
    elif name.endswith(".json") and kind < 0.7:
        changed[name] = mutate_json(files[name], random)
    else:
        changed[name] = mutate_bytes(files[name], random)
    return changed


def _check_half_merged(files: Files, folder: Path) -> Steps:
    """Nobody takes it for a set; the merge goes on to the model, or is refused and deletes no shard."""
    out = folder / "out"

    def check() -> None:
        seen = _refused(lambda: _require_sound(out / "set", "quick"))
        require(seen is not None, "half a set passes for whole")
        elsewhere = _refused(lambda: merge(out / "set", out / "elsewhere", threads=1, consume=True, resume=True))
        require(elsewhere is not None, "merged to where its shards are not")
        going = _refused(lambda: merge(out / "set", out / "merged", threads=1, consume=True, resume=True))
        if going is None:
            require(read_files(out / "merged") == models()["plain"], "merged to something else")
        _raise_first(going)

    return lambda: write_files(out, files), check


# --- parity ------------------------------------------------------------------------------------------------------


@functools.cache
def with_parity() -> dict[str, Files]:
    """Sets with parity."""
    found = {}
    for name in ("plain", "torch"):
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), sets()[name])
            parity(Path(folder), 30, threads=1)
            found[name] = read_files(Path(folder))
    return found


def _seal_parity(data: bytes) -> bytes:
    """A parity file whose headers and pages of the table have checksums that fit what they say."""
    pages = [data[start : start + PAGE_BYTES] for start in range(0, len(data), PAGE_BYTES)]
    sealed_pages = []
    for number, page in enumerate(pages):
        if len(page) == PAGE_BYTES and number in (0, len(pages) - 1):
            page = page[:72] + xxhash.xxh3_64_digest(page[:72])[::-1] + page[80:]
        elif len(page) == PAGE_BYTES and number in (1, len(pages) - 2):
            page = page[:-8] + xxhash.xxh3_64_intdigest(page[:-8], seed=0).to_bytes(8, "little")
        sealed_pages.append(page)
    return b"".join(sealed_pages)


def _mutate_parity(files: Files, other: Files, random: Random) -> Files:
    """Change the parity file, checksums in order or not, and perhaps a byte of the payload that it is of."""
    changed = dict(files)
    name = random.choice(sorted(name for name in files if name.endswith(".parity")))
    data = files[name]
    if random.random() < 0.5 and len(data) >= PAGE_BYTES:
        head = mutate_bytes(data[:72], random)[:72].ljust(72, b"\0")
        data = head + data[72:]
        if random.random() < 0.7:  # the copy agrees
            data = data[:-PAGE_BYTES] + head + data[-PAGE_BYTES + 72 :]
    else:
        data = mutate_bytes(data, random)
    changed[name] = _seal_parity(data) if random.random() < 0.8 else data
    if random.random() < 0.5:
        payload = name.replace(".parity", ".bin")
        at = random.randrange(len(files[payload]))
        changed[payload] = files[payload][:at] + bytes([files[payload][at] ^ 1]) + files[payload][at + 1 :]
    return changed


def _check_parity(files: Files, folder: Path) -> Steps:
    """What parity says changes no sound byte, and no byte to a wrong one; damage that is left is found."""
    root = folder / "out" / "set"
    whole = max(with_parity().values(), key=lambda each: len(set(each.items()) & set(files.items())))
    of_set = {name: data for name, data in whole.items() if not name.endswith(".parity")}

    def check() -> None:
        seen = _refused(lambda: _require_sound(root, "stored"))
        result = repair(root, threads=1)
        after = read_files(root)
        for name, data in of_set.items():
            for at, (before, now, right) in enumerate(zip(files[name], after[name], data, strict=True)):
                require(now in (before, right), f"byte {at} of {name} was made neither what it was nor what it is")
                require(before != right or now == right, f"byte {at} of {name} was sound")
        if result.ok:
            require({n: d for n, d in after.items() if n in of_set} == of_set, "repaired to something else")
            _require_sound(root, "full")
        _raise_first(seen)

    return lambda: write_files(root, files), check


# --- a forged set that is repartitioned --------------------------------------------------------------------------


def _check_repartition(parts: Parts, folder: Path) -> Steps:
    """What comes of a forged set is sound, and merges to what the set manifest promised, or is refused."""
    root, out = folder / "set", folder / "out"
    files = sealed(parts)

    def check() -> None:
        made = _refused(lambda: repartition(root, out / "again", 1, threads=1))
        if made is None:
            _require_sound(out / "again", "stored")
            merging = _refused(lambda: merge(out / "again", out / "model", threads=1))
            if merging is None:
                _require_promised(out / "model", files[SET_MANIFEST_NAME])
        _raise_first(made)

    return lambda: write_files(root, files), check


# --- files beside -------------------------------------------------------------------------------------------------


@functools.cache
def _parameters() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder, "set"), sets()["plain"])
        export(Path(folder, "set"), Path(folder, "out"), to="json", threads=1)
        return {path.name: path.read_bytes()[:4000] for path in sorted(Path(folder, "out").glob("parameters*"))} | {
            "small": b'{"part_id": 1, "layers": [{"name": "a", "layer_type": "norm", "shape": [2, 2], '
            b'"parameters": [1.0, 0.5, null, -3e-05]}], "total_params": 4}',
            "original": b'{"layers":[{"layer_type":"x","name":"l","parameters":[1,2],"shape":[2]}],'
            b'"total_params":2,"part_id":0}',
        }


def _check_parameters(data: bytes, folder: Path) -> Steps:
    """What is accepted is JSON that says the same to the standard library."""
    path = folder / "p.json"

    def check() -> None:
        found = load_partition_json(path)
        said = json.loads(data)
        require((found.part_id, found.total_params) == (said["part_id"], said["total_params"]), "other numbers")
        require(len(found.layers) == len(said["layers"]), "other layers")
        for layer, entry in zip(found.layers, said["layers"], strict=True):
            numbers = np.array([np.nan if n is None else n for n in entry["parameters"]], np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                same = np.array_equal(layer.parameters, numbers.astype(np.float32), equal_nan=True)
            require(same and list(layer.shape) == entry["shape"], "other parameters")

    return lambda: path.write_bytes(data) and None, check


@functools.cache
def _exports() -> dict[str, Files]:
    """An export that is complete, and one that is not, beside a file of the user's."""
    found = {}
    for name in ("complete", "begun"):
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder, "set"), sets()["plain"])
            export(Path(folder, "set"), Path(folder, "out"), threads=1, max_shard_bytes=900)
            files = read_files(Path(folder, "out"))
            if name == "begun":
                del files[sorted(n for n in files if n.endswith(".safetensors"))[0]]
            found[name] = {**files, "notes/mine.md": b"mine"}
    return found


def _mutate_export(files: Files, other: Files, random: Random) -> Files:
    changed = dict(files)
    name = RECORD_NAME if random.random() < 0.8 else random.choice(sorted(files))
    mutate: Callable[[bytes, Random], bytes] = mutate_json if name.endswith(".json") else mutate_bytes
    changed[name] = mutate(files.get(name, b""), random)
    return changed


def _check_export(files: Files, folder: Path) -> Steps:
    """Going on, or replacing, makes the export, or is refused; nobody's file is touched."""
    root, out = folder / "set", folder / "out"
    whole = {n: d for n, d in _exports()["complete"].items() if not n.startswith("notes/") and n != RECORD_NAME}

    def write() -> None:
        write_files(root, sets()["plain"])
        write_files(out, files)

    def check() -> None:
        errors = []
        for existing in ("resume", "force"):
            error = _refused(lambda: export(root, out, threads=1, max_shard_bytes=900, existing=existing))  # type: ignore[arg-type, misc]  # noqa: B023
            errors.append(error)
            if error is None:
                made = read_files(out)
                require({n: made.get(n) for n in whole} == whole, f"{existing}: exported something else")
        require((out / "notes" / "mine.md").read_bytes() == files["notes/mine.md"], "somebody's file was touched")
        _raise_first(*errors)

    return write, check


@functools.cache
def _histories() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder, "set"), sets()["plain"])
        for subset in ("1/2", "2/2", None):
            verify(Path(folder, "set"), threads=1, scrub=Scrub(subset=subset, history=Path(folder, "h")))
        return {"three": Path(folder, "h").read_bytes()}


def _mutate_history(data: bytes, other: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    lines[number] = mutate_json(lines[number], random) if random.random() < 0.8 else mutate_bytes(lines[number], random)
    return b"\n".join(lines)


def _check_history(data: bytes, folder: Path) -> Steps:
    """A history decides which chunks are looked at; damage of the rest of the set is found whatever it says."""
    root, history = folder / "set", folder / "out" / "history"

    def write() -> None:
        files = sets()["plain"]
        write_files(root, {**files, "config.json": files["config.json"] + b" "})
        history.write_bytes(data)

    def check() -> None:
        from datetime import timedelta

        result = verify(root, threads=1, scrub=Scrub(since=timedelta(days=30), history=history))
        require([Path(fault.file).name for fault in result.problems] == ["config.json"], f"found {result.problems}")
        require(history.read_bytes().startswith(data), "the past was changed")
        require(history.read_bytes().count(b"\n") > data.count(b"\n"), "nothing was noted")

    return write, check


def _mutate_parameters(data: bytes, other: bytes, random: Random) -> bytes:
    return mutate_json(data, random, (1e39, 3.4e38, -0.0, 1e-46, [1, 2]))


IN_PROGRESS = (
    Target("unfinished_split", unfinished, _mutate_unfinished, _check_unfinished, needs_folder=True),
    Target("unfinished_merge", half_merged, _mutate_half_merged, _check_half_merged, needs_folder=True),
    Target("parity", with_parity, _mutate_parity, _check_parity, needs_folder=True),
    Target(
        "repartition",
        lambda: {n: taken_apart(f) for n, f in sets().items()},
        _mutate_sealed,
        _check_repartition,
        needs_folder=True,
    ),
    Target("parameters_json", _parameters, _mutate_parameters, _check_parameters, needs_folder=True),
    Target("export_record", _exports, _mutate_export, _check_export, needs_folder=True),
    Target("history", _histories, _mutate_history, _check_history, needs_folder=True),
)
