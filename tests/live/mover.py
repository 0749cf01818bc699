# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: takes the name that is its argument, waits for a line, and then moves a faulted mapping
away and back, as often as the second argument says.
"""

import sys
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc

RESERVED = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE
PAGES = 2 * PAGE_SIZE


def main(name, times):
    Path("/proc/self/comm").write_text(name)
    # Far from what the mapping could be merged with.
    space = sc.mmap(0, 16 * PAGES, 0, RESERVED)
    home, away = space + 4 * PAGES, space + 8 * PAGES
    rw = sc.PROT_READ | sc.PROT_WRITE
    sc.mmap(home, PAGES, rw, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED)
    sc.store(home, PAGES, 1)
    print(flush=True)
    sys.stdin.readline()
    for _ in range(int(times)):
        for old, new in ((home, away), (away, home)):
            sc.mremap(old, PAGES, PAGES, sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED, new)


if __name__ == "__main__":
    main(*sys.argv[1:])
