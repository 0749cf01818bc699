# SPDX-License-Identifier: GPL-2.0-only
"""What KSM remembers of the pages that it merged (mm/ksm.c)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import drgn
import numpy as np

from kvirt.layout import KsmLayout, Layout
from kvirt.mm.arrays import constant, each, take
from kvirt.mm.folio import FOLIO_MAPPING_FLAGS, Folios
from kvirt.mm.pagetable import U64, Bool

# mm/ksm.c: the rmap_item is listed from the stable tree
_STABLE_FLAG = 0x200
# rmap_items of one stable node. A kernel has 256 unless told otherwise (max_page_sharing).
ITEMS_MAX = 1 << 16


@dataclass(slots=True)
class RmapItems:
    """The ``struct ksm_rmap_item`` of each of many pages. All arrays have one element a page."""

    address: U64
    """Of the rmap_item that KSM has for the page in this process; 0 where it has none, as all else then."""
    broken: Bool
    """Whether the page's stable node could not be followed."""
    linear_page_index: U64
    anon_vma: U64

    @classmethod
    def none(cls, pages: int) -> RmapItems:
        """For pages that KSM has not merged."""
        zero = constant(np.uint64(0), pages)
        return cls(zero, constant(np.bool_(False), pages), zero, zero)

    @property
    def found(self) -> Bool:
        """Which pages have an rmap_item."""
        return each(lambda address: address != 0, self.address)

    def take(self, mask: Bool) -> RmapItems:
        """Some of the pages."""
        return RmapItems(*(take(getattr(self, one.name), mask) for one in fields(self)))


class Ksm:
    """Finds the rmap_items of one process's pages."""

    def __init__(self, prog: drgn.Program, layout: Layout, mm: int) -> None:
        """Prepare.

        :param mm: address of the ``struct mm_struct``
        """
        self._prog = prog
        self._layout = layout
        self._mm = mm
        self._nodes: dict[tuple[int, int], dict[int, tuple[int, int, int]] | None] = {}

    def rmap_items(self, addresses: U64, pfns: U64, folios: Folios) -> RmapItems:
        """The rmap_items of pages, where their folios are KSM's and the kernel keeps indexes."""
        how = self._layout.ksm
        merged = np.flatnonzero(folios.is_ksm())
        if how is None or not len(merged):
            return RmapItems.none(len(addresses))
        zero = np.zeros(len(addresses), dtype=np.uint64)
        items = RmapItems(zero, np.zeros(len(addresses), dtype=bool), zero.copy(), zero.copy())
        for i in merged.tolist():
            node = int(folios.mapping[i]) & ~int(FOLIO_MAPPING_FLAGS)
            key = node, int(pfns[i])
            if key not in self._nodes:
                self._nodes[key] = self._read_node(how, *key)
            known = self._nodes[key]
            if known is None:
                items.broken[i] = True
            elif (item := known.get(int(addresses[i]))) is not None:
                items.address[i], items.linear_page_index[i], items.anon_vma[i] = item
        return items

    def _read_node(self, how: KsmLayout, node: int, pfn: int) -> dict[int, tuple[int, int, int]] | None:
        """rmap_items of a stable node, with index and anon_vma, by address; None if it is not sound.

        A node that heads a chain has nodes on its list, and no folio.
        """
        found: dict[int, tuple[int, int, int]] = {}
        page_mask = ~(self._layout.page_size - 1)
        try:
            stable = how.stable_node.read(self._prog, node)
            if stable["rmap_hlist_len"] >> 31 or stable["kpfn"] != pfn:
                return None
            link = stable["first"]
            for _ in range(ITEMS_MAX):
                if link == 0:
                    return found
                at = link - how.rmap_item.offset("next")
                item = how.rmap_item.read(self._prog, at)
                if item["head"] != node or not item["address"] & _STABLE_FLAG:
                    return None
                if item["mm"] == self._mm:
                    found[item["address"] & page_mask] = at, item["linear_page_index"], item["anon_vma"]
                link = item["next"]
        except (drgn.FaultError, OverflowError, ValueError):
            pass
        return None
