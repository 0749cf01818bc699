# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of the trees by which the mappings of a file are found."""

from __future__ import annotations

from collections.abc import Sequence

from kvirt.checks.registry import VmaContext, VmaViolations, vma_check
from kvirt.findings import Severity
from kvirt.mm.columns import Columns
from kvirt.mm.i_mmap import FilePlace
from kvirt.mm.pagetable import Bool


def _transient(place: FilePlace) -> Severity | None:
    return Severity.TRANSIENT if place.locked else None


def _mapped(columns: Columns) -> Bool:
    mapped: Bool = columns.vmas["vm_file"] != 0
    return mapped


@vma_check(
    "FILE-TREE-IN",
    Severity.ERROR,
    says="Every VMA that maps a file is in the tree of the file's mappings.",
    relied_on="rmap_walk_file() and unmap_mapping_range(), which find VMAs by this tree alone, mm/rmap.c",
    glance=_mapped,
)
def file_tree_in(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Nobody unmaps or writes back without knowing of this VMA."""
    for context in contexts:
        place = context.file_place
        if place is not None and place.lost is not None:
            yield context.violation(
                f"the VMA is not in the tree of its file's mappings: {place.lost}",
                severity=_transient(place),
            )


@vma_check(
    "FILE-TREE-KEY",
    Severity.ERROR,
    says="The VMAs in the tree of a file's mappings are in order of their file offsets, linked both ways, "
    "and rb_leftmost is the first of them.",
    relied_on="mapping_rmap_tree_iter_first(), mm/interval_tree.c",
    glance=_mapped,
)
def file_tree_key(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Sorted. Equal offsets may be in any order."""
    for context in contexts:
        place, vma = context.file_place, context.vma
        if place is None or place.lost is not None or place.root is None:
            continue
        if place.stray is not None:
            yield context.violation(
                "in the tree of its file's mappings the VMA has a child that is none of its own: "
                f"{place.stray}",
                severity=_transient(place),
            )
        if place.first and place.root.leftmost != vma.address:
            yield context.violation(
                "the VMA is the first in the tree of its file's mappings, and rb_leftmost is another",
                expected=vma.address,
                actual=place.root.leftmost,
                severity=_transient(place),
            )
        if place.before is not None and place.before > vma.vm_pgoff:
            yield context.violation(
                f"in the tree of the file's mappings a VMA at the offset {place.before:#x} comes "
                f"before this one at {vma.vm_pgoff:#x}",
                severity=_transient(place),
            )


@vma_check(
    "FILE-TREE-LAST",
    Severity.ERROR,
    says="Each VMA in the tree of a file's mappings knows the last file offset of all VMAs below it.",
    relied_on="INTERVAL_TREE_DEFINE(), which prunes by it, include/linux/interval_tree_generic.h",
    glance=_mapped,
)
def file_tree_last(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Nothing is pruned that is wanted, and no search goes astray."""
    for context in contexts:
        place = context.file_place
        if place is None or place.node is None or place.subtree_last is None:
            continue
        if place.node.subtree_last != place.subtree_last:
            yield context.violation(
                "rb_subtree_last of the VMA in the tree of its file's mappings is wrong",
                expected=place.subtree_last,
                actual=place.node.subtree_last,
                severity=_transient(place),
            )
