# SPDX-License-Identifier: GPL-2.0-only
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvirt import pgtable
from kvirt.mm import pagetable
from kvirt.mm.pagetable import (
    Leaves,
    WalkTroubles,
    absent_entry,
    for_each_leaf,
    kernel_huge_page,
    kernel_pages,
    leaf_pfn,
    leaf_present,
    leaf_special,
    read_alike,
    swap_offset,
    swap_pfn,
    swap_type,
)
from tests.unit.fake import Memory, make_layout
from tests.unit.mm.tables import PGD, PROTNONE, PSE, SPECIAL, TABLE, TOP, X86, Arm64, Tables, any_tables

# The top table, and what its entries may have besides.
TABLES = pgtable.x86_64(4, (1 << 52) - 1)


def format_of(arch):
    """kvirt's own tables for an architecture."""
    if isinstance(arch, X86):
        return pgtable.x86_64(arch.levels, (1 << 52) - 1)
    lpa2 = arch.pa_bits == 52 and arch.shift < 16
    return pgtable.arm64(arch.shift, arch.va_bits, arch.va_bits, lpa2=lpa2, prot_none=arch.old)


def walk(tables, wanted=None, missing=()):
    troubles = WalkTroubles()
    prog = tables.memory(missing).prog
    found = {}
    layout = make_layout(tables=format_of(tables.arch))
    for leaves in for_each_leaf(prog, layout, PGD, troubles, wanted):
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
    tables = Tables(X86(levels))
    for address, (entry, level) in expected.items():
        tables.map(address, entry, level)
    found, troubles = walk(tables)
    assert found == expected
    assert troubles.unreadable == []


def test_only_wanted_addresses():
    tables = Tables(X86())
    for i in range(20):
        tables.map(0x7F0000000000 + i * 0x1000, 0x100000 + i * 0x1000 | TABLE)
    tables.map(0x7F0000200000, 0x40000000 | TABLE | PSE, 1)
    wanted = np.array([0x7F0000003000, 0x7F0000234000, 0x7F0010000000], dtype=np.uint64)
    found, _ = walk(tables, wanted)
    assert set(found) == {0x7F0000003000, 0x7F0000200000}


def test_unreadable_table_is_noted_and_the_rest_is_walked():
    tables = Tables(X86())
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    lost = tables.next - 0x1000
    tables.map(0x7F0000201000, 0x6000 | TABLE)
    found, troubles = walk(tables, missing=(lost,))
    assert set(found) == {0x7F0000201000}
    assert troubles.unreadable == [0x7F0000000000]


@pytest.mark.parametrize("stray", [1, 0x5, 0x27, 0xE7, 0x667, 1 << 52 | 0x67, 0xFFFF8880000000FF])
def test_what_cannot_lead_to_a_table_is_not_followed(stray):
    tables = Tables(X86())
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    tables.tables[TOP][3] = stray
    found, troubles = walk(tables)
    assert list(found) == [0x7F0000001000]
    assert troubles.unreadable == [3 << 39]


@pytest.mark.parametrize("low", [0x47, 0x67, 1 << 63 | 0x67])
def test_what_the_kernel_itself_sets_in_an_entry_for_a_table(low):
    tables = Tables(X86())
    tables.map(0x7F0000001000, 0x5000 | TABLE)
    top = tables.tables[TOP].tolist()
    tables.tables[TOP] = np.array([entry and entry & ~0xFFF | low for entry in top], dtype="<u8")
    found, troubles = walk(tables)
    assert list(found) == [0x7F0000001000]
    assert troubles.unreadable == []


def test_tables_are_not_tried_one_by_one_for_ever(monkeypatch):
    tables = Tables(X86())
    addresses = [i << 21 for i in range(8)]
    for address in addresses:
        tables.map(address, 0x5000 | TABLE)
    leading = sorted(tables.tables)[-8:]
    assert walk(tables, missing=leading[:3])[1].unreadable == addresses[:3]
    monkeypatch.setattr(pagetable, "_UNREADABLE_MAX", 3)
    found, troubles = walk(tables, missing=leading[:3])
    assert (found, troubles.unreadable) == ({}, addresses)


def test_migrating_huge_page_is_a_leaf():
    tables = Tables(X86())
    entry = 29 << 59 | 0x1234 << 14
    tables.map(0x7F0000200000, entry, 1)
    found, _ = walk(tables)
    assert found == {0x7F0000200000: (entry, 1)}


def leaves(*entries, level=0):
    addresses = 0x1000 * np.arange(1, len(entries) + 1, dtype=np.uint64)
    return Leaves(addresses, np.array(entries, dtype=np.uint64), level, TABLES)


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
    assert leaf_present(leaves(entry, level=level)).tolist() == [present]


def test_neighbours_without_rights_are_one_run():
    frames = np.arange(0x1000, 0x1100, dtype=np.uint64)
    inverted = ~(frames << np.uint64(12)) & np.uint64((1 << 52) - 4096) | np.uint64(PROTNONE)
    bits, runs = read_alike(leaves(*inverted.tolist()), TABLE | PROTNONE)
    assert (bits, runs.first.tolist(), runs.lengths.tolist()) == (PROTNONE, [0x1000], [0x100])


def test_entries_that_rise_beyond_all_addresses_are_no_run():
    first = (1 << 52) - 8 * 4096 | TABLE
    beyond = leaves(*range(first, first + 64 * 4096, 4096))
    assert read_alike(beyond, 1)[1].each().tolist() == [(1 << 40) - 8 + i & (1 << 40) - 1 for i in range(64)]


def test_page_frame_of_an_entry_without_rights_is_inverted():
    inverted = (~(0x1234 << 12) & ((1 << 52) - 1) & ~0xFFF) | PROTNONE
    assert leaf_pfn(leaves(inverted)).tolist() == [0x1234]
    assert leaf_pfn(leaves(0x1234000 | TABLE | 1 << 63)).tolist() == [0x1234]
    # Bit 12 of a huge entry is an attribute.
    assert leaf_pfn(leaves(0x40001000 | TABLE | PSE, level=1)).tolist() == [0x40000]


def test_special_and_swap_type():
    assert leaf_special(leaves(0x5000 | TABLE | SPECIAL)).tolist() == [True]
    assert swap_type(leaves(29 << 59 | 0x1234 << 14)).tolist() == [29]


def test_page_frame_that_an_entry_stands_for():
    # __swp_entry(), and SWP_MIG_YOUNG and SWP_MIG_DIRTY above a page frame of 34 bits.
    entry = 26 << 59 | (~(0x12345 | 3 << 34) & ((1 << 50) - 1)) << 9
    assert entry == absent_entry(TABLES, 26, 0x12345 | 3 << 34)
    assert swap_offset(leaves(entry)).tolist() == [0x12345 | 3 << 34]
    assert swap_pfn(make_layout(), leaves(entry)).tolist() == [0x12345]
    assert leaf_present(leaves(entry)).tolist() == [False]


def test_bits_that_a_processor_leaves_in_an_empty_entry():
    tables = Tables(X86())
    tables.map(0x7F0000001000, 0x60)
    tables.map(0x7F0000002000, 0x5000 | TABLE)
    assert set(walk(tables)[0]) == {0x7F0000002000}


ARCHITECTURES = {
    "x86-64": X86(4),
    "x86-64 with 5 levels": X86(5),
    "arm64 4K": Arm64(12, 48),
    "arm64 4K, 3 levels": Arm64(12, 39),
    "arm64 4K, LPA2, 5 levels": Arm64(12, 52, pa_bits=52),
    "arm64 4K, until 6.9": Arm64(12, 48, old=True),
    "arm64 16K, 2 levels": Arm64(14, 36),
    "arm64 16K, 3 levels": Arm64(14, 47),
    "arm64 16K, top table of 2 entries": Arm64(14, 48),
    "arm64 16K, LPA2": Arm64(14, 52, pa_bits=52),
    "arm64 64K, 2 levels": Arm64(16, 42),
    "arm64 64K, until 6.9": Arm64(16, 48, old=True),
    "arm64 64K, LVA and LPA": Arm64(16, 52, pa_bits=52),
}


@st.composite
def alike(draw):
    """Tables, and entries most of which lead to neighbours: one after the other, inverted, or in no order."""
    tables = format_of(draw(st.sampled_from(list(ARCHITECTURES.values()))))
    mask = tables.address_mask(0)
    count = draw(st.integers(1, 100))
    frames = draw(st.integers(0, mask >> tables.page_shift)) + np.arange(count)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, count - 1))
        frames[at:] = draw(st.integers(0, mask >> tables.page_shift)) + np.arange(count - at)
    if draw(st.booleans()):
        frames = np.random.default_rng(draw(st.integers(0, 9))).permutation(frames)
    entries = (frames.astype(np.uint64) << np.uint64(tables.page_shift)) & np.uint64(mask)
    if draw(st.booleans()):
        entries ^= np.uint64(mask)
    entries |= np.uint64(draw(st.sampled_from([TABLE, PROTNONE, tables.high | 1, 1 << 63 | TABLE])))
    for _ in range(draw(st.integers(0, 3))):
        entries[draw(st.integers(0, count - 1))] ^= np.uint64(1 << draw(st.integers(0, 63)))
    return Leaves(np.arange(count, dtype=np.uint64) * np.uint64(tables.page_size), entries, 0, tables)


@settings(max_examples=300, deadline=None)
@given(entries=alike(), bits=st.sampled_from([0, 1, 0x201, TABLE | 1 << 63]))
def test_entries_that_are_alike_are_found_with_where_they_lead_to(entries, bits):
    found = read_alike(entries, bits)
    have = {entry & bits for entry in entries.entry.tolist()}
    if found is None:
        assert len(have) > 1
    else:
        assert have == {found[0]}
        assert found[1].each().tolist() == leaf_pfn(entries).tolist()


@given(
    arch=st.sampled_from(list(ARCHITECTURES.values())),
    count=st.integers(1, 600),
    beginning=st.integers(0, 1 << 30),
    values=st.lists(st.integers(0, (1 << 64) - 1), max_size=5),
    cut=st.tuples(st.integers(0, 599), st.integers(1, 600)),
)
@settings(deadline=None)
def test_addresses_of_neighbours_need_not_be_written_down(arch, count, beginning, values, cut):
    tables = format_of(arch)
    first = beginning * tables.page_size
    addresses = first + np.arange(count, dtype=np.uint64) * np.uint64(tables.page_size)
    entries = np.arange(count, dtype=np.uint64)
    whole = Leaves(first, entries, 0, tables), Leaves(addresses, entries, 0, tables)
    begin = cut[0] % count
    part = slice(begin, min(begin + cut[1], count))
    near = [int(addresses[0]), int(addresses[-1])]
    values = np.array([*values, *near, near[0] + 1, near[1] + 1, max(near[0], 1) - 1], dtype=np.uint64)
    for some, other in (whole, [leaves.part(part) for leaves in whole]):
        assert some.ends() == other.ends()
        assert some.search(values).tolist() == np.searchsorted(other.address, values).tolist()
        assert some.address.tolist() == other.address.tolist()
        # Also once they are.
        assert some.ends() == other.ends()
        assert some.search(values).tolist() == np.searchsorted(other.address, values).tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_any_tables(arch, data):
    tables = data.draw(any_tables(arch))
    expected = tables.leaves()
    found, troubles = walk(tables)
    assert found == expected
    assert troubles.unreadable == []
    layout = make_layout(tables=format_of(arch))
    for level in (0, *arch.huge_levels):
        at = [address for address in found if found[address][1] == level]
        entries = np.array([found[a][0] for a in at], dtype=np.uint64)
        together = Leaves(np.array(at, dtype=np.uint64), entries, level, layout.pgtable)
        assert together.pages == 1 << arch.index_bits * level
        # One by one, and together with others: what they have in common is looked at once.
        for number, address in list(enumerate(at))[:: 1 + len(at) // 500]:
            one = together.take(np.array([number]))
            for some, i in ((one, 0), (together, number)):
                if leaf_present(some)[i]:
                    kind = True, bool(leaf_special(some)[i]), int(leaf_pfn(some)[i])
                else:
                    kind = False, int(swap_type(some)[i]), int(swap_offset(some)[i])
                assert kind == arch.kind(found[address][0], level), hex(found[address][0])
    wanted = data.draw(st.lists(st.sampled_from(sorted(expected)), unique=True)) if expected else []
    some, _ = walk(tables, np.array(sorted(wanted), dtype=np.uint64))
    assert some == {address: expected[address] for address in wanted}


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("type_", [0, 29, 31])
def test_entries_that_are_made_are_read_back(arch, type_):
    entry = absent_entry(format_of(arch), type_, 0x12345)
    assert arch.kind(entry, 0) == (False, type_, 0x12345)


ARM64 = [arch for arch in ARCHITECTURES.values() if isinstance(arch, Arm64)]


@pytest.mark.parametrize("arch", ARM64)
def test_tables_anywhere_in_memory(arch):
    """With 52 bits of physical address their uppermost ones are elsewhere in an entry."""
    tables = Tables(arch)
    tables.next = (1 << arch.pa_bits) - (1 << arch.shift) * 8
    tables.map(1 << arch.shift, arch.table(0x1000000), 0)
    found, troubles = walk(tables)
    assert (list(found), troubles.unreadable) == ([1 << arch.shift], [])


@pytest.mark.parametrize("arch", [Arm64(12, 48), Arm64(14, 47), Arm64(16, 48)])
@pytest.mark.parametrize("stray", [1, 0x443, 1 << 52 | 3, 1 << 56 | 3, 0xFFFF888000000003])
def test_what_cannot_lead_to_a_table_of_arm64_is_not_followed(arch, stray):
    tables = Tables(arch)
    tables.map(0, arch.table(0x1000000))
    level = arch.levels - 1
    tables.tables[TOP][3] = stray
    found, troubles = walk(tables)
    assert list(found) == [0]
    assert troubles.unreadable == [3 << (arch.shift + arch.index_bits * level)]


@pytest.mark.parametrize("extra", [0, 1 << 10, 1 << 60])
def test_what_the_kernel_itself_sets_in_an_entry_for_a_table_of_arm64(extra):
    tables = Tables(Arm64(14, 47))
    tables.map(0, 0x1000003)
    tables.tables[TOP][0] |= np.uint64(extra)
    assert list(walk(tables)[0]) == [0]


KERNEL = 0xFFFF800000000000


@pytest.mark.parametrize(
    ("tables", "huge", "slots"),
    [
        (pgtable.x86_64(4, (1 << 52) - 1), 0xE7, (0x100, 0, 1)),
        (pgtable.arm64(12, 48, 48, lpa2=False, prot_none=False), 0x701, (0x100, 0, 1)),
        # A kernel for 52 bits on a processor for 48 leaves the lower entries of its top table empty.
        (pgtable.arm64(16, 48, 52, lpa2=False, prot_none=False), 0x701, (0x3E0, 1)),
    ],
)
def test_huge_pages_of_the_kernel(tables, huge, slots, monkeypatch):
    memory = Memory()
    prog = memory.prog
    at = [0x200000 + i * 0x10000 for i in range(len(slots))]
    monkeypatch.setattr(pagetable, "_init_pgd", lambda prog: PGD)
    for level, (slot, physical) in enumerate(zip(slots, at, strict=True)):
        words = [0] * max(tables.entries, tables.kernel_entries)
        last = level == len(slots) - 1
        words[slot] = 0x40000000 | huge if last else at[level + 1] | (0x67 if tables.inverted else 3)
        if level:
            memory.put_words(physical, words, physical=True)
        else:
            memory.put_words(PGD, words)
    address = KERNEL + tables.huge_size
    assert kernel_huge_page(prog, tables, address + 0x1234) == 0x40001234
    assert kernel_huge_page(prog, tables, address + tables.huge_size) is None
    pages = kernel_pages(prog, tables, address)
    assert pages.tolist() == list(range(0x40000000, 0x40000000 + tables.huge_size, tables.page_size))
    assert set(kernel_pages(prog, tables, address + tables.huge_size)) == {-1}


@pytest.mark.parametrize("tables", [pgtable.x86_64(4, (1 << 52) - 1)])
def test_pages_of_the_kernel_by_their_table(tables, monkeypatch):
    memory = Memory()
    monkeypatch.setattr(pagetable, "_init_pgd", lambda prog: PGD)
    for level, at in zip((3, 2, 1), (PGD, 0x200000, 0x210000), strict=True):
        words = [0] * 512
        words[KERNEL >> tables.shift(level) & 511] = (
            0x210000 if level == 2 else 0x200000 if level == 3 else 0x220000
        ) | 0x67
        memory.put_words(at, words, physical=level != 3)
    memory.put_words(
        0x220000, [0x5000 | 0x63, 0, 0x7000 | 0x62, *[0x9000 | 0x63 | 1 << 63] * 509], physical=True
    )
    # What is not valid is not mapped, whatever else the entry says.
    assert kernel_pages(memory.prog, tables, KERNEL).tolist() == [0x5000, -1, -1, *[0x9000] * 509]
    assert kernel_huge_page(memory.prog, tables, KERNEL) is None


@pytest.mark.parametrize(("step", "lengths"), [(1, [512, 1024, 1024, 512]), (3, [512, 4 * 512, 512])])
def test_more_tables_are_read_at_once_as_their_pages_lie(monkeypatch, step, lengths):
    monkeypatch.setattr(pagetable, "_TABLES", 1)
    monkeypatch.setattr(pagetable, "_TABLES_NEIGHBOURS", 2)
    monkeypatch.setattr(pagetable, "_TABLES_SCATTERED", 4)
    tables = Tables(X86(4))
    for number in range(6 * 512):
        tables.map(0x7F0000000000 + number * 4096, (0x10000 + number * step) << 12 | TABLE, 0)
    layout = make_layout(tables=format_of(tables.arch))
    found = list(for_each_leaf(tables.memory().prog, layout, PGD, WalkTroubles()))
    assert [len(leaves) for leaves in found] == lengths
    addresses = np.concatenate([leaves.address for leaves in found])
    assert (np.diff(addresses) == 4096).all()
