"""What a hostile file must not bring about, and how that is noticed while code runs on it.

An audit hook sees every file that is opened, every process, every import.  It cannot be taken away again, so that
there is one for the process, which looks only while a `Guard` is at work.
"""

from __future__ import annotations

import codecs
import faulthandler
import os
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Beyond what a run on a tiny file may take, in bytes: a few buffers of 4 MiB, and the parsed forms of some kilobytes.
MOST_BYTES = 64 << 20
#: After this many seconds a run is taken to hang.  What it does is over in milliseconds.
HANG_SECONDS = 30

#: Arguments of these are paths that are changed.
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.mkfifo": 1, "os.mknod": 1, "os.setxattr": 1, "shutil.rmtree": 1,
}  # fmt: skip
_LOOKS = ("os.listdir", "os.scandir", "os.walk", "glob.glob")
#: Never, whatever the file says.
_FORBIDDEN = (
    "pickle.find_class", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
    "subprocess.Popen", "exec", "compile", "import", "marshal.loads", "marshal.load", "code.__new__", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "ftplib.connect", "webbrowser.open",
    "shutil.unpack_archive", "ctypes.dlopen", "os.putenv", "os.chdir", "os.kill", "signal.pthread_kill",
)  # fmt: skip
#: Which pickles need, and Python imports when it is first used.
codecs.lookup("raw_unicode_escape")

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: The system's own, which a run may look at: how much memory there is, which kinds of file system.
_OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/shm")


class Violation(AssertionError):  # noqa: N818 - what was broken is a rule
    """Code did what no file may make it do, or did not end."""


class Guard:
    """Watches over code that may read below `reads` and write below `writes`; no root, no files at all."""

    def __init__(self, reads: tuple[Path, ...] = (), writes: tuple[Path, ...] = (), *, network: bool = False) -> None:
        self._reads = tuple(os.path.realpath(path) for path in (*reads, *writes))
        self._writes = tuple(os.path.realpath(path) for path in writes)
        self._network = network
        self.broken: list[str] = []

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        """Take note of an audit event."""
        if event == "open":
            path, mode, flags = arguments
            is_write = bool(flags & _WRITING) if isinstance(flags, int) else "r" not in str(mode)
            self._require(event, path, self._writes if is_write else self._reads)
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                self._require(event, path, self._writes, follow=False)
        elif event in _LOOKS:
            self._require(event, arguments[0], self._reads)
        elif event in _FORBIDDEN and not (self._network and event.startswith("socket.")):
            self.broken.append(f"{event}{arguments!r:.200}")

    def _require(self, event: str, path: object, roots: tuple[str, ...], *, follow: bool = True) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, whose opening was seen
        text = os.fsdecode(path)
        if text.startswith(_OF_THE_SYSTEM) and roots is self._reads:
            return
        # What a link leads to is what is opened; what is renamed or removed is the link.
        path_seen = Path(text)
        true = os.path.realpath(text if follow else path_seen.parent) + ("" if follow else os.sep + path_seen.name)
        if not any(true == root or true.startswith(root + os.sep) for root in roots):
            self.broken.append(f"{event} of {text!r}, which is {true!r}")


_watching: list[Guard] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for guard in _watching:
        guard.see(event, arguments)


_hooked: list[bool] = []


@contextmanager
def guarded(guard: Guard, *, most_bytes: int | None = MOST_BYTES) -> Iterator[None]:
    """Run a block under a guard, and within limits; raises `Violation`."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    _watching.append(guard)
    try:
        with limited(most_bytes):
            yield
    finally:
        _watching.remove(guard)
    if guard.broken:
        raise Violation("; ".join(guard.broken[:3]))


@contextmanager
def limited(most_bytes: int | None = MOST_BYTES) -> Iterator[None]:
    """Run a block that must come to an end, and take no more memory; raises `Violation`.

    Counting memory makes everything several times slower; with None it is not counted.
    """
    if most_bytes is not None:
        tracemalloc.start()
    handler = signal.signal(signal.SIGALRM, _hangs)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    faulthandler.dump_traceback_later(4 * HANG_SECONDS, exit=True)  # where not even a signal gets through
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if most_bytes is not None and peak > most_bytes:
        raise Violation(f"{peak:,} bytes of memory for a file of a few kilobytes")


def _hangs(signum: int, frame: object) -> None:
    raise Violation(f"still at it after {HANG_SECONDS} seconds")
