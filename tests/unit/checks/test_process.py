# SPDX-License-Identifier: GPL-2.0-only
"""How a moving kernel is read: a whole process is made up, and changes between two reads."""

from functools import partial

import drgn
import pytest

from kvirt.checks import patience, process, registry
from kvirt.checks.process import ProcessChecker
from kvirt.checks.registry import VmaContext
from kvirt.findings import Severity
from kvirt.mm.pagetable import absent_entry
from tests.unit.fake import SWAP_INFO, SWAP_TABLES, VMEMMAP, Memory, make_layout

LAYOUT = make_layout()
absent = partial(absent_entry, LAYOUT.pgtable)
MM, VMA, AVC, ANON_VMA, LEAF = (0xFFFF888000000000 + i * 0x10000 for i in range(1, 6))
PGD, START, PFN = 0xFFFF888000100000, 0x7F0000000000, 0x500
TABLE = 0x67
PAGES = 4
MAX = (1 << 64) - 1


def leaf():
    words = [0] * 32
    words[0] = 1
    words[1:4] = [START - 1, START + PAGES * 4096 - 1, MAX]
    words[17] = VMA
    words[31] = 2  # metadata: the last slot in use
    return words


class Process:
    """One VMA of four anonymous pages; memory that reads differently from the n-th read on."""

    def __init__(self):
        self.memory = Memory()
        self.reads = {}
        # Each has a page to itself, which is read with it.
        for address in (MM, VMA, AVC, ANON_VMA, LEAF):
            self.memory.put(address, bytes(4096))
        put = self.memory.put_struct
        self.mm = {
            "ma_root": LEAF | 1 << 3 | 6,
            "map_count": 1,
            "mm_users": 1,
            "pgd": PGD,
        }
        put(LAYOUT.mm, MM, self.mm)
        self.memory.put_words(LEAF, leaf())
        head = VMA + LAYOUT.vma.offset("chain_next")
        link = AVC + LAYOUT.avc.offset("same_vma_next")
        self.vma = {
            "vm_start": START,
            "vm_end": START + PAGES * 4096,
            "vm_mm": MM,
            "vm_flags": 0x73,
            "anon_vma": ANON_VMA,
            "vm_pgoff": START >> 12,
            "anon_pgoff_lo": START >> 12 & 0xFFFFFFFF,
            "anon_pgoff_hi": START >> 44,
            "chain_next": link,
            "chain_prev": link,
        }
        put(LAYOUT.vma, VMA, self.vma)
        put(
            LAYOUT.avc,
            AVC,
            {"vma": VMA, "anon_vma": ANON_VMA, "same_vma_next": head, "same_vma_prev": head},
        )
        # The only node of its tree.
        self.memory.put_words(AVC + LAYOUT.anon_tree.subtree_last, [(START >> 12) + PAGES - 1])
        node = AVC + LAYOUT.anon_tree.rb
        self.anon_vma = {
            "root": ANON_VMA,
            "parent": ANON_VMA,
            "refcount": 1,
            "rb_root": node << 64 | node,
            "num_children": 1,
            "num_active_vmas": 1,
        }
        put(LAYOUT.anon_vma, ANON_VMA, self.anon_vma)
        tables = [0x200000, 0x201000, 0x202000]
        for at, below, shift in zip([None, *tables[:2]], tables, (39, 30, 21), strict=True):
            words = [0] * 512
            words[START >> shift & 511] = below | TABLE
            if at is None:
                self.memory.put_words(PGD, words)
            else:
                self.memory.put_words(at, words, physical=True)
        self.memory.put_words(
            0x202000, [PFN + i << 12 | TABLE for i in range(PAGES)] + [0] * 508, physical=True
        )
        for i in range(PAGES):
            self.memory.put_words(VMEMMAP + (PFN + i) * 64, self.page(i, START + i * 4096 >> 12))

    def page(self, i, index):
        return [0, 0, 0, ANON_VMA | 1, index, 0, 0, 0]

    def changing(self, address, states, *, physical=False):
        """Bytes at an address that read as the next of *states* each time, and stay with the last."""
        count = 0

        def read(at, size, offset, is_physical):
            nonlocal count
            data = states[min(count, len(states) - 1)]
            count += 1
            return data[offset : offset + size]

        self.memory.prog.add_memory_segment(address, len(states[0]), read, physical)

    def check(self, moves=True):
        return ProcessChecker(self.memory.prog, LAYOUT, moves=moves).check(MM)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE", 0)


def word(value):
    return value.to_bytes(8, "little")


def index_at(i):
    return VMEMMAP + (PFN + i) * 64 + 32


@pytest.mark.parametrize("moves", [False, True])
def test_sound_process(moves):
    result = Process().check(moves)
    assert result.findings == []
    assert result.incomplete == []
    assert (result.pages.present, result.pages.anon, result.pages.checked) == (4, 4, 4)


@pytest.mark.parametrize("moves", [False, True])
def test_lasting_damage_is_an_error(moves):
    made_up = Process()
    good = START + 2 * 4096 >> 12
    made_up.changing(index_at(2), [word(good + 1)])
    [finding] = made_up.check(moves).findings
    assert (finding.id, finding.severity) == ("FOLIO-INDEX", Severity.ERROR)
    assert finding.address == START + 2 * 4096
    assert (finding.expected, finding.actual, finding.pages) == (good, good + 1, 1)
    assert finding.vma == (START, START + PAGES * 4096)


@pytest.mark.parametrize("wrong_reads", [1, 2])
def test_what_does_not_repeat_is_transient(wrong_reads):
    made_up = Process()
    good = START + 2 * 4096 >> 12
    # Each pass over the pages reads the struct page of a small folio once.
    made_up.changing(index_at(2), [word(good + 1)] * wrong_reads + [word(good)])
    [finding] = made_up.check().findings
    assert (finding.id, finding.severity) == ("FOLIO-INDEX", Severity.TRANSIENT)


@pytest.mark.parametrize("short_reads", [1, 2])
def test_pages_of_a_vma_that_grew_meanwhile_are_verified(short_reads):
    made_up = Process()
    end = VMA + LAYOUT.vma.offset("vm_end")
    # The family's reading of it comes between.
    short = [word(START + 2 * 4096)] * (2 * short_reads - 1)
    made_up.changing(end, [*short, word(START + PAGES * 4096)])
    result = made_up.check()
    pages = result.pages
    assert (pages.present, pages.anon, pages.checked, pages.verified) == (4, 4, 4, 4)
    assert (dict(pages.skipped), dict(pages.unverified), result.incomplete) == ({}, {}, [])


def test_doubtful_page_that_is_gone_is_not_counted():
    made_up = Process()
    made_up.changing(0x202000 + 8 * PAGES, [word(PFN << 12 | TABLE), word(0)], physical=True)
    result = made_up.check()
    assert (result.pages.present, result.pages.checked, result.pages.unverified.total()) == (4, 4, 0)
    assert (result.findings, result.incomplete) == ([], [])


@pytest.mark.parametrize(
    ("entry", "reason", "present"),
    [
        (PFN << 12 | TABLE, "pages no VMA covers", 5),
        (absent(0, 0x1200), "swap entries no VMA covers", 4),
    ],
)
def test_doubtful_page_that_stays_is_counted_once(entry, reason, present):
    made_up = Process()
    made_up.changing(0x202000 + 8 * PAGES, [word(entry)], physical=True)
    result = made_up.check()
    assert (result.pages.present, result.pages.checked) == (present, 4)
    assert dict(result.pages.skipped) == dict(result.pages.unverified) == {reason: 1}
    assert f"1 {reason}, the first at {START + PAGES * 4096:#x}" in result.incomplete[0]


def test_page_that_is_replaced_all_the_time_is_not_accused():
    made_up = Process()
    made_up.changing(index_at(2), [word(0x1234)])
    # Every read of the page table finds the wrong page in the entry, or another one.
    entries = [word(PFN + 2 << 12 | TABLE), word(PFN + 1 << 12 | TABLE)]
    made_up.changing(0x202000 + 16, entries * 1000, physical=True)
    result = made_up.check()
    assert {finding.severity for finding in result.findings} == {Severity.TRANSIENT}


def test_lock_held_for_write_on_a_dump_makes_findings_transient():
    made_up = Process()
    made_up.changing(index_at(2), [word(0x1234)])
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "mmap_lock_count": 1})
    result = made_up.check(moves=False)
    assert [finding.severity for finding in result.findings] == [Severity.TRANSIENT]
    # And the process is not called consistent.
    assert "mmap_lock is held for write" in result.incomplete[0]


def test_lock_that_is_never_released_leaves_the_verdict_open():
    made_up = Process()
    made_up.changing(index_at(2), [word(0x1234)])
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "mmap_lock_count": 1})
    result = made_up.check()
    assert [finding.severity for finding in result.findings] == [Severity.TRANSIENT]
    assert "could not be read again" in result.incomplete[0]


def test_first_fault_under_way_is_not_an_error():
    made_up = Process()
    head = VMA + LAYOUT.vma.offset("chain_next")
    made_up.memory.put_struct(LAYOUT.vma, VMA, {**made_up.vma, "chain_next": head, "chain_prev": head})
    locked = {**made_up.anon_vma, "rwsem_count": 1}
    made_up.memory.put_struct(LAYOUT.anon_vma, ANON_VMA, locked)
    severities = {f.id: f.severity for f in made_up.check(moves=False).findings}
    assert severities["AVC-EMPTY"] is Severity.TRANSIENT


def test_exiting_process_is_not_judged():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "mm_users": 0})
    result = made_up.check()
    assert result.findings == []
    assert "exiting" in result.incomplete[0]


def test_pages_that_are_wrong_in_the_same_way_are_one_finding():
    made_up = Process()
    made_up.memory.put_struct(
        LAYOUT.vma, VMA, {**made_up.vma, "anon_pgoff_lo": made_up.vma["anon_pgoff_lo"] + 3}
    )
    by_id = {f.id: f for f in made_up.check(moves=False).findings}
    assert set(by_id) == {"FOLIO-INDEX", "VMA-PURE-ANON-PGOFF", "AVC-TREE-SUBTREE-LAST"}
    assert by_id["FOLIO-INDEX"].pages == PAGES
    assert by_id["FOLIO-INDEX"].address == START


def test_memory_is_bounded_when_everything_is_wrong(monkeypatch):
    monkeypatch.setattr(process, "HITS_MAX", 2)
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.vma, VMA, {**made_up.vma, "anon_pgoff_lo": 5, "vm_pgoff": 5})
    result = made_up.check(moves=False)
    assert sum(f.pages for f in result.findings if f.id == "FOLIO-INDEX") == 2
    assert "2 more pages look wrong" in result.incomplete[0]


def test_what_cannot_be_judged_is_counted():
    made_up = Process()
    marker, swap, migration = 31 << 59, 5 << 59, absent(26, 0x600)
    entries = [0x99 << 12 | TABLE, marker, swap | 0x4000, migration, 0x700 << 12 | TABLE]
    made_up.memory.put_words(0x202000, entries + [0] * 507, physical=True)
    result = made_up.check(moves=False)
    # The fifth lies behind the VMA's end, before its struct page is looked for.
    assert dict(result.pages.skipped) == {
        "zero pages": 1,
        "marker entries": 1,
        "swap entries that cannot be looked up in the swap cache": 1,
        "pages whose struct page cannot be read": 1,
        "pages no VMA covers": 1,
    }
    assert [sentence.partition(",")[0] for sentence in result.incomplete] == [
        "1 pages no VMA covers",
        "1 pages whose struct page cannot be read",
        "1 swap entries that cannot be looked up in the swap cache",
    ]
    assert (result.pages.present, result.pages.checked) == (3, 0)


@pytest.mark.parametrize("type_", [25, 27, 28, 30])
def test_entries_that_stand_for_a_page_are_judged_as_the_page(type_):
    made_up = Process()
    entries = [absent(type_, PFN + i) for i in range(PAGES)]
    made_up.memory.put_words(0x202000, entries + [0] * 508, physical=True)
    result = made_up.check(moves=False)
    assert result.findings == []
    assert (result.pages.present, result.pages.anon, result.pages.checked) == (4, 4, 4)
    made_up.changing(index_at(2), [word(0x1234)])
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.address, finding.actual) == ("FOLIO-INDEX", START + 2 * 4096, 0x1234)


def swapped(made_up, entries):
    """Have the process's pages in swap, with these entries of the swap table."""
    made_up.memory.put_words(
        0x202000, [absent(0, 0x1200 + i) for i in range(PAGES)] + [0] * 508, physical=True
    )
    area, clusters, table = (0xFFFF888010000000 + i * 0x10000 for i in range(3))
    made_up.memory.put_words(SWAP_INFO, [area])
    made_up.memory.put_struct(SWAP_TABLES.info, area, {"max": 0x10000, "cluster_info": clusters})
    made_up.memory.put_words(clusters + (0x1200 // 512) * 16, [0, table])
    made_up.memory.put_words(table, entries)


def cached(pfn):
    # A count of swap entries is above the page frame.
    return 1 << 60 | pfn << 2 | 2


def put_cached(made_up, i, index, flags=0):
    made_up.memory.put_words(VMEMMAP + (PFN + i) * 64, [flags, 0, 0, ANON_VMA | 1, index, 0x1200 + i, 0, 0])


def test_swap_cache():
    made_up = Process()
    swapped(made_up, [cached(PFN), 1 << 60 | 1, 0, cached(PFN + 3)])
    put_cached(made_up, 0, START >> 12)
    # Read ahead: in the swap cache, and nobody's yet.
    made_up.memory.put_words(VMEMMAP + (PFN + 3) * 64, [0, 0, 0, 0, 0, 0x1203, 0, 0])
    result = made_up.check(moves=False)
    assert (result.findings, result.incomplete) == ([], [])
    assert dict(result.pages.skipped) == {
        "swap entries": 2,
        "swap entries whose page was only read ahead": 1,
    }
    assert (result.pages.present, result.pages.swapcache) == (0, 1)


@pytest.mark.parametrize(("flags", "severity"), [(0, Severity.INFO), (LAYOUT.pg_head, Severity.ERROR)])
def test_wrong_index_in_the_swap_cache(flags, severity):
    made_up = Process()
    swapped(made_up, [cached(PFN), 0, 0, 0])
    put_cached(made_up, 0, 0x1234, flags)
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.severity) == ("SWAPCACHE-INDEX", severity)
    assert (finding.address, finding.expected, finding.actual) == (START, START >> 12, 0x1234)


def test_swap_cache_that_answers_for_another_entry():
    made_up = Process()
    swapped(made_up, [0, cached(PFN), 0, 0])
    put_cached(made_up, 0, START >> 12)
    result = made_up.check(moves=False)
    # The next page after it belongs to another folio.
    assert dict(result.pages.skipped) == {
        "swap entries": 3,
        "swap entries whose folio in the swap cache is another entry's": 1,
    }
    assert len(result.incomplete) == 1


@pytest.mark.parametrize("entry", [5 << 59 | 0x4000, (26 << 59) | 0])
def test_entries_of_anonymous_memory_in_an_unfaulted_vma(entry):
    made_up = Process()
    head = VMA + LAYOUT.vma.offset("chain_next")
    made_up.memory.put_struct(
        LAYOUT.vma, VMA, {**made_up.vma, "anon_vma": 0, "chain_next": head, "chain_prev": head}
    )
    if entry >> 59 == 26:
        entry = absent(26, PFN)
    made_up.memory.put_words(0x202000, [entry] + [0] * 511, physical=True)
    found = {f.id: f for f in made_up.check(moves=False).findings}
    finding = found["SWAP-ENTRY-FAULTED"]
    assert (finding.severity, finding.address, finding.actual) == (Severity.ERROR, START, 0)


def ksm(made_up, **item):
    """Have KSM remember the process's first page."""
    node, link = 0xFFFF888020000000, 0xFFFF888020000100
    made_up.memory.put_words(VMEMMAP + PFN * 64, [0, 0, 0, node | 3, 0, 0, 0, 0])
    made_up.memory.put_struct(
        LAYOUT.ksm.stable_node,
        node,
        {"first": link + LAYOUT.ksm.rmap_item.offset("next"), "kpfn": PFN, "rmap_hlist_len": 1},
    )
    good = {"mm": MM, "address": START | 0x200, "head": node, "anon_vma": ANON_VMA}
    made_up.memory.put_struct(LAYOUT.ksm.rmap_item, link, {**good, "linear_page_index": START >> 12, **item})


def test_ksm_page_is_judged_by_its_rmap_item():
    made_up = Process()
    ksm(made_up)
    result = made_up.check(moves=False)
    assert (result.findings, result.incomplete, dict(result.pages.skipped)) == ([], [], {})
    assert (result.pages.anon, result.pages.checked) == (3, 4)


@pytest.mark.parametrize(
    ("item", "id", "expected"),
    [
        ({"linear_page_index": 7}, "KSM-INDEX", START >> 12),
        ({"anon_vma": 7}, "KSM-ANON-VMA", ANON_VMA),
    ],
)
def test_ksm_looks_elsewhere(item, id, expected):
    made_up = Process()
    ksm(made_up, **item)
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.address) == (id, START)
    assert (finding.expected, finding.actual) == (expected, 7)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"mm": MM + 0x1000}, "KSM pages without an rmap_item in this process"),
        ({"address": START}, "KSM pages whose stable node does not lead to their rmap_items"),
        ({"head": 7}, "KSM pages whose stable node does not lead to their rmap_items"),
        (
            {"next": 0xFFFF888020000100 + LAYOUT.ksm.rmap_item.offset("next")},
            "KSM pages whose stable node does not lead to their rmap_items",
        ),
    ],
)
def test_ksm_page_that_cannot_be_judged(item, reason):
    made_up = Process()
    ksm(made_up, **item)
    result = made_up.check(moves=False)
    assert (result.findings, dict(result.pages.skipped)) == ([], {reason: 1})
    assert len(result.incomplete) == ("stable node" in reason)


def test_lasting_damage_is_told_from_a_passing_one_beside_it():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "map_count": 7})
    end = VMA + LAYOUT.vma.offset("vm_end")
    made_up.changing(end, [word(START + 5 * 4096), word(START + PAGES * 4096)])
    severities = {f.message.split()[0]: f.severity for f in made_up.check().findings}
    assert severities == {"mm->map_count": Severity.ERROR, "the": Severity.TRANSIENT}


def test_tree_that_is_torn_in_every_reading_leaves_the_verdict_open():
    made_up = Process()
    dead = b"".join(word(w) for w in [LEAF, *leaf()[1:]])
    sound = b"".join(word(w) for w in leaf())
    made_up.changing(LEAF, [dead] * (patience.TRIES + 1) + [sound])
    result = made_up.check()
    assert [f.severity for f in result.findings if f.id == "VMA-TREE"] != [Severity.ERROR]
    assert any("some may be missing" in sentence for sentence in result.incomplete)


def test_one_entry_that_keeps_changing_does_not_excuse_the_others():
    made_up = Process()
    made_up.changing(index_at(1), [word(0x1234)])
    made_up.changing(index_at(2), [word(0x1234)])
    entries = [word(PFN + 2 << 12 | TABLE), word(PFN + 2 << 12 | TABLE | 1 << 58)]
    made_up.changing(0x202000 + 16, entries * 1000, physical=True)
    lasting = [f for f in made_up.check().findings if f.severity is Severity.ERROR]
    assert [f.address for f in lasting] == [START + 4096]


@pytest.mark.parametrize("moves", [False, True])
def test_page_that_is_not_anonymous_in_anonymous_memory(moves):
    made_up = Process()
    for mapping in (0, ANON_VMA, ANON_VMA | 2):
        made_up.memory.put_words(VMEMMAP + (PFN + 2) * 64, [0, 0, 0, mapping, 0x1234, 0, 0, 0])
        result = made_up.check(moves)
        assert result.pages.checked == PAGES - 1
        [sentence] = result.incomplete
        assert f"not anonymous, the first at {START + 2 * 4096:#x}" in sentence


def test_garbage_that_is_read_once_leaves_nothing_behind():
    made_up = Process()
    sound = word(PFN + 2 << 12 | TABLE)
    made_up.changing(0x202000 + 16, [word(0x0008000000000067), sound], physical=True)
    result = made_up.check()
    assert (result.findings, result.incomplete) == ([], [])


def test_page_tables_that_cannot_be_read_do_not_hide_what_was_found():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "pgd": 0xDEAD000000000000, "map_count": 7})
    result = made_up.check(moves=False)
    assert [f.id for f in result.findings] == ["VMA-TREE"]
    assert "page tables cannot be read" in result.incomplete[0]


def test_page_table_that_is_its_own_ancestor():
    made_up = Process()
    looped = 0x300000
    made_up.memory.put_words(looped, [looped | TABLE] * 512, physical=True)
    made_up.memory.put_words(PGD, [looped | TABLE, *[0] * 511])
    result = made_up.check(moves=False)
    assert result.pages.present == 0
    assert "page tables cannot be read" in result.incomplete[0]


def test_lock_of_a_first_fault_excuses_nothing_else():
    made_up = Process()
    made_up.memory.put_struct(LAYOUT.vma, VMA, {**made_up.vma, "vm_pgoff": 5})
    locked = {**made_up.anon_vma, "rwsem_count": 1}
    made_up.memory.put_struct(LAYOUT.anon_vma, ANON_VMA, locked)
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.severity) == ("VMA-PURE-ANON-PGOFF", Severity.ERROR)


def test_link_without_anon_vma():
    made_up = Process()
    head = VMA + LAYOUT.vma.offset("chain_next")
    link, other = (avc + LAYOUT.avc.offset("same_vma_next") for avc in (AVC, AVC + 0x1000))
    made_up.memory.put_struct(LAYOUT.vma, VMA, {**made_up.vma, "chain_prev": other})
    made_up.memory.put_words(AVC, [VMA, ANON_VMA, other, head])
    made_up.memory.put_struct(
        LAYOUT.avc, AVC + 0x1000, {"vma": VMA, "anon_vma": 0, "same_vma_next": head, "same_vma_prev": link}
    )
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.severity, finding.actual) == ("AVC-SELF", Severity.ERROR, 0)


def test_part_of_a_tree_that_the_dump_lacks_costs_other_vmas_no_check():
    made_up = Process()
    checker = ProcessChecker(made_up.memory.prog, LAYOUT, moves=False)
    into = process._Pass(checker.read(MM))
    [entry] = into.space.entries
    lacking, first, second = (VmaContext(into.space, entry.vma, at, None) for at in range(3))

    def run(contexts):
        for context in contexts:
            if context is lacking:
                raise drgn.FaultError("Excluded page", 0)
            yield context.violation("wrong")

    found = checker._objections(run, [first, lacking, second], into)
    assert [(context.first, violation.message) for context, violation in found] == [
        (1, "wrong"),
        (2, "wrong"),
    ]
    assert into.filtered == 1


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_vma_is_looked_at_however_many_at_once(monkeypatch, at_once):
    monkeypatch.setattr(process, "_VMAS_AT_ONCE", at_once)
    made_up = Process()
    second, start = 0xFFFF888000060000, START + PAGES * 4096
    head = second + LAYOUT.vma.offset("chain_next")
    displaced = {"vm_start": start, "vm_end": start + 4096, "vm_mm": MM, "vm_flags": 0x73}
    made_up.memory.put_struct(LAYOUT.vma, second, {**displaced, "chain_next": head, "chain_prev": head})
    words = leaf()
    words[3:5], words[18], words[31] = [start + 4095, MAX], second, 3
    made_up.memory.put_words(LEAF, words)
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "map_count": 2})
    [finding] = made_up.check(moves=False).findings
    assert (finding.id, finding.vma) == ("VMA-UNFAULTED-PGOFF", (start, start + 4096))


@pytest.fixture
def one_and_many(monkeypatch):
    """A VMA of one page, and behind it one of many as dumps go; which are looked at first. All are wrong."""
    for module in (registry, process):
        monkeypatch.setattr(module, "MANY", 2)
    made_up = Process()
    second, start, end = 0xFFFF888000060000, START + 4096, START + PAGES * 4096
    head = second + LAYOUT.vma.offset("chain_next")
    many = {"vm_start": start, "vm_end": end, "vm_mm": MM, "vm_flags": 0x73}
    made_up.memory.put_struct(LAYOUT.vma, second, {**many, "chain_next": head, "chain_prev": head})
    made_up.memory.put_struct(LAYOUT.vma, VMA, {**made_up.vma, "vm_end": start})
    words = leaf()
    words[2:5], words[18], words[31] = [start - 1, end - 1, MAX], second, 3
    made_up.memory.put_words(LEAF, words)
    made_up.memory.put_struct(LAYOUT.mm, MM, {**made_up.mm, "map_count": 2})
    made_up.memory.put(index_at(0), word(0x1234))
    return made_up


def test_findings_on_pages_are_in_the_order_of_addresses(one_and_many):
    found = [finding for finding in one_and_many.check(moves=False).findings if finding.id == "FOLIO-INDEX"]
    assert [(f.address, f.pages) for f in found] == [(START, 1), (START + 4096, PAGES - 1)]


def test_a_small_vma_is_not_lost_when_everything_is_wrong(one_and_many, monkeypatch):
    monkeypatch.setattr(process, "HITS_MAX", 3)
    result = one_and_many.check(moves=False)
    found = [(f.id, f.address, f.pages) for f in result.findings if f.id.startswith("FOLIO")]
    # The VMA of many has no anon_vma, and its pages are in none.
    assert found == [
        ("FOLIO-INDEX", START, 1),
        ("FOLIO-INDEX", START + 4096, PAGES - 1),
        ("FOLIO-ANON-VMA", START + 4096, 1),
    ]
    assert any(sentence.startswith(f"{PAGES - 2} more pages look wrong") for sentence in result.incomplete)
