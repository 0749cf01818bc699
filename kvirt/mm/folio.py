# SPDX-License-Identifier: GPL-2.0-only
"""struct page and struct folio of many page frames at once."""

from __future__ import annotations

from dataclasses import dataclass

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.mm.pagetable import U64, Bool

# include/linux/page-flags.h: FOLIO_MAPPING_ANON, FOLIO_MAPPING_KSM (PAGE_MAPPING_... before 6.17)
FOLIO_MAPPING_ANON = np.uint64(1)
FOLIO_MAPPING_KSM = np.uint64(3)
FOLIO_MAPPING_FLAGS = np.uint64(3)

# Struct pages this close are read together: one read of 16 KiB costs less than two of 64 bytes.
_GAP_PAGES = 256
# And a run ends here, so that one bad spot does not spoil much and memory stays bounded.
_RUN_PAGES = 1 << 16


@dataclass(slots=True)
class Folios:
    """The folio behind each of many page frames. All arrays have one element a page frame."""

    readable: Bool
    """Whether the struct page and its folio could be read; all else is 0 where not."""
    flags: U64
    """``page->flags`` of the page itself."""
    head: U64
    """Page frame of the folio's first page (``page_folio()``)."""
    mapping: U64
    """``folio->mapping`` with its low bits."""
    index: U64
    """``folio->index``."""
    private: U64
    """``folio->private``; in the swap cache this is ``folio->swap.val``."""

    def take(self, mask: Bool) -> Folios:
        """Some of the page frames."""
        return Folios(
            self.readable[mask],
            self.flags[mask],
            self.head[mask],
            self.mapping[mask],
            self.index[mask],
            self.private[mask],
        )

    def is_anon(self) -> Bool:
        """Anonymous and not KSM."""
        anon: Bool = (self.mapping & FOLIO_MAPPING_FLAGS) == FOLIO_MAPPING_ANON
        return anon

    def is_ksm(self) -> Bool:
        """``folio_test_ksm()``."""
        ksm: Bool = (self.mapping & FOLIO_MAPPING_FLAGS) == FOLIO_MAPPING_KSM
        return ksm

    def anon_vma(self) -> U64:
        """``folio_anon_vma()`` where :meth:`is_anon`."""
        return self.mapping & ~FOLIO_MAPPING_FLAGS


def _read_pages(prog: drgn.Program, layout: Layout, pfns: U64) -> tuple[npt.NDArray[np.void], Bool]:
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


def read_folios(prog: drgn.Program, layout: Layout, pfns: U64) -> Folios:
    """Find and read the folio behind each page frame (``page_folio()``, include/linux/page-flags.h).

    A page frame without readable struct page is marked, not raised.
    """
    unique, where = np.unique(pfns, return_inverse=True)
    pages, readable = _read_pages(prog, layout, unique)
    compound = pages["compound"].astype(np.uint64)
    tail = (compound & np.uint64(1)) != 0
    base, size = np.uint64(layout.vmemmap), np.uint64(layout.page.size)
    pointers = base + unique * size
    if layout.compound_mask:
        pointers = np.where(tail, pointers & compound, pointers)
    else:
        # A leaf of a hugetlb folio maps its first page, so the fake heads that its optimised vmemmap
        # has are never met here.
        pointers = np.where(tail, compound - np.uint64(1), pointers)
    # Wild pointers give page frames beyond all memory, and are found unreadable.
    heads = (pointers - base) // size
    head_unique, head_where = np.unique(heads, return_inverse=True)
    head_pages, head_readable = _read_pages(prog, layout, head_unique)
    good = readable & head_readable[head_where]
    mapping = np.where(good, head_pages["mapping"].astype(np.uint64)[head_where], np.uint64(0))
    index = np.where(good, head_pages["index"].astype(np.uint64)[head_where], np.uint64(0))
    private = np.where(good, head_pages["private"].astype(np.uint64)[head_where], np.uint64(0))
    return Folios(
        readable=good[where],
        flags=pages["flags"].astype(np.uint64)[where],
        head=heads[where],
        mapping=mapping[where],
        index=index[where],
        private=private[where],
    )
