# SPDX-License-Identifier: GPL-2.0-only
"""Looking through the pages of one process of the running kernel, in some ways in turn.

Run inside a guest, as root: ``python3 -m kvirt.lab.bench.live PAGE_TYPES PID ROUNDS`` prints one JSON
document. kvirt runs in this process and has its symbols already; page-types is started anew each time, as it
has to be. The plain read is nothing but system calls, for the process's pagemap and the entries of
/proc/kpageflags of its pages, whose places are known beforehand. dd reads these in large blocks, started anew
as page-types is: the longest stretch of pagemap, and of kpageflags what most of the pages have, with what is
between them. The read of /proc/kcore is the same as the plain one, for its lowest page tables and the struct
pages of its pages: what kvirt has to read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import drgn
import numpy as np

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.elfcore import PT_LOAD, read_elf_core
from kvirt.lab.bench.limit import lowest_table, pieces_of
from kvirt.lab.bench.turns import take_turns
from kvirt.lab.procfs import PAGE_SIZE, read_maps
from kvirt.layout import Layout, layout_of
from kvirt.mm.pagetable import U64
from kvirt.target import open_target
from kvirt.tasks import find_process

KCORE = "/proc/kcore"
ENTRY = 8
BLOCK = 1 << 20
# The first and the last of so many pages are left to others, for they may be anywhere.
FEW = 100
# Entries so far apart are not read with all between them.
GAP = 1 << 16
# Documentation/admin-guide/mm/pagemap.rst: bits 0-54 are the page frame, bit 63 says that there is one.
PFN = (1 << 55) - 1
PRESENT = 1 << 63

Runs = list[tuple[int, int]]


def runs_of_pagemap(pid: int) -> Runs:
    """Where in the process's pagemap its mappings are: offsets and sizes in bytes."""
    return [
        (mapping.start // PAGE_SIZE * ENTRY, (mapping.end - mapping.start) // PAGE_SIZE * ENTRY)
        for mapping in read_maps(pid)
        # The kernel's own page for system calls has no entries.
        if mapping.start < 1 << 63
    ]


def pages_of(pid: int, pagemap: Runs) -> tuple[U64, U64]:
    """Where the process has pages in memory: virtual addresses, and page frames."""
    entries = np.frombuffer(b"".join(blocks(f"/proc/{pid}/pagemap", pagemap)), np.uint64)
    numbers = np.concatenate([np.arange(start, start + size, ENTRY) // ENTRY for start, size in pagemap])
    present = entries & np.uint64(PRESENT) != 0
    return numbers[present].astype(np.uint64) * np.uint64(PAGE_SIZE), entries[present] & np.uint64(PFN)


def runs_of_kpageflags(pfns: U64) -> Runs:
    """Where in /proc/kpageflags page frames are, which are in order."""
    breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
    return [(int(run[0]) * ENTRY, len(run) * ENTRY) for run in np.split(pfns, breaks)]


def stretches_of_kpageflags(pfns: U64) -> Runs:
    """Where in /proc/kpageflags most page frames are, which are in order, with what is between them."""
    bulk = pfns[len(pfns) // FEW : len(pfns) - len(pfns) // FEW]
    breaks = np.flatnonzero(np.diff(bulk) > GAP) + 1
    return [(int(run[0]) * ENTRY, (int(run[-1] - run[0]) + 1) * ENTRY) for run in np.split(bulk, breaks)]


def runs_of_kcore(prog: drgn.Program, layout: Layout, pgd: int, addresses: U64, pfns: U64) -> Runs:
    """Where in /proc/kcore the lowest page tables for addresses are, and the struct pages of page frames.

    :param pgd: virtual address of the process's top table
    """
    elf = read_elf_core(Path(KCORE))
    assert elf is not None
    loads = [header for header in elf.headers if header.type == PT_LOAD]
    tables, size = layout.pgtable, layout.page.size
    places = []
    for base in np.unique(addresses // np.uint64(tables.huge_size)).tolist():
        physical = lowest_table(prog, tables, pgd, base * tables.huge_size)
        # Of a huge page there is no such table, and what its entry holds is no start of memory.
        places += [h.offset + physical - h.physical for h in loads if 0 <= physical - h.physical < h.size][:1]
    pieces = pieces_of(np.array(places), tables.page_size)[0]
    # One for each piece of memory.
    for load in loads:
        away = pfns.astype(np.int64) * size + (layout.vmemmap - load.virtual)
        inside = away[(away >= 0) & (away < load.size)]
        if len(inside):
            pieces += pieces_of(inside + load.offset, size)[0]
    assert sum(piece.size for piece in pieces) >= len(pfns) * size
    return [(piece.offset, piece.size) for piece in pieces]


def blocks(path: str, runs: Runs) -> Iterator[bytes]:
    """Read runs of a file, in large blocks."""
    file = os.open(path, os.O_RDONLY)
    try:
        for start, size in runs:
            for offset in range(start, start + size, BLOCK):
                yield os.pread(file, min(BLOCK, start + size - offset), offset)
    finally:
        os.close(file)


def dd(path: str, run: tuple[int, int]) -> list[str]:
    """The command that reads a run of a file in large blocks."""
    flags = "iflag=skip_bytes,count_bytes,fullblock"
    return ["dd", f"if={path}", "of=/dev/null", f"bs={BLOCK}", flags, f"skip={run[0]}", f"count={run[1]}"]


def main() -> None:
    """Measure, and print the document."""
    page_types, pid, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    prog = open_target().prog
    layout = layout_of(prog)
    found = find_process(prog, pid)
    pagemap = runs_of_pagemap(pid)
    addresses, frames = pages_of(pid, pagemap)
    pfns = np.unique(frames)
    kpageflags = runs_of_kpageflags(pfns)
    pgd = ProcessChecker(prog, layout, moves=True).read(found.mm).pgd
    kcore = runs_of_kcore(prog, layout, pgd, addresses, pfns)
    seen = {"pages": len(pfns), "runs": len(kpageflags), "anon": 0, "errors": 0}

    def kvirt() -> None:
        report = check_task(ProcessChecker(prog, layout, moves=True), found)
        assert not report.incomplete, report.incomplete
        seen["anon"], seen["errors"] = report.pages.anon, len(report.findings)

    def plain() -> None:
        for _ in blocks(f"/proc/{pid}/pagemap", pagemap):
            pass
        for _ in blocks("/proc/kpageflags", kpageflags):
            pass

    commands = [dd(f"/proc/{pid}/pagemap", max(pagemap, key=lambda run: run[1]))]
    commands += [dd("/proc/kpageflags", run) for run in stretches_of_kpageflags(pfns)]

    def started() -> None:
        for command in commands:
            subprocess.run(command, stderr=subprocess.DEVNULL, check=True)

    def memory() -> None:
        for _ in blocks(KCORE, kcore):
            pass

    def tool() -> None:
        subprocess.run([page_types, "-p", str(pid)], stdout=subprocess.DEVNULL, check=True)

    ways: dict[str, Callable[[], None]] = {"check-pid": kvirt, "page-types": tool, "plain read": plain}
    ways |= {"dd": started, "kcore": memory}
    seconds = take_turns(ways, rounds)
    print(json.dumps({**seen, "seconds": seconds}))


if __name__ == "__main__":
    main()
