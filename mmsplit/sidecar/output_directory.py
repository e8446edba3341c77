"""The directory a set is written to: who may write there, what is there already, what an unfinished run left.

Only one run at a time (an advisory lock that dies with its process).  From the first byte to the last a file
`unfinished_split.json` says what the run is making, so that a later one can tell whether it may continue it; the set
manifest is written when everything else is there, and then the state goes away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import xxhash

from mmsplit.durable import make_directory, remove_empty
from mmsplit.errors import MmsplitError, NoSpaceError, OutputError, OutputExistsError, OutputLockedError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.file_names import STATE_NAME as STATE_NAME
from mmsplit.sidecar.framing import MAGIC
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.manifest import manifest_name, parse_manifest, payload_name
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX, output_errors, sync_directory, write_whole_file
from mmsplit.sidecar.parity_layout import PARITY_MAGIC, PARITY_SUFFIX
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, SetManifest, parse_set_manifest

STATE_FORMAT: Final = "mmsplit-unfinished"
#: What is in the set's directory while its partitions are deleted by a merge.
UNFINISHED_MERGE_NAME: Final = "unfinished_merge.json"
#: Fields of the state of a split that consumes its source: what is kept of the source, and the shards that may be gone.
KEPT_SOURCE_KEY: Final = "kept_source"
DELETED_KEY: Final = "deleted_shards"
LOCK_NAME: Final = ".mmsplit.lock"
_OURS: Final = re.compile(
    r"^(partition_\d+\.(json|bin|parity)(\.partial|\.journal)?"
    r"|(partition_set|unfinished_split|unfinished_merge)\.json(\.partial)?)$",
    re.ASCII,
)
_PARTITION: Final = re.compile(r"^partition_(\d+)\.", re.ASCII)

#: What a person calls the fields by which two runs differ.
_WORDS: Final = {
    "model_id": "model id",
    "num_parts": "number of partitions",
    "part_ids": "choice of partitions",
    "plan_digest": "plan",
}

#: What to do about output that is there already: refuse, continue an unfinished run, or replace what mmsplit wrote.
Existing = Literal["refuse", "resume", "force"]
Found = Literal["nothing", "partitions", "unfinished", "finished"]


class OutputDirectory:
    """An output directory, locked from `__enter__` to `__exit__`.  What it made is removed if an error leaves it empty.

    `small_files` are those that earlier runs wrote here, by name the SHA-256 of what they may hold; `prepare` finds
    them in the set or unfinished run that it continues or removes; None where that cannot be read.  `neighbours` are
    the ids of finished partitions of the same plan that stay as they are beside those that this run writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.small_files: Mapping[str, Sequence[str]] | None = {}
        self.neighbours: frozenset[int] = frozenset()
        self._own_names: list[str] = []
        self._lock_fd = -1
        self._made: list[Path] = []

    def __enter__(self) -> OutputDirectory:
        with output_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise OutputExistsError("output is not a directory", path=self.path, hint="Give another -o DIR.")
            self._made = make_directory(self.path)
        with output_errors(self.path / LOCK_NAME):
            self._lock_fd = _lock(self.path / LOCK_NAME)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that was refused leaves nothing behind, not even the directory that it made.
        _unlock(self.path / LOCK_NAME, self._lock_fd, [] if error is None else self._made)
        self._lock_fd = -1

    def prepare(
        self, identity: Mapping[str, object], existing: Existing, part_ids: Collection[int] | None = None
    ) -> Found:
        """Settle what is there already and return what this run starts from.

        `identity` says what the run makes; only a run of the same identity may be continued.  A finished set records
        less of it (not the encoder), as do single partitions, and they are held to that.  `part_ids` are the
        partitions that the run writes, None for all; finished ones of the same plan may be there without a set
        manifest.  Raises `OutputExistsError`; nothing is removed that mmsplit did not write, and that only
        with "force".
        """
        manifest_path = self.path / SET_MANIFEST_NAME
        if existing == "force":
            self.require_no_only_copy()
            self._find_own_files(part_ids)
            there = self._finished_partitions(identity, set(self._own_names))
            self.neighbours = there
            return "nothing"
        state = self._read_state()
        if state is not None:
            if state.get(DELETED_KEY):
                # To start again is no way out: partitions of an older encoder and of this one make a sound set, too.
                identity = {key: value for key, value in identity.items() if key != "encoder"}
            self._require_same(state, identity, existing, "an unfinished split")
            self.small_files = self._recorded_small_files()
            if part_ids is not None:
                # Killed between the set manifest and the end of the state, a run leaves both.
                own = {name for name in self._listing() if _part_id_of(name) in (None, *part_ids)}
                self.neighbours = self._finished_partitions(identity, own)
            return "unfinished"
        if manifest_path.exists():
            manifest = self._read_set_manifest()
            recorded = _identity_of(manifest)
            wanted = {key: identity[key] for key in recorded}
            self._require_same(recorded, wanted, existing, "a finished partition set")
            self._require_complete(manifest)
            return "finished"
        there = self._finished_partitions(identity, set())
        wanted_there = there if part_ids is None else there & frozenset(part_ids)
        if wanted_there and existing == "refuse":
            raise OutputExistsError(
                f"partition {min(wanted_there)} of this split is there already",
                path=self.path,
                hint="Use --resume to keep it, or --force to write it again.",
            )
        self.neighbours = there - wanted_there
        self.small_files = self._recorded_small_files()
        return "partitions" if there else "nothing"

    def _finished_partitions(self, identity: Mapping[str, object], ignored: Collection[str]) -> frozenset[int]:
        """Return the ids of finished partitions; raises unless all files of ours are of such, of the same identity.

        Files named in `ignored` do not count, nor what a run left that was killed while it wrote its first state.
        """
        names = [name for name in self._listing() if _OURS.match(name) and name not in ignored]
        names = sorted(name for name in names if not name.startswith(STATE_NAME))
        found = set()
        for name in names:
            part_id = _part_id_of(name)
            if part_id is None or not {manifest_name(part_id), payload_name(part_id)} <= set(names):
                raise OutputExistsError(
                    f"output holds {name}, but neither a set manifest nor an unfinished run",
                    path=self.path,
                    hint="Choose another directory, or use --force to replace what mmsplit wrote there.",
                )
            found.add(part_id)
        for part_id in found:
            self._require_same_origin(self.path / manifest_name(part_id), identity)
        return frozenset(found)

    def _require_same_origin(self, path: Path, identity: Mapping[str, object]) -> None:
        try:
            manifest = parse_manifest(read_regular(path), str(path))
        except (MmsplitError, OSError) as error:
            raise OutputExistsError(
                f"output holds a partition that cannot be read: {error}",
                path=path,
                hint="Choose another directory, or use --force to replace what mmsplit wrote there.",
            ) from error
        there = {
            "source": manifest.source_digest,
            "plan": manifest.plan_digest,
            "model_id": manifest.model_id,
            "revision": manifest.revision,
        }
        self._require_same(there, {key: identity.get(key) for key in there}, "resume", "a partition")

    def write_state(self, state: Mapping[str, object]) -> None:
        """Record what the run makes and what it knows so far."""
        body = {"format": STATE_FORMAT, **state}
        text = json.dumps({**body, "xxh3": _state_checksum(body)}, indent=1) + "\n"
        write_whole_file(self.path / STATE_NAME, text.encode())

    def read_state(self) -> Mapping[str, object]:
        """Return what the unfinished run recorded; empty if there is none."""
        return self._read_state() or {}

    def finish_partitions(self) -> None:
        """End the unfinished state without a set manifest: partitions are there, and others are still missing."""
        with output_errors(self.path):
            (self.path / STATE_NAME).unlink(missing_ok=True)
        sync_directory(self.path)

    def finish(self, set_manifest: bytes) -> None:
        """Write the set manifest, which makes the set a set, and end the unfinished state."""
        write_whole_file(self.path / SET_MANIFEST_NAME, set_manifest)
        with output_errors(self.path):
            (self.path / STATE_NAME).unlink(missing_ok=True)
        sync_directory(self.path)

    def require_space(self, needed_bytes: int, what: str) -> None:
        """Raise `NoSpaceError` if the file system has less than `needed_bytes` free for this user."""
        free = free_bytes(self.path) + self.reclaimable_bytes
        if free < needed_bytes:
            raise NoSpaceError(
                f"too little free space for {what}",
                path=self.path,
                expected=f"{needed_bytes:,} bytes free",
                found=free,
                hint=f"Free {needed_bytes - free:,} bytes more, or choose another directory.",
            )

    def _read_state(self) -> dict[str, object] | None:
        return read_state_file(self.path / STATE_NAME)

    def require_no_only_copy(self) -> None:
        """Raise `OutputExistsError` if partitions here are all that is left of something: they are not replaced."""
        if (self.path / UNFINISHED_MERGE_NAME).exists():
            raise OutputExistsError(
                "output is a set that mmsplit merge --consume has begun to delete: the rest of it is the only copy",
                path=self.path,
                hint="Finish that merge with --resume, or choose another directory.",
            )
        try:
            may_be = bool(self.read_state().get(DELETED_KEY))
        except OutputExistsError:
            with output_errors(self.path / STATE_NAME):
                may_be = KEPT_SOURCE_KEY.encode() in read_regular(self.path / STATE_NAME)
        if may_be:
            raise OutputExistsError(
                "output holds what mmsplit split --consume has deleted from its source: it is the only copy",
                path=self.path,
                hint="Go on with --consume --resume, or choose another directory.",
            )

    def _read_set_manifest(self) -> SetManifest:
        path = self.path / SET_MANIFEST_NAME
        try:
            return parse_set_manifest(read_regular(path), str(path))
        except (MmsplitError, OSError) as error:
            raise OutputExistsError(
                f"output holds a set manifest that cannot be read: {error}",
                path=path,
                hint="Choose another directory, or use --force to replace what mmsplit wrote there.",
            ) from error

    def _require_same(
        self, there: Mapping[str, object], identity: Mapping[str, object], existing: Existing, what: str
    ) -> None:
        different = [key for key, value in identity.items() if there.get(key) != value]
        if existing == "resume" and not different:
            return
        if different:
            words = (_WORDS.get(key, key.replace("_", " ")) for key in different)
            reason = f"output holds {what} of another {', '.join(words)}"
            hint = "Choose another directory, or use --force to replace it."
            if there.get(DELETED_KEY):
                hint = "Shards of its source are deleted, and it has the only copy: choose another directory."
            if different == ["revision"] and there.get("revision") and existing == "resume":
                hint = f"To go on with that one: --revision {there['revision']}. {hint}"
            if different == ["model_id"] and there.get("model_id"):
                hint = (
                    "The id is the name of the source's directory unless split is told --model-id; to go on with what"
                    f" is there: --model-id {there['model_id']}. {hint}"
                )
        else:
            reason = f"output holds {what} of the same source and plan"
            hint = "Use --resume to go on from there, or --force to start again."
            if there.get(DELETED_KEY):
                hint = "Use --consume --resume to go on from there: shards of its source are deleted."
        expected, found = (values.get("model_id") if "model_id" in different else None for values in (identity, there))
        raise OutputExistsError(reason, path=self.path, expected=expected, found=found, hint=hint)

    def _require_complete(self, manifest: SetManifest) -> None:
        """Raise if files of a finished set are gone or of another length; to look inside them is `verify`'s task."""
        sizes: dict[str, int | None] = {entry.name: entry.size_bytes for entry in manifest.files}
        for partition in manifest.partitions:
            sizes |= {partition.manifest_file: None, partition.payload_file: partition.payload_bytes}
        for name, size in sizes.items():
            path = self.path / name
            if not path.is_file() or size not in (None, path.stat().st_size):
                raise OutputExistsError(
                    "output holds a finished partition set, but this file of it is missing or of another size",
                    path=path,
                    hint="Bring it back, or use --force to split again.",
                )

    def _listing(self) -> list[str]:
        with output_errors(self.path):
            return os.listdir(self.path)

    def _find_own_files(self, part_ids: Collection[int] | None) -> None:
        """Find what mmsplit wrote here, for `remove_own_files`; a foreign file with a name of ours is refused.

        With `part_ids`, the files of other partitions are left alone.
        """
        names = [name for name in self._listing() if _OURS.match(name)]
        if part_ids is not None:
            names = [name for name in names if _part_id_of(name) in (None, *part_ids)]
        for name in names:
            if not _is_ours(self.path / name):
                raise OutputExistsError(
                    "file has a name of mmsplit's, but mmsplit did not write it",
                    path=self.path / name,
                    hint="Move it away, or choose another directory.",
                )
        self.small_files = self._recorded_small_files()
        self._own_names = names

    @property
    def reclaimable_bytes(self) -> int:
        """Length of the files that `remove_own_files` will remove."""
        with output_errors(self.path):
            return sum((self.path / name).stat().st_size for name in self._own_names)

    def remove_own_files(self) -> None:
        """With "force", remove what mmsplit wrote: set manifest first, so that what is left never passes for a set.

        To be called when nothing else can refuse the run any more.
        """
        names, self._own_names = self._own_names, []
        if names:
            # Until there is a new state, what is left is an unfinished run that knows which files are ours.
            self.write_state({"files": self.small_files or {}})
        names = [name for name in names if name != STATE_NAME]
        names.sort(key=lambda name: not name.startswith(SET_MANIFEST_NAME))
        with output_errors(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)

    def _recorded_small_files(self) -> dict[str, list[str]] | None:
        """Return the small files that the set, or the unfinished run, says are its own; None if it cannot be read."""
        try:
            files = self.read_state().get("files")
            if isinstance(files, dict):
                return {name: list(digests) for name, digests in files.items()}
            if (self.path / SET_MANIFEST_NAME).exists():
                return {entry.name: [entry.sha256] for entry in self._read_set_manifest().files}
        except OutputExistsError:
            return None
        # Beside single partitions nobody recorded who wrote them.
        return None if any(_part_id_of(name) is not None for name in self._listing()) else {}


def read_state_file(path: Path) -> dict[str, object] | None:
    """Return the state of an unfinished run, None if there is none; it is believed only whole: it holds digests.

    Raises `OutputExistsError`.
    """
    what = "it is not what was written"
    try:
        state = json.loads(read_regular(path).decode())  # strictly UTF-8, which is what is written
        if isinstance(state, dict) and state.pop("xxh3", None) == _state_checksum(state):
            return state
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        what = str(error)
    raise OutputExistsError(
        f"cannot read the state of an unfinished run: {what}", path=path, hint="Use --force to start again."
    )


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write to the file system of `path`."""
    with output_errors(path):
        return shutil.disk_usage(path).free


def _identity_of(manifest: SetManifest) -> dict[str, object]:
    return {
        "source": manifest.source_digest,
        "plan": manifest.plan_digest,
        "codec": manifest.codec,
        "model_id": manifest.model_id,
        "revision": manifest.revision,
    }


def _part_id_of(name: str) -> int | None:
    """Return which partition a file name of ours belongs to; None for the set's own files."""
    found = _PARTITION.match(name)
    return int(found[1]) if found else None


def _state_checksum(state: Mapping[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(state, sort_keys=True).encode())


def _is_ours(path: Path) -> bool:
    """Whether a file that has a name of ours has our content, too.

    A journal and half a JSON have no mark and go by their name; a payload has its header before anything else, or,
    after a loss of power, zeros in the place of a header that had not reached the disk.
    """
    if not path.is_file() or path.is_symlink():
        return False
    if path.name.endswith((".journal", f".json{PARTIAL_SUFFIX}")):
        return True
    with output_errors(path), path.open("rb") as file:
        head = file.read(DATA_START)
    if PARITY_SUFFIX in path.name:
        return not any(head) or head.startswith(PARITY_MAGIC)
    if path.name.endswith(f".bin{PARTIAL_SUFFIX}"):
        return not any(head) or head.startswith(MAGIC)
    return head.startswith(MAGIC) if path.suffix == ".bin" else b'"mmsplit-' in head


def _lock(path: Path) -> int:
    """Take the lock file's lock; the loser of a race with its removal tries again on the new file."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # a run that was refused has removed the directory that it had made
            make_directory(path.parent)
            continue
        try:
            if not _try_lock(fd):
                raise OutputLockedError(
                    "another run is writing to this output", path=path.parent, hint="Wait until it has ended."
                )
            try:
                same = os.path.samestat(os.fstat(fd), path.stat())
            except FileNotFoundError:
                same = False
        except BaseException:
            os.close(fd)
            raise
        if same:
            return fd
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):
            return False
        raise OutputError(f"cannot lock the output: {error.strerror}") from error
    return True


def _unlock(path: Path, fd: int, made: Iterable[Path]) -> None:
    """Give the lock back, and remove directories that were `made` and are empty; that still under the lock."""
    if fd < 0:
        return
    try:
        if os.name != "nt":  # Windows cannot remove a file that is open
            path.unlink(missing_ok=True)
    except OSError:
        pass  # a lock file that stays does no harm
    remove_empty(made)
    os.close(fd)
