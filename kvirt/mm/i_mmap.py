# SPDX-License-Identifier: GPL-2.0-only
"""The place of a VMA in the tree of its file's mappings (``mapping->i_mmap``, mm/interval_tree.c).

Everybody who maps a library is in one tree, so a place is judged by its own surroundings: the way up to the
root, the node before, the children. Over all VMAs this judges the whole tree.
"""

from __future__ import annotations

from typing import NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import RWSEM_WRITER_LOCKED, Layout
from kvirt.mm.interval_tree import (
    RbNode,
    Root,
    TreeError,
    check_children,
    climb,
    node_reader,
    rb_prev,
    root_decoder,
    subtree_last,
)
from kvirt.mm.vma import Vma, vma_last_pgoff
from kvirt.snapshot import Snapshot, Table

# While a kernel runs, a place that looks wrong is read so often until two readings are the same.
_READINGS = 6


class FilePlace(NamedTuple):
    """Where a VMA is in the tree of its file's mappings."""

    node: RbNode | None = None
    root: Root | None = None
    lost: str | None = None
    """Why the tree does not have it, if it does not."""
    first: bool = False
    """Whether no VMA comes before it in the tree's order."""
    before: int | None = None
    """``vm_pgoff`` of the VMA that does; None if it cannot be told."""
    subtree_last: int | None = None
    """What ``rb_subtree_last`` should be; None if that cannot be told."""
    stray: str | None = None
    """Why what it has as a child is none, if so."""
    locked: bool = False
    """Whether somebody held ``i_mmap_rwsem`` for write."""

    def suspicious(self, vma: Vma) -> bool:
        """Whether anything is not as it should be."""
        if self.lost is not None or self.stray is not None or self.node is None or self.root is None:
            return True
        if self.subtree_last is not None and self.subtree_last != self.node.subtree_last:
            return True
        if self.first:
            return self.root.leftmost != vma.address
        return self.before is not None and self.before > vma.vm_pgoff


class FileTrees:
    """Reads places in the trees of files' mappings."""

    def __init__(self, prog: drgn.Program, layout: Layout, memory: Snapshot, *, moves: bool) -> None:
        """Prepare.

        :param memory: what was read with the VMAs, which are nodes of the trees
        :param moves: whether the kernel runs while it is read: then what looks wrong is read anew
        """
        self._prog = prog
        self._layout = layout
        self._moves = moves
        self._root = root_decoder(layout.file_tree)
        self._read_from(memory)

    def _read_from(self, memory: Snapshot) -> None:
        self._memory = memory
        layout, decode_root = self._layout, self._root
        how = layout.mapping
        get_count = how.getter(("rwsem_count",)) if "rwsem_count" in how else lambda data: (0,)
        i_mmap = how.offset("i_mmap")

        def read_mapping(address: int) -> tuple[Root, bool]:
            data = memory.read(address, how.size)
            return decode_root(data, i_mmap), bool(get_count(data)[0] & RWSEM_WRITER_LOCKED)

        self._mappings = Table(read_mapping)
        self._node = Table(node_reader(memory, layout.file_tree)).__getitem__

    def place(self, vma: Vma, mapping: int) -> FilePlace:
        """Find a VMA in the tree.

        :param mapping: address of the ``struct address_space`` of its file
        :raises drgn.FaultError: if a part of the tree was left out of the dump
        """
        place = self._read(vma, mapping)
        if not self._moves:
            return place
        for _ in range(_READINGS):
            if not place.suspicious(vma):
                break
            self._read_from(Snapshot(self._prog))
            again = self._read(vma, mapping)
            if again == place and not place.locked:
                break
            place = again
        return place

    def _read(self, vma: Vma, mapping: int) -> FilePlace:
        try:
            root, locked = self._mappings[mapping]
        except drgn.FaultError as error:
            damage_only(error)
            return FilePlace(lost=f"its file's mapping {mapping:#x} cannot be read")
        read, address = self._node, vma.address
        try:
            node = read(address)
            climb(read, root, address)
        except TreeError as error:
            return FilePlace(root=root, lost=str(error), locked=locked)
        first, before, stray = False, None, None
        own = vma_last_pgoff(vma)
        last: int | None = own
        # Half of all nodes have no children.
        if node.left or node.right:
            try:
                check_children(read, node, address)
            except TreeError as error:
                stray = str(error)
            try:
                last = subtree_last(read, node, own)
            except TreeError:
                last = None
        # A neighbour that cannot be reached is a child of somebody, or shows what is wrong itself.
        try:
            neighbour = rb_prev(read, address)
            first = neighbour == 0
            if neighbour:
                before = self._layout.vma.read_member(self._memory, neighbour, "vm_pgoff")
        except (TreeError, drgn.FaultError):
            pass
        return FilePlace(node, root, None, first, before, last, stray, locked)
