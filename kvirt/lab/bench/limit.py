# SPDX-License-Identifier: GPL-2.0-only
"""How fast a process's page tables and memmap can be read from an ELF core at all, and compared once.

What is to be read from where is found out before the time runs: the file is read in as few pieces as there
are runs, into the same buffers again and again, and each page's index is compared with what it should be.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import drgn
import numpy as np
import numpy.typing as npt
from drgn.helpers.linux.mm import follow_phys

from kvirt.elfcore import PT_LOAD, read_elf_core
from kvirt.layout import Layout
from kvirt.mm.address_space import AddressSpace
from kvirt.mm.folio import read_folios
from kvirt.mm.pagetable import U64, WalkTroubles, for_each_leaf, leaf_pfn, leaf_present
from kvirt.pgtable import PageTables

# Pages that are compared at once, so that what was read for them is still in the cache.
_BLOCK = 1 << 14
# And where they are all over the memory: so many that most of what lies between is wanted too.
_SCATTERED_BLOCK = 1 << 18
_TABLE_BYTES = 4096
# Bytes of the file so close are read in one piece.
_GAP = 4096
# The memmap is mapped in huge pages.
_SECTION_BYTES = 2 << 20

_Places = npt.NDArray[np.intp] | slice


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the file, and where in the buffer they go."""

    offset: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class _Block:
    """What is read for some pages, and what it is compared with."""

    tables: list[Piece]
    entries: _Places
    """Which entry of the tables maps each page."""
    structs: list[Piece]
    pages: _Places
    """Which struct page is each page's."""
    expected: U64
    """``folio->index`` of each."""


class Limit:
    """Reads the small anonymous pages of one process from an ELF core."""

    def __init__(self, prog: drgn.Program, layout: Layout, core: Path, space: AddressSpace) -> None:
        """Find out what is to be read."""
        elf = read_elf_core(core)
        assert elf is not None
        self._loads = [header for header in elf.headers if header.type == PT_LOAD]
        self._prog, self._layout, self._space = prog, layout, space
        self._sections: dict[int, int] = {}
        self._blocks: list[_Block] = []
        own = [vma for vma in space.vmas() if vma.anon_vma]
        found = []
        for leaves in for_each_leaf(prog, layout, space.pgd, WalkTroubles()):
            if leaves.level:
                continue
            folios = read_folios(prog, layout, leaf_pfn(leaves))
            keep = leaf_present(leaves) & folios.is_anon() & ~folios.large
            found.append((leaves.address[keep], folios.head[keep]))
        if found:
            address, pfn = (np.concatenate(columns) for columns in zip(*found, strict=True))
            for vma in own:
                first, last = np.searchsorted(address, [vma.vm_start, vma.vm_end]).tolist()
                expected = ((address - np.uint64(vma.vm_start)) >> np.uint64(12)) + np.uint64(vma.anon_pgoff)
                scattered = np.count_nonzero(np.diff(pfn[first:last]) != 1) * 8 > last - first
                size = _SCATTERED_BLOCK if scattered else _BLOCK
                for start in range(first, last, size):
                    part = slice(start, min(start + size, last))
                    self._blocks.append(self._block(address[part], pfn[part], expected[part]))
        self.pages = sum(len(block.expected) for block in self._blocks)
        self._tables = self._buffer([block.tables for block in self._blocks])
        self._structs = self._buffer([block.structs for block in self._blocks])

    def run(self, file: int) -> int:
        """Read and compare everything once; returns how many pages are not as they should be.

        :param file: descriptor of the core
        """
        wrong = 0
        tables, structs = self._tables.data, self._structs.data
        entries, pages = self._tables.view("<u8"), self._structs.view(self._layout.page_dtype)
        mappings, indexes = pages["mapping"], pages["index"]
        present, three = np.uint64(1), np.uint64(3)
        for block in self._blocks:
            for into, pieces in ((tables, block.tables), (structs, block.structs)):
                for piece in pieces:
                    os.preadv(file, [into[piece.at : piece.at + piece.size]], piece.offset)
            right = (entries[block.entries] & present) != 0
            right &= (mappings[block.pages] & three) == present
            right &= indexes[block.pages] == block.expected
            wrong += len(right) - int(np.count_nonzero(right))
        return wrong

    def compressed(self, file: int) -> list[bytes]:
        """What :meth:`run` reads, as a kdump-compressed core has it: each page of memory by itself."""
        seen = set()
        for block in self._blocks:
            for piece in (*block.tables, *block.structs):
                load = next(h for h in self._loads if h.offset <= piece.offset < h.offset + h.size)
                first = (piece.offset - load.offset) // 4096
                last = (piece.offset + piece.size - 1 - load.offset) // 4096
                seen |= {load.offset + 4096 * page for page in range(first, last + 1)}
        # Level 1 is what QEMU and makedumpfile ask for.
        return [zlib.compress(os.pread(file, 4096, offset), 1) for offset in sorted(seen)]

    def _block(self, address: U64, pfn: U64, expected: U64) -> _Block:
        bases, which = np.unique(address >> np.uint64(21), return_inverse=True)
        offsets = np.array([self._offset(self._table(int(base) << 21)) for base in bases], dtype=np.int64)
        tables, starts = pieces_of(offsets, _TABLE_BYTES)
        entries = starts[which] // 8 + (address >> np.uint64(12) & np.uint64(511)).astype(np.int64)
        size = self._layout.page.size
        at = pfn * np.uint64(size) + np.uint64(self._layout.vmemmap)
        section = at & np.uint64(-_SECTION_BYTES & (1 << 64) - 1)
        known, which = np.unique(section, return_inverse=True)
        bases = np.array([self._section(int(one)) for one in known], dtype=np.int64)
        offsets = bases[which] + (at - section).astype(np.int64)
        structs, starts = pieces_of(offsets, size)
        return _Block(tables, _simple(entries), structs, _simple(starts // size), expected)

    def _offset(self, physical: int) -> int:
        """Where in the file a physical address is."""
        for load in self._loads:
            if load.physical <= physical < load.physical + load.size:
                return load.offset + physical - load.physical
        raise LookupError(f"the core lacks {physical:#x}")

    def _section(self, address: int) -> int:
        """Where in the file a section of the memmap is."""
        if address not in self._sections:
            physical = follow_phys(self._prog["init_mm"].address_of_(), address).value_()
            self._sections[address] = self._offset(physical)
        return self._sections[address]

    def _table(self, address: int) -> int:
        return lowest_table(self._prog, self._layout.pgtable, self._space.pgd, address)

    @staticmethod
    def _buffer(blocks: list[list[Piece]]) -> npt.NDArray[np.uint8]:
        return np.zeros(max((sum(p.size for p in pieces) for pieces in blocks), default=0), dtype=np.uint8)


def lowest_table(prog: drgn.Program, tables: PageTables, pgd: int, address: int) -> int:
    """Physical address of the lowest table that maps an address.

    :param pgd: virtual address of the top table
    """
    entry = prog.read_u64(pgd + tables.slot(address, tables.levels - 1))
    for level in range(tables.levels - 2, 0, -1):
        entry = prog.read_u64(tables.physical(entry) + tables.slot(address, level), True)
    return tables.physical(entry)


def pieces_of(offsets: npt.NDArray[np.int64], size: int) -> tuple[list[Piece], npt.NDArray[np.int64]]:
    """As few pieces of a file as hold things of one size, and where in the buffer each of them is then."""
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    breaks = np.flatnonzero(np.diff(ordered) > size + _GAP) + 1
    places = np.empty(len(offsets), dtype=np.int64)
    pieces = []
    filled = 0
    for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ordered)], strict=True):
        first = int(ordered[start])
        pieces.append(Piece(first, filled, int(ordered[end - 1]) + size - first))
        places[order[start:end]] = filled + ordered[start:end] - first
        filled += pieces[-1].size
    return pieces, places


def _simple(places: npt.NDArray[np.int64]) -> _Places:
    """A slice where they follow each other, which numpy need not copy."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places.astype(np.intp)
