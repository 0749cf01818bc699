# SPDX-License-Identifier: GPL-2.0-only
"""The VMAs of a process and what they are tied to, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvirt.layout import Layout
from kvirt.mm.pagetable import U64, Bool
from kvirt.mm.rmap import CHAIN_MAX
from kvirt.mm.structs import (
    Finder,
    Rows,
    Structs,
    all_of,
    array_of,
    read_structs,
    require,
)
from kvirt.mm.vma import start_anon_pgoffs
from kvirt.snapshot import Snapshot

# Links of all chains together.
LINKS_MAX = 1 << 22


def avc_dtype(layout: Layout) -> np.dtype[np.void]:
    """An AVC, with its place in its chain and in its tree."""
    tree = layout.anon_tree
    return layout.avc.dtype(
        ("vma", "anon_vma", "same_vma_next", "same_vma_prev"),
        {
            "rb_parent": tree.rb + tree.parent,
            "left": tree.rb + tree.left,
            "right": tree.rb + tree.right,
            "subtree_last": tree.subtree_last,
        },
    )


def anon_vma_dtype(layout: Layout) -> np.dtype[np.void]:
    """An anon_vma, with the root of its tree."""
    how, tree = layout.anon_vma, layout.anon_tree
    at = how.offset("rb_root")
    optional = [name for name in ("num_children", "num_active_vmas") if name in how]
    return how.dtype(
        ("root", "parent", "refcount", *optional),
        {"node": at + tree.root_node, "leftmost": at + tree.root_leftmost},
    )


@dataclass(frozen=True, slots=True)
class Links:
    """The links of the chains of some VMAs, ``vma->anon_vma_chain``: those of one depth after the other."""

    vma: Rows
    """Row of the VMA."""
    avc: U64
    """Address of the AVC."""
    anon_vma: U64
    """Address of the anon_vma."""


def read_links(memory: Snapshot, layout: Layout, addresses: U64, vmas: Structs) -> Links:
    """Follow the chains of some VMAs, all of them a link at a time.

    :param addresses: of the VMAs
    :param vmas: what was read of them, from :func:`kvirt.mm.vma.read_vmas`
    :raises Unclear: if a chain does not lead back to its VMA both ways, by AVCs of this VMA
    """
    dtype, to_link = avc_dtype(layout), np.uint64(layout.avc.offset("same_vma_next"))
    head = before = addresses + np.uint64(layout.vma.offset("chain_next"))
    node, last = vmas["chain_next"], vmas["chain_prev"]
    row = np.arange(len(addresses))
    depths = []
    number = 0
    for _ in range(CHAIN_MAX):
        on = node != head
        if not all_of(on):
            ends = ~on
            require(all_of(last[ends] == before[ends]))
            head, before, node, last, row = head[on], before[on], node[on], last[on], row[on]
        if not len(node):
            break
        number += len(node)
        require(number <= LINKS_MAX)
        address = node - to_link
        avcs = read_structs(memory, dtype, address)
        require(all_of(avcs["same_vma_prev"] == before) and all_of(avcs["vma"] == addresses[row]))
        # Without the rest of the AVCs, which a view would keep.
        depths.append((row, address, avcs["anon_vma"].copy()))
        before, node = node, avcs["same_vma_next"]
    require(not len(node))
    if not depths:
        return Links(np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64))
    rows, links, anon_vmas = (np.concatenate(column) for column in zip(*depths, strict=True))
    return Links(rows, links, anon_vmas)


@dataclass(frozen=True, slots=True)
class Columns:
    """VMAs of one process, in order of their addresses, with their chains and the anon_vmas in these."""

    layout: Layout
    first: U64
    last: U64
    """First and last address of each VMA's entry in the maple tree."""
    address: U64
    """Of each ``struct vm_area_struct``."""
    vmas: Structs
    """Its members, as in :class:`kvirt.mm.vma.Vma`."""
    anon_pgoff: U64
    """``vma_start_anon_pgoff()``"""
    anon_vma: Rows
    """Row of each VMA's own anon_vma, -1 if it has none."""
    links: Links
    link_anon_vma: Rows
    """Row of each link's anon_vma."""
    anon_vmas: U64
    """Address of each anon_vma."""
    finder: Finder
    """Finds them by their addresses."""
    records: Structs
    """What was read of each."""
    root: Rows
    parent: Rows
    """Rows of its root and its parent."""

    pairs: Rows
    """The row of each link's VMA times the number of anon_vmas, plus the row of its anon_vma; ascending."""

    def marked(self, *rows: Rows) -> Bool:
        """Rows of VMAs as a mask."""
        mask = np.zeros(len(self.address), dtype=bool)
        for some in rows:
            mask[some] = True
        return mask

    def in_chain(self, vmas: Rows, anon_vmas: Rows) -> Bool:
        """Whether anon_vmas are in the chains of VMAs, by the rows of both; -1 is in none."""
        if not len(self.pairs):
            return np.zeros(len(vmas), dtype=bool)
        wanted = vmas * len(self.anon_vmas) + anon_vmas
        at = np.searchsorted(self.pairs, wanted)
        at[at == len(self.pairs)] = 0
        found: Bool = (self.pairs[at] == wanted) & (anon_vmas >= 0)
        return found


def read_columns(
    memory: Snapshot, layout: Layout, first: U64, last: U64, address: U64, vmas: Structs
) -> Columns:
    """Read what VMAs are tied to.

    :param first: first address of each VMA's entry in the maple tree
    :param last: and last address
    :param address: of the VMAs
    :param vmas: what was read of them, from :func:`kvirt.mm.vma.read_vmas`
    :raises Unclear: if anything is in the way
    """
    links = read_links(memory, layout, address, vmas)
    dtype = anon_vma_dtype(layout)
    some = {*links.anon_vma.tolist(), *vmas["anon_vma"].tolist()} - {0}
    anon_vmas = array_of(some)
    records = read_structs(memory, dtype, anon_vmas)
    more = array_of({*records["root"].tolist(), *records["parent"].tolist()} - some)
    if len(more):
        records = np.concatenate((records, read_structs(memory, dtype, more)))
        anon_vmas = np.concatenate((anon_vmas, more))
    finder = Finder(anon_vmas)
    root, parent = finder.find(records["root"]), finder.find(records["parent"])
    require(all_of(root >= 0) and all_of(parent >= 0))
    link_anon_vma = finder.find(links.anon_vma)
    require(all_of(link_anon_vma >= 0))
    return Columns(
        layout=layout,
        first=first,
        last=last,
        address=address,
        vmas=vmas,
        anon_pgoff=start_anon_pgoffs(layout, vmas),
        anon_vma=finder.find(vmas["anon_vma"]),
        links=links,
        link_anon_vma=link_anon_vma,
        anon_vmas=anon_vmas,
        finder=finder,
        records=records,
        root=root,
        parent=parent,
        pairs=np.sort(links.vma * len(anon_vmas) + link_anon_vma),
    )
