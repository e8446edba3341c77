"""Trials on a machine that is short of something, or whose source does not hold still: real limits, real processes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
from checkpoints import MIB, Weight, tree, write_checkpoint
from fault_layer import Layer
from machine import NotHere, mounted, remount
from trials import Outcome, Stage, go_on, guarded

from mmsplit.checkpoint import IoMode
from mmsplit.errors import MmsplitError, OutputError
from mmsplit.sidecar import output_directory
from mmsplit.splitting import space
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

GIB = 1 << 30


def in_child(body: Callable[[], object]) -> tuple[int, str]:
    """Run `body` in a forked child; return the signal that ended it (0 if none) and the error that it ended with.

    An error that is not ours begins with "!".
    """
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # libraries have threads; none of ours is running
        child = os.fork()
    if child == 0:
        text = ""
        try:
            body()
        except MmsplitError as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException as error:
            text = f"!{type(error).__name__}: {error}"
        finally:
            os.write(writable, text.encode(errors="replace")[:4000])
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), text


def few_descriptors(made: Stage, limits: Iterable[int]) -> Iterator[Outcome]:
    """Let the process have only so many open files more than it has (RLIMIT_NOFILE)."""
    for limit in limits:
        what = f"{limit} descriptors more"

        def trial(limit: int = limit, what: str = what) -> Outcome:
            work = made.fresh()

            def body() -> None:
                taken = {int(name) for name in os.listdir("/proc/self/fd")}
                free = itertools.islice((fd for fd in itertools.count() if fd not in taken), limit, None)
                highest = next(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
                made.scenario.act(work)

            ended, error = in_child(body)
            outcome = _settle(made, work, f"{what}: {error}", ended, error)
            shutil.rmtree(work.out.parent)
            return outcome

        yield guarded(trial, what)


def _settle(made: Stage, work: object, what: str, ended: int, error: str) -> Outcome:
    """Judge a child: no signal, no error but ours, and whoever goes on comes to the right result."""
    if ended or error.startswith("!"):
        return Outcome("lost", f"{what}, signal {ended}")
    outcome = go_on(made, work, what, may_refuse=False)  # type: ignore[arg-type]
    if outcome.verdict == "survived" and error:
        return outcome._replace(verdict="refused")
    return outcome._replace(faults=int(bool(error)))


@contextmanager
def _space_is_not_asked_for() -> Iterator[None]:
    """Let the disk become full on the way, as if others had filled it since mmsplit looked."""
    with (
        mock.patch.object(output_directory, "free_bytes", return_value=1 << 60),
        mock.patch.object(space, "free_bytes", return_value=1 << 60),
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1 << 60)),
    ):
        yield


def full_disks(made: Stage, options: Iterable[str]) -> Iterator[Outcome]:
    """A file system in memory that is too small, for real: `options` say how (size=16k, nr_inodes=5)."""
    for number, option in enumerate(options):
        what = f"file system of {option}"

        def trial(number: int = number, option: str = option, what: str = what) -> Outcome:
            with mounted(made.folder / f"disk-{number}", "size=64m") as place:
                given = made.folder / "given"
                if given.exists():
                    shutil.copytree(given, place / "out", symlinks=True)
                work = made.at(place / "out")
                _make_small(place, option)
                error = ""
                with _space_is_not_asked_for():
                    try:
                        made.scenario.act(work)
                    except OutputError as raised:
                        error = f"{type(raised).__name__}: {raised}"
                remount(place, "size=64m,nr_inodes=10k")
                outcome = go_on(made, work, f"{what}: {error}", may_refuse=False)
                if error and outcome.verdict == "survived":
                    return outcome._replace(verdict="refused")
                return outcome._replace(faults=int(bool(error)))

        yield guarded(trial, what)


def _make_small(place: Path, option: str) -> None:
    """Shrink what is mounted to what is used there and as much again as the option says."""
    name, _, count = option.partition("=")
    used = os.statvfs(place)
    if name == "size":
        kib = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024 + int(count.rstrip("k"))
        remount(place, f"size={max(kib, 4)}k")  # 0 would be no limit
    else:
        remount(place, f"nr_inodes={used.f_files - used.f_ffree + int(count)}")


def read_only(made: Stage) -> Iterator[Outcome]:
    """A file system that is mounted read-only: refused, and nothing changed."""

    def trial() -> Outcome:
        with mounted(made.folder / "disk-read-only", "size=64m") as place:
            if (made.folder / "given").exists():
                shutil.copytree(made.folder / "given", place / "out", symlinks=True)
            before = tree(place)
            remount(place, "ro")
            try:
                made.scenario.act(made.at(place / "out"))
            except OutputError as error:
                fine = tree(place) == before
                return Outcome("refused" if fine else "lost", f"read-only: {error}")
            return Outcome("lost", "read-only: no error")

    yield guarded(trial, "read-only file system")


def signals(made: Stage, count: int) -> Iterator[Outcome]:
    """Interrupt system calls all the time: the command neither notices nor makes anything else."""
    for number in range(count):

        def trial(number: int = number) -> Outcome:
            work, came = made.fresh(), []

            def note(*_: object) -> None:
                came.append(1)

            before = signal.signal(signal.SIGUSR1, note)
            stop = threading.Event()
            main = threading.main_thread().ident
            assert main is not None

            def disturb() -> None:
                while not stop.wait(0.0005):
                    signal.pthread_kill(main, signal.SIGUSR1)

            thread = threading.Thread(target=disturb)
            thread.start()
            try:
                made.scenario.act(work)
            finally:
                stop.set()
                thread.join()
                signal.signal(signal.SIGUSR1, before)
            outcome = go_on(made, work, f"{len(came)} signals in run {number}", may_refuse=False)
            shutil.rmtree(work.out.parent)
            return outcome._replace(faults=len(came))

        yield guarded(trial, "signals")


def read_errors(made: Stage, calls: Iterable[int]) -> Iterator[Outcome]:
    """A disk that fails in one of its reads (EIO from preadv): an error of ours, and nothing passes for whole."""
    for at in calls:
        what = f"EIO at read {at}"

        def trial(at: int = at, what: str = what) -> Outcome:
            work, real, count = made.fresh(), os.preadv, iter(range(1 << 30))

            def preadv(*args: object) -> int:
                if next(count) == at:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*args)  # type: ignore[arg-type]

            error = ""
            with Layer(work.out.parent), mock.patch.object(os, "preadv", preadv):
                try:
                    made.scenario.act(work)
                except MmsplitError as raised:
                    error = f"{type(raised).__name__}: {raised}"
            outcome = go_on(made, work, f"{what}: {error}", may_refuse=False)
            shutil.rmtree(work.out.parent)
            if error and outcome.verdict == "survived":
                return outcome._replace(verdict="refused")
            return outcome._replace(faults=int(next(count) > at))

        yield guarded(trial, what)


# --- A source that does not hold still --------------------------------------------------------------------------


def _cut(shard: Path, size: int) -> None:
    os.truncate(shard, size)


def _write_over(shard: Path, size: int) -> None:
    with shard.open("r+b") as file:
        file.seek(size)
        file.write(b"x" * 5000)


def _write_anew(shard: Path, size: int) -> None:
    shard.write_bytes(b"x" * size)


def _put_another(shard: Path, size: int) -> None:
    other = shard.with_name("another")
    data = bytearray(shard.read_bytes())
    data[-1000:-500] = bytes(500)
    other.write_bytes(data)
    os.replace(other, shard)


CHANGES = {"truncated": _cut, "overwritten": _write_over, "written anew": _write_anew, "replaced": _put_another}


def changing_sources(folder: Path, random: Random, io: IoMode, count: int) -> Iterator[Outcome]:
    """Change the source at a random moment of its split: never a death by SIGBUS, never a set of two halves."""
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "F16", (2, MIB), 90) for k in range(3)]
    original = write_checkpoint(folder / "original" / "model", [weights])
    out = folder / "out"
    started = time.monotonic()
    split(original, out, 2, threads=2)
    seconds = time.monotonic() - started
    for _ in range(count):
        name, moment = random.choice(list(CHANGES)), 1.2 * random.random() * seconds
        what = f"source {name} after {moment * 1000:.0f} ms, --io {io}"
        shutil.rmtree(out, ignore_errors=True)

        def trial(name: str = name, moment: float = moment, what: str = what) -> Outcome:
            source = Path(shutil.copytree(original, folder / "model"))
            shard = source / "model.safetensors"
            size = shard.stat().st_size
            offset = random.randrange(size // 2, size - 5000)
            change = threading.Timer(moment, lambda: CHANGES[name](shard, offset))

            # Forked before there is a thread; the child waits for nothing.
            def start_and_split() -> None:
                split(source, out, 2, threads=2, io=io)

            ended, error = _in_child_while(start_and_split, change)
            problem = _problem_with_set(out, (original, source)) if not error else _passes(out)
            shutil.rmtree(source)
            if ended or error.startswith("!") or problem:
                return Outcome("lost", f"{what}: signal {ended}, {error}, {problem}")
            return Outcome("refused" if error else "survived", f"{what}: {error}")

        yield guarded(trial, what)
    shutil.rmtree(out, ignore_errors=True)


def _in_child_while(body: Callable[[], object], beside: threading.Timer) -> tuple[int, str]:
    """`in_child`, with something that happens in this process meanwhile."""
    readable, writable = os.pipe()
    ended: list[tuple[int, str]] = []

    def signalled() -> None:
        os.write(writable, b"x")
        body()

    os.set_inheritable(writable, True)
    watcher = threading.Thread(target=lambda: (os.read(readable, 1), beside.start()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        watcher.start()  # waits in a read of a pipe, and holds no lock that the child could need
        ended.append(in_child(signalled))
    watcher.join()
    beside.join()
    os.close(readable)
    os.close(writable)
    return ended[0]


def _problem_with_set(out: Path, sources: Iterable[Path]) -> str:
    """A set that was made holds one of the states of the source, and not a mixture."""
    for source in sources:
        try:
            if verify(out, level="full", against=source, threads=1).ok:
                return ""
        except MmsplitError:
            continue
    return "the set is of no state that the source had"


def _passes(out: Path) -> str:
    try:
        return "the run failed, and yet there is a set" if verify(out, threads=1).ok else ""
    except MmsplitError:
        return ""


# --- Little memory ----------------------------------------------------------------------------------------------


def write_large_checkpoint(folder: Path, total_bytes: int) -> Path:
    """Write shards of up to 5 GiB, mostly holes: tensors of 64 MiB of which the first quarter of a MiB is noise."""
    folder.mkdir(parents=True)
    rows = 64 * MIB // 4096
    names = [f"model.layers.{k}.mlp.up_proj.weight" for k in range(-(-total_bytes // (64 * MIB)))]
    shards = [names[k : k + 80] for k in range(0, len(names), 80)]
    noise = np.random.default_rng(0).integers(0, 256, MIB // 4, np.uint8).tobytes()
    for number, members in enumerate(shards):
        header = json.dumps(
            {
                name: {"dtype": "BF16", "shape": [rows, 2048], "data_offsets": [k * 64 * MIB, (k + 1) * 64 * MIB]}
                for k, name in enumerate(members)
            }
        ).encode()
        with (folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = 8 + len(header)
            file.truncate(start + len(members) * 64 * MIB)
            for k in range(len(members)):
                file.seek(start + k * 64 * MIB)
                file.write(noise[k:] + noise[:k])
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


@contextmanager
def _memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group of that much memory, page cache included; raises `NotHere` where there can be none."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"mmsplit-campaign-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(limit_bytes))
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    raise NotHere("no control group of this user's can limit memory")


def little_memory(folder: Path, total_bytes: int, limit_bytes: int = 512 * MIB) -> Iterator[Outcome]:
    """Split, verify and merge so much under a hard limit: of the process' own memory, then of a control group's.

    Raises `NotHere` where there can be no such group.
    """
    source = write_large_checkpoint(folder / "model", total_bytes)

    commands = [["split", source, "-o", folder / "set", "--num-parts", "4", "--force"], ["verify", folder / "set"]]
    if total_bytes < 4 * GIB:  # merged, holes are zeros and take their place on the disk
        commands.append(["merge", folder / "set", "-o", folder / "merged"])

    def trial(limit: Callable[[], object], what: str) -> Outcome:
        # Processes of their own: a forked child would count what this one has allocated.
        for command in commands:
            words = [sys.executable, "-m", "mmsplit", *map(str, command), "--threads", "2"]
            made = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True, check=False)
            if made.returncode:
                return Outcome("lost", f"{what}: {command[0]} ended with {made.returncode}: {made.stderr}")
        shutil.rmtree(folder / "merged", ignore_errors=True)
        sound = verify(folder / "set", against=source, level="quick", threads=2).ok
        return Outcome("survived" if sound else "lost", f"{what}: the set is not that of the source")

    size = f"{total_bytes / 1e9:.1f} GB in {limit_bytes >> 20} MiB"
    try:
        yield trial(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes,) * 2), f"{size}, RLIMIT_DATA")
        with _memory_group(limit_bytes) as group:
            procs = group / "cgroup.procs"
            yield trial(lambda: procs.write_text(str(os.getpid())), f"{size}, control group")
    finally:
        shutil.rmtree(folder)
