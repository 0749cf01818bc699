# SPDX-License-Identifier: GPL-2.0-only
"""Damage to what is in swap, to pages that entries only stand for, and to what KSM remembers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvirt.errors import KvirtError
from kvirt.findings import Severity
from kvirt.lab.damage.scene import Damaged, Page, Scene, damage, vma_range
from kvirt.layout import KsmLayout
from kvirt.mm.folio import FOLIO_MAPPING_ANON, Folios, read_folios
from kvirt.mm.ksm import Ksm
from kvirt.mm.pagetable import (
    U64,
    Leaves,
    WalkTroubles,
    absent_entry,
    for_each_leaf,
    leaf_pfn,
    leaf_present,
    leaf_special,
    swap_offset,
    swap_type,
)
from kvirt.mm.swap import SwapCache
from kvirt.mm.vma import Vma


def _small_leaves(scene: Scene) -> Iterator[Leaves]:
    for leaves in for_each_leaf(scene.prog, scene.layout, scene.space.pgd, WalkTroubles()):
        if leaves.level == 0:
            yield leaves


def _covering(scene: Scene, address: int) -> Vma | None:
    return next((v for v in scene.vmas() if v.vm_start <= address < v.vm_end), None)


def _swap_entries(scene: Scene) -> Iterator[Leaves]:
    is_swap = np.array([name == "swap" for name in scene.layout.swap_types.names])
    for leaves in _small_leaves(scene):
        yield leaves.take(~leaf_present(leaves) & is_swap[swap_type(leaves)])


def _cached(scene: Scene, *, large: bool) -> tuple[Page, int]:
    """The first page that has an entry of swap and an anonymous folio in the swap cache, and how many."""
    cache = SwapCache(scene.prog, scene.layout)
    for leaves in _swap_entries(scene):
        heads, _ = cache.lookup(swap_type(leaves).astype(np.uint64), swap_offset(leaves))
        folios = read_folios(scene.prog, scene.layout, heads)
        for i in np.flatnonzero((heads != 0) & folios.is_anon() & (folios.large == large)).tolist():
            if (vma := _covering(scene, int(leaves.address[i]))) is not None:
                page = Page(
                    vma,
                    int(leaves.address[i]),
                    int(heads[i]),
                    int(heads[i]),
                    int(folios.index[i]),
                    int(folios.mapping[i]),
                    int(folios.flags[i]),
                )
                return page, int((heads == heads[i]).sum())
    size = "large" if large else "small"
    raise KvirtError(f"The process has no {size} folio in the swap cache, which this damage needs.")


@damage("SWAPCACHE-INDEX")
def _swapcache_index(scene: Scene) -> Damaged:
    page, _ = _cached(scene, large=False)
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "SWAPCACHE-INDEX",
        f"the folio in the swap cache for {page.address:#x} is indexed {page.index + 1:#x}, which a fault "
        "would put right by a copy",
        vma_range(page.vma),
        page.address,
        severity=Severity.INFO,
    )


@damage("SWAPCACHE-INDEX/large")
def _swapcache_index_large(scene: Scene) -> Damaged:
    page, pages = _cached(scene, large=True)
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "SWAPCACHE-INDEX",
        f"the large folio in the swap cache for {page.address:#x} is indexed {page.index + 1:#x}",
        vma_range(page.vma),
        page.address,
        pages=pages,
    )


def _unfault(scene: Scene, vma: Vma) -> None:
    head = vma.address + scene.layout.vma.offset("chain_next")
    scene.set_vma(vma, "anon_vma", 0)
    scene.set_vma(vma, "chain_next", head)
    scene.set_vma(vma, "chain_prev", head)


@damage("SWAP-ENTRY-FAULTED")
def _swap_entry_faulted(scene: Scene) -> Damaged:
    for leaves in _swap_entries(scene):
        for address in leaves.address.tolist():
            vma = _covering(scene, address)
            # In place, and all of it in swap: nothing else is wrong without an anon_vma.
            if (
                vma is not None
                and vma.anon_pgoff == vma.vm_start >> scene.layout.page_shift
                and not _present(scene, vma)
            ):
                _unfault(scene, vma)
                return Damaged(
                    "SWAP-ENTRY-FAULTED",
                    f"the VMA at {vma.vm_start:#x} has pages in swap and no anon_vma",
                    vma_range(vma),
                    address,
                    pages=int(((leaves.address >= vma.vm_start) & (leaves.address < vma.vm_end)).sum()),
                )
    raise KvirtError("The process has no VMA that is in swap with all its pages: choose another one.")


def _present(scene: Scene, vma: Vma) -> bool:
    addresses = np.arange(vma.vm_start, vma.vm_end, scene.layout.page_size, dtype=np.uint64)
    walk = for_each_leaf(scene.prog, scene.layout, scene.space.pgd, WalkTroubles(), addresses)
    return any(bool(leaf_present(leaves).any()) for leaves in walk)


@damage("SWAP-ENTRY-FAULTED/migration")
def _migrating_in_unfaulted(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    for leaves in _small_leaves(scene):
        leaves = leaves.take(leaf_present(leaves) & ~leaf_special(leaves))
        for address in leaves.address.tolist():
            vma = _covering(scene, address)
            if vma is not None and not vma.anon_vma and vma.vm_file and not vma.flag("SHARED"):
                scene.set_entry(address, 0, _stand_in(scene, "migration", page.pfn))
                return Damaged(
                    "SWAP-ENTRY-FAULTED",
                    f"an anonymous page is migrating at {address:#x}, in a VMA without anon_vma",
                    vma_range(vma),
                    address,
                    also=frozenset({"FOLIO-INDEX", "FOLIO-ANON-VMA"}),
                )
    raise KvirtError("The process maps no file without an anon_vma: choose another one.")


def _stand_in(scene: Scene, kind: str, pfn: int) -> int:
    names = scene.layout.swap_types.names
    if kind not in names:
        raise KvirtError(f"This kernel has no {kind} pages.")
    return absent_entry(scene.layout.pgtable, names.index(kind), pfn)


def _in_its_place(scene: Scene, kind: str, page: Page, level: int, pages: int) -> Damaged:
    """Have an entry stand for a page, and the page wrongly indexed."""
    scene.set_entry(page.address, level, _stand_in(scene, kind, page.pfn))
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the folio that a {kind} entry stands for at {page.address:#x} is indexed {page.index + 1:#x} "
        f"instead of {page.index:#x}",
        vma_range(page.vma),
        page.address,
        pages=pages,
    )


@damage("FOLIO-INDEX/migration")
def _migration(scene: Scene) -> Damaged:
    return _in_its_place(scene, "migration", scene.page("small anonymous page"), 0, 1)


@damage("FOLIO-INDEX/migration-huge")
def _migration_huge(scene: Scene) -> Damaged:
    return _in_its_place(scene, "migration", scene.huge_page(), 1, 512)


@damage("FOLIO-INDEX/device-private")
def _device_private(scene: Scene) -> Damaged:
    return _in_its_place(scene, "device-private", scene.page("small anonymous page"), 0, 1)


@damage("FOLIO-INDEX/device-exclusive")
def _device_exclusive(scene: Scene) -> Damaged:
    return _in_its_place(scene, "device-exclusive", scene.page("small anonymous page"), 0, 1)


@damage("FOLIO-ANON-VMA/migration")
def _migration_anon_vma(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_entry(page.address, 0, _stand_in(scene, "migration", page.pfn))
    scene.set_page(page.pfn, "mapping", scene.foreign_root(page.vma) | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        f"the folio that is migrating at {page.address:#x} is on an anon_vma of another VMA",
        vma_range(page.vma),
        page.address,
    )


def _merged(scene: Scene, *, file: bool) -> tuple[KsmLayout, Vma, int, int, int]:
    """The first page that KSM merged: its VMA, its address, its rmap_item, and the index kept there."""
    how = scene.layout.ksm
    assert how is not None
    ksm = Ksm(scene.prog, scene.layout, scene.space.address)
    for leaves in _small_leaves(scene):
        leaves = leaves.take(leaf_present(leaves) & ~leaf_special(leaves))
        pfns: U64 = leaf_pfn(leaves)
        folios: Folios = read_folios(scene.prog, scene.layout, pfns)
        items = ksm.rmap_items(leaves.address, pfns, folios)
        for i in np.flatnonzero(items.found).tolist():
            vma = _covering(scene, int(leaves.address[i]))
            if vma is not None and bool(vma.vm_file) == file:
                return (
                    how,
                    vma,
                    int(leaves.address[i]),
                    int(items.address[i]),
                    int(items.linear_page_index[i]),
                )
    raise KvirtError("KSM has merged nothing of the process, which this damage needs: choose another one.")


@damage("KSM-INDEX")
def _ksm_index(scene: Scene) -> Damaged:
    how, vma, address, item, index = _merged(scene, file=False)
    scene.set_member(how.rmap_item, item, "linear_page_index", index + 1)
    return Damaged(
        "KSM-INDEX",
        f"KSM remembers the index {index + 1:#x} of its page at {address:#x} instead of {index:#x}",
        vma_range(vma),
        address,
    )


@damage("KSM-INDEX/file-offset")
def _ksm_index_file(scene: Scene) -> Damaged:
    how, vma, address, item, index = _merged(scene, file=True)
    scene.set_member(how.rmap_item, item, "linear_page_index", index - vma.anon_pgoff + vma.vm_pgoff)
    return Damaged(
        "KSM-INDEX",
        f"KSM remembers the file offset of its page at {address:#x} as the index",
        vma_range(vma),
        address,
    )


@damage("KSM-ANON-VMA")
def _ksm_anon_vma(scene: Scene) -> Damaged:
    how, vma, address, item, _ = _merged(scene, file=False)
    scene.set_member(how.rmap_item, item, "anon_vma", scene.foreign_root(vma))
    return Damaged(
        "KSM-ANON-VMA",
        f"KSM remembers an anon_vma of another VMA for its page at {address:#x}",
        vma_range(vma),
        address,
    )
