"""The layer through which the calls that change a disk go, so that they are recorded and fail on command.

`Layer(root)` stands between Python and the system while it is entered: every call that creates, writes, cuts, syncs,
renames or removes something below `root` is counted, in the order in which it happens, and kept as an `Operation`.
At a chosen one it does what it is told: the process "dies" (`Crash`, and from then on every such call is refused, so
that no handler and no `finally` can still change anything), half of a write arrives, or the system says no.

Whether the layer sees everything is not a matter of trust: `tests/faults/test_fault_layer.py` plays the operations back
onto a simulated disk and compares the result with what lies on the real one.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

Kind = Literal["create", "write", "resize", "sync", "sync_dir", "rename", "unlink", "mkdir", "rmdir", "symlink"]


class Crash(BaseException):
    """The process is dead; not an `Exception`, so that nobody recovers from it."""


class Operation(NamedTuple):
    """One change of the disk.  Paths are relative to the layer's root; `file` numbers the files that ever were.

    write: `data` at `offset`.  resize: to `offset` bytes.  rename: `path` to `other`.  symlink: from `path` to `other`.
    """

    kind: Kind
    path: str
    file: int = -1
    offset: int = 0
    data: bytes = b""
    other: str = ""


class Fault(NamedTuple):
    """What befalls the call number `at`: "crash" before it, "torn" in its middle, "short" for half a write, an errno.

    With `stays`, every call from there on has it (a full disk), else only that one.
    """

    at: int
    how: Literal["crash", "torn", "short"] | int
    stays: bool = False


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_DIRECT = getattr(os, "O_DIRECT", 0)
_SECTOR = 512
#: Calls that would change a disk past the layer.  Whoever begins to use one has to teach it to the layer.
_UNKNOWN = (
    "pwritev",
    "writev",
    "sendfile",
    "copy_file_range",
    "posix_fallocate",
    "truncate",
    "link",
    "splice",
)


class _Handle(NamedTuple):
    path: str
    file: int
    is_direct: bool


class Layer:
    """Stands before the system's calls while it is entered; one at a time in a process.

    With `keep`, `operations` are what was done; `calls` counts in any case, and `struck` says whether the fault came.
    """

    def __init__(self, root: Path, fault: Fault | None = None, *, keep: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.operations: list[Operation] = []
        self.calls = 0
        self.struck = False
        self._fault = fault
        self._keep = keep
        self._dead = False
        self._lock = threading.RLock()
        self._handles: dict[int, _Handle] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._next_number = 0
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Layer:
        for path in files_below(Path(self.root)):  # numbered as `SimulatedDisk` numbers them
            self._number(path.stat())
        self._os = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
        self._io_open = io.open
        for name, new in {
            "open": self._open, "close": self._close, "write": self._write, "pwrite": self._pwrite,
            "ftruncate": self._ftruncate, "fsync": self._fsync, "fdatasync": self._fsync, "replace": self._rename,
            "rename": self._rename, "unlink": self._unlink, "remove": self._unlink, "mkdir": self._mkdir,
            "rmdir": self._rmdir, "symlink": self._symlink,
            **{name: self._refuse(name) for name in _UNKNOWN if hasattr(os, name)},
        }.items():  # fmt: skip
            self._replace(os, name, new)
        self._replace(io, "open", self._open_file)
        self._replace(builtins, "open", self._open_file)
        self._replace(shutil, "_USE_CP_SENDFILE", False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, name, real in self._replaced:
            setattr(module, name, real)
        for fd, handle in self._handles.items():
            # The system closes what a dead process had open, and so gives its locks back.
            try:
                stat = os.fstat(fd)
                if self._dead and self._numbers.get((stat.st_dev, stat.st_ino)) == handle.file:
                    os.close(fd)
            except OSError:
                pass

    def _replace(self, module: Any, name: str, new: object) -> None:
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    def _refuse(self, name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"os.{name} is not known to the fault layer: teach it")

        return refuse

    def _relative(self, path: Any) -> str | None:
        """Return a path relative to the root, None for what lies elsewhere."""
        if isinstance(path, int):
            return None
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 - the last link stays
        whole = os.path.join(os.path.realpath(folder), name)
        if whole == self.root:
            return "."
        return whole[len(self.root) + 1 :] if whole.startswith(self.root + os.sep) else None

    def _number(self, stat: os.stat_result, *, new: bool = False) -> int:
        key = (stat.st_dev, stat.st_ino)
        if new or key not in self._numbers:
            self._numbers[key] = self._next_number
            self._next_number += 1
        return self._numbers[key]

    def _call(self, path: str, act: Callable[[], Any], less: Callable[[], Any] | None = None) -> Any:
        """Count a call and make it, or let its fault befall it.  `less` does a part of it."""
        with self._lock:
            if self._dead:
                raise Crash
            number, fault = self.calls, self._fault
            self.calls += 1
            if fault is None or not (number == fault.at or (fault.stays and number > fault.at)):
                return act()
            if fault.how == "short":
                self.struck |= less is not None
                return (less or act)()
            self.struck = True
            if isinstance(fault.how, int):
                raise OSError(fault.how, os.strerror(fault.how), path)
            if fault.how == "torn":
                (less or act)()
            self._dead = True
            raise Crash

    def _note(self, operation: Operation) -> None:
        if self._keep:
            self.operations.append(operation)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        relative = self._relative(path)
        if relative is None or dir_fd is not None:
            return int(self._os["open"](path, flags, mode, dir_fd=dir_fd))

        def act() -> int:
            was_there = Path(path).exists()
            fd = int(self._os["open"](path, flags, mode))
            number = -1 if Path(path).is_dir() else self._number(os.fstat(fd), new=not was_there)
            self._handles[fd] = _Handle(relative, number, bool(flags & _DIRECT))
            if not was_there:
                self._note(Operation("create", relative, number))
            elif flags & os.O_TRUNC:
                self._note(Operation("resize", relative, number))
            return fd

        return int(self._call(relative, act)) if flags & _WRITING else act()

    def _close(self, fd: int) -> None:
        self._handles.pop(fd, None)
        self._os["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        if fd not in self._handles:
            return int(self._os["write"](fd, data))
        return self._pwrite(fd, data, None)

    def _pwrite(self, fd: int, data: Any, offset: int | None) -> int:
        handle = self._handles.get(fd)
        if handle is None:
            return int(self._os["pwrite"](fd, data, offset))
        view = memoryview(data).cast("B")

        def act(count: int = len(view)) -> int:
            start = os.lseek(fd, 0, os.SEEK_CUR) if offset is None else offset
            part = view[:count]
            done = int(self._os["write"](fd, part) if offset is None else self._os["pwrite"](fd, part, offset))
            self._note(Operation("write", handle.path, handle.file, start, bytes(part[:done])))
            return done

        half = len(view) // 2
        if handle.is_direct:
            half -= half % _SECTOR
        return int(self._call(handle.path, act, (lambda: act(half)) if half else None))

    def _ftruncate(self, fd: int, size: int) -> None:
        handle = self._handles.get(fd)
        if handle is None:
            self._os["ftruncate"](fd, size)
            return

        def act() -> None:
            self._os["ftruncate"](fd, size)
            self._note(Operation("resize", handle.path, handle.file, size))

        self._call(handle.path, act)

    def _fsync(self, fd: int) -> None:
        handle = self._handles.get(fd)
        if handle is not None:  # the real one is left out: no machine dies here, and a disk is slow
            kind: Kind = "sync" if handle.file >= 0 else "sync_dir"
            self._call(handle.path, lambda: self._note(Operation(kind, handle.path, handle.file)))

    def _rename(self, source: Any, target: Any, **options: Any) -> None:
        old, new = self._relative(source), self._relative(target)
        if old is None or new is None:
            assert old is new, "something is renamed into or out of the place that is watched"
            self._os["replace"](source, target, **options)
            return

        def act() -> None:
            self._os["replace"](source, target)
            self._note(Operation("rename", old, other=new))

        self._call(old, act)

    def _changing(self, kind: Kind, name: str, path: Any, *rest: Any, **options: Any) -> None:
        relative = self._relative(path)
        if relative is None or options.get("dir_fd") is not None:
            self._os[name](path, *rest, **options)
            return

        def act() -> None:
            self._os[name](path, *rest, **options)
            self._note(Operation(kind, relative))

        self._call(relative, act)

    def _unlink(self, path: Any, **options: Any) -> None:
        self._changing("unlink", "unlink", path, **options)

    def _rmdir(self, path: Any, **options: Any) -> None:
        self._changing("rmdir", "rmdir", path, **options)

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        self._changing("mkdir", "mkdir", path, mode, **options)

    def _symlink(self, target: Any, path: Any, *args: Any, **options: Any) -> None:
        relative = self._relative(path)
        if relative is None:
            self._os["symlink"](target, path, *args, **options)
            return

        def act() -> None:
            self._os["symlink"](target, path)
            self._note(Operation("symlink", relative, other=os.fsdecode(target)))

        self._call(relative, act)

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open`, whose own writing does not pass through `os`: here it does."""
        if isinstance(file, int) or not set(mode) & set("wax+") or self._relative(file) is None:
            return self._io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        assert "a" not in mode
        flags = os.O_RDWR if "+" in mode else os.O_WRONLY
        flags |= {"w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "r": 0}[mode.strip("bt+")]
        raw = _RawFile(self, self._open(file, flags, 0o666))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _RawFile(io.RawIOBase):
    """An unbuffered file whose writes go through a layer."""

    def __init__(self, layer: Layer, fd: int) -> None:
        self._layer = layer
        self._fd = fd

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: Any) -> int:
        data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return self._layer._write(self._fd, data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self._layer._ftruncate(self._fd, size)
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._layer._close(self._fd)


def files_below(root: Path) -> list[Path]:
    """Regular files below a directory, in the order in which they are numbered."""
    return [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
