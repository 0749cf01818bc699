# SPDX-License-Identifier: GPL-2.0-only
"""struct page and struct folio of many page frames at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.mm.arrays import constant, runs, take
from kvirt.mm.memmap import read_struct_pages
from kvirt.mm.pagetable import U64, Bool

I64 = npt.NDArray[np.int64]

# include/linux/page-flags.h: FOLIO_MAPPING_ANON, FOLIO_MAPPING_KSM (PAGE_MAPPING_... before 6.17)
FOLIO_MAPPING_ANON = np.uint64(1)
FOLIO_MAPPING_KSM = np.uint64(3)
FOLIO_MAPPING_FLAGS = np.uint64(3)


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
        if mask.all():
            return self
        return Folios(*(take(getattr(self, one.name), mask) for one in fields(self)))

    def is_anon(self) -> Bool:
        """Anonymous and not KSM."""
        anon: Bool = self._kind() == int(FOLIO_MAPPING_ANON)
        return anon

    def is_ksm(self) -> Bool:
        """``folio_test_ksm()``."""
        ksm: Bool = self._kind() == int(FOLIO_MAPPING_KSM)
        return ksm

    def is_file(self) -> Bool:
        """Neither anonymous nor of a driver that says so by the low bits."""
        file: Bool = self._kind() == 0
        if file.any():
            file &= self.mapping != 0
        return file

    def _kind(self) -> npt.NDArray[np.uint8]:
        # A byte each: these are asked for again and again.
        kind: npt.NDArray[np.uint8] = self.mapping.astype(np.uint8) & np.uint8(FOLIO_MAPPING_FLAGS)
        return kind

    def anon_vma(self) -> U64:
        """``folio_anon_vma()`` where :meth:`is_anon`."""
        return self.mapping & ~FOLIO_MAPPING_FLAGS


def read_folios(prog: drgn.Program, layout: Layout, pfns: U64) -> Folios:
    """Find and read the folio behind each page frame (``page_folio()``, include/linux/page-flags.h).

    A page frame without readable struct page is marked, not raised.
    """
    pages, readable = read_struct_pages(prog, layout, pfns)
    number = len(pfns)
    flags = pages["flags"].astype(np.uint64)
    tail = (pages["compound"] & np.uint64(1)) != 0
    if not tail.any() and not (flags & np.uint64(layout.pg_head)).any():
        # All of them small, as most are.
        zero = constant(np.int64(0), number)
        return Folios(
            readable=readable,
            flags=flags,
            head=pfns,
            mapping=pages["mapping"].astype(np.uint64),
            index=pages["index"].astype(np.uint64),
            private=pages["private"],
            astray=constant(np.bool_(False), number),
            large=constant(np.bool_(False), number),
            nr_pages=constant(np.int64(1), number),
            page_mapcount=_counter(pages["mapcount"]),
            entire_mapcount=zero,
            large_mapcount=zero,
        )
    heads = _heads(layout, pfns, pages["compound"].astype(np.uint64), tail)
    # Pages of one folio are mostly neighbours.
    first, where = runs(heads)
    head_pages, head_readable = read_struct_pages(prog, layout, heads[first])
    is_large = head_readable & ((head_pages["flags"] & np.uint64(layout.pg_head)) != 0)
    counts = _read_large(prog, layout, heads[first], is_large)
    good = readable & (head_readable & counts.readable)[where]
    # A page before the head wraps to a large number.
    astray = good & tail & (pfns - heads >= counts.pages[where].astype(np.uint64))
    sane = good & ~astray
    return Folios(
        readable=good,
        flags=flags,
        head=heads,
        mapping=np.where(sane, head_pages["mapping"][where], np.uint64(0)),
        index=np.where(sane, head_pages["index"][where], np.uint64(0)),
        private=np.where(sane, head_pages["private"][where], np.uint64(0)),
        astray=astray,
        large=is_large[where],
        nr_pages=counts.pages[where],
        page_mapcount=_counter(pages["mapcount"]) - counts.double[where],
        entire_mapcount=counts.entire[where],
        large_mapcount=counts.large[where],
    )


def _heads(layout: Layout, pfns: U64, compound: U64, tail: Bool) -> U64:
    """Page frames of the first pages that pages lead to: ``_compound_head()``, include/linux/page-flags.h.

    Wild pointers give page frames beyond all memory, which are found unreadable.
    """
    base, size = np.uint64(layout.vmemmap), np.uint64(layout.page.size)
    pointers = base + pfns * size
    if layout.compound_mask:
        pointers = np.where(tail, pointers & compound, pointers)
    else:
        # A leaf of a hugetlb folio maps its first page, so the fake heads that its optimised vmemmap
        # has are never met here.
        pointers = np.where(tail, compound - np.uint64(1), pointers)
    return (pointers - base) // size


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

    :param heads: their first page frames
    """
    zeros = np.zeros(len(heads), dtype=np.int64)
    counts = _LargeCounts(
        np.ones(len(heads), dtype=bool), zeros + 1, zeros.copy(), zeros.copy(), zeros.copy()
    )
    where = np.flatnonzero(is_large)
    if not len(where):
        return counts
    # hugetlb's optimised vmemmap keeps the first page of struct pages, so the second is a real one.
    second, counts.readable[where] = read_struct_pages(prog, layout, heads[where] + np.uint64(1))
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
