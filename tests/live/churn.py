# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: checks processes while they map, move, fork, exec and exit, and prints what came out."""

import json
import mmap
import os
import random
import signal
import sys
import time

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.errors import KvirtError
from kvirt.layout import layout_of
from kvirt.target import open_target
from kvirt.tasks import find_process

SIZE = 64 * mmap.PAGESIZE


def busy() -> None:
    """Change the address space until killed."""
    fd = os.memfd_create("churn")
    os.ftruncate(fd, SIZE)
    while True:
        maps = [mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE), mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)]
        for area in maps:
            for page in range(0, SIZE, mmap.PAGESIZE):
                area[page] = 1
            area.madvise(random.choice([mmap.MADV_DONTNEED, mmap.MADV_HUGEPAGE, mmap.MADV_NORMAL]))
            area.resize(random.choice([SIZE, 2 * SIZE])) if area is maps[1] else None
        child = os.fork()
        if child == 0:
            maps[0][0] = 2
            os._exit(0)
        for area in maps:
            area.close()
        os.waitpid(child, 0)


def short_lived() -> None:
    """Become another program soon, which exits soon."""
    time.sleep(random.random() / 10)
    os.execvp("sleep", ["sleep", str(random.random() / 5)])


def main() -> None:
    """Check *rounds* processes of each kind."""
    rounds = int(sys.argv[1])
    target = open_target()
    checker = ProcessChecker(target.prog, layout_of(target.prog), moves=True)
    seen = {"checks": 0, "refused": 0, "findings": [], "incomplete": [], "steady": []}
    worker = os.fork()
    if worker == 0:
        busy()
    try:
        for _ in range(rounds):
            child = os.fork()
            if child == 0:
                short_lived()
            for pid in (worker, child):
                seen["checks"] += 1
                try:
                    report = check_task(checker, find_process(target.prog, pid))
                except KvirtError as error:
                    seen["refused"] += 1
                    assert str(pid) in str(error)
                    continue
                seen["findings"] += [(f.id, str(f.severity), f.message) for f in report.findings]
                seen["incomplete"] += report.incomplete
            os.waitpid(child, 0)
            # One that stands still is judged to the end, whatever goes on around it.
            steady = check_task(checker, find_process(target.prog, 1))
            seen["steady"].append([len(steady.findings), len(steady.incomplete), steady.pages.checked > 0])
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    print(json.dumps(seen))


main()
