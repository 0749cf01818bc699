# SPDX-License-Identifier: GPL-2.0-only
import numpy as np
import pytest

from kvirt.mm.pagetable import (
    Leaves,
    WalkTroubles,
    absent_entry,
    for_each_leaf,
    leaf_pfn,
    leaf_present,
    leaf_special,
    swap_offset,
    swap_pfn,
    swap_type,
)
from tests.unit.fake import Memory, make_layout

PGD = 0xFFFF888000100000
TABLE = 0x67  # present, writable, user, accessed, dirty
PSE = 1 << 7
PROTNONE = 1 << 8
SPECIAL = 1 << 9


class Tables:
    """Builds page tables in made-up physical memory."""

    def __init__(self, levels):
        self.levels = levels
        self.tables = {0x100000: [0] * 512}
        self.next = 0x200000

    def map(self, address, entry, level=0):
        table = 0x100000
        for above in range(self.levels - 1, level, -1):
            i = address >> (12 + 9 * above) & 511
            if not self.tables[table][i]:
                self.tables[self.next] = [0] * 512
                self.tables[table][i] = self.next | TABLE
                self.next += 0x1000
            table = self.tables[table][i] & ~0xFFF
        self.tables[table][address >> (12 + 9 * level) & 511] = entry

    def memory(self, missing=()):
        memory = Memory()
        memory.put_words(PGD, self.tables[0x100000])
        for physical, words in self.tables.items():
            if physical not in missing:
                memory.put_words(physical, words, physical=True)
        return memory


def walk(tables, levels, wanted=None, missing=()):
    troubles = WalkTroubles()
    prog = tables.memory(missing).prog
    found = {}
    for leaves in for_each_leaf(prog, make_layout(levels=levels), PGD, troubles, wanted):
        for address, entry in zip(leaves.address.tolist(), leaves.entry.tolist(), strict=True):
            found[address] = entry, leaves.level
    return found, troubles


@pytest.mark.parametrize("levels", [4, 5])
def test_all_levels(levels):
    top = 1 << (12 + 9 * levels - 1)
    expected = {
        0x1000: (0x5000 | TABLE, 0),
        0x7F0000001000: (0x6000 | TABLE, 0),
        0x7F0000200000: (0x40000000 | TABLE | PSE, 1),
        0x7F0040000000: (0x80000000 | TABLE | PSE, 2),
        top - 0x1000: (0x7000 | TABLE, 0),
    }
    tables = Tables(levels)
    for address, (entry, level) in expected.items():
        tables.map(address, entry, level)
    # The kernel's half is not looked at.
    tables.tables[0x100000][256] = 0x100000 | TABLE
    found, troubles = walk(tables, levels)
    assert found == expected
    assert troubles.unreadable == []


def test_only_wanted_addresses():
    tables = Tables(4)
    for i in range(20):
        tables.map(0x7F0000000000 + i * 0x1000, 0x100000 + i * 0x1000 | TABLE)
    tables.map(0x7F0000200000, 0x40000000 | TABLE | PSE, 1)
    wanted = np.array([0x7F0000003000, 0x7F0000234000, 0x7F0010000000], dtype=np.uint64)
    found, _ = walk(tables, 4, wanted)
    assert set(found) == {0x7F0000003000, 0x7F0000200000}


def test_unreadable_table_is_noted_and_the_rest_is_walked():
    tables = Tables(4)
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    lost = tables.next - 0x1000
    tables.map(0x7F0000201000, 0x6000 | TABLE)
    found, troubles = walk(tables, 4, missing=(lost,))
    assert set(found) == {0x7F0000201000}
    assert troubles.unreadable == [0x7F0000000000]


def test_migrating_huge_page_is_a_leaf():
    tables = Tables(4)
    entry = 29 << 59 | 0x1234 << 14
    tables.map(0x7F0000200000, entry, 1)
    found, _ = walk(tables, 4)
    assert found == {0x7F0000200000: (entry, 1)}


def leaves(entry, level=0):
    return Leaves(np.array([0x1000], dtype=np.uint64), np.array([entry], dtype=np.uint64), level)


@pytest.mark.parametrize(
    ("entry", "level", "present"),
    [
        (0x5000 | TABLE, 0, True),
        (0x5000 | PROTNONE, 0, True),
        (0x5000 | PSE, 0, False),
        (0x200000 | PSE, 1, True),
        (5 << 59 | 0x4000, 0, False),
    ],
)
def test_present(entry, level, present):
    assert leaf_present(leaves(entry, level)).tolist() == [present]


def test_page_frame_of_an_entry_without_rights_is_inverted():
    layout = make_layout()
    inverted = (~(0x1234 << 12) & ((1 << 52) - 1) & ~0xFFF) | PROTNONE
    assert leaf_pfn(layout, leaves(inverted)).tolist() == [0x1234]
    assert leaf_pfn(layout, leaves(0x1234000 | TABLE | 1 << 63)).tolist() == [0x1234]
    # Bit 12 of a huge entry is an attribute.
    assert leaf_pfn(layout, leaves(0x40001000 | TABLE | PSE, 1)).tolist() == [0x40000]


def test_special_and_swap_type():
    assert leaf_special(leaves(0x5000 | TABLE | SPECIAL)).tolist() == [True]
    assert swap_type(leaves(29 << 59 | 0x1234 << 14)).tolist() == [29]


def test_page_frame_that_an_entry_stands_for():
    # __swp_entry(), and SWP_MIG_YOUNG and SWP_MIG_DIRTY above a page frame of 34 bits.
    entry = 26 << 59 | (~(0x12345 | 3 << 34) & ((1 << 50) - 1)) << 9
    assert entry == absent_entry(26, 0x12345 | 3 << 34)
    assert swap_offset(leaves(entry)).tolist() == [0x12345 | 3 << 34]
    assert swap_pfn(make_layout(), leaves(entry)).tolist() == [0x12345]
    assert leaf_present(leaves(entry)).tolist() == [False]


def test_bits_that_a_processor_leaves_in_an_empty_entry():
    tables = Tables(4)
    tables.map(0x7F0000001000, 0x60)
    tables.map(0x7F0000002000, 0x5000 | TABLE)
    assert set(walk(tables, 4)[0]) == {0x7F0000002000}
