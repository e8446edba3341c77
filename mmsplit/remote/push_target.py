"""A branch of a repository on the Hub that files are published to, as one commit, through huggingface_hub.

Strategy.  Contents go up first, file by file; the commit that names them comes last and names them all.  So nobody who
looks at the branch ever sees half of what is published, and a run that is interrupted loses one file at most: what the
Hub has of a content already (a file in LFS, a piece of one in Xet) is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmsplit.errors import AccessDeniedError, MmsplitError, NetworkError, RemoteNotFoundError, RequestError
from mmsplit.remote.address import HubAddress
from mmsplit.remote.failures import ask_hub, network_errors
from mmsplit.remote.redaction import without_secrets
from mmsplit.remote.repository import HubRepository, find_token, hub_endpoint, open_repository
from mmsplit.remote.source import HubOptions

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_MAY_WRITE = "A token with write permission is needed: log in with `hf auth login`, or set HF_TOKEN"
_MAIN = "main"


class Upload(NamedTuple):
    """A file to publish: its name in the repository, and the file or the bytes that it is to hold."""

    name: str
    content: Path | bytes


class PushTarget:
    """Where to publish to.  Raises `AccessDeniedError` where no token is to be found.

    Methods raise the branches of `NetworkError`; no message holds a secret.  huggingface_hub draws its own progress
    on stderr only with `show_progress`.
    """

    def __init__(self, address: HubAddress, hub: HubOptions, *, show_progress: bool = False) -> None:
        from huggingface_hub import HfApi

        self.repo_id = address.repo_id
        self.branch = address.revision or _MAIN
        self.endpoint = hub_endpoint(hub.endpoint)
        self._asked = ask_hub(self.endpoint, self.repo_id, self.branch)
        token = find_token(hub.token, self._asked)
        if token is None:
            raise AccessDeniedError("no token is to be found", path=self.repo_id, hint=_MAY_WRITE)
        self._token = token
        self._show_progress = show_progress
        self._api = HfApi(endpoint=self.endpoint, token=token, library_name="mmsplit")

    def look(self) -> HubRepository | None:
        """Return what is there; None if there is no such repository, or no such branch of it."""
        try:
            return open_repository(self.repo_id, self.branch, self._token, self.endpoint)
        except RemoteNotFoundError:
            return None

    def create(self, *, private: bool) -> HubRepository:
        """Make repository and branch where they are not there, and return what is there.

        Raises `RequestError` if a repository is there that is public although `private` is asked for.
        """
        with self._errors():
            self._api.create_repo(self.repo_id, private=private or None, exist_ok=True)
            if private and not self._api.repo_info(self.repo_id).private:
                raise RequestError(
                    "the repository is public, and a private one was asked for",
                    path=f"{self.endpoint}/{self.repo_id}",
                    hint="Make it private on its page, or choose another name.",
                )
            if self.branch != _MAIN and not self.branch.startswith("refs/"):
                self._api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return open_repository(self.repo_id, self.branch, self._token, self.endpoint)

    def send(self, uploads: Sequence[Upload]) -> list[CommitOperationAdd]:
        """Send contents that the Hub does not have; they are named by `commit` only."""
        from huggingface_hub import CommitOperationAdd

        operations = []
        with self._errors():
            for upload in uploads:
                content = upload.content if isinstance(upload.content, bytes) else str(upload.content)
                operations.append(CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=content))
            self._api.preupload_lfs_files(self.repo_id, additions=operations, revision=self.branch, free_memory=False)
        return operations

    def commit(self, sent: Sequence[CommitOperationAdd], deleted: Sequence[str], message: str, parent: str) -> str:
        """Name everything that was sent, and remove `deleted`, in one commit on `parent`; return it.

        Files that are there already in the same content change nothing; if nothing changes, `parent` it is.
        """
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        removals = [CommitOperationDelete(path_in_repo=name) for name in deleted]
        with self._errors():
            try:
                commit = self._api.create_commit(
                    self.repo_id,
                    [*sent, *removals],
                    commit_message=message,
                    revision=self.branch,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    raise NetworkError(
                        "somebody else has changed the branch meanwhile",
                        path=f"{self.repo_id}@{self.branch}",
                        hint="Run the same command again: what was sent is not sent again.",
                    ) from None
                raise
        return str(commit.oid)

    def require_files(self, commit: str, sizes: Mapping[str, int]) -> None:
        """Compare lengths in bytes with what a commit lists: a .gitignore on the Hub leaves files out silently."""
        there = open_repository(self.repo_id, commit, self._token, self.endpoint)
        for name, size in sizes.items():
            found = there.file(name).size_bytes if name in there else None
            if found != size:
                raise NetworkError(
                    "the Hub did not take a file as it was sent",
                    path=f"{self.repo_id}@{self.branch}/{name}",
                    expected=size,
                    found=found if found is not None else "no such file",
                    hint="Check the .gitignore of the repository, then run the same command again.",
                )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into our errors, and keep its progress bars where they are wanted."""
        try:
            with network_errors(self._asked, token=self._token), _progress_bars(shown=self._show_progress):
                try:
                    yield
                except RuntimeError as error:  # "Error while uploading": the reason is behind it
                    if isinstance(error.__cause__, Exception):
                        raise error.__cause__ from None
                    raise
        except AccessDeniedError as error:
            raise AccessDeniedError(error.what, path=error.path, hint=_MAY_WRITE) from None
        except MmsplitError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            said = without_secrets(str(error), self._token)[:300]
            raise NetworkError(
                f"publishing failed: {said}", path=self._asked.place, hint="Run the same command again."
            ) from None


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
