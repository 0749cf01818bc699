# SPDX-License-Identifier: GPL-2.0-only
"""The same event again and again, to measure what tracing adds to it.

Run inside a guest: ``python3 -m kvirt.lab.bench.events KIND COUNT``. Each line on stdin has it do COUNT
events; it prints how many nanoseconds one took. What leads back to where it began is not in the time, but for
mprotect(), which merges again what it split.
"""

from __future__ import annotations

import argparse
import atexit
import sys
import time
from collections.abc import Callable

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.swaparea import SwapArea

READ_WRITE = sc.PROT_READ | sc.PROT_WRITE
PRIVATE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS
MOVE = sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED


def copy_vma(count: int) -> Callable[[], int]:
    """One copy_vma() each: a page that was written to goes back and forth."""
    room = sc.mmap(0, 8 * PAGE_SIZE, 0, PRIVATE | sc.MAP_NORESERVE)
    places = [room + PAGE_SIZE, room + 5 * PAGE_SIZE]
    sc.mmap(places[0], PAGE_SIZE, READ_WRITE, PRIVATE | sc.MAP_FIXED)
    sc.store(places[0], 8, 1)

    def run() -> int:
        began = time.perf_counter_ns()
        for i in range(count):
            sc.mremap(places[i % 2], PAGE_SIZE, PAGE_SIZE, MOVE, places[1 - i % 2])
        return time.perf_counter_ns() - began

    return run


def split_vma(count: int) -> Callable[[], int]:
    """One __split_vma() each: the first half of a mapping changes its protection, and changes it back."""
    room = sc.mmap(0, 4 * PAGE_SIZE, 0, PRIVATE | sc.MAP_NORESERVE)
    at = room + PAGE_SIZE
    sc.mmap(at, 2 * PAGE_SIZE, READ_WRITE, PRIVATE | sc.MAP_FIXED)
    sc.store(at, 8, 1)

    def run() -> int:
        began = time.perf_counter_ns()
        for _ in range(count):
            sc.mprotect(at, PAGE_SIZE, sc.PROT_READ)
            sc.mprotect(at, PAGE_SIZE, READ_WRITE)
        return time.perf_counter_ns() - began

    return run


def rmap(count: int) -> Callable[[], int]:
    """One walk of rmap_walk() each: a page is written to swap. Getting it back is not in the time."""
    at = _memory(count)
    area = SwapArea()
    area.open()
    atexit.register(area.close)

    def run() -> int:
        began = time.perf_counter_ns()
        sc.madvise(at, count * PAGE_SIZE, sc.MADV_PAGEOUT)
        took = time.perf_counter_ns() - began
        _write(at, count)
        return took

    return run


def fault(count: int) -> Callable[[], int]:
    """One new anonymous folio each."""
    at = _memory(count)
    size = count * PAGE_SIZE

    def run() -> int:
        sc.madvise(at, size, sc.MADV_DONTNEED)
        began = time.perf_counter_ns()
        _write(at, count)
        return time.perf_counter_ns() - began

    return run


def _memory(pages: int) -> int:
    at = sc.mmap(0, pages * PAGE_SIZE, READ_WRITE, PRIVATE)
    sc.madvise(at, pages * PAGE_SIZE, sc.MADV_NOHUGEPAGE)
    _write(at, pages)
    return at


def _write(at: int, pages: int) -> None:
    for page in range(pages):
        sc.store(at + page * PAGE_SIZE, 8, 1)


KINDS = {"copy-vma": copy_vma, "split-vma": split_vma, "rmap": rmap, "fault": fault}


def main() -> None:
    """Do events when told to, until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    run = KINDS[options.kind](options.count)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(run() / options.count, flush=True)


if __name__ == "__main__":
    main()
