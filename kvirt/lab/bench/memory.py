# SPDX-License-Identifier: GPL-2.0-only
"""Anonymous memory of a known shape, to measure how fast it is looked through.

Run inside a guest: ``python3 -m kvirt.lab.bench.memory SHAPE PAGES [PROCESSES]``. It prints one line, a JSON
document with the PIDs and how many pages of each are mapped in which way, and keeps the memory until stdin
ends. The pages are shared out equally.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
from collections.abc import Callable

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc

READ_WRITE = sc.PROT_READ | sc.PROT_WRITE
PRIVATE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS
HUGE = 2 << 20
# Freed at random places to be taken again: so many times what is asked for is held meanwhile.
HOARD = 2


def _map(pages: int, advice: int) -> int:
    """Map memory at a multiple of a huge page, and give advice about it."""
    size = pages * PAGE_SIZE
    at = sc.mmap(0, size + HUGE, READ_WRITE, PRIVATE | sc.MAP_NORESERVE)
    at = (at + HUGE - 1) // HUGE * HUGE
    sc.madvise(at, size, advice)
    return at


def _touch(at: int, pages: int) -> None:
    # The kernel faults the pages in one after the other, much faster than Python could.
    sc.madvise(at, pages * PAGE_SIZE, sc.MADV_POPULATE_WRITE)


def contiguous(pages: int) -> None:
    """Base pages, faulted in from the first to the last."""
    _touch(_map(pages, sc.MADV_NOHUGEPAGE), pages)


def huge(pages: int) -> None:
    """Huge pages."""
    _touch(_map(pages, sc.MADV_HUGEPAGE), pages)


def mixed(pages: int) -> None:
    """In turn: huge pages, base pages, and huge pages that are mapped by their base pages."""
    at = _map(pages, sc.MADV_HUGEPAGE)
    step = HUGE // PAGE_SIZE
    for number, first in enumerate(range(0, pages, step)):
        place, count = at + first * PAGE_SIZE, min(step, pages - first)
        if number % 3 == 1:
            sc.madvise(place, count * PAGE_SIZE, sc.MADV_NOHUGEPAGE)
        _touch(place, count)
        if number % 3 == 2:
            # A protection of its own splits the entry, and not the folio.
            sc.mprotect(place, PAGE_SIZE, sc.PROT_READ)
            sc.mprotect(place, PAGE_SIZE, READ_WRITE)


def vmas(pages: int) -> None:
    """Base pages, each a VMA of its own: what may be written and what may not takes turns."""
    at = _map(pages, sc.MADV_NOHUGEPAGE)
    _touch(at, pages)
    for place in range(at, at + pages * PAGE_SIZE, 2 * PAGE_SIZE):
        sc.mprotect(place, PAGE_SIZE, sc.PROT_READ)


SHAPES: dict[str, Callable[[int], None]] = {
    "contiguous": contiguous,
    "huge": huge,
    "mixed": mixed,
    "vmas": vmas,
}


def scatter(pages: int) -> None:
    """Leave the kernel with free pages whose neighbours are taken, in no order.

    A hoard of several times the pages is faulted in, and as many as are asked for are freed again, here and
    there: what is faulted in next gets these. The rest is kept until the end.
    """
    total = HOARD * pages
    at = _map(total, sc.MADV_NOHUGEPAGE)
    sc.madvise(at, total * PAGE_SIZE, sc.MADV_DONTFORK)
    _touch(at, total)
    # Every other page, so that no two that are free lie side by side and become one larger block.
    places = list(range(0, total, HOARD))
    random.Random(1).shuffle(places)
    for place in places:
        sc.madvise(at + place * PAGE_SIZE, PAGE_SIZE, sc.MADV_DONTNEED)


def _child(shape: Callable[[int], None], pages: int) -> int:
    """Start a process that has the memory until it is killed; returns its PID once it has it."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Whatever happens, a child does not go on with its parent's work.
        try:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
            shape(pages)
            os.write(theirs, b"\n")
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        if pipe.read(1) != b"\n":
            raise MemoryError(f"a process could not get {pages} pages")
    return pid


def _link(at: int, depth: int, left: int, pipe: int) -> None:
    """Start a process that writes to one of the pages, and those below it; each tells its PID."""
    if os.fork():
        return
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        sc.store(at + depth * PAGE_SIZE, 1, 1)
        os.write(pipe, b"%d\n" % os.getpid())
        if left > 1:
            _link(at, depth + 1, left - 1, pipe)
        signal.pause()
    finally:
        os._exit(1)


def chain(processes: int) -> list[int]:
    """Start processes, each the child of the one before: they share as many pages, and copy one each."""
    at = _map(processes, sc.MADV_NOHUGEPAGE)
    _touch(at, processes)
    ours, theirs = os.pipe()
    _link(at, 0, processes, theirs)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        pids = [int(pipe.readline() or 0) for _ in range(processes)]
    if 0 in pids:
        raise MemoryError(f"there is no room for {processes} processes")
    return pids


def main() -> None:
    """Make memory, say whose it is, and keep it until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=[*SHAPES, "fragmented", "chain"])
    parser.add_argument("pages", type=int)
    parser.add_argument("processes", type=int, nargs="?", default=1)
    options = parser.parse_args()
    share = options.pages // options.processes
    if options.shape == "chain":
        _say(chain(options.pages), options.pages)
        return
    if options.shape == "fragmented":
        scatter(options.pages)
    shape = SHAPES.get(options.shape, contiguous)
    pids = [_child(shape, share) for _ in range(options.processes)]
    _say(pids, share * options.processes)


def _say(pids: list[int], pages: int) -> None:
    print(json.dumps({"pids": pids, "pages": pages}), flush=True)
    # They end with this process.
    sys.stdin.read()


if __name__ == "__main__":
    main()
