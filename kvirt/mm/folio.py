# SPDX-License-Identifier: GPL-2.0-only
"""struct page and struct folio of many page frames at once."""

from __future__ import annotations

from dataclasses import dataclass

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.mm.pagetable import U64, Bool

I64 = npt.NDArray[np.int64]

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
    astray: Bool
    """Tail pages whose head is none, or of a folio that does not reach to them; mapping and index are 0."""
    large: Bool
    """``folio_test_large()``."""
    nr_pages: I64
    """``folio_nr_pages()``."""
    page_mapcount: I64
    """Entries that map the page by itself: ``page->_mapcount`` and one. Kernels with
    CONFIG_NO_PAGE_MAPCOUNT leave it 0 in large folios."""
    entire_mapcount: I64
    """``folio_entire_mapcount()``: entries that map a large folio as a whole."""
    large_mapcount: I64
    """``folio_large_mapcount()``: all entries that map a large folio or a page of it; 0 where this
    kernel does not count them (before 6.10)."""

    def take(self, mask: Bool) -> Folios:
        """Some of the page frames."""
        return Folios(
            self.readable[mask],
            self.flags[mask],
            self.head[mask],
            self.mapping[mask],
            self.index[mask],
            self.private[mask],
            self.astray[mask],
            self.large[mask],
            self.nr_pages[mask],
            self.page_mapcount[mask],
            self.entire_mapcount[mask],
            self.large_mapcount[mask],
        )

    def is_anon(self) -> Bool:
        """Anonymous and not KSM."""
        anon: Bool = (self.mapping & FOLIO_MAPPING_FLAGS) == FOLIO_MAPPING_ANON
        return anon

    def is_ksm(self) -> Bool:
        """``folio_test_ksm()``."""
        ksm: Bool = (self.mapping & FOLIO_MAPPING_FLAGS) == FOLIO_MAPPING_KSM
        return ksm

    def is_file(self) -> Bool:
        """Neither anonymous nor of a driver that says so by the low bits."""
        file: Bool = ((self.mapping & FOLIO_MAPPING_FLAGS) == 0) & (self.mapping != 0)
        return file

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
    is_large = head_readable & ((head_pages["flags"].astype(np.uint64) & np.uint64(layout.pg_head)) != 0)
    counts = _read_large(prog, layout, head_unique, is_large)
    good = readable & (head_readable & counts.readable)[head_where]
    # A page before the head wraps to a large number.
    astray = good & tail & (unique - heads >= counts.pages[head_where].astype(np.uint64))
    sane = good & ~astray
    mapping = np.where(sane, head_pages["mapping"].astype(np.uint64)[head_where], np.uint64(0))
    index = np.where(sane, head_pages["index"].astype(np.uint64)[head_where], np.uint64(0))
    private = np.where(sane, head_pages["private"].astype(np.uint64)[head_where], np.uint64(0))
    return Folios(
        readable=good[where],
        flags=pages["flags"].astype(np.uint64)[where],
        head=heads[where],
        mapping=mapping[where],
        index=index[where],
        private=private[where],
        astray=astray[where],
        large=is_large[head_where][where],
        nr_pages=counts.pages[head_where][where],
        page_mapcount=(_counter(pages["mapcount"]) - counts.double[head_where])[where],
        entire_mapcount=counts.entire[head_where][where],
        large_mapcount=counts.large[head_where][where],
    )


@dataclass(slots=True)
class _LargeCounts:
    """What large folios count in their second struct page, one element a folio."""

    readable: Bool
    pages: I64
    """``folio_nr_pages()``"""
    entire: I64
    large: I64
    double: I64
    """1 where each page counts the mapping of the whole too (``PageDoubleMap()``, before 6.2)."""


def _counter(stored: npt.NDArray[np.int32]) -> I64:
    """A mapcount: the stored counters start at -1."""
    return stored.astype(np.int64) + 1


def _read_large(prog: drgn.Program, layout: Layout, heads: U64, is_large: Bool) -> _LargeCounts:
    """Read the counts of those folios that are large (``struct folio``, include/linux/mm_types.h).

    :param heads: their first page frames, ascending
    """
    zeros = np.zeros(len(heads), dtype=np.int64)
    counts = _LargeCounts(
        np.ones(len(heads), dtype=bool), zeros + 1, zeros.copy(), zeros.copy(), zeros.copy()
    )
    where = np.flatnonzero(is_large)
    if not len(where):
        return counts
    # hugetlb's optimised vmemmap keeps the first page of struct pages, so the second is a real one.
    second, counts.readable[where] = _read_pages(prog, layout, heads[where] + np.uint64(1))
    for name, into in (("entire_mapcount", counts.entire), ("large_mapcount", counts.large)):
        if name in layout.large_counts:
            into[where] = _counter(second[name])
    if "nr_pages" in layout.large_counts:
        counts.pages[where] = second["nr_pages"].astype(np.uint32)
    else:
        # Not said: then nothing is beyond.
        counts.pages[where] = np.iinfo(np.int32).max
    if layout.pg_double_map:
        flags = second["flags"].astype(np.uint64)
        counts.double[where] = (flags & np.uint64(layout.pg_double_map)) != 0
    return counts
