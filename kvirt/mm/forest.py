# SPDX-License-Identifier: GPL-2.0-only
"""Families of anon_vmas: a root, all that descend from it by fork, their trees, and the VMAs in these.

A family has everything that must agree on its anon_vmas, whatever process it belongs to: every VMA whose
anonymous pages may be on one of them is in the root's tree (kernel: mm/rmap.c, "ROOT-IN-CHAIN" here).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import RWSEM_LOCK_MASK, RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import Interval, RbNode, Root, TreeError, in_order
from kvirt.mm.kernel import snapshot_of
from kvirt.mm.maple import MapleError, MapleTree
from kvirt.mm.rmap import AnonVma, AnonVmaChain, Chain, Records
from kvirt.mm.vma import Vma, vma_last_anon_pgoff
from kvirt.snapshot import Readable

# AVCs in one tree. A process has at most 65,530 VMAs by default, and a family of processes many of them.
NODES_MAX = 1 << 22
# Maple trees that are kept from one family to the next, with the nodes that were looked at.
_MM_TREES_MAX = 16


@dataclass(frozen=True, slots=True)
class MmState:
    """What tells whether the mappings of a process are being changed."""

    ma_root: int
    mm_users: int
    lock_seq: int | None
    write_locked: bool
    held: bool | None = field(compare=False)
    """Whether anybody held mmap_lock, be it to read; None where the kernel does not tell."""


@dataclass(slots=True)
class AnonTree:
    """``anon_vma->rb_root``."""

    root: Root
    nodes: dict[int, Interval] = field(default_factory=dict)
    """By address of the AVC, in the tree's order. Those whose VMA cannot be read are left out."""
    links: dict[int, AnonVmaChain] = field(default_factory=dict)
    """The AVCs, by address, in the tree's order."""
    broken: str | None = None
    """Why the tree could not be followed to its end, if it could not."""


@dataclass(slots=True)
class Family:
    """A root anon_vma and what descends from it."""

    root: int
    anon_vmas: dict[int, AnonVma] = field(default_factory=dict)
    """Those that have this root, and that are in a chain of the family; by address."""
    trees: dict[int, AnonTree] = field(default_factory=dict)
    vmas: dict[int, Vma] = field(default_factory=dict)
    """All VMAs in the trees, by address."""
    chains: dict[int, Chain] = field(default_factory=dict)
    attached: dict[int, bool] = field(default_factory=dict)
    """Whether a VMA is in the maple tree of its mm; munmap and exit take it out there first."""
    mms: dict[int, MmState] = field(default_factory=dict)
    lost: bool = False
    """Whether a maple tree could not be followed, so that *attached* is a guess for some."""
    whole: bool = True
    """Whether nothing of it is out of reach, so that it can be counted."""

    def leaving(self, vma: Vma) -> bool:
        """Whether a VMA that its mm does not have any more may be on its way out of the trees.

        munmap() holds mmap_lock until it is, be it to read (mm/vma.c: vms_complete_munmap_vmas()), and
        exit_mmap() comes when the mm has no users.
        """
        mm = self.mms.get(vma.vm_mm)
        return mm is not None and (mm.mm_users == 0 or mm.held is not False)

    @property
    def locked(self) -> bool:
        """Whether somebody held the root's lock, which is the lock of the whole family, for write."""
        root = self.anon_vmas.get(self.root)
        return root is not None and bool(root.write_locked)

    def shared(self) -> bool:
        """Whether more than one process is in it."""
        return len({vma.vm_mm for vma in self.vmas.values()}) > 1


class FamilyReader:
    """Reads families, one after another, from the same records."""

    def __init__(self, layout: Layout, records: Records, listed: Container[int] = ()) -> None:
        """Prepare.

        :param records: what has been read already, and is taken as it was then; nothing is added to it
        :param listed: addresses of VMAs that are known to be in the maple trees of their mms
        """
        self.layout = layout
        self.records = records
        self.listed = listed
        # Most families of a process are of the same processes.
        self.mms: dict[int, MmState | None] = {}
        self.mm_trees: dict[int, MapleTree] = {}

    def read(self, root: int, members: Iterable[int]) -> Family:
        """Read the family of a root anon_vma.

        :param root: address of the root ``struct anon_vma``
        :param members: addresses of VMAs known to be in it, whether or not its trees have them
        :raises drgn.FaultError: if a part of it was left out of the dump
        """
        mark = self.records.mark()
        self.forget_trees()
        reading = _Reading(self, root)
        try:
            reading.add_anon_vma(root)
            for address in members:
                reading.add_vma(address)
            while reading.todo:
                reading.read_tree(reading.todo.pop())
        finally:
            self.records.release(mark)
        return reading.family

    def mm(self, address: int) -> MmState | None:
        """The state of a ``struct mm_struct``, None if it cannot be read."""
        if address not in self.mms:
            self.mms[address] = read_mm_state(self.records.memory, self.layout, address)
        return self.mms[address]

    def has_attached(self, address: int, vmas: Iterable[tuple[int, int]]) -> bool:
        """Whether some VMAs are in the maple tree of an mm.

        :param address: of the ``struct mm_struct``
        :param vmas: address and first address of each
        :raises MapleError: if that cannot be told
        :raises drgn.FaultError: if what tells it was left out of the dump
        """
        mm = self.mm(address)
        if mm is None or mm.mm_users == 0:
            return False
        tree, listed = self.mm_tree(address, mm), self.listed
        return all(vma in listed or tree.mtree_load(start) == vma for vma, start in vmas)

    def forget_trees(self) -> None:
        """Drop the maple trees that were looked at, if these are many."""
        if len(self.mm_trees) > _MM_TREES_MAX:
            self.mm_trees.clear()

    def mm_tree(self, address: int, state: MmState) -> MapleTree:
        """The maple tree of a ``struct mm_struct``."""
        tree = self.mm_trees.get(address)
        if tree is None:
            tree = self.mm_trees[address] = MapleTree(self.records.memory, self.layout, state.ma_root)
        return tree


class _Reading:
    """The reading of one family."""

    def __init__(self, reader: FamilyReader, root: int) -> None:
        self.reader = reader
        self.records = reader.records
        self.family = Family(root)
        self.todo: list[AnonVma] = []
        self.strangers = {0}
        # Last offset of each VMA, which is in the trees of all its ancestors.
        self.lasts: dict[int, int] = {}

    def add_anon_vma(self, address: int) -> bool:
        """Add an anon_vma; returns whether it is of the family."""
        family = self.family
        if address in family.anon_vmas:
            return True
        if address in self.strangers:
            return False
        try:
            anon_vma = self.records.anon_vmas[address]
        except drgn.FaultError as error:
            damage_only(error)
            # A chain that leads there is damage, which AVC-SELF reports.
            self.strangers.add(address)
            return False
        if anon_vma.root != family.root:
            # As is one that leads to another family: ANON-VMA-ROOT.
            self.strangers.add(address)
            return False
        family.anon_vmas[address] = anon_vma
        self.todo.append(anon_vma)
        return True

    def add_vma(self, address: int) -> Vma | None:
        family = self.family
        vma = family.vmas.get(address)
        if vma is not None:
            return vma
        try:
            vma = self.records.vmas[address]
        except drgn.FaultError as error:
            damage_only(error)
            return None
        family.vmas[address] = vma
        self.lasts[address] = vma_last_anon_pgoff(vma)
        chain = family.chains[address] = self.records.chains[address]
        family.attached[address] = self.is_attached(vma)
        family.whole &= chain.broken is None
        for link in chain.links:
            family.whole &= self.add_anon_vma(link.anon_vma)
        return vma

    def is_attached(self, vma: Vma) -> bool:
        reader, address = self.reader, vma.vm_mm
        mm = reader.mm(address)
        if mm is not None:
            self.family.mms[address] = mm
        try:
            return reader.has_attached(address, ((vma.address, vma.vm_start),))
        except MapleError:
            # VMA-TREE reports a damaged one; here the VMA is taken for what it says it is.
            self.family.lost = True
            return True

    def read_node(self, address: int) -> RbNode:
        try:
            return self.records.avcs[address].rb
        except (drgn.FaultError, OverflowError) as error:
            damage_only(error)
            raise TreeError(f"the tree leads to {address:#x}, which cannot be read") from None

    def read_tree(self, anon_vma: AnonVma) -> None:
        tree = self.family.trees[anon_vma.address] = AnonTree(anon_vma.tree)
        avcs, links, nodes = self.records.avcs, tree.links, tree.nodes
        try:
            for address in in_order(self.read_node, anon_vma.tree, NODES_MAX):
                link = links[address] = avcs[address]
                vma = self.add_vma(link.vma)
                if vma is not None:
                    nodes[address] = Interval(address, link.rb, vma.anon_pgoff, self.lasts[link.vma])
        except TreeError as error:
            tree.broken = str(error)
        self.family.whole &= tree.broken is None and len(links) == len(nodes)


def read_mm_state(memory: Readable, layout: Layout, address: int) -> MmState | None:
    """The state of a ``struct mm_struct``, None if it cannot be read.

    :raises drgn.FaultError: if it was left out of the dump
    """
    try:
        m = layout.mm.read(memory, address)
    except drgn.FaultError as error:
        damage_only(error)
        return None
    count = m.get("mmap_lock_count")
    locked = bool((count or 0) & RWSEM_WRITER_LOCKED)
    held = None if count is None else bool(count & RWSEM_LOCK_MASK)
    return MmState(m["ma_root"], m["mm_users"], m.get("mm_lock_seq"), locked, held)


def read_family(prog: drgn.Program, layout: Layout, root: int, members: Iterable[int]) -> Family:
    """Read a family by itself, as :meth:`FamilyReader.read` does, and everything anew."""
    return FamilyReader(layout, Records(snapshot_of(prog, layout), layout)).read(root, members)
