# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of anon_vmas: their interval trees, and what they count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from kvirt.checks.registry import Violation, family_check
from kvirt.findings import Severity
from kvirt.layout import Layout
from kvirt.mm.forest import Family
from kvirt.mm.grove import Grove
from kvirt.mm.pagetable import Bool
from kvirt.mm.structs import Rows
from kvirt.mm.vma import Vma


def _counts(layout: Layout) -> bool:
    """counting

    those whose struct anon_vma has num_active_vmas, 6.1 and later
    """
    return "num_active_vmas" in layout.anon_vma and "num_children" in layout.anon_vma


def _marked(grove: Grove, *rows: Rows) -> Bool:
    """Rows of anon_vmas as a mask."""
    mask = np.zeros(len(grove.address), dtype=bool)
    for some in rows:
        mask[some] = True
    return mask


@family_check(
    "AVC-IN-TREE",
    Severity.ERROR,
    says="Every link of a VMA's chain is in the tree of its anon_vma, and every link in such a tree is in "
    "the chain of a VMA.",
    relied_on="rmap_walk_anon(), which finds VMAs by these trees alone, mm/rmap.c",
    # What a grove has is in chains and trees alike.
    glance=lambda grove: _marked(grove),
)
def avc_in_tree(family: Family) -> Iterator[Violation]:
    """Chains and trees hold the same AVCs.

    Transient for VMAs that their mm does not have any more: munmap() and exit() take them out of the
    trees after that. An error if nobody holds the mmap_lock, as munmap() would.
    """
    in_chains = {link.address for chain in family.chains.values() for link in chain.links}
    leaving: dict[int, int] = {}
    for anon_vma, tree in family.trees.items():
        for link in tree.links.values():
            vma = family.vmas.get(link.vma)
            if link.anon_vma != anon_vma:
                yield Violation(
                    f"{_name(anon_vma)} has a link of another",
                    address=link.address,
                    expected=anon_vma,
                    actual=link.anon_vma,
                    vma=vma,
                )
            elif vma is None:
                yield Violation(
                    f"{_name(anon_vma)} leads to a VMA that cannot be read",
                    address=link.address,
                    actual=link.vma,
                )
            elif not family.attached[vma.address]:
                if family.leaving(vma):
                    leaving[vma.vm_mm] = leaving.get(vma.vm_mm, 0) + 1
                else:
                    yield Violation(
                        f"{_name(anon_vma)} has a link to a VMA that its mm {vma.vm_mm:#x} does not have, "
                        "and nobody is at work there",
                        address=link.address,
                        actual=link.vma,
                        vma=vma,
                    )
            elif link.address not in in_chains and family.chains[vma.address].broken is None:
                yield Violation(
                    f"{_name(anon_vma)} has a link that is in no VMA's chain",
                    address=link.address,
                    vma=vma,
                )
    for mm, number in leaving.items():
        yield Violation(
            f"links in the trees of the anon_vma {family.root:#x} and its descendants lead to VMAs that the "
            f"mm {mm:#x} does not have any more ({number}): munmap or exit is at work",
            address=family.root,
            severity=Severity.TRANSIENT,
        )
    for address, chain in family.chains.items():
        vma = family.vmas[address]
        if not family.attached[address]:
            continue
        for link in chain.links:
            home = family.trees.get(link.anon_vma)
            if home is not None and home.broken is None and link.address not in home.links:
                yield Violation(
                    f"a link of the VMA's chain is not in the tree of its anon_vma {link.anon_vma:#x}",
                    address=link.address,
                    vma=vma,
                )


def _name(anon_vma: int) -> str:
    return f"the tree of the anon_vma {anon_vma:#x}"


def _out_of_order(grove: Grove) -> Bool:
    """Whose tree is not sorted, or has another leftmost node. In a grove nodes are linked both ways."""
    first, end = np.arange(len(grove.avc)), grove.start.copy()
    wrong = np.zeros(len(grove.avc), dtype=bool)
    for level in reversed(grove.levels):
        rows = np.arange(level.start, level.stop)
        for child, is_left in ((grove.left[level], True), (grove.right[level], False)):
            some = child >= 0
            below, above = child[some], rows[some]
            if is_left:
                wrong[above] |= end[below] > grove.start[above]
                first[above] = first[below]
            else:
                wrong[above] |= grove.start[first[below]] < grove.start[above]
                end[above] = end[below]
    leftmost = np.where(grove.top >= 0, grove.avc[first[grove.top]], np.uint64(0))
    return _marked(grove, grove.tree[wrong], np.flatnonzero(leftmost != grove.leftmost))


@family_check(
    "ANON-VMA-TREE-KEY",
    Severity.ERROR,
    says="The nodes of an anon_vma's tree are in order of their VMAs' anonymous page offsets, linked both "
    "ways, and rb_leftmost is the first of them.",
    relied_on="anon_vma_interval_tree_iter_first(), mm/interval_tree.c",
    glance=_out_of_order,
)
def anon_vma_tree_key(family: Family) -> Iterator[Violation]:
    """The tree is a tree, and sorted. Equal offsets may be in any order.

    A tree that runs in a loop, or leads to memory that cannot be read, is reported here.
    """
    for anon_vma, tree in family.trees.items():
        if tree.broken is not None:
            yield Violation(
                f"{_name(anon_vma)} cannot be followed to its end: {tree.broken}", address=anon_vma
            )
            continue
        first = next(iter(tree.links), 0)
        if tree.root.leftmost != first:
            yield Violation(
                f"rb_leftmost of {_name(anon_vma)} is not its first node",
                address=anon_vma,
                expected=first,
                actual=tree.root.leftmost,
            )
        parents = {tree.root.node: 0}
        for address, link in tree.links.items():
            parents[link.rb.left] = parents[link.rb.right] = address
        for address, link in tree.links.items():
            if link.rb.parent != parents[address]:
                yield Violation(
                    f"{_name(anon_vma)} has a node with a wrong parent",
                    address=address,
                    expected=parents[address],
                    actual=link.rb.parent,
                    vma=family.vmas.get(link.vma),
                )
        for before, node in pairwise(tree.nodes.values()):
            if node.start < before.start:
                yield Violation(
                    f"{_name(anon_vma)} is out of order: before the offset {node.start:#x} comes "
                    f"{before.start:#x}",
                    address=node.address,
                    vma=family.vmas.get(tree.links[node.address].vma),
                )


def _ignorant(grove: Grove) -> Bool:
    """In whose tree a node has another last offset than its own or the largest that its children have."""
    expected = grove.last.copy()
    for child in (grove.left, grove.right):
        above = np.flatnonzero(child >= 0)
        expected[above] = np.maximum(expected[above], grove.subtree_last[child[above]])
    return _marked(grove, grove.tree[expected != grove.subtree_last])


@family_check(
    "AVC-TREE-SUBTREE-LAST",
    Severity.ERROR,
    says="Each node of an anon_vma's tree knows the last anonymous page offset of all VMAs below it.",
    relied_on="INTERVAL_TREE_DEFINE(), which prunes by it, include/linux/interval_tree_generic.h",
    glance=_ignorant,
)
def avc_tree_subtree_last(family: Family) -> Iterator[Violation]:
    """Nothing is pruned that is wanted, and no search goes astray."""
    for anon_vma, tree in family.trees.items():
        if tree.broken is not None:
            continue
        for address, node in tree.nodes.items():
            expected = node.last
            for child in (node.rb.left, node.rb.right):
                if child:
                    expected = max(expected, tree.links[child].rb.subtree_last)
            if node.rb.subtree_last != expected:
                yield Violation(
                    f"a node of {_name(anon_vma)} has a wrong rb_subtree_last",
                    address=address,
                    expected=expected,
                    actual=node.rb.subtree_last,
                    vma=family.vmas.get(tree.links[address].vma),
                )


def _numbers(grove: Grove, rows: Rows) -> Rows:
    """How often each anon_vma is named."""
    return np.bincount(rows, minlength=len(grove.address))


def _miscounted_vmas(grove: Grove) -> Bool:
    miscounted: Bool = grove.anon_vmas["num_active_vmas"] != _numbers(grove, grove.anon_vma)
    return miscounted


@family_check(
    "ANON-VMA-ACTIVE",
    Severity.ERROR,
    says="anon_vma->num_active_vmas is the number of VMAs that have it as their own.",
    relied_on="maybe_reuse_anon_vma(), which gives an anon_vma without VMAs to a child, mm/rmap.c",
    applies=_counts,
    glance=_miscounted_vmas,
)
def anon_vma_active(family: Family) -> Iterator[Violation]:
    """Counted over all processes.

    Not judged while a part of the family cannot be read.
    """
    if not family.whole:
        return
    owners = dict.fromkeys(family.anon_vmas, 0)
    for vma in family.vmas.values():
        if vma.anon_vma in owners:
            owners[vma.anon_vma] += 1
    for address, anon_vma in family.anon_vmas.items():
        if anon_vma.num_active_vmas != owners[address]:
            yield Violation(
                f"num_active_vmas of the anon_vma {address:#x} is wrong",
                address=address,
                expected=owners[address],
                actual=anon_vma.num_active_vmas,
            )


def _miscounted_children(grove: Grove) -> Bool:
    miscounted: Bool = grove.anon_vmas["num_children"] != _numbers(grove, grove.parent[grove.top >= 0])
    return miscounted


@family_check(
    "ANON-VMA-CHILDREN",
    Severity.ERROR,
    says="anon_vma->num_children is the number of anon_vmas with VMAs that have it as parent; a root is its "
    "own child.",
    relied_on="maybe_reuse_anon_vma() and unlink_anon_vmas(), mm/rmap.c",
    applies=_counts,
    glance=_miscounted_children,
)
def anon_vma_children(family: Family) -> Iterator[Violation]:
    """A child that no VMA is left of does not count."""
    if not family.whole:
        return
    children = dict.fromkeys(family.anon_vmas, 0)
    for anon_vma in family.anon_vmas.values():
        if anon_vma.tree.node and anon_vma.parent in children:
            children[anon_vma.parent] += 1
    for address, anon_vma in family.anon_vmas.items():
        if anon_vma.num_children != children[address]:
            yield Violation(
                f"num_children of the anon_vma {address:#x} is wrong",
                address=address,
                expected=children[address],
                actual=anon_vma.num_children,
            )


def _referenced_otherwise(grove: Grove) -> Bool:
    """Who has another number of references than is accounted for, be it more."""
    family, own = _numbers(grove, grove.root), np.arange(len(grove.root))
    otherwise: Bool = grove.anon_vmas["refcount"] != np.where(grove.root == own, family, 1)
    return otherwise


@family_check(
    "ANON-VMA-REF",
    Severity.ERROR,
    says="An anon_vma has a reference for its VMAs, and a root one more for each of its descendants.",
    relied_on="put_anon_vma(), which frees it with the last reference, mm/rmap.c",
    glance=_referenced_otherwise,
)
def anon_vma_ref(family: Family) -> Iterator[Violation]:
    """Too few is a use after free to come.

    For information only where there are more: migration and KSM hold some.
    """
    if not family.whole:
        return
    least = dict.fromkeys(family.anon_vmas, 1)
    least[family.root] = len(family.anon_vmas)
    wrong = [one for one in family.anon_vmas.values() if one.refcount != least[one.address]]
    in_chains = {link.anon_vma for chain in family.chains.values() for link in chain.links} if wrong else ()
    for anon_vma in wrong:
        address = anon_vma.address
        if address not in in_chains and not family.trees[address].links:
            # No VMA leads to it any more: while the kernel runs, it was freed after its process was read.
            continue
        if anon_vma.refcount < least[address]:
            yield Violation(
                f"the anon_vma {address:#x} has too few references",
                address=address,
                expected=least[address],
                actual=anon_vma.refcount,
            )
        else:
            yield Violation(
                f"somebody else holds references to the anon_vma {address:#x}, as migration and KSM do",
                address=address,
                expected=least[address],
                actual=anon_vma.refcount,
                severity=Severity.INFO,
            )


def _unlike(grove: Grove) -> Bool:
    """Whose VMAs have not all the same chain."""
    vmas = len(grove.vma)
    length = np.bincount(grove.link_vma, minlength=vmas)
    begin = np.cumsum(length) - length
    # The first VMA of each anon_vma, which the others are compared with, link by link.
    some = np.full(len(grove.address), -1, dtype=np.intp)
    some[grove.anon_vma[::-1]] = np.arange(vmas)[::-1]
    model = some[grove.anon_vma]
    wrong = length != length[model]
    alike = np.flatnonzero(~wrong & (model != np.arange(vmas)))
    numbers = length[alike]
    at = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    differs = (
        grove.link_anon_vma[np.repeat(begin[alike], numbers) + at]
        != grove.link_anon_vma[np.repeat(begin[model[alike]], numbers) + at]
    )
    wrong[np.repeat(alike, numbers)[differs]] = True
    return _marked(grove, grove.anon_vma[wrong])


@family_check(
    "SAME-AV-SAME-CHAIN",
    Severity.ERROR,
    says="VMAs that have the same anon_vma as their own have the same anon_vmas in their chains.",
    relied_on="is_mergeable_anon_vma(), which takes the one for the other, mm/vma.c",
    glance=_unlike,
)
def same_av_same_chain(family: Family) -> Iterator[Violation]:
    """Whoever shares one shares all."""
    groups: dict[int, list[Vma]] = {}
    for address, vma in family.vmas.items():
        chain = family.chains[address]
        if vma.anon_vma and chain.links and chain.broken is None and family.attached[address]:
            groups.setdefault(vma.anon_vma, []).append(vma)
    for anon_vma, group in groups.items():
        sets = [family.chains[vma.address].anon_vmas() for vma in group]
        if sets.count(sets[0]) == len(sets):
            continue
        ((usual, _),) = Counter(sets).most_common(1)
        for vma, members in zip(group, sets, strict=True):
            for missing in sorted(usual - members):
                yield Violation(
                    f"the chain lacks an anon_vma that others with the anon_vma {anon_vma:#x} have",
                    expected=missing,
                    vma=vma,
                )
            for extra in sorted(members - usual):
                yield Violation(
                    f"the chain has an anon_vma that others with the anon_vma {anon_vma:#x} lack",
                    actual=extra,
                    vma=vma,
                )
