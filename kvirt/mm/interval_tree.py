# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's interval trees, read node by node in bounded walks (include/linux/interval_tree_generic.h).

They hang on ``anon_vma->rb_root``, with AVCs as nodes, and on ``mapping->i_mmap``, with VMAs as nodes.
Nodes are named by the address of the structure that they are in, not of its ``struct rb_node``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import TreeLayout
from kvirt.snapshot import Readable

# A red-black tree of 2^48 nodes is no deeper.
DEPTH_MAX = 96


class TreeError(Exception):
    """A tree cannot be followed: corrupted, or changed while it was read."""


class RbNode(NamedTuple):
    """A ``struct rb_node`` with its ``rb_subtree_last``; 0 is no node."""

    parent: int
    left: int
    right: int
    subtree_last: int


class Root(NamedTuple):
    """A ``struct rb_root_cached``; 0 is no node."""

    node: int
    leftmost: int


class Interval(NamedTuple):
    """A node with its key: page offsets, both included."""

    address: int
    rb: RbNode
    start: int
    last: int


def _words(size: int) -> struct.Struct:
    return struct.Struct(f"<{size // 8}Q")


def root_decoder(tree: TreeLayout) -> Callable[[bytes, int], Root]:
    """A function from bytes, and an offset in them, to the ``struct rb_root_cached`` there."""
    unpack = _words(16).unpack_from
    rb, root_node, leftmost = tree.rb, tree.root_node >> 3, tree.root_leftmost >> 3

    def decode(data: bytes, at: int) -> Root:
        words = unpack(data, at)
        # mm_take_all_locks() marks a root by the lowest bit.
        node, first = words[root_node] & ~3, words[leftmost]
        # rb_entry(); a wild pointer below the offset stays wild.
        return Root(node - rb if node > rb else node and 1, first - rb if first > rb else first and 1)

    return decode


def node_decoder(tree: TreeLayout) -> Callable[[bytes, int], RbNode]:
    """A function from bytes, and an offset in them, to the ``struct rb_node`` there."""
    unpack = _words(tree.span).unpack_from
    rb, last = tree.rb, tree.subtree_last - tree.rb >> 3
    at_parent, at_left, at_right = tree.parent >> 3, tree.left >> 3, tree.right >> 3

    def decode(data: bytes, at: int) -> RbNode:
        words = unpack(data, at)
        # rb_parent(): the lower bits hold the colour.
        parent, left, right = words[at_parent] & ~3, words[at_left], words[at_right]
        # rb_entry(), as above.
        return RbNode(
            parent - rb if parent > rb else parent and 1,
            left - rb if left > rb else left and 1,
            right - rb if right > rb else right and 1,
            words[last],
        )

    return decode


def node_reader(memory: Readable, tree: TreeLayout) -> Callable[[int], RbNode]:
    """A function that reads the node in the structure at an address.

    It raises :class:`TreeError` if it cannot be read, and :class:`drgn.FaultError` if the dump leaves it out.
    """
    decode, offset, span = node_decoder(tree), tree.rb, tree.span

    def read(address: int) -> RbNode:
        try:
            data = memory.read(address + offset, span)
        except (drgn.FaultError, OverflowError) as error:
            damage_only(error)
            raise TreeError(f"the tree leads to {address:#x}, which cannot be read") from None
        return decode(data, 0)

    return read


Read = Callable[[int], RbNode]


def climb(read: Read, root: Root, address: int) -> None:
    """Go from a node up to the root of its tree.

    :raises TreeError: if the root is not reached, or not by way of nodes that have each other as child and
        parent
    """
    node = read(address)
    for _ in range(DEPTH_MAX):
        if not node.parent:
            if root.node != address:
                raise TreeError(
                    f"{address:#x} has no parent and is not the root of the tree"
                    + (f", which is {root.node:#x}" if root.node else ", which is empty")
                )
            return
        parent = read(node.parent)
        if address not in (parent.left, parent.right):
            raise TreeError(f"{address:#x} is not a child of {node.parent:#x}, which it has as parent")
        address, node = node.parent, parent
    raise TreeError(f"the parents of {address:#x} lead in a circle")


def check_children(read: Read, node: RbNode, address: int) -> None:
    """See that what a node has as children has it as parent.

    :param address: of *node*
    :raises TreeError: if not, or if one cannot be read
    """
    for child in (node.left, node.right):
        if child and (parent := read(child).parent) != address:
            raise TreeError(
                f"{child:#x} is a child of {address:#x}, and has "
                + (f"{parent:#x} as parent" if parent else "no parent")
            )


def rb_prev(read: Read, address: int) -> int:
    """The node before another in order, 0 if it is the first (lib/rbtree.c).

    :raises TreeError: if nodes cannot be read or lead in a circle
    """
    node = read(address)
    if node.left:
        address = node.left
        for _ in range(DEPTH_MAX):
            right = read(address).right
            if not right:
                return address
            address = right
        raise TreeError(f"the nodes below {address:#x} lead in a circle")
    for _ in range(DEPTH_MAX):
        if not node.parent:
            return 0
        parent = read(node.parent)
        if parent.left != address:
            return node.parent
        address, node = node.parent, parent
    raise TreeError(f"the parents of {address:#x} lead in a circle")


def in_order(read: Read, root: Root, limit: int) -> Iterator[int]:
    """All nodes of a tree in order, from the root down; each is read once.

    :param limit: nodes at most
    :raises TreeError: where the tree cannot be followed; what came before it is valid
    """
    stack: list[tuple[int, int]] = []
    seen: set[int] = set()
    address = root.node
    while address or stack:
        while address:
            if address in seen:
                raise TreeError(f"the tree reaches {address:#x} twice")
            if len(seen) >= limit:
                raise TreeError(f"the tree has more than {limit} nodes")
            if len(stack) >= DEPTH_MAX:
                raise TreeError(f"the tree is deeper than {DEPTH_MAX} nodes")
            seen.add(address)
            node = read(address)
            stack.append((address, node.right))
            address = node.left
        above, address = stack.pop()
        yield above


def subtree_last(read: Read, node: RbNode, last: int) -> int:
    """What ``rb_subtree_last`` of a node should be, by its own last offset and its children's.

    :raises TreeError: if a child cannot be read
    """
    children = [read(child).subtree_last for child in (node.left, node.right) if child]
    return max([last, *children])


def _subtree_search(nodes: Mapping[int, Interval], address: int, start: int, last: int) -> Interval | None:
    # Each step goes one down, so that a tree with a loop ends too.
    for _ in range(DEPTH_MAX):
        node = nodes.get(address)
        if node is None:
            return None
        left = nodes.get(node.rb.left)
        if left is not None and start <= left.rb.subtree_last:
            address = node.rb.left
        elif node.start > last:
            return None
        elif start <= node.last:
            return node
        else:
            address = node.rb.right
    return None


def _iter_next(nodes: Mapping[int, Interval], node: Interval, start: int, last: int) -> Interval | None:
    right = node.rb.right
    for _ in range(DEPTH_MAX):
        below = nodes.get(right)
        if below is not None and start <= below.rb.subtree_last:
            return _subtree_search(nodes, right, start, last)
        came_from_right = True
        for _ in range(DEPTH_MAX):
            child = node.address
            parent = nodes.get(node.rb.parent)
            if parent is None:
                return None
            node, right = parent, parent.rb.right
            came_from_right = child == right
            if not came_from_right:
                break
        if came_from_right or last < node.start:
            return None
        if start <= node.last:
            return node
    return None


def iter_intervals(nodes: Mapping[int, Interval], root: Root, start: int, last: int) -> Iterator[Interval]:
    """What the kernel finds when it looks for the intervals that intersect another one.

    The kernel's own search with its own shortcuts (``INTERVAL_TREE_DEFINE()``: ``_iter_first()``,
    ``_iter_next()``, ``_subtree_search()``), so that in a damaged tree it misses what the kernel misses.

    :param nodes: the tree's nodes by address
    :param start: first page offset
    :param last: last page offset
    """
    top, leftmost = nodes.get(root.node), nodes.get(root.leftmost)
    if top is None or leftmost is None or top.rb.subtree_last < start or leftmost.start > last:
        return
    found = _subtree_search(nodes, root.node, start, last)
    seen: set[int] = set()
    while found is not None and found.address not in seen:
        seen.add(found.address)
        yield found
        found = _iter_next(nodes, found, start, last)
