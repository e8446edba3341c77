"""`split`: stream a checkpoint into partitions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, get_args

from mmsplit.checkpoint import Checkpoint, IoMode
from mmsplit.codec import CODEC_NAMES, CodecName
from mmsplit.codec.erasure import require_erasure_library
from mmsplit.errors import CheckpointError, RequestError
from mmsplit.planning import (
    By,
    NodeRequest,
    PlanRequest,
    Rule,
    SplitBy,
    TiedMode,
    plan_for_nodes_or_parts,
    sorted_part_ids,
)
from mmsplit.remote.source import HubOptions, hub_address_of, open_source
from mmsplit.sidecar.consumed_directory import ConsumedDirectory
from mmsplit.sidecar.manifest_builder import Origin
from mmsplit.sidecar.output_directory import Existing, OutputDirectory
from mmsplit.sidecar.parity_layout import percent_hundredths
from mmsplit.sidecar.set_manifest import KeptBytes, ShardEntry
from mmsplit.splitting import Announce, Consumer, SplitOptions, SplitResult, SplitRun, fold_equal_tensors
from mmsplit.splitting.kept_journal import open_what_is_left, read_consumed, require_not_consumed
from mmsplit.workers import ProgressCallback, thread_count

_EXISTING: Final = ", ".join(get_args(Existing))

__all__ = ["SplitResult", "split"]


def split(
    source: str | Path | Checkpoint,
    output: str | Path,
    num_parts: int | None = None,
    *,
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode = "duplicate",
    split_by: SplitBy = "layer",
    rule: Rule | None = None,
    nodes: NodeRequest | None = None,
    only: Collection[int] | None = None,
    codec: CodecName = "planes",
    threads: int | None = None,
    existing: Existing = "refuse",
    io: IoMode = "auto",
    direct: bool = True,
    source_sha256: bool = True,
    parity: float | None = None,
    model_id: str | None = None,
    revision: str | None = None,
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
    consume: bool = False,
    announce: Announce | None = None,
    progress: ProgressCallback | None = None,
) -> SplitResult:
    """Split a checkpoint into a partition set in `output`; memory does not grow with its size.

    `source` is a path, an open checkpoint, or a model of the Hub (`org/name`, `org/name@revision`, reached as `hub`
    says): its ranges then go straight through the encoder, and no shard touches the disk.

    Planning arguments are those of `plan`; with `nodes`, partition k is for the k-th node that is used.  `only` writes
    just these partitions, byte for byte as the whole split would; the set manifest is written by the run that adds
    the last one.  `threads` encode (default: all processors); the result does not depend on it.  `existing` says what
    to do about output that is there: "refuse", "resume" an unfinished run (start one where there is none, do nothing
    where it is finished), or "force", which replaces what mmsplit wrote.  `direct=False` keeps O_DIRECT away from the
    output.  `model_id` and `revision` go into the manifests; those of a model of the Hub are its id and the commit.

    `source_sha256=False` saves computing the SHA-256 of the source shards, a third of the processor time: merge can
    then compare no digest but one that the Hub publishes, and where there is none it has the checksums of the chunks.

    `parity` is a share in percent, 0.5 to 50: when the partitions are complete, each gets a parity file of that size
    beside its payload, as the verb `parity` makes it, and `repair` then needs no source for small damage.  With
    `consume` a shard is deleted only when the parity of its partitions is there, too.

    `consume=True` deletes each shard of `source`, a directory of this machine, as soon as all of it is in finished
    partitions that were read back from the disk; `announce` is told before how much more disk that takes at most.
    Interrupted, source and output together hold everything, and `existing="resume"` goes on.

    Interrupted at any moment, it otherwise leaves the source untouched, nothing that passes for a partition set, and
    what a later run with `existing="resume"` needs to come to the same bytes.  Raises any branch of `MmsplitError`.
    """
    if existing not in get_args(Existing):
        raise RequestError(f"no such way with existing output: {existing!r}", hint=f"Possible are {_EXISTING}.")
    if codec not in CODEC_NAMES:
        raise RequestError(f"no such codec: {codec!r}", hint=f"Possible are {', '.join(CODEC_NAMES)}.")
    if parity is not None:
        percent_hundredths(parity)  # not after hours
        require_erasure_library()
    hub = hub or HubOptions()
    with ExitStack() as stack:
        consumed, record, left = None, None, None
        if consume:
            directory = _consumable_directory(source, hub, only, source_sha256)
            consumed = stack.enter_context(ConsumedDirectory(directory))
        if consume and existing != "force":
            record = read_consumed(Path(output))
        else:
            require_not_consumed(Path(output))
        if not isinstance(source, Checkpoint) and hub_address_of(source, hub) is not None:
            # What is asked for, a branch say, is not what the manifests record: that is the commit.
            hub, revision = hub._replace(revision=hub.revision or revision), None
        if consumed is not None and record is not None and not isinstance(source, Checkpoint):
            left = open_what_is_left(Path(source), consumed, record, allow_unknown_dtypes=allow_unknown_dtypes)
        if left is None:
            source = open_source(source, hub, allow_unknown_dtypes=allow_unknown_dtypes)
            source = fold_equal_tensors(source, io, progress)
        else:
            source = left
        request = PlanRequest(
            num_parts=num_parts,
            by=by,
            weights=weights,
            boundaries=boundaries,
            tied=tied,
            split_by=split_by,
            rule=rule,
        )
        plan = plan_for_nodes_or_parts(source, request, nodes)
        options = SplitOptions(
            codec=codec,
            threads=thread_count(threads),
            io=io,
            direct=direct,
            source_sha256=source_sha256,
            only=None if only is None else sorted_part_ids(only, plan.num_parts),
            parity=parity,
        )
        headers = {shard.name: source.read_kept(shard.name) for shard in source.shards}
        origin = Origin(
            model_id or source.model_id,
            revision or source.revision,
            plan.num_parts,
            plan.digest,
            _source_digest(source, headers),
        )
        known = {
            shard.name: ShardEntry(shard.name, shard.size_bytes, None, KeptBytes.of(headers.pop(shard.name)))
            for shard in source.shards
        }
        place = source.storage.directory
        if place is not None and Path(output).resolve() == place.resolve():
            raise RequestError(
                "output is the directory of the source, which is only read",
                path=output,
                hint="Choose another directory for the partition set.",
            )
        consumer = None
        if consumed is not None:
            kept = {name: entry.kept for name, entry in known.items()}
            deletable = frozenset() if record is None else record.deleted
            kept = {name: entry.kept for name, entry in known.items()}
            consumer = Consumer(source, plan, consumed, Path(output), kept, deletable, announce)
            consumed.require_deletable(shard.name for shard in source.shards if shard.name not in consumer.gone)
        with OutputDirectory(Path(output)) as out:
            return SplitRun(source, plan, origin, options, out, known, progress, consumer=consumer).execute(existing)


def _consumable_directory(
    source: str | Path | Checkpoint,
    hub: HubOptions,
    only: Collection[int] | None,
    source_sha256: bool,
) -> Path:
    """Return the directory whose shards are to be deleted.  Raises `RequestError` for what cannot be consumed."""
    if only is not None:
        raise RequestError(
            "--only writes a part: no shard can be deleted for it", hint="Leave --only or --consume out."
        )
    if not source_sha256:
        raise RequestError(
            "shards are deleted only when their SHA-256 is known", hint="Leave --no-source-sha256 or --consume out."
        )
    if isinstance(source, Checkpoint):
        directory = source.storage.directory
    else:
        path = Path(source)
        directory = None if hub_address_of(source, hub) is not None else path if path.is_dir() else path.parent
    if directory is None or hub.keep_source:
        raise RequestError(
            "a model of the Hub has no shards here to delete", hint="Leave --consume out; no shard touches the disk."
        )
    if not directory.is_dir():
        raise CheckpointError("no such file or directory", path=directory)
    return directory


def _source_digest(checkpoint: Checkpoint, headers: dict[str, bytes]) -> str:
    """SHA-256 over what the headers say: name, length and header bytes of each shard, in name order."""
    digest = hashlib.sha256()
    for shard in checkpoint.shards:
        for item in (shard.name.encode(), str(shard.size_bytes).encode(), headers[shard.name]):
            digest.update(len(item).to_bytes(8, "little"))
            digest.update(item)
    return f"sha256:{digest.hexdigest()}"
