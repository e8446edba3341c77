"""One call of `export`: what is there, what is missing, the threads that write it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from mmsplit.digests import sha256_of
from mmsplit.errors import OutputError, OutputExistsError
from mmsplit.exporting.export_form import ExportForm, FileWriter
from mmsplit.exporting.export_record import ExportedFile, ExportRecord, read_record
from mmsplit.exporting.tensor import ExportSource
from mmsplit.exporting.weight_files import SUFFIX
from mmsplit.merging.lanes import write_files
from mmsplit.sidecar.output_directory import Existing, OutputDirectory
from mmsplit.sidecar.output_files import (
    output_errors,
    partial_path,
    sha256_of_file,
    sync_directory,
    write_whole_file,
)
from mmsplit.sidecar.set_manifest import FileEntry
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names
from mmsplit.workers import ProgressCallback, ProgressCounter

_INDEX_SUFFIX: Final = f"{SUFFIX}.index.json"


class FinishedExport(NamedTuple):
    """All files of an export, weights first; `kept` are the weights that were there already."""

    files: tuple[ExportedFile, ...]
    kept: tuple[str, ...]


class ExportRun:
    """Writes one export to a directory that is locked for it; `execute` is called once."""

    def __init__(self, source: ExportSource, form: ExportForm, out: OutputDirectory) -> None:
        self._source = source
        self._form = form
        self._out = out
        self._lock = threading.Lock()
        self._identity: dict[str, object] = {
            "to": form.name,
            "model_id": source.model_id,
            "revision": source.revision,
            "num_parts": source.num_parts,
            "part_ids": [partition.part_id for partition in source.partitions],
            "plan_digest": source.plan_digest,
            "layout": form.layout,
            "source": source.identity,
        }

    def execute(self, existing: Existing, threads: int, progress: ProgressCallback | None) -> FinishedExport:
        """Write what is missing.  Raises `OutputExistsError` for what is there and is not to be kept or replaced."""
        there = self._existing_record(existing)
        small_files = self._read_small_files()
        index = self._form.index
        weights = list(self._form.file_bytes)
        earlier = there if existing == "resume" else None
        kept = [] if earlier is None else [name for name in weights if earlier.is_whole(self._out.path, name)]
        todo = [name for name in weights if name not in kept]
        files = {name: ExportedFile(name) for name in weights}
        if earlier is not None:
            files.update({name: earlier.files[name] for name in kept})
        if index is not None:
            files[index[0]] = ExportedFile(index[0])
        record = ExportRecord(self._identity, files, {f.name: ExportedFile(*f) for f in small_files})
        self._require_free(record, there, small_files)
        self._require_space(todo, kept, there)
        # Nothing refuses any more.
        self._remove_old(there, kept, record)
        record.write(self._out.path)
        copy_small_files(self._source.storage, small_files, self._out.path)
        self._write(todo, record, threads, progress)
        self._source.require_unchanged()
        if index is not None:
            name, data = index
            write_whole_file(self._out.path / name, data)
            record.files[name] = ExportedFile(name, len(data), sha256_of(data))
        record._replace(complete=True).write(self._out.path)
        return FinishedExport((*record.files.values(), *record.small_files.values()), tuple(kept))

    def _existing_record(self, existing: Existing) -> ExportRecord | None:
        there = read_record(self._out.path)
        if there is None or existing == "force":
            return there
        what = "a finished export" if there.complete else "an unfinished export"
        identity = {key: value for key, value in there.identity.items() if key in self._identity}
        different = [key for key, value in self._identity.items() if identity.get(key) != value]
        if different:
            raise OutputExistsError(
                f"output holds {what} of another {', '.join(different).replace('_', ' ')}",
                path=self._out.path,
                hint="Choose another directory, or use --force to replace it.",
            )
        if existing == "refuse":
            raise OutputExistsError(
                f"output holds {what} of the same",
                path=self._out.path,
                hint="Use --resume to keep files that are right and make the rest, or --force to start again.",
            )
        return there

    def _read_small_files(self) -> tuple[FileEntry, ...]:
        if not self._form.takes_small_files:
            return ()
        known = {name: digest for name, digest in self._source.small_files.items() if digest is not None}
        return read_small_files(self._source.storage, list(self._source.small_files), known or None)

    def _require_free(self, record: ExportRecord, there: ExportRecord | None, small_files: Sequence[FileEntry]) -> None:
        """Raise `OutputExistsError` for files that no earlier export wrote, where ours or a loader would meet them."""
        ours = {} if there is None else there.files
        with output_errors(self._out.path):
            names = sorted(path.name for path in self._out.path.iterdir())
        for name in names:
            # A loader would take any weights for a part of the model.
            misleading = self._form.takes_small_files and name.endswith((SUFFIX, _INDEX_SUFFIX))
            if (name in record.files or misleading) and name not in ours:
                raise OutputExistsError(
                    "output holds a file that is not of an earlier export",
                    path=self._out.path / name,
                    hint="Choose another directory, or move it away.",
                )
        digests = None if there is None else _digests(there.small_files)
        require_free_names(self._out.path, small_files, digests)

    def _require_space(self, todo: Collection[str], kept: Collection[str], there: ExportRecord | None) -> None:
        old = () if there is None else there.files
        paths = [self._out.path / name for name in old if name not in kept]
        paths += [partial_path(self._out.path / name) for name in todo]
        with output_errors(self._out.path):
            there_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        needed = sum(self._form.file_bytes[name] for name in todo) - there_bytes
        self._out.require_space(needed, "the export")

    def _remove_old(self, there: ExportRecord | None, kept: Collection[str], record: ExportRecord) -> None:
        """Remove what an earlier export wrote and this one does not keep: the index first, since it vouches for all.

        Small files are replaced where they differ; those that the model of this export does not have go, too, unless
        somebody changed them.
        """
        if there is None:
            return
        names = sorted((name for name in there.files if name not in kept), key=lambda name: name.endswith(SUFFIX))
        # A part of a file that this export has, too, is written over.
        names += [partial_path(self._out.path / name).name for name in there.files if name not in record.files]
        digests = _digests(there.small_files)
        with output_errors(self._out.path):
            for name in there.small_files.keys() - record.small_files.keys():
                path = self._out.path / name
                if path.is_file() and [sha256_of_file(path)] == digests.get(name):
                    names.append(name)
            for name in names:
                (self._out.path / name).unlink(missing_ok=True)
        sync_directory(self._out.path)

    def _write(
        self, todo: Collection[str], record: ExportRecord, threads: int, progress: ProgressCallback | None
    ) -> None:
        counter = ProgressCounter("export", sum(self._form.raw_bytes[name] for name in todo), progress)
        writers: list[FileWriter] = []

        def finish(name: str, size_bytes: int, sha256: str) -> None:
            with self._lock:
                record.files[name] = ExportedFile(name, size_bytes, sha256)
                record.write(self._out.path)

        try:
            for name in todo:
                writers.append(self._form.open_writer(self._out.path, name, partial(finish, name)))
            write_files(
                writers,
                self._form.iter_spans,
                threads,
                counter,
                most_lanes=self._source.most_lanes,
                on_stop=self._source.cancel,
            )
        finally:
            for writer in writers:
                writer.close()
        for writer in writers:
            if not writer.path.is_file():
                raise OutputError("file was not finished", path=writer.path, hint="Run again with --resume.")


def _digests(files: Mapping[str, ExportedFile]) -> dict[str, list[str]]:
    return {name: [file.sha256] for name, file in files.items() if file.sha256 is not None}
