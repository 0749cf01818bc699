# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own memory, straight from an ELF core's file.

drgn walks the kernel's page tables for each read. Here each of the lowest is read once, and VMAs, AVCs and
anon_vmas lie side by side.
"""

from __future__ import annotations

from array import array

import drgn

from kvirt.layout import Layout
from kvirt.memory import Core, core_of
from kvirt.mm.pagetable import kernel_pages
from kvirt.snapshot import PAGE_BYTES, Snapshot, Table

_CACHE_KEY = "kvirt.kernel"
# Page tables that are kept: 16 MiB of them. When there are more, all are read anew.
_TABLES_MAX = 1 << 12


def snapshot_of(prog: drgn.Program, layout: Layout) -> Snapshot:
    """A new snapshot of a program's memory."""
    core = core_of(prog)
    if core is None:
        return Snapshot(prog)
    pages = prog.cache.get(_CACHE_KEY)
    if not isinstance(pages, _Pages) or pages.core is not core or pages.version != core.version:
        pages = prog.cache[_CACHE_KEY] = _Pages(prog, layout, core)
    return Snapshot(prog, pages.read)


class _Pages:
    """Where in a core the kernel's pages are."""

    def __init__(self, prog: drgn.Program, layout: Layout, core: Core) -> None:
        self._prog, self._tables = prog, layout.pgtable
        self.core, self.version = core, core.version
        tables = layout.pgtable
        # Above the bits that the tables resolve an address of the kernel has ones alone.
        bits = tables.shift(tables.levels - 1) + tables.kernel_entries.bit_length() - 1
        self._lowest = (1 << 64) - (1 << bits)
        self._nothing = array("q", [-1]) * tables.entries
        self._read: Table[array[int]] = Table(self._read_table)

    def read(self, start: int) -> bytes:
        """Read a page of 4 KiB at an address; nothing if drgn has to."""
        tables = self._tables
        pages = self._read[start >> tables.shift(1)]
        physical = pages[start >> tables.page_shift & (tables.entries - 1)]
        if physical < 0:
            return b""
        return self.core.page(physical + (start & (tables.page_size - 1)) >> PAGE_BYTES.bit_length() - 1)

    def _read_table(self, number: int) -> array[int]:
        if len(self._read) >= _TABLES_MAX:
            self._read.clear()
        address = number << self._tables.shift(1)
        if not self._lowest <= address < 1 << 64:
            return self._nothing
        try:
            return kernel_pages(self._prog, self._tables, address)
        except drgn.FaultError:
            return self._nothing
