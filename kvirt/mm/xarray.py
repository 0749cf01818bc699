# SPDX-License-Identifier: GPL-2.0-only
"""A walk over an XArray that ends, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterator

import drgn

# MAX_ERRNO, include/linux/err.h: what is above are error numbers.
_MAX_ERRNO = 4095


def xa_for_each(xa: drgn.Object, troubles: list[str]) -> Iterator[tuple[int, int]]:
    """Each index and entry of an XArray or radix tree (lib/xarray.c).

    drgn's own helper follows a node that leads back to itself for ever, and gives up at the first one
    that cannot be read. Here what lies below such a node is left out, and the rest is walked.

    :param xa: ``struct xarray``, or ``struct radix_tree_root``, which is the same
    :param troubles: gets a half-sentence for each node that cannot be followed
    :raises drgn.FaultError: if the ``struct xarray`` itself cannot be read
    """
    node_type = xa.prog_.type("struct xa_node")
    head = xa.xa_head.value_()
    if not _xa_is_node(head):
        if head and not _xa_is_internal(head):
            yield 0, head
        return
    seen = set()
    # Pointer to the node, first index, and the shift that the node's must be below.
    stack = [(head, 0, 64)]
    while stack:
        pointer, first, above = stack.pop()
        address = pointer & ~3
        node = drgn.Object(xa.prog_, node_type, address=address)
        try:
            shift = node.shift.value_()
            slots = [slot.value_() for slot in node.slots.read_()]
        except drgn.FaultError as error:
            troubles.append(f"its node for {first} and above cannot be read ({error})")
            continue
        if shift >= above or address in seen:
            troubles.append(f"its node for {first} and above, at {address:#x}, belongs elsewhere")
            continue
        seen.add(address)
        below = []
        for i, slot in enumerate(slots):
            index = first + (i << shift)
            if shift == 0 and slot and not _xa_is_internal(slot):
                yield index, slot
            elif shift and _xa_is_node(slot):
                below.append((slot, index, shift))
            elif slot and not _xa_is_internal(slot):
                troubles.append(f"its node for {first} and above, at {address:#x}, holds no nodes")
                break
        stack += reversed(below)


def _xa_is_internal(entry: int) -> bool:
    """Nodes, and marks of the tree's own (include/linux/xarray.h)."""
    return entry & 3 == 2


def _xa_is_node(entry: int) -> bool:
    return _xa_is_internal(entry) and 4096 < entry < (1 << 64) - _MAX_ERRNO
