"""`repartition`: the same model cut another way, its encoded chunks moved as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple, get_args

from mmsplit.checkpoint import IoMode
from mmsplit.errors import RequestError
from mmsplit.planning import (
    By,
    NodeRequest,
    Plan,
    PlanRequest,
    Rule,
    SplitBy,
    TiedMode,
    plan_for_nodes_or_parts,
    sorted_part_ids,
)
from mmsplit.remote.source import HubOptions
from mmsplit.repartitioning import StoredSource, open_stored_set, read_set_checkpoint
from mmsplit.sidecar.manifest_builder import Origin
from mmsplit.sidecar.output_directory import Existing, OutputDirectory
from mmsplit.sidecar.set_manifest import PartitionEntry, SetManifest
from mmsplit.splitting import SplitOptions, SplitResult, SplitRun
from mmsplit.splitting.split_result import written_json
from mmsplit.workers import ProgressCallback, thread_count

_EXISTING: Final = ", ".join(get_args(Existing))


class RepartitionResult(NamedTuple):
    """What a repartition made: the entries of the partitions it was to write, and the set manifest if the set is whole.

    `resumed_bytes` of the raw bytes were there already.  Of the others, `copied_bytes` are the length of the encoded
    chunks that were written, `shared_bytes` of those whose blocks the file system shares with the input, and
    `encoded_bytes` the raw length of what had to be encoded again.  `from_root_digest` is that of the input.
    """

    path: Path
    plan: Plan
    partitions: tuple[PartitionEntry, ...]
    manifest: SetManifest | None
    from_root_digest: str
    resumed_bytes: int
    already_finished: bool
    copied_bytes: int
    shared_bytes: int
    encoded_bytes: int

    @property
    def root_digest(self) -> str | None:
        """The new set's root digest; None while partitions are missing."""
        return None if self.manifest is None else self.manifest.root_digest

    def as_json(self) -> dict[str, object]:
        """Return what `repartition --json` shows."""
        return {
            "path": str(self.path),
            "root_digest": self.root_digest,
            "from_root_digest": self.from_root_digest,
            "already_finished": self.already_finished,
            "resumed_bytes": self.resumed_bytes,
            "copied_bytes": self.copied_bytes,
            "shared_bytes": self.shared_bytes,
            "encoded_bytes": self.encoded_bytes,
            "partitions": written_json(self.partitions, self.plan),
            "notes": list(self.plan.notes),
        }


def repartition(
    source: str | Path,
    output: str | Path,
    num_parts: int | None = None,
    *,
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode | None = None,
    split_by: SplitBy = "layer",
    rule: Rule | None = None,
    nodes: NodeRequest | None = None,
    only: Collection[int] | None = None,
    root_digest: str | None = None,
    threads: int | None = None,
    existing: Existing = "refuse",
    io: IoMode = "auto",
    direct: bool = True,
    hub: HubOptions | None = None,
    progress: ProgressCallback | None = None,
) -> RepartitionResult:
    """Cut the model of a partition set another way, into a set in `output`, without its checkpoint.

    `source` is the directory of a set, its set manifest, or a place as `pull` takes it.  The result is byte for byte
    what `split` with the same arguments makes of the original checkpoint: encoded chunks are taken as they are, with
    the codec of the set, and where the file system can share blocks, nothing is written but what is new.

    Every stored chunk is compared with its checksum before it counts, so that damage is not handed on: it raises
    `IntegrityError`.  With `root_digest` only that very set is taken, and each chunk is held to its digest, too.

    Planning arguments are those of `plan`; `tied` is that of the set unless it is given.  What a cut within layers
    takes from the middle of a chunk is decoded and encoded again.  `only`, `threads`, `existing` and `direct` are as in
    `split`; with `only`, just those payloads are needed that hold bytes of these partitions.

    Interrupted at any moment, it leaves the input untouched, nothing that passes for a partition
    set, and what a later run with `existing="resume"` needs.  Raises any branch of `MmsplitError`.
    """
    if existing not in get_args(Existing):
        raise RequestError(f"no such way with existing output: {existing!r}", hint=f"Possible are {_EXISTING}.")
    stored = open_stored_set(source, hub or HubOptions(), root_digest)
    _require_apart(stored.directory, Path(output))
    checkpoint = read_set_checkpoint(stored)
    manifest = stored.manifest
    request = PlanRequest(
        num_parts=num_parts,
        by=by,
        weights=weights,
        boundaries=boundaries,
        tied=tied or manifest.tied,  # type: ignore[arg-type]  # whoever plans looks at it
        split_by=split_by,
        rule=rule,
    )
    plan = plan_for_nodes_or_parts(checkpoint, request, nodes)
    options = SplitOptions(
        codec=manifest.codec,  # type: ignore[arg-type]  # the manifest was held to the codecs there are
        threads=thread_count(threads),
        io=io,
        direct=direct,
        source_sha256=False,
        only=None if only is None else sorted_part_ids(only, plan.num_parts),
    )
    origin = Origin(manifest.model_id, manifest.revision, plan.num_parts, plan.digest, manifest.source_digest)
    known = {entry.name: entry for entry in manifest.shards}
    chunks = StoredSource(stored)
    with OutputDirectory(Path(output)) as out:
        run = SplitRun(checkpoint, plan, origin, options, out, known, progress, chunks)
        return _result(run.execute(existing), chunks, manifest.root_digest)


def _require_apart(root: Path | None, output: Path) -> None:
    if root is None:
        return
    place, inside = output.resolve(), root.resolve()
    if place == inside or inside in place.parents:
        raise RequestError(
            "output is the directory of the set, or in it; that is only read",
            path=output,
            hint="Choose another directory for the new set.",
        )
    if any(path.resolve().parent == place for path in root.iterdir()):
        raise RequestError(
            "files of the set are links into the output, where they would be replaced",
            path=output,
            hint="Choose another directory for the new set.",
        )


def _result(made: SplitResult, chunks: StoredSource, from_root_digest: str) -> RepartitionResult:
    return RepartitionResult(
        path=made.path,
        plan=made.plan,
        partitions=made.partitions,
        manifest=made.manifest,
        from_root_digest=from_root_digest,
        resumed_bytes=made.resumed_bytes,
        already_finished=made.already_finished,
        copied_bytes=chunks.copied_bytes,
        shared_bytes=chunks.shared_bytes,
        encoded_bytes=chunks.encoded_bytes,
    )
