"""`repair`: what is damaged in a set, made again from what it can be made from, and nothing else touched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from mmsplit.checkpoint import Checkpoint
from mmsplit.digests import parse_root_digest
from mmsplit.errors import FormatError, RequestError
from mmsplit.remote.source import HubOptions
from mmsplit.repairing.ledger import Ledger, Mended
from mmsplit.repairing.parity_copy import ParityCopy
from mmsplit.repairing.parity_upkeep import mend_parity
from mmsplit.repairing.partition_repair import PartitionRepair, RepairOptions
from mmsplit.repairing.set_files import FoundSet, find_set_manifest, repair_small_files, write_set_manifest
from mmsplit.repairing.sources import RepairSource, SetCopy, open_repair_source
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.part_ids import part_ids_in
from mmsplit.sidecar.partition_reader import Fault
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.sidecar.set_reader import resolve_set_path
from mmsplit.workers import ProgressCallback, thread_count

#: What is looked at, as in `verify`: structure; and every stored byte; and what it decodes to.
RepairLevel = Literal["quick", "stored", "full"]

_PARTITION: Final = re.compile(r"^partition_(\d+)\.(json|bin)$", re.ASCII)


class RepairResult(NamedTuple):
    """What a repair did; `ok` says that all that was looked at is as it was written now.

    `mended` is what was made again, `problems` what is still damaged, each in file order.  `source_bytes` were read
    from the sources, their headers left out.  After a dry run `mended` is what would be made again, and `ok` says that
    there was nothing to do.
    """

    ok: bool
    path: Path
    dry_run: bool
    root_digest: str | None
    partitions: tuple[int, ...]
    mended: tuple[Mended, ...]
    problems: tuple[Fault, ...]
    source_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return what `repair --json` shows."""
        return {
            "ok": self.ok,
            "path": str(self.path),
            "dry_run": self.dry_run,
            "root_digest": self.root_digest,
            "partitions": list(self.partitions),
            "mended": [mended._asdict() for mended in self.mended],
            "problems": [fault._asdict() for fault in self.problems],
            "source_bytes": self.source_bytes,
        }


def repair(
    path: str | Path,
    source: str | Path | Checkpoint | Sequence[str | Path | Checkpoint] | None = None,
    *,
    only: Sequence[int] | None = None,
    level: RepairLevel = "stored",
    rebuild_manifest: bool = False,
    root_digest: str | None = None,
    dry_run: bool = False,
    hub: HubOptions | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> RepairResult:
    """Repair a partition set (its directory) or one partition (its manifest or payload); byte for byte as it was.

    `source` is the checkpoint that was split (a path, a model of the Hub), or another copy of the set (a directory, or
    a place as `pull` takes it), or several of these, asked in order.  Without one, repair does what the set itself is
    enough for: manifests, file headers, chunk indexes, trailers, padding.  Parity files beside the payloads are used
    before any source, and made again if they are damaged themselves, or of another payload.

    Of a damaged chunk just its own bytes are read from the source; they are compared with the record before they
    replace anything, and read back after.  A payload that is missing is made as a whole.  `only` restricts that to some
    partitions, `level` says how closely to look, and `rebuild_manifest` looks at the manifests alone.  `dry_run` writes
    nothing and reads no source.

    With `root_digest` only that very set is repaired, and a chunk that was forged, so that its checksum fits, is
    damage, too (without one, at level "full"); what cannot be tied to the root is left alone.

    Interrupted at any moment, the set is not worse than before, and the same call goes on.  What cannot be repaired is
    a result, not an error.  Raises `FormatError` where there is no set, `OutputError`, and what opening a source
    raises.
    """
    if level not in get_args(RepairLevel):
        raise RequestError(f"no such level: {level!r}", hint=f"Possible are {', '.join(get_args(RepairLevel))}.")
    root, one = resolve_set_path(Path(path))
    root_digest = None if root_digest is None else parse_root_digest(root_digest)
    hub = hub or HubOptions()
    options = RepairOptions(
        check_chunks=level != "quick",
        decode=level == "full",
        only_manifests=rebuild_manifest,
        is_bound=root_digest is not None,
        dry_run=dry_run,
        threads=thread_count(threads),
        connections=hub.connections,
        progress=progress,
    )
    wanted = _wanted_parts(one, only)
    with ExitStack() as stack:
        sources = _open_sources(source, hub, root, stack)
        if not dry_run:
            stack.enter_context(OutputDirectory(root))
        run = _RepairRun(root, sources, options)
        return run.execute(wanted, is_set=one is None, root_digest=root_digest)


class _RepairRun:
    """One call of `repair`, on a directory that is locked unless nothing is written."""

    def __init__(self, root: Path, sources: tuple[RepairSource, ...], options: RepairOptions) -> None:
        self._root = root
        self._sources = sources
        self._options = options
        self._ledger = Ledger()

    def execute(self, wanted: tuple[int, ...] | None, *, is_set: bool, root_digest: str | None) -> RepairResult:
        found = self._set_manifest(is_set, root_digest)
        # Where a root is demanded and nothing ties the partitions to it, nothing says what they should be.
        part_ids = () if found is None and self._options.is_bound else self._part_ids(found, wanted)
        manifest = None if found is None else found.manifest
        digests = {} if manifest is None else {entry.part_id: entry.manifest_sha256 for entry in manifest.partitions}
        with closing(ParityCopy(self._root, digests)) as parity:
            repair = PartitionRepair(
                self._root, manifest, self._all_parts(found), self._sources, parity, self._ledger, self._options
            )
            with closing(repair):
                for part_id in part_ids:
                    repair.repair(part_id)
        if not self._options.only_manifests:
            for part_id in part_ids:
                mend_parity(self._root, part_id, self._ledger, self._options)
        if found is not None and is_set:
            dry_run = self._options.dry_run
            if not self._options.only_manifests:
                repair_small_files(self._root, found.manifest, self._sources, self._ledger, dry_run=dry_run)
            # Last, as it was written: it makes the set a set.
            write_set_manifest(self._root, found, self._ledger, dry_run=dry_run)
        mended, problems = self._ledger.mended(), self._ledger.left()
        return RepairResult(
            ok=not problems and not (self._options.dry_run and mended),
            path=self._root,
            dry_run=self._options.dry_run,
            root_digest=None if found is None else found.manifest.root_digest,
            partitions=part_ids,
            mended=mended,
            problems=problems,
            source_bytes=sum(source.read_bytes for source in self._sources),
        )

    def _set_manifest(self, is_set: bool, root_digest: str | None) -> FoundSet | None:
        """Return the set manifest; a single partition does without one, if nobody asks for a root digest."""
        copies = tuple(source for source in self._sources if isinstance(source, SetCopy))
        path = self._root / SET_MANIFEST_NAME
        if not is_set and root_digest is None and not path.exists():
            return None
        found = find_set_manifest(self._root, copies, root_digest)
        if isinstance(found, FoundSet):
            return found
        if is_set or root_digest is not None:
            if not path.exists() and not part_ids_in(self._root):
                raise FormatError("no partition set here", path=self._root, hint="To get a set, use mmsplit pull.")
            self._ledger.leave(Fault(str(path), found))
        return None

    def _all_parts(self, found: FoundSet | None) -> tuple[int, ...]:
        return part_ids_in(self._root) if found is None else tuple(range(len(found.manifest.partitions)))

    def _part_ids(self, found: FoundSet | None, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        there = self._all_parts(found)
        if wanted is None:
            return there
        for part_id in wanted:
            if part_id not in there:
                raise RequestError(
                    f"no partition {part_id!r} in this set",
                    path=self._root,
                    hint=f"It has the partitions {', '.join(map(str, there))}.",
                )
        return tuple(sorted(set(wanted)))


def _wanted_parts(one: Path | None, only: Sequence[int] | None) -> tuple[int, ...] | None:
    if one is None:
        if only is not None and not only:
            raise RequestError("no partition is asked for", hint="Leave `only` out to repair all.")
        return None if only is None else tuple(only)
    match = _PARTITION.match(one.name)
    if match is None:
        raise FormatError("not the name of a partition", path=one, hint="Give a directory or a partition_K.json.")
    if only is not None and tuple(only) != (int(match[1]),):
        raise RequestError("one partition is named, and others are asked for", path=one, hint="Name the directory.")
    return (int(match[1]),)


def _open_sources(
    source: str | Path | Checkpoint | Sequence[str | Path | Checkpoint] | None,
    hub: HubOptions,
    root: Path,
    stack: ExitStack,
) -> tuple[RepairSource, ...]:
    if source is None:
        return ()
    given = [source] if isinstance(source, str | Path | Checkpoint) else list(source)
    opened = []
    for each in given:
        place = open_repair_source(each, hub)
        stack.callback(place.close)
        if place.directory is not None and place.directory.resolve() == root.resolve():
            raise RequestError("the source is the set itself", path=root, hint="Give another copy, or the checkpoint.")
        opened.append(place)
    return tuple(opened)
