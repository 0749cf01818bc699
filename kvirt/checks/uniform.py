# SPDX-License-Identifier: GPL-2.0-only
"""Pages that are judged by one of them, because nothing that is looked at tells them apart.

Memory that was faulted in from one end to the other is mostly so: one VMA, addresses and indexes that rise
together, and struct pages that say the same otherwise. Each page is read and compared; what is saved is to
come to the same verdict again for each.
"""

from __future__ import annotations

from collections.abc import Callable

import drgn

from kvirt.checks.registry import MANY, VmaTable
from kvirt.checks.sorting import Sorter
from kvirt.findings import PageCounts
from kvirt.layout import Layout
from kvirt.mm.folio import FOLIO_MAPPING_ANON, FOLIO_MAPPING_FLAGS, Folios, read_uniform_folios
from kvirt.mm.pagetable import Leaves, read_alike
from kvirt.pgtable import PageTables

_FILE_OR_ANON = (0, int(FOLIO_MAPPING_ANON))
_ULONG_MAX = (1 << 64) - 1


def _matter(tables: PageTables) -> int:
    """The bits of an entry by which it is judged, besides its page frame."""
    return tables.present[0] | tables.special | tables.valid


class Uniform:
    """What was said of pages of one process that stand for others."""

    def __init__(self, prog: drgn.Program, layout: Layout, table: VmaTable, sorter: Sorter) -> None:
        self._prog, self._layout, self._table, self._sorter = prog, layout, table, sorter
        self._known: dict[tuple[int, ...], PageCounts | None] = {}

    def judge(
        self, leaves: Leaves, judge: Callable[[Leaves, Folios], PageCounts | None]
    ) -> PageCounts | None:
        """Judge entries by the first of them; returns how they count, None if each has to be looked at.

        :param judge: judges entries by their folios; None if anything is not as it should be
        """
        first = self._first(leaves)
        if first is None:
            return None
        row, folio = first
        kind = self._kind(leaves, row, folio)
        if kind not in self._known:
            # By what was compared: while the kernel runs, another reading may be of another page.
            self._known[kind] = judge(leaves.part(slice(0, 1)), folio)
        one = self._known[kind]
        return None if one is None else one.times(len(leaves))

    def _first(self, leaves: Leaves) -> tuple[int, Folios] | None:
        """The row of some entries' VMA and the folio behind the first; None if they are not all alike."""
        number, layout = len(leaves), self._layout
        if leaves.level or number < MANY:
            return None
        first, last = leaves.ends()
        row = self._table.covering(first, last)
        if row is None or last - first != (number - 1) << layout.page_shift:
            return None
        if self._table.hugetlb_order[row] and not layout.hugetlb_index_in_pages:
            # Indexes that rise by one are not what is expected there.
            return None
        alike = read_alike(leaves, _matter(leaves.tables))
        if alike is None or not alike[0] & leaves.tables.present[0]:
            return None
        frames = alike[1]
        if self._sorter.any_zero(frames.first, 0, frames.lengths):
            return None
        folio = read_uniform_folios(self._prog, layout, frames)
        # What KSM remembers is of each page by itself.
        if folio is None or int(folio.mapping[0] & FOLIO_MAPPING_FLAGS) not in _FILE_OR_ANON:
            return None
        return row, folio

    def _kind(self, leaves: Leaves, row: int, folio: Folios) -> tuple[int, ...]:
        """What alike entries have in common, but for their place, that a check may ask for."""
        # Where the index of a page at address 0 would begin: the same for all that rise with their addresses.
        first, _ = leaves.ends()
        index = int(folio.index[0]) - (first >> self._layout.page_shift) & _ULONG_MAX
        return (
            row,
            int(leaves.entry[0]) & _matter(leaves.tables),
            int(folio.flags[0]),
            int(folio.mapping[0]),
            int(folio.page_mapcount[0]),
            index,
        )
