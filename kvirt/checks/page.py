# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of mapped pages."""

from __future__ import annotations

import numpy as np

from kvirt.checks.registry import PageBatch, PageViolations, page_check
from kvirt.findings import Severity
from kvirt.layout import Layout
from kvirt.mm.arrays import constant, each
from kvirt.mm.pagetable import Bool


@page_check(
    "FOLIO-INDEX",
    Severity.ERROR,
    says="The index of an anonymous folio is the anonymous page offset of the VMA at the page's address.",
    relied_on="rmap_walk_anon(), which would miss the page; __page_check_anon_rmap(), mm/rmap.c",
    message="page frame {pfn:#x} is indexed {actual:#x}, and should be {expected:#x} ({delta:+d})",
    alike=lambda expected, actual: actual - expected,
)
def folio_index(batch: PageBatch) -> PageViolations:
    """Every anonymous folio is where rmap looks for it.

    Judged too: pages that are migrating or that a device has. Not judged: KSM pages, which have no index,
    and the stack of an exec under way, which is moved with its old index. Kernels before 6.7 index hugetlb
    pages in huge pages, and are judged so.
    """
    expected, actual = batch.expected_index(), batch.index()
    wrong = expected != actual
    if not wrong.any():
        return PageViolations.none(batch)
    judged = batch.folios.is_anon() & ~batch.of_vma(batch.table.temporary_stack)
    return PageViolations(judged & wrong, expected, actual)


@page_check(
    "FOLIO-ANON-VMA",
    Severity.ERROR,
    says="The anon_vma of an anonymous folio is in the chain of the VMA that maps it.",
    relied_on="page_address_in_vma() and rmap_walk_anon(), mm/rmap.c",
    message="the folio at page frame {head:#x} is on anon_vma {actual:#x}, which is not one of the VMA's",
    alike=lambda expected, actual: actual,
)
def folio_anon_vma(batch: PageBatch) -> PageViolations:
    """Rmap of the folio finds this VMA at all."""
    actual = batch.folios.anon_vma()
    mask = batch.off_chain(batch.folios.is_anon(), actual, unfaulted=True)
    return PageViolations(mask, batch.of_vma(batch.table.anon_vma), actual)


@page_check(
    "ANON-FOLIO-IN-NONCOW",
    Severity.ERROR,
    says="Only VMAs that copy on write map anonymous or KSM folios.",
    relied_on="is_cow_mapping() and all that follows from it, include/linux/mm.h",
    message="an anonymous folio (page frame {pfn:#x}) is mapped where nothing can be copied on write",
    alike=lambda expected, actual: 0,
)
def anon_folio_in_noncow(batch: PageBatch) -> PageViolations:
    """No anonymous folio in a shared mapping."""
    cow = batch.of_vma(batch.table.cow)
    if cow.all():
        return PageViolations.none(batch)
    anonymous = batch.folios.is_anon() | batch.folios.is_ksm()
    zero = constant(np.uint64(0), len(batch.address))
    return PageViolations(anonymous & ~cow, zero, batch.folios.mapping)


@page_check(
    "FILE-INDEX",
    Severity.WARNING,
    says="The index of a folio of the mapped file is the VMA's file offset at the page's address.",
    relied_on="rmap_walk_file(), which would miss the page, mm/rmap.c",
    message="the file's page frame {pfn:#x} is indexed {actual:#x}, and should be {expected:#x} ({delta:+d})",
    alike=lambda expected, actual: actual - expected,
)
def file_index(batch: PageBatch) -> PageViolations:
    """Every page of a file is where rmap looks for it.

    A warning, because drivers map what they like. Not judged, and counted by reason: VM_PFNMAP and
    VM_MIXEDMAP mappings, storage that is mapped directly (DAX), pages of another file than the VMA's, and
    pages that are no file's any more (truncated).
    """
    file = batch.folios.is_file()
    if not file.any():
        return PageViolations.none(batch)
    expected, actual = batch.expected_file_index(), batch.index()
    return PageViolations(file & (expected != actual), expected, actual)


def _marks_exclusive(layout: Layout) -> bool:
    """exclusive mark

    PG_anon_exclusive, 5.19 and later
    """
    return layout.pg_anon_exclusive != 0


@page_check(
    "FOLIO-EXCL",
    Severity.WARNING,
    says="An anonymous page that is marked exclusive is mapped once.",
    relied_on="do_wp_page(), which would write to what another process reads, mm/memory.c",
    message="page frame {pfn:#x} is marked exclusive, and mapped {actual} times",
    alike=lambda expected, actual: actual,
    applies=_marks_exclusive,
)
def folio_exclusive(batch: PageBatch) -> PageViolations:
    """PG_anon_exclusive is true (include/linux/page-flags.h).

    What is mapped as a whole, a huge page, has the mark on its first page, for all of it. Kernels built
    with CONFIG_NO_PAGE_MAPCOUNT do not count the mappings of a large folio's single pages: there only small
    pages and whole folios are judged.
    """
    folios = batch.folios
    count = each(np.add, folios.page_mapcount, folios.entire_mapcount)
    counted: Bool = constant(np.bool_(True), len(count))
    if batch.level and "large_mapcount" in batch.layout.large_counts:
        count = folios.large_mapcount
    elif not batch.level and folios.large.any():
        counted = ~folios.large | (count > 0)
    several = each(lambda count: count != 1, count)
    if not several.any():
        return PageViolations.none(batch)
    once = constant(np.uint64(1), len(count))
    exclusive = folios.has(batch.layout.pg_anon_exclusive)
    bad = batch.present & folios.is_anon() & exclusive & counted & several
    return PageViolations(bad, once, each(lambda count: count.astype(np.uint64), count))


@page_check(
    "FOLIO-TAIL",
    Severity.ERROR,
    says="A page of a large folio lies within the folio that it leads to.",
    relied_on="page_folio(), include/linux/page-flags.h",
    message="page frame {pfn:#x} leads to the folio at page frame {head:#x}, which ends at {expected:#x}",
    alike=lambda expected, actual: expected,
)
def folio_tail(batch: PageBatch) -> PageViolations:
    """The way from a tail page to its head is right.

    What such a page's folio says of itself is not looked at, so nothing else is reported of the page.
    """
    folios = batch.folios
    if not folios.astray.any():
        return PageViolations.none(batch)
    last = folios.head + folios.nr_pages.astype(np.uint64) - np.uint64(1)
    return PageViolations(folios.astray, last, batch.pfn)
