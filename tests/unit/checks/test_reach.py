# SPDX-License-Identifier: GPL-2.0-only
"""The search in trees that break an invariant, of folios that many VMAs map."""

import importlib
from types import SimpleNamespace

import numpy as np

from kvirt.checks.registry import every_check
from kvirt.mm.forest import AnonTree
from kvirt.mm.interval_tree import Interval, RbNode, Root
from kvirt.mm.rmap import AnonVmaChain, Chain

ANON_VMA, AVCS = 7, 1000

# Importing the module alone would register its checks before all others.
every_check()
reach = importlib.import_module("kvirt.checks.reach")


def crowd(vmas, hidden):
    """Pages of VMAs of one page each, which share an anon_vma; the node *hidden* knows too low a last."""
    tree = AnonTree(Root(0, AVCS))

    def build(first, end, parent):
        if first == end:
            return 0
        middle = (first + end) // 2
        address = AVCS + middle
        left, right = build(first, middle, address), build(middle + 1, end, address)
        last = middle - 1 if middle == hidden else end - 1
        rb = RbNode(parent, left, right, last)
        tree.nodes[address] = Interval(address, rb, middle, middle)
        tree.links[address] = AnonVmaChain(address, middle + 1, ANON_VMA, 0, 0, rb)
        return address

    tree.root = Root(build(0, vmas, 0), AVCS)
    index = np.arange(vmas, dtype=np.uint64)
    table = SimpleNamespace(
        vmas=[SimpleNamespace(address=i + 1) for i in range(vmas)],
        unsound={ANON_VMA: tree},
        space=SimpleNamespace(chain=lambda vma: Chain((tree.links[AVCS + vma.address - 1],))),
        temporary_stack=np.zeros(vmas, dtype=bool),
    )
    folios = SimpleNamespace(
        index=index,
        nr_pages=np.ones(vmas, dtype=np.int64),
        anon_vma=lambda: np.full(vmas, ANON_VMA, dtype=np.uint64),
        is_anon=lambda: np.ones(vmas, dtype=bool),
    )
    return SimpleNamespace(
        table=table,
        folios=folios,
        row=np.arange(vmas),
        index=lambda: index,
        expected_index=lambda: index,
    )


def test_a_tree_is_prepared_once_for_all_vmas_that_share_it(monkeypatch):
    prepared = []
    points = reach._points
    monkeypatch.setattr(reach, "_points", lambda tree: prepared.append(tree) or points(tree))
    # The top of the left half, which the search then leaves out from there on.
    found = reach.folio_rmap_reach(crowd(300, hidden=75))
    assert np.flatnonzero(found.mask).tolist() == [*range(75, 150)]
    assert len(prepared) == 1


def test_nothing_to_judge():
    batch = crowd(3, hidden=None)
    batch.folios.is_anon = lambda: np.zeros(3, dtype=bool)
    assert not reach.folio_rmap_reach(batch).mask.any()
