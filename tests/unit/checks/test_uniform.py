# SPDX-License-Identifier: GPL-2.0-only
"""Many pages that are alike: judged by one of them, they are judged as each by itself."""

import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvirt.checks import patience, process, registry, uniform
from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import VmaTable
from kvirt.checks.sorting import ZERO, Sorter
from kvirt.checks.uniform import Uniform
from kvirt.findings import Severity
from kvirt.mm import pagetable
from kvirt.mm.pagetable import absent_entry
from tests.unit.checks.test_process import (
    ANON_VMA,
    AVC,
    LAYOUT,
    LEAF,
    MM,
    PFN,
    START,
    TABLE,
    VMA,
    Process,
    index_at,
    leaf,
    word,
)
from tests.unit.fake import VMEMMAP

TABLES = 8
PAGES = TABLES * 512
EXCLUSIVE = LAYOUT.pg_anon_exclusive


class Large(Process):
    """One VMA of thousands of anonymous pages, of which some entries and struct pages can be changed."""

    def __init__(self):
        super().__init__()
        end = START + PAGES * 4096
        self.memory.put_struct(LAYOUT.vma, VMA, self.vma | {"vm_end": end})
        words = leaf()
        words[2] = end - 1
        self.memory.put_words(LEAF, words)
        self.memory.put_words(AVC + LAYOUT.anon_tree.subtree_last, [(START >> 12) + PAGES - 1])
        # The lowest but one, which led to one table.
        lowest = [0x300000 + 4096 * i | TABLE for i in range(TABLES)]
        self.memory.put_words(0x201000, lowest + [0] * (512 - TABLES), physical=True)
        self.entries = np.array([PFN + i << 12 | TABLE for i in range(PAGES)], dtype="<u8")
        self.pages = np.zeros((PAGES + 16, 8), dtype="<u8")
        self.pages[:, 0] = EXCLUSIVE
        self.pages[:, 3] = ANON_VMA | 1
        self.pages[:, 4] = (START >> 12) + np.arange(len(self.pages))

    def check(self, moves=False, torn=()):
        self.memory.put(0x300000, self.entries.tobytes(), physical=True)
        self.memory.put(VMEMMAP + PFN * 64, self.pages.tobytes())
        for address, states in torn:
            self.changing(address, states)
        return ProcessChecker(self.memory.prog, LAYOUT, moves=moves).check(MM)


# What can be done to the page in the middle, or to its entry; and whether anything is said of it then.
AT = PAGES // 2
DAMAGES = {
    "nothing": (lambda made: None, False),
    "index": (lambda made: change(made, 4, 1), True),
    "mapping of another anon_vma": (lambda made: change(made, 3, 1 << 20), True),
    "mapping of a file": (lambda made: change(made, 3, 1), True),
    "KSM": (lambda made: change(made, 3, 2), True),
    "exclusive, and mapped twice": (lambda made: change(made, 6, 1), True),
    "a tail": (lambda made: change(made, 1, 1), True),
    "a head": (lambda made: change(made, 0, LAYOUT.pg_head), True),
    "poisoned": (lambda made: change(made, 0, LAYOUT.pg_hwpoison), True),
    "a flag that nobody asks for": (lambda made: change(made, 0, 1 << 50), False),
    "not exclusive": (lambda made: change(made, 0, EXCLUSIVE), False),
    "an entry that was accessed": (lambda made: entry(made, made.entries[AT] ^ 0x20), False),
    "a special entry": (lambda made: entry(made, made.entries[AT] | 0x200), True),
    "a swap entry": (lambda made: entry(made, absent_entry(LAYOUT.pgtable, 0, 5)), True),
    "an empty entry": (lambda made: entry(made, 0), True),
    "an empty entry, and pages that moved up": (lambda made: move_up(made), True),
    "an entry of PROT_NONE": (lambda made: entry(made, int(prot_none(made.entries[AT]))), False),
    "the page before once more": (lambda made: entry(made, made.entries[AT - 1]), True),
    "the zero page": (lambda made: entry(made, LAYOUT.zero_pfn << 12 | TABLE), True),
    "a page frame beyond all memory": (lambda made: entry(made, (1 << 51) | TABLE), True),
}


def change(made, word, bits):
    made.pages[AT, word] ^= np.uint64(bits)


def entry(made, value):
    made.entries[AT] = value


def move_up(made):
    made.entries[AT + 1 :] = made.entries[AT:-1].copy()
    made.entries[AT] = 0


def prot_none(entries):
    """Such entries hold their address inverted."""
    return (entries ^ np.uint64(((1 << 52) - 1) ^ 0xFFF)) & ~np.uint64(0xFFF) | np.uint64(0x100)


def mapping_at(i):
    return VMEMMAP + (PFN + i) * 64 + 24


def said(result):
    return result.findings, asdict(result.pages), result.incomplete


@pytest.fixture
def judged(monkeypatch):
    """How many entries are judged at once, each time."""
    numbers = []
    sort = Sorter.sort
    monkeypatch.setattr(
        Sorter, "sort", lambda self, leaves, *rest: numbers.append(len(leaves)) or sort(self, leaves, *rest)
    )
    return numbers


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_are_judged_as_each(monkeypatch, judged, damage, moves):
    made = Large()
    healthy = said(made.check(moves))
    spoil, shows = DAMAGES[damage]
    spoil(made)
    found = said(made.check(moves))
    assert (found != healthy) == shows
    monkeypatch.setattr(Uniform, "judge", lambda self, leaves, judge: None)
    judged.clear()
    assert said(made.check(moves)) == found
    assert max(judged) > PAGES // 4


def test_one_is_judged_for_all(judged):
    made = Large()
    counts = made.check().pages
    assert judged == [1]
    assert (counts.present, counts.anon, counts.checked, counts.verified) == (PAGES,) * 4
    judged.clear()
    entries = made.entries
    made.entries = prot_none(entries)
    assert made.check().pages == counts
    assert judged == [1]
    made.entries = entries
    # All of them are wrong alike: each is looked at.
    judged.clear()
    made.pages[:, 4] += 1
    [finding] = made.check().findings
    assert (finding.id, finding.pages) == ("FOLIO-INDEX", PAGES)
    assert judged == [1, PAGES]


def test_what_was_judged_once_is_not_said_of_others(judged, monkeypatch):
    monkeypatch.setattr(pagetable, "_TABLES", TABLES // 2)
    made = Large()
    assert made.check().pages.verified == PAGES
    assert judged == [1]
    made.pages[AT:, 4] += 1
    [finding] = made.check().findings
    assert (finding.id, finding.address, finding.pages) == ("FOLIO-INDEX", START + AT * 4096, PAGES - AT)


def test_others_are_judged_by_what_was_compared(judged, monkeypatch):
    monkeypatch.setattr(pagetable, "_TABLES", TABLES // 2)
    made, good = Large(), START >> 12
    made.pages[:, 4] += 1
    # The first page is another one by the time that it would be read again.
    result = made.check(moves=True, torn=[(index_at(0), [word(good + 1), word(good)])])
    assert judged[:3] == [1, PAGES // 2, PAGES // 2]
    found = {(finding.id, finding.severity, finding.pages) for finding in result.findings}
    assert found == {("FOLIO-INDEX", Severity.ERROR, PAGES - 1)}


def test_page_that_is_given_up_once_it_was_compared_counts_for_itself():
    made, file = Large(), 0xFFFF888000950000
    mapping = file + 64
    made.memory.put(file, bytes(4096))
    made.memory.put(file + LAYOUT.file.offset("f_mapping"), word(mapping))
    # Without a VMA's own operations or file, nobody takes such pages for a driver's.
    vma = made.vma | {"vm_end": START + PAGES * 4096, "vm_ops": 0xFFFFFFFF81000000, "vm_file": file}
    made.memory.put_struct(LAYOUT.vma, VMA, vma)
    counts = made.check(moves=True, torn=[(mapping_at(0), [word(ANON_VMA | 1), word(0)])]).pages
    assert (counts.verified, counts.skipped) == (PAGES, {})


def test_index_that_rises_where_huge_pages_are_counted(monkeypatch):
    class Hugetlb(VmaTable):
        def __init__(self, *about):
            super().__init__(*about)
            self.hugetlb_order[:] = 9

    monkeypatch.setattr(process, "VmaTable", Hugetlb)
    made = Large()
    # Right for the first page alone.
    made.pages[:, 4] = (START >> 21) + np.arange(len(made.pages))
    layout = replace(LAYOUT, hugetlb_index_in_pages=False)
    made.check()
    findings = ProcessChecker(made.memory.prog, layout, moves=False).check(MM).findings
    assert sum(finding.pages for finding in findings if finding.id == "FOLIO-INDEX") == PAGES - 1


OTHER_VMA, OTHERS = 0xFFFF888000A00000, 1000


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_pages_of_a_small_vma_are_not_judged_by_a_large_one_that_reaches_over_it(monkeypatch, damaged, moves):
    """What begins last has them, however far a damaged VMA before it goes."""
    monkeypatch.setattr(patience, "PAUSE", 0)
    made, end, middle = Large(), START + PAGES * 4096, START + (PAGES - OTHERS) * 4096
    made.memory.put(OTHER_VMA, bytes(4096))
    made.memory.put_struct(LAYOUT.mm, MM, made.mm | {"map_count": 2})
    reaches = end if damaged else middle
    made.memory.put_struct(LAYOUT.vma, VMA, made.vma | {"vm_end": reaches})
    chain, pgoff = OTHER_VMA + LAYOUT.vma.offset("chain_next"), middle >> 12
    # Never faulted, as far as it says; its pages are those of the other one.
    other = {"vm_start": middle, "vm_end": end, "anon_vma": 0, "chain_next": chain, "chain_prev": chain}
    other |= {"vm_pgoff": pgoff, "anon_pgoff_lo": pgoff & 0xFFFFFFFF, "anon_pgoff_hi": pgoff >> 32}
    made.memory.put_struct(LAYOUT.vma, OTHER_VMA, made.vma | other)
    words = [0] * 32
    words[:5] = [1, START - 1, middle - 1, end - 1, (1 << 64) - 1]
    words[17:19], words[31] = [VMA, OTHER_VMA], 3
    made.memory.put_words(LEAF, words)
    made.memory.put_words(AVC + LAYOUT.anon_tree.subtree_last, [(reaches >> 12) - 1])
    found = {(one.id, one.pages) for one in made.check(moves).findings if one.severity is Severity.ERROR}
    assert ("FOLIO-ANON-VMA", OTHERS) in found
    assert ("VMA-TREE" in {id_ for id_, _ in found}) == damaged


@given(
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6),
    ends=st.tuples(st.integers(0, 44), st.integers(1, 20)),
)
@settings(deadline=None)
def test_a_vma_covers_what_is_found_in_it_alone(spans, ends):
    """Also where VMAs overlap, or end before they begin."""
    table = VmaTable.__new__(VmaTable)
    table.vmas = sorted(spans)
    columns = np.array(table.vmas, dtype=np.uint64).reshape(-1, 2)
    table.start, table.end = columns[:, 0], columns[:, 1]
    addresses = ends[0] + np.arange(ends[1], dtype=np.uint64)
    rows = set(table.find(addresses).tolist())
    row = table.covering(ends[0], int(addresses[-1]))
    # Each address has the VMA that begins last before it.
    assert row == (rows.pop() if len(rows) == 1 and rows != {-1} else None)


def test_what_is_left_for_later_keeps_nothing_that_it_was_read_with(monkeypatch):
    monkeypatch.setattr(pagetable, "_TABLES", TABLES // 2)
    made, end = Large(), START + (PAGES // 2 - 1) * 4096
    # A page of the first tables is in no VMA.
    made.memory.put_struct(LAYOUT.vma, VMA, made.vma | {"vm_end": end})
    made.memory.put(LEAF + 16, word(end - 1))
    blocks, kept = [], []

    def walk(*about):
        for leaves in pagetable.for_each_leaf(*about):
            # Views are of whoever has the memory.
            owner = leaves.entry if leaves.entry.base is None else leaves.entry.base
            blocks.append(weakref.ref(owner))
            yield leaves

    def sort(sorter, leaves, *rest):
        kept.append((len(leaves), len(blocks), blocks[0]() is not None))
        return sorted_(sorter, leaves, *rest)

    sorted_ = Sorter.sort
    monkeypatch.setattr(process, "for_each_leaf", walk)
    for module in (registry, process):
        monkeypatch.setattr(module, "MANY", 100)
    monkeypatch.setattr(Sorter, "sort", sort)
    made.check()
    assert kept[0] == (PAGES // 2 - 1, 1, True)
    assert kept[-1] == (1, 2, False)


def test_zero_page_is_none_of_them():
    made = Large()
    made.check()
    layout = replace(LAYOUT, zero_pfn=PFN + AT)
    counts = ProcessChecker(made.memory.prog, layout, moves=False).check(MM).pages
    assert counts.skipped == {ZERO: 1}
    assert counts.verified == PAGES - 1


def test_where_a_page_is_may_matter(judged, monkeypatch):
    check = registry.CHECKS["FOLIO-RMAP-REACH"]
    monkeypatch.setitem(registry.CHECKS, check.id, replace(check, by_place=lambda table: True))
    Large().check()
    assert judged == [PAGES]


def test_who_watches_pages_is_given_each(judged):
    made, watched = Large(), []
    made.check()
    judged.clear()
    ProcessChecker(made.memory.prog, LAYOUT, moves=False, watch=watched.append).check(MM)
    assert judged == [PAGES]
    assert sum(len(batch.address) for batch in watched) == PAGES


@pytest.mark.parametrize(
    ("moves", "seconds", "together"), [(False, 0, True), (True, 60, True), (True, 0, False)]
)
def test_while_the_kernel_runs_nothing_is_left_for_long(monkeypatch, judged, moves, seconds, together):
    monkeypatch.setattr(pagetable, "_TABLES", TABLES // 2)
    monkeypatch.setattr(patience, "LEFT", seconds)
    for module in (registry, process, uniform):
        monkeypatch.setattr(module, "MANY", PAGES + 1)
    made = Large()
    assert made.check(moves).pages.verified == PAGES
    # The tables are read in two halves, neither of which has many entries.
    assert judged == ([PAGES] if together else [PAGES // 2] * 2)
