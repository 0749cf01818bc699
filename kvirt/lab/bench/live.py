# SPDX-License-Identifier: GPL-2.0-only
"""Looking through the pages of one process of the running kernel, in three ways in turn.

Run inside a guest, as root: ``python3 -m kvirt.lab.bench.live PAGE_TYPES PID ROUNDS`` prints one JSON
document. kvirt runs in this process and has its symbols already; page-types is started anew each time, as it
has to be. The plain read does what dd would with large blocks: nothing but system calls, for the process's
pagemap and the entries of /proc/kpageflags of its pages, whose places are known beforehand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.lab.bench.turns import take_turns
from kvirt.lab.procfs import PAGE_SIZE, read_maps
from kvirt.layout import layout_of
from kvirt.target import open_target
from kvirt.tasks import find_process

ENTRY = 8
BLOCK = 1 << 20
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


def runs_of_kpageflags(pid: int, pagemap: Runs) -> tuple[Runs, int]:
    """Where in /proc/kpageflags the process's pages are, and how many pages there are."""
    entries = np.frombuffer(b"".join(blocks(f"/proc/{pid}/pagemap", pagemap)), np.uint64)
    pfns = np.unique(entries[entries & np.uint64(PRESENT) != 0] & np.uint64(PFN))
    breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
    return [(int(run[0]) * ENTRY, len(run) * ENTRY) for run in np.split(pfns, breaks)], len(pfns)


def blocks(path: str, runs: Runs) -> Iterator[bytes]:
    """Read runs of a file, in large blocks."""
    file = os.open(path, os.O_RDONLY)
    try:
        for start, size in runs:
            for offset in range(start, start + size, BLOCK):
                yield os.pread(file, min(BLOCK, start + size - offset), offset)
    finally:
        os.close(file)


def main() -> None:
    """Measure, and print the document."""
    page_types, pid, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    prog = open_target().prog
    layout = layout_of(prog)
    found = find_process(prog, pid)
    pagemap = runs_of_pagemap(pid)
    kpageflags, pages = runs_of_kpageflags(pid, pagemap)
    seen = {"pages": pages, "runs": len(kpageflags), "anon": 0, "errors": 0}

    def kvirt() -> None:
        report = check_task(ProcessChecker(prog, layout, moves=True), found)
        assert not report.incomplete, report.incomplete
        seen["anon"], seen["errors"] = report.pages.anon, len(report.findings)

    def plain() -> None:
        for _ in blocks(f"/proc/{pid}/pagemap", pagemap):
            pass
        for _ in blocks("/proc/kpageflags", kpageflags):
            pass

    def tool() -> None:
        subprocess.run([page_types, "-p", str(pid)], stdout=subprocess.DEVNULL, check=True)

    ways: dict[str, Callable[[], None]] = {"check-pid": kvirt, "page-types": tool, "plain read": plain}
    seconds = take_turns(ways, rounds)
    print(json.dumps({**seen, "seconds": seconds}))


if __name__ == "__main__":
    main()
