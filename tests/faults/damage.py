"""Sets that were damaged, mixed up or forged: `verify` says so, says where, and costs no more than a sound set does.

"refused" is what every outcome here should be: somebody looked at bytes that are not those that were written, and said
so.  Damage to work in progress is "survived" if going on gives the right result.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from checkpoints import CAUSAL_CONFIG, Weight, llama_weights, tree, write_checkpoint
from scenarios import BY_NAME, Work, compare
from trials import Outcome, Stage, guarded

from mmsplit.digests import sha256_of
from mmsplit.errors import FormatError, IntegrityError, MmsplitError
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START
from mmsplit.sidecar.partition_reader import Fault, open_partition_files
from mmsplit.sidecar.payload_tail import pack_tail
from mmsplit.verbs.load import open_partition
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import Level, verify

#: What a forged number may cost.
_MOST_MEMORY_KIB = 96 << 10


class Place(NamedTuple):
    """A byte of a set."""

    file: Path
    offset: int


def _found(root: Path, level: Level = "stored") -> tuple[Fault, ...] | str:
    """What `verify` finds; text if it refuses to look."""
    try:
        return verify(root, level=level, threads=1).problems
    except (FormatError, IntegrityError) as error:
        return str(error)


def _is_located(problems: tuple[Fault, ...] | str, place: Place) -> bool:
    """Whether some problem is of this file and holds this byte, in no larger a range than a chunk's."""
    if isinstance(problems, str):
        return place.file.name in problems
    here = [problem for problem in problems if Path(problem.file).name == place.file.name]
    if place.file.suffix != ".bin" or place.offset < DATA_START:
        return bool(here)
    ranges = [(p.start, p.stop) for p in here if p.start is not None and p.stop is not None]
    return any(a <= place.offset < b and b - a <= CHUNK_BYTES for a, b in ranges) or any(
        problem.start is None or problem.stop is None for problem in here
    )


def flips(
    root: Path, places: Iterable[Place], random: Random, *, only_its_partition: bool = False
) -> Iterator[Outcome]:
    """Flip one bit of each of these bytes, one at a time."""
    for place in places:
        bit = 1 << random.randrange(8)
        what = f"bit {bit} of byte {place.offset} of {place.file.name} flipped"

        def trial(place: Place = place, bit: int = bit, what: str = what) -> Outcome:
            with place.file.open("r+b", buffering=0) as file:
                before = os.pread(file.fileno(), 1, place.offset)
                os.pwrite(file.fileno(), bytes([before[0] ^ bit]), place.offset)
                problems = _found(place.file.with_suffix(".json") if only_its_partition else root)
                os.pwrite(file.fileno(), before, place.offset)
            if not problems:
                return Outcome("lost", f"{what}: not found")
            located = _is_located(problems, place)
            return Outcome("refused" if located else "lost", f"{what}: {'located' if located else problems}")

        yield guarded(trial, what)


def truncations(root: Path, places: Iterable[Place]) -> Iterator[Outcome]:
    """Cut a file off at each of these places."""
    for place in places:
        what = f"{place.file.name} cut to {place.offset} bytes"

        def trial(place: Place = place, what: str = what) -> Outcome:
            data = place.file.read_bytes()
            os.truncate(place.file, place.offset)
            problems = _found(root)
            place.file.write_bytes(data)
            return Outcome("refused" if problems else "lost", f"{what}: {problems or 'not found'}")

        yield guarded(trial, what)


def places_in(root: Path) -> list[Place]:
    """Every byte of every file of a set."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [Place(path, offset) for path in files for offset in range(path.stat().st_size)]


def small_set(folder: Path) -> Path:
    """A set of a few ten thousand bytes, with everything that a set can have."""
    weights = llama_weights(1, rows=8, columns=8)
    files = {"config.json": CAUSAL_CONFIG, "one/tokens.txt": b"abc"}
    source = write_checkpoint(folder / "model", [weights[:2], weights[2:]], index=True, files=files)
    split(source, folder / "set", 2, threads=1)
    return folder / "set"


def large_set(folder: Path) -> Path:
    """A set of some 50 MB with chunks of full size."""
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (1280, 4096), 90) for k in range(8)]
    split(write_checkpoint(folder / "model", [weights], files={"config.json": CAUSAL_CONFIG}), folder / "set", 2)
    return folder / "set"


def swaps(folder: Path) -> Iterator[Outcome]:
    """Put files, and chunks, of one set in the place of another's: each is sound in itself."""
    weights = [*llama_weights(2), Weight("model.layers.1.big", "BF16", (64, 64), 64)]
    files = {"config.json": CAUSAL_CONFIG}
    source = write_checkpoint(folder / "model", [weights], files=files)
    tuned = write_checkpoint(folder / "tuned" / "model", [weights], files=files, seed=7)
    split(source, folder / "set", 2)
    others = {
        "another fine-tune": lambda out: split(tuned, out, 2),
        "another plan": lambda out: split(source, out, 2, by="layers"),
        "more partitions": lambda out: split(source, out, 3),
        "another codec": lambda out: split(source, out, 2, codec="raw"),
        "another name": lambda out: split(source, out, 2, model_id="other/name"),
    }
    mixes = (("partition_0.bin",), ("partition_0.json",), ("partition_0.bin", "partition_0.json"),
             ("partition_set.json",), ("partition_0.json", "partition_1.json", "partition_set.json"))  # fmt: skip
    for number, (name, make) in enumerate(others.items()):
        other = folder / str(number)
        make(other)
        for mix in mixes:
            what = f"{' and '.join(mix)} of {name}"

            def trial(mix: tuple[str, ...] = mix, other: Path = other, what: str = what) -> Outcome:
                victim = Path(shutil.copytree(folder / "set", folder / "victim"))
                for file in mix:
                    shutil.copyfile(other / file, victim / file)
                # The plan's manifest names and places may be all that differs: then what was mixed is the same file.
                same = tree(victim) == tree(folder / "set") or tree(victim) == tree(other)
                problems = _found(victim)
                shutil.rmtree(victim)
                fine = bool(problems) or same
                return Outcome("refused" if fine else "lost", f"{what}: {problems or 'not found'}")

            yield guarded(trial, what)
    yield from _swapped_chunks(folder / "set", folder / "victim")


def _swapped_chunks(made: Path, victim: Path) -> Iterator[Outcome]:
    """Exchange the stored bytes of two chunks of a partition, of the same length if there are such."""
    with open_partition_files(made / "partition_0.json", "pread") as partition:
        records = [(int(r["stored_offset"]), int(r["stored_bytes"])) for r in partition.index]
    for number, (start, size) in enumerate(records[1:], 1):
        other, other_size = records[number - 1]
        size = min(size, other_size)

        def trial(start: int = start, other: int = other, size: int = size) -> Outcome:
            shutil.copytree(made, victim)
            path = victim / "partition_0.bin"
            data = bytearray(path.read_bytes())
            one, two = bytes(data[start : start + size]), bytes(data[other : other + size])
            data[start : start + size], data[other : other + size] = two, one
            path.write_bytes(data)
            problems = _found(victim)
            shutil.rmtree(victim)
            located = all(_is_located(problems, Place(path, at)) for at in (start, other))
            return Outcome("refused" if (problems and located) or one == two else "lost", f"chunks swapped: {problems}")

        yield guarded(trial, f"chunks {number - 1} and {number} swapped")


def _write_index(root: Path, change: Callable[[bytearray], None]) -> Path:
    """Change the chunk index of partition 0 and make every checksum that leads to it fit; returns its manifest."""
    manifest_path, path = root / "partition_0.json", root / "partition_0.bin"
    with open_partition_files(manifest_path, "pread") as partition:
        start, index = partition.manifest.data_stop, bytearray(partition.index.tobytes())
    old = sha256_of(index)
    change(index)
    text = manifest_path.read_bytes().replace(old.encode(), sha256_of(index).encode())
    path.write_bytes(path.read_bytes()[:start] + pack_tail(bytes(index), start, text))
    manifest_path.write_bytes(text)
    return manifest_path


def forged_indexes(made: Path, victim: Path, fields: Iterable[int]) -> Iterator[Outcome]:
    """Let every field of a chunk record lie, all checksums in order: found by full at the latest, at no great cost.

    `fields` number pairs of a field and a lie.
    """
    layout = ((0, 8), (8, 4), (12, 4), (16, 8), (24, 8), (32, 4), (36, 1), (37, 1), (38, 2), (40, 32))
    lies = [(at, size, lie) for at, size in layout for lie in (0, 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1)]
    for number in fields:
        at, size, lie = lies[number % len(lies)]
        what = f"bytes {at} to {at + size} of the first chunk record say {lie:,}"

        def trial(at: int = at, size: int = size, lie: int = lie, what: str = what) -> Outcome:
            shutil.copytree(made, victim)
            same = []

            def change(index: bytearray) -> None:
                same.append(int.from_bytes(index[at : at + size], "little") == lie)
                index[at : at + size] = lie.to_bytes(size, "little")

            manifest = _write_index(victim, change)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            problems = _found(manifest, "full")
            try:
                with open_partition(manifest, threads=1) as partition:
                    for name in partition:
                        partition[name]
                problems = problems if same[0] else problems and "and refused"
            except MmsplitError:
                pass
            cost = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            shutil.rmtree(victim)
            fine = (bool(problems) or same[0]) and cost < _MOST_MEMORY_KIB
            return Outcome("refused" if fine else "lost", f"{what}: {problems}, {cost} KiB")

        yield guarded(trial, what)


LIES = 9 * 4


def damaged_work(made: Stage, random: Random, stride: dict[str, int]) -> Iterator[Outcome]:
    """Flip a bit of, or cut, what an unfinished split left; then go on.

    `stride` says, by the end of a file's name ("" for the others), how many bytes to go from one to the next.
    """
    assert made.scenario is BY_NAME["split --resume"]
    names = [n for n in tree(made.folder / "given") if n.startswith(("unfinished", "partition")) or n == "config.json"]
    sizes = {name: (made.folder / "given" / name).stat().st_size for name in sorted(names)}
    steps = {name: next(step for end, step in stride.items() if name.endswith(end)) for name in sizes}
    places = [(name, offset) for name, size in sizes.items() for offset in range(0, size, steps[name])]
    for name, offset in places:
        cut, bit = random.random() < 0.2, 1 << random.randrange(8)
        what = f"unfinished {name}: {'cut at' if cut else f'bit {bit} flipped in'} byte {offset}"

        def trial(name: str = name, offset: int = offset, cut: bool = cut, bit: int = bit, what: str = what) -> Outcome:
            work = made.fresh()
            path = work.out / name
            data = bytearray(path.read_bytes())
            if cut:
                del data[offset:]
            else:
                data[offset] ^= bit
            path.write_bytes(data)
            outcome = _resume(made, work, what)
            shutil.rmtree(work.out.parent)
            return outcome

        yield guarded(trial, what)


def _resume(made: Stage, work: Work, what: str) -> Outcome:
    try:
        made.scenario.again(work)
    except MmsplitError as error:
        # Refused: nothing was made of it, and once it is removed by hand the run is an ordinary one.
        if made.scenario.judge(work.out, made.expected):
            return Outcome("lost", f"{what}: {error}, and yet there is a set")
        return Outcome("refused", f"{what}: {error}")
    problems = compare(work.out, made.expected)
    return Outcome("lost" if problems else "survived", f"{what}: {'; '.join(problems)}")
