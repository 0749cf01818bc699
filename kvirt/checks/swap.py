# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of entries that are not present."""

from __future__ import annotations

import numpy as np

from kvirt.checks.registry import EntryBatch, PageViolations, entry_check
from kvirt.findings import Severity


@entry_check(
    "SWAPCACHE-INDEX",
    Severity.ERROR,
    says="A folio in the swap cache has the anonymous page offset of the VMAs that swapped it out as index.",
    relied_on="do_swap_page(), which maps a large folio as it finds it, mm/memory.c",
    message="the folio in the swap cache (page frame {pfn:#x}) is indexed {actual:#x}, and should be "
    "{expected:#x} ({delta:+d})",
    alike=lambda expected, actual: actual - expected,
)
def swapcache_index(batch: EntryBatch) -> PageViolations:
    """What a fault would map is where rmap will look for it.

    For information only where the folio is small: what KSM had merged is one entry of swap for several
    places, and a fault at another place than the index says makes a copy (mm/ksm.c:
    ksm_might_need_to_copy()).
    """
    expected, actual = batch.expected_index(), batch.index()
    small = (batch.folios.flags & np.uint64(batch.layout.pg_head)) == 0
    small &= batch.folios.head == batch.pfn
    return PageViolations(batch.cached & (expected != actual), expected, actual, small)


@entry_check(
    "SWAP-ENTRY-FAULTED",
    Severity.ERROR,
    says="A VMA with entries of swap, or with entries that stand for anonymous pages, has an anon_vma.",
    relied_on="copy_page_range() and vma_needs_copy(), which leave out the page tables of other VMAs at "
    "fork, mm/memory.c",
    message="the VMA has anonymous memory that is not present, and no anon_vma",
    alike=lambda expected, actual: 0,
)
def swap_entry_faulted(batch: EntryBatch) -> PageViolations:
    """What is swapped out was faulted in before.

    Markers are no such entries: guards and those of userfaultfd are legal in VMAs that were never faulted.
    """
    actual = batch.table.anon_vma[batch.row]
    return PageViolations(actual == 0, np.zeros_like(actual), actual)
