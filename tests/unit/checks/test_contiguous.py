# SPDX-License-Identifier: GPL-2.0-only
"""hugetlb pages that several entries map, as arm64 has them."""

import dataclasses
from types import SimpleNamespace

import numpy as np

from kvirt import pgtable
from kvirt.checks.registry import PageBatch, within_hugetlb
from kvirt.mm.folio import Folios
from kvirt.mm.ksm import RmapItems
from tests.unit.fake import make_layout

TABLES = pgtable.arm64(12, 48, 48, lpa2=False, prot_none=True)
START, HEAD, PAGES = 0xFFFF80000000, 0x1000, 32


def batch(in_pages):
    """Two hugetlb pages of 16 entries each, in the third and fourth huge page of a file."""
    layout = dataclasses.replace(make_layout(tables=TABLES), hugetlb_index_in_pages=in_pages)
    table = SimpleNamespace(
        space=SimpleNamespace(layout=layout),
        start=np.array([START], dtype=np.uint64),
        hugetlb_order=np.array([4], dtype=np.uint64),
        anon_pgoff=np.array([2 * 16], dtype=np.uint64),
    )
    number = np.arange(PAGES, dtype=np.uint64)
    zero, no = np.zeros(PAGES, dtype=np.int64), np.zeros(PAGES, dtype=bool)
    head = HEAD + number // 16 * 16
    index = 2 * 16 + number // 16 * 16 if in_pages else 2 + number // 16
    folios = Folios(
        ~no, number, head, number, index.astype(np.uint64), no, ~no, zero + 16, zero, zero + 1, zero + 1
    )
    row = np.zeros(PAGES, dtype=np.intp)
    address = START + number * np.uint64(4096)
    return PageBatch(layout, table, 0, 1, address, HEAD + number, row, folios, ~no, RmapItems.none(PAGES))


def test_each_entry_has_its_own_index():
    for in_pages in (True, False):
        pages = batch(in_pages)
        assert pages.expected_index().tolist() == pages.index().tolist()


def test_where_in_its_page_an_entry_is():
    pages = batch(True)
    assert within_hugetlb(pages.table, pages.address, pages.row).tolist() == [*range(16)] * 2
    pages.table.hugetlb_order[:] = 0
    assert not within_hugetlb(pages.table, pages.address, pages.row).any()
