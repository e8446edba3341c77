"""Manifests made to do harm: refused as format or integrity errors, in bounded memory, inside the directory."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, tree, write_checkpoint

from mmsplit.errors import FormatError, IntegrityError, MmsplitError
from mmsplit.sidecar.framing import TRAILER_BYTES, pack_header, pack_trailer, parse_trailer
from mmsplit.sidecar.payload_tail import pack_tail
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.inspect import inspect
from mmsplit.verbs.load import open_partition, open_set
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

Json = dict[str, Any]
HUGE = (2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
WRONG = (None, True, -1, 1.5, "1", "", [], {}, [[]], "é\ud800", "../x", "/etc/passwd", "a\0b", *HUGE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set in two partitions, with an index and a small file."""
    root = tmp_path_factory.mktemp("made")
    weights = llama_weights(1)
    source = write_checkpoint(root / "m", [weights[:2], weights[2:]], index=True, files={"config.json": CAUSAL_CONFIG})
    split(source, root / "set", 2)
    return root / "set"


@pytest.fixture
def victim(made: Path, tmp_path: Path) -> Path:
    """A copy to be rewritten."""
    return Path(shutil.copytree(made, tmp_path / "outer" / "set"))


def _write_set_manifest(root: Path, values: Json) -> None:
    """Write a set manifest whose root digest fits, as somebody who means harm would."""
    values = {key: value for key, value in values.items() if key != "root_digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["root_digest"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    (root / SET_MANIFEST_NAME).write_text(json.dumps(values, indent=1) + "\n")


def _write_manifest(root: Path, values: Json) -> None:
    """Write partition 0's manifest into JSON and payload with every checksum right."""
    text = json.dumps(values, indent=1).encode()
    path = root / "partition_0.bin"
    payload = path.read_bytes()
    trailer = parse_trailer(payload[-TRAILER_BYTES:], len(payload))
    assert trailer is not None
    tail = pack_tail(payload[trailer.index_offset : trailer.manifest_offset], trailer.index_offset, text)
    path.write_bytes(payload[: trailer.index_offset] + tail)
    (root / "partition_0.json").write_bytes(text)


def _use_everything(root: Path) -> list[str]:
    """Give the set to every verb; return what was refused.  Anything but our errors comes through."""
    refused = []

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (FormatError, IntegrityError):
            refused.append(name)

    def read_all(opened: Any) -> None:
        with opened as mapping:
            for name in mapping:
                mapping[name]

    def require_sound(path: Path) -> None:
        if not verify(path, level="full", threads=1).ok:
            raise IntegrityError("damage was reported")

    attempt("verify", lambda: require_sound(root))
    attempt("inspect", lambda: inspect(root).as_json())
    attempt("open_set", lambda: read_all(open_set(root, threads=1)))
    attempt("open_partition", lambda: read_all(open_partition(root / "partition_0.json", threads=1)))
    attempt("merge", lambda: merge(root, root.parent / "merged", threads=1))
    return refused


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the first two items of each list."""
    places = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        places += _paths(item, (*prefix, key))
    return places


def _replaced(values: Json, place: tuple[Any, ...], new: object) -> Json:
    changed = copy.deepcopy(values)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return changed


def test_any_field_of_a_set_manifest_may_lie(victim: Path) -> None:
    """Every field replaced by wrong values, root digest and all: our errors or no harm, nothing written outside."""
    values = json.loads((victim / SET_MANIFEST_NAME).read_text())
    del values["root_digest"]  # computed anew for every lie
    outside = {path.name for path in victim.parent.iterdir()} | {"merged"}
    for number, place in enumerate(_paths(values)):
        for new in WRONG[number % 4 :: 4]:
            _write_set_manifest(victim, _replaced(values, place, new))
            refused = _use_everything(victim)
            free = place[-1] in _FREE or (place[-1] == "sha256" and new is None)  # a split may leave it out
            assert refused or free, (place, new)
            shutil.rmtree(victim.parent / "merged", ignore_errors=True)
    assert {path.name for path in victim.parent.iterdir()} <= outside


#: Fields whose value nothing can be held against: free text, and what only the plan or the source knows.
_FREE = {"model_id", "revision", "codec", "tied", "index", "files", "total_bytes", "stored_bytes", "total_params"}


def test_any_field_of_a_manifest_may_lie(victim: Path) -> None:
    """The same for a partition's manifest, its copy in the payload and their checksums."""
    values = json.loads((victim / "partition_0.json").read_text())
    for number, place in enumerate(_paths(values)):
        for new in WRONG[number % 4 :: 4]:
            _write_manifest(victim, _replaced(values, place, new))
            # The set manifest's digest of it does not fit any more, so the set's verbs refuse in any case.
            assert {"verify", "open_set", "merge"} <= set(_use_everything(victim)), (place, new)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"format": "mmsplit-set", "format": "mmsplit-set"}', "a key occurs twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{}", "not the manifest"),
    ],
)
def test_hostile_json(victim: Path, text: bytes, match: str) -> None:
    """Deep, doubled, endless or no JSON: an error in words, from the set manifest."""
    (victim / SET_MANIFEST_NAME).write_bytes(text)
    with pytest.raises((FormatError, IntegrityError), match=match):
        open_set(victim)


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b'{"a": 1, "a": 2}', b"{}"])
def test_hostile_json_in_a_partition(victim: Path, text: bytes) -> None:
    """The payload's own copy is used to say what else is wrong, but the partition is not opened."""
    (victim / "partition_0.json").write_bytes(text)
    with pytest.raises(IntegrityError, match="not the one written with this payload"):
        open_partition(victim / "partition_0.json")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside", "..", "c:\\outside", "a/./b", "\n"])
def test_names_cannot_lead_out(victim: Path, name: str) -> None:
    """No name of a set manifest reaches beyond the directory that is read or written."""
    values = json.loads((victim / SET_MANIFEST_NAME).read_text())
    for place in (("files", 0, "name"), ("source", "shards", 0, "name"), ("source", "index", "name"),
                  ("partitions", 0, "manifest"), ("partitions", 1, "payload")):  # fmt: skip
        _write_set_manifest(victim, _replaced(values, place, name))
        with pytest.raises(FormatError, match=r"plain|file names"):
            merge(victim, victim.parent / "merged")


def test_one_name_for_two_files_is_refused(victim: Path) -> None:
    """A small file or a second shard cannot take the place of a shard."""
    values = json.loads((victim / SET_MANIFEST_NAME).read_text())
    shard = values["source"]["shards"][0]["name"]
    for place in (("files", 0, "name"), ("source", "shards", 1, "name"), ("source", "index", "name")):
        _write_set_manifest(victim, _replaced(values, place, shard))
        with pytest.raises(FormatError, match="same name"):
            merge(victim, victim.parent / "merged")


def test_what_promises_the_world_costs_no_memory(victim: Path) -> None:
    """A manifest copy or a kept header that declares 900 MiB in a few bytes is not believed before it is there."""
    payload = (victim / "partition_0.bin").read_bytes()
    values = json.loads((victim / SET_MANIFEST_NAME).read_text())
    trailer = parse_trailer(payload[-TRAILER_BYTES:], len(payload))
    assert trailer is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for declared in (900 << 20, 500 << 20, 2**62):
        tail = pack_trailer(trailer._replace(manifest_bytes=declared))
        (victim / "partition_0.bin").write_bytes(payload[: -len(tail)] + tail)
        assert not verify(victim, level="quick").ok
        (victim / "partition_0.bin").write_bytes(payload)
        frame = b"\x28\xb5\x2f\xfd\xe0" + declared.to_bytes(8, "little") + b"\x03\x00\x00x"
        kept = {"bytes": declared, "zstd_base64": base64.b64encode(frame).decode()}
        of_a_shard = ("source", "shards", 0)
        for size_bytes in (values["source"]["shards"][0]["bytes"], declared):
            forged = _replaced(_replaced(values, (*of_a_shard, "kept"), kept), (*of_a_shard, "bytes"), size_bytes)
            _write_set_manifest(victim, forged)
            with pytest.raises((FormatError, IntegrityError)):
                merge(victim, victim.parent / "merged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_header_of_another_partition_is_found(victim: Path) -> None:
    """A header that is sound in itself but not that of the manifest is damage."""
    path = victim / "partition_0.bin"
    data = path.read_bytes()
    digest = "sha256:" + "0" * 64
    path.write_bytes(pack_header(0, 2, digest, digest) + data[4096:])
    with pytest.raises(IntegrityError, match="file header is not that"):
        open_partition(path)


def test_nothing_is_written_into_the_set(victim: Path) -> None:
    """Reading verbs leave a damaged set as it is."""
    (victim / "partition_0.json").write_bytes(b"{}")
    before = tree(victim)
    assert _use_everything(victim)
    assert tree(victim) == before


def test_every_refusal_is_ours() -> None:
    """What the hostile tests accept is part of the one tree of errors."""
    assert issubclass(FormatError, MmsplitError)
    assert issubclass(IntegrityError, MmsplitError)
