# SPDX-License-Identifier: GPL-2.0-only
"""Made-up page tables, and how to read them an entry at a time.

What an entry means is written here once more, from the architectures' manuals and the kernel's arch/*/include
/asm/pgtable*.h, and takes nothing from kvirt.
"""

import numpy as np
from hypothesis import strategies as st

from tests.unit.fake import Memory

PGD = 0xFFFF888000100000
TOP = 0x100000
TABLE = 0x67  # present, writable, user, accessed, dirty
PSE = 1 << 7
PROTNONE = 1 << 8
SPECIAL = 1 << 9


def bits(first, last):
    """Any value of some bits of an entry."""
    return st.integers(0, (1 << (last + 1 - first)) - 1).map(lambda value: value << first)


class X86:
    """arch/x86/include/asm/pgtable.h"""

    shift, index_bits = 12, 9

    def __init__(self, levels=4):
        self.levels = levels
        # The upper half is the kernel's.
        self.va_bits = 12 + 9 * levels - 1
        self.huge_levels = (1, 2)

    def table(self, physical):
        return physical | TABLE

    def below(self, entry, level):
        """The table that an entry leads to; None if it leads to none."""
        if not entry & 1 or (level < 3 and entry & PSE):
            return None
        return entry & (1 << 52) - 1 & ~0xFFF

    def kind(self, entry, level):
        """Present for the kernel or not; special or not, and the page frame; or the swap type and offset."""
        if not (entry & 1 or entry & PROTNONE or (level and entry & PSE)):
            return False, entry >> 59, (entry ^ (1 << 64) - 1) >> 9 & (1 << 50) - 1
        frame = entry if entry & 1 else ~entry
        return True, bool(entry & SPECIAL), (frame & (1 << 52) - 1) >> (12 + 9 * level) << 9 * level

    def leaf(self, draw, level):
        """A leaf entry of any kind that a level can have."""
        frame = draw(bits(12 + 9 * level, 51))
        pse = PSE if level else 0
        # Above the page frame: protection keys and no-execute.
        high = draw(bits(59, 62)) | draw(bits(63, 63))
        inverted = ~frame & (1 << 52) - 1 & ~0xFFF
        kinds = {
            "present": frame | TABLE | pse | high,
            "special": frame | TABLE | pse | SPECIAL | high,
            # Without rights: inverted, huge or not.
            "no rights": inverted | PROTNONE | pse | high,
            "none": 0,
            # What a processor may leave in an empty entry would be a leaf for the plain walk.
            "swap": draw(bits(59, 63)) | draw(bits(10, 58)),
        }
        if level:
            # About to be split: neither present nor without rights for the processor, and huge.
            kinds["splitting"] = inverted | PSE | high
        return kinds[draw(st.sampled_from(sorted(kinds)))]


class Arm64:
    """Arm Architecture Reference Manual, VMSAv8-64 descriptors; arch/arm64/include/asm/pgtable*.h."""

    def __init__(self, shift, va_bits, *, pa_bits=48, old=False):
        self.shift, self.va_bits, self.pa_bits, self.old = shift, va_bits, pa_bits, old
        self.index_bits = shift - 3
        self.levels = 1
        while shift + self.levels * self.index_bits < va_bits:
            self.levels += 1
        # Blocks: 2 MiB and 1 GiB, 32 MiB, 512 MiB; larger ones are never a process's.
        self.huge_levels = {12: (1, 2), 14: (1,), 16: (1,)}[shift]
        self.huge_levels = tuple(level for level in self.huge_levels if level < self.levels)

    def _encode(self, physical):
        """The address bits of a descriptor."""
        if self.pa_bits == 48:
            return physical
        if self.shift == 16:
            # 51:48 in 15:12
            return physical & (1 << 48) - 1 | physical >> 48 << 12
        # 51:50 in 9:8
        return physical & (1 << 50) - 1 | physical >> 50 << 8

    def _decode(self, entry, shift):
        if self.shift == 16:
            return entry % (1 << 48) >> shift << shift | (entry >> 12 & 15) << 48
        low = entry % (1 << 50) >> shift << shift
        return low | (entry >> 8 & 3) << 50 if self.pa_bits == 52 else low

    def table(self, physical):
        # And PXNTable
        return self._encode(physical) | 3 | 1 << 59

    def below(self, entry, level):
        return self._decode(entry, self.shift) if entry & 3 == 3 else None

    def kind(self, entry, level):
        if self.old:
            marked = entry >> 58 & 1 or (level and entry >> 59 & 1)
        else:
            marked = entry >> 11 & 1
        if entry & 1 or marked:
            physical = self._decode(entry, self.shift + self.index_bits * level)
            return True, bool(entry >> 56 & 1), physical >> self.shift
        if self.old:
            return False, entry >> 3 & 31, entry >> 8 & (1 << 50) - 1
        return False, entry >> 6 & 31, entry >> 12 & (1 << 50) - 1

    def leaf(self, draw, level):
        physical = draw(bits(self.shift + self.index_bits * level, self.pa_bits - 1))
        # AttrIndx, AP, AF; GP if it is none of the address, DBM, Contiguous, PXN, UXN; software's dirty.
        entry = self._encode(physical) | draw(bits(2, 4)) | draw(bits(6, 7)) | draw(bits(10, 10))
        entry |= draw(bits(51, 55))
        if self.shift == 16 or self.pa_bits == 48:
            # Inner shareable.
            entry |= 3 << 8
        type_ = 1 if level else 3
        if self.old:
            swap = draw(bits(2, 2)) | draw(bits(3, 7)) | draw(bits(8, 57))
            no_rights = entry | type_ & 2 | 1 << 11 | 1 << 58
        else:
            # uffd-wp, and the permission overlay's index.
            entry |= draw(bits(58, 58)) | draw(bits(60, 62))
            swap = draw(bits(2, 3)) | draw(bits(6, 10)) | draw(bits(12, 61))
            no_rights = entry | type_ & 2 | 1 << 11
        kinds = {
            "present": entry | type_ | draw(bits(11, 11)),
            "special": entry | type_ | 1 << 11 | 1 << 56,
            "no rights": no_rights,
            "none": 0,
            "swap": swap,
        }
        if level:
            kinds["splitting"] = entry | (1 << 59 if self.old else 0) | 1 << 11
        return kinds[draw(st.sampled_from(sorted(kinds)))]


class Tables:
    """Builds page tables in made-up physical memory."""

    def __init__(self, arch):
        self.arch = arch
        self.size = 1 << arch.shift
        # That of a process is no larger than its addresses need.
        top = arch.va_bits - arch.shift - arch.index_bits * (arch.levels - 1)
        self.tables = {TOP: np.zeros(1 << top, dtype="<u8")}
        self.next = 0x200000

    def slot(self, address, level):
        """Number of an address's entry in its table of a level."""
        at = address >> (self.arch.shift + self.arch.index_bits * level)
        return at & ((1 << self.arch.index_bits) - 1)

    def map(self, address, entry, level=0):
        """Lay an entry for an address, and the tables that lead to it."""
        table = TOP
        for above in range(self.arch.levels - 1, level, -1):
            i = self.slot(address, above)
            if not self.tables[table][i]:
                self.tables[self.next] = np.zeros(1 << self.arch.index_bits, dtype="<u8")
                self.tables[table][i] = self.arch.table(self.next)
                self.next += self.size
            table = self.arch.below(int(self.tables[table][i]), above)
        self.tables[table][self.slot(address, level)] = entry

    def has_leaf(self, address, level):
        """Whether a table of this level is there for an address, and has a leaf at it."""
        table = TOP
        for above in range(self.arch.levels - 1, level, -1):
            entry = int(self.tables[table][self.slot(address, above)])
            if entry == 0:
                return False
            table = self.arch.below(entry, above)
            if table not in self.tables:
                return True
        return bool(self.tables[table][self.slot(address, level)])

    def memory(self, missing=()):
        """A program that has them."""
        memory = Memory()
        memory.put(PGD, self.tables[TOP].tobytes())
        for physical, words in self.tables.items():
            if physical not in missing:
                memory.put(physical, words.tobytes(), physical=True)
        return memory

    def leaves(self):
        """By address, every leaf and its level, found by the rules of the architecture alone."""
        found = {}
        self._walk(TOP, self.arch.levels - 1, 0, found)
        return found

    def _walk(self, table, level, base, found):
        for slot in np.flatnonzero(self.tables[table]).tolist():
            entry = int(self.tables[table][slot])
            address = base + (slot << (self.arch.shift + self.arch.index_bits * level))
            below = self.arch.below(entry, level) if level else None
            if below is not None:
                self._walk(below, level - 1, address, found)
            elif level == 0 or level in self.arch.huge_levels:
                found[address] = entry, level


@st.composite
def any_tables(draw, arch):
    """Tables of a process: few regions, so that leaves share them."""
    tables = Tables(arch)
    top = 1 << arch.va_bits
    for level in draw(st.lists(st.sampled_from((0, 0, 0, *arch.huge_levels)), min_size=1, max_size=40)):
        address = draw(st.sampled_from((0, top // 2, top - 1)))
        for at in range(min(arch.levels - 1, 2), level - 1, -1):
            # Few tables, each with a few entries anywhere in it.
            last = (1 << arch.index_bits) - 1
            slot = st.sampled_from((0, 1, last)) if at > level else st.integers(0, last)
            address ^= draw(slot) << (arch.shift + arch.index_bits * at)
        address = address % top >> (arch.shift + arch.index_bits * level)
        address <<= arch.shift + arch.index_bits * level
        # A leaf may hide the tables that were there.
        if all(not tables.has_leaf(address, above) for above in range(level, arch.levels)):
            # Neighbours in one table, and a full one now and then.
            count = draw(st.sampled_from((1, 1, 3, 1 << arch.index_bits)))
            entry = arch.leaf(draw, level)
            first = tables.slot(address, level)
            for other in range(min(count, (1 << arch.index_bits) - first) if level == 0 else 1):
                tables.map(address + (other << arch.shift), entry, level)
    return tables
