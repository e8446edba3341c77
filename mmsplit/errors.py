"""Every error mmsplit raises on purpose, in one tree; the branch says who has to act.

    MmsplitError
    ├── RequestError              2  what was asked for cannot be done as asked
    │   └── PlanError                no such plan: too many partitions, unknown layer …
    ├── CheckpointError           3  what the input got wrong
    │   ├── HeaderError              a safetensors header that must not be trusted
    │   ├── TorchFileError           a PyTorch file that is damaged, or holds more than plain tensors
    │   ├── GgufFileError            a GGUF file that is damaged, or of a version not read
    │   ├── MissingShardError        a shard that the index or the numbering promises
    │   ├── IndexMismatchError       index and headers disagree
    │   └── SourceChangedError       the input changed while it was being read
    ├── FormatError               4  what the partition set got wrong: not mmsplit's, or of a version not known here
    ├── IntegrityError            5  bytes that are not those that were written
    │   └── MissingPartitionError    a partition of the set is not there
    ├── OutputError               6  what the machine got wrong
    │   ├── OutputExistsError        something is there already
    │   ├── OutputLockedError        another run is writing there
    │   └── NoSpaceError             too little free space
    ├── NetworkError              7  what the network got wrong
    │   ├── AccessDeniedError        a token, a licence or a permission is wanting
    │   ├── RemoteNotFoundError      no such repository, revision or file on the server
    │   └── OfflineError             the network may not be used: HF_HUB_OFFLINE
    └── MissingExtraError         8  an optional package is not installed

The number is the exit code of the command line; 0 is success, 130 an interrupt, and 1 is never used on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class MmsplitError(Exception):
    """Base of all; carries what it knows as attributes and says all of it in its message.

    `offset` counts bytes from the start of the file at `path`.  `hint` is what to do next.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        path: str | Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        where = []
        if self.path is not None:
            where.append(self.path)
        if self.tensor is not None:
            where.append(f"tensor {_shorten(self.tensor)!r}")
        if self.offset is not None:
            where.append(f"byte {self.offset:,}")
        message = ": ".join([", ".join(where), self.what] if where else [self.what])
        values = [
            f"{label} {value if isinstance(value, str) else format(value, ',') if type(value) is int else value}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if values:
            message += f" ({', '.join(values)})"
        if self.hint is not None:
            message += f". {self.hint}"
        return _printable(message)


def _printable(text: str) -> str:
    """Escape what is no text, or would tell a terminal what to do: a message may hold a stranger's words."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _shorten(text: str, limit: int = 200) -> str:
    """Keep a hostile name from flooding the terminal."""
    return text if len(text) <= limit else f"{text[:limit]}…[{len(text):,} characters]"


class RequestError(MmsplitError):
    """What was asked for cannot be done as asked; the message says what is possible."""

    exit_code = 2


class PlanError(RequestError):
    """No plan satisfies the request."""


class CheckpointError(MmsplitError):
    """The checkpoint is not one, or is not whole."""

    exit_code = 3


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule; nothing of the file is used."""


class TorchFileError(CheckpointError):
    """A PyTorch file is damaged, or holds what is not read from one; nothing of the file is used."""


class GgufFileError(CheckpointError):
    """A GGUF file is damaged, or of a version or with tensor types not known here; nothing of the file is used."""


class MissingShardError(CheckpointError):
    """A shard that the index or the numbering of its siblings promises is not there."""


class IndexMismatchError(CheckpointError):
    """The weights index and the shard headers do not describe the same tensors."""


class SourceChangedError(CheckpointError):
    """A source file changed size, time or identity, or lost bytes, while it was in use."""


class FormatError(MmsplitError):
    """A file is not a partition set of a version, codec and checksum kind known here."""

    exit_code = 4


class IntegrityError(MmsplitError):
    """Bytes are not those that were written."""

    exit_code = 5


class MissingPartitionError(IntegrityError):
    """A partition that the set manifest lists is not there."""


class OutputError(MmsplitError):
    """The output could not be written: permission, device, or one of the branches below."""

    exit_code = 6


class OutputExistsError(OutputError):
    """The output holds something already, and nobody said what to do with it."""


class OutputLockedError(OutputError):
    """Another process is writing to this output."""


class NoSpaceError(OutputError):
    """The file system has, or would have, too little free space."""


class NetworkError(MmsplitError):
    """The network, or a server on it, failed."""

    exit_code = 7


class AccessDeniedError(NetworkError):
    """The server knows the thing and does not give it: log in, accept a licence, or ask for permission."""


class RemoteNotFoundError(NetworkError):
    """The server has no such repository, revision or file, or hides it from this caller."""


class OfflineError(NetworkError):
    """The network was needed and HF_HUB_OFFLINE forbids its use."""


class MissingExtraError(MmsplitError):
    """An optional package is needed; the message names the extra to install."""

    exit_code = 8
