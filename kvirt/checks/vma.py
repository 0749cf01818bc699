# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of VMAs and of the tree that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvirt.checks.registry import Violation, VmaContext, VmaViolations, mm_check, vma_check
from kvirt.findings import Severity
from kvirt.layout import Layout
from kvirt.mm.address_space import AddressSpace
from kvirt.mm.columns import Columns
from kvirt.mm.pagetable import Bool
from kvirt.mm.vma import displacement, vma_is_cow_mapping, vma_is_pure_anon, vma_pages
from kvirt.scheme import Scheme


# What these say of themselves is what `kvirt checks` prints as the kernels of an invariant.
def _two_offsets(layout: Layout) -> bool:
    """two offsets

    Linux 7.3 and later
    """
    return layout.scheme is not Scheme.LEGACY


def _one_offset(layout: Layout) -> bool:
    """one offset

    before Linux 7.3
    """
    return layout.scheme is Scheme.LEGACY


def _ill_placed(columns: Columns) -> Bool:
    """Which VMAs are not where the maple tree has them. Columns are of VMAs of one mm."""
    start, end = columns.vmas["vm_start"], columns.vmas["vm_end"]
    ill: Bool = (start != columns.first) | (end - np.uint64(1) != columns.last) | (start >= end)
    ill |= (start | end) & np.uint64(columns.layout.page_size - 1) != 0
    return ill


@mm_check(
    "VMA-TREE",
    Severity.ERROR,
    says="Each entry of mm->mm_mt spans exactly its VMA, which belongs to this mm and is page-aligned, "
    "and there are mm->map_count of them.",
    relied_on="every look-up of a VMA; validate_mm(), mm/vma.c",
)
def vma_tree(space: AddressSpace) -> Iterator[Violation]:
    """The maple tree and the VMAs agree (mm/vma.c: validate_mm()).

    Also reported here: a tree that cannot be followed to its end.
    """
    if space.broken_tree is not None:
        yield Violation(f"mm->mm_mt cannot be followed to its end: {space.broken_tree}")
    page_mask = space.layout.page_size - 1
    columns = space.columns
    rows = range(len(space.entries)) if columns is None else np.flatnonzero(_ill_placed(columns)).tolist()
    for entry in (space.entries[row] for row in rows):
        vma = entry.vma
        where = f"the entry for {entry.first:#x}-{entry.last + 1:#x}"
        if vma.vm_mm != space.address:
            yield Violation(
                f"{where} holds a VMA of another mm",
                expected=space.address,
                actual=vma.vm_mm,
                address=entry.first,
            )
        elif vma.vm_start >= vma.vm_end or (vma.vm_start | vma.vm_end) & page_mask:
            yield Violation(
                f"{where} holds a VMA with the impossible range {vma.vm_start:#x}-{vma.vm_end:#x}",
                address=entry.first,
            )
        elif entry.first != vma.vm_start:
            yield Violation(
                f"{where} holds a VMA that starts elsewhere",
                expected=entry.first,
                actual=vma.vm_start,
                address=entry.first,
            )
        elif entry.last + 1 != vma.vm_end:
            yield Violation(
                f"{where} holds a VMA that ends elsewhere",
                expected=entry.last + 1,
                actual=vma.vm_end,
                address=entry.first,
            )
    if space.broken_tree is None and space.at is None and len(space.entries) != space.map_count:
        yield Violation(
            f"mm->map_count is {space.map_count}, and the tree holds {len(space.entries)} VMAs",
            expected=len(space.entries),
            actual=space.map_count,
        )


def _displaced(columns: Columns) -> Bool:
    """Which VMAs have no anon_vma, and are displaced."""
    shift = np.uint64(columns.layout.page_shift)
    displaced: Bool = (columns.anon_vma < 0) & (columns.anon_pgoff != columns.vmas["vm_start"] >> shift)
    return displaced


def _displaced_pure(columns: Columns) -> Bool:
    return _displaced(columns) & _pure(columns)


def _pure(columns: Columns) -> Bool:
    pure: Bool = (columns.vmas["vm_ops"] | columns.vmas["vm_file"]) == 0
    return pure


def _differs(columns: Columns) -> Bool:
    differs: Bool = _pure(columns) & (columns.anon_pgoff != columns.vmas["vm_pgoff"])
    return differs


def _wraps(columns: Columns) -> Bool:
    """Which VMAs reach beyond half of what is possible, as none does."""
    shift, size = np.uint64(columns.layout.page_shift), columns.vmas["vm_end"] - columns.vmas["vm_start"]
    half = np.uint64(1 << (63 - columns.layout.page_shift))
    wraps: Bool = (columns.anon_pgoff >= half) | (size >> shift >= half)
    return wraps


def _faulted_noncow(columns: Columns) -> Bool:
    vm = columns.layout.vm
    shared, maywrite = np.uint64(vm["SHARED"] | vm["MAYWRITE"]), np.uint64(vm["MAYWRITE"])
    noncow: Bool = (columns.anon_vma >= 0) & (columns.vmas["vm_flags"] & shared != maywrite)
    return noncow


def _hugetlb(columns: Columns) -> Bool:
    hugetlb: Bool = columns.vmas["vm_flags"] & np.uint64(columns.layout.vm["HUGETLB"]) != 0
    return hugetlb


@vma_check(
    "VMA-UNFAULTED-PGOFF",
    Severity.ERROR,
    says="A VMA without anon_vma has its address as anonymous page offset, whatever it maps.",
    relied_on="vma_merge and the coming look-up by folio->index; vma_set_range(), mm/vma.c",
    applies=_two_offsets,
    glance=_displaced,
)
def vma_unfaulted_pgoff(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Unfaulted is in place.

    A warning, not an error, where no file is mapped: a child of fork() is born so if its parent had
    faulted, moved and then marked the mapping MADV_WIPEONFORK (mm/mmap.c: dup_mmap()).
    """
    for context in contexts:
        vma = context.vma
        if vma.anon_vma == 0 and not context.chain.links and displacement(vma) != 0:
            yield context.violation(
                "no anonymous page was ever faulted in, and yet the anonymous offset is "
                f"{displacement(vma):+d} pages from the address",
                expected=vma.vm_start >> vma.layout.page_shift,
                actual=vma.anon_pgoff,
                severity=Severity.WARNING if vma.vm_file == 0 else None,
            )


@vma_check(
    "LEG-UNFAULTED-PGOFF",
    Severity.WARNING,
    says="An anonymous VMA without file and anon_vma has its address as page offset.",
    relied_on="assert_sane_pgoff(), mm/vma.h",
    # With two offsets VMA-UNFAULTED-PGOFF and VMA-PURE-ANON-PGOFF say the same, and more.
    applies=_one_offset,
    glance=_displaced_pure,
)
def leg_unfaulted_pgoff(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Unfaulted is in place, on kernels with one offset.

    For information only on kernels whose mremap(MREMAP_DONTUNMAP) leaves the emptied source as it was
    (6.12, mm/mremap.c).
    """
    for context in contexts:
        vma = context.vma
        if vma.anon_vma == 0 and not context.chain.links and vma_is_pure_anon(vma) and displacement(vma) != 0:
            yield context.violation(
                "no anonymous page was ever faulted in, and yet vm_pgoff is "
                f"{displacement(vma):+d} pages from the address",
                expected=vma.vm_start >> vma.layout.page_shift,
                actual=vma.vm_pgoff,
                severity=None if vma.layout.dontunmap_resets_pgoff else Severity.INFO,
            )


@vma_check(
    "VMA-PURE-ANON-PGOFF",
    Severity.ERROR,
    says="In an anonymous VMA without file both page offsets are the same, wherever it was moved.",
    relied_on="linear_anon_page_index(), include/linux/pagemap.h; can_vma_merge_*(), mm/vma.c",
    applies=_two_offsets,
    glance=_differs,
)
def vma_pure_anon_pgoff(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Both offsets of pure anonymous memory agree."""
    for context in contexts:
        vma = context.vma
        if vma.anon_pgoff != vma.vm_pgoff and vma_is_pure_anon(vma):
            yield context.violation(
                "vm_pgoff and the anonymous offset differ, though no file is mapped",
                expected=vma.vm_pgoff,
                actual=vma.anon_pgoff,
            )


@vma_check(
    "VMA-NO-WRAP",
    Severity.ERROR,
    says="The anonymous page offsets of a VMA neither wrap nor leave the address space.",
    relied_on="the anon_vma interval trees, mm/interval_tree.c",
    applies=_two_offsets,
    glance=_wraps,
)
def vma_no_wrap(contexts: Sequence[VmaContext]) -> VmaViolations:
    """The range of offsets is one that addresses can have."""
    for context in contexts:
        vma = context.vma
        pages, limit = vma_pages(vma), 1 << (64 - vma.layout.page_shift)
        if vma.anon_pgoff + pages > limit:
            yield context.violation(
                f"the anonymous offset and {pages} pages reach past the last possible offset",
                expected=limit - pages,
                actual=vma.anon_pgoff,
            )


@vma_check(
    "ANONVMA-IN-NONCOW",
    Severity.WARNING,
    says="A VMA in which nothing can be copied on write has no anon_vma.",
    relied_on="vma_anon_address(), mm/internal.h",
    glance=_faulted_noncow,
)
def anonvma_in_noncow(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Nothing to find by rmap, no anon_vma.

    A warning, not an error: UFFDIO_COPY prepares an anon_vma before it looks whether the mapping is one
    that it may fill (mm/userfaultfd.c).
    """
    for context in contexts:
        vma = context.vma
        if vma.anon_vma and not vma_is_cow_mapping(vma):
            yield context.violation(
                "the VMA has an anon_vma, though nothing in it can be copied on write",
                expected=0,
                actual=vma.anon_vma,
            )


@vma_check(
    "HUGETLB-ALIGN",
    Severity.ERROR,
    says="The page offsets of a hugetlb VMA are multiples of its huge page.",
    relied_on="hugetlb_linear_page_index(), include/linux/hugetlb.h",
    glance=_hugetlb,
)
def hugetlb_align(contexts: Sequence[VmaContext]) -> VmaViolations:
    """No huge page begins within another.

    Both offsets, where there are two.
    """
    for context in contexts:
        vma = context.vma
        if not vma.flag("HUGETLB"):
            continue
        file = context.space.file(vma)
        if file is None:
            continue
        pages = 1 << max(file.blkbits - vma.layout.page_shift, 0)
        offsets = {"vm_pgoff": vma.vm_pgoff}
        if vma.layout.scheme is not Scheme.LEGACY:
            offsets["the anonymous offset"] = vma.anon_pgoff
        for name, offset in offsets.items():
            if offset % pages:
                yield context.violation(
                    f"{name} is not a multiple of the {pages} pages of a huge page",
                    expected=offset - offset % pages,
                    actual=offset,
                )
