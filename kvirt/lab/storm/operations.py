# SPDX-License-Identifier: GPL-2.0-only
"""What the storm does to an arena, one small function each.

A function raises OSError where the kernel refuses, which is as good a thing to have tried, and NoArea
where there was nothing to do it on. To add an operation, add a function with ``@operation``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.storm.arena import HUGE, SLOT, Area, Arena
from kvirt.lab.workload import syscalls as sc

Run = Callable[[Arena], None]


@dataclass(frozen=True)
class Operation:
    """One thing to do."""

    name: str
    run: Run
    weight: int
    """How often it is drawn, compared with the others."""


OPERATIONS: list[Operation] = []


def operation(name: str, weight: int = 4) -> Callable[[Run], Run]:
    """Register a function under a name."""

    def register(run: Run) -> Run:
        OPERATIONS.append(Operation(name, run, weight))
        return run

    return register


# Mapping


@operation("mmap anon", 8)
def map_anon(a: Arena) -> None:
    """Private anonymous memory, most often written to at once."""
    area = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)
    if a.random.random() < 0.7:
        a.write(*a.part(area))


@operation("mmap huge", 3)
def map_huge(a: Arena) -> None:
    """Private anonymous memory in a huge page."""
    area = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=HUGE // PAGE_SIZE)
    sc.madvise(area.start, area.size, sc.MADV_HUGEPAGE)
    a.write(area.start, PAGE_SIZE)


@operation("mmap file", 8)
def map_file(a: Arena) -> None:
    """A private mapping of a file from some page on, in part written to."""
    offset = a.random.randrange(64) * PAGE_SIZE
    area = a.map("file", sc.MAP_PRIVATE, a.paper, offset)
    if a.random.random() < 0.7:
        a.write(*a.part(area))


@operation("mmap devzero", 2)
def map_devzero(a: Arena) -> None:
    """Private /dev/zero: anonymous memory that has a file."""
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    try:
        area = a.map("anon", sc.MAP_PRIVATE, fd)
    finally:
        os.close(fd)
    a.write(*a.part(area))


@operation("mmap shared", 2)
def map_shared(a: Arena) -> None:
    """Shared anonymous memory."""
    a.write(*a.part(a.map("shared", sc.MAP_SHARED | sc.MAP_ANONYMOUS)))


@operation("mmap hugetlb", 1)
def map_hugetlb(a: Arena) -> None:
    """A private huge page of the pool."""
    flags = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_HUGETLB
    area = a.map("hugetlb", flags, pages=HUGE // PAGE_SIZE)
    a.write(area.start, PAGE_SIZE)


@operation("munmap part", 3)
def munmap_part(a: Arena) -> None:
    """A hole."""
    start, size = a.part(a.pick("anon", "file", "shared"))
    sc.munmap(start, size)
    a.close_hole(start, size)


@operation("munmap all", 3)
def munmap_all(a: Arena) -> None:
    """An area goes."""
    a.clear(a.pick().slot)


# Touching


@operation("write", 16)
def write(a: Arena) -> None:
    """Faults for writing: first ones, and copies on write after a fork."""
    a.write(*a.part(a.pick()))


@operation("read", 6)
def read(a: Arena) -> None:
    """A fault for reading: zero pages, file pages, what was swapped out."""
    start, _ = a.part(a.pick())
    sc.drain(start, 1, a.paper, HUGE)


# Moving


def _move(a: Arena, area: Area, to: int, slot: int, flags: int = 0) -> None:
    flags |= sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED
    sc.mremap(area.start, area.size, area.size, flags, to)
    if not flags & sc.MREMAP_DONTUNMAP:
        a.clear(area.slot)
    a.areas[slot] = Area(slot, area.kind, to, area.size, area.home)


@operation("mremap away", 8)
def mremap_away(a: Arena) -> None:
    """To some page of another slot."""
    area = a.pick("anon", "file", "shared")
    slot = a.free_slot()
    if slot == area.slot:
        return
    room = (SLOT - area.size) // PAGE_SIZE
    # A huge page that moves by less than its size is mapped by small entries from then on.
    to = a.slot_start(slot) + a.random.choice((0, a.random.randrange(room))) * PAGE_SIZE
    _move(a, area, to, slot)


@operation("mremap home", 6)
def mremap_home(a: Arena) -> None:
    """Back to where its pages have their index from."""
    away = [area for area in a.areas.values() if area.start != area.home]
    if away:
        area = a.random.choice(away)
        slot = (area.home - a.base) // SLOT
        if slot != area.slot:
            a.clear(slot)
            _move(a, area, area.home, slot)


@operation("mremap part", 5)
def mremap_part(a: Arena) -> None:
    """A part moves to the end of its area or before it, where it may merge, or to another slot."""
    area = a.pick("anon", "file")
    start, size = a.part(area)
    flags = sc.MREMAP_MAYMOVE | sc.MREMAP_FIXED
    to = a.random.choice((area.start + area.size, area.start - size))
    low = a.slot_start(area.slot)
    if low <= to and to + size <= low + SLOT:
        sc.mremap(start, size, size, flags, to)
        a.close_hole(start, size)


@operation("mremap dontunmap", 5)
def mremap_dontunmap(a: Arena) -> None:
    """The pages move and the area stays, empty."""
    area = a.pick("anon", "file")
    slot = a.free_slot()
    if slot != area.slot:
        _move(a, area, a.slot_start(slot), slot, sc.MREMAP_DONTUNMAP)


@operation("mremap resize", 4)
def mremap_resize(a: Arena) -> None:
    """It grows or shrinks where it is."""
    area = a.pick("anon", "file", "shared")
    pages = max(1, area.pages + a.random.choice((-3, -1, 1, 4)))
    if area.size < HUGE:
        if pages > area.pages:
            sc.munmap(area.start + area.size, (pages - area.pages) * PAGE_SIZE)
        sc.mremap(area.start, area.size, pages * PAGE_SIZE, 0)
        area.size = pages * PAGE_SIZE


# Splitting and merging


@operation("mprotect", 10)
def mprotect(a: Arena) -> None:
    """Another protection for a part: splits, and merges when it is what the neighbours have."""
    start, size = a.part(a.pick("anon", "file", "shared"))
    prot = a.random.choice((0, sc.PROT_READ, sc.PROT_READ | sc.PROT_WRITE, sc.PROT_READ | sc.PROT_WRITE))
    sc.mprotect(start, size, prot)


@operation("mprotect whole", 4)
def mprotect_whole(a: Arena) -> None:
    """One protection for all of it, so that its parts merge again."""
    area = a.pick("anon", "file", "shared", "hugetlb")
    sc.mprotect(area.start, area.size, sc.PROT_READ | sc.PROT_WRITE)


# Advice. What follows in the tables needs no more than a part of an area of these kinds.


def _advise(a: Arena, advice: int, kinds: tuple[str, ...]) -> None:
    sc.madvise(*a.part(a.pick(*kinds)), advice)


ANY = ("anon", "file", "shared")
PRIVATE = ("anon", "file")
ADVICE: dict[str, tuple[int, tuple[str, ...], int]] = {
    "DONTNEED": (sc.MADV_DONTNEED, ANY, 4),
    "FREE": (sc.MADV_FREE, ("anon",), 2),
    "COLD": (sc.MADV_COLD, ANY, 2),
    "PAGEOUT": (sc.MADV_PAGEOUT, ANY, 8),
    "NORMAL": (sc.MADV_NORMAL, ANY, 2),
    "SEQUENTIAL": (sc.MADV_SEQUENTIAL, ANY, 2),
    "DONTDUMP": (sc.MADV_DONTDUMP, PRIVATE, 2),
    "DODUMP": (sc.MADV_DODUMP, PRIVATE, 2),
    "DOFORK": (sc.MADV_DOFORK, PRIVATE, 3),
    "WIPEONFORK": (sc.MADV_WIPEONFORK, ("anon",), 2),
    "KEEPONFORK": (sc.MADV_KEEPONFORK, ("anon",), 3),
    "MERGEABLE": (sc.MADV_MERGEABLE, PRIVATE, 6),
    "UNMERGEABLE": (sc.MADV_UNMERGEABLE, PRIVATE, 1),
    "NOHUGEPAGE": (sc.MADV_NOHUGEPAGE, PRIVATE, 1),
    "GUARD_INSTALL": (sc.MADV_GUARD_INSTALL, PRIVATE, 1),
    "GUARD_REMOVE": (sc.MADV_GUARD_REMOVE, PRIVATE, 1),
}
for _name, (_advice, _kinds, _weight) in ADVICE.items():
    operation(f"madvise {_name}", _weight)(partial(_advise, advice=_advice, kinds=_kinds))


@operation("madvise DONTFORK", 1)
def dontfork(a: Arena) -> None:
    """A child has a hole there, so it must not be large."""
    start, _ = a.part(a.pick("anon", "file"))
    sc.madvise(start, PAGE_SIZE, sc.MADV_DONTFORK)


@operation("madvise COLLAPSE", 3)
def collapse(a: Arena) -> None:
    """Small pages become a huge one."""
    area = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=HUGE // PAGE_SIZE)
    sc.madvise(area.start, area.size, sc.MADV_NOHUGEPAGE)
    a.write(area.start, a.random.randint(1, 16) * PAGE_SIZE)
    sc.madvise(area.start, area.size, sc.MADV_HUGEPAGE)
    sc.madvise(area.start, area.size, sc.MADV_COLLAPSE)


@operation("collapse again", 2)
def collapse_again(a: Arena) -> None:
    """What became of a huge area is collapsed, wherever it is and whatever it was split into."""
    # On a slow host there are few tries, and of those with a small area none can do it.
    huge = [area for area in a.areas.values() if area.kind == "anon" and area.size >= HUGE]
    area = a.random.choice(huge) if huge else a.pick("anon")
    start = -(-area.start // HUGE) * HUGE
    sc.madvise(start, HUGE, sc.MADV_COLLAPSE)


# userfaultfd


@operation("uffd copy", 1)
def uffd_copy(a: Arena) -> None:
    """Missing pages are filled through userfaultfd."""
    target = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=2)
    with sc.Userfaultfd() as uffd:
        uffd.register(target.start, target.size)
        uffd.copy(target.start, a.sheet, PAGE_SIZE)


@operation("uffd move", 3)
def uffd_move(a: Arena) -> None:
    """Pages move to another area, and are indexed anew."""
    source = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=4)
    a.write(source.start, source.size)
    target = a.map("anon", sc.MAP_PRIVATE | sc.MAP_ANONYMOUS, pages=4)
    if a.random.random() < 0.3:
        sc.madvise(source.start, source.size, sc.MADV_PAGEOUT)
    with sc.Userfaultfd(sc.UFFD_FEATURE_MOVE) as uffd:
        uffd.register(target.start, target.size)
        uffd.move(target.start, source.start, a.random.randint(1, 4) * PAGE_SIZE)
