"""A disk that loses its power: what was not synced may be there, or not, in any combination.

POSIX promises this much and no more: the content of a file is durable after fsync of the file, its name after fsync of
the directory that holds the name.  Until then every block of 4 KiB that was written, every change of a length, and
every change of a directory may have reached the disk or not, whatever came before or after it.  A rename is one
change.  What is not written reads as it was, or as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from fault_layer import Operation, files_below

_BLOCK = 4096

#: A tree in memory: by relative name bytes of a file, text for a link's target, None for a directory.
Tree = dict[str, bytes | str | None]


class Policy(NamedTuple):
    """What of the unsynced survives: by chance, one answer for each block or length, one for each change of names."""

    name: str
    data: float
    names: float


class State(NamedTuple):
    """What a loss of power left, and whether it came after the last operation."""

    what: str
    tree: Tree
    is_last: bool


POLICIES = (
    Policy("nothing unsynced", 0, 0),
    Policy("everything", 1, 1),
    Policy("names without data", 0, 1),
    Policy("data without names", 1, 0),
)


class _File:
    """Content that is durable, and what was done to it since."""

    def __init__(self, data: bytes) -> None:
        self.durable = data
        self.pending: list[tuple[int, bytes | None]] = []

    def content(self, survives: Callable[[], bool]) -> bytes:
        data = bytearray(self.durable)
        for offset, written in self.pending:
            if written is None:
                if survives():
                    data[offset:] = bytes(max(0, offset - len(data)))
                continue
            for start in range(0, len(written), _BLOCK):
                if survives():
                    at, block = offset + start, written[start : start + _BLOCK]
                    if at > len(data):
                        data += bytes(at - len(data))
                    data[at : at + len(block)] = block
        return bytes(data)

    def sync(self) -> None:
        self.durable, self.pending = self.content(lambda: True), []


class _Directory:
    """Names as they were in the beginning, and as they are seen now; `_Change`s lead from the ones to the others."""

    def __init__(self) -> None:
        self.first: dict[str, _Node] = {}
        self.now: dict[str, _Node] = {}


_Node = _File | _Directory | str


class _Change:
    """One change of names: what each name in each directory becomes; None for a name that goes."""

    def __init__(self, names: tuple[tuple[_Directory, str, _Node | None], ...]) -> None:
        self.names = names
        self.is_durable = False


class SimulatedDisk:
    """Begins with what lies below `root`, all of it durable; then `apply` what a layer recorded."""

    def __init__(self, root: Path) -> None:
        self._root = _Directory()
        self._files: dict[int, _File] = {}
        self._changes: list[_Change] = []
        numbers = {path: number for number, path in enumerate(files_below(root))}
        for path in sorted(root.rglob("*")):
            node: _Node = (
                str(path.readlink())
                if path.is_symlink()
                else _Directory()
                if path.is_dir()
                else _File(path.read_bytes())
            )
            if isinstance(node, _File):
                self._files[numbers[path]] = node
            directory, name = self._find(path.relative_to(root).as_posix())
            directory.now[name] = directory.first[name] = node

    def apply(self, operation: Operation) -> None:
        """Do what was done."""
        kind, path = operation.kind, operation.path
        if kind == "sync_dir":
            self._sync_directory(path)
        elif kind == "sync":
            self._files[operation.file].sync()
        elif kind == "write":
            self._files[operation.file].pending.append((operation.offset, operation.data))
        elif kind == "resize":
            self._files[operation.file].pending.append((operation.offset, None))
        elif kind == "rename":
            source, old = self._find(path)
            target, new = self._find(operation.other)
            self._change((target, new, source.now[old]), (source, old, None))
        elif kind in ("unlink", "rmdir"):
            self._change((*self._find(path), None))
        elif kind == "mkdir":
            self._change((*self._find(path), _Directory()))
        elif kind == "symlink":
            self._change((*self._find(path), operation.other))
        else:
            self._files[operation.file] = _File(b"")
            self._change((*self._find(path), self._files[operation.file]))

    def after_power_loss(self, policy: Policy, random: Random) -> Tree:
        """Return what lies there when the power is back."""

        def data_survives() -> bool:
            return random.random() < policy.data

        entries: dict[int, dict[str, _Node]] = {}

        def names_of(directory: _Directory) -> dict[str, _Node]:
            return entries.setdefault(id(directory), dict(directory.first))

        for change in self._changes:
            if change.is_durable or random.random() < policy.names:
                for directory, name, node in change.names:
                    if node is None:
                        names_of(directory).pop(name, None)
                    else:
                        names_of(directory)[name] = node
        tree: Tree = {}

        def walk(directory: _Directory, prefix: str) -> None:
            for name, node in names_of(directory).items():
                if isinstance(node, _Directory):
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = node if isinstance(node, str) else node.content(data_survives)

        walk(self._root, "")
        return tree

    def _find(self, path: str) -> tuple[_Directory, str]:
        *folders, name = path.split("/")
        directory = self._root
        for folder in folders:
            inner = directory.now[folder]
            assert isinstance(inner, _Directory)
            directory = inner
        return directory, name

    def _change(self, *names: tuple[_Directory, str, _Node | None]) -> None:
        self._changes.append(_Change(names))
        for directory, name, node in names:
            if node is None:
                del directory.now[name]
            else:
                directory.now[name] = node

    def _sync_directory(self, path: str) -> None:
        synced: _Node = self._root
        if path != ".":
            directory, name = self._find(path)
            synced = directory.now[name]
        assert isinstance(synced, _Directory)
        for change in self._changes:  # a rename from one directory to another is one change
            change.is_durable |= any(directory is synced for directory, _, _ in change.names)


def states(root: Path, operations: Iterable[Operation], random: Random, random_states: int) -> Iterator[State]:
    """Yield every legal state after every prefix of the operations that the policies name, and random ones.

    `root` is as it was before the first operation.  The same state is yielded once, and once more after the last.
    """
    disk, seen = SimulatedDisk(root), set[int]()
    chances = [Policy(f"some, {number}", 0.5, 0.5) for number in range(random_states)]
    steps = [None, *operations]
    for number, operation in enumerate(steps):
        if operation is not None:
            disk.apply(operation)
        done = "nothing" if operation is None else f"{operation.kind} {operation.path}"
        is_last = number == len(steps) - 1
        if is_last:
            seen.clear()
        for policy in (*POLICIES, *chances):
            tree = disk.after_power_loss(policy, random)
            if (key := hash(frozenset(tree.items()))) not in seen:
                seen.add(key)
                what = f"power lost after operation {number} of {len(steps) - 1} ({done}), {policy.name}"
                yield State(what, tree, is_last)


def write_tree(root: Path, tree: Tree) -> None:
    """Make a directory hold such a tree."""
    root.mkdir(parents=True, exist_ok=True)
    for name, node in tree.items():
        path = root / name
        if node is None:
            path.mkdir(parents=True, exist_ok=True)
        elif isinstance(node, str):
            path.symlink_to(node)
        else:
            path.write_bytes(node)
