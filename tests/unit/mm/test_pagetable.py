# SPDX-License-Identifier: GPL-2.0-only
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvirt.mm import pagetable
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


@pytest.mark.parametrize("stray", [1, 0x5, 0x27, 0xE7, 0x667, 1 << 52 | 0x67, 0xFFFF8880000000FF])
def test_what_cannot_lead_to_a_table_is_not_followed(stray):
    tables = Tables(4)
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    tables.tables[0x100000][3] = stray
    found, troubles = walk(tables, 4)
    assert list(found) == [0x7F0000001000]
    assert troubles.unreadable == [3 << 39]


@pytest.mark.parametrize("low", [0x47, 0x67, 1 << 63 | 0x67])
def test_what_the_kernel_itself_sets_in_an_entry_for_a_table(low):
    tables = Tables(4)
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    tables.tables[0x100000] = [entry and entry & ~0xFFF | low for entry in tables.tables[0x100000]]
    found, troubles = walk(tables, 4)
    assert list(found) == [0x7F0000001000]
    assert troubles.unreadable == []


def test_tables_are_not_tried_one_by_one_for_ever(monkeypatch):
    tables = Tables(4)
    addresses = [i << 21 for i in range(8)]
    for address in addresses:
        tables.map(address, 0x5000 | TABLE)
    leading = sorted(tables.tables)[-8:]
    assert walk(tables, 4, missing=leading[:3])[1].unreadable == addresses[:3]
    monkeypatch.setattr(pagetable, "_UNREADABLE_MAX", 3)
    found, troubles = walk(tables, 4, missing=leading[:3])
    assert (found, troubles.unreadable) == ({}, addresses)


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


class Plain:
    """The same walk an entry at a time, by the rules of arch/x86/include/asm/pgtable.h alone."""

    def __init__(self, levels, tables):
        self.levels = levels
        self.tables = tables

    def leaves(self):
        found = {}
        # The upper half of the top table is the kernel's.
        self._walk(0x100000, self.levels - 1, 0, range(256), found)
        return found

    def _walk(self, table, level, base, slots, found):
        for slot in slots:
            entry = self.tables[table][slot]
            address = base + (slot << (12 + 9 * level))
            if entry == 0:
                continue
            if level == 0 or (level < 3 and (entry & PSE or not entry & 1)):
                found[address] = entry, level
            elif entry & 1:
                self._walk(entry & (1 << 52) - 1 & ~0xFFF, level - 1, address, range(512), found)

    @staticmethod
    def kind(entry, level):
        """Present for the kernel or not, special or not, and the page frame or the swap type."""
        if not (entry & 1 or entry & PROTNONE or (level and entry & PSE)):
            return False, entry >> 59
        frame = entry if entry & 1 else ~entry
        return True, bool(entry & SPECIAL), (frame & (1 << 52) - 1) >> (12 + 9 * level) << 9 * level


def bits(first, last):
    """Any value of some bits of an entry."""
    return st.integers(0, (1 << (last + 1 - first)) - 1).map(lambda value: value << first)


@st.composite
def leaf_entries(draw, level):
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


@st.composite
def any_tables(draw, levels):
    """Tables of a process: few regions, so that leaves share them."""
    top = 1 << (12 + 9 * levels - 1)
    tables = Tables(levels)
    for level in draw(st.lists(st.sampled_from((0, 0, 0, 1, 1, 2)), min_size=1, max_size=40)):
        near = draw(st.sampled_from((0, 0x7F0000000000, top - (1 << 31))))
        address = (near + draw(st.integers(0, (1 << 31) - 1))) >> (12 + 9 * level) << (12 + 9 * level)
        # A leaf may hide the tables that were there.
        if all(not is_leaf(tables, address, above) for above in range(level, levels)):
            # Neighbours in one table, and a full one now and then.
            count = draw(st.sampled_from((1, 1, 3, 512)))
            entry = draw(leaf_entries(level))
            tables.map(address, entry, level)
            for other in range(1, count if level == 0 else 1):
                if address + other * 4096 < top and (address >> 12) % 512 + other < 512:
                    tables.map(address + other * 4096, entry, level)
    return tables


@pytest.mark.parametrize("levels", [4, 5])
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_tables(levels, data):
    tables = data.draw(any_tables(levels))
    expected = Plain(levels, tables.tables).leaves()
    found, troubles = walk(tables, levels)
    assert found == expected
    assert troubles.unreadable == []
    layout = make_layout(levels=levels)
    for level in (0, 1, 2):
        at = [address for address in found if found[address][1] == level]
        together = Leaves(
            np.array(at, dtype=np.uint64), np.array([found[a][0] for a in at], dtype=np.uint64), level
        )
        # One by one, and together with others: what they have in common is looked at once.
        for number, address in enumerate(at):
            one = together.take(np.array([number]))
            for some, i in ((one, 0), (together, number)):
                if leaf_present(some)[i]:
                    kind = True, bool(leaf_special(some)[i]), int(leaf_pfn(layout, some)[i])
                else:
                    kind = False, int(swap_type(some)[i])
                assert kind == Plain.kind(found[address][0], level), hex(found[address][0])
    wanted = data.draw(st.lists(st.sampled_from(sorted(expected)), unique=True)) if expected else []
    some, _ = walk(tables, levels, np.array(sorted(wanted), dtype=np.uint64))
    assert some == {address: expected[address] for address in wanted}


def is_leaf(tables, address, level):
    """Whether a table of this level is there for an address, and has a leaf at it."""
    table = 0x100000
    for above in range(tables.levels - 1, level, -1):
        entry = tables.tables[table][address >> (12 + 9 * above) & 511]
        if entry == 0:
            return False
        if entry & ~0xFFF not in tables.tables or entry & 0xFFF != TABLE:
            return True
        table = entry & ~0xFFF
    return bool(tables.tables[table][address >> (12 + 9 * level) & 511])
