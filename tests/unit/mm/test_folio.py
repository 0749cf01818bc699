# SPDX-License-Identifier: GPL-2.0-only
import struct
from dataclasses import replace

import numpy as np
import pytest

from kvirt.mm.folio import read_folios
from tests.unit.fake import VMEMMAP, Memory, make_layout

HEAD = 1 << 6


def page(flags=0, compound=0, mapping=0, index=0, mapcount=-1):
    return struct.pack("<QQQQQ8xi12x", flags, compound, 0, mapping, index, mapcount)


def second(nr_pages, compound=0, mapcount=-1, large=-1, entire=-1):
    """The second page of a large folio, as the made-up layout has it."""
    return struct.pack("<QQi4xi20xi8xI", 0, compound, large, entire, mapcount, nr_pages)


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
        [
            page(HEAD, mapping=0xFFFF888000000001, index=0x70),
            second(4, tail),
            *[page(compound=tail, index=0xBAD)] * 2,
        ],
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


def test_mapcounts():
    memory = Memory()
    tail = VMEMMAP + 8 * 64 | 1
    put_pages(memory, 8, [page(HEAD, mapping=1), second(4, tail, 2, 6, 1), page(compound=tail, mapcount=0)])
    put_pages(memory, 12, [page(mapping=1, mapcount=4)])
    folios = read(memory, [8, 9, 10, 12])
    assert folios.large.tolist() == [True, True, True, False]
    assert folios.nr_pages.tolist() == [4, 4, 4, 1]
    assert folios.page_mapcount.tolist() == [0, 3, 1, 5]
    assert folios.entire_mapcount.tolist() == [2, 2, 2, 0]
    assert folios.large_mapcount.tolist() == [7, 7, 7, 0]


def test_pages_that_count_the_whole_too():
    memory = Memory()
    tail = VMEMMAP + 8 * 64 | 1
    put_pages(memory, 8, [page(HEAD, mapping=1), second(4, tail), page(compound=tail, mapcount=1)])
    layout = replace(make_layout(), pg_double_map=1 << 9)
    pfns = np.array([10], dtype=np.uint64)
    assert read_folios(memory.prog, layout, pfns).page_mapcount.tolist() == [2]
    memory.put_words(VMEMMAP + 9 * 64, [1 << 9])
    assert read_folios(memory.prog, layout, pfns).page_mapcount.tolist() == [1]


@pytest.mark.parametrize(
    ("pfn", "astray"),
    [(8, False), (9, False), (11, False), (12, True), (7, True), (14, True)],
)
def test_tail_that_its_folio_does_not_reach_to(pfn, astray):
    memory = Memory()
    tail, other = VMEMMAP + 8 * 64 | 1, VMEMMAP + 13 * 64 | 1
    put_pages(memory, 7, [page(compound=tail), page(HEAD, mapping=1, index=5), second(4, tail)])
    put_pages(memory, 10, [*[page(compound=tail)] * 3, page(mapping=1), page(compound=other)])
    folios = read(memory, [pfn])
    assert folios.astray.tolist() == [astray]
    assert folios.is_anon().tolist() == [not astray]
