# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of what KSM merged."""

from __future__ import annotations

from kvirt.checks.registry import PageBatch, PageViolations, page_check
from kvirt.findings import Severity
from kvirt.layout import Layout


# What this says of itself is what `kvirt checks` prints as the kernels of an invariant.
def _keeps_index(layout: Layout) -> bool:
    """indexed KSM

    struct ksm_rmap_item has linear_page_index, 7.3 and later
    """
    return layout.ksm is not None


@page_check(
    "KSM-INDEX",
    Severity.ERROR,
    says="KSM remembers of each page that it merged the anonymous page offset of the VMA at its address.",
    relied_on="rmap_walk_ksm(), which looks for the page by it, mm/ksm.c",
    message="KSM looks for its page frame {pfn:#x} at {actual:#x} here, and should at {expected:#x} "
    "({delta:+d})",
    alike=lambda expected, actual: actual - expected,
    applies=_keeps_index,
)
def ksm_index(batch: PageBatch) -> PageViolations:
    """Rmap of a KSM page finds it where it was merged.

    Judged where KSM has an rmap_item for the page in this process (mm/ksm.c: stable_tree_append()). What a
    fork inherited has none until KSM comes by, and is found by its parent's.
    """
    found = batch.rmap_items.found
    if not found.any():
        return PageViolations.none(batch)
    expected, actual = batch.expected_index(), batch.rmap_items.linear_page_index
    return PageViolations(found & (expected != actual), expected, actual)


@page_check(
    "KSM-ANON-VMA",
    Severity.ERROR,
    says="The anon_vma that KSM remembers of a page that it merged is in the chain of the page's VMA.",
    relied_on="rmap_walk_ksm(), which looks for the VMA in its tree, mm/ksm.c",
    message="KSM looks for its page frame {pfn:#x} on anon_vma {actual:#x}, which is not one of the VMA's",
    alike=lambda expected, actual: actual,
    applies=_keeps_index,
)
def ksm_anon_vma(batch: PageBatch) -> PageViolations:
    """Rmap of a KSM page finds its VMA at all."""
    actual, found = batch.rmap_items.anon_vma, batch.rmap_items.found
    if not found.any():
        return PageViolations.none(batch)
    mask = batch.off_chain(found, actual, unfaulted=False)
    return PageViolations(mask, batch.of_vma(batch.table.anon_vma), actual)
