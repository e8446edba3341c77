"""`pull`: get a published partition set, or some of its partitions, verified on arrival and resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmsplit.digests import parse_root_digest
from mmsplit.errors import MmsplitError, OutputExistsError, RemoteNotFoundError, RequestError
from mmsplit.remote.set_source import SetSource, open_set_source
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.output_directory import OutputDirectory
from mmsplit.sidecar.partition_check import find_partition_fault
from mmsplit.sidecar.partition_receiver import PartitionReceiver, Received
from mmsplit.sidecar.receiving_directory import PublishedSet, ReceivingDirectory, read_published_set
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, FileEntry, SetManifest
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup, thread_count


class PullResult(NamedTuple):
    """What a pull got.  `source` is where from, `commit` the Hub's commit of it.

    `fetched_bytes` are all that were fetched, `present_bytes` those of payloads and small files that were there.
    """

    path: Path
    source: str
    commit: str | None
    root_digest: str
    manifest: SetManifest
    partitions: tuple[Received, ...]
    fetched_bytes: int
    present_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return what `pull --json` shows."""
        return {
            "path": str(self.path),
            "source": self.source,
            "commit": self.commit,
            "model_id": self.manifest.model_id,
            "root_digest": self.root_digest,
            "num_parts": len(self.manifest.partitions),
            "partitions": [
                {**received._asdict(), "payload_bytes": self.manifest.partitions[received.part_id].payload_bytes}
                for received in self.partitions
            ],
            "fetched_bytes": self.fetched_bytes,
            "present_bytes": self.present_bytes,
        }


def pull(
    source: str | Path,
    output: str | Path,
    *,
    only: Sequence[int] | None = None,
    root_digest: str | None = None,
    hub: HubOptions | None = None,
    force: bool = False,
    threads: int | None = None,
    direct: bool = True,
    progress: ProgressCallback | None = None,
) -> PullResult:
    """Get the partition set that is published at `source` into the directory `output`; with `only`, those partitions.

    `source` is what `remote.set_source` describes: a model of the Hub or a folder of it, the address of a folder, a
    directory.  With `root_digest` only that very set is taken.  `hub.connections` ranges are fetched at once, wherever
    they lie; `threads` hash what is there already.

    Everything is compared with the set manifest before it counts as there.  Interrupted at any moment, the same call
    goes on: it hashes what is on disk and fetches what is missing.  A finished partition that is not as published is
    an error, unless `force` is given: then what is wrong in it is fetched again, and another set of mmsplit's that lies
    there is replaced.  Raises any branch of `MmsplitError` but `CheckpointError`.
    """
    hub = hub or HubOptions()
    if hub.connections < 1:
        raise RequestError("cannot work without a connection", found=hub.connections)
    place = open_set_source(source, hub)
    if place.directory is not None and place.directory.resolve() == Path(output).resolve():
        raise RequestError("output is the directory of the source", path=output, hint="Choose another directory.")
    published = _find_set(place, None if root_digest is None else parse_root_digest(root_digest))
    wanted = _wanted(published, only)
    with OutputDirectory(Path(output)) as out:
        run = _PullRun(place, published, out, hub, thread_count(threads), progress)
        return run.execute(wanted, force=force, direct=direct)


def _find_set(place: SetSource, root_digest: str | None) -> PublishedSet:
    try:
        return read_published_set(place.open(SET_MANIFEST_NAME), root_digest)
    except RemoteNotFoundError as error:
        raise RemoteNotFoundError(
            f"no partition set there: {error.what}",
            path=error.path or place.location,
            hint=f"Give the place that has {SET_MANIFEST_NAME}; on the Hub a folder is written org/name:folder."
            + (f" {error.hint}" if error.hint else ""),
        ) from None


def _wanted(published: PublishedSet, only: Sequence[int] | None) -> tuple[int, ...]:
    count = len(published.manifest.partitions)
    if only is None:
        return tuple(range(count))
    for part_id in only:
        if type(part_id) is not int or not 0 <= part_id < count:
            raise RequestError(
                f"no partition {part_id!r} in this set",
                path=published.location,
                hint=f"It has the partitions 0 to {count - 1}.",
            )
    if not only:
        raise RequestError("no partition is asked for", hint="Leave `only` out to get all.")
    return tuple(sorted(set(only)))


class _PullRun:
    """One call of `pull`: what is there, what is missing, the threads that get it, the set manifest."""

    def __init__(
        self,
        place: SetSource,
        published: PublishedSet,
        out: OutputDirectory,
        hub: HubOptions,
        threads: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._place = place
        self._published = published
        self._out = out
        self._connections = hub.connections
        self._threads = threads
        self._progress = progress

    def execute(self, wanted: Sequence[int], *, force: bool, direct: bool) -> PullResult:
        manifest = self._published.manifest
        directory = ReceivingDirectory(self._out, self._published, force=force)
        directory.look()
        files = directory.missing_files()
        receivers = [self._receiver(part_id, direct) for part_id in wanted]
        finished = self._finished(receivers, force) if directory.has_this_set else []
        missing = [receiver for receiver in receivers if receiver not in finished]
        needed = (
            sum(receiver.missing_bytes for receiver in missing)
            if directory.has_this_set
            else sum(receiver.entry.payload_bytes for receiver in missing)
        )
        self._out.require_space(needed + sum(entry.size_bytes for entry in files), "these partitions")
        directory.begin()
        fetched = len(self._published.data) + self._receive_files(directory, files)
        counter = ProgressCounter("pull", sum(receiver.entry.payload_bytes for receiver in missing), self._progress)
        received = {r.entry.part_id: Received(r.entry.part_id, 0, r.entry.payload_bytes) for r in finished}
        for receiver in missing:
            received[receiver.entry.part_id] = receiver.receive(self._place.open, counter.add)
        directory.finish()
        small = sum(entry.size_bytes for entry in manifest.files if entry not in files)
        return PullResult(
            self._out.path,
            self._place.location,
            self._place.commit,
            self._published.root_digest,
            manifest,
            tuple(received[part_id] for part_id in wanted),
            fetched + sum(each.fetched_bytes for each in received.values()),
            small + sum(each.present_bytes for each in received.values()),
        )

    def _receiver(self, part_id: int, direct: bool) -> PartitionReceiver:
        manifest = self._published.manifest
        return PartitionReceiver(
            self._out.path,
            manifest,
            manifest.partitions[part_id],
            connections=self._connections,
            threads=self._threads,
            direct=direct,
        )

    def _finished(self, receivers: Sequence[PartitionReceiver], force: bool) -> list[PartitionReceiver]:
        """Return the partitions that are there and right.  Raises for one that is there and wrong, unless `force`."""
        there = [receiver for receiver in receivers if receiver.is_there]
        counter = ProgressCounter("re-hash", sum(receiver.entry.payload_bytes for receiver in there), self._progress)
        right = []
        for receiver in there:
            fault = find_partition_fault(
                self._out.path, self._published.manifest, receiver.entry.part_id, self._threads, counter.add
            )
            if fault is None:
                right.append(receiver)
            elif not force:
                raise _not_as_published(receiver, fault)
        return right

    def _receive_files(self, directory: ReceivingDirectory, files: Sequence[FileEntry]) -> int:
        fetched: list[int] = []
        with WorkerGroup() as group:

            def make_worker() -> Callable[[FileEntry], None]:
                return lambda entry: fetched.append(directory.receive_file(entry, self._place.open, group.go_on))

            threads = min(self._connections, len(files))
            group.start_many("files", threads, JobStream(iter(files)), make_worker)
        return sum(fetched)


def _not_as_published(receiver: PartitionReceiver, fault: MmsplitError) -> OutputExistsError:
    return OutputExistsError(
        f"partition {receiver.entry.part_id} is there, but not as published: {fault.what}",
        path=fault.path,
        tensor=fault.tensor,
        offset=fault.offset,
        expected=fault.expected,
        found=fault.found,
        hint="Use --force to fetch again what is wrong in it.",
    )
