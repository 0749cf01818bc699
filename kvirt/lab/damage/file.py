# SPDX-License-Identifier: GPL-2.0-only
"""Damage to the trees by which the mappings of a file are found."""

from __future__ import annotations

from collections.abc import Callable

from kvirt.errors import KvirtError
from kvirt.lab.damage.scene import Damaged, Scene, damage, vma_range
from kvirt.mm.i_mmap import FilePlace, FileTrees
from kvirt.mm.interval_tree import node_reader
from kvirt.mm.vma import Vma


def _place(scene: Scene, wanted: str, fits: Callable[[Vma, FilePlace], bool]) -> tuple[Vma, FilePlace, int]:
    """A VMA of a file with its place in the file's tree, and the file's mapping."""
    trees = FileTrees(scene.prog, scene.layout, scene.space.records.memory, moves=False)
    for vma in scene.vmas():
        file = scene.space.file(vma)
        if file is not None:
            place = trees.place(vma, file.f_mapping)
            if fits(vma, place):
                return vma, place, file.f_mapping
    raise KvirtError(f"The process has no {wanted}, which this damage needs: choose another one.")


def _word(scene: Scene, vma: int, member: str) -> int:
    """Address of a member of a VMA's node."""
    tree = scene.layout.file_tree
    return vma + tree.rb + int(getattr(tree, member))


@damage("FILE-TREE-IN")
def _in(scene: Scene) -> Damaged:
    vma, place, _ = _place(
        scene,
        "VMA that is below another in its file's tree",
        lambda v, p: (
            p.node is not None
            and not p.node.left
            and not p.node.right
            and bool(p.node.parent)
            and not p.first
        ),
    )
    assert place.node is not None
    parent = node_reader(scene.prog, scene.layout.file_tree)(place.node.parent)
    side = "left" if parent.left == vma.address else "right"
    scene.set_word(_word(scene, place.node.parent, side), 0)
    return Damaged(
        "FILE-TREE-IN",
        f"the VMA at {vma.vm_start:#x} is not in its file's tree any more",
        vma_range(vma),
        # Of the VMA above it.
        also=frozenset({"FILE-TREE-LAST"}),
    )


@damage("FILE-TREE-IN/empty")
def _in_empty(scene: Scene) -> Damaged:
    vma, _, mapping = _place(
        scene,
        "VMA that maps a file alone",
        lambda v, p: (
            p.node is not None
            and p.root is not None
            and p.root.node == v.address
            and not p.node.left
            and not p.node.right
        ),
    )
    root = mapping + scene.layout.mapping.offset("i_mmap")
    scene.set_word(root + scene.layout.file_tree.root_node, 0)
    scene.set_word(root + scene.layout.file_tree.root_leftmost, 0)
    return Damaged("FILE-TREE-IN", f"the tree of the file at {vma.vm_start:#x} is empty", vma_range(vma))


@damage("FILE-TREE-IN/loop")
def _in_loop(scene: Scene) -> Damaged:
    vma, _, _ = _place(
        scene,
        "VMA of a file without others below it in the file's tree",
        lambda v, p: p.node is not None and not p.node.left and not p.node.right,
    )
    scene.set_word(_word(scene, vma.address, "parent"), vma.address + scene.layout.file_tree.rb)
    return Damaged(
        "FILE-TREE-IN",
        f"the VMA at {vma.vm_start:#x} is its own parent in its file's tree",
        vma_range(vma),
        # Of the VMA above it.
        also=frozenset({"FILE-TREE-KEY"}),
    )


@damage("FILE-TREE-KEY")
def _key(scene: Scene) -> Damaged:
    vma, place, mapping = _place(
        scene,
        "VMA that is the first of several of its file",
        lambda v, p: p.first and p.node is not None and bool(p.node.parent),
    )
    assert place.root is not None
    root = mapping + scene.layout.mapping.offset("i_mmap")
    top = place.root.node + scene.layout.file_tree.rb
    scene.set_word(root + scene.layout.file_tree.root_leftmost, top)
    return Damaged(
        "FILE-TREE-KEY",
        f"rb_leftmost of the tree of the file at {vma.vm_start:#x} is not the first node",
        vma_range(vma),
    )


@damage("FILE-TREE-KEY/order")
def _order(scene: Scene) -> Damaged:
    vma, place, _ = _place(
        scene,
        "VMA that comes after others of the same file",
        lambda v, p: p.before is not None and p.before > 0 and not v.anon_vma,
    )
    assert place.before is not None
    scene.set_vma(vma, "vm_pgoff", place.before - 1)
    return Damaged(
        "FILE-TREE-KEY",
        f"vm_pgoff at {vma.vm_start:#x} is less than that of the VMA before it in the file's tree",
        vma_range(vma),
        also=frozenset({"FILE-TREE-LAST", "FILE-INDEX"}),
    )


@damage("FILE-TREE-KEY/child")
def _child(scene: Scene) -> Damaged:
    vma, _, _ = _place(
        scene,
        "VMA of a file without others below it in the file's tree",
        lambda v, p: p.node is not None and not p.node.left and not p.node.right,
    )
    scene.set_word(_word(scene, vma.address, "right"), 0xDEAD000000000100)
    return Damaged(
        "FILE-TREE-KEY",
        f"the VMA at {vma.vm_start:#x} has a poisoned pointer as a child in its file's tree",
        vma_range(vma),
    )


@damage("FILE-TREE-LAST")
def _last(scene: Scene) -> Damaged:
    vma, place, _ = _place(
        scene,
        "VMA of a file at the top of the file's tree",
        lambda v, p: p.node is not None and not p.node.parent,
    )
    assert place.node is not None
    scene.set_word(vma.address + scene.layout.file_tree.subtree_last, place.node.subtree_last + 1)
    return Damaged(
        "FILE-TREE-LAST",
        f"rb_subtree_last of the VMA at {vma.vm_start:#x} is one too high",
        vma_range(vma),
    )
