"""`push`: publish a partition set on the Hub, verified first, as one commit that nobody sees half of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from mmsplit.errors import IntegrityError, MissingPartitionError, MmsplitError, RemoteNotFoundError, RequestError
from mmsplit.remote.address import HubAddress, parse_hub_address
from mmsplit.remote.local_file import LocalFile
from mmsplit.remote.push_target import PushTarget, Upload
from mmsplit.remote.repository import HubRepository, hub_endpoint
from mmsplit.remote.set_source import parse_hub_folder
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.partition_check import find_partition_fault
from mmsplit.sidecar.receiving_directory import PublishedSet, read_published_set
from mmsplit.sidecar.set_card import CARD_MARK, format_card
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.sidecar.set_reader import missing_partitions, read_set_manifest
from mmsplit.workers import ProgressCallback, ProgressCounter, thread_count

_README: Final = "README.md"
#: The card's name where the model, or the repository's owner, has a README.
_OTHER_CARD: Final = "PARTITIONS.md"
_PARTITION_FILE: Final = re.compile(r"partition_\d+\.(json|bin)", re.ASCII)
_MOST_PAGE_BYTES: Final = 1 << 20


class PushResult(NamedTuple):
    """What was published.  `place` is what `pull` is given; `card` is the name of the page that says what it is."""

    path: Path
    place: str
    commit: str
    url: str
    root_digest: str
    file_count: int
    total_bytes: int
    card: str

    def as_json(self) -> dict[str, object]:
        """Return what `push --json` shows."""
        return {**self._asdict(), "path": str(self.path)}


def push(
    path: str | Path,
    target: str,
    *,
    private: bool = False,
    force: bool = False,
    hub: HubOptions | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    show_upload: bool = False,
) -> PushResult:
    """Publish the whole partition set in the directory `path` as `target`: `org/name[@branch][:folder]` on the Hub.

    Every stored byte is verified first (`threads` hash).  The repository is made if it is not there, `private` if so
    asked.  A page is added that says what the set is and how to use it: README.md, or PARTITIONS.md if the model or
    the repository has a README of its own.  Contents go up one by one, then one commit names them all; after an
    interrupt, the same call sends only what the Hub does not have.  Another set that is there, or a file of another
    content, is refused unless `force` is given.  `show_upload` lets huggingface_hub draw its progress on stderr.

    Raises `FormatError`, `IntegrityError`, `RequestError` and the branches of `NetworkError`.
    """
    hub = hub or HubOptions()
    root = Path(path)
    address, folder = _parse_target(target, hub)
    published = _read_set(root)
    remote = PushTarget(address, hub, show_progress=show_upload)
    push_run = _PushRun(root, published, remote, folder)
    there = remote.look()
    if there is not None:
        push_run.look_at(there, force)
    push_run.verify(thread_count(threads), progress)
    there = remote.create(private=private)
    push_run.look_at(there, force)
    return push_run.execute(there)


def _parse_target(target: str, hub: HubOptions) -> tuple[HubAddress, str]:
    endpoint = hub_endpoint(hub.endpoint)
    place = parse_hub_folder(target, endpoint)
    address = parse_hub_address(place.repository, endpoint)
    if address is None:
        raise RequestError(
            "not a model repository of the Hub", path=target, hint="Give org/name, org/name@branch or org/name:folder."
        )
    if hub.revision is not None and address.revision not in (None, hub.revision):
        raise RequestError("two branches are asked for", found=f"{address.revision} and {hub.revision}")
    return address._replace(revision=hub.revision or address.revision), place.folder


def _read_set(root: Path) -> PublishedSet:
    """Read the set as those will who pull it.  Raises for one that is not whole, before anybody is asked."""
    manifest = read_set_manifest(root)  # says best why there is none
    try:
        published = read_published_set(LocalFile(root / SET_MANIFEST_NAME))
    except RemoteNotFoundError as error:
        raise IntegrityError("set manifest went away", path=error.path) from error
    missing = missing_partitions(root, manifest)
    if missing:
        raise MissingPartitionError(
            f"partition {missing[0]} is not here, and only a whole set is published",
            path=root / manifest.partitions[missing[0]].payload_file,
            hint="Pull or copy it into the set, then run again.",
        )
    return published


class _PushRun:
    """One call of `push`: what is here, what is there, what goes up."""

    def __init__(self, root: Path, published: PublishedSet, target: PushTarget, folder: str) -> None:
        self._root = root
        self._published = published
        self._manifest = published.manifest
        self._target = target
        self._prefix = f"{folder}/" if folder else ""
        branch = "" if target.branch == "main" else f"@{target.branch}"
        self._place = f"{target.repo_id}{branch}{f':{folder}' if folder else ''}"
        self._deleted: list[str] = []
        self._card = _README

    def look_at(self, there: HubRepository, force: bool) -> None:
        """Decide what becomes of what is there.  Raises `RequestError` for what must not be replaced."""
        files = {file.name: file for file in there.files}
        manifest_name = self._prefix + SET_MANIFEST_NAME
        is_this_set = manifest_name in files and self._read_page(there, SET_MANIFEST_NAME) == self._published.data
        if manifest_name in files and not is_this_set and not force:
            self._refuse("the repository holds another partition set there", manifest_name)
        if not is_this_set and not force:
            for name, size, blob_id in self._iter_fingerprints():
                file = files.get(self._prefix + name)
                if file is not None and (file.size_bytes != size or (file.sha256 is None and file.blob_id != blob_id)):
                    self._refuse("the repository has another file of this name", file.name)
        own = {self._prefix + entry.manifest_file for entry in self._manifest.partitions}
        own |= {self._prefix + entry.payload_file for entry in self._manifest.partitions}
        self._deleted = [
            name
            for name in files
            if name.startswith(self._prefix)
            and _PARTITION_FILE.fullmatch(name.removeprefix(self._prefix))
            and name not in own
            and force
        ]
        self._card = self._card_name(there)

    def verify(self, threads: int, progress: ProgressCallback | None) -> None:
        """Hash every stored byte.  Raises the first thing that is not as it was written."""
        counter = ProgressCounter("verify", sum(entry.payload_bytes for entry in self._manifest.partitions), progress)
        for entry in self._manifest.partitions:
            fault = find_partition_fault(self._root, self._manifest, entry.part_id, threads, counter.add)
            if fault is not None:
                raise _damaged(fault)
        for file in self._manifest.files:
            found = hashlib.sha256(_read(self._root, file.name)).hexdigest()
            if file.sha256 != f"sha256:{found}":
                raise _damaged(
                    IntegrityError(
                        "file of the model is not as it was written",
                        path=self._root / file.name,
                        expected=file.sha256,
                        found=f"sha256:{found}",
                    )
                )

    def execute(self, there: HubRepository) -> PushResult:
        """Send all contents, the payloads each for itself, then commit."""
        payloads = [entry.payload_file for entry in self._manifest.partitions]
        others = [entry.manifest_file for entry in self._manifest.partitions]
        others += [entry.name for entry in self._manifest.files]
        card = format_card(self._manifest, self._published.root_digest, self._place, is_readme=self._card == _README)
        sent = []
        for name in payloads:
            sent += self._target.send([Upload(self._prefix + name, self._root / name)])
        sent += self._target.send(
            [
                *(Upload(self._prefix + name, self._root / name) for name in others),
                Upload(self._prefix + self._card, card),
                Upload(self._prefix + SET_MANIFEST_NAME, self._published.data),
            ]
        )
        message = f"Partition set of {self._manifest.model_id}, root digest {self._published.root_digest}"
        commit = self._target.commit(sent, self._deleted, message, there.commit)
        self._target.require_files(commit, {operation.path_in_repo: operation.upload_info.size for operation in sent})
        return PushResult(
            self._root,
            self._place,
            commit,
            f"{self._target.endpoint}/{self._target.repo_id}/commit/{quote(commit)}",
            self._published.root_digest,
            len(sent),
            sum(entry.payload_bytes for entry in self._manifest.partitions),
            self._prefix + self._card,
        )

    def _card_name(self, there: HubRepository) -> str:
        """The model's README belongs to the set, and one that people wrote belongs to them."""
        if any(entry.name == _README for entry in self._manifest.files):
            return _OTHER_CARD
        if self._prefix + _README not in there:
            return _README
        return _README if CARD_MARK.encode() in self._read_page(there, _README) else _OTHER_CARD

    def _read_page(self, there: HubRepository, name: str) -> bytes:
        size = there.file(self._prefix + name).size_bytes
        limit = max(_MOST_PAGE_BYTES, len(self._published.data))
        return there.read_file(self._prefix + name, limit) if size <= limit else b""

    def _iter_fingerprints(self) -> Iterator[tuple[str, int, str]]:
        """Yield name, length and git's id of the set's files; a payload is told by its length."""
        for entry in self._manifest.partitions:
            yield entry.payload_file, entry.payload_bytes, ""
            yield _fingerprint(self._root, entry.manifest_file)
        for file in self._manifest.files:
            yield _fingerprint(self._root, file.name)

    def _refuse(self, what: str, name: str) -> None:
        raise RequestError(
            what,
            path=f"{self._target.repo_id}@{self._target.branch}/{name}",
            hint="Choose another name, branch or folder, or use --force to replace it.",
        )


def _fingerprint(root: Path, name: str) -> tuple[str, int, str]:
    content = _read(root, name)
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return name, len(content), blob_id


def _read(root: Path, name: str) -> bytes:
    try:
        file = LocalFile(root / name)
    except RemoteNotFoundError as error:
        raise IntegrityError("file of the set is missing", path=error.path) from error
    return file.read(0, file.size_bytes)


def _damaged(fault: MmsplitError) -> IntegrityError:
    return IntegrityError(
        f"the set is damaged, and nothing was published: {fault.what}",
        path=fault.path,
        tensor=fault.tensor,
        offset=fault.offset,
        expected=fault.expected,
        found=fault.found,
        hint="See all damage with mmsplit verify.",
    )
