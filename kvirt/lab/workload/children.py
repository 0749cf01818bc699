# SPDX-License-Identifier: GPL-2.0-only
"""The states that need processes of their own: what fork copies, and what only a fork can make.

Each function registered here runs in the main process and forks. Those of BARE run before the main
process has any region, so that their children have only their own; those of HEIRS run last.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvirt.lab.procfs import PAGE_SIZE, PM_SWAPPED, read_maps, read_pagemap
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import NotReached, Process, Skip
from kvirt.lab.workload.regions import PURE_ANON, Region, page_range

Start = Callable[[Process], None]

BARE: dict[str, Start] = {}
# As BARE, with the options that they need.
BARE_OPTIONAL: dict[str, tuple[Start, set[str]]] = {}
HEIRS: dict[str, Start] = {}

CHAIN_DEPTH = 6
# Large folios of 64 kB, which came in Linux 6.8; with the option "swap" they may be used.
LARGE = Path("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled")
# Of a cgroup that the workload makes for the option "swap": MADV_PAGEOUT leaves merged pages alone.
RECLAIM = Path(f"/sys/fs/cgroup/kvirt-lab-{os.getpid()}/memory.reclaim")
# Seconds.
MERGE_PATIENCE = 60
MANY_PAGES = 240


def bare(name: str) -> Callable[[Start], Start]:
    """Register a function that starts children with nothing to inherit."""

    def register(start: Start) -> Start:
        BARE[name] = start
        return start

    return register


def bare_optional(name: str, *options: str) -> Callable[[Start], Start]:
    """As :func:`bare`, but only with what changes settings of the whole machine."""

    def register(start: Start) -> Start:
        BARE_OPTIONAL[name] = start, set(options)
        return start

    return register


def heir(name: str) -> Callable[[Start], Start]:
    """Register a function that starts children which inherit every state of the main process."""

    def register(start: Start) -> Start:
        HEIRS[name] = start
        return start

    return register


def _keep(p: Process, note: str, **regions: Region) -> None:
    for key, region in regions.items():
        region.note = note
        p.regions[key.replace("_", "-")] = region


@bare("chain")
def chain(p: Process) -> None:
    """Start a chain of forks that write at every level, before and after they fork."""

    def first(child: Process) -> None:
        pages = 2 * CHAIN_DEPTH
        _keep(
            child,
            "Each level of the chain wrote a page before it forked and one after.",
            anon=child.write(child.anon(pages + 4), range(pages, pages + 4)),
            file=child.write(child.file(child.memfd(pages + 9), pages + 4, 5), [pages]),
            moved_file=child.remap(
                child.write(child.file(child.memfd(pages + 4), pages + 4, 0), [pages, pages + 2])
            ),
            late=child.anon(pages + 4),
        )
        level(child, 0)

    def write(child: Process, page: int) -> None:
        for key, region in child.regions.items():
            # Level 2 is the first to touch this one: its anon_vma has no ancestor.
            if key != "late" or page >= 4:
                child.write(region, [page])

    def level(child: Process, depth: int) -> None:
        write(child, 2 * depth)
        if depth + 1 < CHAIN_DEPTH:
            name = f"chain-{depth + 1}"
            what = f"Level {depth + 1} of a chain of forks, writing at every level."

            def body(grandchild: Process) -> None:
                level(grandchild, depth + 1)

            if depth == 2:
                # The process between wrote too, and is gone: its anon_vma has no VMA left, and the
                # next fork may use it again.
                what += " Its parent is gone."
                child.fork_through(name, what, lambda gone: write(gone, 2 * depth + 1), body)
            else:
                child.fork(name, what, body)
        write(child, 2 * depth + 1)

    p.fork("chain-0", "The start of a chain of forks, writing at every level.", first)


@bare("remap-in-child")
def remap_in_child(p: Process) -> None:
    """Start a parent whose child alone moves what the parent wrote: one page at two addresses."""

    def parent(child: Process) -> None:
        _keep(
            child,
            "Written before the fork; the child moved its copy.",
            anon=child.write(child.anon(6), range(4)),
            file=child.write(child.file(child.memfd(16), 6, 3), range(4)),
        )
        child.fork("remap-child", "A child that moved what its parent wrote.", mover)

    def mover(child: Process) -> None:
        for key, region in child.regions.items():
            child.regions[key] = child.write(child.remap(region), [3, 5])

    p.fork("remap-parent", "A parent whose child moves its memory.", parent)


@bare("split-child")
def split_child(p: Process) -> None:
    """Start a parent whose child split what it inherited: VMAs that share a chain of two anon_vmas."""

    def parent(child: Process) -> None:
        note = "Written before the fork and after; the child split it in three."
        _keep(child, note, anon=child.write(child.anon(9), range(6)))
        child.fork("split-child", "A child that split what it inherited.", splitter)

    def splitter(child: Process) -> None:
        region = child.write(child.regions.pop("anon"), [1, 4, 8])
        low, middle, high = child.protect(region, 3, 3, "r")
        _keep(child, "Inherited, written and split.", low=low, middle=middle, high=high)

    p.fork("split-parent", "A parent whose child splits its memory.", parent)


@bare("many-vmas")
def many_vmas(p: Process) -> None:
    """Start a process of many VMAs."""

    def body(child: Process) -> None:
        for name, region in (
            ("anon", child.write(child.anon(MANY_PAGES))),
            ("moved-file", child.remap(child.write(child.file(child.memfd(250), MANY_PAGES, 7)))),
        ):
            pieces = region.split(*range(1, region.pages))
            for number, piece in enumerate(pieces):
                piece.note = "One of many VMAs, every second one read-only."
                if number % 2:
                    sc.mprotect(piece.start, piece.size, sc.PROT_READ)
                    piece.prot = "r"
                child.regions[f"{name}-{number:03}"] = piece

    p.fork("many-vmas", f"A process of more than {2 * MANY_PAGES} VMAs.", body)


@bare("vdso-write")
def vdso_write(p: Process) -> None:
    """Start a process with a page of its vDSO written by a debugger."""

    def body(child: Process) -> None:
        mapping = next((m for m in read_maps() if m.path == "[vdso]"), None)
        if mapping is None:
            raise Skip("This process has no vDSO.")
        region = Region.mapped("special", mapping.start, mapping.end - mapping.start, 0, prot="rx")
        note = "A debugger wrote to the first page of the vDSO."
        _keep(child, note, vdso=child.write_by_debugger(region, 0))

    p.fork("vdso-write", "A process whose vDSO has an anonymous page.", body)


@bare("wipe")
def wipe(p: Process) -> None:
    """Start a parent with MADV_WIPEONFORK on displaced memory, and children that get it emptied."""

    def parent(child: Process) -> None:
        region = child.remap(child.write(child.anon(6), range(4)))
        (region,) = child.advise(region, 0, region.pages, sc.MADV_WIPEONFORK)
        region.wipe_on_fork = True
        _keep(child, "Displaced, and MADV_WIPEONFORK.", region=region)
        what = "A child with unfaulted anonymous memory that is displaced (MADV_WIPEONFORK)."
        child.fork("wiped", what, lambda child: None, "warnings")
        what = "The same, then MADV_KEEPONFORK and split by mprotect."
        child.fork("wiped-kept", what, keeper, "warnings")

    def keeper(child: Process) -> None:
        (region,) = child.advise(child.regions.pop("region"), 0, 6, sc.MADV_KEEPONFORK)
        low, middle, high = child.protect(region, 2, 2, "r")
        note = "Unfaulted, and displaced since before the fork; no flag tells of it any more."
        _keep(child, note, low=low, middle=middle, high=high)

    p.fork("wipe-parent", "A parent with MADV_WIPEONFORK on displaced memory.", parent)


@bare("uffd-shared")
def uffd_shared(p: Process) -> None:
    """Start a process in which a failed UFFDIO_COPY gave a shared mapping an anon_vma."""

    def body(child: Process) -> None:
        fd = os.open(f"/proc/self/fd/{child.memfd(8)}", os.O_RDONLY | os.O_CLOEXEC)
        region = child.file(fd, 4, 1, prot="r", kind="shmem")
        source = child.write(child.anon(1))
        try:
            with sc.Userfaultfd() as uffd:
                uffd.copy(region.start, source.start, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise Skip(f"userfaultfd(2) does not do this here: {error.strerror}.") from error
        else:
            raise NotReached("UFFDIO_COPY filled memory that was never registered.")
        # Linux 6.1 looks at the registration first and leaves the VMA alone; later kernels prepare
        # an anon_vma before. Nothing in /proc tells which.
        region.faulted = True
        region = child.remap(region)
        if child.scheme != "anon":
            region.faulted = None
        note = "Shared and read-only, with an anon_vma from a UFFDIO_COPY that failed; then moved."
        _keep(child, note, region=region, source=source)

    p.fork(
        "uffd-shared",
        "A process with a shared mapping that has an anon_vma.",
        body,
        "warnings",
    )


@bare_optional("swap-shared", "swap")
def swap_shared(p: Process) -> None:
    """Start a parent that has pages in swap, and a child that brings some of them back."""

    def parent(child: Process) -> None:
        _keep(
            child,
            "In swap; the child brought every second page back, so that those are in the swap cache.",
            anon=child.page_out(child.write(child.anon(8))),
            moved_anon=child.page_out(child.remap(child.write(child.anon(8)))),
            file=child.page_out(child.write(child.file(child.memfd(16), 8, 3))),
            moved_file=child.page_out(child.remap(child.write(child.file(child.memfd(16), 8, 3)))),
        )
        if LARGE.exists():
            # Where a large folio is read back whole, the pages that stay in swap have it in the cache.
            large = child.anon(16, align=16 * PAGE_SIZE)
            sc.madvise(large.start, large.size, sc.MADV_HUGEPAGE)
            moved = child.anon(16, align=16 * PAGE_SIZE)
            sc.madvise(moved.start, moved.size, sc.MADV_HUGEPAGE)
            child.write(moved)
            _keep(
                child,
                "In swap as one large folio; the child brought it back.",
                large=child.page_out(child.write(large)),
                moved_large=child.page_out(child.remap(moved, child.slot(16, 16 * PAGE_SIZE))),
            )
        child.fork("swap-child", "A child that brought back pages its parent has in swap.", reader)

    def reader(child: Process) -> None:
        for key, region in child.regions.items():
            # A large folio is read back whole only at its old place within its size.
            step, keep = (1, True) if key.endswith("large") else (2, not key.startswith("moved"))
            here = region if keep else child.remap(region)
            child.regions[key] = child.bring_back(here, range(0, region.pages, step))

    p.fork("swap-parent", "A parent with pages in swap.", parent)


@bare_optional("ksm-swapped", "ksm", "swap")
def ksm_swapped(p: Process) -> None:
    """Start a process whose merged page was swapped out, and came back for one of its places."""

    def body(child: Process) -> None:
        if not RECLAIM.exists():
            raise Skip("This kernel has no memory.reclaim of a cgroup (v2), which came in Linux 5.19.")
        (RECLAIM.parent / "cgroup.procs").write_text(str(child.pid))
        region = child.anon(8)
        # Of a content of its own, so that it is not merged with what others have.
        for page in range(region.pages):
            sc.store(region.address(page), 1, 0x4B)
        region.faulted = True
        sc.madvise(region.start, region.size, sc.MADV_MERGEABLE)
        merging = Path("/proc/self/ksm_merging_pages")
        _wait(lambda: int(merging.read_text()) == region.pages, "KSM did not merge its pages")
        _wait(lambda: _reclaimed(child, region), "the merged page was not swapped out")
        # Or KSM would merge again what comes back.
        sc.madvise(region.start, region.size, sc.MADV_UNMERGEABLE)
        region.swapped = set(page_range(region.start, region.end))
        note = "Equal pages in swap, as one: the page that came back has another index than the rest expect."
        _keep(child, note, region=child.bring_back(region, [0]))

    what = "A process whose merged pages were swapped out, and one of them is back."
    p.fork("ksm-swapped", what, body)


def _reclaimed(p: Process, region: Region) -> bool:
    with suppress(OSError):
        # EAGAIN: it was less.
        RECLAIM.write_text("1M")
    return all(entry & PM_SWAPPED for entry in read_pagemap(p.pid, region.start, region.end))


def _wait(reached: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + MERGE_PATIENCE
    while not reached():
        if time.monotonic() > deadline:
            raise Skip(f"Within {MERGE_PATIENCE} s {failure}.")
        time.sleep(0.05)


@heir("heir")
def inherit(p: Process) -> None:
    """Start a child that inherits every state, and writes a page in each that it may write to."""

    def body(child: Process) -> None:
        for region in child.regions.values():
            if region.kind in PURE_ANON | {"devzero", "file-private"} and "w" in region.prot:
                for address in sorted(region.inherited)[:1]:
                    child.write(region, [(address - region.start) // PAGE_SIZE])

    what = "A child of the main process that inherited every state and wrote a page in each."
    p.fork("heir", what, body)


@heir("heir-untouched")
def inherit_untouched(p: Process) -> None:
    """Start a child that inherits every state and leaves it at that."""
    what = "A child of the main process that inherited every state and wrote nothing."
    p.fork("heir-untouched", what, lambda child: None)
