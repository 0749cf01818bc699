# SPDX-License-Identifier: GPL-2.0-only
"""The families of anon_vmas that a process belongs to, all of them at once, as arrays.

Only sound families are read so: of trees and chains that can be followed, both ways, and that hold the same
AVCs, and with all that they lead to. Whatever is in the way ends the reading, and kvirt.mm.forest has to look
at one family after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import drgn
import numpy as np

from kvirt.mm.columns import LINKS_MAX, Columns, Links, anon_vma_dtype, avc_dtype, read_links
from kvirt.mm.interval_tree import DEPTH_MAX
from kvirt.mm.maple import MapleError
from kvirt.mm.pagetable import U64
from kvirt.mm.structs import (
    Finder,
    Rows,
    Structs,
    Unclear,
    all_of,
    array_of,
    read_structs,
    require,
)
from kvirt.mm.vma import read_vmas, start_anon_pgoffs
from kvirt.snapshot import Snapshot

# AVCs of several families that are read together. Bounds memory, where one family is not larger by itself.
_TOGETHER = 1 << 17
# Into so many parts are those divided that are more; what was read of them is lost.
_PARTS = 8
# Of an mm's address, and of address and first address of some VMAs: whether it has them.
Attached = Callable[[int, list[tuple[int, int]]], bool]


@dataclass(frozen=True, slots=True)
class Grove:
    """Families of anon_vmas. Rows are places in the arrays; -1 is none."""

    address: U64
    """Of each ``struct anon_vma``."""
    anon_vmas: Structs
    """What was read of each."""
    root: Rows
    """Row of each anon_vma's root."""
    parent: Rows
    top: Rows
    """Row of the AVC at the top of each tree; -1 where the tree is empty."""
    leftmost: U64
    """``rb_leftmost`` of each tree, as the address of the AVC; 0 for none."""

    avc: U64
    """Address of each AVC."""
    tree: Rows
    """Row of the anon_vma in whose tree it is."""
    left: Rows
    right: Rows
    """Rows of its children."""
    subtree_last: U64
    levels: list[slice]
    """AVCs that are equally deep in their trees; children come after their parents."""
    start: U64
    last: U64
    """Page offsets of each AVC's VMA, both included."""

    vma: U64
    """Address of each VMA."""
    vm_mm: U64
    anon_vma: Rows
    """Row of each VMA's own anon_vma."""
    link_vma: Rows
    """Of each link of the VMAs' chains: row of the VMA, ascending."""
    link_anon_vma: Rows
    """And of the anon_vma, ascending too in each VMA's chain."""

    def roots(self) -> Rows:
        """Row of the root of each VMA's family."""
        roots: Rows = self.root[self.anon_vma]
        return roots


class _TooMany(Exception):
    """So many AVCs are not read together."""


def read_groves(memory: Snapshot, columns: Columns, roots: Rows, attached: Attached) -> Iterator[Grove]:
    """Read families, all together or, if they are large, in parts.

    A part is left out if one of its families has to be looked at more closely.

    :param columns: a process that is in them
    :param roots: rows in it of their root anon_vmas
    """
    parts: list[Rows] = []
    try:
        yield _Reading(memory, columns, roots).grove(attached)
    except _TooMany:
        # Not here, where what was read so far is still to be had.
        parts = np.array_split(roots, min(_PARTS, len(roots)))
    except (Unclear, MapleError, drgn.FaultError):
        pass
    for part in parts:
        yield from read_groves(memory, columns, part, attached)


class _Reading:
    """The reading of a grove."""

    def __init__(self, memory: Snapshot, columns: Columns, roots: Rows) -> None:
        self._memory, self._layout = memory, columns.layout
        self._rb = np.uint64(self._layout.anon_tree.rb)
        self._avc_dtype, self._anon_vma_dtype = avc_dtype(self._layout), anon_vma_dtype(self._layout)
        self._roots = set(columns.anon_vmas[roots].tolist())
        self._divisible = len(roots) > 1
        # What was read so far, part by part. Rows count through all parts.
        self._anon_vmas: list[tuple[U64, Structs]] = []
        self._vmas: list[tuple[U64, Structs]] = []
        self._links: list[Links] = []
        self._avcs: list[tuple[U64, Structs]] = []
        self._tops: list[tuple[Rows, Rows]] = []
        # Of each level: rows of the trees' anon_vmas, and of the children.
        self._trees: list[Rows] = []
        self._children: list[tuple[Rows, Rows]] = []
        self._anon_vma_count = self._vma_count = self._avc_count = self._link_count = 0
        self._read(columns, roots)

    def _read(self, columns: Columns, roots: Rows) -> None:
        """Read what VMAs of a process lead to."""
        some = np.zeros(len(columns.anon_vmas), dtype=bool)
        some[roots] = True
        some = some[columns.root]
        links = columns.links
        on = some[columns.link_anon_vma]
        mask = columns.marked(links.vma[on])
        # All links of these VMAs, and not only those to these families.
        require(all_of(on == mask[links.vma]))
        # Only what chains lead to, and the roots.
        some[:] = False
        some[roots] = True
        some[columns.link_anon_vma[on]] = True
        addresses, records = columns.anon_vmas[some], columns.records[some]
        vmas, number = columns.address[mask], np.cumsum(mask) - 1
        part = Links(number[links.vma[on]], links.avc[on], links.anon_vma[on])
        self._add_vmas(vmas, columns.vmas[mask], part)
        known, known_vmas = set(addresses.tolist()), set(vmas.tolist())
        while True:
            new_vmas = set(self._read_trees(addresses, records).tolist()) - known_vmas
            if not new_vmas:
                return
            known_vmas |= new_vmas
            vmas = array_of(new_vmas)
            read = read_vmas(self._memory, self._layout, vmas)
            links = read_links(self._memory, self._layout, vmas, read)
            self._add_vmas(vmas, read, links)
            new = set(links.anon_vma.tolist()) - known
            known |= new
            addresses = array_of(new)
            records = read_structs(self._memory, self._anon_vma_dtype, addresses)

    def _add_vmas(self, addresses: U64, vmas: Structs, links: Links) -> None:
        self._vmas.append((addresses, vmas))
        self._links.append(Links(links.vma + self._vma_count, links.avc, links.anon_vma))
        self._vma_count += len(addresses)
        self._link_count += len(links.avc)
        require(self._link_count <= LINKS_MAX)

    def _read_trees(self, addresses: U64, anon_vmas: Structs) -> U64:
        """Add anon_vmas, and read their trees; returns the VMAs that these lead to."""
        require(self._roots.issuperset(anon_vmas["root"].tolist()))
        self._anon_vmas.append((addresses, anon_vmas))
        first, self._anon_vma_count = self._anon_vma_count, self._anon_vma_count + len(addresses)
        # mm_take_all_locks() marks a root by the lowest bit.
        node = anon_vmas["node"] & ~np.uint64(3)
        planted = np.flatnonzero(node)
        node, tree, owner = node[planted] - self._rb, planted + first, addresses[planted]
        self._tops.append((tree, np.arange(self._avc_count, self._avc_count + len(node))))
        parent = np.zeros(len(node), dtype=np.uint64)
        vmas = []
        for _ in range(DEPTH_MAX):
            if not len(node):
                break
            avcs = read_structs(self._memory, self._avc_dtype, node)
            left, right = avcs["left"], avcs["right"]
            # rb_parent(): the lower bits hold the colour. Nothing is met twice if each has come from its own
            # parent, in its own tree, and is not both children of it.
            require(all_of(avcs["rb_parent"] & ~np.uint64(3) == parent) and all_of(avcs["anon_vma"] == owner))
            require(all_of((left != right) | (left == 0)))
            self._avcs.append((node, avcs))
            self._trees.append(tree)
            vmas.append(avcs["vma"])
            row = self._avc_count
            self._avc_count += len(node)
            require(self._avc_count <= LINKS_MAX)
            if self._divisible and self._avc_count > _TOGETHER:
                raise _TooMany
            # Those below come next, first all that are left.
            lefts, rights = np.flatnonzero(left), np.flatnonzero(right)
            below = row + len(node)
            rows = np.full((2, len(node)), -1, dtype=np.intp)
            rows[0, lefts] = np.arange(below, below + len(lefts))
            rows[1, rights] = np.arange(below + len(lefts), below + len(lefts) + len(rights))
            self._children.append((rows[0], rows[1]))
            from_ = np.concatenate((lefts, rights))
            parent, tree, owner = node[from_] + self._rb, tree[from_], owner[from_]
            node = np.concatenate((left[lefts], right[rights])) - self._rb
        require(not len(node))
        return np.concatenate(vmas) if vmas else addresses[:0]

    def _ensure_attached(self, attached: Attached, addresses: U64, vmas: Structs) -> None:
        start, mm = vmas["vm_start"], vmas["vm_mm"]
        order = np.argsort(mm, kind="stable")
        begins = np.flatnonzero(mm[order][1:] != mm[order][:-1]) + 1
        for rows in np.split(order, begins):
            require(
                attached(
                    int(mm[rows[0]]), list(zip(addresses[rows].tolist(), start[rows].tolist(), strict=True))
                )
            )

    def grove(self, attached: Attached) -> Grove:
        """All that was read."""
        require(self._avcs)
        address, anon_vma = _join(self._anon_vmas)
        avc, node = _join(self._avcs)
        vma_address, vma = _join(self._vmas)
        self._ensure_attached(attached, vma_address, vma)
        link_vma, links, ends = (
            np.concatenate(column)
            for column in zip(*((part.vma, part.avc, part.anon_vma) for part in self._links), strict=True)
        )
        # Chains and trees hold the same.
        require(len(links) == len(avc) and all_of(np.sort(links) == np.sort(avc)))
        anon_vmas = Finder(address)
        root, parent = anon_vmas.find(anon_vma["root"]), anon_vmas.find(anon_vma["parent"])
        require(all_of(root >= 0) and all_of(parent >= 0))
        # Nothing is counted for another family.
        require(all_of(root[root] == root) and all_of(root[parent] == root))
        own, of = anon_vmas.find(vma["anon_vma"]), Finder(vma_address).find(node["vma"])
        link_anon_vma = anon_vmas.find(ends)
        require(all_of(own >= 0) and all_of(of >= 0) and all_of(link_anon_vma >= 0))
        # All links of a VMA are of its own anon_vma's family.
        require(all_of(root[link_anon_vma] == root[own][link_vma]))
        order = np.lexsort((link_anon_vma, link_vma))
        top = np.full(len(address), -1, dtype=np.intp)
        for trees, rows in self._tops:
            top[trees] = rows
        pgoff = start_anon_pgoffs(self._layout, vma)
        pages = (vma["vm_end"] - vma["vm_start"]) >> np.uint64(self._layout.page_shift)
        leftmost = anon_vma["leftmost"]
        # As root_decoder() tells them.
        require(all_of((leftmost == 0) | (leftmost > self._rb)))
        ends_of = np.cumsum([len(nodes) for nodes, _ in self._avcs]).tolist()
        left, right = (np.concatenate(column) for column in zip(*self._children, strict=True))
        return Grove(
            address=address,
            anon_vmas=anon_vma,
            root=root,
            parent=parent,
            top=top,
            leftmost=np.where(leftmost == 0, leftmost, leftmost - self._rb),
            avc=avc,
            tree=np.concatenate(self._trees),
            left=left,
            right=right,
            subtree_last=node["subtree_last"],
            levels=[slice(begin, end) for begin, end in zip([0, *ends_of], ends_of, strict=False)],
            start=pgoff[of],
            # vma_last_anon_pgoff()
            last=(pgoff + pages - np.uint64(1))[of],
            vma=vma_address,
            vm_mm=vma["vm_mm"],
            anon_vma=own,
            link_vma=link_vma[order],
            link_anon_vma=link_anon_vma[order],
        )


def _join(parts: list[tuple[U64, Structs]]) -> tuple[U64, Structs]:
    if len(parts) == 1:
        return parts[0]
    addresses, records = zip(*parts, strict=True)
    return np.concatenate(addresses), np.concatenate(records)
