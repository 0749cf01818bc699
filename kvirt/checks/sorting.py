# SPDX-License-Identifier: GPL-2.0-only
"""Sorts the entries of page tables: what can be judged, and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass

import drgn
import numpy as np

from kvirt.checks.registry import PageBatch, VmaTable
from kvirt.findings import PageCounts
from kvirt.layout import Layout
from kvirt.mm.folio import read_folios
from kvirt.mm.pagetable import U64, Bool, Leaves, leaf_pfn, leaf_present, leaf_special, swap_type

# Reasons for which a page or entry is not judged.
SPECIAL = "special mappings without struct page"
ZERO = "zero pages"
NO_MAPPING = "kernel or driver pages"
KSM = "KSM pages"
HWPOISON = "poisoned pages"
TEMPORARY_STACK = "pages of an exec's temporary stack"
HUGETLB_UNITS = "hugetlb pages indexed in huge pages"
NOT_PRESENT = {
    "swap": "swap entries",
    "hwpoison": HWPOISON,
    "migration": "migration entries",
    "device": "device page entries",
    "marker": "marker entries",
}
# Those that no healthy process has for long: if they stay, the verdict is not complete.
NO_VMA = "pages no VMA covers"
UNREADABLE = "pages whose struct page cannot be read"
FOREIGN = "pages in anonymous memory that are not anonymous"
DOUBTS = (NO_VMA, UNREADABLE, FOREIGN)
# Present pages that are or may be anonymous, and whose index is not compared.
UNVERIFIED = (KSM, HWPOISON, TEMPORARY_STACK, HUGETLB_UNITS, *DOUBTS)


@dataclass(slots=True)
class Sorted:
    """The entries of one batch that can be judged, and those that should not be there."""

    batch: PageBatch
    leaves: Leaves
    """Those of the batch."""
    doubts: dict[str, Leaves]
    """By reason."""


class Sorter:
    """Sorts entries of one process."""

    def __init__(self, prog: drgn.Program, layout: Layout, table: VmaTable) -> None:
        self._prog = prog
        self._layout = layout
        self._table = table
        self._huge_zero_pfn = _huge_zero_pfn(prog, layout)

    def sort(self, leaves: Leaves, counts: PageCounts) -> Sorted:
        """Sort out what cannot be judged, count it, and read the folios of the rest."""
        layout, table, size = self._layout, self._table, leaves.pages
        doubts: dict[str, Leaves] = {}

        def skip(reason: str, mask: Bool) -> None:
            number = int(mask.sum())
            if number:
                counts.skipped[reason] += number * size
                if reason in UNVERIFIED:
                    counts.unverified[reason] += number * size

        def skip_types(types: U64) -> None:
            for type_, number in zip(*np.unique(types, return_counts=True), strict=True):
                counts.skipped[NOT_PRESENT[layout.swap_types.names[int(type_)]]] += int(number) * size

        present = leaf_present(leaves)
        skip_types(swap_type(leaves.take(~present)).astype(np.uint64))
        leaves = leaves.take(present)
        counts.present += len(leaves) * size
        pfn = leaf_pfn(layout, leaves)
        row = table.find(leaves.address)
        zero = self._is_zero(pfn, leaves.level)
        special = leaf_special(leaves) & ~zero
        no_vma = (row < 0) & ~zero & ~special
        for reason, mask in ((ZERO, zero), (SPECIAL, special), (NO_VMA, no_vma)):
            skip(reason, mask)
        doubts[NO_VMA] = leaves.take(no_vma)
        keep = ~(zero | special | no_vma)
        leaves, pfn, row = leaves.take(keep), pfn[keep], row[keep]

        folios = read_folios(self._prog, layout, pfn)
        poisoned = folios.readable & ((folios.flags & np.uint64(layout.pg_hwpoison)) != 0)
        sound = folios.readable & ~poisoned
        anon, ksm = folios.is_anon() & sound, folios.is_ksm() & sound
        # Nothing but anonymous memory can be faulted into a VMA without operations and file.
        foreign = sound & ~anon & ~ksm & table.at(table.pure, row)
        bare = sound & ~foreign & (folios.mapping == 0)
        building = anon & table.at(table.temporary_stack, row)
        in_huge_units = np.zeros_like(anon)
        if not layout.hugetlb_index_in_pages:
            in_huge_units = anon & table.at(table.hugetlb, row)
        for reason, mask in (
            (UNREADABLE, ~folios.readable),
            (HWPOISON, poisoned),
            (FOREIGN, foreign),
            (NO_MAPPING, bare),
            (KSM, ksm),
            (TEMPORARY_STACK, building),
            (HUGETLB_UNITS, in_huge_units),
        ):
            skip(reason, mask)
        doubts[UNREADABLE] = leaves.take(~folios.readable)
        doubts[FOREIGN] = leaves.take(foreign)
        keep = sound & ~foreign & ~bare
        counts.anon += int(anon.sum()) * size
        counts.verified += int((anon & ~building & ~in_huge_units).sum()) * size
        counts.checked += int((keep & ~ksm & ~building & ~in_huge_units).sum()) * size
        leaves = leaves.take(keep)
        batch = PageBatch(
            layout,
            table,
            leaves.level,
            size,
            leaves.address,
            pfn[keep],
            row[keep],
            folios.take(keep),
        )
        return Sorted(batch, leaves, doubts)

    def _is_zero(self, pfn: U64, level: int) -> Bool:
        if level == 0 and self._layout.zero_pfn is not None:
            first: Bool = (pfn - np.uint64(self._layout.zero_pfn)) < np.uint64(self._layout.zero_pages)
            return first
        if level == 1 and self._huge_zero_pfn is not None:
            huge: Bool = pfn == np.uint64(self._huge_zero_pfn)
            return huge
        return np.zeros(len(pfn), dtype=bool)


def _huge_zero_pfn(prog: drgn.Program, layout: Layout) -> int | None:
    """The huge zero folio's page frame, if there is one now (include/linux/huge_mm.h)."""
    if layout.huge_zero_pfn_address is None:
        return None
    try:
        pfn: int = prog.read_u64(layout.huge_zero_pfn_address)
    except drgn.FaultError:
        return None
    return None if pfn == (1 << 64) - 1 else pfn
