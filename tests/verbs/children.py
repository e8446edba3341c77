"""Work done in a forked child, so that it can be killed, or stopped by what happens to its files, at a chosen point."""

from __future__ import annotations

import itertools
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from mmsplit.errors import MmsplitError
from mmsplit.workers import Progress


class Ending(NamedTuple):
    """How a child ended: the signal that killed it (0 if none), and the error it ended with (empty if none)."""

    signal: int
    error: str
    message: str


def in_child(body: Callable[[], object]) -> Ending:
    """Run `body` in a forked child and say how it ended."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # libraries have threads; none of ours is running
        child = os.fork()
    if child == 0:
        error, message = "", ""
        try:
            body()
        except MmsplitError as raised:
            error, message = type(raised).__name__, str(raised)
        except BaseException as raised:
            error, message = f"!{type(raised).__name__}", repr(raised)
        os.write(writable, f"{error}\n{message}"[:4000].encode())
        os._exit(0)
    os.close(writable)
    with open(readable, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    error, _, message = text.partition("\n")
    return Ending(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, error, message)


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_bytes(stage: str, done_bytes: int, act: Callable[[], None] = die) -> Callable[[Progress], None]:
    """Return a progress callback that acts once, when `stage` has done that many bytes."""
    acted = []

    def callback(progress: Progress) -> None:
        if not acted and progress.stage == stage and progress.done_bytes >= done_bytes:
            acted.append(True)
            act()

    return callback


#: What changes the disk, as `os` calls it.
CHANGES = ("pwrite", "ftruncate", "replace", "unlink", "mkdir", "fsync")


def die_at_change(number: int) -> None:
    """Make this process die in its `number`-th change of the disk, a write half done."""
    counter = itertools.count()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if next(counter) == number:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                die()
            return real(*args, **kwargs)

        return change

    for name in CHANGES:
        setattr(os, name, wrap(name, getattr(os, name)))
