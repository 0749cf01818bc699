# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: maps files of all kinds that have names, and what only functions name.

It prints which it has mapped, and where, and waits for a line.
"""

import ctypes
import json
import os
import socket
import struct
import sys
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc

X86 = os.uname().machine == "x86_64"
NR_IO_SETUP = 206 if X86 else 0
NR_PERF_EVENT_OPEN = 298 if X86 else 241
NR_IO_URING_SETUP = 425
IORING_OFF_SQES = 0x10000000
PERF_TYPE_SOFTWARE = 1
SOL_PACKET, PACKET_RX_RING = 263, 5
IPC_PRIVATE, IPC_RMID = 0, 0

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


def done(result):
    """Return what a call did; -1 means that it failed."""
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def shared(fd, size=PAGE_SIZE, offset=0, flags=0):
    return sc.mmap(0, size, sc.PROT_READ | sc.PROT_WRITE, sc.MAP_SHARED | flags, fd, offset)


def file(name, deleted=False):
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, PAGE_SIZE)
    if deleted:
        Path(name).unlink()
    return shared(fd)


def memfd(name):
    fd = os.memfd_create(name)
    os.ftruncate(fd, PAGE_SIZE)
    return shared(fd)


def sysv():
    number = done(libc.shmget(IPC_PRIVATE, PAGE_SIZE, 0o600))
    at = done(libc.shmat(number, None, 0))
    done(libc.shmctl(number, IPC_RMID, None))
    return at


def aio():
    context = ctypes.c_ulong()
    done(libc.syscall(NR_IO_SETUP, 8, ctypes.byref(context)))
    # The ring's address is its name.
    return context.value


def perf():
    # struct perf_event_attr, its first version: type and size.
    attributes = struct.pack("II56x", PERF_TYPE_SOFTWARE, 64)
    return shared(done(libc.syscall(NR_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)), 2 * PAGE_SIZE)


def io_uring(offset):
    parameters = ctypes.create_string_buffer(120)
    return shared(done(libc.syscall(NR_IO_URING_SETUP, 4, parameters)), offset=offset)


def packet():
    ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # struct tpacket_req
    ring.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("4I", PAGE_SIZE, 1, 2048, PAGE_SIZE // 2048))
    return shared(ring.detach())


MAPPINGS = {
    "file": lambda: file("/tmp/mapped file"),
    "deleted": lambda: file("/tmp/mapped and deleted", deleted=True),
    "memfd": lambda: memfd("a name"),
    "memfd2": lambda: memfd("(deleted)"),
    "sysv": sysv,
    "anonymous": lambda: shared(-1, flags=sc.MAP_ANONYMOUS),
    "zero": lambda: shared(os.open("/dev/zero", os.O_RDWR)),
    # Nothing is reserved, so there need not be any huge page.
    "hugetlb": lambda: shared(-1, 2 << 20, flags=sc.MAP_ANONYMOUS | sc.MAP_HUGETLB | sc.MAP_NORESERVE),
    "aio": aio,
    "perf": perf,
    "io_uring": lambda: io_uring(0),
    "io_uring2": lambda: io_uring(IORING_OFF_SQES),
    "packet": packet,
}

mapped = {kind: hex(make()) for kind, make in MAPPINGS.items()}
print(json.dumps({"pid": os.getpid(), "mapped": mapped}), flush=True)
sys.stdin.readline()
