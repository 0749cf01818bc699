# SPDX-License-Identifier: GPL-2.0-only
"""Pages that are judged by one of them, because nothing that is looked at tells them apart.

Memory that was faulted in from one end to the other is mostly so: one VMA, addresses and indexes that rise
together, and struct pages that say the same otherwise. Each page is read and compared; what is saved is to
come to the same verdict again for each.
"""

from __future__ import annotations

from collections.abc import Callable

import drgn
import numpy as np

from kvirt.checks.registry import MANY, VmaTable
from kvirt.checks.sorting import Sorter
from kvirt.findings import PageCounts
from kvirt.layout import Layout
from kvirt.mm.arrays import is_constant
from kvirt.mm.folio import FOLIO_MAPPING_ANON, FOLIO_MAPPING_FLAGS, read_uniform_folios
from kvirt.mm.pagetable import Leaves, leaf_pfn

_FILE_OR_ANON = (0, int(FOLIO_MAPPING_ANON))
_ULONG_MAX = (1 << 64) - 1


class Uniform:
    """What was said of pages of one process that stand for others."""

    def __init__(self, prog: drgn.Program, layout: Layout, table: VmaTable, sorter: Sorter) -> None:
        self._prog, self._layout, self._table, self._sorter = prog, layout, table, sorter
        self._known: dict[tuple[int, ...], PageCounts | None] = {}

    def judge(self, leaves: Leaves, judge: Callable[[Leaves], PageCounts | None]) -> PageCounts | None:
        """Judge entries by the first of them; returns how they count, None if each has to be looked at.

        :param judge: judges entries; None if anything is not as it should be
        """
        kind = self._kind(leaves)
        if kind is None:
            return None
        if kind not in self._known:
            self._known[kind] = judge(leaves.part(slice(0, 1)))
        one = self._known[kind]
        return None if one is None else one.times(len(leaves))

    def _kind(self, leaves: Leaves) -> tuple[int, ...] | None:
        """What the pages of some entries are, all of which are it; None if they are not all the same."""
        number, layout, tables = len(leaves), self._layout, leaves.tables
        if leaves.level or number < MANY:
            return None
        row = self._table.find(leaves.address)
        first, last = leaves.address[[0, -1]].tolist()
        if not is_constant(row) or row[0] < 0 or last - first != (number - 1) << layout.page_shift:
            return None
        matter = tables.present[0] | tables.special | tables.valid
        every = int(np.bitwise_and.reduce(leaves.entry)) & matter
        some = int(np.bitwise_or.reduce(leaves.entry)) & matter
        if every != some or not every & tables.present[0]:
            return None
        pfns = leaf_pfn(leaves)
        if self._sorter.any_zero(pfns, 0):
            return None
        folio = read_uniform_folios(self._prog, layout, pfns)
        # What KSM remembers is of each page by itself.
        if folio is None or folio["mapping"] & int(FOLIO_MAPPING_FLAGS) not in _FILE_OR_ANON:
            return None
        # Where the index of a page at address 0 would begin: the same for all that rise with their addresses.
        folio["index"] = folio["index"] - (first >> layout.page_shift) & _ULONG_MAX
        return int(row[0]), every, *folio.values()
