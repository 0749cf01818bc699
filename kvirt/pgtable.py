# SPDX-License-Identifier: GPL-2.0-only
"""What the page tables of each architecture look like: which bit of an entry means what.

Tables alone, by which kvirt.mm.pagetable decodes; kvirt.layout asks the kernel which of them are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# Bits of a 64-bit entry, eight bytes.
_ENTRY_SHIFT = 3
_ALL = (1 << 64) - 1


def _bit(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def _bits(first: int, last: int) -> int:
    """Both included."""
    return (1 << (last + 1)) - (1 << first)


@dataclass(frozen=True)
class SwapFormat:
    """How an entry that is not present holds a swap type of five bits, and a swap offset."""

    type_shift: int
    """``__swp_type()``"""
    offset_shift: int
    """``__swp_offset()``"""
    offset_bits: int
    inverted: bool = False
    """The offset is stored inverted."""

    TYPE_BITS = 5


@dataclass(frozen=True)
class PageTables:
    """The page tables of one kernel. Levels are counted from 0, that of PTEs; masks are of entries."""

    page_shift: int
    levels: int
    user_entries: int
    """Of a top table, from the first on, that a process's own addresses have."""
    kernel_entries: int
    """Of the kernel's top table; a power of two."""
    leaf_levels: frozenset[int]
    """On which an entry can map pages."""
    valid: int
    """The processor follows the entry."""
    present: tuple[int, ...]
    """By level: one of these, and the entry is present for the kernel (``pte_present()``...)."""
    special: int
    """``pte_special()``"""
    table_type: tuple[int, int]
    """An entry leads to a table if it has the second in the bits of the first."""
    table_has: int
    """What the kernel sets in an entry that leads to a table."""
    table_may: int
    """And what else may be in it, besides an address."""
    address: int
    """Where the physical address is, as it is."""
    high: int = 0
    """Where its uppermost bits are, if elsewhere, and how far they are shifted up."""
    high_shift: int = 0
    none: int = 0
    """An entry with these alone is empty."""
    touched: int = 0
    """What the processor changes by itself."""
    inverted: bool = False
    """Entries that are present and not valid hold their address inverted."""
    swap: SwapFormat = SwapFormat(0, 0, 0)

    @property
    def page_size(self) -> int:
        """Bytes of a page, and of a table."""
        return 1 << self.page_shift

    @property
    def index_bits(self) -> int:
        """Bits of an address that one table resolves."""
        return self.page_shift - _ENTRY_SHIFT

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return 1 << self.index_bits

    def shift(self, level: int) -> int:
        """Of what an entry of a level maps (``PAGE_SHIFT``, ``PMD_SHIFT``...)."""
        return self.page_shift + self.index_bits * level

    @property
    def huge_size(self) -> int:
        """Bytes that an entry of the second level maps (``PMD_SIZE``)."""
        return 1 << self.shift(1)

    def address_mask(self, level: int) -> int:
        """Of *address*, what matters on a level; 0 is for a table, too."""
        return self.address & ~((1 << self.shift(level)) - 1)

    def physical(self, entry: int, level: int = 0) -> int:
        """Physical address in an entry, of the page that it maps or, without a level, of the table."""
        return entry & self.address_mask(level) | (entry & self.high) << self.high_shift

    def slot(self, address: int, level: int) -> int:
        """Offset in bytes of a process address's entry in its table of a level."""
        return (address >> self.shift(level) & (self.entries - 1)) << _ENTRY_SHIFT

    @property
    def physical_bits(self) -> int:
        """Bits of a physical address that an entry has room for."""
        return self.physical(_ALL).bit_length()

    @cached_property
    def table_not(self) -> int:
        """What no entry has that leads to a table."""
        # The address may be any: what does not exist cannot be read.
        address = self.address & ~(self.page_size - 1) | self.high
        return ~(self.table_has | self.table_may | address) & _ALL


def x86_64(levels: int, physical_mask: int) -> PageTables:
    """Tables of x86-64 (arch/x86/include/asm/pgtable_types.h, pgtable_64.h).

    :param levels: 4 or 5
    :param physical_mask: ``__PHYSICAL_MASK``, without a bit for encrypted memory
    """
    present, rw, user, accessed, dirty, pse, protnone, special = map(_bit, (0, 1, 2, 5, 6, 7, 8, 9))
    noptishadow, nx = _bit(58), _bit(63)
    page_shift = 12
    half = 1 << (page_shift - _ENTRY_SHIFT - 1)
    return PageTables(
        page_shift=page_shift,
        levels=levels,
        # The upper half is the kernel's.
        user_entries=half,
        kernel_entries=2 * half,
        leaf_levels=frozenset({1, 2}),
        valid=present,
        # Without access rights (PROT_NONE, NUMA hinting), and a huge page about to be split.
        present=(present | protnone, *[present | protnone | pse] * (levels - 1)),
        special=special,
        table_type=(present | pse, present),
        # _PAGE_TABLE
        table_has=present | rw | user | dirty,
        # The accessed bit is cleared where the kernel looks for young tables, page table isolation marks
        # those of the top table, and a bit of the address may stand for encrypted memory.
        table_may=accessed | nx | noptishadow | _bits(page_shift, 51),
        address=physical_mask & ~((1 << page_shift) - 1),
        # A processor may set them in an empty one (_KNL_ERRATUM_MASK).
        none=accessed | dirty,
        touched=accessed | dirty,
        # Against speculation (pgtable-invert.h).
        inverted=True,
        swap=SwapFormat(64 - SwapFormat.TYPE_BITS, 9, 64 - 9 - SwapFormat.TYPE_BITS, inverted=True),
    )


def arm64(page_shift: int, va_bits: int, va_bits_max: int, *, lpa2: bool, prot_none: bool) -> PageTables:
    """Tables of arm64 (arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h, pgtable.h).

    A contiguous range is as many entries, each with an address of its own, and nothing else to be told.

    :param page_shift: 12, 14 or 16: the granule
    :param va_bits: ``vabits_actual``: bits of an address that this processor resolves
    :param va_bits_max: ``VA_BITS``: those that the kernel was built for
    :param lpa2: ``lpa2_is_enabled()``: 52 bits of physical address with pages of 4 or 16 KiB
    :param prot_none: ``PTE_PROT_NONE`` marks entries without access rights (until 6.9)
    """
    valid, table, af, ng, rdonly = _bit(0), _bit(1), _bit(10), _bit(11), _bit(7)
    special, pxn, uxn = _bit(56), _bit(59), _bit(60)
    index_bits = page_shift - _ENTRY_SHIFT
    levels = -(-(va_bits - page_shift) // index_bits)
    top_shift = page_shift + index_bits * (levels - 1)
    if prot_none:
        # PMD_PRESENT_INVALID: a huge page about to be split.
        pte, huge = valid | _bit(58), valid | _bit(58, 59)
        swap = SwapFormat(3, 8, 50)
    else:
        # PTE_PRESENT_INVALID, in the place of nG
        pte = huge = valid | ng
        swap = SwapFormat(6, 12, 50)
    high, high_shift = (_bits(12, 15), 36) if page_shift == 16 else (_bits(8, 9), 42) if lpa2 else (0, 0)
    return PageTables(
        page_shift=page_shift,
        levels=levels,
        # A top table may be smaller than a page.
        user_entries=1 << (va_bits - top_shift),
        kernel_entries=1 << min(va_bits_max - top_shift, index_bits),
        # pud_sect_supported()
        leaf_levels=frozenset({1, 2} if page_shift == 12 else {1}),
        valid=valid,
        present=(pte, *[huge] * (levels - 1)),
        special=special,
        table_type=(valid | table, valid | table),
        table_has=valid | table,
        # PMD_TABLE_AF, PMD_TABLE_PXN and the like
        table_may=af | pxn | uxn,
        # PTE_ADDR_LOW
        address=_bits(page_shift, 49),
        high=high,
        high_shift=high_shift,
        # With FEAT_HAFDBS the processor clears "read-only" in what is writable and clean.
        touched=af | rdonly,
        swap=swap,
    )
