# SPDX-License-Identifier: GPL-2.0-only
import dataclasses

import numpy as np
import pytest

from kvirt.mm.swap import SwapCache, swp_entry
from tests.unit.fake import (
    NR_SWAPPER_SPACES,
    SWAP_INFO,
    SWAP_SPACES,
    SWAP_TABLES,
    SWAPPER_SPACES,
    VMEMMAP,
    Memory,
    make_layout,
)

AREA, CLUSTERS, TABLE, NODE = (0xFFFF888000000000 + i * 0x10000 for i in range(1, 5))
SHADOW = 1 << 60 | 0x55 << 1 | 1
BAD = (1 << 64) - 8


def u64(*values):
    return np.array(values, dtype=np.uint64)


def lookup(memory, how, types, offsets):
    layout = dataclasses.replace(make_layout(), swap_cache=how)
    found, known = SwapCache(memory.prog, layout).lookup(u64(*types), u64(*offsets))
    return [int(pfn) if good else None for pfn, good in zip(found, known, strict=True)]


def tables(entries, cluster=1):
    memory = Memory()
    memory.put_words(SWAP_INFO, [0, AREA, 0])
    memory.put_struct(SWAP_TABLES.info, AREA, {"max": 0x600, "cluster_info": CLUSTERS})
    memory.put_words(CLUSTERS, [0, 0, 0, 0, 0, 0x123])
    memory.put_words(CLUSTERS + cluster * 16 + 8, [TABLE])
    memory.put_words(TABLE, entries)
    return memory


def test_swap_tables():
    memory = tables([0, 3 << 60 | 0x777 << 2 | 2, SHADOW, BAD, VMEMMAP + 0x88 * 64, VMEMMAP + 4])
    offsets = [0x205, 0x204, 0x203, 0x202, 0x201, 0x200]
    # The first swap tables had pointers; what points into a folio is nothing known.
    assert lookup(memory, SWAP_TABLES, [1] * 6, offsets) == [None, 0x88, 0, 0, 0x777, 0]


def test_swap_entries_of_no_cluster_or_area():
    memory = tables([0x777 << 2 | 2])
    # No table, a table that cannot be read, beyond the area, no such area, beyond all areas.
    assert lookup(memory, SWAP_TABLES, [1, 1, 1, 0, 9], [5, 0x405, 0x600, 0x200, 0x200]) == [
        0,
        None,
        None,
        None,
        None,
    ]


def node(shift, slots):
    words = [0] * 72
    words[0] = shift
    for slot, entry in slots.items():
        words[5 + slot] = entry
    return words


def spaces(heads, nodes):
    memory = Memory()
    memory.put_words(SWAPPER_SPACES, [AREA])
    memory.put(NR_SWAPPER_SPACES, len(heads).to_bytes(4, "little"))
    memory.put_words(AREA, [word for head in heads for word in (0, head)])
    for i, words in enumerate(nodes):
        memory.put_words(NODE + i * 0x1000, words)
    return memory


def folio(pfn):
    return VMEMMAP + pfn * 64


def pointer(i):
    return NODE + i * 0x1000 | 2


def test_swap_address_spaces():
    sibling = 3 << 2 | 2
    memory = spaces(
        [pointer(0), folio(0x50)],
        [
            node(6, {0: pointer(1), 5: folio(0x90)}),
            node(0, {3: folio(0x70), 4: sibling, 5: SHADOW, 6: folio(1) + 8}),
        ],
    )
    offsets = [3, 4, 5, 6, 7, 5 * 64 + 9, 64, 64 * 64, 1 << 14, 1 << 14 | 1, 2 << 14]
    assert lookup(memory, SWAP_SPACES, [0] * len(offsets), offsets) == [
        0x70,
        0x70,
        0,
        None,
        0,
        0x90,
        0,
        0,
        0x50,
        0,
        None,
    ]


@pytest.mark.parametrize("shift", [0, 12])
def test_swap_address_spaces_indexed_by_the_whole_offset(shift):
    # Until Linux 6.10.
    index = 1 << 14 | 5
    nodes = [node(12, {4: pointer(1)}), node(6, {0: pointer(2)}), node(shift, {5: folio(0x70)})]
    memory = spaces([0, pointer(0)], nodes)
    # A level that does not go down is damage.
    assert lookup(memory, SWAP_SPACES, [0], [index]) == [None if shift else 0x70]


def test_no_swap_cache():
    assert lookup(Memory(), None, [0], [1]) == [None]


def test_swap_entry():
    assert swp_entry(u64(3), u64(0x1234)).tolist() == [3 << 58 | 0x1234]
