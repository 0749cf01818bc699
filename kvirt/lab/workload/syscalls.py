# SPDX-License-Identifier: GPL-2.0-only
"""The system calls on memory that Python's standard library lacks, through libc."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE, MAP_HUGETLB = 0x4000, 0x40000

MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4

MADV_NORMAL, MADV_SEQUENTIAL, MADV_DONTNEED, MADV_FREE = 0, 2, 4, 8
MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE = 10, 11, 12, 13
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP = 14, 15, 16, 17
MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_PAGEOUT = 18, 19, 20, 21
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 25, 102, 103

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, (1 << 64) - 1

PTRACE_POKEDATA, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 5, 17, 0x4206, 0x4207
WAIT_ALL = 0x40000000

# userfaultfd(2) has the same number on every architecture but x86.
NR_USERFAULTFD = 323 if os.uname().machine == "x86_64" else 282
# As has move_pages(2).
NR_MOVE_PAGES = 279 if os.uname().machine == "x86_64" else 239
MPOL_MF_MOVE_ALL = 1 << 2
UFFD_API, UFFD_USER_MODE_ONLY, UFFD_FEATURE_MOVE = 0xAA, 1, 1 << 16
UFFDIO_REGISTER_MODE_MISSING = 1
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
UFFDIO_COPY, UFFDIO_MOVE = 0xC028AA03, 0xC028AA05

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.pread.restype = _libc.pwrite.restype = ctypes.c_ssize_t
_libc.pread.argtypes = _libc.pwrite.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_long,
]
_libc.vmsplice.restype = ctypes.c_ssize_t
_libc.vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_libc.swapon.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.swapoff.argtypes = [ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long

_MAP_FAILED = ctypes.c_void_p(-1).value


def _fail(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def mmap(address: int, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map memory and return its address."""
    result: int | None = _libc.mmap(address, size, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        raise _fail("mmap")
    return result


def munmap(address: int, size: int) -> None:
    """Unmap [address, address + size)."""
    if _libc.munmap(address, size):
        raise _fail("munmap")


def mprotect(address: int, size: int, prot: int) -> None:
    """Change the protection of [address, address + size)."""
    if _libc.mprotect(address, size, prot):
        raise _fail("mprotect")


def madvise(address: int, size: int, advice: int) -> None:
    """Give advice about [address, address + size)."""
    if _libc.madvise(address, size, advice):
        raise _fail("madvise")


def mremap(old: int, old_size: int, new_size: int, flags: int, new: int = 0) -> int:
    """Move or resize a mapping and return its address."""
    result: int | None = _libc.mremap(old, old_size, new_size, flags, new)
    if result is None or result == _MAP_FAILED:
        raise _fail("mremap")
    return result


def vmsplice(pipe: int, address: int, size: int) -> None:
    """Put [address, address + size) into a pipe without copying it."""
    vector = struct.pack("QQ", address, size)
    if _libc.vmsplice(pipe, vector, 1, 0) != size:
        raise _fail("vmsplice")


def swapon(path: str) -> None:
    """Begin to swap to a device or file."""
    if _libc.swapon(path.encode(), 0):
        raise _fail("swapon")


def swapoff(path: str) -> None:
    """Take everything back from a device or file, and end swapping to it."""
    if _libc.swapoff(path.encode()):
        raise _fail("swapoff")


def prctl(option: int, value: int) -> None:
    """Set one of the process's attributes."""
    if _libc.prctl(option, value, 0, 0, 0):
        raise _fail("prctl")


def store(address: int, size: int, value: int) -> None:
    """Write the byte ``value`` to [address, address + size)."""
    ctypes.memset(address, value, size)


def load(address: int) -> int:
    """Read the byte at an address."""
    return ctypes.string_at(address, 1)[0]


def fill(address: int, size: int, fd: int, offset: int = 0) -> None:
    """Write to memory from a file; where memory cannot be written it raises OSError, not a signal."""
    if _libc.pread(fd, address, size, offset) < 0:
        raise _fail("pread")


def drain(address: int, size: int, fd: int, offset: int = 0) -> None:
    """Read memory into a file; where memory cannot be read it raises OSError, not a signal."""
    if _libc.pwrite(fd, address, size, offset) < 0:
        raise _fail("pwrite")


def rewrite_word(pid: int, address: int) -> None:
    """Write a word of another process with what it has already, as its debugger.

    The word is read here: the caller is a fork of that process.
    """
    word = ctypes.c_void_p.from_address(address).value
    for request, where, data in (
        (PTRACE_SEIZE, None, None),
        (PTRACE_INTERRUPT, None, None),
        (PTRACE_POKEDATA, address, word),
        (PTRACE_DETACH, None, None),
    ):
        if _libc.ptrace(request, pid, where, data) < 0:
            raise _fail("ptrace")
        if request == PTRACE_INTERRUPT:
            os.waitpid(pid, WAIT_ALL)


def move_pages(pages: list[int], nodes: list[int]) -> None:
    """Migrate pages of this process to memory nodes, those of other processes too (MPOL_MF_MOVE_ALL).

    :raises OSError: if one of them did not go where it was to go
    """
    count = len(pages)
    status = (ctypes.c_int * count)()
    where = (ctypes.c_void_p * count)(*pages)
    to = (ctypes.c_int * count)(*nodes)
    failed = _libc.syscall(NR_MOVE_PAGES, 0, ctypes.c_ulong(count), where, to, status, MPOL_MF_MOVE_ALL)
    if failed < 0:
        raise _fail("move_pages")
    if list(status) != nodes:
        raise OSError(errno.EAGAIN, "move_pages left pages where they were")


class Userfaultfd:
    """A userfaultfd(2); to be used in a ``with``, whose end unregisters everything."""

    def __init__(self, features: int = 0) -> None:
        self.fd: int = _libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
        if self.fd < 0:
            raise _fail("userfaultfd")
        try:
            fcntl.ioctl(self.fd, UFFDIO_API, struct.pack("QQQ", UFFD_API, features, 0))
        except OSError:
            os.close(self.fd)
            raise

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def register(self, start: int, size: int) -> None:
        """Register a range for its missing pages."""
        request = struct.pack("QQQQ", start, size, UFFDIO_REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, request)

    def copy(self, to: int, source: int, size: int) -> None:
        """UFFDIO_COPY: fill missing pages with a copy of ``source``."""
        fcntl.ioctl(self.fd, UFFDIO_COPY, struct.pack("QQQQq", to, source, size, 0, 0))

    def move(self, to: int, source: int, size: int) -> None:
        """UFFDIO_MOVE: move the pages themselves."""
        # EAGAIN reports in the request how far it came; a second try is enough for a few pages.
        for _ in range(8):
            try:
                fcntl.ioctl(self.fd, UFFDIO_MOVE, struct.pack("QQQQq", to, source, size, 0, 0))
                return
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
        raise OSError(errno.EAGAIN, "UFFDIO_MOVE: the pages stay busy")
