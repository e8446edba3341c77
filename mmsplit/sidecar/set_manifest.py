"""`partition_set.json`: what ties the partitions of one plan together and back to their source.  Pure.

It holds what no partition holds: each source shard's size, SHA-256 and header bytes, the weights index, the digests
of the small files and of the partition manifests.  `root_digest` is over all of that, so that it stands for the set.
"""

from __future__ import annotations

import base64
import json
from typing import Final, NamedTuple, get_args

import zstandard

from mmsplit.checkpoint.weights_index import folded_name
from mmsplit.codec import CODEC_NAMES
from mmsplit.digests import sha256_of
from mmsplit.errors import IntegrityError
from mmsplit.planning.units import TiedMode
from mmsplit.sidecar.file_names import SET_MANIFEST_NAME as SET_MANIFEST_NAME
from mmsplit.sidecar.framing import FORMAT_VERSION, require_version
from mmsplit.sidecar.json_fields import Fields, load_json_object
from mmsplit.sidecar.manifest import manifest_name, payload_name

SET_FORMAT: Final = "mmsplit-set"
#: Kept bytes (a header, an index) are decompressed only up to this size.
_MAX_KEPT_BYTES: Final = 512 << 20


class KeptBytes(NamedTuple):
    """Bytes of the source kept verbatim, as one zstd frame."""

    size_bytes: int
    frame: bytes

    @classmethod
    def of(cls, data: bytes) -> KeptBytes:
        """Compress `data`."""
        return cls(len(data), zstandard.ZstdCompressor(level=9).compress(data))

    def __repr__(self) -> str:
        return f"<KeptBytes {self.size_bytes:,} bytes>"

    def data(self, path: str) -> bytes:
        """Return the bytes; raises `IntegrityError` if the frame does not hold exactly `size_bytes`."""
        try:
            if self.size_bytes <= _MAX_KEPT_BYTES and zstandard.frame_content_size(self.frame) == self.size_bytes:
                data = zstandard.ZstdDecompressor().decompress(self.frame, allow_extra_data=False)
                if len(data) == self.size_bytes:
                    return data
        except zstandard.ZstdError:
            pass
        raise IntegrityError("kept bytes of the source cannot be decoded", path=path, expected=self.size_bytes)


class ShardEntry(NamedTuple):
    """A source shard: its file name, length and digest, and what of its bytes no tensor covers, in order.

    `sha256` is None where split was told not to compute it and knew none.  Where `sha256_is_published`, it was not
    computed from the bytes that were split, but taken from what the Hub says of the file.
    """

    name: str
    size_bytes: int
    sha256: str | None
    kept: KeptBytes
    sha256_is_published: bool = False


class FileEntry(NamedTuple):
    """A small file that travels along; `name` is relative, with `/`."""

    name: str
    size_bytes: int
    sha256: str


class PartitionEntry(NamedTuple):
    """One partition: file names, and the digest of its manifest, which binds the chunk index, and so every chunk."""

    part_id: int
    manifest_file: str
    manifest_sha256: str
    payload_file: str
    payload_bytes: int
    total_params: int
    total_bytes: int
    stored_bytes: int


class SetManifest(NamedTuple):
    """The parsed set manifest.  `weights_index` is the weights index's name and bytes, or None."""

    model_id: str
    revision: str | None
    plan_digest: str
    source_digest: str
    codec: str
    tied: str
    shards: tuple[ShardEntry, ...]
    weights_index: tuple[str, KeptBytes] | None
    files: tuple[FileEntry, ...]
    partitions: tuple[PartitionEntry, ...]

    @property
    def total_bytes(self) -> int:
        """Raw bytes in all partitions, copies of tied weights included."""
        return sum(partition.total_bytes for partition in self.partitions)

    @property
    def stored_bytes(self) -> int:
        """Encoded bytes in all partitions."""
        return sum(partition.stored_bytes for partition in self.partitions)

    @property
    def root_digest(self) -> str:
        """SHA-256 over the canonical JSON (sorted keys, no white space) of everything else."""
        return sha256_of(_canonical(_as_json(self)))


def format_set_manifest(manifest: SetManifest) -> bytes:
    """Return the set manifest as JSON that a person can read."""
    values = {**_as_json(manifest), "root_digest": manifest.root_digest}
    return (json.dumps(values, indent=1) + "\n").encode()


def is_as_written(data: bytes) -> bool:
    r"""Whether a set manifest has the very bytes that it was written with.

    The root digest is over what the JSON means: it does not see a lost line end, or a capital in `\u00E9`.
    """
    try:
        return (json.dumps(json.loads(data), indent=1) + "\n").encode() == data
    except (ValueError, RecursionError):
        return False


def require_root(found: str, wanted: str | None, path: str) -> None:
    """Raise `IntegrityError` unless a set has the root digest that is wanted, if one is."""
    if wanted is not None and found != wanted:
        raise IntegrityError(
            "another set than the one of this root digest",
            path=path,
            expected=wanted,
            found=found,
            hint="Check the digest, and where the set came from.",
        )


def parse_set_manifest(data: bytes, path: str, root_digest: str | None = None) -> SetManifest:
    """Parse and check a set manifest, and that it is the one of `root_digest`, if given.

    Raises `FormatError` or `IntegrityError`.
    """
    fields = Fields(load_json_object(data, path), path)
    ours = fields.values.get("format") == SET_FORMAT
    version = fields.values.get("format_version")
    if ours and type(version) is int:
        require_version(version, path)
    elif "root_digest" not in fields.values and "plan_digest" not in fields.values:
        fields.fail(f"not the manifest of a partition set: format is {str(fields.values.get('format'))[:40]!r}")
    # The root digest is over the JSON as it stands, so that a field of a later minor addition is bound, too.
    rest = {key: value for key, value in fields.values.items() if key != "root_digest"}
    expected, found = fields.values.get("root_digest"), sha256_of(_canonical(rest))
    if expected != found:
        raise IntegrityError(
            "set manifest is not what was written: root digest does not fit",
            path=path,
            expected=str(expected)[:80],
            found=found,
            hint="Copy it again from where the set came from.",
        )
    require_root(found, root_digest, path)
    if not ours or type(version) is not int:
        fields.fail("not the manifest of a partition set of a version known here")
    source = fields.inner("source")
    index = source.optional("index", dict)
    manifest = SetManifest(
        model_id=fields.get("model_id", str),
        revision=fields.optional("revision", str),
        plan_digest=fields.sha256("plan_digest"),
        source_digest=fields.sha256("source_digest"),
        codec=fields.one_of("codec", CODEC_NAMES),
        tied=fields.one_of("tied", get_args(TiedMode)),
        shards=tuple(_shard(f) for f in source.each("shards")),
        weights_index=None if index is None else _index(source.inner("index")),
        files=tuple(
            FileEntry(f.relative_name("name"), f.count("bytes"), f.sha256("sha256")) for f in fields.each("files")
        ),
        partitions=tuple(
            PartitionEntry(
                f.count("part_id"),
                f.plain_name("manifest"),
                f.sha256("manifest_sha256"),
                f.plain_name("payload"),
                f.count("payload_bytes"),
                f.count("total_params"),
                f.count("total_bytes"),
                f.count("stored_bytes"),
            )
            for f in fields.each("partitions")
        ),
    )
    if len(manifest.partitions) != fields.count("num_parts") or not manifest.partitions:
        fields.fail("partitions are not numbered from 0 to num_parts - 1")
    for number, partition in enumerate(manifest.partitions):
        if partition.part_id != number:
            fields.fail("partitions are not numbered from 0 to num_parts - 1")
        if (partition.manifest_file, partition.payload_file) != (manifest_name(number), payload_name(number)):
            fields.fail(f"partition {number} has other file names than {manifest_name(number)} and its payload")
    names = [shard.name for shard in manifest.shards] + [entry.name for entry in manifest.files]
    names += [] if manifest.weights_index is None else [manifest.weights_index[0]]
    if len({folded_name(name) for name in names}) != len(names):
        fields.fail("two files of the source have the same name, or names that some file systems take for the same")
    return manifest


def _as_json(manifest: SetManifest) -> dict[str, object]:
    return {
        "format": SET_FORMAT,
        "format_version": FORMAT_VERSION,
        "model_id": manifest.model_id,
        "revision": manifest.revision,
        "num_parts": len(manifest.partitions),
        "plan_digest": manifest.plan_digest,
        "source_digest": manifest.source_digest,
        "codec": manifest.codec,
        "tied": manifest.tied,
        "total_bytes": manifest.total_bytes,
        "stored_bytes": manifest.stored_bytes,
        "partitions": [
            {
                "part_id": partition.part_id,
                "manifest": partition.manifest_file,
                "manifest_sha256": partition.manifest_sha256,
                "payload": partition.payload_file,
                "payload_bytes": partition.payload_bytes,
                "total_params": partition.total_params,
                "total_bytes": partition.total_bytes,
                "stored_bytes": partition.stored_bytes,
            }
            for partition in manifest.partitions
        ],
        "files": [{"name": f.name, "bytes": f.size_bytes, "sha256": f.sha256} for f in manifest.files],
        "source": {
            "index": None
            if manifest.weights_index is None
            else {"name": manifest.weights_index[0], **kept_json(manifest.weights_index[1])},
            "shards": [_shard_json(shard) for shard in manifest.shards],
        },
    }


def _shard_json(shard: ShardEntry) -> dict[str, object]:
    values: dict[str, object] = {"name": shard.name, "bytes": shard.size_bytes, "sha256": shard.sha256}
    if shard.sha256_is_published:
        values["sha256_published"] = True
    return {**values, "kept": kept_json(shard.kept)}


def _shard(fields: Fields) -> ShardEntry:
    no_sha256 = "sha256" in fields.values and fields.values["sha256"] is None
    is_published = fields.optional("sha256_published", bool) is True
    if no_sha256 and is_published:
        fields.fail("sha256 is null and cannot be the published one")
    sha256 = None if no_sha256 else fields.sha256("sha256")
    kept = parse_kept(fields.inner("kept"))
    entry = ShardEntry(fields.plain_name("name"), fields.count("bytes"), sha256, kept, is_published)
    if kept.size_bytes > entry.size_bytes:
        fields.fail("more bytes are kept of a shard than it has")
    return entry


def kept_json(kept: KeptBytes) -> dict[str, object]:
    """Return kept bytes as they stand in JSON."""
    return {"bytes": kept.size_bytes, "zstd_base64": base64.b64encode(kept.frame).decode()}


def parse_kept(fields: Fields) -> KeptBytes:
    """Parse what `kept_json` gave; raises `FormatError`."""
    try:
        frame = base64.b64decode(fields.get("zstd_base64", str), validate=True)
    except ValueError:
        fields.fail("kept bytes are not base64")
    return KeptBytes(fields.count("bytes"), frame)


def _index(fields: Fields) -> tuple[str, KeptBytes]:
    return fields.plain_name("name"), parse_kept(fields)


def _canonical(values: object) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
