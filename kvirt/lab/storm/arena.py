# SPDX-License-Identifier: GPL-2.0-only
"""The addresses on which one process of the storm works."""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

from kvirt.lab.procfs import PAGE_SIZE
from kvirt.lab.workload import syscalls as sc

# A huge page that is mapped by one entry, and the space that a slot has around it.
HUGE = 2 << 20
SLOT = 2 * HUGE
SLOTS = 8
# Pages of an area that is not huge: enough to be split several times.
SMALL_MAX = 24
# Smaller than anything that the interpreter maps for itself.
HOLE_MAX = 8 * PAGE_SIZE

FENCE = sc.MAP_PRIVATE | sc.MAP_ANONYMOUS | sc.MAP_NORESERVE


class NoArea(Exception):
    """Nothing is mapped that an operation could be done on."""


@dataclass
class Area:
    """What was mapped in a slot. Holes and protections that came later are not recorded."""

    slot: int
    kind: str
    start: int
    size: int
    home: int
    """Where its pages were first written, and have their index from."""

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return self.size // PAGE_SIZE


class Arena:
    """Slots in which areas are mapped, moved and torn; a fork inherits them.

    :param random: what decides, so that a seed gives the same operations again
    :param paper: descriptor of a file of HUGE bytes: what pages are filled from, and drained to
    """

    def __init__(self, random: Random, paper: int) -> None:
        self.random = random
        self.paper = paper
        base = sc.mmap(0, (SLOTS + 1) * SLOT, 0, FENCE)
        self.base = -(-base // SLOT) * SLOT
        self.areas: dict[int, Area] = {}
        # A page that nothing is done to.
        self.sheet = sc.mmap(0, PAGE_SIZE, sc.PROT_READ | sc.PROT_WRITE, sc.MAP_PRIVATE | sc.MAP_ANONYMOUS)

    def slot_start(self, slot: int) -> int:
        """The first address of a slot."""
        return self.base + slot * SLOT

    def pick(self, *kinds: str) -> Area:
        """Some area, if kinds are given one of these.

        :raises NoArea: if there is none
        """
        fit = [area for area in self.areas.values() if not kinds or area.kind in kinds]
        if not fit:
            raise NoArea
        return self.random.choice(fit)

    def part(self, area: Area) -> tuple[int, int]:
        """Some pages of an area that follow each other: address and size."""
        first = self.random.randrange(area.pages)
        # Both ends of the area are drawn often: that is where neighbours are merged.
        first = self.random.choice((0, first))
        count = self.random.randint(1, area.pages - first)
        return area.start + first * PAGE_SIZE, count * PAGE_SIZE

    def free_slot(self) -> int:
        """A slot to map something into; what was there is unmapped."""
        empty = [slot for slot in range(SLOTS) if slot not in self.areas]
        slot = self.random.choice(empty or range(SLOTS))
        self.clear(slot)
        return slot

    def clear(self, slot: int) -> None:
        """Leave nothing but the fence in a slot."""
        self.areas.pop(slot, None)
        sc.mmap(self.slot_start(slot), SLOT, 0, FENCE | sc.MAP_FIXED)

    def close_hole(self, start: int, size: int) -> None:
        """Put the fence where something was unmapped; if it is small, not always.

        The interpreter's next allocation may take what is open, and lose it to the next area.
        """
        if size > HOLE_MAX or self.random.random() < 0.5:
            sc.mmap(start, size, 0, FENCE | sc.MAP_FIXED)

    def place(self, kind: str, pages: int | None = None) -> Area:
        """Take a slot for something of a kind; without a number of pages some."""
        slot = self.free_slot()
        size = (pages or self.random.randint(1, SMALL_MAX)) * PAGE_SIZE
        start = self.slot_start(slot)
        if size < HUGE:
            start += self.random.randrange(SMALL_MAX) * PAGE_SIZE
        area = Area(slot, kind, start, size, start)
        self.areas[slot] = area
        return area

    def map(self, kind: str, flags: int, fd: int = -1, offset: int = 0, pages: int | None = None) -> Area:
        """Map something into a slot."""
        area = self.place(kind, pages)
        prot = sc.PROT_READ | sc.PROT_WRITE
        try:
            sc.mmap(area.start, area.size, prot, flags | sc.MAP_FIXED, fd, offset)
        except OSError:
            self.clear(area.slot)
            raise
        return area

    def write(self, address: int, size: int) -> None:
        """Fault pages in for writing. All pages are filled alike, which is what KSM looks for."""
        while size > 0:
            sc.fill(address, min(size, HUGE), self.paper)
            address, size = address + HUGE, size - HUGE


def make_paper() -> int:
    """A file for :class:`Arena`: every page of it is the same, and none is zero."""
    fd = os.memfd_create("kvirt-storm")
    os.write(fd, b"kvirt storm\n".ljust(PAGE_SIZE, b".") * (HUGE // PAGE_SIZE))
    return fd
