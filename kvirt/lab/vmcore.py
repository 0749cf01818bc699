# SPDX-License-Identifier: GPL-2.0-only
"""Vmcores of a QEMU guest, without the space that untouched memory would take."""

from __future__ import annotations

import contextlib
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from kvirt.lab.qmp import Qmp, QmpError

CHUNK = 1 << 20
# What file systems can leave out.
BLOCK = 1 << 12


def write(qmp: Qmp, target: IO[bytes], format: str) -> None:
    """Have QEMU dump the guest's memory into a file.

    QEMU itself would write every zero. It writes into a pipe instead, whose zeros become holes.
    """
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, CHUNK)
    with ThreadPoolExecutor(1) as pool, os.fdopen(ours, "rb", buffering=0) as source:
        try:
            qmp.execute("getfd", fd=theirs, fdname="dump")
        finally:
            os.close(theirs)
        copied = pool.submit(copy_sparse, source, target)
        try:
            qmp.execute("dump-guest-memory", paging=False, protocol="fd:dump", format=format)
        finally:
            # Once it writes, QEMU closes its end by itself. It may have refused before.
            with contextlib.suppress(QmpError):
                qmp.execute("closefd", fdname="dump")
        copied.result()


def copy_sparse(source: IO[bytes], target: IO[bytes]) -> int:
    """Copy all of an unbuffered ``source``, with holes for blocks of zeros; return the size."""
    zeros = bytes(CHUNK)
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    size = 0
    # startswith() compares without a copy.
    while filled := _fill(source, view):
        if not buffer.startswith(zeros[:filled]):
            for start in range(0, filled, BLOCK):
                end = min(start + BLOCK, filled)
                if not buffer.startswith(zeros[: end - start], start):
                    target.seek(size + start)
                    target.write(view[start:end])
        size += filled
    target.truncate(size)
    return size


def _fill(source: IO[bytes], view: memoryview) -> int:
    """Read until the buffer is full, so that blocks stay aligned to the file's."""
    filled = 0
    while filled < len(view) and (got := os.readv(source.fileno(), [view[filled:]])):
        filled += got
    return filled
