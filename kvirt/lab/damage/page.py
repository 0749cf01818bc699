# SPDX-License-Identifier: GPL-2.0-only
"""Damage to folios."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvirt.errors import KvirtError
from kvirt.lab.damage.scene import (
    Damaged,
    Inapplicable,
    Page,
    Scene,
    anon_tail,
    damage,
    small_anon,
    small_file,
    vma_range,
)
from kvirt.mm.folio import FOLIO_MAPPING_ANON, read_folios
from kvirt.mm.vma import displacement, vma_is_pure_anon
from kvirt.scheme import Scheme


def _index(scene: Scene, page: Page, index: int, description: str) -> Damaged:
    """Give the folio of a page another index."""
    k = page.pfn - page.head
    scene.set_page(page.head, "index", index)
    return Damaged("FOLIO-INDEX", description, vma_range(page.vma), page.address, expected=page.index + k)


@damage("FOLIO-INDEX")
def _folio_index(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    return _index(
        scene,
        page,
        page.index + 1,
        f"the folio at {page.address:#x} (page frame {page.pfn:#x}) is indexed {page.index + 1:#x} "
        f"instead of {page.index:#x}",
    )


@damage("FOLIO-INDEX/huge")
def _folio_index_huge(scene: Scene) -> Damaged:
    page = scene.huge_page()
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the huge folio at {page.address:#x} is indexed {page.index + 1:#x} instead of {page.index:#x}",
        vma_range(page.vma),
        page.address,
        expected=page.index,
        pages=512,
    )


@damage("FOLIO-INDEX/hugetlb")
def _folio_index_hugetlb(scene: Scene) -> Damaged:
    page = scene.page("hugetlb page", lambda v: v.flag("HUGETLB"), lambda pfn, f: f.is_anon(), level=1)
    # What the kernel stored before 6.7, or after it where it counts huge pages still.
    units = page.index >> 9 if scene.layout.hugetlb_index_in_pages else page.index << 9
    scene.set_page(page.pfn, "index", units or 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the hugetlb folio at {page.address:#x} is indexed in units of another size",
        vma_range(page.vma),
        page.address,
        expected=page.index,
        pages=512,
    )


@damage("FOLIO-INDEX/large")
def _folio_index_large(scene: Scene) -> Damaged:
    page = scene.page("large folio mapped page by page", of=anon_tail)
    mapped = list(scene.pages(lambda v: v.address == page.vma.address, lambda pfn, f: f.head == page.head))
    scene.set_page(page.head, "index", page.index - 1)
    first = mapped[0]
    return Damaged(
        "FOLIO-INDEX",
        f"the large folio at {first.address:#x}, mapped page by page, is indexed {page.index - 1:#x} "
        f"instead of {page.index:#x}",
        vma_range(page.vma),
        first.address,
        expected=page.index + first.pfn - page.head,
        pages=len(mapped),
    )


@damage("FOLIO-INDEX/file-offset")
def _folio_index_file(scene: Scene) -> Damaged:
    if scene.layout.scheme is Scheme.LEGACY:
        raise Inapplicable(
            "This kernel indexes anonymous folios of files by the file offset, and is right to."
        )
    page = scene.page(
        "small page in a faulted VMA of a file",
        lambda v: v.vm_file != 0 and v.vm_ops != 0 and v.vm_pgoff != v.anon_pgoff,
    )
    return _index(
        scene,
        page,
        page.index - page.vma.anon_pgoff + page.vma.vm_pgoff,
        f"the folio at {page.address:#x} is indexed by its file offset, as before the series",
    )


@damage("FOLIO-INDEX/displacement")
def _folio_index_displacement(scene: Scene) -> Damaged:
    page = scene.page(
        "small page in a displaced anonymous VMA",
        lambda v: vma_is_pure_anon(v) and displacement(v) != 0 and not v.flag("GROWSDOWN"),
        lambda pfn, f: f.is_anon() & ~f.large,
    )
    return _index(
        scene,
        page,
        page.address >> scene.layout.page_shift,
        f"the folio at {page.address:#x} is indexed by its address, though its VMA was moved",
    )


@damage("FOLIO-INDEX/hi")
def _folio_index_hi(scene: Scene) -> Damaged:
    if scene.layout.scheme is Scheme.LEGACY:
        raise Inapplicable("This kernel has one page offset only, of one piece.")
    page = scene.page("small page in a faulted VMA of a file", lambda v: v.vm_file != 0)
    vma = page.vma
    pages = list(scene.pages(lambda v: v.address == vma.address, lambda pfn, f: f.is_anon()))
    scene.set_vma(vma, "anon_pgoff_hi", (vma.anon_pgoff >> 32) ^ 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the upper half of the anonymous offset at {vma.vm_start:#x} has a wrong bit",
        vma_range(vma),
        pages[0].address,
        expected=pages[0].index + pages[0].pfn - pages[0].head ^ 1 << 32,
        pages=len(pages),
        also=frozenset({"ANON-VMA-TREE-KEY", "AVC-TREE-SUBTREE-LAST"}),
    )


def _on(scene: Scene, page: Page, anon_vma: int, description: str, pages: int = 1) -> Damaged:
    """Put the folio of a page on another anon_vma."""
    scene.set_page(page.head, "mapping", anon_vma | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        description,
        vma_range(page.vma),
        page.address,
        pages=pages,
        expected=page.vma.anon_vma,
    )


@damage("FOLIO-ANON-VMA")
def _folio_anon_vma(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    return _on(
        scene,
        page,
        scene.foreign_root(page.vma),
        f"the folio at {page.address:#x} is on an anon_vma of another VMA",
    )


@damage("FOLIO-ANON-VMA/huge")
def _folio_anon_vma_huge(scene: Scene) -> Damaged:
    page = scene.huge_page()
    return _on(
        scene,
        page,
        scene.foreign_root(page.vma),
        f"the huge folio at {page.address:#x} is on an anon_vma of another VMA",
        512,
    )


@damage("FOLIO-ANON-VMA/sibling")
def _folio_anon_vma_sibling(scene: Scene) -> Damaged:
    for page in scene.pages(lambda v: True, lambda pfn, f: f.is_anon() & ~f.large):
        sibling = scene.descendant(page.vma)
        if sibling is not None:
            return _on(
                scene,
                page,
                sibling,
                f"the folio at {page.address:#x} is on a forked child's anon_vma, which has the same root",
            )
    raise KvirtError("The process has no child with anon_vmas of its own: choose another one.")


@damage("FOLIO-ANON-VMA/dead")
def _folio_anon_vma_dead(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    dead = scene.foreign_root(page.vma)
    scene.set_anon_vma(dead, "refcount", 0)
    scene.set_anon_vma(dead, "rb_root", 0)
    made = _on(scene, page, dead, f"the folio at {page.address:#x} is on an anon_vma that was freed")
    # Those whose anon_vma it was have lost it.
    return replace(
        made, also=frozenset({"ANON-VMA-CHILDREN", "ANON-VMA-REF", "AVC-IN-TREE", "FOLIO-RMAP-REACH"})
    )


@damage("ANON-FOLIO-IN-NONCOW")
def _anon_folio_in_noncow(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_vma(page.vma, "vm_flags", page.vma.vm_flags | scene.layout.vm["SHARED"])
    return Damaged(
        "ANON-FOLIO-IN-NONCOW",
        f"the VMA at {page.vma.vm_start:#x} with anonymous pages is shared",
        vma_range(page.vma),
        also=frozenset({"ANONVMA-IN-NONCOW"}),
    )


@damage("FOLIO-TAIL")
def _folio_tail(scene: Scene) -> Damaged:
    stranger = scene.page("small anonymous page").head
    for page in scene.pages(lambda v: True, anon_tail):
        value = _leading_to(scene, page, stranger)
        if value is not None:
            scene.set_page(page.pfn, "compound", value)
            return Damaged(
                "FOLIO-TAIL",
                f"the page at {page.address:#x} of a large folio claims to be one of another folio",
                vma_range(page.vma),
                page.address,
                pages=1,
            )
    raise KvirtError("The process has no large folio that this damage can be done to: choose another one.")


def _leading_to(scene: Scene, page: Page, stranger: int) -> int | None:
    """What a tail page holds that leads to another folio, *stranger* if that can be."""
    if not scene.layout.compound_mask:
        return scene.page_address(stranger) | 1
    for order in range(10, 14):
        mask = ~((scene.layout.page.size << order) - 1)
        if scene.page_address(page.pfn) & mask not in (scene.page_address(page.head), scene.layout.vmemmap):
            return mask & ((1 << 64) - 1) | 1
    return None


@damage("FILE-INDEX")
def _file_index(scene: Scene) -> Damaged:
    page = scene.page("small page of a file, mapped once", of=small_file)
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FILE-INDEX",
        f"the page of a file at {page.address:#x} is indexed {page.index + 1:#x} instead of {page.index:#x}",
        vma_range(page.vma),
        page.address,
        expected=page.index,
    )


@damage("FOLIO-EXCL")
def _folio_exclusive(scene: Scene) -> Damaged:
    exclusive = np.uint64(scene.layout.pg_anon_exclusive)
    page = scene.page(
        "small exclusive page", of=lambda pfn, f: small_anon(pfn, f) & ((f.flags & exclusive) != 0)
    )
    # The stored count is one less than the number of mappings.
    scene.set_page(page.pfn, "mapcount", 1)
    return Damaged(
        "FOLIO-EXCL",
        f"the page at {page.address:#x} is marked exclusive and counts another mapping",
        vma_range(page.vma),
        page.address,
        expected=1,
    )


def _shared(scene: Scene, page: Page, pages: int) -> Damaged:
    """Mark a page exclusive that several entries map."""
    scene.set_page(page.pfn, "flags", page.flags | scene.layout.pg_anon_exclusive)
    return Damaged(
        "FOLIO-EXCL",
        f"the page at {page.address:#x} is marked exclusive, though a fork has shared it",
        vma_range(page.vma),
        page.address,
        expected=1,
        pages=pages,
    )


@damage("FOLIO-EXCL/tail")
def _folio_exclusive_tail(scene: Scene) -> Damaged:
    page = scene.page(
        "shared page of a large folio that is mapped page by page",
        of=lambda pfn, f: anon_tail(pfn, f) & (f.page_mapcount > 1),
    )
    return _shared(scene, page, 1)


@damage("FOLIO-EXCL/huge")
def _folio_exclusive_huge(scene: Scene) -> Damaged:
    page = scene.page("shared huge page", of=lambda pfn, f: f.is_anon() & (f.entire_mapcount > 1), level=1)
    return _shared(scene, page, 512)


def _miscounted(page: Page, found: int | None, pages: int = 1) -> Damaged:
    return Damaged(
        "FOLIO-MAPCOUNT",
        f"the folio at page frame {page.head:#x}, mapped at {page.address:#x}, counts one mapping too many",
        vma_range(page.vma),
        page.address,
        expected=found,
        pages=pages,
        also=frozenset({"FOLIO-EXCL"}),
    )


@damage("FOLIO-MAPCOUNT")
def _folio_mapcount(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    # The stored count is one less than the number of mappings.
    scene.set_page(page.head, "mapcount", 1)
    return _miscounted(page, 1)


@damage("FOLIO-MAPCOUNT/huge")
def _folio_mapcount_huge(scene: Scene) -> Damaged:
    if "large_mapcount" not in scene.layout.large_counts:
        raise Inapplicable("This kernel does not count all mappings of a large folio in one place.")
    page = scene.huge_page()
    count = int(
        read_folios(scene.prog, scene.layout, np.array([page.pfn], dtype=np.uint64)).large_mapcount[0]
    )
    scene.set_large(page.head, "large_mapcount", count)
    return replace(_miscounted(page, count, 512), spread=True)


@damage("FOLIO-MAPCOUNT/shared")
def _folio_mapcount_shared(scene: Scene) -> Damaged:
    page = scene.page(
        "small page that a fork shares", of=lambda pfn, f: f.is_anon() & ~f.large & (f.page_mapcount > 1)
    )
    scene.set_page(page.head, "mapcount", 0)
    return Damaged(
        "FOLIO-MAPCOUNT",
        f"the folio at page frame {page.head:#x}, mapped at {page.address:#x} and by others, counts one",
        also=frozenset({"FOLIO-EXCL"}),
        # Met in the first process; in each that has it besides, it is one too many.
        spread=True,
    )
