# SPDX-License-Identifier: GPL-2.0-only
"""Invariants of the chain that ties a VMA to its anon_vmas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvirt.checks.registry import VmaContext, VmaViolations, vma_check
from kvirt.findings import Severity
from kvirt.mm.columns import Columns
from kvirt.mm.pagetable import Bool


@vma_check(
    "AVC-EMPTY",
    Severity.ERROR,
    says="A VMA has an anon_vma if and only if its chain is not empty.",
    relied_on="unlink_anon_vmas(), mm/rmap.c",
    faulting=True,
    glance=lambda columns: (columns.anon_vma >= 0) != columns.marked(columns.links.vma),
)
def avc_empty(contexts: Sequence[VmaContext]) -> VmaViolations:
    """The pointer and the list say the same.

    Transient while the anon_vma is locked for write: a first fault sets the pointer before it fills the
    chain (mm/rmap.c: __anon_vma_prepare()).
    """
    for context in contexts:
        vma, links = context.vma, context.chain.links
        if bool(vma.anon_vma) == bool(links) or (context.chain.broken and not links):
            continue
        if links:
            yield context.violation(
                f"the VMA has no anon_vma, and its chain has {len(links)} links",
                expected=links[0].anon_vma,
                actual=0,
            )
        else:
            yield context.violation("the VMA has an anon_vma, and its chain is empty", actual=vma.anon_vma)


def _not_self(columns: Columns) -> Bool:
    """Which chains lack the own anon_vma, or have one twice; they are sound otherwise."""
    faulted = np.flatnonzero(columns.anon_vma >= 0)
    lack = faulted[~columns.in_chain(faulted, columns.anon_vma[faulted])]
    twice = columns.pairs[1:][columns.pairs[1:] == columns.pairs[:-1]]
    return columns.marked(lack, twice // max(1, len(columns.anon_vmas)))


@vma_check(
    "AVC-SELF",
    Severity.ERROR,
    says="Every link of a VMA's chain points back to the VMA, each anon_vma is in it once, and the VMA's "
    "own is among them.",
    relied_on="rmap_walk_anon(), anon_vma_clone() and unlink_anon_vmas(), mm/rmap.c",
    faulting=True,
    glance=_not_self,
)
def avc_self(contexts: Sequence[VmaContext]) -> VmaViolations:
    """The chain is this VMA's own, and sound.

    A chain that runs in a loop, or leads to memory that cannot be read, is reported here.
    """
    for context in contexts:
        vma, chain, anon_vmas = context.vma, context.chain, context.space.anon_vmas
        if chain.broken is not None:
            yield context.violation(f"the chain cannot be followed to its end: {chain.broken}")
        for link in chain.links:
            if link.vma != vma.address:
                yield context.violation(
                    f"the link at {link.address:#x} belongs to another VMA",
                    expected=vma.address,
                    actual=link.vma,
                )
            elif link.anon_vma not in anon_vmas:
                yield context.violation(
                    f"the link at {link.address:#x} points to an anon_vma that cannot be read",
                    actual=link.anon_vma,
                )
        if len(chain.anon_vmas()) < len(chain.links):
            for anon_vma, count in Counter(link.anon_vma for link in chain.links).items():
                if count > 1:
                    yield context.violation(f"the chain has the same anon_vma {count} times", actual=anon_vma)
        whole = chain.broken is None and chain.links and vma.anon_vma
        if whole and vma.anon_vma not in chain.anon_vmas():
            yield context.violation("the VMA's own anon_vma is not in its chain", actual=vma.anon_vma)


def _several_roots(columns: Columns) -> Bool:
    """Which VMAs have a link to another family, or a root that is none."""
    root, own, links = columns.root, columns.anon_vma, columns.links
    faulted = np.flatnonzero(own >= 0)
    no_root = faulted[(root[root] != root)[own[faulted]]]
    other = root[columns.link_anon_vma] != root[own[links.vma]]
    return columns.marked(no_root, links.vma[other])


@vma_check(
    "ANON-VMA-ROOT",
    Severity.ERROR,
    says="All anon_vmas of a VMA's chain have the same root, which is its own root.",
    relied_on="anon_vma_lock_*(), which lock the root alone, include/linux/rmap.h",
    glance=_several_roots,
)
def anon_vma_root(contexts: Sequence[VmaContext]) -> VmaViolations:
    """One root over the whole chain."""
    for context in contexts:
        own = context.anon_vma(context.vma.anon_vma)
        if own is None or context.chain.broken is not None:
            continue
        others = [context.space.anon_vmas.get(address, own) for address in context.chain.anon_vmas()]
        for other in sorted([other for other in others if other.root != own.root]):
            yield context.violation(
                f"the anon_vma {other.address:#x} of the chain has another root than the VMA's own",
                expected=own.root,
                actual=other.root,
            )
        root = context.anon_vma(own.root)
        if root is None:
            why = f"the root of the VMA's anon_vma {own.address:#x} cannot be read"
            yield context.violation(why, actual=own.root)
        elif root.root != root.address:
            why = f"the root {root.address:#x} is not its own root"
            yield context.violation(why, expected=root.address, actual=root.root)


def _rootless(columns: Columns) -> Bool:
    faulted = np.flatnonzero(columns.anon_vma >= 0)
    return columns.marked(faulted[~columns.in_chain(faulted, columns.root[columns.anon_vma[faulted]])])


@vma_check(
    "ROOT-IN-CHAIN",
    Severity.ERROR,
    says="The root of a VMA's anon_vma is in its chain.",
    relied_on="__folio_set_anon(), which puts shared folios on the root, mm/rmap.c",
    glance=_rootless,
)
def root_in_chain(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Whoever has a descendant has the root."""
    for context in contexts:
        chain, own = context.chain, context.anon_vma(context.vma.anon_vma)
        if own is None or chain.broken is not None or not chain.links:
            continue
        if own.root not in chain.anon_vmas():
            yield context.violation("the root of the VMA's anon_vma is not in its chain", expected=own.root)


def _orphaned(columns: Columns) -> Bool:
    vma = columns.links.vma
    return columns.marked(vma[~columns.in_chain(vma, columns.parent[columns.link_anon_vma])])


@vma_check(
    "PARENT-IN-CHAIN",
    Severity.ERROR,
    says="The parent of each anon_vma in a VMA's chain is in the chain too.",
    relied_on="unlink_anon_vmas(), which counts children down in the parent, mm/rmap.c",
    glance=_orphaned,
)
def parent_in_chain(contexts: Sequence[VmaContext]) -> VmaViolations:
    """Nothing else keeps the parent alive."""
    for context in contexts:
        if context.chain.broken is not None:
            continue
        members, known = context.chain.anon_vmas(), context.space.anon_vmas
        anon_vmas = [known[address] for address in members if address in known]
        for anon_vma in sorted([one for one in anon_vmas if one.parent not in members]):
            yield context.violation(
                f"the parent of the chain's anon_vma {anon_vma.address:#x} is not in the chain",
                actual=anon_vma.parent,
            )
