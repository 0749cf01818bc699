# SPDX-License-Identifier: GPL-2.0-only
"""Runs in a guest: does what `kvirt trace` counts, and says how much of each it was.

Each phase is a fork of its own, that prepares, prints a line, waits for one, does what is to be counted,
prints what that must have come to, and waits again. The forecast is worked out from the calls alone, by the
rules of kvirt.lab.workload.regions, in the words of kvirt.trace.counts. At the end of its stdin nothing
is waited for any more.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import pickle
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from kvirt.lab.procfs import PAGE_SHIFT, PAGE_SIZE, PM_SWAPPED, read_maps, read_pagemap, smaps_field
from kvirt.lab.workload import syscalls as sc
from kvirt.lab.workload.process import Skip, die_with_parent, prot_bits
from kvirt.lab.workload.program import kernel_scheme
from kvirt.lab.workload.regions import COW, Region, join
from kvirt.lab.workload.swaparea import SwapArea

COMM = b"kvirt-remaps"
PR_SET_NAME = 15
MADV_SOFT_OFFLINE = 101
# Holes in the carve-out are smaller than anything the interpreter asks for.
PAGES = 4
CARVE_OUT = 96 << 20
FENCE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE
HUGE = 2 << 20
CGROUPS = Path("/sys/fs/cgroup")
KSM = Path("/sys/kernel/mm/ksm")
MERGE_PATIENCE = 60
# Of each of a crowd: moves there and back, and pages to swap out.
ROUNDS, CROWD_PAGES = 100, 48
# Of a region whose pages a fork may have given to other processes.
FAMILY = "family"
PHASES = {}
# Those in which the kernel decides how often it does something.
UNFORESEEN = {"reclaim"}


def phase(generator):
    """Register a generator: it prepares before its yield, and does what is to be counted after it."""
    PHASES[generator.__name__.replace("_", "-")] = generator
    return generator


class Forecast:
    """What must be counted, as nested dictionaries of the names in kvirt.trace.counts."""

    def __init__(self, legacy):
        self.legacy = legacy
        self.counts = Counter()

    def copy(self):
        other = Forecast(self.legacy)
        other.counts = self.counts.copy()
        return other

    def since(self, earlier):
        """What came to it; by the paths of names."""
        counts = self.counts.copy()
        counts.subtract(earlier.counts)
        nested = {}
        for path, number in sorted(counts.items()):
            if number:
                *parents, name = path
                inner = nested
                for parent in parents:
                    inner = inner.setdefault(parent, {})
                inner[name] = number
        return nested

    def count(self, *path, number=1):
        self.counts[path] += number

    def base(self, region):
        """The page offset that indexes its anonymous folios."""
        return region.legacy_vm_pgoff if self.legacy else region.anon_pgoff

    def in_place(self, region):
        return self.base(region) == region.start >> PAGE_SHIFT

    def is_cow(self, region):
        return region.kind in COW and not region.shared

    def copied(self, source, result, how="new", whole=None):
        """What copy_vma() made: ``result`` is the moved part, ``whole`` the VMA that it is a part of now."""
        self.count("copy_vma", "results", how)
        if self.legacy or self.is_cow(result):
            self.count("assertions", "COPY-AP")
        if not self.is_cow(result):
            self.count("copy_vma", "noncow")
            return
        in_place = self.in_place(whole or result)
        self.count("copy_vma", "hit" if in_place else "fallback")
        if self.legacy and result.kind == "file-private":
            reason = "legacy_file"
        elif not source.faulted:
            reason = "unfaulted_reindexed"
        elif in_place:
            reason = "faulted_homecoming"
        else:
            reason = "faulted_displaced_" + ("shared" if source.note == FAMILY else "exclusive")
        self.count("copy_vma", "reasons", reason)

    def split(self, region, times=1):
        if not self.is_cow(region):
            kind = "noncow"
        else:
            kind = "hit" if self.in_place(region) else "fallback"
        self.count("split_vma", kind, number=times)
        self.count("assertions", "SPLIT-AP", number=times)

    def split_failed(self, error):
        self.count("split_vma", "failed")
        self.count("split_vma", "errors", errno.errorcode[error])

    def walked(self, callback, vmas, page, kind="anon", forked=True):
        """One rmap_walk(): ``vmas`` are all that it comes to.

        :param page: the folio's first, counted from the first VMA's first
        :param forked: whether all but the first are those of forks of the process that the folio was made in
        """
        if kind != "anon":
            self.count("rmap", "walks", kind)
            self.count("rmap", "steps", kind, number=len(vmas))
            self.count("rmap", "callbacks", callback, kind, number=len(vmas))
            return
        hits = 0
        for number, region in enumerate(vmas):
            hit = self.in_place(region)
            hits += hit
            step = "hit" if hit else "fallback"
            self.count("rmap", "steps", step)
            self.count("rmap", "callbacks", callback, step)
            self.count("assertions", "RMAP-ADDRESS")
            if number and forked:
                self.count("rmap", "labels", "shared")
            if not hit:
                self.count("rmap", "reasons", self.reason(region))
                if region.start <= self.base(region) + page << PAGE_SHIFT < region.end:
                    self.count("rmap", "labels", "alias")
        verdict = "all_hit" if hits == len(vmas) else "mixed" if hits else "all_fallback"
        self.count("rmap", "walks", verdict)
        self.count("rmap", "vmas", bucket(len(vmas)))

    def reason(self, region):
        if region.kind == "stack":
            return "stack_displaced"
        if self.legacy and region.kind in ("file-private", "devzero"):
            return "file_private_legacy"
        if region.kind == "devzero":
            return "devzero"
        return "faulted_displaced_" + ("shared" if region.note == FAMILY else "exclusive")


def bucket(vmas):
    """Name the power of two that is enough."""
    top = 1 << (vmas - 1).bit_length()
    return str(vmas) if vmas <= 2 else f"{top // 2 + 1}-{top}"


class Actor:
    """Makes the calls of a phase, and keeps the forecast of what they come to."""

    def __init__(self, forecast):
        self.forecast = forecast
        self._next = sc.mmap(0, CARVE_OUT, 0, FENCE)
        self._fence = Region.mapped("anon", self._next, CARVE_OUT)

    @property
    def carve_out(self):
        return self._fence.start, self._fence.end

    # Space

    def slot(self, pages=PAGES, align=PAGE_SIZE):
        """A hole between fences; with other flags than any region, so that nothing merges with them."""
        start = -(-(self._next + PAGE_SIZE) // align) * align
        self._next = start + pages * PAGE_SIZE
        assert self._next + PAGE_SIZE < self._fence.end
        sc.munmap(start, pages * PAGE_SIZE)
        # Both of the fence, which is in place.
        self.forecast.split(self._fence, 2)
        return start

    def slots(self, number, pages=PAGES):
        return [self.slot(pages) for _ in range(number)]

    # Mappings

    def anon(self, pages=PAGES, at=None, align=PAGE_SIZE):
        start = self.slot(pages, align) if at is None else at
        flags = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_FIXED
        sc.mmap(start, pages * PAGE_SIZE, prot_bits("rw"), flags)
        return Region.mapped("anon", start, pages * PAGE_SIZE)

    def file(self, kind="file-private", pages=PAGES, pgoff=3, at=None):
        """Map a new file, or /dev/zero."""
        if kind == "devzero":
            fd = os.open("/dev/zero", os.O_RDWR)
        else:
            fd = os.memfd_create("kvirt-remaps")
            os.ftruncate(fd, (pgoff + pages) * PAGE_SIZE)
        start = self.slot(pages) if at is None else at
        shared = kind == "shmem"
        flags = sc.MAP_FIXED | (sc.MAP_SHARED if shared else sc.MAP_PRIVATE)
        sc.mmap(start, pages * PAGE_SIZE, prot_bits("rw"), flags, fd, pgoff * PAGE_SIZE)
        os.close(fd)
        return Region.mapped(kind, start, pages * PAGE_SIZE, pgoff, shared=shared)

    def hugetlb(self):
        """Map huge pages that nobody will touch, nor need there be any."""
        flags = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_HUGETLB | sc.MAP_NORESERVE
        start = sc.mmap(0, 2 * HUGE, prot_bits("rw"), flags)
        return Region.mapped("hugetlb", start, 2 * HUGE, 0)

    def write(self, region):
        """Write to all pages, which makes anonymous ones unless it is shared."""
        sc.store(region.start, region.size, 1)
        if self.forecast.is_cow(region):
            region.faulted = True
            self.forecast.count("assertions", "NEW-INDEX", number=region.pages)
        return region

    # mremap()

    def _mremap(self, start, size, to, flags=0):
        sc.mremap(start, size, size, sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED | flags, to)

    def move(self, region, to=None, flags=0):
        """Move all of it, by default to a new slot."""
        to = self.slot(region.pages) if to is None else to
        self._mremap(region.start, region.size, to, flags)
        moved = region.moved(to)
        self.forecast.copied(region, moved)
        return moved

    def move_to_neighbour(self, region, neighbour):
        """Move all of it to where it becomes one with the VMA before."""
        self._mremap(region.start, region.size, neighbour.end)
        moved = region.moved(neighbour.end)
        whole = join(neighbour, moved)
        whole.note = neighbour.note
        self.forecast.copied(region, moved, "merged", whole)
        return whole

    def move_half(self, region):
        """Move the lower half of it."""
        half = region.pages // 2
        low, high = region.split(half)
        to = self.slot(region.pages)
        self._mremap(low.start, low.size, to)
        moved = low.moved(to)
        self.forecast.copied(region, moved)
        # The source is unmapped, a part of its VMA.
        self.forecast.split(region)
        return moved, high

    def move_beside(self, region, to):
        """Move it to where it touches its old place: for a while they are one."""
        self._mremap(region.start, region.size, to)
        moved = region.moved(to)
        self.forecast.copied(region, moved, "self_merged")
        self.forecast.split(moved)
        return moved

    # Splits

    def _cuts(self, region, first, count):
        self.forecast.split(region, (first > 0) + (first + count < region.pages))

    def protect(self, region, first, count):
        sc.mprotect(region.address(first), count * PAGE_SIZE, sc.PROT_READ)
        self._cuts(region, first, count)

    def advise(self, region, first, count):
        sc.madvise(region.address(first), count * PAGE_SIZE, sc.MADV_DONTDUMP)
        self._cuts(region, first, count)

    def unmap(self, region, first, count):
        sc.munmap(region.address(first), count * PAGE_SIZE)
        self._cuts(region, first, count)

    def fail(self, expected, call, *arguments):
        """Make a call whose split must fail."""
        try:
            call(*arguments)
        except OSError as error:
            assert error.errno == expected, error
        else:
            raise AssertionError(f"{call.__name__} did not fail")
        self.forecast.split_failed(expected)

    # Walks

    def migrate(self, region, vmas=None, kind="anon", pages=None):
        """Have the kernel put other memory beneath its pages, which retires what was there.

        madvise_inject_error() -> soft_offline_page() -> migrate_pages(), page by page: a walk that takes all
        entries of page tables away, and one that puts them back.
        """
        numbers = range(region.pages) if pages is None else pages
        for number in numbers:
            sc.madvise(region.address(number), PAGE_SIZE, MADV_SOFT_OFFLINE)
            for callback in ("try_to_migrate_one", "remove_migration_pte"):
                self.forecast.walked(callback, vmas or [region], number, kind)

    def page_out(self, region):
        """Swap its pages out: reclaim_pages() does not ask whether they were used."""
        sc.madvise(region.start, region.size, sc.MADV_PAGEOUT)
        for number in range(region.pages):
            self.forecast.walked("try_to_unmap_one", [region], number)
        entries = read_pagemap("self", region.start, region.end)
        assert all(entry & PM_SWAPPED for entry in entries), [hex(entry) for entry in entries]

    # Processes

    def fork(self, depth, *regions):
        """Start a chain of ``depth`` processes behind this one, which hold what they inherit."""
        for region in regions:
            region.note = FAMILY
        if depth == 0:
            return
        readable, writable = os.pipe()
        if os.fork():
            os.read(readable, 1)
            os.close(readable)
            os.close(writable)
            return
        die_with_parent()
        self.fork(depth - 1)
        os.write(writable, b".")
        signal.pause()

    def become_child(self, *regions):
        """Go on in a child; the parent holds what it has until that ends."""
        for region in regions:
            region.note = FAMILY
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
        die_with_parent()

    def crowd(self, number, work):
        """Have children do the same at the same time, on all processors. As phases, ``work`` yields once."""
        gate, reports = os.pipe(), []
        for child in range(number):
            readable, writable = os.pipe()
            if os.fork():
                os.close(writable)
                reports.append(os.fdopen(readable, "rb"))
                continue
            die_with_parent()
            os.close(gate[1])
            os.sched_setaffinity(0, {child % os.cpu_count()})
            steps = work()
            for _ in range(2):
                self.forecast.counts.clear()
                next(steps, None)
                os.write(writable, pickle.dumps(self.forecast.counts))
                # An end, when all may begin.
                os.read(gate[0], 1)
            os._exit(0)
        os.close(gate[0])
        for report in reports:
            self.forecast.counts.update(pickle.load(report))
        yield
        os.close(gate[1])
        for report in reports:
            self.forecast.counts.update(pickle.load(report))
            os.wait()


# copy_vma()


def moves(kind, written, flags=0):
    """Make a phase of mappings of one kind that are moved away."""

    def generator(do, number):
        regions = [do.anon() if kind == "anon" else do.file(kind) for _ in range(number)]
        for region in regions if written else ():
            do.write(region)
        targets = do.slots(number)
        yield
        for region, target in zip(regions, targets, strict=True):
            do.move(region, target, flags)

    return generator


PHASES |= {
    "copy-unfaulted-anon": moves("anon", False),
    "copy-faulted-anon": moves("anon", True),
    "copy-unfaulted-file": moves("file-private", False),
    "copy-faulted-file": moves("file-private", True),
    "copy-unfaulted-devzero": moves("devzero", False),
    "copy-faulted-devzero": moves("devzero", True),
    "copy-shared": moves("shmem", True),
    "copy-dontunmap": moves("anon", True, sc.MREMAP_DONTUNMAP),
}


@phase
def copy_homecoming(do, number):
    homes = [do.write(do.anon()) for _ in range(number)]
    away = [do.move(home) for home in homes]
    yield
    for region, home in zip(away, homes, strict=True):
        do.move(region, home.start)


@phase
def copy_forked_parent(do, number):
    regions = [do.write(do.anon()) for _ in range(number)]
    targets = do.slots(number)
    do.fork(1, *regions)
    yield
    for region, target in zip(regions, targets, strict=True):
        do.move(region, target)


@phase
def copy_forked_child(do, number):
    regions = [do.write(do.anon()) for _ in range(number)]
    targets = do.slots(number)
    do.become_child(*regions)
    yield
    for region, target in zip(regions, targets, strict=True):
        do.move(region, target)


@phase
def copy_merged_unfaulted(do, number):
    places = do.slots(number, 2 * PAGES)
    neighbours = [do.anon(at=place) for place in places]
    regions = [do.anon() for _ in range(number)]
    yield
    for region, neighbour in zip(regions, neighbours, strict=True):
        do.move_to_neighbour(region, neighbour)


@phase
def copy_merged_halves(do, number):
    regions = [do.write(do.anon()) for _ in range(number)]
    yield
    for region in regions:
        low, high = do.move_half(region)
        do.move_to_neighbour(high, low)


@phase
def copy_self_merged(do, number):
    places = do.slots(2 * number, 3 * PAGES)
    regions = [do.anon(at=place + PAGES * PAGE_SIZE) for place in places]
    yield
    for region in regions[:number]:
        do.move_beside(region, region.end)
    for region in regions[number:]:
        do.move_beside(region, region.start - region.size)


@phase
def copy_crowd(do, number):
    """Many at a time: nothing may be lost."""

    def work():
        region = do.write(do.anon())
        home, away = region.start, do.slot()
        yield
        for _ in range(ROUNDS):
            region = do.move(do.move(region, away), home)

    return do.crowd(number, work)


# __split_vma()


def splits(kind, moved=False):
    """Make a phase of mappings of one kind that are split in their middle, at their head and at their end."""

    def generator(do, number):
        def region():
            one = do.write(do.anon() if kind == "anon" else do.file(kind))
            return do.move(one) if moved else one

        regions = [region() for _ in range(3 * number)]
        yield
        for i, change in enumerate((do.protect, do.advise, do.unmap)):
            for j, one in enumerate(regions[i::3]):
                change(one, *((1, PAGES - 2), (0, 1), (PAGES - 1, 1))[j % 3])

    return generator


PHASES |= {
    "split-anon": splits("anon"),
    "split-displaced-anon": splits("anon", moved=True),
    "split-file": splits("file-private"),
    "split-displaced-file": splits("file-private", moved=True),
    "split-devzero": splits("devzero"),
    "split-shared": splits("shmem"),
}


@phase
def split_failed(do, number):
    """hugetlb_vm_op_split(): huge pages are not cut in pieces. What is refused before counts not."""
    region = do.hugetlb()
    yield
    for _ in range(number):
        do.fail(errno.EINVAL, sc.mprotect, region.address(1), PAGE_SIZE, sc.PROT_READ)
        do.fail(errno.EINVAL, sc.madvise, region.address(1), PAGE_SIZE, sc.MADV_DONTDUMP)


# rmap_walk()


def walks(kind, moved=False, depth=1):
    """Make a phase that migrates what ``depth`` processes map, each of them all of it."""

    def generator(do, number):
        region = do.write(do.anon(number) if kind == "anon" else do.file(kind, number))
        if moved:
            region = do.move(region)
        if depth > 1:
            do.fork(depth - 1, region)
        yield
        do.migrate(region, [region] * depth)

    return generator


PHASES |= {
    "rmap-anon": walks("anon"),
    "rmap-displaced-anon": walks("anon", moved=True),
    "rmap-chain": walks("anon", depth=4),
    "rmap-displaced-chain": walks("anon", moved=True, depth=3),
    "rmap-file-private": walks("file-private"),
    "rmap-file-private-chain": walks("file-private", depth=5),
    "rmap-displaced-file-private": walks("file-private", moved=True),
    "rmap-devzero": walks("devzero"),
    "rmap-displaced-devzero": walks("devzero", moved=True),
}


@phase
def rmap_mixed(do, number):
    parents = do.write(do.anon(number))
    target = do.slot(number)
    do.become_child(parents)
    mine = do.move(parents, target)
    yield
    do.migrate(mine, [parents, mine])


@phase
def rmap_alias(do, number):
    """Displaced by less than its own size: the lookup would find the VMA all the same."""
    region = do.write(do.anon(number, at=do.slot(number + 1)))
    away = do.move(region)
    region = do.move(away, region.address(1))
    yield
    do.migrate(region)


@phase
def rmap_stack(do, number):
    """The pages beneath what is used of the stack. Exec has displaced it."""
    stack = next(mapping for mapping in read_maps() if mapping.path == "[stack]")
    # Writing there makes it grow: nothing but this process has these pages.
    start = stack.start - number * PAGE_SIZE
    sc.store(start, number * PAGE_SIZE, 1)
    region = Region("stack", start, stack.end - start, vm_pgoff=0, anon_pgoff=0, legacy_vm_pgoff=0)
    yield
    do.migrate(region, pages=range(number))


@phase
def rmap_file(do, number):
    """Pages of a file, mapped three times."""
    fd = os.memfd_create("kvirt-remaps")
    os.ftruncate(fd, number * PAGE_SIZE)
    regions = []
    for _ in range(3):
        start = do.slot(number)
        sc.mmap(start, number * PAGE_SIZE, prot_bits("rw"), sc.MAP_SHARED | sc.MAP_FIXED, fd)
        regions.append(do.write(Region.mapped("shmem", start, number * PAGE_SIZE, 0, shared=True)))
    yield
    do.migrate(regions[0], regions, "file")


@phase
def rmap_ksm(do, number):
    """One page in the place of many."""
    regions = [do.anon(1) for _ in range(number)]
    for region in regions:
        # Of a content that nobody else has.
        sc.store(region.start, PAGE_SIZE, 0x72)
        sc.madvise(region.start, PAGE_SIZE, sc.MADV_MERGEABLE)
    settings = {name: (KSM / name).read_text() for name in ("sleep_millisecs", "pages_to_scan", "run")}
    merging = Path("/proc/self/ksm_merging_pages")
    deadline = time.monotonic() + MERGE_PATIENCE
    try:
        for name, value in (("sleep_millisecs", "10"), ("pages_to_scan", "4000"), ("run", "1")):
            (KSM / name).write_text(value)
        while int(merging.read_text()) < number:
            if time.monotonic() > deadline:
                raise Skip(f"In {MERGE_PATIENCE} s KSM did not merge {number} equal pages.")
            time.sleep(0.05)
    finally:
        for name, value in settings.items():
            (KSM / name).write_text(value)
    yield
    do.migrate(regions[0], regions, "ksm")


def page_outs(moved):
    """Make a phase that swaps out what one process maps."""

    def generator(do, number):
        area = SwapArea()
        try:
            area.open()
            region = do.write(do.anon(number))
            if moved:
                region = do.move(region)
            yield
            do.page_out(region)
            yield
        finally:
            area.close()

    return generator


PHASES |= {"page-out": page_outs(False), "page-out-displaced": page_outs(True)}


@phase
def page_out_crowd(do, number):
    def work():
        region = do.move(do.write(do.anon(CROWD_PAGES)))
        yield
        do.page_out(region)

    area = SwapArea()
    try:
        area.open()
        yield from do.crowd(number, work)
        yield
    finally:
        area.close()


@phase
def reclaim(do, number):
    """What a cgroup has is reclaimed: how often which page is looked at for that is the kernel's choice."""
    area, control = SwapArea(), CGROUPS / "cgroup.subtree_control"
    group = CGROUPS / f"kvirt-remaps-{os.getpid()}"
    has_memory = "memory" in control.read_text().split()
    try:
        area.open()
        if not has_memory:
            control.write_text("+memory")
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
        do.write(do.anon(CROWD_PAGES))
        do.move(do.write(do.anon(CROWD_PAGES)))
        yield
        with suppress(OSError):
            # EAGAIN: it was less.
            (group / "memory.reclaim").write_text("1M")
        yield
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
        if not has_memory:
            control.write_text("-memory")
        area.close()


def huge_page(do):
    region = do.anon(HUGE // PAGE_SIZE, align=HUGE)
    sc.madvise(region.start, HUGE, sc.MADV_HUGEPAGE)
    sc.store(region.start, HUGE, 1)
    region.faulted = True
    do.forecast.count("assertions", "NEW-INDEX")
    if smaps_field("self", region.start, "AnonHugePages") != HUGE >> 10:
        raise Skip("There was no huge page free, or they are turned off.")
    return region


def split_huge_page(do, *regions):
    """Split the huge page that the regions map, under the lock of its anon_vma: rmap_walk_locked()."""
    command = f"{os.getpid()},{regions[0].start:#x},{regions[0].end:#x},0"
    Path("/sys/kernel/debug/split_huge_pages").write_text(command)
    # Once for the large folio, and then for each of the small ones that it has become.
    do.forecast.walked("try_to_migrate_one", regions, 0, forked=False)
    for region in regions:
        for page in range(region.pages):
            do.forecast.walked("remove_migration_pte", [region], page)


def thp_splits(moved):
    """Make a phase of a huge page in one VMA."""

    def generator(do, number):
        region = huge_page(do)
        if moved:
            region = do.move(region, do.slot(region.pages, HUGE))
        yield
        split_huge_page(do, region)

    return generator


PHASES |= {"split-thp": thp_splits(False), "split-thp-displaced": thp_splits(True)}


@phase
def split_thp_halves(do, number):
    """A huge page of which a part was moved away: the other VMA begins in the middle of the folio."""
    low, high = do.move_half(huge_page(do))
    yield
    split_huge_page(do, low, high)


# folio_add_new_anon_rmap()


def faults(kind, moved=False):
    """Make a phase that faults in what was mapped, or the other half of what was moved."""

    def generator(do, number):
        region = do.anon(2 * number) if kind == "anon" else do.file(kind, 2 * number)
        if moved:
            sc.store(region.start, PAGE_SIZE, 1)
            do.forecast.count("assertions", "NEW-INDEX")
            region.faulted = True
            region = do.move(region)
        yield
        rest = region.split(region.pages - number)[1]
        do.write(rest)

    return generator


PHASES |= {
    "fault-anon": faults("anon"),
    "fault-displaced-anon": faults("anon", moved=True),
    "fault-file": faults("file-private"),
    "fault-displaced-file": faults("file-private", moved=True),
}


# The program


def tell(**message):
    os.write(1, json.dumps(message).encode() + b"\n")


def wait():
    # A line, or the end.
    os.read(0, 64)


def run(name, number, forecast):
    """Be one phase."""
    do = Actor(forecast)
    steps = PHASES[name](do, number)
    try:
        next(steps)
        setup = forecast.copy()
        tell(phase=name, pid=os.getpid(), parent=os.getppid(), carve_out=do.carve_out, ready=True)
        wait()
        next(steps, None)
    except Skip as reason:
        tell(phase=name, skipped=str(reason))
        return
    tell(phase=name, counts=forecast.since(setup), setup=setup.since(Forecast(forecast.legacy)))
    wait()
    # To its end.
    next(steps, None)


def main(argv):
    number, *names = argv
    scheme = kernel_scheme()
    if scheme is None:
        sys.exit("The kernel's type information is not in /sys/kernel/btf/vmlinux.")
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_NAME, COMM, 0, 0, 0)
    # The interpreter keeps its memory as it is: it would unmap parts of it, which splits VMAs too.
    gc.disable()
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
    # What is in another processor's batch of new pages is not found there to be reclaimed.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in names or PHASES:
        child = os.fork()
        if not child:
            die_with_parent()
            run(name, int(number), Forecast(scheme == "legacy"))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"The phase {name} failed.")


if __name__ == "__main__":
    main(sys.argv[1:])
