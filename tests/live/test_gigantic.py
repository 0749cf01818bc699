# SPDX-License-Identifier: GPL-2.0-only
"""A huge page of 1 GiB: a leaf of the third level, shared by a fork."""

import pytest

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import check_task
from kvirt.findings import Severity
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import get_kernel
from kvirt.layout import layout_of
from kvirt.mm.pagetable import WalkTroubles, for_each_leaf
from kvirt.target import open_target
from kvirt.tasks import find_process
from tests.conftest import MODERN

PAGES = 1 << 18
# MAP_PRIVATE, MAP_ANONYMOUS, MAP_HUGETLB and MAP_HUGE_1GB.
PROGRAM = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
at = libc.mmap(None, 1 << 30, 3, 0x2 | 0x20 | 0x40000 | 30 << 26, -1, 0)
if at == 2**64 - 1:
    raise OSError(ctypes.get_errno(), "no page of 1 GiB")
ctypes.memset(at, 1, 4096)
child = os.fork()
if child:
    print(os.getpid(), child, at, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def guest():
    # The page must lie in one piece: 2 GiB below the hole for devices have none that is free.
    with Guest(get_kernel(MODERN), memory="6G", append="hugepagesz=1G hugepages=1", timeout=600) as guest:
        yield guest


def test_page_of_the_third_level_is_verified(guest):
    process = guest.popen(["python3", "-c", PROGRAM])
    line = process.readline(120)
    assert line, process.stderr_text()
    parent, child, address = map(int, line.split())
    target = open_target(qemu=guest.qmp_socket, symbols=[guest.kernel.vmlinux])
    layout = layout_of(target.prog)
    checker = ProcessChecker(target.prog, layout, moves=True)
    for pid in (parent, child):
        found = find_process(target.prog, pid)
        space = checker.read(found.mm)
        troubles = WalkTroubles()
        leaves = list(for_each_leaf(target.prog, layout, space.pgd, troubles))
        assert troubles.unreadable == []
        assert [part.address.tolist() for part in leaves if part.level == 2] == [[address]]
        report = check_task(checker, found)
        assert [f for f in report.findings if f.severity is not Severity.TRANSIENT] == []
        assert report.incomplete == []
        assert report.pages.verified >= PAGES
        assert report.pages.verified == report.pages.anon
