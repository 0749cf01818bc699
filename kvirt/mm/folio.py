# SPDX-License-Identifier: GPL-2.0-only
"""struct page and struct folio of many page frames at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.memory import Runs
from kvirt.mm.arrays import any_bits, compact, constant, each, runs, take
from kvirt.mm.memmap import Members, read_struct_pages, read_uniform
from kvirt.mm.pagetable import U64, Bool

I64 = npt.NDArray[np.int64]

# include/linux/page-flags.h: FOLIO_MAPPING_ANON, FOLIO_MAPPING_KSM (PAGE_MAPPING_... before 6.17)
FOLIO_MAPPING_ANON = np.uint64(1)
FOLIO_MAPPING_KSM = np.uint64(3)
FOLIO_MAPPING_FLAGS = np.uint64(3)

# Members of struct page that are looked at: of the page itself, and of its folio's first.
_PAGE = ("flags", "compound", "mapping", "index", "mapcount")
# PageTail(), include/linux/page-flags.h. The rest of the word is of interest in tail pages alone.
_TAIL = 1
_HEAD = ("flags", "mapping", "index")


@dataclass(slots=True)
class Folios:
    """The folio behind each of many page frames. All arrays have one element a page frame."""

    readable: Bool
    """Whether the struct page and its folio could be read; all else is 0 where not."""
    flags: U64
    """Of ``page->flags`` of the page itself, those of ``layout.pg_known``."""
    head: U64
    """Page frame of the folio's first page (``page_folio()``)."""
    mapping: U64
    """``folio->mapping`` with its low bits."""
    index: U64
    """``folio->index``."""
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

    _kind: npt.NDArray[np.uint8] = field(init=False)
    """The low bits of *mapping*, in a byte: they are asked for again and again."""

    def __post_init__(self) -> None:
        flags = np.uint8(FOLIO_MAPPING_FLAGS)
        self._kind = each(lambda mapping: mapping.astype(np.uint8) & flags, self.mapping)

    def take(self, mask: Bool) -> Folios:
        """Some of the page frames."""
        if mask.all():
            return self
        return Folios(*(take(getattr(self, one.name), mask) for one in fields(self) if one.init))

    def is_anon(self) -> Bool:
        """Anonymous and not KSM."""
        return each(lambda kind: kind == FOLIO_MAPPING_ANON, self._kind)

    def is_ksm(self) -> Bool:
        """``folio_test_ksm()``."""
        return each(lambda kind: kind == FOLIO_MAPPING_KSM, self._kind)

    def is_file(self) -> Bool:
        """Neither anonymous nor of a driver that says so by the low bits."""
        file: Bool = each(lambda kind: kind == 0, self._kind)
        if file.any():
            file &= self.mapping != 0
        return file

    def has(self, flags: int) -> Bool:
        """Which pages have one of some page flags."""
        if not any_bits(self.flags) & flags:
            return np.zeros(len(self.flags), dtype=bool)
        return each(lambda have: (have & np.uint64(flags)) != 0, self.flags)

    def anon_vma(self) -> U64:
        """``folio_anon_vma()`` where :meth:`is_anon`."""
        return each(lambda mapping: mapping & ~FOLIO_MAPPING_FLAGS, self.mapping)


def read_folios(prog: drgn.Program, layout: Layout, pfns: U64) -> Folios:
    """Find and read the folio behind each page frame (``page_folio()``, include/linux/page-flags.h).

    A page frame without readable struct page is marked, not raised.
    """
    masks, unless = {"flags": layout.pg_known}, {"compound": _TAIL}
    pages, readable = read_struct_pages(prog, layout, pfns, _PAGE, masks, unless)
    flags = compact(pages["flags"])
    if not any_bits(pages["compound"]) & _TAIL and not any_bits(flags) & layout.pg_head:
        # All of them small, as most are.
        return _small(pfns, readable, pages | {"flags": flags})
    tail = (pages["compound"] & np.uint64(_TAIL)) != 0
    heads = _heads(layout, pfns, pages["compound"].astype(np.uint64), tail)
    # Pages of one folio are mostly neighbours.
    first, where = runs(heads)
    head_pages, head_readable = read_struct_pages(prog, layout, heads[first], _HEAD)
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
        astray=astray,
        large=is_large[where],
        nr_pages=counts.pages[where],
        page_mapcount=_counter(pages["mapcount"]) - counts.double[where],
        entire_mapcount=counts.entire[where],
        large_mapcount=counts.large[where],
    )


def read_uniform_folios(prog: drgn.Program, layout: Layout, frames: Runs) -> Folios | None:
    """The first of many small folios that differ in nothing that :func:`read_folios` tells but their place.

    That is in their page frames, and in an index that rises by one from each to the next.

    :param frames: at least one
    :returns: one folio, as it was when it was compared; None if they differ in more, or if that is not found
        out quickly
    """
    names = [name for name in _PAGE if name != "index"]
    common = read_uniform(prog, layout, frames, names, {"flags": layout.pg_known, "compound": _TAIL})
    if common is None or common["compound"] or common["flags"] & layout.pg_head:
        return None
    first = {name: np.array([value], dtype=layout.page_dtype[name]) for name, value in common.items()}
    return _small(frames.first[:1].view(np.uint64), np.ones(1, dtype=bool), first)


def _small(pfns: U64, readable: Bool, pages: Members) -> Folios:
    """Folios of one page each.

    :param pages: what their struct pages say, by names of *_PAGE*
    """
    number = len(pfns)
    zero = constant(np.int64(0), number)
    return Folios(
        readable=readable,
        flags=pages["flags"],
        head=pfns,
        mapping=compact(pages["mapping"]),
        index=pages["index"],
        astray=constant(np.bool_(False), number),
        large=constant(np.bool_(False), number),
        nr_pages=constant(np.int64(1), number),
        page_mapcount=each(_counter, compact(pages["mapcount"])),
        entire_mapcount=zero,
        large_mapcount=zero,
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
    return np.add(stored, 1, dtype=np.int64)


def _read_large(prog: drgn.Program, layout: Layout, heads: U64, is_large: Bool) -> _LargeCounts:
    """Read the counts of those folios that are large (``struct folio``, include/linux/mm_types.h).

    :param heads: their first page frames
    """
    names = ["flags", *layout.large_counts]
    zeros = np.zeros(len(heads), dtype=np.int64)
    counts = _LargeCounts(
        np.ones(len(heads), dtype=bool), zeros + 1, zeros.copy(), zeros.copy(), zeros.copy()
    )
    where = np.flatnonzero(is_large)
    if not len(where):
        return counts
    # hugetlb's optimised vmemmap keeps the first page of struct pages, so the second is a real one.
    second, counts.readable[where] = read_struct_pages(prog, layout, heads[where] + np.uint64(1), names)
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
