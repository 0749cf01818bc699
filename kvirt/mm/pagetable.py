# SPDX-License-Identifier: GPL-2.0-only
"""x86-64 page tables, read whole tables at a time and decoded with numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.memory import core_of

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

_ENTRIES = 512
_TABLE_BYTES = 4096
HUGE_BYTES = _ENTRIES * _TABLE_BYTES
"""Of what one entry of a table of the second level maps."""
# arch/x86/include/asm/pgtable_types.h
_PAGE_PRESENT = np.uint64(1 << 0)
_PAGE_RW = np.uint64(1 << 1)
_PAGE_USER = np.uint64(1 << 2)
_PAGE_ACCESSED = np.uint64(1 << 5)
_PAGE_DIRTY = np.uint64(1 << 6)
_PAGE_NOPTISHADOW = np.uint64(1 << 58)
_PAGE_NX = np.uint64(1 << 63)
_PAGE_PSE = np.uint64(1 << 7)
_PAGE_PROTNONE = np.uint64(1 << 8)
_PAGE_SPECIAL = np.uint64(1 << 9)
# What an entry that leads to a table has, _PAGE_TABLE, and what it may have: the accessed bit is cleared
# where the kernel looks for young tables, and page table isolation marks those of the top table.
_TABLE_HAS = _PAGE_PRESENT | _PAGE_RW | _PAGE_USER | _PAGE_DIRTY
_TABLE_MAY = _TABLE_HAS | _PAGE_ACCESSED | _PAGE_NX | _PAGE_NOPTISHADOW
# The address, and with it a bit for encrypted memory, may be any: what does not exist cannot be read.
_TABLE_NOT = ~(_TABLE_MAY | np.uint64((1 << 52) - _TABLE_BYTES))
# An entry with these alone is none: a processor may set them in an empty one (_KNL_ERRATUM_MASK).
_ERRATUM = np.uint64(1 << 5 | 1 << 6)
# arch/x86/include/asm/pgtable_64.h
SWP_TYPE_BITS = 5
_SWP_OFFSET_SHIFT = 9 + SWP_TYPE_BITS
# PTE tables decoded at once: 1 Mi pages. Bounds memory, whatever the size of the process.
_TABLES_AT_ONCE = 2048
# And where nothing is won by reading much at once: what belongs to 32 Ki pages stays in a processor's cache
# while it is judged.
_TABLES_IN_CACHE = 64
# Tables that are tried one by one when they cannot be read; the rest of those is then given up unread.
_UNREADABLE_MAX = 1 << 12


@dataclass(slots=True)
class Leaves:
    """Leaf entries of one level, that map or stand for pages. All arrays have one element an entry."""

    address: U64
    """Virtual address of the first page."""
    entry: U64
    """The entry as the hardware sees it."""
    level: int
    """0: PTE, 1: PMD, 2: PUD."""

    def __len__(self) -> int:
        return len(self.address)

    @property
    def pages(self) -> int:
        """Base pages that one entry maps."""
        return int(_ENTRIES**self.level)

    def part(self, which: slice) -> Leaves:
        """Neighbouring entries, in place."""
        return Leaves(self.address[which], self.entry[which], self.level)

    def take(self, mask: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Leaves:
        """Some of the entries."""
        if mask.dtype == np.bool_ and mask.all():
            return self
        return Leaves(self.address[mask], self.entry[mask], self.level)


@dataclass(slots=True)
class WalkTroubles:
    """What a walk could not follow."""

    unreadable: list[int] = field(default_factory=list)
    """Virtual addresses at which a page table starts that could not be read, or is its own ancestor."""


def leaf_present(leaves: Leaves) -> Bool:
    """Which entries are present for the kernel: ``pte_present()``, ``pmd_present()``, ``pud_present()``.

    An entry without access rights (PROT_NONE, NUMA hinting) is present for the kernel, though not for
    the processor, and so is a huge page about to be split.
    """
    bits = _PAGE_PRESENT | _PAGE_PROTNONE
    if leaves.level:
        bits |= _PAGE_PSE
    if len(leaves) and np.bitwise_and.reduce(leaves.entry) & bits:
        return np.ones(len(leaves), dtype=bool)
    present: Bool = (leaves.entry & bits) != 0
    return present


def leaf_special(leaves: Leaves) -> Bool:
    """Which present entries have no struct page to look at: ``pte_special()`` and its kin."""
    if not np.bitwise_or.reduce(leaves.entry) & _PAGE_SPECIAL:
        return np.zeros(len(leaves), dtype=bool)
    special: Bool = (leaves.entry & _PAGE_SPECIAL) != 0
    return special


def leaf_pfn(layout: Layout, leaves: Leaves) -> U64:
    """Page frame of each present entry: ``pte_pfn()``, ``pmd_pfn()``, ``pud_pfn()``.

    Entries that the processor must not follow keep their page frame inverted against speculation
    (arch/x86/include/asm/pgtable-invert.h).
    """
    entry = leaves.entry
    if not np.bitwise_and.reduce(entry) & _PAGE_PRESENT:
        entry = np.where((entry & _PAGE_PRESENT) == 0, ~entry, entry)
    mask = layout.physical_mask & ~((_TABLE_BYTES * leaves.pages) - 1)
    return (entry & np.uint64(mask)) >> np.uint64(layout.page_shift)


def swap_type(leaves: Leaves) -> U8:
    """Swap type of each entry that is not present: ``__swp_type()``, arch/x86/include/asm/pgtable_64.h."""
    return (leaves.entry >> np.uint64(64 - SWP_TYPE_BITS)).astype(np.uint8)


def swap_offset(leaves: Leaves) -> U64:
    """Swap offset of each entry that is not present: ``__swp_offset()``, arch/x86/include/asm/pgtable_64.h.

    It is stored inverted, so that no entry looks to a speculating processor like memory that exists.
    """
    return ~leaves.entry << np.uint64(SWP_TYPE_BITS) >> np.uint64(_SWP_OFFSET_SHIFT)


def absent_entry(type_: int, offset: int) -> int:
    """The entry of a swap type with a swap offset or page frame (``__swp_entry()``, as above)."""
    inverted = ~offset & ((1 << (64 - _SWP_OFFSET_SHIFT)) - 1)
    return type_ << (64 - SWP_TYPE_BITS) | inverted << (_SWP_OFFSET_SHIFT - SWP_TYPE_BITS)


def swap_pfn(layout: Layout, leaves: Leaves) -> U64:
    """Page frame that each entry stands for: ``softleaf_to_pfn()``, include/linux/leafops.h.

    For entries of migration, device-private and device-exclusive pages. Bits above the page frame tell
    whether a migrating page was young and dirty.
    """
    return swap_offset(leaves) & np.uint64(layout.swp_pfn_mask)


def kernel_huge_page(prog: drgn.Program, layout: Layout, address: int) -> int | None:
    """Physical address of the PMD-sized page that the kernel maps at an address, None if it maps no such one.

    :raises drgn.FaultError: if the kernel's page tables cannot be read
    """
    table, physical = int(prog["init_mm"].pgd.value_()), False
    mask = layout.physical_mask & ~(_TABLE_BYTES - 1)
    for level in range(layout.pgtable_levels - 1, 0, -1):
        slot = address >> (layout.page_shift + 9 * level) & (_ENTRIES - 1)
        entry = prog.read_u64(table + 8 * slot, physical)
        if not entry & int(_PAGE_PRESENT):
            return None
        if entry & int(_PAGE_PSE):
            span = layout.page_size << 9 * level
            return int((entry & mask & ~(span - 1)) + address % span) if level < 3 else None
        table, physical = entry & mask, True
    return None


def _read_tables(
    prog: drgn.Program, layout: Layout, entries: U64, addresses: U64, troubles: WalkTroubles
) -> tuple[U64, U64]:
    """Read the tables that entries point to: (n, 512) entries, and the n addresses they start at."""
    physical = entries & np.uint64(layout.physical_mask & ~(_TABLE_BYTES - 1))
    core = core_of(prog)
    if core is None:
        return _read_runs(prog, physical, addresses, troubles)
    at = core.find(physical >> np.uint64(layout.page_shift))
    here = at >= 0
    tables = core.gather(at[here], _TABLE_BYTES).view("<u8").reshape(-1, _ENTRIES)
    if here.all():
        return tables, addresses
    rest, rest_at = _read_runs(prog, physical[~here], addresses[~here], troubles)
    found = np.concatenate((addresses[here], rest_at))
    order = np.argsort(found)
    return np.concatenate((tables, rest))[order], found[order]


def _read_runs(prog: drgn.Program, physical: U64, addresses: U64, troubles: WalkTroubles) -> tuple[U64, U64]:
    """As :func:`_read_tables`, through drgn."""
    chunks: list[bytes] = []
    good = np.ones(len(physical), dtype=bool)
    # Neighbours in the address space are often neighbours in memory: read such runs at once.
    breaks = np.flatnonzero(np.diff(physical) != _TABLE_BYTES) + 1
    for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(physical)], strict=True):
        try:
            chunks.append(prog.read(int(physical[start]), (end - start) * _TABLE_BYTES, physical=True))
        except drgn.FaultError:
            for i in range(start, end):
                try:
                    if len(troubles.unreadable) >= _UNREADABLE_MAX:
                        raise drgn.FaultError("given up", int(physical[i]))
                    chunks.append(prog.read(int(physical[i]), _TABLE_BYTES, physical=True))
                except drgn.FaultError:
                    good[i] = False
                    troubles.unreadable.append(int(addresses[i]))
    data = np.frombuffer(b"".join(chunks), dtype="<u8").reshape(-1, _ENTRIES)
    return data, addresses[good]


def _children(tables: U64, bases: U64, level: int, shift: int) -> tuple[U64, U64]:
    """Entries of tables that are not empty, and the addresses that they start at."""
    span = np.uint64(shift + 9 * level)
    if len(tables) and tables.min() > _ERRATUM:
        # None is empty.
        addresses = bases[:, np.newaxis] + (np.arange(_ENTRIES, dtype=np.uint64) << span)
        return tables.reshape(-1), addresses.reshape(-1)
    where = np.flatnonzero((tables & ~_ERRATUM) != 0)
    columns = (where % _ENTRIES).astype(np.uint64)
    return tables.reshape(-1)[where], bases[where // _ENTRIES] + (columns << span)


def _bad(entries: U64) -> Bool:
    """Which entries cannot lead to a table (``pgd_bad()`` ... ``pmd_bad()``, arch/x86/include/asm/pgtable.h).

    What was a table of a process that has just exited may be anybody's data, and each word of it lead
    anywhere; followed, they would be tables without end.
    """
    bad: Bool = ((entries & _TABLE_NOT) != 0) | ((entries & _TABLE_HAS) != _TABLE_HAS)
    return bad


def _wanted(addresses: U64, span: int, wanted: U64 | None) -> Bool:
    if wanted is None:
        return np.ones(len(addresses), dtype=bool)
    first = np.searchsorted(wanted, addresses)
    last = np.searchsorted(wanted, addresses + np.uint64(span))
    return first < last


def for_each_leaf(
    prog: drgn.Program,
    layout: Layout,
    pgd: int,
    troubles: WalkTroubles,
    wanted: U64 | None = None,
) -> Iterator[Leaves]:
    """Go through the leaf entries of a process's page tables, huge ones first, without the empty ones.

    :param pgd: ``mm->pgd``, virtual address of the top table
    :param troubles: takes what cannot be read
    :param wanted: sorted addresses; if given, only leaves that cover one of them are visited
    :raises drgn.FaultError: if the top table cannot be read
    """
    shift = layout.page_shift
    level = layout.pgtable_levels - 1
    top = np.frombuffer(prog.read(pgd, _TABLE_BYTES), dtype="<u8")
    # The upper half is the kernel's.
    tables = top.copy().reshape(1, _ENTRIES)
    tables[0, _ENTRIES // 2 :] = 0
    bases = np.zeros(1, dtype=np.uint64)
    # Tables met so far. One that is met again below itself would multiply without end.
    above = np.zeros(0, dtype=np.uint64)
    while True:
        entries, addresses = _children(tables, bases, level, shift)
        span = 1 << (shift + 9 * level)
        keep = _wanted(addresses, span, wanted)
        entries, addresses = entries[keep], addresses[keep]
        if level in (1, 2):
            # Not present entries at these levels are migration entries and the like: leaves too.
            is_leaf = ((entries & _PAGE_PSE) != 0) | ((entries & _PAGE_PRESENT) == 0)
            if is_leaf.any():
                yield Leaves(addresses[is_leaf], entries[is_leaf], level)
            entries, addresses = entries[~is_leaf], addresses[~is_leaf]
        else:
            present = (entries & _PAGE_PRESENT) != 0
            entries, addresses = entries[present], addresses[present]
        physical = entries & np.uint64(layout.physical_mask & ~(_TABLE_BYTES - 1))
        wrong = _bad(entries) | np.isin(physical, above)
        troubles.unreadable += addresses[wrong].tolist()
        entries, addresses = entries[~wrong], addresses[~wrong]
        above = np.concatenate((above, physical[~wrong]))
        if level == 1:
            break
        if len(entries) == 0:
            return
        tables, bases = _read_tables(prog, layout, entries, addresses, troubles)
        level -= 1
    at_once = _TABLES_AT_ONCE if core_of(prog) is None else _TABLES_IN_CACHE
    for start in range(0, len(entries), at_once):
        part = slice(start, start + at_once)
        tables, bases = _read_tables(prog, layout, entries[part], addresses[part], troubles)
        found, at = _children(tables, bases, 0, shift)
        leaves = Leaves(at, found, 0).take(_wanted(at, layout.page_size, wanted))
        if len(leaves):
            yield leaves
