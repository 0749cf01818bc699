# SPDX-License-Identifier: GPL-2.0-only
"""Has the kernel run out of memory for VMAs: splits and copies of VMAs fail with ENOMEM, and are counted.

Run as root in a guest: ``python3 -m tests.live.starve``. The process is in a control group that may have no
more memory than it has, and nobody in it may be killed for that: what the kernel allocates in its name fails
then (mm/memcontrol.c: try_charge_memcg()). Prints what calls came to what, as JSON.
"""

import ctypes
import errno
import gc
import json
import os
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc

GROUPS = Path("/sys/fs/cgroup")
GROUP = GROUPS / "kvirt-starve"
# The kernel keeps some memory in advance, enough for thousands of VMAs on each processor.
TRIES = 30_000
FAILURES = 40
PRIVATE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE
MOVE = sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED
MCL_CURRENT = 1


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mremap.restype = ctypes.c_void_p


def outcomes(call, places):
    """Numbers of calls that were done and that failed for want of memory; any other failure is one of ours.

    Without exceptions: their memory comes and goes, and a munmap() of the interpreter's would split VMAs too.
    """
    done = failed = 0
    for place in places:
        ctypes.set_errno(0)
        call(place)
        error = ctypes.get_errno()
        if error not in (0, errno.ENOMEM):
            raise OSError(error, os.strerror(error))
        done += error == 0
        failed += error != 0
        if failed == FAILURES:
            break
    return {"done": done, "failed": failed}


def main():
    (GROUPS / "cgroup.subtree_control").write_text("+memory")
    GROUP.mkdir(exist_ok=True)
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/oom_score_adj").write_text("-1000")
    # Nothing is faulted in, so that a move has no page tables to make.
    split = sc.mmap(0, 2 * TRIES * PAGE_SIZE, sc.PROT_READ, PRIVATE)
    room = sc.mmap(0, 4 * TRIES * PAGE_SIZE, 0, PRIVATE)
    sc.munmap(room, 4 * TRIES * PAGE_SIZE)
    # Apart from each other, so that none merges.
    movers = [room + 2 * i * PAGE_SIZE for i in range(2 * FAILURES)]
    for place in movers:
        sc.mmap(place, PAGE_SIZE, sc.PROT_READ, PRIVATE | sc.MAP_FIXED)
    targets = {place: place + 2 * TRIES * PAGE_SIZE for place in movers}
    singles = [split + (2 * i + 1) * PAGE_SIZE for i in range(TRIES - 1)]
    size, zero = ctypes.c_size_t(PAGE_SIZE), ctypes.c_int(0)
    singles = [ctypes.c_void_p(place) for place in singles]
    targets = [(ctypes.c_void_p(place), ctypes.c_void_p(target)) for place, target in targets.items()]
    gc.disable()
    if LIBC.mlockall(MCL_CURRENT):
        raise OSError(ctypes.get_errno(), "mlockall")
    current = (GROUP / "memory.current").read_bytes()
    # Opening a file takes memory too.
    limit = os.open(GROUP / "memory.max", os.O_WRONLY)
    os.write(limit, current)
    try:
        splits = outcomes(lambda place: LIBC.mprotect(place, size, zero), singles)
        copies = outcomes(lambda pair: LIBC.mremap(pair[0], size, size, MOVE, pair[1]), targets)
    finally:
        os.write(limit, b"max")
    print(json.dumps({"mprotect": splits, "mremap": copies}))


if __name__ == "__main__":
    main()
