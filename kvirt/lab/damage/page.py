# SPDX-License-Identifier: GPL-2.0-only
"""Damage to folios."""

from __future__ import annotations

from kvirt.lab.damage.scene import Damaged, Scene, damage, vma_range
from kvirt.mm.folio import FOLIO_MAPPING_ANON


@damage("FOLIO-INDEX")
def _folio_index(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the folio at {page.address:#x} (page frame {page.pfn:#x}) is indexed {page.index + 1:#x} "
        f"instead of {page.index:#x}",
        vma_range(page.vma),
        page.address,
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
        pages=512,
    )


@damage("FOLIO-ANON-VMA/huge")
def _folio_anon_vma_huge(scene: Scene) -> Damaged:
    page = scene.huge_page()
    scene.set_page(page.pfn, "mapping", scene.foreign_root(page.vma) | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        f"the huge folio at {page.address:#x} is on an anon_vma of another VMA",
        vma_range(page.vma),
        page.address,
        pages=512,
    )


@damage("FOLIO-INDEX/file-offset")
def _folio_index_file(scene: Scene) -> Damaged:
    page = scene.page(
        "small page in a faulted VMA of a file",
        lambda v: v.vm_file != 0 and v.vm_ops != 0 and v.vm_pgoff != v.anon_pgoff,
    )
    index = page.index - page.vma.anon_pgoff + page.vma.vm_pgoff
    scene.set_page(page.pfn, "index", index)
    return Damaged(
        "FOLIO-INDEX",
        f"the folio at {page.address:#x} is indexed by its file offset, as before the series",
        vma_range(page.vma),
        page.address,
    )


@damage("FOLIO-ANON-VMA")
def _folio_anon_vma(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_page(page.pfn, "mapping", scene.foreign_root(page.vma) | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        f"the folio at {page.address:#x} is on an anon_vma of another VMA",
        vma_range(page.vma),
        page.address,
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
