# SPDX-License-Identifier: GPL-2.0-only
import struct

import numpy as np
import pytest

from kvirt.mm.folio import read_folios
from tests.unit.fake import VMEMMAP, Memory, make_layout


def page(flags=0, compound=0, mapping=0, index=0):
    return struct.pack("<QQQQQ24x", flags, compound, 0, mapping, index)


def put_pages(memory, first, pages):
    memory.put(VMEMMAP + first * 64, b"".join(pages))


def read(memory, pfns, **kwargs):
    return read_folios(memory.prog, make_layout(**kwargs), np.array(pfns, dtype=np.uint64))


@pytest.mark.parametrize("compound_mask", [False, True])
def test_tail_pages_have_their_heads_mapping(compound_mask):
    memory = Memory()
    if compound_mask:
        tail = (-(4 * 64)) & ((1 << 64) - 1) | 1
    else:
        tail = VMEMMAP + 8 * 64 | 1
    put_pages(
        memory,
        8,
        [page(mapping=0xFFFF888000000001, index=0x70), *[page(compound=tail, index=0xBAD)] * 3],
    )
    put_pages(memory, 12, [page(mapping=0xFFFF888000000100, index=3)])
    # In any order, some twice.
    folios = read(memory, [12, 10, 8, 11, 10], compound_mask=compound_mask)
    assert folios.head.tolist() == [12, 8, 8, 8, 8]
    assert folios.index.tolist() == [3, 0x70, 0x70, 0x70, 0x70]
    assert folios.is_anon().tolist() == [False, True, True, True, True]
    assert folios.anon_vma().tolist()[1] == 0xFFFF888000000000
    assert folios.readable.all()


def test_ksm_is_not_anon():
    memory = Memory()
    put_pages(memory, 8, [page(mapping=0xFFFF888000000003)])
    folios = read(memory, [8])
    assert folios.is_ksm().tolist() == [True]
    assert folios.is_anon().tolist() == [False]


def test_what_cannot_be_read_is_marked_alone():
    memory = Memory()
    put_pages(memory, 8, [page(mapping=1)])
    put_pages(memory, 20, [page(mapping=1)])
    # 9 to 19 are missing between two that are close enough to be read together, and 1 << 45 is no memory.
    folios = read(memory, [8, 12, 20])
    assert folios.readable.tolist() == [True, False, True]
    assert folios.mapping.tolist() == [1, 0, 1]


@pytest.mark.parametrize("bits", range(34, 53))
def test_page_frames_beyond_all_memory(bits):
    memory = Memory()
    put_pages(memory, 8, [page(mapping=1), page(compound=VMEMMAP + (1 << bits) * 64 & (1 << 64) - 1 | 1)])
    # As the page frame of an entry, and as the head that a tail page names.
    assert read(memory, [8, 1 << bits]).readable.tolist() == [True, False]
    assert read(memory, [8, 9]).readable.tolist() == [True, False]


def test_wild_head_is_marked():
    memory = Memory()
    put_pages(memory, 8, [page(compound=0xDEAD000000000101)])
    assert read(memory, [8]).readable.tolist() == [False]
