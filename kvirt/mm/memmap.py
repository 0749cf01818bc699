# SPDX-License-Identifier: GPL-2.0-only
"""The struct pages of many page frames."""

from __future__ import annotations

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.memory import PAGE_BYTES, Core, Places, core_of
from kvirt.mm.pagetable import HUGE_BYTES, U64, Bool, kernel_huge_page

Pages = npt.NDArray[np.void]

# Struct pages this close are read together: one read of 16 KiB costs less than two of 64 bytes.
_GAP_PAGES = 256
# And a run ends here, so that one bad spot does not spoil much and memory stays bounded.
_RUN_PAGES = 1 << 16
_CACHE_KEY = "kvirt.memmap"
# Not looked up yet, and nowhere in the core or not in one piece.
_UNKNOWN, _NOWHERE = -2, -1


def read_struct_pages(prog: drgn.Program, layout: Layout, pfns: U64) -> tuple[Pages, Bool]:
    """Struct pages of page frames in any order, and which could be read; those that could not are 0.

    :returns: an array of ``layout.page_dtype``
    """
    core = core_of(prog)
    size = layout.page.size
    if core is None or size & (size - 1):
        return _read_any(prog, layout, pfns)
    sections = prog.cache.get(_CACHE_KEY)
    if not isinstance(sections, _Sections) or sections.core is not core or sections.version != core.version:
        sections = prog.cache[_CACHE_KEY] = _Sections(prog, layout, core)
    at = sections.find(pfns)
    missing = at < 0
    if not missing.any():
        return core.gather(at, size).view(layout.page_dtype), np.ones(len(pfns), dtype=bool)
    out = np.zeros(len(pfns), dtype=layout.page_dtype)
    good = ~missing
    out[good] = core.gather(at[good], size).view(layout.page_dtype)
    out[missing], good[missing] = _read_any(prog, layout, pfns[missing])
    return out, good


class _Sections:
    """Where in a core the memmap is, by the huge pages that the kernel maps it with."""

    def __init__(self, prog: drgn.Program, layout: Layout, core: Core) -> None:
        self._prog, self._layout = prog, layout
        self.core, self.version = core, core.version
        # Page frames of one section, in a number of bits.
        self._bits = (HUGE_BYTES // layout.page.size).bit_length() - 1
        # What is beyond all memory of the core has no struct page either, or one that drgn may look for.
        self._end = np.uint64(core.end)
        self._start = np.full((core.end >> self._bits) + 1, _UNKNOWN, dtype=np.int64)

    def find(self, pfns: U64) -> Places:
        """Where the struct pages of page frames are, in their size; negative where drgn has to read them."""
        at = np.full(len(pfns), _NOWHERE, dtype=np.int64)
        here = pfns < self._end
        if here.all():
            return self._find(pfns)
        at[here] = self._find(pfns[here])
        return at

    def _find(self, pfns: U64) -> Places:
        number = (pfns >> np.uint64(self._bits)).astype(np.int64)
        start = self._start[number]
        unknown = start == _UNKNOWN
        if unknown.any():
            for section in np.unique(number[unknown]).tolist():
                self._start[section] = self._locate(section)
            start = self._start[number]
        inside = (pfns & np.uint64((1 << self._bits) - 1)).astype(np.int64)
        if (start >= 0).all():
            return start + inside
        return np.where(start < 0, start, start + inside)

    def _locate(self, section: int) -> int:
        """Where a section's first struct page is."""
        address = self._layout.vmemmap + section * HUGE_BYTES
        physical = kernel_huge_page(self._prog, self._layout, address)
        if physical is None or address % HUGE_BYTES:
            return _NOWHERE
        frames = np.arange(HUGE_BYTES // PAGE_BYTES, dtype=np.uint64) + np.uint64(physical // PAGE_BYTES)
        places = self.core.find(frames)
        if places[0] < 0 or (np.diff(places) != 1).any():
            return _NOWHERE
        return int(places[0]) * (PAGE_BYTES // self._layout.page.size)


def _read_any(prog: drgn.Program, layout: Layout, pfns: U64) -> tuple[Pages, Bool]:
    """As :func:`read_struct_pages`, through drgn."""
    unique, where = np.unique(pfns, return_inverse=True)
    pages, good = _read_ascending(prog, layout, unique)
    return pages[where], good[where]


def _read_ascending(prog: drgn.Program, layout: Layout, pfns: U64) -> tuple[Pages, Bool]:
    """Struct pages of page frames in ascending order, and which could be read."""
    size = layout.page.size
    out = np.zeros(len(pfns), dtype=layout.page_dtype)
    good = np.ones(len(pfns), dtype=bool)
    # A page frame that no memory can have is damage, and its struct page may lie past the last address.
    frames = (layout.physical_mask >> layout.page_shift) + 1
    limit = np.uint64(min(frames, ((1 << 64) - layout.vmemmap) // size))

    def read_run(start: int, end: int) -> None:
        first = int(pfns[start])
        count = int(pfns[end - 1]) - first + 1
        try:
            data = prog.read(layout.vmemmap + first * size, count * size)
        except drgn.FaultError:
            if end - start == 1:
                good[start] = False
            else:
                # Halve until the bad ones are alone; there are few.
                middle = (start + end) // 2
                read_run(start, middle)
                read_run(middle, end)
            return
        run = np.frombuffer(data, dtype=layout.page_dtype)
        out[start:end] = run[(pfns[start:end] - pfns[start]).astype(np.intp)]

    valid = int(np.searchsorted(pfns, limit))
    good[valid:] = False
    start = 0
    gaps = np.flatnonzero(np.diff(pfns[:valid]) > _GAP_PAGES) + 1
    for stop in [*gaps.tolist(), valid]:
        while start < stop:
            end = int(np.searchsorted(pfns[:stop], pfns[start] + np.uint64(_RUN_PAGES)))
            read_run(start, end)
            start = end
    return out, good
