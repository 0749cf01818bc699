# SPDX-License-Identifier: GPL-2.0-only
"""Sorts the entries of page tables: what can be judged, and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass

import drgn
import numpy as np

from kvirt.checks.registry import EntryBatch, PageBatch, VmaTable, within_hugetlb
from kvirt.findings import PageCounts
from kvirt.layout import Layout
from kvirt.memory import Places
from kvirt.mm.arrays import each, pick, take
from kvirt.mm.folio import Folios, read_folios
from kvirt.mm.ksm import Ksm, RmapItems
from kvirt.mm.memmap import read_struct_pages
from kvirt.mm.pagetable import (
    U64,
    Bool,
    Leaves,
    any_special,
    leaf_pfn,
    leaf_present,
    leaf_special,
    swap_offset,
    swap_pfn,
    swap_type,
)
from kvirt.mm.swap import SwapCache, swp_entry

# Reasons for which a page or entry is not judged.
SPECIAL = "special mappings without struct page"
ZERO = "zero pages"
NO_MAPPING = "kernel or driver pages"
KSM = "KSM pages"
KSM_FOREIGN = "KSM pages without an rmap_item in this process"
HWPOISON = "poisoned pages"
TEMPORARY_STACK = "pages of an exec's temporary stack"
MARKER = "marker entries"
SWAP = "swap entries"
READ_AHEAD = "swap entries whose page was only read ahead"
RAW_MAPPING = "pages that a driver maps as it likes"
DAX = "pages of storage mapped directly"
OTHER_FILE = "pages of another file than the VMA's"
# Those that no healthy process has for long: if they stay, the verdict is not complete.
NO_VMA = "pages no VMA covers"
UNREADABLE = "pages whose struct page cannot be read"
FOREIGN = "pages in anonymous memory that are not anonymous"
KSM_BROKEN = "KSM pages whose stable node does not lead to their rmap_items"
SWAP_NO_VMA = "swap entries no VMA covers"
SWAP_UNKNOWN = "swap entries that cannot be looked up in the swap cache"
SWAP_FOREIGN = "swap entries whose folio in the swap cache is another entry's"
DOUBTS = (NO_VMA, UNREADABLE, FOREIGN, KSM_BROKEN, SWAP_NO_VMA, SWAP_UNKNOWN, SWAP_FOREIGN)
# Pages that are or may be anonymous, and whose index is not compared.
UNVERIFIED = (KSM, KSM_FOREIGN, HWPOISON, TEMPORARY_STACK, *DOUBTS)
# Entries of swap that the accounting of pages leaves out: their pages are not in memory, or not mapped.
SWAPPED = (SWAP, READ_AHEAD, SWAP_NO_VMA, SWAP_UNKNOWN, SWAP_FOREIGN)

# Swap types whose entries stand for a page in memory: softleaf_has_pfn(), include/linux/leafops.h.
# That of hwpoison does too, and nobody may look at the page.
_STAND_IN = ("migration", "device-private", "device-exclusive")
_NO_PAGE = {"hwpoison": HWPOISON, "marker": MARKER}

Numbers = U64 | Places


@dataclass(slots=True)
class Sorted:
    """The entries of one batch that can be judged, and those that should not be there."""

    batch: PageBatch
    leaves: Leaves
    """Those of the batch."""
    entries: list[tuple[EntryBatch, Leaves]]
    """Those of swap, and those that stand for anonymous pages."""
    doubts: list[tuple[str, Leaves]]
    """With their reasons."""


class _Counter:
    """Counts what is not judged, and keeps what is doubtful."""

    def __init__(self, counts: PageCounts, size: int) -> None:
        self._counts = counts
        self._size = size
        self.doubts: list[tuple[str, Leaves]] = []

    def skip(self, reason: str, leaves: Leaves, mask: Bool) -> None:
        number = int(np.count_nonzero(mask))
        if not number:
            return
        self._counts.skipped[reason] += number * self._size
        if reason in UNVERIFIED:
            self._counts.unverified[reason] += number * self._size
        if reason in DOUBTS:
            self.doubts.append((reason, leaves.take(mask)))


class Sorter:
    """Sorts entries of one process."""

    def __init__(self, prog: drgn.Program, layout: Layout, table: VmaTable) -> None:
        self._prog = prog
        self._layout = layout
        self._table = table
        self._huge_zero_pfn = _huge_zero_pfn(prog, layout)
        self._swap_cache = SwapCache(prog, layout)
        self._ksm = Ksm(prog, layout, table.space.address)
        names = layout.swap_types.names
        self._is_stand_in = np.array([name in _STAND_IN for name in names])
        self._is_swap = np.array([name == "swap" for name in names])
        self._no_page = {
            reason: np.array([name == kind for name in names]) for kind, reason in _NO_PAGE.items()
        }

    def sort(self, leaves: Leaves, counts: PageCounts, folios: Folios | None = None) -> Sorted:
        """Sort out what cannot be judged, count it, and read the folios of the rest.

        :param folios: those behind the entries, which are all present, if they were read with them
        """
        counter = _Counter(counts, leaves.pages)
        present = leaf_present(leaves)
        if present.all():
            batch, batch_leaves = self._sort_pages(leaves, present, counts, counter, folios)
            return Sorted(batch, batch_leaves, [], counter.doubts)
        type_ = swap_type(leaves)
        for reason, types in self._no_page.items():
            counter.skip(reason, leaves, ~present & types[type_])
        in_memory = present | self._is_stand_in[type_]
        batch, batch_leaves = self._sort_pages(leaves.take(in_memory), present[in_memory], counts, counter)
        swapped = self._sort_swap(leaves.take(~present & self._is_swap[type_]), counts, counter)
        absent = ~batch.present & batch.folios.is_anon()
        stand_ins = _entries(batch, absent), batch_leaves.take(absent)
        return Sorted(batch, batch_leaves, [swapped, stand_ins], counter.doubts)

    def _sort_pages(
        self,
        leaves: Leaves,
        present: Bool,
        counts: PageCounts,
        counter: _Counter,
        folios: Folios | None = None,
    ) -> tuple[PageBatch, Leaves]:
        """Entries that map or stand for pages in memory."""
        layout, table, size = self._layout, self._table, leaves.pages
        counts.present += len(leaves) * size
        pfn = leaf_pfn(leaves)
        if not present.all():
            pfn = np.where(present, pfn, swap_pfn(layout, leaves))
        row = table.find(leaves.address)
        covered = each(lambda row: row >= 0, row)
        if self.any_zero(pfn, leaves.level) or any_special(leaves) or not covered.all():
            zero = self._is_zero(pfn, leaves.level) & present
            special = leaf_special(leaves) & present & ~zero
            no_vma = ~(covered | zero | special)
            for reason, mask in ((ZERO, zero), (SPECIAL, special), (NO_VMA, no_vma)):
                counter.skip(reason, leaves, mask)
            keep = ~(zero | special | no_vma)
            leaves, pfn, row = leaves.take(keep), take(pfn, keep), take(row, keep)
            present = take(present, keep)
            folios = None if folios is None else folios.take(keep)
        if not present.all():
            # All entries of a hugetlb page stand for its first page: set_huge_pte_at()
            pfn = np.where(present, pfn, pfn + within_hugetlb(table, leaves.address, row))

        if folios is None:
            folios = read_folios(self._prog, layout, pfn)
        poisoned = folios.has(layout.pg_hwpoison)
        anon = folios.is_anon()
        ordinary = anon.all() and folios.readable.all() and not poisoned.any()
        if ordinary and not table.at(table.temporary_stack, row).any():
            # As most are: no reason below is one of theirs.
            number = len(pfn) * size
            counts.anon += number
            counts.verified += number
            counts.checked += number
            items = RmapItems.none(len(pfn))
            address = leaves.address
            batch = PageBatch(layout, table, leaves.level, size, address, pfn, row, folios, present, items)
            return batch, leaves
        poisoned &= folios.readable
        sound = folios.readable & ~poisoned
        anon = anon & sound
        ksm = folios.is_ksm() & sound
        # Nothing but anonymous memory can be faulted into a VMA without operations and file.
        foreign = sound & ~folios.astray & ~anon & ~ksm & table.at(table.pure, row)
        bare = sound & ~folios.astray & ~foreign & (folios.mapping == 0)
        building = anon & table.at(table.temporary_stack, row)
        file = folios.is_file() & sound & ~foreign
        # VM_PFNMAP or VM_MIXEDMAP: vm_normal_page(), mm/memory.c
        raw = file & table.at(table.raw, row)
        dax = file & ~raw & table.at(table.dax, row)
        own = folios.mapping == pick(table.f_mapping, row)
        other_file = sound & ~(folios.astray | foreign | bare | anon | ksm | raw | dax | own)
        items = self._ksm.rmap_items(leaves.address, pfn, folios)
        unknown_ksm = ksm & ~items.found & ~items.broken
        for reason, mask in (
            (UNREADABLE, ~folios.readable),
            (HWPOISON, poisoned),
            (FOREIGN, foreign),
            (NO_MAPPING, bare),
            (KSM if layout.ksm is None else KSM_FOREIGN, unknown_ksm),
            (KSM_BROKEN, ksm & items.broken),
            (TEMPORARY_STACK, building),
            (RAW_MAPPING, raw),
            (DAX, dax),
            (OTHER_FILE, other_file),
        ):
            counter.skip(reason, leaves, mask)
        keep = sound & ~(foreign | bare | raw | dax | other_file)
        counts.anon += int(np.count_nonzero(anon)) * size
        judged = keep & (~ksm | items.found) & ~building
        counts.verified += int(np.count_nonzero(judged & (anon | ksm))) * size
        counts.checked += int(np.count_nonzero(judged)) * size
        batch = PageBatch(
            layout,
            table,
            leaves.level,
            size,
            take(leaves.address, keep),
            take(pfn, keep),
            take(row, keep),
            folios.take(keep),
            take(present, keep),
            items.take(keep),
        )
        return batch, leaves.take(keep)

    def _sort_swap(self, leaves: Leaves, counts: PageCounts, counter: _Counter) -> tuple[EntryBatch, Leaves]:
        """Entries of swap."""
        layout, table, size = self._layout, self._table, leaves.pages
        row = table.find(leaves.address)
        counter.skip(SWAP_NO_VMA, leaves, row < 0)
        leaves, row = leaves.take(row >= 0), row[row >= 0]

        types, offsets = swap_type(leaves).astype(np.uint64), swap_offset(leaves)
        head, known = self._swap_cache.lookup(types, offsets)
        cached = head != 0
        # page_swap_entry(), include/linux/swap.h: pages of a large folio have consecutive entries.
        first, first_readable = read_struct_pages(self._prog, layout, head, ["private"])
        # folio->swap, include/linux/mm_types.h
        pfn = np.where(cached, head + swp_entry(types, offsets) - first["private"], np.uint64(0))
        folios = read_folios(self._prog, layout, pfn)
        readable = first_readable & folios.readable
        answers = cached & readable & (folios.head == head)
        anon = answers & folios.is_anon()
        ksm = answers & folios.is_ksm()
        building = anon & table.at(table.temporary_stack, row)
        for reason, mask in (
            (SWAP_UNKNOWN, ~known | (cached & ~first_readable)),
            (SWAP, known & ~cached),
            (SWAP_FOREIGN, cached & first_readable & ~answers),
            # Without a mapping: nobody has had it in memory since it was swapped out.
            (READ_AHEAD, answers & ~anon & ~ksm),
            (KSM, ksm),
            (TEMPORARY_STACK, building),
        ):
            counter.skip(reason, leaves, mask)
        judged = anon & ~building
        counts.swapcache += int(judged.sum()) * size
        batch = EntryBatch(
            layout,
            table,
            leaves.level,
            size,
            leaves.address,
            pfn,
            row,
            folios,
            np.zeros(len(row), dtype=bool),
            RmapItems.none(len(row)),
            judged,
        )
        return batch, leaves

    def any_zero(self, first: Numbers, level: int, lengths: Places | None = None) -> bool:
        """Whether one of some page frames is a zero page.

        :param lengths: of runs of them on level 0, if what is given is but the first of each
        """
        if level:
            return bool(self._is_zero(first.view(np.uint64), level).any())
        zero = self._layout.zero_pfn
        if zero is None or not len(first) or first.min() >= zero + self._layout.zero_pages:
            return False
        last = first if lengths is None else first + lengths - 1
        return bool(last.max() >= zero and ((last >= zero) & (first < zero + self._layout.zero_pages)).any())

    def _is_zero(self, pfn: U64, level: int) -> Bool:
        if level == 0 and self._layout.zero_pfn is not None:
            first: Bool = (pfn - np.uint64(self._layout.zero_pfn)) < np.uint64(self._layout.zero_pages)
            return first
        if level == 1 and self._huge_zero_pfn is not None:
            huge: Bool = pfn == np.uint64(self._huge_zero_pfn)
            return huge
        return np.zeros(len(pfn), dtype=bool)


def _entries(batch: PageBatch, mask: Bool) -> EntryBatch:
    """Some pages of a batch, as the entries that stand for them."""
    return EntryBatch(
        batch.layout,
        batch.table,
        batch.level,
        batch.pages,
        batch.address[mask],
        batch.pfn[mask],
        batch.row[mask],
        batch.folios.take(mask),
        batch.present[mask],
        batch.rmap_items.take(mask),
        np.zeros(int(mask.sum()), dtype=bool),
    )


def _huge_zero_pfn(prog: drgn.Program, layout: Layout) -> int | None:
    """The huge zero folio's page frame, if there is one now (include/linux/huge_mm.h)."""
    if layout.huge_zero_pfn_address is None:
        return None
    try:
        pfn: int = prog.read_u64(layout.huge_zero_pfn_address)
    except drgn.FaultError:
        return None
    return None if pfn == (1 << 64) - 1 else pfn
