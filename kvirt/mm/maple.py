# SPDX-License-Identifier: GPL-2.0-only
"""The maple tree, read a node at a time.

drgn's ``mt_for_each()`` reads each pivot and slot on its own, which takes seconds for a process with
tens of thousands of VMAs, and it follows a tree with a loop for ever.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from operator import lt
from typing import NamedTuple

import drgn

from kvirt.filtered import damage_only
from kvirt.layout import Layout
from kvirt.snapshot import Readable

_ULONG_MAX = (1 << 64) - 1
# lib/maple_tree.c: MAPLE_HEIGHT_MAX
_HEIGHT_MAX = 31
# include/linux/maple_tree.h: MAPLE_NODE_MASK, MAPLE_NODE_TYPE_SHIFT, MAPLE_NODE_TYPE_MASK
_NODE_MASK = 255
_LEAF_64, _RANGE_64, _ARANGE_64 = 1, 2, 3
# include/linux/xarray.h: xa_mk_internal(257), XA_ZERO_ENTRY
_XA_ZERO_ENTRY = 257 << 2 | 2


class MapleError(Exception):
    """The tree cannot be followed: corrupted, or changed while it was read."""


def _is_node(entry: int) -> bool:
    # xa_is_node()
    return entry & 3 == 2 and entry > 4096


class _Node(NamedTuple):
    """What is in use of a node (``ma_data_end()`` and friends)."""

    lasts: tuple[int, ...]
    """Last index of each slot: the pivots, and the node's own last index."""
    slots: tuple[int, ...]
    leaf: bool


def _read_node(memory: Readable, layout: Layout, entry: int, max_index: int) -> _Node:
    maple = layout.maple
    address = entry & ~_NODE_MASK
    try:
        data = memory.read(address, maple.node_words * 8)
    except drgn.FaultError as error:
        damage_only(error)
        raise MapleError(f"maple node {address:#x} cannot be read ({error})") from None
    words = struct.unpack(f"<{maple.node_words}Q", data)
    # ma_dead_node(): a node that was replaced is its own parent.
    if words[0] & ~_NODE_MASK == address:
        raise MapleError(f"maple node {address:#x} is dead")
    type_ = entry >> 3 & 0xF
    if type_ == _ARANGE_64:
        pivots, slots = words[maple.arange_pivots], words[maple.arange_slots]
        end = data[maple.arange_meta_end]
    elif type_ in (_LEAF_64, _RANGE_64):
        pivots, slots = words[maple.range_pivots], words[maple.range_slots]
        last = pivots[-1]
        if last == 0:
            end = data[maple.range_meta_end]
        else:
            end = len(pivots) - 1 if last == max_index else len(pivots)
    else:
        raise MapleError(f"maple node {address:#x} is of unknown type {type_}")
    if end >= len(slots):
        raise MapleError(f"maple node {address:#x} claims {end + 1} slots and has {len(slots)}")
    return _Node((*pivots[:end], max_index), slots[: end + 1], type_ == _LEAF_64)


def _sound(lasts: tuple[int, ...], first: int, high: int) -> int:
    """How many of a node's last indexes, from the first on, are in order and in the node's range."""
    if first <= lasts[0] and lasts[-1] <= high and all(map(lt, lasts, lasts[1:])):
        return len(lasts)
    for sound, last in enumerate(lasts):
        if not first <= last <= high:
            return sound
        first = last + 1
    return len(lasts)


def mt_for_each(memory: Readable, layout: Layout, ma_root: int) -> Iterator[tuple[int, int, int]]:
    """Go through the entries of a maple tree in order.

    :param ma_root: value of ``mt->ma_root``
    :return: iterator of (first index, last index, entry); zero entries are left out
    :raises MapleError: at the place where the tree cannot be followed; what came before it is valid
    """
    if not _is_node(ma_root):
        if ma_root:
            yield 0, 0, ma_root
        return
    seen: set[int] = set()
    stack = [(ma_root, 0, _ULONG_MAX, 1)]
    while stack:
        entry, low, high, depth = stack.pop()
        address = entry & ~_NODE_MASK
        if address == 0:
            raise MapleError("a maple node has an empty slot where a node should be")
        if address in seen or depth > _HEIGHT_MAX:
            raise MapleError(f"maple node {address:#x} is reached twice")
        seen.add(address)
        lasts, slots, leaf = _read_node(memory, layout, entry, high)
        children = []
        first = low
        for slot, last in zip(slots, lasts, strict=True):
            if not first <= last <= high:
                raise MapleError(f"maple node {address:#x} has pivots out of order")
            if leaf:
                if slot and slot != _XA_ZERO_ENTRY:
                    yield first, last, slot
            else:
                children.append((slot, first, last, depth + 1))
            first = last + 1
        stack += reversed(children)


class MapleTree:
    """A maple tree that is asked for many indexes; each node on the way is read once."""

    def __init__(self, memory: Readable, layout: Layout, ma_root: int) -> None:
        """Prepare.

        :param ma_root: value of ``mt->ma_root``
        """
        self._memory = memory
        self._layout = layout
        self._root = ma_root
        # By entry and range, with the number of slots from the first on whose last indexes are in order.
        self._nodes: dict[tuple[int, int, int], tuple[_Node, int]] = {}

    def _node(self, entry: int, first: int, high: int) -> tuple[_Node, int]:
        key = entry, first, high
        found = self._nodes.get(key)
        if found is None:
            if entry & ~_NODE_MASK == 0:
                raise MapleError("a maple node has an empty slot where a node should be")
            node = _read_node(self._memory, self._layout, entry, high)
            found = self._nodes[key] = node, _sound(node.lasts, first, high)
        return found

    def mas_walk(self, index: int) -> tuple[int, int, int]:
        """The entry at an index with the range that it is stored for (lib/maple_tree.c).

        :return: first index, last index and entry, which is 0 if nothing is stored there
        :raises MapleError: if the tree cannot be followed to there
        """
        entry = self._root
        if not _is_node(entry):
            return (0, 0, entry) if index == 0 else (1, _ULONG_MAX, 0)
        first, high = 0, _ULONG_MAX
        for _ in range(_HEIGHT_MAX):
            (lasts, slots, leaf), sound = self._node(entry, first, high)
            slot = bisect_left(lasts, index, 0, sound)
            if slot == sound:
                raise MapleError(f"maple node {entry & ~_NODE_MASK:#x} has pivots out of order")
            if slot:
                first = lasts[slot - 1] + 1
            entry, high = slots[slot], lasts[slot]
            if leaf:
                return first, high, 0 if entry == _XA_ZERO_ENTRY else entry
        raise MapleError("the maple tree is deeper than any")

    def mtree_load(self, index: int) -> int:
        """The entry at an index, 0 if there is none (lib/maple_tree.c).

        :raises MapleError: as :meth:`mas_walk`
        """
        return self.mas_walk(index)[2]
