"""Targets that are directories: a set is verified, loaded and merged, a model split, a set with tricky names pulled."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from form_mutators import mutate_gguf, mutate_safetensors, mutate_torch
from mutators import NAMES, joined, mutate_bytes, mutate_json
from readers import mutate_records
from sealing import (
    Files,
    Partition,
    Parts,
    read_files,
    sealed,
    split_model,
    taken_apart,
    with_chunk_checksums,
    with_index_checksums,
    with_numbers_of,
    with_root_digest,
    write_files,
)
from target import CORPUS, Target, require

from mmsplit.checkpoint.weights_index import is_plain_name
from mmsplit.errors import IntegrityError, MmsplitError
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, parse_set_manifest
from mmsplit.verbs.inspect import inspect
from mmsplit.verbs.load import open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.pull import pull
from mmsplit.verbs.repair import repair
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

#: What the writing of a case and the use of it are.
Steps = tuple[Callable[[], None], Callable[[], object]]


@functools.cache
def models() -> dict[str, Files]:
    """The models of the corpus."""
    return {path.name: read_files(path) for path in sorted((CORPUS / "set").iterdir()) if path.is_dir()}


@functools.cache
def sets() -> dict[str, Files]:
    """Their sets."""
    return {name: split_model(CORPUS / "set" / name, 2 if name == "plain" else 1) for name in models()}


@functools.cache
def _tensors(name: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What loads from the sound set."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), sets()[name])
        return _load(Path(folder))


def _load(root: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and contents of every tensor; of a view that repeats a few elements for ever, only the first."""
    with open_set(root, threads=1) as opened:
        found = {}
        for name in opened:
            array = opened[name]
            contents = array if array.nbytes < 1 << 20 else array.flat[0]
            found[name] = str(array.dtype), array.shape, np.ascontiguousarray(contents).tobytes()
        return found


def _refused(act: Callable[[], object]) -> MmsplitError | None:
    try:
        act()
    except MmsplitError as error:
        return error
    return None


def _require_sound(root: Path, level: Any) -> None:
    found = verify(root, level=level, threads=1)
    if not found.ok:
        raise IntegrityError(found.problems[0].what, path=found.problems[0].file)


# --- a set whose bytes are not those that were written ----------------------------------------------------------


def _mutate_file(files: Files, other: Files, random: Random) -> Files:
    """Change one file by chance: its bytes, its length, its presence, its name."""
    changed = dict(files)
    name = random.choice(sorted(files))
    kind = random.random()
    if kind < 0.05:
        del changed[name]
    elif kind < 0.1:
        changed[name] = files[random.choice(sorted(files))]
    elif kind < 0.15:
        changed[name] = joined(files[name], other.get(name, b""), random)
    elif name.endswith(".json") and kind < 0.6:
        changed[name] = mutate_json(files[name], random)
    else:
        changed[name] = mutate_bytes(files[name], random)
    return changed


def _check_damaged(files: Files, folder: Path) -> Steps:
    """Damage is found, by whoever looks; what is given out all the same is what was split."""
    root, out = folder / "set", folder / "out"
    # Which sound set it comes from: the one with which it has most files in common.
    name = max(sets(), key=lambda each: len(set(sets()[each].items()) & set(files.items())))
    whole = sets()[name]

    def check() -> None:
        if files == whole:
            _require_sound(root, "full")
            require(_load(root) == _tensors(name), "the sound set loads as something else")
            merge(root, out / "model", threads=1)
            require(read_files(out / "model") == models()[name], "the sound set merges to something else")
            return
        refusals = [_refused(lambda level=level: _require_sound(root, level)) for level in ("stored", "full")]  # type: ignore[misc]
        _refused(lambda: inspect(root).as_json())
        _refused(lambda: repair(root, dry_run=True, threads=1))
        try:
            # A partition that is not there is missed when a tensor of it is asked for: the others load.
            require(_load(root).items() <= _tensors(name).items(), "a damaged set loads as something else")
        except MmsplitError:
            pass
        if _refused(lambda: merge(root, out / "model", threads=1)) is None:
            require(read_files(out / "model") == models()[name], "a damaged set merges to something else")
        for refusal in refusals:
            require(refusal is not None or set(whole) < set(files), "damage that verify does not see")
            if refusal is not None:
                raise refusal

    return lambda: write_files(root, files), check


# --- a set that lies, every checksum in order --------------------------------------------------------------------


def _mutate_sealed(parts: Parts, other: Parts, random: Random) -> Parts:
    """Change what a part says, and make good the checksums above it."""
    number = random.randrange(len(parts.partitions))
    data, index, manifest = parts.partitions[number]
    set_manifest = parts.set_manifest
    kind = random.random()
    if kind < 0.3:
        index = mutate_records(index, random)
        manifest = with_index_checksums(manifest, index)
    elif kind < 0.7:
        manifest = mutate_json(manifest, random)
        set_manifest = with_numbers_of(manifest, set_manifest, number)
    elif kind < 0.85:
        set_manifest = mutate_json(set_manifest, random)
    elif kind < 0.95:
        data = mutate_bytes(data, random)
        if random.random() < 0.7:  # so that the decoder meets what is no encoded chunk
            index = with_chunk_checksums(index, data)
            manifest = with_index_checksums(manifest, index)
    else:
        other_partition = random.choice(other.partitions)
        data, index, manifest = other_partition
    partitions = list(parts.partitions)
    partitions[number] = Partition(data, index, manifest)
    return Parts(tuple(partitions), set_manifest, parts.files)


def _check_sealed(parts: Parts, folder: Path) -> Steps:
    """A set that was forged is refused, or is one: what verify takes can be loaded, what merges has its SHA-256."""
    root, out = folder / "set", folder / "out"
    files = sealed(parts)

    def check() -> None:
        refusal = _refused(lambda: _require_sound(root, "full"))
        _refused(lambda: inspect(root).as_json())
        loading = _refused(lambda: _load(root))
        merging = _refused(lambda: merge(root, out / "model", threads=1))
        _refused(lambda: pull(str(root), out / "pulled", threads=1))
        _refused(lambda: repair(root, dry_run=True, threads=1))
        if merging is None:
            _require_promised(out / "model", files[SET_MANIFEST_NAME])
        require(refusal is not None or loading is None, f"verify takes it, but loading says: {loading}")
        for error in (refusal, loading, merging):
            if error is not None:
                raise error

    return lambda: write_files(root, files), check


def _require_promised(made: Path, set_manifest: bytes) -> None:
    """Every shard that was made has its SHA-256, and nothing else was made than is named."""
    manifest = parse_set_manifest(set_manifest, "")
    found = read_files(made)
    for shard in manifest.shards:
        digest = f"sha256:{hashlib.sha256(found.get(shard.name, b'')).hexdigest()}"
        require(shard.sha256 in (None, digest), f"shard {shard.name!r} was merged to something else")
    named = {shard.name for shard in manifest.shards} | {entry.name for entry in manifest.files}
    named |= set() if manifest.weights_index is None else {manifest.weights_index[0]}
    require(set(found) - {".mmsplit.lock"} <= named, f"files that nobody named: {set(found) - named}")


# --- a set with names that mean harm -----------------------------------------------------------------------------


def _mutate_names(files: Files, other: Files, random: Random) -> Files:
    """Give a small file, a shard, the index, a partition a name that leads elsewhere; all checksums in order."""
    changed = dict(files)
    try:
        values = json.loads(changed[SET_MANIFEST_NAME])
        for _ in range(random.choice((1, 1, 2))):
            new = random.choice(NAMES)
            new = random.choice((new, new, f"one/{new}", f"{new}/x", f"é/{new}"))
            kind = random.randrange(6)
            if kind <= 1:
                entry = random.choice(values["files"])
                content = changed.get(entry["name"])
                entry["name"] = new
                if content is not None and all(is_plain_name(part) for part in new.split("/")):
                    changed[new] = content
            elif kind == 2:
                values["files"].append({**random.choice(values["files"]), "name": new})
            elif kind == 3:
                _rename_shard(changed, random.choice(values["source"]["shards"]), new)
            elif kind == 4:
                values["source"]["index"]["name"] = new
            else:
                random.choice(values["partitions"])[random.choice(("manifest", "payload"))] = new
        changed[SET_MANIFEST_NAME] = json.dumps(values).encode()
        return sealed(taken_apart(changed))
    except (KeyError, IndexError, TypeError, ValueError):
        return {**files, SET_MANIFEST_NAME: with_root_digest(changed[SET_MANIFEST_NAME])}


def _rename_shard(files: Files, entry: dict[str, Any], new: str) -> None:
    """Rename a shard in its entry and in all partition manifests."""
    old, entry["name"] = entry["name"], new
    for name in [name for name in files if name.startswith("partition_") and name.endswith(".json")]:
        text = files[name].decode().replace(json.dumps(old), json.dumps(new))
        parts = taken_apart(files)
        number = name.removeprefix("partition_").removesuffix(".json")
        if number.isdecimal():
            partitions = list(parts.partitions)
            partitions[int(number)] = partitions[int(number)]._replace(manifest=text.encode())
            files.update(sealed(parts._replace(partitions=tuple(partitions))))


def _check_names(files: Files, folder: Path) -> Steps:
    """Pulled and merged, nothing is written but below the output; what is there has the names that were said."""
    root, out = folder / "set", folder / "out"

    def write() -> None:
        # Beside the output lies what "../" would meet.
        for name, data in files.items():
            try:
                write_files(root, {name: data})
            except (OSError, ValueError):
                continue  # too long, or a folder where a file is
        (folder / "x").write_bytes(b"not yours")

    def check() -> None:
        errors = [_refused(lambda: pull(str(root), out / "pulled", threads=1))]
        errors.append(_refused(lambda: merge(root, out / "merged", threads=1)))
        errors.append(_refused(lambda: _require_sound(root, "stored")))
        if errors[0] is None:
            errors.append(_refused(lambda: merge(out / "pulled", out / "merged again", threads=1)))
        require((folder / "x").read_bytes() == b"not yours", "a file beside the output was written")
        require(sorted(p.name for p in folder.iterdir()) == ["out", "set", "x"], "something lies beside the output")
        if errors[1] is None:
            _require_promised(out / "merged", files[SET_MANIFEST_NAME])
        for error in errors:
            if error is not None:
                raise error

    return write, check


# --- a model that is split ---------------------------------------------------------------------------------------


def _mutate_model(files: Files, other: Files, random: Random) -> Files:
    changed = dict(files)
    name = random.choice(sorted(files))
    mutate = {".json": mutate_json, ".gguf": mutate_gguf, ".bin": mutate_torch, ".safetensors": mutate_safetensors}
    changed[name] = mutate.get(Path(name).suffix, mutate_bytes)(files[name], random)
    if random.random() < 0.05:
        changed[random.choice(NAMES[14:30])] = b"{}"
    return {n: d for n, d in changed.items() if all(is_plain_name(part) for part in n.split("/"))}


def _check_model(files: Files, folder: Path) -> Steps:
    """What can be split comes back bit for bit, and its set is sound; every tensor of it loads."""
    root, out = folder / "model", folder / "out"

    def write() -> None:
        for name, data in files.items():
            try:
                write_files(root, {name: data})
            except (OSError, UnicodeEncodeError):
                continue

    def check() -> None:
        split(root, out / "set", 1, threads=1, allow_unknown_dtypes=True)
        _require_sound(out / "set", "full")
        loading = _refused(lambda: _load(out / "set"))
        require(loading is None or "numpy has no array" in loading.what, f"what was split does not load: {loading}")
        merge(out / "set", out / "merged", threads=1)
        merged, there = read_files(out / "merged"), read_files(root)
        for name, data in merged.items():
            require(there[name] == data, f"{name!r} comes back as something else")
        kept = {shard.name for shard in parse_set_manifest((out / "set" / SET_MANIFEST_NAME).read_bytes(), "").shards}
        require(kept <= set(merged), "a shard does not come back")

    return write, check


DIRECTORIES = (
    Target("damaged_set", sets, _mutate_file, _check_damaged, needs_folder=True),
    Target(
        "forged_set",
        lambda: {n: taken_apart(f) for n, f in sets().items()},
        _mutate_sealed,
        _check_sealed,
        needs_folder=True,
    ),
    Target("names", lambda: {"plain": sets()["plain"]}, _mutate_names, _check_names, needs_folder=True),
    Target("model", models, _mutate_model, _check_model, needs_folder=True),
)
