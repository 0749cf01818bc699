# SPDX-License-Identifier: GPL-2.0-only
"""A process in a dump that is to be damaged, and how damage registers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import drgn
import numpy as np
from drgn.helpers.linux.pid import for_each_task

from kvirt.errors import KvirtError
from kvirt.findings import Severity
from kvirt.lab.overlay import Overlay
from kvirt.layout import Layout, StructLayout, layout_of
from kvirt.mm.address_space import AddressSpace, read_address_space
from kvirt.mm.folio import Folios, read_folios
from kvirt.mm.pagetable import U64, Bool, WalkTroubles, for_each_leaf, leaf_pfn, leaf_present, leaf_special
from kvirt.mm.rmap import AnonVma
from kvirt.mm.vma import Vma
from kvirt.scheme import Scheme


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
    expected: int | None = None
    """What the finding must say that should be there."""
    pages: int = 1
    """Base pages that the finding must count, where it names one."""
    severity: Severity | None = None
    """Where it differs from the invariant's own."""
    findings: int = 1
    """How many findings of the invariant it warrants."""
    spread: bool = False
    """Whether other VMAs of the process rest on what is damaged, and are found too."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page that a process maps."""

    vma: Vma
    address: int
    pfn: int
    head: int
    """Page frame of its folio."""
    index: int
    """``folio->index``"""
    mapping: int
    """``folio->mapping``"""
    flags: int
    """``page->flags``"""


class Inapplicable(KvirtError):
    """A damage that means nothing on this kernel."""


def small_anon(pfn: U64, folios: Folios) -> Bool:
    """Small anonymous pages that are mapped once."""
    once: Bool = folios.is_anon() & ~folios.large & (folios.page_mapcount == 1)
    return once


def small_file(pfn: U64, folios: Folios) -> Bool:
    """Small pages of files that are mapped once."""
    once: Bool = folios.is_file() & ~folios.large & (folios.page_mapcount == 1)
    return once


def anon_tail(pfn: U64, folios: Folios) -> Bool:
    """Pages of large anonymous folios, without the first."""
    tail: Bool = folios.is_anon() & folios.large & (pfn != folios.head)
    return tail


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
        self._elsewhere: dict[int, AnonVma] | None = None

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

    def page(
        self,
        wanted: str,
        fits: Callable[[Vma], bool] = lambda vma: True,
        of: Callable[[U64, Folios], Bool] = small_anon,
        level: int = 0,
    ) -> Page:
        """The first page of a kind in a VMA that fits.

        :param of: which of the given page frames are of the kind
        :param level: of the entry that maps it
        """
        for page in self.pages(fits, of, level):
            return page
        raise KvirtError(f"The process has no {wanted}, which this damage needs: choose another one.")

    def pages(
        self, fits: Callable[[Vma], bool], of: Callable[[U64, Folios], Bool], level: int = 0
    ) -> Iterator[Page]:
        """All pages of a kind in VMAs that fit."""
        at = self.at
        for leaves in for_each_leaf(self.prog, self.layout, self.space.pgd, WalkTroubles()):
            if leaves.level != level:
                continue
            leaves = leaves.take(leaf_present(leaves) & ~leaf_special(leaves))
            pfns = leaf_pfn(leaves)
            folios = read_folios(self.prog, self.layout, pfns)
            size = leaves.pages * self.layout.page_size
            right = of(pfns, folios) & folios.readable
            for vma in self.vmas():
                inside = (leaves.address >= vma.vm_start) & (leaves.address < vma.vm_end) & right
                if not inside.any() or not fits(vma):
                    continue
                for i in np.flatnonzero(inside).tolist():
                    address = int(leaves.address[i])
                    if at is None or address <= at < address + size:
                        yield Page(
                            vma,
                            address,
                            int(pfns[i]),
                            int(folios.head[i]),
                            int(folios.index[i]),
                            int(folios.mapping[i]),
                            int(folios.flags[i]),
                        )

    def huge_page(self) -> Page:
        """The first anonymous page that is mapped whole by an entry of the second level."""
        return self.page(
            "huge anonymous page", lambda v: not v.flag("HUGETLB"), lambda pfn, f: f.is_anon(), level=1
        )

    def page_address(self, pfn: int) -> int:
        """Address of a struct page."""
        return self.layout.vmemmap + pfn * self.layout.page.size

    def set_page(self, pfn: int, member: str, value: int) -> None:
        """Make up a member of a struct page."""
        self.set_member(self.layout.page, self.page_address(pfn), member, value)

    def set_large(self, head: int, count: str, value: int) -> None:
        """Make up a count that a large folio keeps in its second struct page."""
        fields = self.layout.page_dtype.fields
        assert fields is not None
        dtype, offset = fields[count][:2]
        self.overlay.write(self.page_address(head + 1) + offset, value.to_bytes(dtype.itemsize, "little"))

    def set_vma(self, vma: Vma, member: str, value: int) -> None:
        """Make up a member of a struct vm_area_struct."""
        self.set_member(self.layout.vma, vma.address, member, value)

    def set_anon_vma(self, address: int, member: str, value: int) -> None:
        """Make up a member of a struct anon_vma."""
        self.set_member(self.layout.anon_vma, address, member, value)

    def set_avc(self, address: int, member: str, value: int) -> None:
        """Make up a member of a struct anon_vma_chain."""
        self.set_member(self.layout.avc, address, member, value)

    def set_mm(self, member: str, value: int) -> None:
        """Make up a member of the struct mm_struct."""
        self.set_member(self.layout.mm, self.space.address, member, value)

    def set_word(self, address: int, value: int) -> None:
        """Make up eight bytes of kernel memory."""
        self.overlay.write(address, value.to_bytes(8, "little"))

    def set_member(self, layout: StructLayout, address: int, member: str, value: int) -> None:
        """Make up a member of the structure at an address."""
        where = layout.members[member]
        self.overlay.write(address + where.offset, value.to_bytes(where.size, "little"))

    def set_entry(self, address: int, level: int, value: int) -> None:
        """Make up a page-table entry of the process.

        :param level: 0: PTE, 1: PMD; the tables above it must exist
        """
        tables = self.layout.pgtable
        physical = None
        for above in range(tables.levels - 1, level - 1, -1):
            slot = tables.slot(address, above)
            if physical is None:
                table = self.prog.read_u64(self.space.pgd + slot)
            elif above > level:
                table = self.prog.read_u64(physical + slot, physical=True)
            else:
                self.overlay.write_physical(physical + slot, value.to_bytes(8, "little"))
            physical = tables.physical(table)

    def set_index_base(self, vma: Vma, value: int) -> None:
        """Make up the offset by which anonymous folios are indexed."""
        if self.layout.scheme is Scheme.LEGACY:
            self.set_vma(vma, "vm_pgoff", value)
        else:
            self.set_vma(vma, "anon_pgoff_lo", value & 0xFFFFFFFF)
            self.set_vma(vma, "anon_pgoff_hi", value >> 32)

    def descendant(self, vma: Vma) -> int | None:
        """A forked child's anon_vma: it has the same root as a VMA's own, and is not in the VMA's chain."""
        own = self.space.anon_vmas.get(vma.anon_vma)
        if own is None:
            return None
        if self._elsewhere is None:
            self._elsewhere = {}
            for task in for_each_task(self.prog):
                if task.mm and task.mm.value_() != self.space.address:
                    space = read_address_space(self.prog, self.layout, task.mm.value_())
                    self._elsewhere.update(space.anon_vmas)
        chain = self.space.chains[vma.address].anon_vmas()
        for address, anon_vma in self._elsewhere.items():
            if anon_vma.root == own.root and address not in chain:
                return address
        return None

    def foreign_root(self, vma: Vma) -> int:
        """A root anon_vma of the process that has nothing to do with a VMA."""
        chain = self.space.chains[vma.address].anon_vmas()
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


def vma_range(vma: Vma) -> tuple[int, int]:
    """Start and end of a VMA."""
    return vma.vm_start, vma.vm_end


def is_faulted(vma: Vma) -> bool:
    """Whether the VMA has an anon_vma."""
    return vma.anon_vma != 0
