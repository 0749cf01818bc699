# SPDX-License-Identifier: GPL-2.0-only
"""Families of anon_vmas: a root, all that descend from it by fork, their trees, and the VMAs in these.

A family has everything that must agree on its anon_vmas, whatever process it belongs to: every VMA whose
anonymous pages may be on one of them is in the root's tree (kernel: mm/rmap.c, "ROOT-IN-CHAIN" here).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import RWSEM_LOCK_MASK, RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import Interval, RbNode, Root, TreeError, in_order
from kvirt.mm.maple import MapleError, MapleTree
from kvirt.mm.rmap import AnonVma, AnonVmaChain, Chain, Records
from kvirt.mm.vma import Vma, vma_last_anon_pgoff
from kvirt.snapshot import Readable, Snapshot

# AVCs in one tree. A process has at most 65,530 VMAs by default, and a family of processes many of them.
NODES_MAX = 1 << 22


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

    def links(self) -> Iterator[AnonVmaChain]:
        """The links of all chains."""
        return (link for chain in self.chains.values() for link in chain.links)

    def whole(self) -> bool:
        """Whether nothing of it is out of reach, so that it can be counted."""
        return (
            all(tree.broken is None and len(tree.links) == len(tree.nodes) for tree in self.trees.values())
            and all(chain.broken is None for chain in self.chains.values())
            and all(link.anon_vma in self.anon_vmas for link in self.links())
        )

    def shared(self) -> bool:
        """Whether more than one process is in it."""
        return len({vma.vm_mm for vma in self.vmas.values()}) > 1


class _Reader:
    def __init__(self, layout: Layout, root: int, records: Records) -> None:
        self.layout = layout
        self.records = records
        self.mm_trees: dict[int, MapleTree] = {}
        self.family = Family(root)
        self.todo: list[int] = []
        self.strangers: set[int] = set()

    def add_anon_vma(self, address: int) -> None:
        family = self.family
        if not address or address in family.anon_vmas or address in self.strangers:
            return
        try:
            anon_vma = self.records.anon_vmas[address]
        except drgn.FaultError as error:
            damage_only(error)
            # A chain that leads there is damage, which AVC-SELF reports.
            self.strangers.add(address)
            return
        if anon_vma.root != family.root:
            # As is one that leads to another family: ANON-VMA-ROOT.
            self.strangers.add(address)
            return
        family.anon_vmas[address] = anon_vma
        self.todo.append(address)

    def add_vma(self, address: int) -> Vma | None:
        family = self.family
        if address in family.vmas:
            return family.vmas[address]
        try:
            vma = self.records.vmas[address]
        except drgn.FaultError as error:
            damage_only(error)
            return None
        family.vmas[address] = vma
        chain = family.chains[address] = self.records.chains[address]
        family.attached[address] = self.is_attached(vma)
        for link in chain.links:
            self.add_anon_vma(link.anon_vma)
        return vma

    def is_attached(self, vma: Vma) -> bool:
        mm = self.mm(vma.vm_mm)
        if mm is None or mm.mm_users == 0:
            return False
        try:
            return self.mm_trees[vma.vm_mm].mtree_load(vma.vm_start) == vma.address
        except MapleError:
            # VMA-TREE reports a damaged one; here the VMA is taken for what it says it is.
            self.family.lost = True
            return True

    def mm(self, address: int) -> MmState | None:
        mms = self.family.mms
        if address not in mms:
            state = read_mm_state(self.records.memory, self.layout, address)
            if state is None:
                return None
            mms[address] = state
            self.mm_trees[address] = MapleTree(self.records.memory, self.layout, state.ma_root)
        return mms[address]

    def read_node(self, address: int) -> RbNode:
        try:
            return self.records.avcs[address].rb
        except (drgn.FaultError, OverflowError) as error:
            damage_only(error)
            raise TreeError(f"the tree leads to {address:#x}, which cannot be read") from None

    def read_tree(self, anon_vma: AnonVma) -> None:
        tree = self.family.trees[anon_vma.address] = AnonTree(anon_vma.tree)
        try:
            for address in in_order(self.read_node, anon_vma.tree, NODES_MAX):
                link = tree.links[address] = self.records.avcs[address]
                vma = self.add_vma(link.vma)
                if vma is not None:
                    tree.nodes[address] = Interval(address, link.rb, vma.anon_pgoff, vma_last_anon_pgoff(vma))
        except TreeError as error:
            tree.broken = str(error)


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


def read_family(
    prog: drgn.Program, layout: Layout, root: int, members: Iterable[int], known: Records | None = None
) -> Family:
    """Read the family of a root anon_vma.

    :param root: address of the root ``struct anon_vma``
    :param members: addresses of VMAs known to be in it, whether or not its trees have them
    :param known: what has been read already, and is taken as it was then
    :raises drgn.FaultError: if a part of it was left out of the dump
    """
    memory = Snapshot(prog) if known is None else known.memory
    reader = _Reader(layout, root, Records(memory, layout, known))
    reader.add_anon_vma(root)
    for address in members:
        reader.add_vma(address)
    while reader.todo:
        reader.read_tree(reader.family.anon_vmas[reader.todo.pop()])
    return reader.family
