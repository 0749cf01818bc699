# SPDX-License-Identifier: GPL-2.0-only
"""Checks on families of anon_vmas that no reading of a process would give."""

from kvirt.checks.registry import every_check
from kvirt.mm.forest import AnonTree, Family
from kvirt.mm.interval_tree import RbNode, Root
from kvirt.mm.rmap import AnonVma, AnonVmaChain, Chain

ANON_VMA = 0xFFFF888000300000
VMA = 0xFFFF888000200000
AVC = 0xFFFF888000400000

# Importing the module alone would register its checks before all others.
[anon_vma_ref] = [check.family for check in every_check() if check.id == "ANON-VMA-REF"]


def family(chain):
    root = Root(0, 0)
    freed = AnonVma(
        ANON_VMA,
        root=ANON_VMA,
        parent=ANON_VMA,
        refcount=0,
        tree=root,
        num_children=0,
        num_active_vmas=0,
        write_locked=False,
    )
    return Family(
        ANON_VMA, anon_vmas={ANON_VMA: freed}, trees={ANON_VMA: AnonTree(root)}, chains={VMA: Chain(chain)}
    )


def test_what_no_vma_leads_to_may_have_been_freed():
    assert list(anon_vma_ref(family(()))) == []


def test_a_chain_that_leads_to_a_freed_one_is_an_error():
    link = AnonVmaChain(AVC, VMA, ANON_VMA, same_vma_next=0, same_vma_prev=0, rb=RbNode(0, 0, 0, 0))
    [violation] = anon_vma_ref(family((link,)))
    assert (violation.address, violation.expected, violation.actual) == (ANON_VMA, 1, 0)
