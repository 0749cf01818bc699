# SPDX-License-Identifier: GPL-2.0-only
"""Damage for every invariant, laid over a dump: shows that a check finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import drgn
import numpy as np

from kvirt.errors import KvirtError
from kvirt.lab.overlay import Overlay
from kvirt.layout import Layout, Scheme, layout_of
from kvirt.mm.address_space import AddressSpace, read_address_space
from kvirt.mm.folio import FOLIO_MAPPING_ANON, read_folios
from kvirt.mm.pagetable import WalkTroubles, for_each_leaf, leaf_pfn, leaf_present, leaf_special
from kvirt.mm.vma import Vma, displacement, vma_is_cow_mapping, vma_is_pure_anon


@dataclass(frozen=True, slots=True)
class Damaged:
    """What was made up, and what must be found for it."""

    id: str
    description: str
    """The made-up state, as a sentence."""
    vma: tuple[int, int] | None = None
    """Range of the VMA that the finding must name."""
    address: int | None = None
    """Address of the page that the finding must name."""
    also: frozenset[str] = field(default_factory=frozenset)
    """Invariants that are broken by the same damage."""


@dataclass(frozen=True, slots=True)
class Page:
    """A small anonymous page that only one process maps."""

    vma: Vma
    address: int
    pfn: int
    index: int
    mapping: int


class Scene:
    """A process in a dump, and the means to damage it."""

    def __init__(self, prog: drgn.Program, mm: int, at: int | None = None) -> None:
        """Look at a process.

        :param mm: address of its ``struct mm_struct``
        :param at: if given, the VMA that covers this address is the one to damage
        """
        self.prog = prog
        self.layout: Layout = layout_of(prog)
        self.overlay = Overlay(prog)
        self.space: AddressSpace = read_address_space(prog, self.layout, mm)
        self.at = at

    def vmas(self) -> Iterator[Vma]:
        """The VMAs that may be damaged."""
        for vma in self.space.vmas():
            if self.at is None or vma.vm_start <= self.at < vma.vm_end:
                yield vma

    def vma(self, wanted: str, fits: Callable[[Vma], bool]) -> Vma:
        """The first VMA that fits.

        :param wanted: what is looked for, for the error's sentence
        """
        for vma in self.vmas():
            if fits(vma):
                return vma
        where = "the process" if self.at is None else f"the VMA at {self.at:#x}"
        raise KvirtError(f"{where} has no {wanted}, which this damage needs: choose another one.")

    def page(self, wanted: str, fits: Callable[[Vma], bool] = lambda vma: True) -> Page:
        """The first small anonymous page, mapped once, in a VMA that fits."""
        for vma in self.vmas():
            if not vma.anon_vma or not fits(vma):
                continue
            addresses = np.arange(vma.vm_start, vma.vm_end, self.layout.page_size, dtype=np.uint64)
            if self.at is not None:
                addresses = addresses[addresses == self.at & ~(self.layout.page_size - 1)]
            for leaves in for_each_leaf(self.prog, self.layout, self.space.pgd, WalkTroubles(), addresses):
                if leaves.level:
                    continue
                leaves = leaves.take(leaf_present(leaves) & ~leaf_special(leaves))
                pfns = leaf_pfn(self.layout, leaves)
                folios = read_folios(self.prog, self.layout, pfns)
                for i in np.flatnonzero(folios.is_anon()).tolist():
                    if self._is_small_and_mapped_once(int(pfns[i])):
                        return Page(
                            vma,
                            int(leaves.address[i]),
                            int(pfns[i]),
                            int(folios.index[i]),
                            int(folios.mapping[i]),
                        )
        raise KvirtError(f"The process has no {wanted}, which this damage needs: choose another one.")

    def huge_page(self) -> Page:
        """The first anonymous page that is mapped whole by an entry of the second level."""
        for leaves in for_each_leaf(self.prog, self.layout, self.space.pgd, WalkTroubles()):
            if leaves.level != 1:
                continue
            leaves = leaves.take(leaf_present(leaves) & ~leaf_special(leaves))
            pfns = leaf_pfn(self.layout, leaves)
            folios = read_folios(self.prog, self.layout, pfns)
            for vma in self.vmas():
                inside = (leaves.address >= vma.vm_start) & (leaves.address < vma.vm_end)
                for i in np.flatnonzero(folios.is_anon() & inside).tolist():
                    return Page(
                        vma,
                        int(leaves.address[i]),
                        int(pfns[i]),
                        int(folios.index[i]),
                        int(folios.mapping[i]),
                    )
        raise KvirtError(
            "The process maps no huge anonymous page, which this damage needs: choose another one."
        )

    def _is_small_and_mapped_once(self, pfn: int) -> bool:
        page = drgn.Object(self.prog, "struct page", address=self.page_address(pfn))
        compound = page.member_("compound_info" if hasattr(page, "compound_info") else "compound_head")
        head = 1 << int(self.prog["PG_head"].value_())
        flags = self.layout.page.read(self.prog, self.page_address(pfn))["flags"]
        # The stored count is one less than the number of mappings.
        return not flags & head and not compound.value_() & 1 and page._mapcount.counter.value_() == 0

    def page_address(self, pfn: int) -> int:
        """Address of a struct page."""
        return self.layout.vmemmap + pfn * self.layout.page.size

    def set_page(self, pfn: int, member: str, value: int) -> None:
        """Make up a member of a struct page."""
        self._set(self.page_address(pfn) + self.layout.page.offset(member), value, 8)

    def set_vma(self, vma: Vma, member: str, value: int) -> None:
        """Make up a member of a struct vm_area_struct."""
        where = self.layout.vma.members[member]
        self._set(vma.address + where.offset, value, where.size)

    def set_anon_vma(self, address: int, member: str, value: int) -> None:
        """Make up a member of a struct anon_vma."""
        where = self.layout.anon_vma.members[member]
        self._set(address + where.offset, value, where.size)

    def set_avc(self, address: int, member: str, value: int) -> None:
        """Make up a member of a struct anon_vma_chain."""
        where = self.layout.avc.members[member]
        self._set(address + where.offset, value, where.size)

    def set_mm(self, member: str, value: int) -> None:
        """Make up a member of the struct mm_struct."""
        where = self.layout.mm.members[member]
        self._set(self.space.address + where.offset, value, where.size)

    def _set(self, address: int, value: int, size: int) -> None:
        self.overlay.write(address, value.to_bytes(size, "little"))

    def set_index_base(self, vma: Vma, value: int) -> None:
        """Make up the offset by which anonymous folios are indexed."""
        if self.layout.scheme is Scheme.LEGACY:
            self.set_vma(vma, "vm_pgoff", value)
        else:
            self.set_vma(vma, "anon_pgoff_lo", value & 0xFFFFFFFF)
            self.set_vma(vma, "anon_pgoff_hi", value >> 32)

    def foreign_root(self, vma: Vma) -> int:
        """A root anon_vma of the process that has nothing to do with a VMA."""
        chain = {link.anon_vma for link in self.space.chains[vma.address].links}
        for address, anon_vma in self.space.anon_vmas.items():
            if anon_vma.root == address and address not in chain:
                return address
        raise KvirtError("The process has no second anon_vma, which this damage needs: choose another one.")


DAMAGES: dict[str, Callable[[Scene], Damaged]] = {}


def damage(id: str) -> Callable[[Callable[[Scene], Damaged]], Callable[[Scene], Damaged]]:
    """Register a way to break an invariant. A suffix after "/" names one of several ways."""

    def register(make: Callable[[Scene], Damaged]) -> Callable[[Scene], Damaged]:
        DAMAGES[id] = make
        return make

    return register


def _range(vma: Vma) -> tuple[int, int]:
    return vma.vm_start, vma.vm_end


def _faulted(vma: Vma) -> bool:
    return vma.anon_vma != 0


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


@damage("VMA-UNFAULTED-PGOFF")
def _unfaulted(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA of a file", lambda v: not v.anon_vma and v.vm_file != 0)
    scene.set_index_base(vma, vma.anon_pgoff + 1)
    return Damaged(
        "VMA-UNFAULTED-PGOFF", f"the anonymous offset at {vma.vm_start:#x} is one too high", _range(vma)
    )


@damage("VMA-UNFAULTED-PGOFF/hi")
def _unfaulted_hi(scene: Scene) -> Damaged:
    vma = scene.vma("unfaulted VMA of a file", lambda v: not v.anon_vma and v.vm_file != 0)
    scene.set_vma(vma, "anon_pgoff_hi", (vma.anon_pgoff >> 32) ^ 1)
    return Damaged(
        "VMA-UNFAULTED-PGOFF",
        f"the upper half of the anonymous offset at {vma.vm_start:#x} has a wrong bit",
        _range(vma),
    )


@damage("LEG-UNFAULTED-PGOFF")
def _legacy_unfaulted(scene: Scene) -> Damaged:
    vma = scene.vma(
        "unfaulted anonymous VMA in place",
        lambda v: not v.anon_vma and vma_is_pure_anon(v) and displacement(v) == 0,
    )
    scene.set_vma(vma, "vm_pgoff", vma.vm_pgoff + 1)
    return Damaged("LEG-UNFAULTED-PGOFF", f"vm_pgoff at {vma.vm_start:#x} is one too high", _range(vma))


@damage("VMA-PURE-ANON-PGOFF")
def _pure(scene: Scene) -> Damaged:
    vma = scene.vma("faulted anonymous VMA", lambda v: _faulted(v) and vma_is_pure_anon(v))
    scene.set_vma(vma, "vm_pgoff", vma.vm_pgoff + 1)
    return Damaged("VMA-PURE-ANON-PGOFF", f"vm_pgoff at {vma.vm_start:#x} is one too high", _range(vma))


@damage("VMA-NO-WRAP")
def _no_wrap(scene: Scene) -> Damaged:
    vma = scene.page(
        "small page in a faulted VMA of a file", lambda v: v.vm_file != 0 and vma_is_cow_mapping(v)
    ).vma
    scene.set_vma(vma, "anon_pgoff_hi", 0xFFFFFFFF)
    return Damaged(
        "VMA-NO-WRAP",
        f"the upper half of the anonymous offset at {vma.vm_start:#x} has all bits set",
        _range(vma),
        also=frozenset({"FOLIO-INDEX"}),
    )


@damage("AVC-EMPTY")
def _avc_empty(scene: Scene) -> Damaged:
    vma = scene.page("small anonymous page").vma
    scene.set_vma(vma, "anon_vma", 0)
    return Damaged(
        "AVC-EMPTY",
        f"anon_vma of the VMA at {vma.vm_start:#x} is NULL, its chain is not empty",
        _range(vma),
        also=frozenset({"FOLIO-ANON-VMA"}),
    )


@damage("AVC-EMPTY/chain")
def _avc_empty_chain(scene: Scene) -> Damaged:
    vma = scene.page("small anonymous page").vma
    head = vma.address + scene.layout.vma.offset("chain_next")
    scene.set_vma(vma, "chain_next", head)
    scene.set_vma(vma, "chain_prev", head)
    return Damaged(
        "AVC-EMPTY",
        f"the chain of the VMA at {vma.vm_start:#x} is empty, anon_vma is not NULL",
        _range(vma),
        also=frozenset({"FOLIO-ANON-VMA"}),
    )


@damage("AVC-SELF")
def _avc_self(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", _faulted)
    other = next(v for v in scene.space.vmas() if v.address != vma.address)
    link = scene.space.chains[vma.address].links[0]
    scene.set_avc(link.address, "vma", other.address)
    return Damaged("AVC-SELF", f"a link of the chain at {vma.vm_start:#x} names another VMA", _range(vma))


@damage("AVC-SELF/loop")
def _avc_loop(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", _faulted)
    link = scene.space.chains[vma.address].links[-1]
    node = link.address + scene.layout.avc.offset("same_vma_next")
    scene.set_avc(link.address, "same_vma_next", node)
    return Damaged("AVC-SELF", f"the chain at {vma.vm_start:#x} runs in a loop", _range(vma))


@damage("AVC-SELF/wild")
def _avc_wild(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", _faulted)
    scene.set_vma(vma, "chain_next", 0xDEAD000000000100)
    return Damaged("AVC-SELF", f"the chain at {vma.vm_start:#x} starts with a poisoned pointer", _range(vma))


def _forked(scene: Scene) -> Vma:
    return scene.vma(
        "VMA that was faulted before a fork",
        lambda v: _faulted(v) and len(scene.space.chains[v.address].links) > 1,
    )


@damage("ANON-VMA-ROOT")
def _anon_vma_root(scene: Scene) -> Damaged:
    vma = _forked(scene)
    scene.set_anon_vma(vma.anon_vma, "root", scene.foreign_root(vma))
    return Damaged(
        "ANON-VMA-ROOT",
        f"the anon_vma {vma.anon_vma:#x} has a stranger's root",
        _range(vma),
        also=frozenset({"ROOT-IN-CHAIN"}),
    )


@damage("ROOT-IN-CHAIN")
def _root_in_chain(scene: Scene) -> Damaged:
    vma = scene.vma(
        "VMA with a single anon_vma",
        lambda v: _faulted(v) and len(scene.space.chains[v.address].links) == 1,
    )
    scene.set_anon_vma(vma.anon_vma, "root", scene.foreign_root(vma))
    return Damaged("ROOT-IN-CHAIN", f"the anon_vma {vma.anon_vma:#x} has a stranger's root", _range(vma))


@damage("PARENT-IN-CHAIN")
def _parent_in_chain(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", _faulted)
    scene.set_anon_vma(vma.anon_vma, "parent", scene.foreign_root(vma))
    return Damaged("PARENT-IN-CHAIN", f"the anon_vma {vma.anon_vma:#x} has a stranger as parent", _range(vma))


@damage("ANONVMA-IN-NONCOW")
def _anon_vma_in_noncow(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", _faulted)
    scene.set_vma(vma, "vm_flags", vma.vm_flags & ~scene.layout.vm["MAYWRITE"])
    return Damaged(
        "ANONVMA-IN-NONCOW",
        f"the faulted VMA at {vma.vm_start:#x} may never be written",
        _range(vma),
        also=frozenset({"ANON-FOLIO-IN-NONCOW"}),
    )


@damage("FOLIO-INDEX")
def _folio_index(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the folio at {page.address:#x} (page frame {page.pfn:#x}) is indexed {page.index + 1:#x} "
        f"instead of {page.index:#x}",
        _range(page.vma),
        page.address,
    )


@damage("FOLIO-INDEX/huge")
def _folio_index_huge(scene: Scene) -> Damaged:
    page = scene.huge_page()
    scene.set_page(page.pfn, "index", page.index + 1)
    return Damaged(
        "FOLIO-INDEX",
        f"the huge folio at {page.address:#x} is indexed {page.index + 1:#x} instead of {page.index:#x}",
        _range(page.vma),
        page.address,
    )


@damage("FOLIO-ANON-VMA/huge")
def _folio_anon_vma_huge(scene: Scene) -> Damaged:
    page = scene.huge_page()
    scene.set_page(page.pfn, "mapping", scene.foreign_root(page.vma) | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        f"the huge folio at {page.address:#x} is on an anon_vma of another VMA",
        _range(page.vma),
        page.address,
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
        _range(page.vma),
        page.address,
    )


@damage("FOLIO-ANON-VMA")
def _folio_anon_vma(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_page(page.pfn, "mapping", scene.foreign_root(page.vma) | int(FOLIO_MAPPING_ANON))
    return Damaged(
        "FOLIO-ANON-VMA",
        f"the folio at {page.address:#x} is on an anon_vma of another VMA",
        _range(page.vma),
        page.address,
    )


@damage("ANON-FOLIO-IN-NONCOW")
def _anon_folio_in_noncow(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    scene.set_vma(page.vma, "vm_flags", page.vma.vm_flags | scene.layout.vm["SHARED"])
    return Damaged(
        "ANON-FOLIO-IN-NONCOW",
        f"the VMA at {page.vma.vm_start:#x} with anonymous pages is shared",
        _range(page.vma),
        also=frozenset({"ANONVMA-IN-NONCOW"}),
    )
