# SPDX-License-Identifier: GPL-2.0-only
"""The swap cache: which folio an entry of swap has in memory, for many entries at once."""

from __future__ import annotations

from collections.abc import Iterator

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout, SwapSpacesLayout, SwapTableLayout
from kvirt.mm.pagetable import U64, Bool

# Position of the type in a swp_entry_t: SWP_TYPE_SHIFT, include/linux/swapops.h
_SWP_TYPE_SHIFT = 58
# mm/swap_table.h: SWP_TB_PFN_MARK, and the page frame above it
_PFN_MARK, _PFN_MARK_BITS = 2, 2
_PFN_MASK = np.uint64((1 << 40) - 1)
# mm/swap.h: SWAP_ADDRESS_SPACE_SHIFT, pages of swap that one address space is for
_SPACE_SHIFT = 14
# include/linux/xarray.h
_XA_CHUNK_SHIFT = 6
_XA_CHUNK_MASK = (1 << _XA_CHUNK_SHIFT) - 1

_Rows = npt.NDArray[np.intp]


def swp_entry(types: U64, offsets: U64) -> U64:
    """Value of a ``swp_entry_t`` (include/linux/swapops.h)."""
    return types << np.uint64(_SWP_TYPE_SHIFT) | offsets


def _groups(keys: U64) -> Iterator[tuple[int, _Rows]]:
    """Each value of *keys*, with the rows that have it."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    starts = [0, *(np.flatnonzero(np.diff(keys[order])) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        yield int(keys[order[start]]), order[start:end]


class SwapCache:
    """Finds folios in the swap cache of one kernel (``swap_cache_get_folio()``, mm/swap_state.c)."""

    def __init__(self, prog: drgn.Program, layout: Layout) -> None:
        self._prog = prog
        self._layout = layout

    def lookup(self, types: U64, offsets: U64) -> tuple[U64, Bool]:
        """Page frames of the folios of swap entries, 0 for those without, and which could be looked up.

        Every page of a large folio leads to the folio's first page.

        :param types: swap types
        :param offsets: swap offsets, in pages
        """
        how = self._layout.swap_cache
        found = np.zeros(len(types), dtype=np.uint64)
        known = np.zeros(len(types), dtype=bool)
        if how is None:
            return found, known
        for type_, rows in _groups(types):
            try:
                if isinstance(how, SwapTableLayout):
                    self._in_tables(how, type_, rows, offsets, found, known)
                else:
                    self._in_spaces(how, type_, rows, offsets, found, known)
            except drgn.FaultError:
                # The swap area itself: no entry of it can be looked up.
                continue
        return found, known

    def _in_tables(
        self, how: SwapTableLayout, type_: int, rows: _Rows, offsets: U64, found: U64, known: Bool
    ) -> None:
        """``swap_table_get()``, mm/swap_table.h."""
        info = self._prog.read_u64(how.swap_info + type_ * 8)
        area = how.info.read(self._prog, info)
        slots = how.slots
        rows = rows[offsets[rows] < np.uint64(area["max"])]
        for cluster, members in _groups(offsets[rows] // np.uint64(slots)):
            at = rows[members]
            slot = (offsets[at] % np.uint64(slots)).astype(np.intp)
            first, last = int(slot.min()), int(slot.max())
            try:
                table = how.cluster.read(self._prog, area["cluster_info"] + cluster * how.cluster.size)[
                    "table"
                ]
                if table == 0:
                    known[at] = True
                    continue
                data = self._prog.read(table + first * 8, (last - first + 1) * 8)
            except drgn.FaultError:
                continue
            found[at], known[at] = self._decode(np.frombuffer(data, dtype="<u8")[slot - first])

    def _decode(self, entries: U64) -> tuple[U64, Bool]:
        """Entries of a swap table: page frames, and which are entries at all."""
        is_pfn = (entries & np.uint64((1 << _PFN_MARK_BITS) - 1)) == _PFN_MARK
        pfn = np.where(is_pfn, entries >> np.uint64(_PFN_MARK_BITS) & _PFN_MASK, np.uint64(0))
        shadow = (entries & np.uint64(1)) != 0
        bad = entries == np.uint64((1 << 64) - 8)
        # The first swap tables (6.18) held the folio's address.
        pointed, is_pointer = self._folio_pfn(entries)
        is_pointer &= ~is_pfn & ~shadow
        known: Bool = is_pfn | shadow | bad | is_pointer | (entries == 0)
        return np.where(is_pointer, pointed, pfn), known

    def _folio_pfn(self, pointers: U64) -> tuple[U64, Bool]:
        """Page frames of folios by their addresses, and which are addresses of folios at all."""
        base, size = np.uint64(self._layout.vmemmap), np.uint64(self._layout.page.size)
        good: Bool = (pointers >= base) & ((pointers - base) % size == 0)
        return np.where(good, (pointers - base) // size, np.uint64(0)), good

    def _in_spaces(
        self, how: SwapSpacesLayout, type_: int, rows: _Rows, offsets: U64, found: U64, known: Bool
    ) -> None:
        """``swap_address_space()`` and ``swap_cache_index()``, mm/swap.h of 6.12."""
        spaces = self._prog.read_u64(how.swapper_spaces + type_ * 8)
        number = self._prog.read_u32(how.nr_swapper_spaces + type_ * 4)
        rows = rows[offsets[rows] >> np.uint64(_SPACE_SHIFT) < np.uint64(number)]
        for space, members in _groups(offsets[rows] >> np.uint64(_SPACE_SHIFT)):
            at = rows[members]
            try:
                head = how.space.read(self._prog, spaces + space * how.space.size)["xa_head"]
            except drgn.FaultError:
                continue
            # Until 6.10 the index is the offset in the whole area, later that in its part; the other
            # of the two never leads to anything.
            entries, good = self._xa_load(how, head, offsets[at] & np.uint64((1 << _SPACE_SHIFT) - 1))
            if space:
                rest = np.flatnonzero(entries == 0)
                entries[rest], whole_good = self._xa_load(how, head, offsets[at[rest]])
                good[rest] &= whole_good
            pfn, is_folio = self._folio_pfn(entries)
            # Values are shadows of what was there.
            empty = (entries == 0) | ((entries & np.uint64(1)) != 0)
            found[at] = np.where(is_folio & ~empty, pfn, np.uint64(0))
            known[at] = good & (is_folio | empty)

    def _xa_load(self, how: SwapSpacesLayout, head: int, indexes: U64) -> tuple[U64, Bool]:
        """``xa_load()`` of many indexes (lib/xarray.c): entries, and which could be looked up."""
        entries = np.zeros(len(indexes), dtype=np.uint64)
        good = np.ones(len(indexes), dtype=bool)
        # Entry, rows that lead through it, and shift of the node it was found in.
        todo = [(head, np.arange(len(indexes), dtype=np.intp), 64)]
        slots_at = how.node.offset("slots")
        while todo:
            entry, rows, above = todo.pop()
            if entry & 3 != 2 or entry <= 4096:
                # Not a node. Above the lowest level it is there for all indexes of its slot, and as the
                # head for index 0 alone.
                entries[rows] = entry if above < 64 else np.where(indexes[rows] == 0, entry, 0)
                continue
            try:
                data = self._prog.read(entry - 2, how.node.size)
            except drgn.FaultError:
                good[rows] = False
                continue
            shift = how.node.decode(data)["shift"]
            if shift >= above or shift % _XA_CHUNK_SHIFT:
                # Levels only go down, or a damaged tree would have no end.
                good[rows] = False
                continue
            rows_in = indexes[rows] >> np.uint64(shift)
            if above == 64:
                inside = rows_in <= _XA_CHUNK_MASK
                rows, rows_in = rows[inside], rows_in[inside]
            slots = np.frombuffer(data, dtype="<u8", count=_XA_CHUNK_MASK + 1, offset=slots_at)
            where = rows_in & np.uint64(_XA_CHUNK_MASK)
            if shift == 0:
                # Here are the most, and no nodes.
                found = slots[where]
                sibling = (found & np.uint64(3) == 2) & (found >> np.uint64(2) < _XA_CHUNK_MASK)
                entries[rows] = np.where(sibling, slots[found >> np.uint64(2) & _XA_CHUNK_MASK], found)
                continue
            for slot, members in _groups(where):
                below = int(slots[slot])
                if below & 3 == 2 and below >> 2 < _XA_CHUNK_MASK:
                    # A sibling: the entry is in the slot that it names.
                    below = int(slots[below >> 2])
                todo.append((below, rows[members], shift))
        return entries, good
