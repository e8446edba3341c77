"""Where downloaded files lie, as huggingface_hub lays them out, so that its own client finds and accepts them.

    CACHE/models--org--name/blobs/ETAG                     a content, named by its hash
    CACHE/models--org--name/snapshots/COMMIT/NAME          a link to it; where links cannot be made, the content
    CACHE/models--org--name/refs/REVISION                  the commit that a branch or tag stood for
    CACHE/.locks/models--org--name/ETAG.lock

    DIRECTORY/NAME                                         with --local-dir
    DIRECTORY/.cache/huggingface/download/NAME.metadata    commit, ETag and time of that file
    DIRECTORY/.cache/huggingface/download/NAME.lock

A content under construction is called ETAG.mmsplit.incomplete: a name that huggingface_hub never continues itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Final, Protocol

from mmsplit.durable import make_directory, sync_directory
from mmsplit.errors import RequestError
from mmsplit.regular_files import is_regular
from mmsplit.remote.disk import download_errors, write_small_file
from mmsplit.remote.file_download import PARTIAL_SUFFIX
from mmsplit.remote.repository import HubFile, HubRepository, is_safe_name

#: File times and clocks differ by this much without anybody having touched the file; huggingface_hub's own figure.
_TIME_SLACK_SECONDS: Final = 1.0


#: What a machine says that could make a link at another time; anything else says that there are no links here.
_SHORTAGES: Final = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.ENOMEM, errno.EINTR)


class Place(Protocol):
    """Where the files of one repository at one commit go."""

    @property
    def root(self) -> Path:
        """The folder that holds the files under their own names."""

    def path(self, file: HubFile) -> Path:
        """Where a file is found by its name."""

    def partial(self, file: HubFile) -> Path:
        """The file under construction; in the same file system as its final place."""

    def lock(self, file: HubFile) -> Path:
        """The lock file to hold while a file is made."""

    def find(self, file: HubFile) -> Path | None:
        """The content that stands for a file here, right or wrong; None if there is none."""

    def may_replace(self, file: HubFile) -> bool:
        """Whether a wrong content is nobody's own work."""

    def is_vouched_for(self, file: HubFile) -> bool:
        """Whether a content of the right length was checked when it got here, and was left alone since."""

    def is_in_place(self, file: HubFile) -> bool:
        """Whether a content that was found has its name and what huggingface_hub keeps of it."""

    def put_in_place(self, file: HubFile) -> None:
        """Give a right content that was found its name, and write huggingface_hub's notes.  Raises `OSError`."""

    def install(self, file: HubFile) -> None:
        """Turn the finished partial file into the file, in one step.  Raises `OSError`."""

    def finish(self, revision: str | None) -> None:
        """Write down what a revision stands for, when all files of it are here.  Raises `OutputError`."""


def default_cache_dir() -> Path:
    """The Hub cache that HF_HUB_CACHE and HF_HOME say."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class HubCache:
    """One repository at one commit in the Hub cache.  Implements `Place`."""

    def __init__(self, repository: HubRepository, cache_dir: Path | str | None = None) -> None:
        base = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self.cache_dir = base.expanduser().resolve()
        folder = f"models--{repository.repo_id.replace('/', '--')}"
        self.folder = self.cache_dir / folder
        self._locks = self.cache_dir / ".locks" / folder
        self._commit = repository.commit

    @property
    def root(self) -> Path:
        """The snapshot's folder."""
        return self.folder / "snapshots" / self._commit

    def path(self, file: HubFile) -> Path:
        """The link in the snapshot."""
        return self.root / file.name

    def blob(self, file: HubFile) -> Path:
        """The content, by its hash."""
        return self.folder / "blobs" / file.etag

    def partial(self, file: HubFile) -> Path:
        """Beside the blob."""
        return self.folder / "blobs" / f"{file.etag}{PARTIAL_SUFFIX}"

    def lock(self, file: HubFile) -> Path:
        """The lock that huggingface_hub takes for this content."""
        return self._locks / f"{file.etag}.lock"

    def find(self, file: HubFile) -> Path | None:
        """What the snapshot has, else the blob."""
        return next((path for path in (self.path(file), self.blob(file)) if is_regular(path)), None)

    def may_replace(self, file: HubFile) -> bool:  # noqa: ARG002
        """Whatever is called by a hash and does not have it is of no use to anybody."""
        return True

    def is_vouched_for(self, file: HubFile) -> bool:  # noqa: ARG002
        """A blob is called by its hash only after it was checked, by us, or arrived whole, by huggingface_hub."""
        return True

    def is_in_place(self, file: HubFile) -> bool:
        """Whether the snapshot has it."""
        return is_regular(self.path(file))

    def put_in_place(self, file: HubFile) -> None:
        """Link a blob that another snapshot brought, or copy it."""
        if not self._link(file):
            copy = self.partial(file)
            shutil.copyfile(self.blob(file), copy)
            os.replace(copy, self.path(file))
        sync_directory(self.path(file).parent)

    def install(self, file: HubFile) -> None:
        """Give the content its hash for a name, and link it; where links cannot be made it is moved to the snapshot."""
        blob = self.blob(file)
        os.replace(self.partial(file), blob)
        if not self._link(file):
            os.replace(blob, self.path(file))
        sync_directory(blob.parent)
        sync_directory(self.path(file).parent)

    def finish(self, revision: str | None) -> None:
        """Write refs/REVISION, unless the revision is the commit itself."""
        revision = revision or "main"
        path = self.folder / "refs" / revision
        if revision == self._commit:
            return
        if not is_safe_name(revision):
            raise RequestError(f"no name for a file: revision {revision!r}", path=path.parent)
        try:
            if path.read_text(encoding="utf-8") == self._commit:
                return  # as it should be; the cache may be one that only others may write to
        except (OSError, ValueError):
            pass
        with download_errors(path):
            write_small_file(path, self._commit)

    def _link(self, file: HubFile) -> bool:
        """Let the snapshot's name be a link to the blob, in one step; return False where there are no such links."""
        from huggingface_hub import constants

        path = self.path(file)
        make_directory(path.parent)
        if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
            return False
        link = self.blob(file).with_name(f"{file.etag}.mmsplit.link")  # not in the snapshot, should it be left behind
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(self.blob(file), path.parent))
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno in _SHORTAGES:
                raise
            return False
        os.replace(link, path)
        return True


class LocalFolder:
    """A plain folder of files under their own names, with huggingface_hub's notes about them.  Implements `Place`.

    A file that differs is replaced only if the notes say that it was downloaded and left alone, or with `force`.
    """

    def __init__(self, repository: HubRepository, directory: Path | str, *, force: bool = False) -> None:
        self._root = Path(directory).expanduser().resolve()
        self._commit = repository.commit
        self._force = force
        self._notes = self._root / ".cache" / "huggingface"

    @property
    def root(self) -> Path:
        """The folder itself."""
        return self._root

    def path(self, file: HubFile) -> Path:
        """The file."""
        return self._root / file.name

    def partial(self, file: HubFile) -> Path:
        """Beside the notes, named after both name and content."""
        name = hashlib.sha1(file.name.encode(), usedforsecurity=False).hexdigest()[:16]
        return self._metadata(file).parent / f"{name}.{file.etag}{PARTIAL_SUFFIX}"

    def lock(self, file: HubFile) -> Path:
        """The lock that huggingface_hub takes for this name."""
        return self._metadata(file).with_suffix(".lock")

    def find(self, file: HubFile) -> Path | None:
        """The file of that name."""
        path = self.path(file)
        return path if is_regular(path) else None

    def may_replace(self, file: HubFile) -> bool:
        """Whether it is a download that nobody touched since, such as that of an older commit."""
        return self._force or self._noted(file) is not None

    def is_vouched_for(self, file: HubFile) -> bool:
        """Whether it was downloaded as this content, and nobody touched it since."""
        noted = self._noted(file)
        return noted is not None and noted[1] == file.etag

    def is_in_place(self, file: HubFile) -> bool:
        """Whether huggingface_hub would take it for the file of this commit."""
        return self._noted(file) == (self._commit, file.etag)

    def put_in_place(self, file: HubFile) -> None:
        """Write the note."""
        self._write_note(file)

    def install(self, file: HubFile) -> None:
        """Rename the content to the file, replacing what was there, and write the note."""
        path = self.path(file)
        make_directory(path.parent)
        os.replace(self.partial(file), path)
        sync_directory(path.parent)
        self._write_note(file)

    def finish(self, revision: str | None) -> None:
        """Nothing: huggingface_hub keeps no revisions here."""

    def _metadata(self, file: HubFile) -> Path:
        return self._notes / "download" / f"{file.name}.metadata"

    def _noted(self, file: HubFile) -> tuple[str, str] | None:
        """Commit and ETag that the file had when it got here; None if unknown, or if it was written to since."""
        try:
            commit, etag, seconds = self._metadata(file).read_text(encoding="utf-8").split()
            if self.path(file).stat().st_mtime - _TIME_SLACK_SECONDS <= float(seconds):
                return commit, etag
        except (OSError, ValueError):
            pass
        return None

    def _write_note(self, file: HubFile) -> None:
        ignored, note = self._notes / ".gitignore", self._metadata(file)
        note.parent.mkdir(parents=True, exist_ok=True)
        if not ignored.exists():
            ignored.write_text("*", encoding="utf-8")
        # In place: a note that is cut short is no note, and the file is hashed instead.
        note.write_text(f"{self._commit}\n{file.etag}\n{time.time()}\n", encoding="utf-8")
