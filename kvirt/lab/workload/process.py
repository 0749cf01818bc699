# SPDX-License-Identifier: GPL-2.0-only
"""A process of the workload: its carve-out, the calls that shape it, and its children.

Every method that changes the address space makes the system call and applies the rule of
:mod:`kvirt.lab.workload.regions` that belongs to it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from kvirt.lab.procfs import PAGE_SIZE, PM_SWAPPED, read_pagemap
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.regions import COW, Region, join, page_range

# What is aligned to huge pages grows with the square of a page.
CARVE_OUT = PAGE_SIZE**2 << 4
# The largest PMD-mapped page of the architectures with 4K pages; slots of huge pages align to it.
HUGE_ALIGN = 2 << 20
# Nothing may take longer, not even on an emulated machine.
PATIENCE = 240.0
PAGE_OUT_PATIENCE = 10.0

_PROT = {"r": sc.PROT_READ, "w": sc.PROT_WRITE, "x": sc.PROT_EXEC}


class Skip(Exception):
    """A state this machine cannot have: one sentence that says why."""


class NotReached(Exception):
    """A state that should be there but is not: one sentence that names it."""


class Process:
    """One process of the workload, and the regions that it vouches for."""

    def __init__(
        self,
        name: str,
        what: str,
        scheme: str | None,
        report: socket.socket,
        life: tuple[int, int],
        category: str = "states",
    ) -> None:
        self.name = name
        self.what = what
        self.category = category
        # "anon" if this kernel has an anon pgoff, "legacy" if not, None if that is not known.
        self.scheme = scheme
        self.pid = os.getpid()
        self.regions: dict[str, Region] = {}
        self.skipped: list[tuple[str, str]] = []
        self.children = 0
        # A pipe that holds references to pages, and how many more it can hold.
        self._pipe: tuple[tuple[int, int], int] | None = None
        self._report = report
        # A pipe nobody writes to: it ends when the main process closes it, or is gone.
        self._life = life
        # PROT_NONE, and MAP_NORESERVE so that its flags differ from those of every region: what
        # lies between two regions merges with neither, not even if one becomes PROT_NONE itself.
        self._next = sc.mmap(0, CARVE_OUT, 0, _FENCE)
        self._carve_end = self._next + CARVE_OUT

    # Space

    def slot(self, pages: int, align: int = PAGE_SIZE) -> int:
        """Return the address of unused space for that many pages, with a fence on both sides."""
        start = -(-(self._next + PAGE_SIZE) // align) * align
        self._next = start + pages * PAGE_SIZE
        if self._next + PAGE_SIZE > self._carve_end:
            raise NotReached("The carve-out of the workload is too small for its regions.")
        return start

    def fence(self, start: int, end: int) -> None:
        """Close a hole, or the interpreter's next allocation may land in it and merge."""
        sc.mmap(start, end - start, 0, _FENCE | sc.MAP_FIXED)

    # Mappings

    def _map(self, region: Region, flags: int, fd: int = -1, pgoff: int = 0) -> Region:
        sc.mmap(
            region.start,
            region.size,
            prot_bits(region.prot),
            flags | sc.MAP_FIXED | (sc.MAP_SHARED if region.shared else sc.MAP_PRIVATE),
            fd,
            pgoff * PAGE_SIZE,
        )
        return region

    def anon(self, pages: int, at: int | None = None, prot: str = "rw", align: int = PAGE_SIZE) -> Region:
        """Map private anonymous memory."""
        start = self.slot(pages, align) if at is None else at
        region = Region.mapped("anon", start, pages * PAGE_SIZE, prot=prot)
        return self._map(region, sc.MAP_ANONYMOUS)

    def shared_anon(self, pages: int) -> Region:
        """Map shared anonymous memory, which is a tmpfs file of its own."""
        region = Region.mapped("shmem", self.slot(pages), pages * PAGE_SIZE, 0, shared=True)
        return self._map(region, sc.MAP_ANONYMOUS)

    def file(
        self,
        fd: int,
        pages: int,
        pgoff: int,
        at: int | None = None,
        prot: str = "rw",
        kind: str = "file-private",
    ) -> Region:
        """Map a file: ``kind`` is "file-private", "devzero", or for a shared one "shmem" ..."""
        start = self.slot(pages) if at is None else at
        shared = kind in ("shmem", "file-shared")
        region = Region.mapped(kind, start, pages * PAGE_SIZE, pgoff, prot, shared)
        return self._map(region, 0, fd, pgoff)

    def memfd(self, pages: int) -> int:
        """Return a descriptor of a tmpfs file whose pages all exist."""
        fd = os.memfd_create("kvirt-lab")
        os.write(fd, b"kvirt lab\n".ljust(PAGE_SIZE, b".") * pages)
        return fd

    # Pages

    def write(self, region: Region, pages: Iterable[int] | None = None) -> Region:
        """Write to pages of it, by default to all; unless it is shared they become anonymous."""
        if pages is None:
            sc.store(region.start, region.size, 0x6B)
            addresses = set(page_range(region.start, region.end))
        else:
            addresses = {region.address(page) for page in pages}
            for address in addresses:
                sc.store(address, 1, 0x6B)
        if region.kind in COW and not region.shared:
            region.faulted = True
            for pages_of in (region.inherited, region.read, region.zero, region.swapped):
                pages_of -= addresses
            region.written |= addresses
        else:
            region.read |= addresses
        return region

    def read(self, region: Region, pages: Iterable[int]) -> Region:
        """Read pages nobody wrote to: file pages or, without a file, the zero page. No anon_vma."""
        for page in pages:
            address = region.address(page)
            sc.load(address)
            (region.zero if region.kind in ("anon", "devzero") else region.read).add(address)
        return region

    def write_by_debugger(self, region: Region, page: int) -> Region:
        """Have a short-lived debugger write a page, which the page's protection does not forbid.

        /proc/PID/mem could do it too, but many kernels now refuse that to all but debuggers.
        """
        address = region.address(page)
        with suppress(OSError):
            # Only where the Yama security module reserves debugging to ancestors.
            sc.prctl(sc.PR_SET_PTRACER, sc.PR_SET_PTRACER_ANY)
        debugger = os.fork()
        if not debugger:
            status = 1
            try:
                sc.rewrite_word(os.getppid(), address)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(debugger, 0)
        with suppress(OSError):
            sc.prctl(sc.PR_SET_PTRACER, 0)
        if status:
            raise Skip("A process may not debug its parent here, or not write to its memory.")
        region.faulted = True
        region.read.discard(address)
        region.written.add(address)
        return region

    def page_out(self, region: Region, *, hold: bool = False) -> Region:
        """Send the pages written here to swap.

        :param hold: keep a reference to them meanwhile, as a pipe does: then they stay in the swap cache
        """
        if hold:
            for address in sorted(region.written):
                self._hold(address)
        whole = len(region.written) == region.pages
        ranges = [(region.start, region.size)] if whole else [(a, PAGE_SIZE) for a in region.written]
        for start, size in ranges:
            self._page_out(start, size)
        region.swapped |= region.written
        region.written.clear()
        return region

    def _page_out(self, start: int, size: int) -> None:
        # The kernel passes over pages that it has at hand for something else: it is asked again.
        deadline = time.monotonic() + PAGE_OUT_PATIENCE
        while True:
            sc.madvise(start, size, sc.MADV_PAGEOUT)
            if all(entry & PM_SWAPPED for entry in read_pagemap(self.pid, start, start + size)):
                return
            if time.monotonic() > deadline:
                raise Skip(f"The kernel did not page out the memory at {start:#x}, though it was asked to.")
            time.sleep(0.01)

    def _hold(self, address: int) -> None:
        """Have a pipe refer to a page until this process ends."""
        if self._pipe is None or self._pipe[1] == 0:
            # A pipe has 16 places; nobody ever reads from this one.
            self._pipe = os.pipe(), 16
        (reader, writer), room = self._pipe
        sc.vmsplice(writer, address, PAGE_SIZE)
        self._pipe = (reader, writer), room - 1

    def bring_back(self, region: Region, pages: Iterable[int]) -> Region:
        """Read pages that are in swap."""
        for page in pages:
            sc.load(region.address(page))
            region.swapped.discard(region.address(page))
            region.written.add(region.address(page))
        return region

    # Changes

    def remap(self, region: Region, to: int | None = None, pages: int | None = None) -> Region:
        """Mremap away (by default to a free slot), and fence the old place."""
        size = region.size if pages is None else pages * PAGE_SIZE
        target = self.slot(size // PAGE_SIZE) if to is None else to
        flags = sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED
        sc.mremap(region.start, region.size, size, flags, target)
        self.fence(region.start, region.end)
        return region.moved(target, size)

    def resize(self, region: Region, pages: int) -> Region:
        """Mremap in place; to grow, the pages after it have to be unmapped."""
        size = pages * PAGE_SIZE
        if size > region.size:
            sc.munmap(region.end, size - region.size)
        sc.mremap(region.start, region.size, size, 0)
        if size < region.size:
            self.fence(region.start + size, region.end)
        return region.resized(size)

    def dontunmap(self, region: Region, first: int = 0, count: int | None = None) -> tuple[Region, Region]:
        """Move the pages of the whole or a part, not the VMA: return what stays, and the copy."""
        count = region.pages if count is None else count
        part = region.address(first)
        target = self.slot(count)
        size = count * PAGE_SIZE
        flags = sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED | sc.MREMAP_DONTUNMAP
        try:
            sc.mremap(part, size, size, flags, target)
        except OSError as error:
            raise Skip(
                f"This kernel refuses MREMAP_DONTUNMAP here ({error.strerror}): anonymous memory"
                " has had it since Linux 5.7, files since 5.13."
            ) from error
        if count == region.pages:
            return region.left_behind(), region.moved(target)
        pieces = region.split(first, first + count)
        moved = next(piece for piece in pieces if piece.start == part)
        copy = moved.moved(target)
        for pages in (moved.written, moved.inherited, moved.read, moved.zero, moved.swapped):
            pages.clear()
        return join(*pieces), copy

    def _change(
        self, region: Region, first: int, count: int, call: Callable[[int, int], None]
    ) -> tuple[list[Region], Region]:
        call(region.address(first), count * PAGE_SIZE)
        pieces = region.split(first, first + count)
        return pieces, next(piece for piece in pieces if piece.start == region.address(first))

    def protect(self, region: Region, first: int, count: int, prot: str) -> list[Region]:
        """Mprotect pages of it: the pieces it is split into. Merging is for the caller to know."""
        pieces, middle = self._change(
            region, first, count, lambda start, size: sc.mprotect(start, size, prot_bits(prot))
        )
        middle.prot = prot
        return pieces

    def advise(self, region: Region, first: int, count: int, advice: int) -> list[Region]:
        """Madvise pages of it, with an advice that changes flags: the pieces it is split into."""
        return self._change(region, first, count, lambda start, size: sc.madvise(start, size, advice))[0]

    def unmap(self, region: Region, first: int, count: int) -> list[Region]:
        """Munmap pages of it, and fence the hole: the pieces that remain."""
        pieces, middle = self._change(region, first, count, sc.munmap)
        self.fence(middle.start, middle.end)
        return [piece for piece in pieces if piece is not middle]

    # Children

    def fork(self, name: str, what: str, body: Callable[[Process], None], category: str = "states") -> None:
        """Start a child that builds what ``body`` says, reports it, and stays."""
        self.children += 1
        with signals_held():
            if not os.fork():
                die_with_parent()
                self._be_child(name, what, body, category)

    def fork_through(
        self,
        name: str,
        what: str,
        between: Callable[[Process], None],
        body: Callable[[Process], None],
    ) -> None:
        """Start a grandchild whose parent, after ``between``, exits before ``body`` begins."""
        self.children += 1
        with signals_held():
            middle = os.fork()
            if not middle:
                self._be_between(name, what, between, body)
        _, status = os.waitpid(middle, 0)
        if status:
            raise NotReached(f"The process between {self.name} and {name} failed.")

    def _be_between(
        self,
        name: str,
        what: str,
        between: Callable[[Process], None],
        body: Callable[[Process], None],
    ) -> None:
        status = 1
        try:
            self._become(f"{self.name} (gone)", self.what, self.category)
            between(self)
            parent = os.getpid()
            if not os.fork():
                # Only then: the signal of a parent's death would come from this one's.
                deadline = time.monotonic() + PATIENCE
                while os.getppid() == parent and time.monotonic() < deadline:
                    time.sleep(0.01)
                die_with_parent()
                self._be_child(name, what, body, self.category)
            status = 0
        finally:
            os._exit(status)

    def _become(self, name: str, what: str, category: str) -> None:
        """Take over, in a new child, what fork copied."""
        self.name, self.what, self.category = name, what, category
        self.pid = os.getpid()
        self.children = 0
        self.skipped = []
        self.regions = {key: region.forked() for key, region in self.regions.items()}

    def _be_child(self, name: str, what: str, body: Callable[[Process], None], category: str) -> None:
        try:
            # The parent ends its children itself: by the end of the pipe, or by a signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
            life, writing_end = self._life
            if writing_end >= 0:
                os.close(writing_end)
                self._life = (life, -1)
            self._become(name, what, category)
            try:
                body(self)
            except Skip as reason:
                self.skipped.append((name, str(reason)))
            except Exception as error:
                self._send({"error": f"The process {name} could not build its states: {error!r}."})
            self.report()
            os.read(life, 1)
        finally:
            os._exit(0)

    def _send(self, message: dict[str, object]) -> None:
        self._report.sendall(json.dumps(message).encode())

    def report(self) -> None:
        """Tell the main process about itself and its regions, one packet each."""
        for message in self.messages():
            self._send(message)
        # When the last sender is gone or done, the main process reads an end of file.
        self._report.close()

    def messages(self) -> Iterable[dict[str, object]]:
        """Return what :meth:`report` sends; the process comes last."""
        for key, region in self.regions.items():
            entry = region.as_json(f"{self.name}/{key}", self.pid)
            yield {"region": {**entry, "category": self.category}}
        for key, reason in self.skipped:
            yield {"skipped": {"name": f"{self.name}/{key}", "reason": reason}}
        entry = {"name": self.name, "pid": self.pid, "what": self.what, "category": self.category}
        yield {"process": entry, "children": self.children}


_HELD = {signal.SIGTERM, signal.SIGINT}
_FENCE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE


def prot_bits(prot: str) -> int:
    """Return the PROT_ bits of letters out of "rwx"."""
    return sum(_PROT[letter] for letter in prot)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals, lest a child gets one before it has its own way to end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
