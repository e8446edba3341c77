"""`export`: partitions, or a whole model, for programs that do not know mmsplit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from mmsplit.checkpoint import Checkpoint, IoMode
from mmsplit.errors import RequestError
from mmsplit.exporting.checkpoint_source import CheckpointSource
from mmsplit.exporting.export_form import ExportForm, JsonForm, SafetensorsForm
from mmsplit.exporting.export_record import ExportedFile
from mmsplit.exporting.export_run import ExportRun
from mmsplit.exporting.set_source import SetSource, holds_partitions
from mmsplit.exporting.tensor import ExportSource, notes_on_ties
from mmsplit.exporting.weight_files import DEFAULT_SHARD_BYTES
from mmsplit.planning import By, NodeRequest, PlanRequest, Rule, SplitBy, TiedMode, plan_for_nodes_or_parts
from mmsplit.remote.source import HubOptions, hub_address_of, open_source
from mmsplit.sidecar.output_directory import Existing, OutputDirectory
from mmsplit.splitting import fold_equal_tensors
from mmsplit.workers import ProgressCallback, thread_count

#: Forms of an export.
To = Literal["safetensors", "json"]
DEFAULT_JSON_BYTES: Final = 1_000_000_000


class ExportResult(NamedTuple):
    """What an export made: its files, weights first; `kept` are weights that were there already.

    Over the network `moved_bytes` came since the source was opened, None for a source on this machine.
    """

    path: Path
    to: To
    num_parts: int
    part_ids: tuple[int, ...]
    files: tuple[ExportedFile, ...]
    kept: tuple[str, ...]
    total_params: int
    moved_bytes: int | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Length of all files."""
        return sum(file.size_bytes or 0 for file in self.files)

    def as_json(self) -> dict[str, object]:
        """Return what `export --json` shows."""
        return {
            "path": str(self.path),
            "to": self.to,
            "num_parts": self.num_parts,
            "part_ids": list(self.part_ids),
            "total_params": self.total_params,
            "total_bytes": self.total_bytes,
            "moved_bytes": self.moved_bytes,
            "files": [
                {
                    "name": file.name,
                    "bytes": file.size_bytes,
                    "sha256": file.sha256,
                    "kept": file.name in self.kept,
                }
                for file in self.files
            ],
            "notes": list(self.notes),
        }


def export(
    source: str | Path | Checkpoint,
    output: str | Path,
    num_parts: int | None = None,
    *,
    part_ids: Collection[int] | None = None,
    to: To = "safetensors",
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode = "duplicate",
    split_by: SplitBy = "layer",
    rule: Rule | None = None,
    nodes: NodeRequest | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_bytes: int | None = DEFAULT_JSON_BYTES,
    on_estimate: Callable[[int], None] | None = None,
    existing: Existing = "refuse",
    root_digest: str | None = None,
    threads: int | None = None,
    io: IoMode = "auto",
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
    progress: ProgressCallback | None = None,
) -> ExportResult:
    """Write the partitions `part_ids` of a source, all for None, into the directory `output`; memory stays bounded.

    `source` is a partition set, a single partition, or whatever `plan` takes: then the planning arguments are those of
    `plan`, and the bytes go straight from the shards into the output.  Without any of them it is the whole model.

    `to="safetensors"` writes what loaders take for a model's directory: safetensors files of at most `max_shard_bytes`
    of tensors, their index where there are several, and the small files of the model.  `to="json"` writes the numbers
    of each partition as text (see `mmsplit.load_partition_json`); `on_estimate` gets about how many bytes that will be
    before it begins, and it is refused above `max_bytes`, None for no limit.

    With `root_digest` only the set of it is taken, or a partition of that set: everything is held to its digest, each
    chunk before it is decoded.

    `existing` says what to do about an earlier export that is there: "refuse", "resume" (keep files that are right,
    make the rest), or "force", which replaces what that export wrote.  Files that no export wrote are never touched.
    A file gets its name when it is whole and durable, the index last.  Raises any branch of `MmsplitError`.
    """
    if existing not in get_args(Existing):
        raise RequestError(f"no such way with existing output: {existing!r}", expected=", ".join(get_args(Existing)))
    if to not in get_args(To):
        raise RequestError(f"no such form of an export: {to!r}", expected=" or ".join(get_args(To)))
    request = PlanRequest(
        num_parts=num_parts,
        by=by,
        weights=weights,
        boundaries=boundaries,
        tied=tied,
        split_by=split_by,
        rule=rule,
    )
    is_planned = split_by != "layer" or any(
        value is not None for value in (num_parts, weights, boundaries, rule, nodes)
    )
    opened: ExportSource
    if not isinstance(source, Checkpoint) and hub_address_of(source, hub) is None and holds_partitions(Path(source)):
        if is_planned:
            raise RequestError(
                "these are partitions already; a plan is for a checkpoint",
                path=source,
                hint=f"To cut a set anew, use mmsplit repartition {source} … first, or give the checkpoint.",
            )
        opened = SetSource(Path(source), part_ids, io, root_digest)
    else:
        if root_digest is not None:
            raise RequestError(
                "a root digest is that of a partition set, and this is none",
                path=str(source) if isinstance(source, str | Path) else source.model_id,
                hint="Leave --root out, or give the set.",
            )
        if not is_planned and part_ids is None:
            request = PlanRequest(num_parts=1, tied=tied)
        checkpoint = open_source(source, hub, allow_unknown_dtypes=allow_unknown_dtypes)
        # As a split does: machines that export their own partitions, and those that split, must agree on the plan.
        checkpoint = fold_equal_tensors(checkpoint, io, progress)
        plan = plan_for_nodes_or_parts(checkpoint, request, nodes)
        opened = CheckpointSource(checkpoint, plan, part_ids, io)
    with closing(opened):
        if opened.directory is not None and Path(output).resolve() == opened.directory.resolve():
            raise RequestError("output is the directory of the source", path=output, hint="Choose another directory.")
        form: ExportForm
        if to == "json":
            form = JsonForm(opened)
            _require_small(sum(form.file_bytes.values()), max_bytes, on_estimate)
        else:
            form = SafetensorsForm(opened, max_shard_bytes)
        with OutputDirectory(Path(output)) as out:
            finished = ExportRun(opened, form, out).execute(existing, thread_count(threads), progress)
        return ExportResult(
            path=Path(output),
            to=to,
            num_parts=opened.num_parts,
            part_ids=tuple(partition.part_id for partition in opened.partitions),
            files=finished.files,
            kept=finished.kept,
            total_params=form.total_params,
            moved_bytes=opened.storage.moved_bytes,
            notes=(*opened.notes, *notes_on_ties(opened.partitions), *form.notes),
        )


def _require_small(size_bytes: int, max_bytes: int | None, on_estimate: Callable[[int], None] | None) -> None:
    if on_estimate is not None:
        on_estimate(size_bytes)
    if max_bytes is not None and size_bytes > max_bytes:
        raise RequestError(
            "as JSON this would be too large",
            expected=f"at most {max_bytes:,} bytes",
            found=f"about {size_bytes:,}",
            hint="JSON is for small models. Use --yes (in Python: max_bytes=None) to write it all the same, or --to"
            " safetensors.",
        )
