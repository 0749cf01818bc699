# SPDX-License-Identifier: GPL-2.0-only
"""Damage to VMAs and their tree."""

from __future__ import annotations

from kvirt.lab.damage.scene import Damaged, Scene, damage, is_faulted, vma_range
from kvirt.mm.vma import displacement, vma_is_cow_mapping, vma_is_pure_anon


@damage("VMA-TREE")
def _vma_tree(scene: Scene) -> Damaged:
    vma = scene.vma(
        "unfaulted VMA of two pages or more",
        lambda v: not v.anon_vma and v.vm_end - v.vm_start > scene.layout.page_size,
    )
    scene.set_vma(vma, "vm_end", vma.vm_end - scene.layout.page_size)
    return Damaged(
        "VMA-TREE", f"vm_end of the VMA at {vma.vm_start:#x} is a page too low", None, vma.vm_start
    )


@damage("VMA-TREE/map_count")
def _map_count(scene: Scene) -> Damaged:
    scene.set_mm("map_count", scene.space.map_count + 1)
    return Damaged("VMA-TREE", "mm->map_count is one too high")


@damage("VMA-TREE/vm_mm")
def _vm_mm(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA", lambda v: not v.anon_vma)
    scene.set_vma(vma, "vm_mm", scene.prog["init_mm"].address_ or 0)
    return Damaged("VMA-TREE", f"the VMA at {vma.vm_start:#x} claims another mm", None, vma.vm_start)


@damage("VMA-TREE/start")
def _start(scene: Scene) -> Damaged:
    vma = scene.vma(
        "unfaulted VMA of two pages or more",
        lambda v: not v.anon_vma and v.vm_end - v.vm_start > scene.layout.page_size,
    )
    scene.set_vma(vma, "vm_start", vma.vm_start + scene.layout.page_size)
    return Damaged(
        "VMA-TREE",
        f"vm_start of the VMA at {vma.vm_start:#x} is a page too high",
        None,
        vma.vm_start,
        also=frozenset({"VMA-UNFAULTED-PGOFF", "LEG-UNFAULTED-PGOFF", "FILE-INDEX"}),
        expected=vma.vm_start,
    )


@damage("VMA-TREE/impossible")
def _impossible(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA", lambda v: not v.anon_vma)
    scene.set_vma(vma, "vm_end", vma.vm_start)
    return Damaged(
        "VMA-TREE",
        f"the VMA at {vma.vm_start:#x} ends where it starts",
        None,
        vma.vm_start,
        # Its last file offset went with its end.
        also=frozenset({"FILE-TREE-LAST"}),
    )


@damage("VMA-UNFAULTED-PGOFF")
def _unfaulted(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA of a file", lambda v: not v.anon_vma and v.vm_file != 0)
    scene.set_index_base(vma, vma.anon_pgoff + 1)
    return Damaged(
        "VMA-UNFAULTED-PGOFF", f"the anonymous offset at {vma.vm_start:#x} is one too high", vma_range(vma)
    )


@damage("VMA-UNFAULTED-PGOFF/hi")
def _unfaulted_hi(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA of a file", lambda v: not v.anon_vma and v.vm_file != 0)
    scene.set_vma(vma, "anon_pgoff_hi", (vma.anon_pgoff >> 32) ^ 1)
    return Damaged(
        "VMA-UNFAULTED-PGOFF",
        f"the upper half of the anonymous offset at {vma.vm_start:#x} has a wrong bit",
        vma_range(vma),
    )


@damage("LEG-UNFAULTED-PGOFF")
def _legacy_unfaulted(scene: Scene) -> Damaged:
    vma = scene.vma(
        "unfaulted anonymous VMA in place",
        lambda v: not v.anon_vma and vma_is_pure_anon(v) and displacement(v) == 0,
    )
    scene.set_vma(vma, "vm_pgoff", vma.vm_pgoff + 1)
    return Damaged("LEG-UNFAULTED-PGOFF", f"vm_pgoff at {vma.vm_start:#x} is one too high", vma_range(vma))


@damage("VMA-PURE-ANON-PGOFF")
def _pure(scene: Scene) -> Damaged:
    vma = scene.vma("faulted anonymous VMA", lambda v: is_faulted(v) and vma_is_pure_anon(v))
    scene.set_vma(vma, "vm_pgoff", vma.vm_pgoff + 1)
    return Damaged("VMA-PURE-ANON-PGOFF", f"vm_pgoff at {vma.vm_start:#x} is one too high", vma_range(vma))


@damage("VMA-NO-WRAP")
def _no_wrap(scene: Scene) -> Damaged:
    vma = scene.page(
        "small page in a faulted VMA of a file", lambda v: v.vm_file != 0 and vma_is_cow_mapping(v)
    ).vma
    scene.set_vma(vma, "anon_pgoff_hi", 0xFFFFFFFF)
    return Damaged(
        "VMA-NO-WRAP",
        f"the upper half of the anonymous offset at {vma.vm_start:#x} has all bits set",
        vma_range(vma),
        also=frozenset({"FOLIO-INDEX", "ANON-VMA-TREE-KEY", "AVC-TREE-SUBTREE-LAST", "FOLIO-RMAP-REACH"}),
    )


@damage("ANONVMA-IN-NONCOW")
def _anon_vma_in_noncow(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    scene.set_vma(vma, "vm_flags", vma.vm_flags & ~scene.layout.vm["MAYWRITE"])
    return Damaged(
        "ANONVMA-IN-NONCOW",
        f"the faulted VMA at {vma.vm_start:#x} may never be written",
        vma_range(vma),
        also=frozenset({"ANON-FOLIO-IN-NONCOW"}),
    )


@damage("HUGETLB-ALIGN")
def _hugetlb_align(scene: Scene) -> Damaged:
    vma = scene.vma("hugetlb VMA", lambda v: v.flag("HUGETLB"))
    scene.set_vma(vma, "vm_pgoff", vma.vm_pgoff + 1)
    return Damaged(
        "HUGETLB-ALIGN",
        f"vm_pgoff of the hugetlb VMA at {vma.vm_start:#x} is one page too high",
        vma_range(vma),
        expected=vma.vm_pgoff,
        # What its pages are found to be by that offset, and its places in the trees.
        also=frozenset(
            {
                "FOLIO-INDEX",
                "FILE-INDEX",
                "ANON-VMA-TREE-KEY",
                "AVC-TREE-SUBTREE-LAST",
                "FILE-TREE-KEY",
                "FILE-TREE-LAST",
                "FOLIO-RMAP-REACH",
            }
        ),
    )
