# SPDX-License-Identifier: GPL-2.0-only
"""Traces itself with programs that were told a lie, so that every assertion is broken, and prints what came.

A sound kernel breaks none. So the programs are compiled with the offset of another member where that of
the anonymous page offset should be: what they then see is a kernel that keeps wrong ones. Run in a guest.
"""

import dataclasses
import json
import os
import sys
import tempfile

from kvirt.btf import kernel_btf
from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.swaparea import SwapArea
from kvirt.layout_trace import read_trace_layout
from kvirt.trace.environment import load_bcc
from kvirt.trace.program import Request
from kvirt.trace.session import Session

READ_WRITE = sc.PROT_READ | sc.PROT_WRITE
FENCE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE
PAGES, OFFSET = 4, 3
SIZE = PAGES * PAGE_SIZE


def told(layout, member):
    """The layout of a kernel in which the offset is where another member of 8 bytes is."""
    constants = dict(layout.constants)
    if constants["KV_LEGACY"]:
        constants["KV_VMA_PGOFF"] = constants[member]
    else:
        constants["KV_VMA_ANON_LO"] = constants[member]
        constants["KV_VMA_ANON_HI"] = constants[member] + 4
    return dataclasses.replace(layout, constants=constants)


def mapping(room, fd):
    sc.mmap(room, SIZE, READ_WRITE, sc.MAP_PRIVATE | sc.MAP_FIXED, fd, OFFSET * PAGE_SIZE)
    return room


def provoke(room, fd):
    """One event of each kind that an assertion looks at."""
    at = mapping(room + SIZE, fd)
    # A new anonymous folio.
    sc.store(at + PAGE_SIZE, 8, 1)
    # A split in two.
    sc.mprotect(at, 2 * PAGE_SIZE, sc.PROT_READ)
    # A walk of one step.
    sc.madvise(at, SIZE, sc.MADV_PAGEOUT)
    # A copy of what was faulted, then of what was not.
    new = room + 4 * SIZE
    sc.mremap(at, 2 * PAGE_SIZE, 2 * PAGE_SIZE, sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED, new)
    return at, new


def main():
    bcc, layout = load_bcc(), read_trace_layout(kernel_btf())
    area = SwapArea()
    area.open()
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(bytes((PAGES + OFFSET) * PAGE_SIZE))
            file.flush()
            for member in sys.argv[1:]:
                room = sc.mmap(0, 8 * SIZE, 0, FENCE)
                lie = layout if member == "truth" else told(layout, member)
                with Session(Request(pid=os.getpid()), lie, bcc) as session:
                    at, new = provoke(room, file.fileno())
                    # What is told gets names of functions: their table takes pages, which would be told of.
                    session.stop()
                    session.poll(0)
                    counts = session.counts()
                document = {
                    "at": at,
                    "new": new,
                    "assertions": {k: dataclasses.asdict(v) for k, v in counts.assertions.items()},
                    "violations": [dataclasses.asdict(one) for one in counts.violations],
                    "untold": counts.violations_untold,
                    "lost": counts.lost,
                    "pid": os.getpid(),
                }
                print(json.dumps(document), flush=True)
                sc.munmap(room, 8 * SIZE)
    finally:
        area.close()


if __name__ == "__main__":
    main()
