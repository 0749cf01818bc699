# SPDX-License-Identifier: GPL-2.0-only
"""Times ways of looking through the pages of a dump, in a process of its own.

``python -m kvirt.lab.bench.pages CORE VMLINUX ROUNDS WAY,... PID...`` prints one JSON document. The ways take
turns in each round, so that they share what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import random
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from drgn.helpers.linux.pid import find_task

from kvirt.checks.machine import MachineChecker
from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.cli.common import page_progress
from kvirt.findings import Report, Severity
from kvirt.lab.bench.limit import Limit
from kvirt.lab.bench.plain import count_lists, count_wrong
from kvirt.layout import layout_of
from kvirt.target import Target, open_target
from kvirt.tasks import find_process

# Pages that the plain loop looks at: it takes seconds for them, and each page takes it the same time.
LOOP_PAGES = 1 << 16


@dataclass(slots=True)
class Taken:
    """What one way of looking at pages took."""

    elapsed: list[float] = field(default_factory=list)
    """Seconds of each round, by the clock."""
    seconds: list[float] = field(default_factory=list)
    """Of the processor, all of it in one thread: what else the machine does is not in it."""
    walk: list[float] = field(default_factory=list)
    """Those of the pages alone: the rest is for VMAs and what binds them together."""
    pages: int = 0
    """Anonymous base pages looked at in a round."""
    wrong: int = 0
    """Of these, with a wrong index."""
    vmas: int = 0
    avcs: int = 0
    """VMAs and anon_vma_chains gone through, where these are counted."""


@dataclass(slots=True)
class Measured:
    """What one dump took."""

    opened: float
    """Seconds of the processor until drgn had the symbols and kvirt the layout."""
    drgn_kib: int
    """Resident memory then."""
    ways: dict[str, Taken]
    added_kib: int
    """The most that was resident later, beyond that."""


class _TimedChecker(ProcessChecker):
    """Times the part that looks at pages."""

    walk = 0.0

    def _check_pages(self, *args: object, **kwargs: object) -> dict[int, int]:
        began = time.process_time()
        try:
            return super()._check_pages(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            self.walk += time.process_time() - began


Way = Callable[["Bench", Taken], Callable[[], None]]


class Bench:
    """One dump, and the ways to look at it: each returns what is timed."""

    def __init__(self, target: Target, core: Path, pids: list[int]) -> None:
        self.target, self.core, self.pids = target, core, pids
        self.layout = layout_of(target.prog)

    @functools.cached_property
    def _terminal(self) -> TextIO:
        """A terminal that somebody reads."""
        ours, theirs = os.openpty()
        threading.Thread(target=_read_all, args=(ours,), daemon=True).start()
        return os.fdopen(theirs, "w")

    def loop(self, taken: Taken) -> Callable[[], None]:
        """Pages of the first process, one at a time."""
        task = find_task(self.target.prog, self.pids[0])

        def run() -> None:
            taken.pages, taken.wrong = count_wrong(task, LOOP_PAGES)

        return run

    def limit(self, taken: Taken) -> Callable[[], None]:
        """Reading what has to be read, and comparing it once."""
        limits = self._limits()
        taken.pages = sum(limit.pages for limit in limits)

        def run() -> None:
            file = os.open(self.core, os.O_RDONLY)
            taken.wrong = sum(limit.run(file) for limit in limits)
            os.close(file)

        return run

    def lists(self, taken: Taken) -> Callable[[], None]:
        """VMAs and their lists of anon_vma_chains, one at a time."""
        tasks = [find_task(self.target.prog, pid) for pid in self.pids]

        def run() -> None:
            taken.vmas, taken.avcs = count_lists(tasks)

        return run

    def inflate(self, taken: Taken) -> Callable[[], None]:
        """Decompressing what has to be read, had it been compressed with zlib."""
        limits = self._limits()
        taken.pages = sum(limit.pages for limit in limits)
        file = os.open(self.core, os.O_RDONLY)
        compressed = [data for limit in limits for data in limit.compressed(file)]
        os.close(file)

        def run() -> None:
            for data in compressed:
                zlib.decompress(data, bufsize=4096)

        return run

    def _limits(self) -> list[Limit]:
        checker = ProcessChecker(self.target.prog, self.layout, moves=False)
        spaces = [checker.read(find_process(self.target.prog, pid).mm) for pid in self.pids]
        return [Limit(self.target.prog, self.layout, self.core, space) for space in spaces]

    def check_pid(self, taken: Taken) -> Callable[[], None]:
        """``kvirt check-pid``, without its table."""
        return self._check(taken, moves=False, progress=False)

    def progress(self, taken: Taken) -> Callable[[], None]:
        """The same, counting pages on the terminal."""
        return self._check(taken, moves=False, progress=True)

    def rereading(self, taken: Taken) -> Callable[[], None]:
        """The same, ready to read again what looks wrong, as on a running kernel."""
        return self._check(taken, moves=True, progress=False)

    def _check(self, taken: Taken, *, moves: bool, progress: bool) -> Callable[[], None]:
        processes = [find_process(self.target.prog, pid) for pid in self.pids]
        stderr = self._terminal if progress else sys.stderr

        def run() -> None:
            checker = _TimedChecker(self.target.prog, self.layout, moves=moves)
            report = Report()
            with contextlib.redirect_stderr(stderr), page_progress() as show:
                for process in processes:
                    report.add(check_task(checker, process, show))
            taken.walk.append(checker.walk)
            _note(taken, report)

        return run

    def check_all(self, taken: Taken) -> Callable[[], None]:
        """``kvirt check-all``, without its table."""

        def run() -> None:
            _note(taken, MachineChecker(self.target.prog, self.layout, moves=False).check())

        return run


def _read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def _note(taken: Taken, report: Report) -> None:
    assert not report.incomplete, report.incomplete
    taken.pages = report.pages.anon
    taken.wrong = report.misindexed + report.summary()[Severity.ERROR]


WAYS: dict[str, Way] = {
    "loop": Bench.loop,
    "limit": Bench.limit,
    "inflate": Bench.inflate,
    "lists": Bench.lists,
    "check-pid": Bench.check_pid,
    "again": Bench.check_pid,
    "progress": Bench.progress,
    "rereading": Bench.rereading,
    "check-all": Bench.check_all,
}


def _resident_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(core: Path, vmlinux: Path, rounds: int, names: list[str], pids: list[int]) -> Measured:
    """Look at a dump in some ways in turn."""
    began = time.process_time()
    target = open_target(core=core, symbols=[vmlinux])
    bench = Bench(target, core, pids)
    opened = time.process_time() - began
    # What drgn reads of the kernel's symbols for the first process is drgn's.
    find_process(target.prog, pids[0])
    before = _resident_kib()
    ways = {name: Taken() for name in names}
    runs = {name: WAYS[name](bench, taken) for name, taken in ways.items()}
    for run in runs.values():
        # Once unmeasured: the file comes from the page cache then, for everybody.
        run()
    for taken in ways.values():
        taken.walk.clear()
    order, shuffler = list(runs.items()), random.Random(1)
    for _ in range(rounds):
        # Nobody always has the caches as the same other one left them.
        shuffler.shuffle(order)
        for name, run in order:
            # Nor the garbage of others to look through: it is looked for every so many objects.
            gc.collect()
            began, used = time.perf_counter(), time.process_time()
            run()
            ways[name].seconds.append(time.process_time() - used)
            ways[name].elapsed.append(time.perf_counter() - began)
    return Measured(opened, before, ways, _resident_kib() - before)


def main() -> None:
    """Measure, and print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("core", type=Path)
    parser.add_argument("vmlinux", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("ways", type=lambda text: text.split(","))
    parser.add_argument("pids", type=int, nargs="+")
    options = parser.parse_args()
    measured = measure(options.core, options.vmlinux, options.rounds, options.ways, options.pids)
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
