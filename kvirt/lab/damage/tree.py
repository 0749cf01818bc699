# SPDX-License-Identifier: GPL-2.0-only
"""Damage to anon_vmas and their trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvirt.errors import KvirtError
from kvirt.lab.damage.scene import Damaged, Scene, damage, is_faulted, vma_range
from kvirt.mm.folio import FOLIO_MAPPING_ANON
from kvirt.mm.forest import AnonTree, Family, read_family
from kvirt.mm.interval_tree import Interval
from kvirt.mm.vma import Vma, vma_pages

# What goes wrong at once for pages that are on a tree that was damaged.
UNREACHED = frozenset({"FOLIO-RMAP-REACH"})


def _families(scene: Scene) -> Iterator[Family]:
    seen: set[int] = set()
    for vma in scene.vmas():
        own = scene.space.anon_vmas.get(vma.anon_vma)
        if own is not None and own.root not in seen:
            seen.add(own.root)
            yield read_family(scene.prog, scene.layout, own.root, [vma.address])


def _tree(
    scene: Scene, wanted: str, fits: Callable[[AnonTree, Interval], bool]
) -> tuple[Family, int, Interval]:
    """An anon_vma with a node of its tree that fits."""
    for family in _families(scene):
        for anon_vma, tree in family.trees.items():
            for node in tree.nodes.values():
                if fits(tree, node):
                    return family, anon_vma, node
    raise KvirtError(f"The process has no {wanted}, which this damage needs: choose another one.")


def _owner(family: Family, anon_vma: int, node: Interval) -> Vma:
    return family.vmas[family.trees[anon_vma].links[node.address].vma]


def _is_leaf(node: Interval) -> bool:
    return not node.rb.left and not node.rb.right


def _set_pointer(scene: Scene, node: int, member: str, to: int) -> None:
    """Make up a pointer of a node; *to* is the other node's AVC, or 0."""
    tree = scene.layout.anon_tree
    scene.set_word(node + tree.rb + getattr(tree, member), to + tree.rb if to else 0)


def _unlink(scene: Scene, family: Family, anon_vma: int, node: Interval) -> None:
    """Take a leaf out of its tree, leaving nothing else wrong there."""
    layout, tree = scene.layout, family.trees[anon_vma]
    above = node.rb.parent
    if above:
        side = "left" if tree.nodes[above].rb.left == node.address else "right"
        _set_pointer(scene, above, side, 0)
    child, below = node.address, 0
    while above:
        parent = tree.nodes[above]
        children = {parent.rb.left, parent.rb.right} - {0, child}
        others = [tree.nodes[other].rb.subtree_last for other in children]
        below = max([parent.last, below, *others])
        scene.set_word(above + layout.anon_tree.subtree_last, below)
        child, above = above, parent.rb.parent
    root = anon_vma + layout.anon_vma.offset("rb_root")
    if tree.root.node == node.address:
        scene.set_word(root + layout.anon_tree.root_node, 0)
    if tree.root.leftmost == node.address:
        first = node.rb.parent + layout.anon_tree.rb if node.rb.parent else 0
        scene.set_word(root + layout.anon_tree.root_leftmost, first)


@damage("AVC-IN-TREE")
def _avc_in_tree(scene: Scene) -> Damaged:
    family, anon_vma, node = _tree(
        scene, "tree of two VMAs or more", lambda tree, node: len(tree.nodes) > 1 and _is_leaf(node)
    )
    _unlink(scene, family, anon_vma, node)
    vma = _owner(family, anon_vma, node)
    return Damaged(
        "AVC-IN-TREE",
        f"the VMA at {vma.vm_start:#x} is not in the tree of the anon_vma {anon_vma:#x} any more",
        vma_range(vma),
        node.address,
        also=UNREACHED,
    )


@damage("AVC-IN-TREE/empty")
def _avc_in_tree_empty(scene: Scene) -> Damaged:
    family, anon_vma, node = _tree(scene, "tree of one VMA", lambda tree, node: len(tree.nodes) == 1)
    _unlink(scene, family, anon_vma, node)
    vma = _owner(family, anon_vma, node)
    return Damaged(
        "AVC-IN-TREE",
        f"the tree of the anon_vma {anon_vma:#x} is empty",
        vma_range(vma),
        node.address,
        also=UNREACHED | {"ANON-VMA-CHILDREN"},
    )


@damage("AVC-IN-TREE/chain")
def _avc_in_tree_chain(scene: Scene) -> Damaged:
    def middle(vma: Vma) -> list[int]:
        links = scene.space.chains[vma.address].links
        roots = {a.root for a in scene.space.anon_vmas.values()}
        return [i for i, link in enumerate(links) if link.anon_vma not in {vma.anon_vma, *roots}]

    vma = scene.vma("VMA with an anon_vma that is neither the root nor its own", lambda v: bool(middle(v)))
    links = scene.space.chains[vma.address].links
    at = middle(vma)[0]
    link, offset = links[at], scene.layout.avc.offset("same_vma_next")
    head = vma.address + scene.layout.vma.offset("chain_next")
    before = links[at - 1].address + offset if at else head
    after = links[at + 1].address + offset if at + 1 < len(links) else head
    scene.set_word(before, after)
    scene.set_word(after + 8, before)
    return Damaged(
        "AVC-IN-TREE",
        f"a link of the VMA at {vma.vm_start:#x} is in its tree, and not in the chain",
        vma_range(vma),
        link.address,
        also=frozenset({"SAME-AV-SAME-CHAIN", "PARENT-IN-CHAIN", "FOLIO-ANON-VMA"}),
    )


@damage("ANON-VMA-TREE-KEY")
def _key(scene: Scene) -> Damaged:
    _, anon_vma, node = _tree(
        scene,
        "tree of three VMAs with different offsets",
        lambda tree, node: (
            bool(node.rb.left and node.rb.right)
            and tree.nodes[node.rb.left].start != tree.nodes[node.rb.right].start
        ),
    )
    _set_pointer(scene, node.address, "left", node.rb.right)
    _set_pointer(scene, node.address, "right", node.rb.left)
    return Damaged(
        "ANON-VMA-TREE-KEY",
        f"right and left are exchanged at a node of the tree of the anon_vma {anon_vma:#x}",
        also=UNREACHED,
        # The order, and with it the leftmost.
        findings=2,
    )


@damage("ANON-VMA-TREE-KEY/leftmost")
def _leftmost(scene: Scene) -> Damaged:
    family, anon_vma, _ = _tree(
        scene, "tree of two VMAs", lambda tree, node: tree.root.leftmost != node.address
    )
    root = anon_vma + scene.layout.anon_vma.offset("rb_root")
    last = next(reversed(family.trees[anon_vma].nodes))
    scene.set_word(root + scene.layout.anon_tree.root_leftmost, last + scene.layout.anon_tree.rb)
    return Damaged(
        "ANON-VMA-TREE-KEY",
        f"rb_leftmost of the tree of the anon_vma {anon_vma:#x} is its last node",
        None,
        anon_vma,
        also=UNREACHED,
    )


@damage("ANON-VMA-TREE-KEY/parent")
def _parent(scene: Scene) -> Damaged:
    family, anon_vma, node = _tree(
        scene, "tree of two VMAs", lambda tree, node: bool(node.rb.parent) and _is_leaf(node)
    )
    _set_pointer(scene, node.address, "parent", node.address)
    return Damaged(
        "ANON-VMA-TREE-KEY",
        f"a node of the tree of the anon_vma {anon_vma:#x} is its own parent",
        vma_range(_owner(family, anon_vma, node)),
        node.address,
        also=UNREACHED,
    )


@damage("ANON-VMA-TREE-KEY/loop")
def _loop(scene: Scene) -> Damaged:
    family, anon_vma, node = _tree(
        scene, "tree of two VMAs", lambda tree, node: bool(node.rb.parent) and _is_leaf(node)
    )
    _set_pointer(scene, node.address, "right", family.trees[anon_vma].root.node)
    return Damaged(
        "ANON-VMA-TREE-KEY",
        f"the tree of the anon_vma {anon_vma:#x} runs in a loop",
        None,
        anon_vma,
        also=UNREACHED,
    )


@damage("ANON-VMA-TREE-KEY/wild")
def _wild(scene: Scene) -> Damaged:
    _, anon_vma, node = _tree(scene, "tree", lambda tree, node: not node.rb.left)
    _set_pointer(scene, node.address, "left", 0xDEAD000000000100)
    return Damaged(
        "ANON-VMA-TREE-KEY",
        f"the tree of the anon_vma {anon_vma:#x} has a poisoned pointer",
        None,
        anon_vma,
        also=UNREACHED,
    )


@damage("AVC-TREE-SUBTREE-LAST")
def _subtree_last(scene: Scene) -> Damaged:
    family, anon_vma, node = _tree(
        scene, "tree", lambda tree, node: not node.rb.parent and node.last > node.start
    )
    scene.set_word(node.address + scene.layout.anon_tree.subtree_last, node.rb.subtree_last - 1)
    return Damaged(
        "AVC-TREE-SUBTREE-LAST",
        f"rb_subtree_last of a node of the anon_vma {anon_vma:#x} is one too low",
        vma_range(_owner(family, anon_vma, node)),
        node.address,
        also=UNREACHED,
    )


@damage("AVC-TREE-SUBTREE-LAST/stale")
def _stale(scene: Scene) -> Damaged:
    # Nothing is mapped that could tell by its index, and a tree of one node has no order.
    vma = scene.vma(
        "faulted VMA in a tree of its own",
        lambda v: (
            is_faulted(v) and len(read_family(scene.prog, scene.layout, v.anon_vma, [v.address]).vmas) == 1
        ),
    )
    (link,) = scene.space.chains[vma.address].links
    scene.set_word(
        link.address + scene.layout.anon_tree.subtree_last, vma.anon_pgoff + vma_pages(vma) - 1 + 7
    )
    return Damaged(
        "AVC-TREE-SUBTREE-LAST",
        f"the only node of the anon_vma {vma.anon_vma:#x} has the key of seven pages higher",
        vma_range(vma),
        link.address,
    )


@damage("ANON-VMA-ACTIVE")
def _active(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    number = scene.space.anon_vmas[vma.anon_vma].num_active_vmas
    scene.set_anon_vma(vma.anon_vma, "num_active_vmas", (number or 0) + 1)
    return Damaged(
        "ANON-VMA-ACTIVE",
        f"num_active_vmas of the anon_vma {vma.anon_vma:#x} is one too high",
        None,
        vma.anon_vma,
    )


@damage("ANON-VMA-CHILDREN")
def _children(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    number = scene.space.anon_vmas[vma.anon_vma].num_children
    scene.set_anon_vma(vma.anon_vma, "num_children", (number or 0) + 1)
    return Damaged(
        "ANON-VMA-CHILDREN",
        f"num_children of the anon_vma {vma.anon_vma:#x} is one too high",
        None,
        vma.anon_vma,
    )


@damage("ANON-VMA-REF")
def _ref(scene: Scene) -> Damaged:
    vma = scene.vma("faulted VMA", is_faulted)
    scene.set_anon_vma(vma.anon_vma, "refcount", 0)
    return Damaged("ANON-VMA-REF", f"the anon_vma {vma.anon_vma:#x} has no references", None, vma.anon_vma)


@damage("SAME-AV-SAME-CHAIN")
def _same_chain(scene: Scene) -> Damaged:
    vma = scene.vma(
        "two VMAs with the same anon_vma, inherited by fork",
        lambda v: (
            is_faulted(v)
            and len(scene.space.chains[v.address].links) > 1
            and sum(other.anon_vma == v.anon_vma for other in scene.space.vmas()) > 2
        ),
    )
    link = next(k for k in scene.space.chains[vma.address].links if k.anon_vma != vma.anon_vma)
    scene.set_avc(link.address, "anon_vma", scene.foreign_root(vma))
    return Damaged(
        "SAME-AV-SAME-CHAIN",
        f"a link of the VMA at {vma.vm_start:#x} leads to a stranger's anon_vma",
        vma_range(vma),
        # It has one that the others lack, and lacks one that they have.
        findings=2,
        also=frozenset(
            {"ANON-VMA-ROOT", "ROOT-IN-CHAIN", "PARENT-IN-CHAIN", "AVC-IN-TREE", "FOLIO-ANON-VMA"}
        ),
    )


@damage("FOLIO-RMAP-REACH")
def _reach(scene: Scene) -> Damaged:
    page = scene.page("small anonymous page")
    address = page.mapping - int(FOLIO_MAPPING_ANON)
    root = scene.space.anon_vmas[address].root
    family = read_family(scene.prog, scene.layout, root, [page.vma.address])
    tree = family.trees[address]
    scene.set_word(tree.root.node + scene.layout.anon_tree.subtree_last, 0)
    return Damaged(
        "FOLIO-RMAP-REACH",
        f"rb_subtree_last of the top of the tree of the anon_vma {address:#x} is 0",
        vma_range(page.vma),
        spread=True,
        also=frozenset({"AVC-TREE-SUBTREE-LAST"}),
    )
