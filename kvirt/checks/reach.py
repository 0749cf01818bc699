# SPDX-License-Identifier: GPL-2.0-only
"""Whether rmap, as the kernel walks it, comes from a folio to the page table entries that map it."""

from __future__ import annotations

import numpy as np

from kvirt.checks.registry import PageBatch, PageViolations, page_check
from kvirt.findings import Severity
from kvirt.mm.forest import AnonTree
from kvirt.mm.interval_tree import iter_intervals
from kvirt.mm.pagetable import U64, Bool


def _is_found(tree: AnonTree, vma: int, first: int, last: int) -> bool:
    """Whether ``rmap_walk_anon()`` calls back for a VMA (mm/rmap.c)."""
    found = iter_intervals(tree.nodes, tree.root, first, last)
    return any(tree.links[interval.address].vma == vma for interval in found)


def _points(tree: AnonTree) -> U64:
    """All offsets that a search compares with, sorted."""
    points = {value for n in tree.nodes.values() for value in (n.start, n.last, n.rb.subtree_last)}
    return np.array(sorted(points), dtype=np.uint64)


def _classes(points: U64, first: U64, last: U64) -> U64:
    """Numbers that are equal for folios of which every comparison in a search has the same result."""
    columns = [np.searchsorted(points, v, side) for v in (first, last) for side in ("left", "right")]
    _, where = np.unique(np.stack(columns), axis=1, return_inverse=True)
    return where.reshape(-1).astype(np.uint64)


@page_check(
    "FOLIO-RMAP-REACH",
    Severity.ERROR,
    says="The kernel's walk of an anonymous folio's reverse mapping finds every VMA that maps it.",
    relied_on="rmap_walk_anon(): reclaim, migration and compaction, mm/rmap.c",
    message="rmap of the folio at page frame {head:#x} (index {actual:#x}) does not find this mapping of it",
    alike=lambda expected, actual: 0,
    by_place=lambda table: bool(table.unsound),
)
def folio_rmap_reach(batch: PageBatch) -> PageViolations:
    """From the folio to its mapping.

    In a tree that keeps all invariants a search finds what is there, so it is tried in those that do not,
    with the kernel's own shortcuts. Not judged here: folios with a wrong index or anon_vma.
    """
    table, folios = batch.table, batch.folios
    if not table.unsound:
        return PageViolations.none(batch)
    mask: Bool = np.zeros(len(batch.row), dtype=bool)
    expected, index = batch.expected_index(), batch.index()
    unsound = np.fromiter(table.unsound, dtype=np.uint64)
    anon_vma = folios.anon_vma()
    judged = folios.is_anon() & np.isin(anon_vma, unsound) & (expected == index)
    where = np.flatnonzero(judged & ~table.temporary_stack[batch.row])
    # Thousands of VMAs may share one tree: folios are sorted once, and so are the points of each tree.
    where = where[np.lexsort((anon_vma[where], batch.row[where]))]
    row_changes = np.diff(batch.row[where]) != 0
    groups = np.flatnonzero(row_changes | (np.diff(anon_vma[where]) != 0)) + 1
    points: dict[int, U64] = {}
    for at in np.split(where, groups) if len(where) else ():
        vma, address = table.vmas[int(batch.row[at[0]])], int(anon_vma[at[0]])
        tree = table.unsound[address]
        if address not in table.space.chain(vma).anon_vmas():
            continue
        if address not in points:
            points[address] = _points(tree)
        first = folios.index[at]
        last = first + folios.nr_pages[at].astype(np.uint64) - np.uint64(1)
        number = _classes(points[address], first, last)
        for one, example in zip(*np.unique(number, return_index=True), strict=True):
            if not _is_found(tree, vma.address, int(first[example]), int(last[example])):
                mask[at[number == one]] = True
    return PageViolations(mask, expected, index)
