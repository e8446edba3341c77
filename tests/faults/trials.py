"""Trials of one scenario: something goes wrong once, then the command is told to go on, and the result is looked at."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from fault_layer import Crash, Fault, Layer
from machine import NotHere, Overdue, no_longer_than
from scenarios import Scenario, Work, compare, fingerprint, local_hub, result_of
from simulated_disk import State, states, write_tree

from mmsplit.errors import MmsplitError

#: survived: the result is that of an undisturbed run.  refused: the command said why not, and was right to.
#: lost: anything else.
Verdict = Literal["survived", "refused", "lost"]

#: A trial takes milliseconds, or seconds on a machine that others use, too.
_PATIENCE_SECONDS = 60

#: EINTR comes once: Python itself repeats a call that a signal interrupted, for ever if need be.
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.EINTR)


class Outcome(NamedTuple):
    """How one trial ended.  `faults` are those that struck; `what` says what was done, and what is wrong if lost."""

    verdict: Verdict
    what: str
    faults: int = 1


class Stage(NamedTuple):
    """A scenario set up: its input, the output it begins with (which may not be there), the result it comes to."""

    scenario: Scenario
    folder: Path
    source: Path
    expected: dict[str, bytes]
    calls: dict[bool, int]

    def fresh(self, *, direct: bool = True) -> Work:
        """Return a new place to work in, with the output that the scenario begins with."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        if (self.folder / "given").exists():
            shutil.copytree(self.folder / "given", place / "out", symlinks=True)
        return Work(self.source, place / "out", direct)

    def at(self, out: Path) -> Work:
        """Return a place to work in that somebody else made."""
        return Work(self.source, out)

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether to write past the page cache, or through it: each way that the scenario knows."""
        return tuple(self.calls)


@contextmanager
def stage(scenario: Scenario, folder: Path) -> Iterator[Stage]:
    """Set a scenario up below `folder`, and see to it that nobody changed its input in the end."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        source = folder / "source"
        if scenario.name.startswith("download"):
            source = stack.enter_context(local_hub(folder))
        first = Work(source, folder / "first" / "out")
        first.out.parent.mkdir()
        scenario.given(first)
        if first.out.exists():
            shutil.move(first.out, folder / "given")
        before = fingerprint(source)
        made = Stage(scenario, folder, source, {}, {})
        for direct in (True, False) if scenario.writes_direct else (True,):
            work = made.fresh(direct=direct)
            with Layer(work.out.parent) as layer:
                scenario.act(work)
            made.calls[direct] = layer.calls
            if made.expected and result_of(work.out) != made.expected:
                raise AssertionError(f"{scenario.name}: two undisturbed runs give different results")
            made.expected.update(result_of(work.out))
            shutil.rmtree(work.out.parent)
        yield made
        if fingerprint(source) != before:
            raise AssertionError(f"{scenario.name}: the source was changed")


def go_on(made: Stage, work: Work, what: str, *, may_refuse: bool) -> Outcome:
    """Look at what is there, run again, and compare with an undisturbed run."""
    scenario = made.scenario
    problems = scenario.judge(work.out, made.expected)
    if problems:
        return Outcome("lost", f"{what}: half-done passes for whole: {'; '.join(problems)}")
    refusal = ""
    try:
        scenario.again(work)
    except MmsplitError as error:
        refusal = f"{type(error).__name__}: {error}"
        if not may_refuse or scenario.insist is None:
            return Outcome("lost", f"{what}: cannot go on: {refusal}")
        scenario.insist(work)
    problems = compare(work.out, made.expected)
    if problems:
        return Outcome("lost", f"{what}: going on gave another result: {'; '.join(problems)}")
    return Outcome("refused" if refusal else "survived", f"{what} {refusal}".strip())


def guarded(trial: Callable[[], Outcome], what: str) -> Outcome:
    """An exception that is not ours is a loss, not the end of the campaign; so is a trial that does not end."""
    try:
        with no_longer_than(_PATIENCE_SECONDS):
            return trial()
    except NotHere:
        raise
    except (Exception, Overdue):
        return Outcome("lost", f"{what}: {traceback.format_exc(limit=-4)}")


def crashes(made: Stage, calls: Iterable[int], *, direct: bool) -> Iterator[Outcome]:
    """Die before each of these calls, and, in turns, in its middle; then go on."""
    for at in calls:
        fault = Fault(at, "torn" if at % 2 else "crash")
        what = f"{fault.how} at call {at} of {made.calls[direct]}, {'direct' if direct else 'buffered'}"

        def trial(fault: Fault = fault, what: str = what) -> Outcome:
            work = made.fresh(direct=direct)
            try:
                with Layer(work.out.parent, fault) as layer:
                    made.scenario.act(work)
            except Crash:
                pass
            outcome = go_on(made, work, what, may_refuse=False)
            shutil.rmtree(work.out.parent)
            return outcome._replace(faults=int(layer.struck))

        yield guarded(trial, what)


def failures(made: Stage, faults: Iterable[Fault], *, direct: bool) -> Iterator[Outcome]:
    """Let the system refuse a call: the command says so in an error of ours, or comes to the right result."""
    for fault in faults:
        name = errno.errorcode[fault.how] if isinstance(fault.how, int) else fault.how
        what = f"{name}{' from' if fault.stays else ' at'} call {fault.at} of {made.calls[direct]}"

        def trial(fault: Fault = fault, what: str = what) -> Outcome:
            work = made.fresh(direct=direct)
            error = ""
            with Layer(work.out.parent, fault) as layer:
                try:
                    made.scenario.act(work)
                except MmsplitError as raised:
                    error = f"{type(raised).__name__}: {raised}"
            if not error:
                problems = compare(work.out, made.expected)
                outcome = Outcome("lost" if problems else "survived", f"{what}: no error, but {'; '.join(problems)}")
            elif fault.how == "short":
                outcome = Outcome("lost", f"{what}: {error}")
            else:
                outcome = go_on(made, work, f"{what}: {error}", may_refuse=False)
                outcome = outcome._replace(verdict="refused" if outcome.verdict == "survived" else outcome.verdict)
            shutil.rmtree(work.out.parent)
            return outcome._replace(faults=int(layer.struck))

        yield guarded(trial, what)


def power_losses(
    made: Stage, random: Random, *, direct: bool, random_states: int, take: Callable[[int], bool] = lambda _: True
) -> Iterator[Outcome]:
    """Lose the power after every change, in every way that the disk allows; `take` chooses among the states."""
    work = made.fresh(direct=direct)
    before = Path(tempfile.mkdtemp(dir=made.folder)) / "before"
    shutil.copytree(work.out.parent, before, symlinks=True)
    with Layer(work.out.parent, keep=True) as layer:
        made.scenario.act(work)
    for number, state in enumerate(states(before, layer.operations, random, random_states)):
        if not (take(number) or state.is_last):
            continue

        def trial(state: State = state) -> Outcome:
            place = Path(tempfile.mkdtemp(dir=made.folder))
            write_tree(place, state.tree)
            again = Work(made.source, place / "out", direct)
            problems = compare(again.out, made.expected) if state.is_last else []
            if problems:
                outcome = Outcome("lost", f"{state.what}: the command had ended well, but {'; '.join(problems)}")
            else:
                outcome = go_on(made, again, state.what, may_refuse=True)
            shutil.rmtree(place)
            return outcome

        yield guarded(trial, state.what)
    shutil.rmtree(work.out.parent)
    shutil.rmtree(before.parent)


def kills(made: Stage, random: Random, count: int) -> Iterator[Outcome]:
    """Kill the command for real (`kill -9`), each time at a random moment, and go on."""
    work = made.fresh()
    started = time.monotonic()
    made.scenario.act(work)
    shutil.rmtree(work.out.parent)
    seconds = max(0.02, 1.3 * (time.monotonic() - started))
    for number in range(count):
        work, delay = made.fresh(), random.random() * seconds
        what = f"kill {number} after {delay * 1000:.1f} ms"

        def trial(work: Work = work, delay: float = delay, what: str = what) -> Outcome:
            killed = _kill_after(delay, lambda: made.scenario.act(work))
            outcome = go_on(made, work, what, may_refuse=False)
            shutil.rmtree(work.out.parent)
            return outcome._replace(faults=int(killed))

        yield guarded(trial, what)


def _kill_after(seconds: float, body: Callable[[], object]) -> bool:
    """Run `body` in a child and kill it after so long; return whether it was alive by then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # libraries have threads; none of ours is running
        child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
