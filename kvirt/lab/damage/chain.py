# SPDX-License-Identifier: GPL-2.0-only
"""Damage to the chains of VMAs."""

from __future__ import annotations

from collections import Counter

from kvirt.lab.damage.scene import Damaged, Scene, damage, is_faulted, vma_range
from kvirt.mm.vma import Vma


def _forked(scene: Scene) -> Vma:
    users = Counter(v.anon_vma for v in scene.space.vmas())
    return scene.vma(
        "VMA that was faulted before a fork, with an anon_vma of its own",
        lambda v: is_faulted(v) and len(scene.space.chains[v.address].links) > 1 and users[v.anon_vma] == 1,
    )


def _alone(scene: Scene) -> Vma:
    """A VMA whose anon_vma is the only one of its chain, and no other VMA's."""
    users = Counter(v.anon_vma for v in scene.space.vmas())
    return scene.vma(
        "VMA with a single anon_vma of its own",
        lambda v: is_faulted(v) and len(scene.space.chains[v.address].links) == 1 and users[v.anon_vma] == 1,
    )


@damage("AVC-EMPTY")
def _avc_empty(scene: Scene) -> Damaged:
    vma = scene.page("small anonymous page").vma
    scene.set_vma(vma, "anon_vma", 0)
    return Damaged(
        "AVC-EMPTY",
        f"anon_vma of the VMA at {vma.vm_start:#x} is NULL, its chain is not empty",
        vma_range(vma),
        also=frozenset({"FOLIO-ANON-VMA", "ANON-VMA-ACTIVE"}),
    )


@damage("AVC-EMPTY/chain")
def _avc_empty_chain(scene: Scene) -> Damaged:
    vma = scene.page("small anonymous page").vma
    head = vma.address + scene.layout.vma.offset("chain_next")
    scene.set_vma(vma, "chain_next", head)
    scene.set_vma(vma, "chain_prev", head)
    return Damaged(
        "AVC-EMPTY",
        f"the chain of the VMA at {vma.vm_start:#x} is empty, anon_vma is not NULL",
        vma_range(vma),
        also=frozenset({"FOLIO-ANON-VMA", "AVC-IN-TREE"}),
    )


@damage("AVC-SELF")
def _avc_self(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    other = next(v for v in scene.space.vmas() if v.address != vma.address)
    link = scene.space.chains[vma.address].links[0]
    scene.set_avc(link.address, "vma", other.address)
    return Damaged(
        "AVC-SELF",
        f"a link of the chain at {vma.vm_start:#x} names another VMA",
        vma_range(vma),
        also=frozenset({"AVC-TREE-SUBTREE-LAST", "ANON-VMA-TREE-KEY", "FOLIO-RMAP-REACH"}),
    )


@damage("AVC-SELF/loop")
def _avc_loop(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    link = scene.space.chains[vma.address].links[-1]
    node = link.address + scene.layout.avc.offset("same_vma_next")
    scene.set_avc(link.address, "same_vma_next", node)
    return Damaged("AVC-SELF", f"the chain at {vma.vm_start:#x} runs in a loop", vma_range(vma))


@damage("AVC-SELF/wild")
def _avc_wild(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    scene.set_vma(vma, "chain_next", 0xDEAD000000000100)
    return Damaged(
        "AVC-SELF", f"the chain at {vma.vm_start:#x} starts with a poisoned pointer", vma_range(vma)
    )


@damage("AVC-SELF/twice")
def _avc_twice(scene: Scene) -> Damaged:
    vma = _forked(scene)
    links = scene.space.chains[vma.address].links
    # The ancestor's page is lost from sight, and so is whoever has it for parent or root.
    other = next(link for link in links if link.anon_vma != vma.anon_vma)
    scene.set_avc(other.address, "anon_vma", vma.anon_vma)
    return Damaged(
        "AVC-SELF",
        f"the chain at {vma.vm_start:#x} has the anon_vma {vma.anon_vma:#x} twice",
        vma_range(vma),
        also=frozenset({"ROOT-IN-CHAIN", "PARENT-IN-CHAIN", "FOLIO-ANON-VMA", "AVC-IN-TREE"}),
    )


@damage("AVC-SELF/unreadable")
def _avc_unreadable(scene: Scene) -> Damaged:
    vma = _forked(scene)
    links = scene.space.chains[vma.address].links
    other = next(link for link in links if link.anon_vma != vma.anon_vma)
    scene.set_avc(other.address, "anon_vma", 0xDEAD000000000100)
    return Damaged(
        "AVC-SELF",
        f"a link of the chain at {vma.vm_start:#x} leads to an anon_vma that cannot be read",
        vma_range(vma),
        also=frozenset({"ROOT-IN-CHAIN", "PARENT-IN-CHAIN", "FOLIO-ANON-VMA", "AVC-IN-TREE"}),
    )


@damage("ANON-VMA-ROOT/its-own")
def _root_not_its_own(scene: Scene) -> Damaged:
    vma = _forked(scene)
    root = scene.space.anon_vmas[vma.anon_vma].root
    scene.set_anon_vma(root, "root", vma.anon_vma)
    return Damaged(
        "ANON-VMA-ROOT",
        f"the root {root:#x} is not its own root",
        vma_range(vma),
        expected=root,
        # Once as one of the chain, and once as the root; and the same of each VMA that has it.
        findings=2,
        spread=True,
        also=frozenset({"ROOT-IN-CHAIN"}),
    )


@damage("ANON-VMA-ROOT")
def _anon_vma_root(scene: Scene) -> Damaged:
    vma = _forked(scene)
    scene.set_anon_vma(vma.anon_vma, "root", scene.foreign_root(vma))
    return Damaged(
        "ANON-VMA-ROOT",
        f"the anon_vma {vma.anon_vma:#x} has a stranger's root",
        vma_range(vma),
        findings=len(scene.space.chains[vma.address].links) - 1,
        also=frozenset({"ROOT-IN-CHAIN"}),
    )


@damage("ROOT-IN-CHAIN")
def _root_in_chain(scene: Scene) -> Damaged:
    vma = _alone(scene)
    scene.set_anon_vma(vma.anon_vma, "root", scene.foreign_root(vma))
    return Damaged("ROOT-IN-CHAIN", f"the anon_vma {vma.anon_vma:#x} has a stranger's root", vma_range(vma))


@damage("PARENT-IN-CHAIN")
def _parent_in_chain(scene: Scene) -> Damaged:
    vma = _alone(scene)
    scene.set_anon_vma(vma.anon_vma, "parent", scene.foreign_root(vma))
    return Damaged(
        "PARENT-IN-CHAIN",
        f"the anon_vma {vma.anon_vma:#x} has a stranger as parent",
        vma_range(vma),
        also=frozenset({"ANON-VMA-CHILDREN"}),
    )
