# SPDX-License-Identifier: GPL-2.0-only
"""Page tables, read whole tables at a time and decoded with numpy.

What an entry means is in the tables of kvirt.pgtable, one for each architecture.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import drgn
import numpy as np
import numpy.typing as npt

from kvirt.layout import Layout
from kvirt.memory import Core, Places, Runs, core_of, runs_of
from kvirt.pgtable import PageTables, SwapFormat
from kvirt.snapshot import PAGE_BYTES

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

# Pages that are all over the memory, or judged each by itself: what belongs to so many of them stays in a
# processor's cache meanwhile, or nearly.
IN_CACHE = 1 << 16
# PTE tables decoded at once, for as many pages.
_TABLES = 128
# And where pages are neighbours: more, for what is done once for each lot takes longer than them.
_TABLES_NEIGHBOURS = 512
# And where drgn reads pages that are all over the memory: most of the memmap is read for each time, whatever
# their number. 1 Mi pages; bounds memory, whatever the size of the process.
_TABLES_SCATTERED = 2048
# So many tables without an empty entry are not looked through together with others, which takes longer.
_FULL_TABLES = 16
# So few are rather read by themselves.
_FEW_TABLES = 8
# Pages of which more than one in so many is not behind the one before are scattered.
_NEIGHBOURS = 16
# Tables that are tried one by one when they cannot be read; the rest of those is then given up unread.
_UNREADABLE_MAX = 1 << 12
_ULONG_MAX = np.uint64((1 << 64) - 1)


class Leaves:
    """Leaf entries of one level, that map or stand for pages. All arrays have one element an entry."""

    __slots__ = ("_address", "_breaks", "entry", "level", "tables")

    def __init__(self, address: U64 | int, entry: U64, level: int, tables: PageTables) -> None:
        """Prepare.

        :param address: virtual address of the first page of each, ascending; or that of the first entry's
            alone, if all are neighbours in the address space
        :param entry: each as the hardware sees it
        :param level: 0: PTE, 1: PMD, 2: PUD
        :param tables: what their bits mean
        """
        self._address = address
        self.entry, self.level, self.tables = entry, level, tables
        self._breaks: Bool | None = None

    def __len__(self) -> int:
        return len(self.entry)

    @property
    def address(self) -> U64:
        """Virtual address of the first page."""
        if isinstance(self._address, int):
            numbers = np.arange(len(self), dtype=np.uint64)
            self._address = (numbers << np.uint64(self._span.bit_length() - 1)) + np.uint64(self._address)
        return self._address

    @property
    def pages(self) -> int:
        """Base pages that one entry maps."""
        return 1 << self.tables.index_bits * self.level

    @property
    def _span(self) -> int:
        """Bytes that one entry maps."""
        return self.tables.page_size << self.tables.index_bits * self.level

    def ends(self) -> tuple[int, int]:
        """Addresses of the first entry and of the last."""
        if isinstance(self._address, int):
            return self._address, self._address + (len(self) - 1) * self._span
        first, last = self._address[[0, -1]].tolist()
        return first, last

    def search(self, values: U64) -> Places:
        """How many entries are before each of some addresses: as ``numpy.searchsorted()`` tells it."""
        if not isinstance(self._address, int):
            return np.searchsorted(self._address, values)
        one, first = np.uint64(1), np.uint64(self._address)
        before: U64 = (values - first - one >> np.uint64(self._span.bit_length() - 1)) + one
        before[values <= first] = 0
        return np.minimum(before, np.uint64(len(self))).astype(np.int64)

    def part(self, which: slice) -> Leaves:
        """Neighbouring entries, in place.

        :param which: not beyond all entries
        """
        if which == slice(0, len(self)):
            return self
        if isinstance(self._address, int):
            address: U64 | int = self._address + which.start * self._span
        else:
            address = self._address[which]
        some = Leaves(address, self.entry[which], self.level, self.tables)
        if self._breaks is not None:
            some._breaks = self._breaks[which][: max(0, len(some) - 1)]
        return some

    def blocks(self, size: int) -> Iterator[Leaves]:
        """All entries, so many at a time."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, min(start + size, len(self))))

    def copy(self) -> Leaves:
        """The same without what else was read with them, which neighbouring entries in place keep."""
        return Leaves(self.address.copy(), self.entry.copy(), self.level, self.tables)

    def take(self, mask: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Leaves:
        """Some of the entries."""
        if mask.dtype == np.bool_ and mask.all():
            return self
        return Leaves(self.address[mask], self.entry[mask], self.level, self.tables)

    def breaks(self) -> Bool:
        """Of each entry but the first, whether it differs in more than that it leads to the page behind."""
        if self._breaks is None:
            self._breaks = self.entry[1:] - self.entry[:-1] != self._span
        return self._breaks

    def are_scattered(self) -> bool:
        """Whether :meth:`breaks` has many: pages are all over the memory, or entries differ otherwise."""
        return int(np.count_nonzero(self.breaks())) * _NEIGHBOURS > len(self)


def join(parts: Sequence[Leaves]) -> Leaves:
    """Entries of one level that follow one another.

    :param parts: at least one
    """
    if len(parts) == 1:
        return parts[0]
    address = np.concatenate([part.address for part in parts])
    entry = np.concatenate([part.entry for part in parts])
    return Leaves(address, entry, parts[0].level, parts[0].tables)


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
    bits = np.uint64(leaves.tables.present[leaves.level])
    if len(leaves) and np.bitwise_and.reduce(leaves.entry) & bits:
        return np.ones(len(leaves), dtype=bool)
    present: Bool = (leaves.entry & bits) != 0
    return present


def leaf_special(leaves: Leaves) -> Bool:
    """Which present entries have no struct page to look at: ``pte_special()`` and its kin."""
    special: Bool = (leaves.entry & np.uint64(leaves.tables.special)) != 0
    return special


def any_special(leaves: Leaves) -> bool:
    """Whether :func:`leaf_special` is true of any."""
    return bool(np.bitwise_or.reduce(leaves.entry) & np.uint64(leaves.tables.special))


def leaf_pfn(leaves: Leaves) -> U64:
    """Page frame of each present entry: ``pte_pfn()``, ``pmd_pfn()``, ``pud_pfn()``."""
    return _pfn(leaves.tables, leaves.entry, leaves.level)


def _pfn(tables: PageTables, entry: U64, level: int) -> U64:
    """:func:`leaf_pfn` of entries of a level."""
    if tables.inverted:
        valid = np.uint64(tables.valid)
        if not np.bitwise_and.reduce(entry) & valid:
            entry = np.where((entry & valid) == 0, ~entry, entry)
    return _physical(tables, entry, level) >> np.uint64(tables.page_shift)


def read_alike(leaves: Leaves, bits: int) -> tuple[int, Runs] | None:
    """What entries of level 0 have in common, and where they lead to; None if they differ in it.

    :param leaves: at least one, all of them present
    :param bits: what they must have in common
    :returns: those of the bits that all have, and page frames
    """
    some, runs, tables = leaves.entry, None, leaves.tables
    if not leaves.are_scattered():
        ends = np.append(np.flatnonzero(leaves.breaks()), len(leaves) - 1)
        lengths = np.diff(ends, prepend=-1)
        first = some[ends - lengths + 1]
        frames, last = _pfn(tables, first, 0).view(np.int64), _pfn(tables, some[ends], 0).view(np.int64)
        # Not so if addresses are inverted, or a sum went beyond them.
        if (last - frames == lengths - 1).all():
            # Within a run nothing else differs.
            some, runs = first, Runs(frames, lengths)
    every, any_ = int(np.bitwise_and.reduce(some)), int(np.bitwise_or.reduce(some))
    if (every ^ any_) & bits:
        return None
    if runs is None:
        frames = leaf_pfn(leaves).view(np.int64)
        if any_ & ~every & ~tables.address_mask(0) or not every & tables.valid:
            # They may be neighbours all the same: what differs need not matter, or addresses are inverted.
            runs = runs_of(frames, _NEIGHBOURS)
        runs = runs or Runs(frames, np.ones_like(frames))
    return every & bits, runs


def _physical(tables: PageTables, entries: U64, level: int) -> U64:
    """``tables.physical()`` of each entry."""
    physical: U64 = entries & np.uint64(tables.address_mask(level))
    if tables.high:
        physical |= (entries & np.uint64(tables.high)) << np.uint64(tables.high_shift)
    return physical


def swap_type(leaves: Leaves) -> U8:
    """Swap type of each entry that is not present: ``__swp_type()``."""
    types = (leaves.entry >> np.uint64(leaves.tables.swap.type_shift)).astype(np.uint8)
    return types & np.uint8((1 << SwapFormat.TYPE_BITS) - 1)


def swap_offset(leaves: Leaves) -> U64:
    """Swap offset of each entry that is not present: ``__swp_offset()``.

    Where it is stored inverted, that is so that no entry looks to a speculating processor like memory
    that exists.
    """
    swap = leaves.tables.swap
    entry = ~leaves.entry if swap.inverted else leaves.entry
    return entry >> np.uint64(swap.offset_shift) & np.uint64((1 << swap.offset_bits) - 1)


def absent_entry(tables: PageTables, type_: int, offset: int) -> int:
    """The entry of a swap type with a swap offset or page frame (``__swp_entry()``)."""
    swap = tables.swap
    stored = (~offset if swap.inverted else offset) & ((1 << swap.offset_bits) - 1)
    return type_ << swap.type_shift | stored << swap.offset_shift


def swap_pfn(layout: Layout, leaves: Leaves) -> U64:
    """Page frame that each entry stands for: ``softleaf_to_pfn()``, include/linux/leafops.h.

    For entries of migration, device-private and device-exclusive pages. Bits above the page frame tell
    whether a migrating page was young and dirty.
    """
    return swap_offset(leaves) & np.uint64(layout.swp_pfn_mask)


def _init_pgd(prog: drgn.Program) -> int:
    return int(prog["init_mm"].pgd.value_())


def _walk_kernel(prog: drgn.Program, tables: PageTables, address: int) -> tuple[int, bool] | None:
    """What the kernel's page tables come to above PTEs for one of its addresses; None if to nothing.

    :return: physical address of the place in a huge page, or of the table of PTEs; and whether it is a table
    :raises drgn.FaultError: if the tables cannot be read
    """
    table, physical, entries = _init_pgd(prog), False, tables.kernel_entries
    bits, value = tables.table_type
    for level in range(tables.levels - 1, 0, -1):
        entry = prog.read_u64(table + 8 * (address >> tables.shift(level) & (entries - 1)), physical)
        if not entry & tables.valid:
            return None
        if entry & bits != value:
            span = 1 << tables.shift(level)
            at = tables.physical(entry, level) + address % span
            return (at, False) if level in tables.leaf_levels else None
        table, physical = tables.physical(entry), True
        entries = tables.entries
    return table, True


def kernel_huge_page(prog: drgn.Program, tables: PageTables, address: int) -> int | None:
    """Physical address of the PMD-sized page that the kernel maps at an address, None if it maps no such one.

    :raises drgn.FaultError: if the kernel's page tables cannot be read
    """
    found = _walk_kernel(prog, tables, address)
    return None if found is None or found[1] else found[0]


def kernel_pages(prog: drgn.Program, tables: PageTables, address: int) -> array[int]:
    """Physical addresses of the pages that the kernel has where one PMD maps them, -1 where there is none.

    :param address: of the first of them
    :raises drgn.FaultError: if the kernel's page tables cannot be read
    """
    found = _walk_kernel(prog, tables, address)
    if found is None:
        return array("q", [-1]) * tables.entries
    at, is_table = found
    if not is_table:
        return array("q", range(at, at + tables.huge_size, tables.page_size))
    entries = np.frombuffer(prog.read(at, tables.page_size, True), dtype="<u8").tolist()
    return array("q", [tables.physical(entry) if entry & tables.valid else -1 for entry in entries])


def _core(prog: drgn.Program, tables: PageTables) -> Core | None:
    """The core to read tables from directly: only there if a page of it is a table."""
    return core_of(prog) if tables.page_size == PAGE_BYTES else None


def _read_tables(
    prog: drgn.Program, tables: PageTables, entries: U64, addresses: U64, troubles: WalkTroubles
) -> tuple[U64, U64]:
    """Read the tables that entries point to, a row each, and the addresses that they start at."""
    physical = _physical(tables, entries, 0)
    core = _core(prog, tables)
    if core is None:
        return _read_runs(prog, tables, physical, addresses, troubles)
    if len(physical) <= _FEW_TABLES:
        pages = [core.page(frame) for frame in (physical >> np.uint64(tables.page_shift)).tolist()]
        if all(len(page) == tables.page_size for page in pages):
            return np.frombuffer(b"".join(pages), dtype="<u8").reshape(-1, tables.entries), addresses
    at = core.find(physical >> np.uint64(tables.page_shift))
    here = at >= 0
    found = core.gather(at[here], tables.page_size).view("<u8").reshape(-1, tables.entries)
    if here.all():
        return found, addresses
    rest, rest_at = _read_runs(prog, tables, physical[~here], addresses[~here], troubles)
    starts = np.concatenate((addresses[here], rest_at))
    order = np.argsort(starts)
    return np.concatenate((found, rest))[order], starts[order]


def _read_runs(
    prog: drgn.Program, tables: PageTables, physical: U64, addresses: U64, troubles: WalkTroubles
) -> tuple[U64, U64]:
    """As :func:`_read_tables`, through drgn."""
    chunks: list[bytes] = []
    good = np.ones(len(physical), dtype=bool)
    size = tables.page_size
    # Neighbours in the address space are often neighbours in memory: read such runs at once.
    breaks = np.flatnonzero(np.diff(physical) != size) + 1
    for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(physical)], strict=True):
        try:
            chunks.append(prog.read(int(physical[start]), (end - start) * size, physical=True))
        except drgn.FaultError:
            for i in range(start, end):
                try:
                    if len(troubles.unreadable) >= _UNREADABLE_MAX:
                        raise drgn.FaultError("given up", int(physical[i]))
                    chunks.append(prog.read(int(physical[i]), size, physical=True))
                except drgn.FaultError:
                    good[i] = False
                    troubles.unreadable.append(int(addresses[i]))
    data = np.frombuffer(b"".join(chunks), dtype="<u8").reshape(-1, tables.entries)
    return data, addresses[good]


def _leaves_in(tables: PageTables, rows: U64, bases: U64, *, full: bool) -> Leaves:
    """Leaf entries of the lowest tables, a row each.

    :param bases: addresses that the tables start at, ascending
    :param full: whether no entry is empty
    """
    first, last = bases[[0, -1]].tolist()
    if full and last - first == (len(bases) - 1) << tables.shift(1):
        return Leaves(first, rows.reshape(-1), 0, tables)
    children, at = _children(tables, rows, bases, 0)
    return Leaves(at, children, 0, tables)


def _children(tables: PageTables, rows: U64, bases: U64, level: int) -> tuple[U64, U64]:
    """Entries of tables, a row each, that are not empty, and the addresses that they start at."""
    span, none = np.uint64(tables.shift(level)), np.uint64(tables.none)
    number = rows.shape[1]
    where = np.flatnonzero((rows & ~none) != 0).view(np.uint64)
    # As % and //, which take several times as long.
    columns, row = where & np.uint64(number - 1), where >> np.uint64(number.bit_length() - 1)
    return rows.reshape(-1)[where.view(np.intp)], bases[row.view(np.intp)] + (columns << span)


def _bad(tables: PageTables, entries: U64) -> Bool:
    """Which entries cannot lead to a table (``pgd_bad()`` ... ``pmd_bad()``).

    What was a table of a process that has just exited may be anybody's data, and each word of it lead
    anywhere; followed, they would be tables without end.
    """
    has, lacks = np.uint64(tables.table_has), np.uint64(tables.table_not)
    bad: Bool = ((entries & lacks) != 0) | ((entries & has) != has)
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
    tables = layout.pgtable
    level = tables.levels - 1
    type_bits, type_value = map(np.uint64, tables.table_type)
    rows = np.frombuffer(prog.read(pgd, tables.user_entries * 8), dtype="<u8").reshape(1, -1)
    bases = np.zeros(1, dtype=np.uint64)
    # Tables met so far. One that is met again below itself would multiply without end.
    above: set[int] = set()
    while True:
        entries, addresses = _children(tables, rows, bases, level)
        keep = _wanted(addresses, 1 << tables.shift(level), wanted)
        entries, addresses = entries[keep], addresses[keep]
        if level in tables.leaf_levels:
            # Not present entries at these levels are migration entries and the like: leaves too.
            is_leaf = (entries & type_bits) != type_value
            if is_leaf.any():
                yield Leaves(addresses[is_leaf], entries[is_leaf], level, tables)
            entries, addresses = entries[~is_leaf], addresses[~is_leaf]
        else:
            valid = (entries & np.uint64(tables.valid)) != 0
            entries, addresses = entries[valid], addresses[valid]
        physical = _physical(tables, entries, 0)
        wrong = _bad(tables, entries)
        again = above.intersection(physical.tolist())
        if again:
            wrong |= np.isin(physical, np.array(list(again), dtype=np.uint64))
        if wrong.any():
            troubles.unreadable += addresses[wrong].tolist()
            entries, addresses, physical = entries[~wrong], addresses[~wrong], physical[~wrong]
        above.update(physical.tolist())
        if level == 1:
            break
        if len(entries) == 0:
            return
        rows, bases = _read_tables(prog, tables, entries, addresses, troubles)
        level -= 1
    start, number = 0, _TABLES
    while start < len(entries):
        # A table of larger pages has more entries, and fewer are decoded at once.
        part = slice(start, start + max(1, number * PAGE_BYTES // tables.page_size))
        start = part.stop
        rows, bases = _read_tables(prog, tables, entries[part], addresses[part], troubles)
        found = scattered = 0
        for piece, full in _pieces(rows, tables):
            leaves = _leaves_in(tables, rows[piece], bases[piece], full=full)
            if wanted is not None:
                leaves = leaves.take(_wanted(leaves.address, tables.page_size, wanted))
            found += len(leaves)
            scattered += len(leaves) if leaves.are_scattered() else 0
            if len(leaves):
                yield leaves
        # As most of these were, the next may be.
        if scattered * 2 <= found:
            number = _TABLES_NEIGHBOURS
        else:
            number = _TABLES_SCATTERED if core_of(prog) is None else _TABLES


def _pieces(rows: U64, tables: PageTables) -> list[tuple[slice, bool]]:
    """Tables, a row each, in pieces: many in which no entry is empty, which is told, are by themselves."""
    full = rows.min(axis=1, initial=_ULONG_MAX) > np.uint64(tables.none)
    begins = [0, *(np.flatnonzero(full[1:] != full[:-1]) + 1).tolist(), len(rows)]
    cuts = {0, len(rows)}
    for begin, end in itertools.pairwise(begins):
        if end - begin >= _FULL_TABLES and full[begin]:
            cuts |= {begin, end}
    return [
        (slice(begin, end), bool(full[begin:end].all())) for begin, end in itertools.pairwise(sorted(cuts))
    ]
