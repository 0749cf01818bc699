# SPDX-License-Identifier: GPL-2.0-only
import struct

import pytest

from kvirt.mm.maple import MapleError, MapleTree, mt_for_each
from tests.unit.fake import Memory, make_layout

MAX = (1 << 64) - 1
LEAF, ARANGE = 1, 3


def encode(address, type_):
    return address | type_ << 3 | 4


def root(address, type_):
    # The root is marked as an internal entry.
    return encode(address, type_) | 2


def node(pivots, slots, type_, end=None, parent=0x1):
    words = [0] * 32
    words[0] = parent
    first_slot = 16 if type_ == LEAF else 10
    words[1 : 1 + len(pivots)] = pivots
    words[first_slot : first_slot + len(slots)] = slots
    data = bytearray(struct.pack("<32Q", *words))
    data[248 if type_ == LEAF else 240] = len(slots) - 1 if end is None else end
    return bytes(data)


def entries(memory, ma_root):
    return list(mt_for_each(memory.prog, make_layout(), ma_root))


def test_empty_and_single_entry():
    memory = Memory()
    assert entries(memory, 0) == []
    assert entries(memory, 0xFFFF888000001000) == [(0, 0, 0xFFFF888000001000)]


def test_one_leaf_with_gaps_and_zero_entries():
    memory = Memory()
    zero_entry = 257 << 2 | 2
    memory.put(
        0x1000,
        node([0xFFF, 0x1FFF, 0x2FFF, 0x3FFF, MAX], [0, 0xA00, 0, zero_entry, 0], LEAF),
    )
    assert entries(memory, root(0x1000, LEAF)) == [(0x1000, 0x1FFF, 0xA00)]


def test_full_leaf_uses_all_slots():
    memory = Memory()
    lasts = [*(0x1000 * (i + 1) - 1 for i in range(15)), MAX]
    # With sixteen entries there is no room for the metadata: the last slot lies where it would be.
    data = bytearray(node(lasts[:15], [0x100 * (i + 1) for i in range(15)], LEAF))
    data[248:256] = (0x1000).to_bytes(8, "little")
    memory.put(0x1000, bytes(data))
    found = entries(memory, root(0x1000, LEAF))
    assert found == [(0x1000 * i, lasts[i], 0x100 * (i + 1)) for i in range(16)]


def test_two_levels_in_order():
    memory = Memory()
    memory.put(0x2000, node([0xFFF], [0xA00, 0xB00], LEAF))
    memory.put(0x3000, node([0x2FFF], [0xC00, 0xD00], LEAF))
    memory.put(0x1000, node([0x1FFF], [encode(0x2000, LEAF), encode(0x3000, LEAF)], ARANGE))
    assert entries(memory, root(0x1000, ARANGE)) == [
        (0, 0xFFF, 0xA00),
        (0x1000, 0x1FFF, 0xB00),
        (0x2000, 0x2FFF, 0xC00),
        (0x3000, MAX, 0xD00),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (node([0x1FFF], [encode(0x1000, ARANGE), 0xA00], ARANGE), "reached twice"),
        (node([0x1FFF], [0, encode(0x2000, LEAF)], ARANGE), "empty slot"),
        (node([0x1FFF], [0xA00, 0xB00], ARANGE, end=12), "claims 13 slots"),
        (node([0x1FFF], [0xDEAD000000000000 | LEAF << 3, 0], ARANGE), "cannot be read"),
        (node([0x1FFF], [0xA00, 0xB00], ARANGE, parent=0x1000), "dead"),
        (node([0x1FFF, 0xFFF], [0xDEAD000000000000 | LEAF << 3] * 3, ARANGE), "cannot be read|out of order"),
    ],
)
def test_damage_ends_with_a_reason(data, words):
    memory = Memory()
    memory.put(0x1000, data)
    with pytest.raises(MapleError, match=words):
        entries(memory, root(0x1000, ARANGE))


def test_pivots_out_of_order():
    memory = Memory()
    memory.put(0x1000, node([0x2FFF, 0x1FFF], [0xA00, 0xB00, 0xC00], LEAF))
    seen = []
    with pytest.raises(MapleError, match="out of order"):
        for entry in mt_for_each(memory.prog, make_layout(), root(0x1000, LEAF)):
            seen.append(entry)
    assert seen == [(0, 0x2FFF, 0xA00)]


def test_a_single_look_up_agrees_with_the_whole_walk():
    memory = Memory()
    layout = make_layout()
    memory.put(0x2000, node([0x0FFF, 0x1FFF, 0x7FFF], [0, 0xA00, 0xB00], LEAF))
    memory.put(0x3000, node([0x9FFF, MAX], [0xC00, 0], LEAF))
    memory.put(0x1000, node([0x7FFF, MAX], [encode(0x2000, LEAF), encode(0x3000, LEAF)], ARANGE))
    top = root(0x1000, ARANGE)
    stored, tree = entries(memory, top), MapleTree(memory.prog, layout, top)
    assert len(stored) == 3
    for index in (0, 0xFFF, 0x1000, 0x1FFF, 0x2000, 0x7FFF, 0x8000, 0x9FFF, 0xA000, MAX):
        expected = [entry for entry in stored if entry[0] <= index <= entry[1]]
        first, last, entry = tree.mas_walk(index)
        assert first <= index <= last
        assert ([(first, last, entry)] if entry else []) == expected
        assert tree.mtree_load(index) == entry
    single = MapleTree(memory.prog, layout, 0xFFFF888000001000)
    assert single.mas_walk(0) == (0, 0, 0xFFFF888000001000)
    assert single.mtree_load(1) == 0


def test_look_up_in_a_damaged_tree_ends():
    memory = Memory()
    # Its own child, for ever.
    memory.put(0x1000, node([MAX], [root(0x1000, ARANGE)], ARANGE))
    with pytest.raises(MapleError, match="deeper"):
        MapleTree(memory.prog, make_layout(), root(0x1000, ARANGE)).mtree_load(5)
    with pytest.raises(MapleError, match="cannot be read"):
        MapleTree(memory.prog, make_layout(), root(0x5000, ARANGE)).mtree_load(5)
    memory.put(0x6000, node([9, 4], [0xA00, 0xB00, 0xC00], LEAF))
    tree = MapleTree(memory.prog, make_layout(), root(0x6000, LEAF))
    with pytest.raises(MapleError, match="out of order"):
        tree.mtree_load(11)
    # What comes before the damage is as good as in a list of all entries.
    assert tree.mtree_load(9) == 0xA00
